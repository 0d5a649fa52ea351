"""Find a model's files: on this disk, or on the hub."""

from pathlib import Path


def pipeline_folder(name: str) -> Path:
    """Find a model's files: the path itself where there is one, else the hub's, downloaded."""
    if Path(name).exists():
        return Path(name)
    # Only a hub name needs diffusers, which takes longer to import than a small model to merge.
    from diffusers import DiffusionPipeline

    return Path(DiffusionPipeline.download(name))
