"""Where a result comes from: the commit of this code."""

import functools
import os
import subprocess
from pathlib import Path


@functools.cache
def git_commit() -> str | None:
    """Name the commit of this code, with ``-dirty`` where it was changed; None where no repository tracks it.

    It is asked for once: what runs is the code that was loaded, whatever is committed meanwhile.

    A package that is installed in a virtual environment may lie in a repository of something else.
    """
    # What is set for a hook's repository is not about this one.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None
