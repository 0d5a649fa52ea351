"""What a pipeline is for and how it is called, from its files alone, for the model card of a merge."""

import re
from pathlib import Path

from ..storage.reading import read_record
from .card import EXAMPLE, TASK, Usage

ADVICE = "mend it, or fetch the model again"
PROMPT = '"a lighthouse on a hill"'
SAVE = '.images[0].save("image.png")'
VIDEO = re.compile(r"Video|^Wan|^LTX|^Mochi|^Allegro|^Latte|^Animate|^Cosmos")
# What a base's card says that holds for a merge of it.
INHERITED = re.compile(r"^(license|license_name|license_link|base_model):.*\n(?:[ \t-].*\n)*", re.MULTILINE)


def usage_of(folder: Path) -> Usage:
    """Say what the pipeline or network in a folder does, by the hub's tags, and write Python that does it."""
    index = folder / "model_index.json"
    if not index.is_file():
        return _network_usage(folder)
    parts = read_record(index, ADVICE)
    kind = str(parts.get("_class_name", ""))
    if any(part.startswith("text_encoder") and value != [None, None] for part, value in parts.items()):
        return _text_usage(kind)
    if kind == "DiTPipeline":
        return Usage("class-conditional-image-generation", f"pipeline(class_labels=[0], num_inference_steps=50){SAVE}")
    unet = folder / "unet/config.json"
    if unet.is_file() and read_record(unet, ADVICE).get("num_class_embeds") is not None:
        return Usage(
            "class-conditional-image-generation",
            "# No pipeline of diffusers draws classes with a UNet2DModel: in the scheduler's loop, for each x and t,\n"
            "prediction = pipeline.unet(x, t, class_labels=torch.tensor([0])).sample",
        )
    if re.search("Img2Img|Inpaint|SuperResolution|Upscale", kind):
        return Usage("image-to-image", _with_image(f"pipeline(image=image){SAVE}", kind))
    return Usage(TASK, EXAMPLE)


def inherited(folder: Path, name: str) -> str:
    """Pick from the front matter of a base's card the lines on its licence and on what it was made from.

    Args:
        name: of the base, which is what a merge was made from where the card says nothing and it is the hub's.
    """
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    front = re.match(r"---\n(.*?\n)---\s*\n", text, re.DOTALL)
    found = "".join(m[0] for m in INHERITED.finditer(front[1])) if front else ""
    is_hubs = "/" in name and not name.startswith((".", "/"))
    return found + (f"base_model: {name}\n" if is_hubs and "base_model:" not in found else "")


def _network_usage(folder: Path) -> Usage:
    config = folder / "config.json"
    kind = str(read_record(config, ADVICE).get("_class_name", "")) if config.is_file() else ""
    if not kind.isidentifier():
        return Usage(None, "", "")
    return Usage(None, "", f'from diffusers import {kind}\n\nnetwork = {kind}.from_pretrained("path/of/this/folder")\n')


def _text_usage(kind: str) -> Usage:
    if VIDEO.search(kind):
        return _video_usage(kind)
    if re.search("Img2Img|Inpaint|Edit|Pix2Pix|Upscale|Depth2Img|Variation|Kontext", kind):
        return Usage("image-to-image", _with_image(f"pipeline({PROMPT}, image=image){SAVE}", kind))
    return Usage("text-to-image", f"pipeline({PROMPT}, num_inference_steps=50){SAVE}")


def _video_usage(kind: str) -> Usage:
    task, call = "text-to-video", f"video = pipeline({PROMPT}).frames[0]"
    if re.search("ImageToVideo|Image2Video", kind):
        task, call = "image-to-video", _with_image(f"video = pipeline(image=image, prompt={PROMPT}).frames[0]", kind)
    return Usage(task, f'from diffusers.utils import export_to_video\n\n{call}\nexport_to_video(video, "video.mp4")')


def _with_image(call: str, kind: str) -> str:
    lines = ["from diffusers.utils import load_image", "", 'image = load_image("input.png")']
    if "Inpaint" in kind:
        lines.append('mask = load_image("mask.png")')
        call = call.replace("image=image", "image=image, mask_image=mask")
    return "\n".join([*lines, call])
