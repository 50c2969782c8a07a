"""Exit codes, user errors, the first line of any other error, and notices on stderr."""

import functools
import logging
import re
import sys
from collections.abc import Sequence

EXIT_DONE, EXIT_FAILED, EXIT_UNUSABLE = 0, 1, 2
EXIT_LOST = 76  # EX_PROTOCOL of sysexits.h: another process is lost, or no step ends any more
# 75 (state saved after a signal) and 130 (Ctrl-C) are in signals.py


class UserError(ValueError):
    """An input that cannot be used. The message is one line: the field, its value, the remedy. Exit code 2."""

    exit_code = EXIT_UNUSABLE


def first_line(error: BaseException) -> str:
    """Returns the first line of an exception's text that is not blank, else the type of the exception."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def one_line(error: UserError) -> str:
    """Returns the message of a UserError, with control characters of the values in it, line ends included, escaped."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda match: ascii(match[0])[1:-1], str(error))


def short(value: object) -> str:
    """Returns a value as shown in error messages: its repr, truncated to 100 characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return f"a {type(value).__name__} of too many digits"
    return text if len(text) <= 100 else f"{text[:97]}..."


def and_more(items: Sequence[object]) -> str:
    """Returns ` (and 2 more)` for three items, the first of which is named before; "" for one."""
    return f" (and {len(items) - 1} more)" if len(items) > 1 else ""


@functools.cache
def warn_once(line: str) -> None:
    """Logs a line as a warning of the logger `mtp_jax`, once per process; prints it on stderr if none is set up."""
    logger = logging.getLogger("mtp_jax")
    if logger.handlers:
        logger.warning("note: %s", line)
    else:
        print(f"note: {line}", file=sys.stderr, flush=True)
