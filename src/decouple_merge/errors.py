"""The one class of errors that are the user's to mend."""


class UserError(ValueError):
    """Something that the user gave is wrong.

    The message says in one line what was found, what was expected, where, and what to do. The command prints it and
    ends with status 2; every other error is ours, and keeps its traceback.
    """


class NotFiniteError(UserError):
    """A model draws NaN or infinity: what a search takes for a lost candidate, and everything else for an error."""
