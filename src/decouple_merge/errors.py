"""The one class of errors that are the user's to mend, and how those of libraries are told from our own."""

from pathlib import Path

PACKAGE = str(Path(__file__).parent)


class UserError(ValueError):
    """Something that the user gave is wrong.

    The message says in one line what was found, what was expected, where, and what to do. The command prints it and
    ends with status 2; every other error is ours, and keeps its traceback.
    """


class NotFiniteError(UserError):
    """A model draws NaN or infinity: what a search takes for a lost candidate, and everything else for an error."""


def not_installed(who: str, library: str, extra: str, otherwise: str = "") -> UserError:
    """Say that a library of an extra is missing, and how it is had.

    Args:
        who: needs it.
        otherwise: what else helps.
    """
    how = f"pip install 'decouple-merge[{extra}]'{otherwise and ', or '}{otherwise}"
    return UserError(f"{who} needs {library}, which isn't installed: {how}")


def is_ours(error: BaseException) -> bool:
    """Say whether a line of this package raised an error, and not a library that was given what a user gave.

    Errors of the operating system and a ``UserError`` are never ours. What a library refuses may be told as the
    user's mistake; an error that is ours keeps its traceback.
    """
    if isinstance(error, (UserError, OSError)):
        return False
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and place.tb_frame.f_code.co_filename.startswith(PACKAGE)
