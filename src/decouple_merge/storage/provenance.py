"""Where a result comes from: the commit of this code."""

import subprocess
from pathlib import Path


def git_commit() -> str | None:
    """Name the commit of this code, with ``-dirty`` where it was changed; None outside of a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
