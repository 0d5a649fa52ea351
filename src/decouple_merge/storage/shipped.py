"""Configs and models that come with the package, by name."""

import os
from pathlib import Path

from ..errors import UserError
from .reading import looked_for

PACKAGE = Path(__file__).parents[1]
# A wheel has them inside the package. In a clone they lie beside src, and nowhere else.
SHIPPED = PACKAGE / "shipped" if (PACKAGE / "shipped").is_dir() else PACKAGE.parents[1]
CONFIGS, MODELS = SHIPPED / "configs", SHIPPED / "models"


def config_names() -> list[str]:
    """List the configs that come with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def base_names() -> list[str]:
    """List the bases that come with the package: those with a ``model_index.json``."""
    return sorted(path.parent.name for path in MODELS.glob("*/model_index.json"))


def find_config(name: Path, folder: Path = Path()) -> Path:
    """Find a config: the file itself where there is one, else the one of that name that comes with the package.

    Args:
        folder: which a relative path is counted from.

    Raises:
        UserError: it is a name and no path, and there is neither; a path that leads nowhere is its reader's to refuse.
    """
    path = folder / name
    if os.path.isfile(path) or name.suffix in (".yaml", ".yml") or name.parts != (str(name),):
        return path
    if str(name) in config_names():
        return CONFIGS / f"{name}.yaml"
    found = "is a folder" if os.path.isdir(path) else f"is no file{looked_for(path)}"
    raise UserError(
        f"{name} {found}, and no config of that name is shipped; give the path of a YAML file, or one of the names "
        f"{', '.join(config_names())}"
    )


def find_model(name: str) -> Path | None:
    """Find a model: the path itself where there is one, else the one of that name that we ship; None of any other."""
    if Path(name).exists():
        return Path(name)
    shipped = MODELS / name
    # One name alone: no way through folders leads out of those that we ship.
    return shipped if Path(name).parts == (name,) and name != ".." and shipped.is_dir() else None
