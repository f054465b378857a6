"""What the user can mend, told apart from bugs."""


class UserError(ValueError):
    """A mistake in what the user gave, said in one sentence: what is wrong, then what to do.

    The command line and the nodes show the sentence alone.  Every other exception is a bug of this package or of a
    library, and keeps its traceback.
    """
