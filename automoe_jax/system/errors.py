"""The error whose text is written for the user."""


class UserError(ValueError):
    """A mistake of the user.

    The text is one line: what was given, what is allowed, what to do. The commands print it and
    exit with 2; any other exception is a fault of the project.
    """
