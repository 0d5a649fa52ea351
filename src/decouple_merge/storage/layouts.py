"""Where the weights of a model lie: files, shards, variants and pipelines, by diffusers' own rules."""

import re
from collections.abc import Collection
from pathlib import Path

from ..errors import UserError
from .reading import looked_for, read_record

ADVICE = "fetch or copy it again"
# Trunk projections of a pipeline, which stock diffusers does not read.
PROJECTIONS_FILE = "projections.safetensors"
PICKLES = {".bin", ".pt", ".pth", ".ckpt"}
# The networks that a pipeline denoises with; a second one has a number, Wan 2.2's ``transformer_2``.
DENOISER = re.compile(r"(?:unet|transformer|prior)(?:_\d+)?")
# What diffusers and transformers call weights, plain or behind a variant such as fp16 or non_ema.
INDEX = re.compile(r"(?P<stem>diffusion_pytorch_model|model)\.safetensors\.index(?:\.(?P<variant>[^.]+))?\.json")
WEIGHTS = re.compile(r"(?P<stem>diffusion_pytorch_model|model)(?:\.(?P<variant>[^.-]+))?\.safetensors")
# Files that would be stale copies of a network's weights beside new ones.
STALE = ("*.safetensors", "*.bin", "*.pt", "*.ckpt", "*.msgpack", "*.index.json", "*.index.*.json")


def weight_files(path: Path) -> list[Path]:
    """Find a model's safetensors: a file, an index of shards, or a folder that holds either.

    Of a folder it is what diffusers loads: the plain files before variants, an index before a file. A variant counts
    where it is the only one.

    Raises:
        UserError: there are none, several, or a shard is missing; or the weights are a pickle.
    """
    if path.suffix in PICKLES:
        raise UserError(f"{path} is a pickle, expected safetensors: convert it with diffusers' save_pretrained")
    if re.search(r"\.index(\.[^.]+)?\.json$", path.name) and path.is_file():
        return _shards(path)
    if path.is_file():
        return [path]
    chosen = _of_folder(path)
    return _shards(chosen) if chosen.suffix == ".json" else [chosen]


def _shards(index: Path) -> list[Path]:
    places = read_record(index, ADVICE).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(n, str) and Path(n).name == n for n in places.values()):
        raise UserError(f"{index}: expected a weight_map of keys to files beside it")
    names = sorted(set(places.values()))
    missing = [n for n in names if not (index.parent / n).is_file()]
    if missing:
        raise UserError(f"{index}: {len(missing)} of {len(names)} shards are missing, {missing[0]} among them")
    if pickles := [n for n in names if Path(n).suffix in PICKLES]:
        raise UserError(f"{index} is of pickles, {pickles[0]} among them, expected safetensors: convert the model")
    return [index.parent / n for n in names]


def _of_folder(path: Path) -> Path:
    """Choose the index or file of a folder."""
    names = sorted(p.name for p in path.glob("*") if p.is_file()) if path.is_dir() else []
    found: dict[tuple[str, str], str] = {}
    for pattern in (WEIGHTS, INDEX):
        found |= {(m["stem"], m["variant"] or ""): n for n in names if (m := pattern.fullmatch(n))}
    stems = sorted({stem for stem, _ in found})
    if len(stems) > 1 and (path / "config.json").is_file():
        is_diffusers = "_class_name" in read_record(path / "config.json", ADVICE)
        stems = ["diffusion_pytorch_model" if is_diffusers else "model"]
    pickles = [n for n in names if Path(n).suffix in PICKLES]
    if len(stems) == 1:
        variants = [v for stem, v in found if stem == stems[0]]
        if "" in variants:
            return path / found[stems[0], ""]
        plain = [n for n in pickles if n in (f"{stems[0]}.bin", "pytorch_model.bin")]
        if plain:
            raise UserError(
                f"{path}: the plain weights are a pickle, {plain[0]}, beside {', '.join(variants)} in safetensors; "
                "convert them with diffusers' save_pretrained, or give the file that is meant"
            )
        if len(variants) == 1:
            return path / found[stems[0], variants[0]]
    others = [n for n in names if n.endswith(".safetensors") and n != PROJECTIONS_FILE]
    if not found and len(others) == 1:
        return path / others[0]
    candidates = ", ".join(found.values() if found else others)
    nothing = "no weights" if path.exists() else "there is no such file or folder"
    reason = f"which of {candidates} is meant?" if candidates else f"{nothing}{looked_for(path)}"
    if pickles and not candidates:
        reason = f"only pickles: {', '.join(pickles)}"
    raise UserError(
        f"{path}: {reason}; expected a .safetensors file, an .index.json, or a folder with one of either: a pipeline, "
        "one of its networks, or an expert"
    )


