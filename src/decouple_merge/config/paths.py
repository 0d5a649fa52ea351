"""Places that a config names: ``~`` is the user's home folder."""

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator


def expand_home(name: str) -> str:
    """Put the home folder in the place of ``~`` at the start of a path, or behind a prefix such as ``webdataset:``."""
    start, path = re.fullmatch(r"((?:[a-z]+:)?)(.*)", name, re.DOTALL).groups()  # type: ignore[union-attr]
    return start + os.path.expanduser(path)


FilePath = Annotated[Path, AfterValidator(lambda path: Path(expand_home(str(path))))]
# A folder, or a name on the hub.
Name = Annotated[str, AfterValidator(expand_home)]
