"""Find a model's files: on this disk, or on the hub."""

from pathlib import Path

from ..errors import UserError, is_ours


def pipeline_folder(name: str) -> Path:
    """Find a model's files: the path itself where there is one, else the hub's, downloaded.

    Raises:
        UserError: it is a path that isn't there, or a name that the hub doesn't have or that it can't be asked for.
    """
    if Path(name).exists():
        return Path(name)
    if Path(name).is_absolute() or name.startswith("."):
        raise UserError(f"{name} doesn't exist; check the path, which for a run stands in its config.yaml")
    # Only a hub name needs diffusers, which takes longer to import than a small model to merge.
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(name))
    except (OSError, ValueError) as error:
        if is_ours(error):
            raise
        raise UserError(
            f"{name!r} is no path here, and can't be had from the hub ({str(error).splitlines()[0]}); check the path "
            "or the name, and the network"
        ) from error
