"""Errors of the user, and the one line that is said of any other."""


class UserError(ValueError):
    """An input that cannot be used. The message is one line: the field, its value, the remedy. Exit code 2."""


def first_line(error: BaseException) -> str:
    """First line of an exception's text that is not blank, else the kind of exception."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
