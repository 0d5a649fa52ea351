"""What images are compared with: moments and features of a data set, computed once and cached, or read from npz."""

import hashlib
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..config import Evaluate, Stats
from ..data.images import Images
from ..data.sources import open_images
from ..errors import UserError
from ..executors.devices import default_device
from ..storage.arrays import open_arrays
from ..storage.files import atomic_path, cache_folder, read_tensors, write_tensors
from ..storage.locks import make_once
from ..storage.outputs import STATISTICS, STATISTICS_COMMENT, check_output
from ..storage.reading import file_sha256
from .distances import FeatureStats, Moments, matrix_root
from .extractors import Extractor, load_extractor, weights_of
from .metrics import METRICS, check_metrics

# Kernel distances and neighbours need features themselves. This many, evenly spaced, keep their cost and the cache
# small; 10,000 is the size of the reference batches of Dhariwal & Nichol 2021.
NUM_ROWS = {"kernel": 5000, "neighbours": 10_000}
# Names of mean and covariance in npz files, by the extractor's output.
NPZ_NAMES = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


@dataclass(frozen=True)
class Reference:
    """What images are compared with.

    Attributes:
        name: of the data, with its hash, as records carry it.
        num_images: 0 where statistics don't say.
        moments: for each output of the extractor.
        rows: float32 features, for the ``kernel`` distances and for ``neighbours``; empty where there are only
            statistics. Of a CLIP score the ``texts``: row k is that of image k, modulo their number.
    """

    name: str
    num_images: int
    moments: dict[str, Moments]
    rows: dict[str, Float[Tensor, "_ d"]]


# A feature network with the reference of its metrics, None where these compare with nothing.
Compared = tuple[Extractor, Reference | None]


def names_of(metric: str, compared: Compared) -> dict[str, str | int | None]:
    """Say what a metric is measured with and against, as records carry it."""
    extractor, reference = compared
    needed = reference is not None and METRICS[metric].needs is not None
    return {"extractor": extractor.label, "reference": reference.name if reference and needed else None}


def check_reference(metric: str, reference: Reference | None) -> None:
    """Require that a reference has what a metric compares with.

    Raises:
        UserError: as said.
    """
    needs, output = METRICS[metric].needs, METRICS[metric].output
    if needs is None:
        return
    if reference is None:
        raise UserError(f"{metric} needs a reference to compare with: give --reference")
    if needs == "moments":
        if output not in reference.moments:
            raise UserError(
                f"{metric} needs the reference's {output} statistics (mu_s, sigma_s); {reference.name} has none: give "
                "images, or a file of deme stats"
            )
        return
    if needs not in reference.rows:
        raise UserError(f"{metric} needs the reference's images; {reference.name} holds only mean and covariance")
    found, least = len(reference.rows[needs]), METRICS[metric].min_reference_images
    if found < least:
        raise UserError(f"{reference.name}: found {found} image(s), expected at least {least} for {metric}: take more")


def open_compared(
    name: str, settings: Evaluate, source: str, references: Images, device: torch.device
) -> tuple[Extractor, Reference]:
    """Load a feature network, and compute or read from the cache what images are compared with.

    Args:
        source: the name of the data that the references are of, as records carry it.
    """
    extractor = load_extractor(name, device, weights_of(name, settings))
    return extractor, make_reference(source, references, extractor, settings.num_reference_images)


def make_reference(name: str, images: Images, extractor: Extractor, num_images: int | None = None) -> Reference:
    """Compute the statistics of the first images of a data set, or read them from the cache.

    The cache's key is the hash of the data, of the extractor and the number of images.

    Raises:
        UserError: there are fewer than two images.
    """
    num = min(num_images or len(images), len(images))
    if num < 2:
        raise UserError(f"{name}: found {num} image(s), expected at least 2 to compare with")
    key = f"{extractor.label} {images.sha256} {num} {sorted(extractor.outputs)} {NUM_ROWS}"
    path = cache_folder() / "reference" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"
    make_once(path, lambda: write_tensors(path, _statistics(images, num, extractor)))
    tensors, _ = read_tensors(path)
    moments = {
        o: _moments(tensors[f"{o}.mean"], tensors[f"{o}.covariance"], f"{path.stem}-{o}") for o in extractor.outputs
    }
    kept_rows = {kind: tensors[f"rows.{kind}"] for kind in NUM_ROWS}
    return Reference(reference_name(name, images, num_images), num, moments, kept_rows)


def reference_name(name: str, images: Images, num_images: int | None = None) -> str:
    """Name the first images of a data set as records do, with their hash and number."""
    return f"{name}:{images.sha256[:16]}:{min(num_images or len(images), len(images))}"


def _statistics(images: Images, num: int, extractor: Extractor) -> dict[str, Tensor]:
    stats = {output: FeatureStats.empty(width) for output, width in extractor.outputs.items()}
    wanted = {k: set(np.linspace(0, num - 1, min(num, limit)).astype(int).tolist()) for k, limit in NUM_ROWS.items()}
    rows: dict[str, list[Tensor]] = {kind: [] for kind in NUM_ROWS}
    for batch in torch.arange(num).split(256):
        features = {k: v.cpu() for k, v in extractor.extract(images.stack(batch.tolist())).items()}
        for output, found in stats.items():
            found.add(features[output])
        for kind, kept in rows.items():
            kept.append(features["features"][[i for i, n in enumerate(batch.tolist()) if n in wanted[kind]]])
    tensors = {f"rows.{kind}": torch.cat(kept) for kind, kept in rows.items()}
    for output, found in stats.items():
        tensors |= {f"{output}.mean": found.mean, f"{output}.covariance": found.covariance}
    return tensors


