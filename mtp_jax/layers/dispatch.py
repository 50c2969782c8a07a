"""What the points that choose between implementations of one operation share."""

import functools
import sys

KERNEL = "kernel"  # what a kernel of ours or of a library leaves for its backward pass, to policies of recomputation


@functools.cache
def note(line: str) -> None:
    """One line on stderr, the first time it is said: an implementation was passed over, and why."""
    print(f"note: {line}", file=sys.stderr, flush=True)
