"""Texts of images: the captions that their source has, or the prompts they were drawn from."""

from collections.abc import Sequence

import torch

from ..config import Data
from ..errors import UserError
from ..seeds import generator
from .images import Images
from .sources import KINDS


def load_captions(images: Images, data: Data, classes: dict[str, int] | None = None) -> list[str]:
    """Read the caption of each image that ``load_images`` found; for a class-conditional base, its class.

    A folder has them in its ``metadata.jsonl``, in lines such as ``{"file_name": "a/1.png", "text": "a red cat"}``; a
    ``datasets`` data set in a column; webdataset shards in a ``.txt`` or ``.json`` beside the image.
    ``data.caption_column`` names the field or column. Classes are names or numbers of the base's, and a folder may
    have them as sub-folders; sub-folders of other names are the classes in alphabetical order, as of ImageNet's, where
    they are as many. Noto emoji are named.

    Args:
        classes: of a class-conditional base, by name and number.

    Raises:
        UserError: the source has no captions, or an image has none, or one is no text.
    """
    source = images.source
    if not source.captioned:
        forms = sorted({kind.captioned for kind in KINDS.values() if kind.captioned})
        raise UserError(
            f"data.source {data.source!r} has no captions, which a text-to-image base needs; expected "
            f"{', '.join(forms[:-1])} or {forms[-1]}"
        )
    captions = source.captions(data.caption_column, classes)
    if classes is not None:
        captions = [str(caption) if isinstance(caption, int) else caption for caption in captions]
    kept = [captions[i] for i in images.kept]
    wrong = [i for i, caption in zip(images.kept, kept, strict=True) if not isinstance(caption, str)]
    if wrong:
        raise UserError(
            f"data.source {data.source!r}: {len(wrong)} of {len(kept)} captions are no text, the first of image "
            f"{wrong[0]}: {captions[wrong[0]]!r}; expected one text each in {data.caption_column!r}"
        )
    return kept


def captions_as_prompts(captions: Sequence[str]) -> list[str]:
    """Put captions into a random order, always the same: data may be sorted, and few seeds ask for the first only."""
    order = torch.randperm(len(captions), generator=generator("prompts")).tolist()
    return [captions[i] for i in order]


def texts_of(images: Images, data: Data, prompts: list[str], first: int) -> list[str]:
    """Say what images are to show: their prompts, or where there are none their captions.

    Where files are numbered, as ``deme sample`` names them, the prompt of image n is number n - first; otherwise that
    of the k-th image in the order of names is number k. After the last prompt comes the first again.

    Raises:
        UserError: a number is missing, or as ``load_captions``.
    """
    if not prompts:
        return load_captions(images, data)
    names = images.source.names
    stems = [names[i].stem for i in images.kept] if names else []
    places = list(range(len(images)))
    # By name, 10 comes before 2: the order of the images isn't that of the prompts.
    if stems and all(stem.isdecimal() for stem in stems):
        places = [int(stem) - first for stem in stems]
        if sorted(places) != list(range(len(images))):
            raise UserError(
                f"{data.source}: found {len(places)} images numbered {first + min(places)} to {first + max(places)}, "
                f"expected every number from {first} to {first + len(places) - 1}: give the number of the image of the "
                "first prompt as --set seed=…, and draw or rename what is missing"
            )
    return [prompts[place % len(prompts)] for place in places]