def text_reference(prompts: list[str], texts: list[str], extractor: Extractor) -> Reference:
    """Embed the texts that images are to show, for the CLIP score.

    Args:
        prompts: all that there are, of which records carry the hash.
        texts: of the images in their order.
    """
    assert extractor.embed is not None
    index = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    rows = extractor.embed(list(index))[[index[text] for text in texts]]
    return Reference(texts_name(prompts), 0, {}, {"texts": rows})


def texts_name(prompts: list[str]) -> str:
    """Name prompts as records do, with their hash and number."""
    digest = hashlib.sha256(repr(prompts).encode()).hexdigest()
    return f"prompts:{digest[:16]}:{len(prompts)}"


def write_statistics(reference: Reference, path: Path) -> None:
    """Write mean and covariance as ``mu`` and ``sigma`` of an npz file, which pytorch-fid and others read.

    Those of Inception's spatial features are ``mu_s`` and ``sigma_s``, as in ADM's files.
    """
    if path.suffix != ".npz":
        raise UserError(f"{path}: expected a name that ends in .npz")
    arrays: dict[str, Any] = {}
    for output, moments in reference.moments.items():
        for array, values in zip(NPZ_NAMES[output], (moments.mean, moments.covariance), strict=True):
            arrays[array] = values.numpy()
    with atomic_path(path) as temporary:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
        with zipfile.ZipFile(temporary, "a") as archive:
            archive.comment = STATISTICS_COMMENT


def write_reference(images: str, out: Path, metric: str, settings: Stats) -> None:
    """Write the mean and covariance of a data set's features as an npz file, of images resized where asked.

    Args:
        metric: whose features are meant.

    Raises:
        UserError: ``out`` may not be written, there is no such metric or it compares with no statistics, its weights or
            the images are wrong.
    """
    if out.suffix != ".npz":
        raise UserError(f"--out is {out}, expected a name that ends in .npz")
    check_output(out, STATISTICS, [images])
    check_metrics([metric], settings)
    name = METRICS[metric].extractor
    if METRICS[metric].needs == "texts":
        raise UserError(f"{metric} compares images with texts, for which there are no statistics; take another metric")
    extractor = load_extractor(name, default_device(), weights_of(name, settings))
    opened = open_images(images, settings.image_size, None, settings.skip_damaged, settings.split, settings.column)
    write_statistics(make_reference(images, opened, extractor), out)


def holds_statistics(path: Path) -> bool:
    """Say whether a file is an npz with statistics, as opposed to images alone.

    Raises:
        UserError: it is an npz file that can't be opened.
    """
    return _holds(path, "mu")


def holds_images(path: Path) -> bool:
    """Say whether a file of statistics has the images, too, as ADM's have."""
    return _holds(path, "arr_0")


def _holds(path: Path, array: str) -> bool:
    if path.suffix != ".npz" or not path.is_file():
        return False
    with open_arrays(path) as arrays:
        return array in arrays


def read_statistics(path: Path, extractor: Extractor, images: Images | None = None) -> Reference:
    """Read ``mu`` and ``sigma`` from an npz file as pytorch-fid writes them, ``mu_s`` and ``sigma_s`` as ADM does.

    Args:
        images: of the file, whose features are wanted, too.

    Raises:
        UserError: the file is damaged, lacks the two arrays, or is of another extractor's size.
    """
    arrays: dict[str, Tensor] = {}
    with open_arrays(path) as file:
        for output in extractor.outputs:
            for array in NPZ_NAMES[output]:
                if output == "features" and array not in file:
                    raise UserError(f"{path}: there is no array {array}, expected an npz file with mu and sigma")
                if array in file:
                    arrays[array] = _as_numbers(file[array], f"{path}: {array}")
    digest = file_sha256(path)
    moments = {}
    for output, width in extractor.outputs.items():
        mean, covariance = (arrays.get(array) for array in NPZ_NAMES[output])
        if mean is None or covariance is None:
            continue
        if mean.shape != (width,) or covariance.shape != (width, width):
            raise UserError(f"{path}: found {tuple(mean.shape)} features, expected {width}: made by another extractor")
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise UserError(f"{path}: mean or covariance has NaN or infinity; make the file again")
        moments[output] = _moments(mean, covariance, f"{digest}-{output}")
    rows = make_reference(path.name, images, extractor).rows if images else {}
    return Reference(f"{path.name}:{digest[:16]}", 0, moments, rows)


def _as_numbers(found: np.ndarray, name: str) -> Tensor:
    if found.dtype.kind not in "fiu":
        raise UserError(f"{name} is of {found.dtype}, expected numbers: mean or covariance of features")
    return torch.from_numpy(found.astype(np.float64))


def _moments(mean: Float[Tensor, " d"], covariance: Float[Tensor, "d d"], key: str) -> Moments:
    """Have the root kept in the cache under a key, from when it is first needed."""
    return Moments(mean, covariance, partial(_cached_root, covariance, key))


def _cached_root(covariance: Float[Tensor, "d d"], key: str) -> Float[Tensor, "d d"]:
    path = cache_folder() / "reference" / f"{key}.safetensors"
    make_once(path, lambda: write_tensors(path, {"root": matrix_root(covariance)}))
    return read_tensors(path)[0]["root"]
