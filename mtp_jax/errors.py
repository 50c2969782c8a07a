"""User errors, the first line of any other error, and notices on stderr."""

import functools
import sys


class UserError(ValueError):
    """An input that cannot be used. The message is one line: the field, its value, the remedy. Exit code 2."""


def first_line(error: BaseException) -> str:
    """Returns the first line of an exception's text that is not blank, else the type of the exception."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@functools.cache
def warn_once(line: str) -> None:
    """Prints a line on stderr, once per process."""
    print(f"note: {line}", file=sys.stderr, flush=True)
