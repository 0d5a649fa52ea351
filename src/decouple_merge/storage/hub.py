"""Find a model's files: on this disk, or on the hub."""

from pathlib import Path

from ..errors import UserError


def pipeline_folder(name: str) -> Path:
    """Find a model's files: the path itself where there is one, else the hub's, downloaded.

    Raises:
        UserError: it is a path that isn't there.
    """
    if Path(name).exists():
        return Path(name)
    if Path(name).is_absolute() or name.startswith("."):
        raise UserError(f"{name} doesn't exist; check the path, which for a run stands in its config.yaml")
    # Only a hub name needs diffusers, which takes longer to import than a small model to merge.
    from diffusers import DiffusionPipeline

    return Path(DiffusionPipeline.download(name))