def files_of_parts(path: Path) -> dict[str, list[Path]]:
    """Find the weight files of a pipeline's denoisers, by name; those of one alone have its projections with them.

    Any other path is one part. Raises as ``weight_files``.
    """
    files = {name: weight_files(place) for name, place in denoisers(path).items()}
    if len(files) == 1 and (path / PROJECTIONS_FILE).is_file():
        files = {name: [*found, path / PROJECTIONS_FILE] for name, found in files.items()}
    return files


def plain_name(path: Path) -> str:
    """Say what a weights file is called without its ending, its variant and its number among shards."""
    stem = re.sub(r"-\d+-of-\d+(?=\.|$)", "", path.name.removesuffix(".safetensors"))
    found = WEIGHTS.fullmatch(f"{stem}.safetensors")
    return found["stem"] if found else stem


def pipeline_parts(path: Path) -> dict[str, Path]:
    """Find the folders of a pipeline's parts by name; of a part without one it is the pipeline's own, as in diffusers.

    Any other path than a pipeline has no parts.
    """
    if not (path / "model_index.json").is_file():
        return {}
    index = read_record(path / "model_index.json", ADVICE)
    named = [k for k, v in index.items() if isinstance(v, list) and v and v[0] is not None]
    folders = {p.name: p for p in sorted(path.iterdir()) if p.is_dir()}
    at_root = [n for n in named if n not in folders and DENOISER.fullmatch(n) and (path / "config.json").is_file()]
    return {n: folders.get(n, path) for n in [*folders, *at_root] if n in named or DENOISER.fullmatch(n)}


def denoisers(path: Path) -> dict[str, Path]:
    """Find the folders of all networks that a pipeline denoises with, by name.

    Any other path than a pipeline is its own answer, without a name.

    Raises:
        UserError: the pipeline has no denoiser we know.
    """
    if not (path / "model_index.json").is_file():
        return {"": path}
    parts = pipeline_parts(path)
    if found := {name: folder for name, folder in sorted(parts.items()) if DENOISER.fullmatch(name)}:
        return found
    raise UserError(
        f"{path} is a pipeline without unet, transformer or prior, of {', '.join(parts) or 'nothing'}; choose a part "
        "with --component"
    )


def chosen_part(path: Path, component: str) -> Path:
    """Find the folder of a pipeline's part.

    Raises:
        UserError: the path is no pipeline, or has no such part.
    """
    parts = pipeline_parts(path)
    if component not in parts:
        found = f"a pipeline of {', '.join(parts)}" if parts else "no pipeline"
        raise UserError(f"{path} is {found}, expected one with {component}")
    return parts[component]


def parts_like(path: Path, names: Collection[str], component: str | None) -> dict[str, Path]:
    """Find in a model the parts that are merged into a base.

    Args:
        names: of the base's parts; one without a name is a network or a file.
        component: the part that was chosen, if one was.

    Raises:
        UserError: it has others.
    """
    if component is not None and (path / "model_index.json").is_file():
        return {component: chosen_part(path, component)}
    found = {"": path} if component is not None else denoisers(path)
    if len(found) == len(names) == 1 and ("" in found or "" in names or [*found] == [*names]):
        return {next(iter(names)): next(iter(found.values()))}
    if {*found} == {*names}:
        return found
    mine, theirs = (" and ".join(each) if "" not in each else "one network" for each in (found, names))
    raise UserError(
        f"{path} is of {mine}, and the base of {theirs}; give a pipeline of the same, or choose a part with --component"
    )
