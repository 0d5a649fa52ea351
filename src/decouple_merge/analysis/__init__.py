"""Why it works: one analysis a file, found by the file's name, and the figures of trainings, searches and images.

Imports config, data, diffusion, errors, merging, models, searching, seeds, storage, training.
"""

import importlib
import pkgutil
from typing import Any

# What the analyses share; every other file of this room is one.
SHARED = ("charts", "cost", "duration", "figures", "fixed", "gradients", "plane", "style", "subject")


def analyses() -> list[str]:
    """List the analyses by name, such as ``task-vectors`` of task_vectors.py."""
    found = [module.name for module in pkgutil.iter_modules(__path__) if module.name not in SHARED]
    return [name.replace("_", "-") for name in found]


def open_analysis(name: str) -> Any:
    """Import an analysis: a module with what docs/architecture.md lists.

    Raises:
        UserError: there is no such analysis.
    """
    from ..errors import UserError

    if name not in analyses():
        raise UserError(f"analysis is {name!r}, expected one of {', '.join(analyses())}")
    return importlib.import_module(f".{name.replace('-', '_')}", __name__)
