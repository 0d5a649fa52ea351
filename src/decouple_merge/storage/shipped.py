"""Configs and models that come with the package, by name."""

import os
from pathlib import Path

from ..errors import UserError

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
        UserError: there is neither.
    """
    path = folder / name
    if not os.path.isfile(path) and str(name) in config_names():
        return CONFIGS / f"{name}.yaml"
    if os.path.isdir(path) or not os.path.lexists(path):
        found = "is a folder" if os.path.isdir(path) else "is no file, and no config of that name is shipped"
        raise UserError(
            f"{path} {found}; give the path of a YAML file, or one of the names {', '.join(config_names())}"
        )
    return path


def find_model(name: str) -> Path | None:
    """Find a model: the path itself where there is one, else the one of that name that we ship; None of any other."""
    if Path(name).exists():
        return Path(name)
    shipped = MODELS / name
    # One name alone: no way through folders leads out of those that we ship.
    return shipped if Path(name).parts == (name,) and name != ".." and shipped.is_dir() else None
