"""What the user can mend, told apart from bugs."""


class UserError(ValueError):
    """A mistake in what the user gave, said in one sentence: what is wrong, then what to do.

    The command line and the nodes show the sentence alone.  Every other exception is a bug of this package or of a
    library, and keeps its traceback.
    """


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its class's name if it says nothing, to quote in a sentence."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
