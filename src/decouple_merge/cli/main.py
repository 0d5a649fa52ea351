"""The command ``deme``: each verb is one function of the library. Heavy imports stay inside the handlers."""

import errno
import io
import os
import sys
import time
from pathlib import Path

import typer

from ..errors import UserError
from .console import NUM_PROCESSES, RANK
from .explore import explore
from .files import info, masks, merge
from .images import sample
from .init import init
from .reports import report
from .runs import analyze, distil, finetune, fisher, gram, pretrain, prune, run, search, study
from .schedule import schedule
from .scores import evaluate, stats
from .status import status

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")
for verb in (
    run,
    finetune,
    prune,
    search,
    distil,
    status,
    analyze,
    fisher,
    gram,
    merge,
    masks,
    info,
    sample,
    evaluate,
    stats,
    report,
    explore,
    pretrain,
    study,
    init,
    schedule,
):
    app.command()(verb)


# What to do about a path that the operating system refuses.
PATH_ERRORS = {
    errno.ENOENT: "check the path",
    errno.EACCES: "give a path that you may read and write, or change its permissions",
    errno.EPERM: "give a path that you may read and write",
    errno.EROFS: "give a path that can be written",
    errno.EISDIR: "give the path of a file",
    errno.ENOTDIR: "give a path whose parents are folders",
    errno.EEXIST: "give another path, or remove what is there",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "mend the link, which leads to itself",
    errno.EIO: "the disk can't be read or written there; look at the system's log",
    errno.ESTALE: "the server has lost it; run the same command again",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}
# The status of what SIGINT ended.
INTERRUPTED = 130
TRAINING = ("run", "finetune", "pretrain")
# Until another of torchrun's processes than the first says what is wrong.
SECONDS_OF_THE_FIRST = 5


def _check_processes(arguments: list[str]) -> None:
    """Refuse torchrun's processes where they would all do the same."""
    verb = next((argument for argument in arguments if not argument.startswith("-")), None)
    if NUM_PROCESSES > 1 and verb is not None and verb not in TRAINING:
        raise UserError(
            f"deme {verb} was started {NUM_PROCESSES} times, expected once: only trainings "
            f"({', '.join(TRAINING)}) are shared by torchrun's processes; start it without torchrun"
        )


def _at_home(argument: str) -> str:
    """Put the home folder in the place of ``~`` in ``--out=~/x``, where shells leave it."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return option + equals + os.path.expanduser(value)


def main() -> None:
    """Run the command; a user's mistake is one line on stderr and exit status 2."""
    # Names of files may be no text, and a terminal may not know what our lines are written with.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.argv[1:] = map(_at_home, sys.argv[1:])
    try:
        _check_processes(sys.argv[1:])
        app(standalone_mode=True)
    except (KeyboardInterrupt, SystemExit) as ended:
        # Typer makes an exit of an interrupt, and says nothing.
        if isinstance(ended, SystemExit) and ended.code != INTERRUPTED:
            raise
        print("deme: interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if RANK > 0:
            # The first of torchrun's processes says the same first, and torchrun then ends the others.
            time.sleep(SECONDS_OF_THE_FIRST)
        if (line := _users_mistake(error)) is None:
            raise
        print(f"deme: {f'process {RANK}: ' if RANK else ''}" + " ".join(line.split()), file=sys.stderr)
        sys.exit(2)


def _users_mistake(error: Exception) -> str | None:
    """Say in words what a user can mend; None of our own faults, which keep their traceback."""
    if isinstance(error, UserError):
        return str(error)
    from ..storage.files import cache_folder, is_disk_full
    from ..storage.reading import looked_for

    if is_disk_full(error):
        return "the disk is full; make room and run the same command again to go on"
    if isinstance(error, OSError) and error.errno in PATH_ERRORS and isinstance(error.filename, str | bytes):
        name, cache = os.fsdecode(error.filename), cache_folder()
        where, advice = f"{name}{looked_for(name)}: {error.strerror}", PATH_ERRORS[error.errno]
        # Where it can't be made, a parent of it is named.
        if Path(name).is_relative_to(cache) or (not cache.exists() and cache.is_relative_to(name)):
            advice = f"the cache folder is {cache}: set DEME_CACHE to a folder that can be written"
        return f"{where}; {advice}"
    return None


if __name__ == "__main__":
    main()
