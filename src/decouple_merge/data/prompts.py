"""Prompts from files: lines of text, a column of TSV as PartiPrompts has them, names in JSON, captions of COCO."""

from pathlib import Path
from typing import Any

from ..config import Text
from ..errors import UserError
from ..seeds import stream_seed
from ..storage.reading import MAX_BYTES, MAX_LINES_BYTES, parse_json, read_text

PROMPT_COLUMN = "Prompt"


def load_prompts(text: Text) -> list[str]:
    """Read the prompts that settings name, each put in the place of ``{}`` in ``text.template``; none without a file.

    Raises:
        UserError: as ``read_prompts``.
    """
    if text.prompts is None:
        return []
    return [text.template.replace("{}", prompt) for prompt in read_prompts(text.prompts, text.prompt_seed)]


def read_prompts(path: Path, seed: int = 0) -> list[str]:
    """Read prompts from a UTF-8 file, by the ending of its name.

    ``.tsv``: the column Prompt, as in PartiPrompts. ``.json``: a list of texts, or COCO's captions. Any other: one
    prompt a line; empty lines may only be at the end.

    Args:
        seed: of the choice among COCO's captions and of their order.

    Raises:
        UserError: there is no such file, it is in another encoding, damaged, or empty, or a prompt is; it says where.
    """
    if path.suffix.lower() == ".json":
        prompts = _json_prompts(path, seed)
    elif path.suffix.lower() == ".tsv":
        prompts = _tsv_prompts(path)
    else:
        prompts = read_lines(path)
        while prompts and not prompts[-1]:
            prompts.pop()
        if "" in prompts:
            raise UserError(
                f"{path}, line {prompts.index('') + 1}: found no text, expected one prompt a line; remove the line"
            )
    if not prompts:
        raise UserError(f"{path}: found no prompts, expected one a line")
    return prompts


def _tsv_prompts(path: Path) -> list[str]:
    # Quotation marks are part of a prompt: PartiPrompts quotes nothing.
    header, *rows = [[cell.strip() for cell in line.split("\t")] for line in _read(path).rstrip().split("\n")]
    if PROMPT_COLUMN not in header:
        raise UserError(
            f"{path}, line 1: found columns {', '.join(header)!r}, expected {PROMPT_COLUMN!r} among them, separated by "
            "tabs"
        )
    column = header.index(PROMPT_COLUMN)
    prompts = [row[column] if column < len(row) else "" for row in rows]
    if "" in prompts:
        raise UserError(
            f"{path}, line {prompts.index('') + 2}: found no text in column {PROMPT_COLUMN}; mend or remove the line"
        )
    return prompts


def _json_prompts(path: Path, seed: int) -> list[str]:
    found = parse_json(_read(path), path, "fetch the file again")
    if isinstance(found, dict) and isinstance(found.get("annotations"), list):
        return _coco_prompts(path, found["annotations"], seed)
    if not isinstance(found, list):
        keys = f"keys {', '.join(found)}" if isinstance(found, dict) else type(found).__name__
        raise UserError(f"{path}: found {keys}, expected COCO's captions, with annotations, or a list of texts")
    for number, text in enumerate(found, start=1):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{path}: entry {number} of the list is {text!r}, expected a text")
    return [text.strip() for text in found]


def _coco_prompts(path: Path, annotations: list[Any], seed: int) -> list[str]:
    """Choose one caption for each image, in an order that is random too, so that the first of them are a sample.

    Choice and place are hashes of (seed, image_id): the order of the file has no say.
    """
    captions: dict[int, list[tuple[int, str]]] = {}
    for number, annotation in enumerate(annotations, start=1):
        record = annotation if isinstance(annotation, dict) else {}
        image, key, caption = (record.get(name) for name in ("image_id", "id", "caption"))
        if not isinstance(image, int) or not isinstance(key, int) or not isinstance(caption, str):
            raise UserError(
                f"{path}: annotation {number} of {len(annotations)} is {str(annotation)[:80]}, expected numbers "
                "image_id and id, and a caption; take a captions file, such as captions_val2014.json"
            )
        captions.setdefault(image, []).append((key, " ".join(caption.split())))
    prompts = []
    for image in sorted(captions, key=lambda image: (stream_seed("caption order", seed, image), image)):
        texts = [caption for _, caption in sorted(captions[image]) if caption]
        if not texts:
            raise UserError(f"{path}: all captions of image {image} are empty; remove it")
        prompts.append(texts[stream_seed("caption", seed, image) % len(texts)])
    return prompts


def read_lines(path: Path) -> list[str]:
    """Read the lines of a UTF-8 file, without the spaces around them.

    Raises:
        UserError: there is no such file, or it is in another encoding.
    """
    return [line.strip() for line in _read(path, MAX_LINES_BYTES).split("\n")]


def _read(path: Path, max_bytes: int = MAX_BYTES) -> str:
    return read_text(path, "expected a UTF-8 text file, one text a line", max_bytes)
