"""What the keys of an adapter's file mean, in the names of peft, diffusers and kohya."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

# How a key ends, behind the module that it changes.
PARTS = {
    "down": r"(?:lora_A(?:\.\w+)?|lora\.down|lora_down|lora_linear_layer\.down)\.weight",
    "up": r"(?:lora_B(?:\.\w+)?|lora\.up|lora_up|lora_linear_layer\.up)\.weight",
    "mid": r"lora_mid\.weight",
    "bias": r"(?:lora_B(?:\.\w+)?|lora\.up|lora_up|lora_linear_layer\.up)\.bias",
    "magnitude": r"(?:lora_magnitude_vector(?:\.\w+)*|dora_scale)",
    "table_up": r"lora_embedding_A(?:\.\w+)?",
    "table_down": r"lora_embedding_B(?:\.\w+)?",
}
KEY = re.compile(r"(?P<module>.+?)[._](?:" + "|".join(f"(?P<{name}>{p})" for name, p in PARTS.items()) + ")")
ALPHA = re.compile(r"(?P<module>.+?)(?:[._]lora)?\.alpha")
# Other kinds of adapters, by how their keys end.
OTHER_KINDS = {
    "LoHa": re.compile(r".+\.hada_\w+"),
    "LoKr": re.compile(r".+\.lokr_\w+"),
    "OFT": re.compile(r".+\.b?oft_\w+(?:\.\w+)*"),
    "IA3": re.compile(r".+\.(?:ia3_l(?:\.\w+)?|on_input)"),
    "VeRA": re.compile(r".+\.vera_\w+(?:\.\w+)*"),
    "AdaLoRA": re.compile(r".+\.(?:lora_E|ranknum)(?:\.\w+)?"),
    "differences of whole tensors": re.compile(r".+\.diff(?:_b)?"),
}
# What stands before the module, and which part of a pipeline it says; other keys may mean any.
COMPONENTS = {
    "unet.": "denoiser",
    "transformer.": "denoiser",
    "prior.": "denoiser",
    "diffusion_model.": "denoiser",
    "transformer_2.": "transformer_2",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
    "lora_unet_": "denoiser",
    "lora_transformer_": "denoiser",
    "lycoris_": "denoiser",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
# Attention in the names that diffusers gave adapters before peft, by what the layers are called.
OLD_UNET = {r"\.processor\b": "", r"\bto_out$": "to_out.0"}
OLD_TEXT = {r"\bto_([qkv])$": r"\1_proj", r"\bto_out$": "out_proj"}


@dataclass(frozen=True)
class AdapterKey:
    """One key of an adapter.

    Attributes:
        component: which part of a pipeline it is for: denoiser, text_encoder, …; empty where the key doesn't say.
        prefix: which said so, or empty.
        module: path of the module that it changes; of a tensor that is stored whole, its key.
        part: one of ``PARTS``, alpha, or whole.
    """

    component: str
    prefix: str
    module: str
    part: str


def spellings(module: str) -> list[str]:
    """Say what a module may be called, as the key has it first."""
    names = [module]
    for changes in (OLD_UNET, OLD_TEXT):
        name = module
        for old, new in changes.items():
            name = re.sub(old, new, name)
        names.append(name)
    # CLIP's text model, which transformers saved within another until its version 5.
    return [*names, *(f"text_model.{n}" for n in names), *(re.sub(r"^text_model[._]", "", n) for n in names)]


def parse_key(key: str) -> AdapterKey:
    """Take a key apart; one that ends like none of an adapter is a tensor that is stored whole."""
    rest = key.removeprefix("base_model.model.")
    prefix = next((p for p in COMPONENTS if rest.startswith(p)), "")
    component, rest = COMPONENTS.get(prefix, ""), rest.removeprefix(prefix)
    if found := KEY.fullmatch(rest):
        return AdapterKey(component, prefix, found["module"], str(found.lastgroup))
    if found := ALPHA.fullmatch(rest):
        return AdapterKey(component, prefix, found["module"], "alpha")
    whole = re.sub(r"\.(?:base_layer|modules_to_save(?:\.\w+)?)(?=\.\w+$)", "", rest)
    return AdapterKey(component, prefix, whole, "whole")


def other_kind(keys: Iterable[str]) -> tuple[str, str] | None:
    """Find a key of an adapter that is no LoRA, and say of which kind it is."""
    return next(((kind, k) for k in keys for kind, pattern in OTHER_KINDS.items() if pattern.fullmatch(k)), None)


def is_adapter(keys: Iterable[str]) -> bool:
    """Say whether a file's keys are those of an adapter, of any kind."""
    # An .alpha alone is none: some activations have a parameter of that name.
    return any(KEY.fullmatch(key) or other_kind([key]) for key in keys)
