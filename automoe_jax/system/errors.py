"""The error whose text is meant for the person at the keyboard."""


class UserError(ValueError):
    """A mistake in what was given to the program.

    The text is one line that says what was given, what is allowed and what to do. The programs in
    `launch/` print it and exit with 2; any other exception is a fault of the project.
    """
