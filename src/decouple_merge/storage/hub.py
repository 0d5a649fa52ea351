"""Find a model's files: on this disk, among those that come with the package, or on the hub."""

from pathlib import Path

from ..errors import UserError, is_ours
from .reading import looked_for
from .shipped import base_names, find_model


def pipeline_folder(name: str) -> Path:
    """Find a model's files: the path itself where there is one, else a base that we ship, else the hub's, downloaded.

    Raises:
        UserError: it is a path that isn't there, or a name that neither we nor the hub have or that the hub can't be
            asked for.
    """
    if (found := find_model(name)) is not None:
        return found
    if Path(name).is_absolute() or name.startswith("."):
        raise UserError(
            f"{name} doesn't exist{looked_for(name)}; check the path, which for a run stands in its config.yaml"
        )
    shipped = f"the bases that we ship are {', '.join(base_names())}"
    if "/" not in name:
        raise UserError(
            f"{name!r} is no path here{looked_for(name)} and no base that we ship; check the path or the name: "
            f"{shipped}, and the hub's names are OWNER/NAME"
        )
    # Only a hub name needs diffusers, which takes longer to import than a small model to merge.
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(name))
    except Exception as error:  # a dozen kinds, of diffusers, of the hub's library and of what it asks the network by
        if is_ours(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{name!r} is no path here{looked_for(name)}, and can't be had from the hub "
            f"({reason}); check the path or the name, and the network; {shipped}"
        ) from error
