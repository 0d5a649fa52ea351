"""Where errors of libraries are told as the user's mistakes, our own faults keep their traceback."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from decouple_merge.config import document
from decouple_merge.data import archives, arrays, decoding
from decouple_merge.errors import UserError, is_ours
from decouple_merge.models import base as models
from decouple_merge.models import encoders, schedulers


def of_base(folder: Path, patch: pytest.MonkeyPatch) -> Any:
    patch.setattr(models, "read_index", lambda folder: None)
    models.load_base(str(folder / "base"))


def of_sampler(folder: Path, patch: pytest.MonkeyPatch) -> Any:
    base = models.load_base(str(folder / "base"))
    patch.setattr(type(base.family), "sampler_config", 3)
    schedulers.make_scheduler(base, "DDIM", 3, None)


def of_image(folder: Path, patch: pytest.MonkeyPatch) -> Any:
    Image.new("L", (4, 4)).save(folder / "a.png")
    patch.setattr(decoding, "GREY_MODES", None)
    decoding.open_image(folder / "a.png")


def of_archive(folder: Path, patch: pytest.MonkeyPatch) -> Any:
    with zipfile.ZipFile(folder / "a.zip", "w") as file:
        file.writestr("a.png", b"x")
    patch.setattr(archives, "_Place", lambda *_: int("none"))
    patch.setattr("decouple_merge.errors.PACKAGE", __file__)
    archives.Archive(folder / "a.zip", {".png"})


def of_arrays(folder: Path, patch: pytest.MonkeyPatch) -> Any:
    np.savez(folder / "a.npz", np.zeros(3))
    patch.setattr("decouple_merge.storage.arrays.MAX_DEFLATED", "x")
    arrays.read_array(folder / "a.npz")


def of_document(folder: Path, patch: pytest.MonkeyPatch) -> Any:
    patch.setattr(document, "MAX_DEPTH", None)
    document.parse("a: 1", "here")


def of_encoder(folder: Path, patch: pytest.MonkeyPatch) -> Any:
    (folder / "config.json").write_text(json.dumps({"model_type": "dinov2"}))
    encoders._load(encoders.ENCODERS["dinov2"]._replace(model_types=None), str(folder), "AutoModel")  # type: ignore[arg-type]


FAULTS: dict[Callable[[Path, pytest.MonkeyPatch], Any], type[Exception]] = {
    of_base: AttributeError,
    of_sampler: TypeError,
    of_image: TypeError,
    of_archive: ValueError,
    of_arrays: TypeError,
    of_document: TypeError,
    of_encoder: TypeError,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_ours_is_not_told_as_the_users(
    fault: Callable[[Path, pytest.MonkeyPatch], Any], tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FAULTS[fault]) as found:
        fault(tiny_base.parent, monkeypatch)
    assert not isinstance(found.value, UserError)


def raised(function: Callable[[], Any]) -> Exception:
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_an_error_is_ours_where_a_line_of_ours_raised_it(tmp_path: Path) -> None:
    assert is_ours(raised(lambda: document._check(None, "here", {}, ())))
    # By a library, by the operating system, or meant for the user.
    assert not is_ours(raised(lambda: json.loads("[")))
    assert not is_ours(raised(lambda: decoding.has_colour(tmp_path / "none.png")))
    assert not is_ours(raised(lambda: document.parse("a: 1\na: 2", "here")))
