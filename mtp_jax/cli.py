"""Common parts of the command lines: flags, config overrides, and errors as one line with an exit code."""

import argparse
import os
import pathlib
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from mtp_jax.config import UserError
from mtp_jax.errors import first_line, warn_once

EXIT_FAILED, EXIT_UNUSABLE = 1, 2
RENAMED = {"--draft_length": "--num_speculative_tokens"}  # flags of earlier versions


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def parser(description: str) -> argparse.ArgumentParser:
    """Returns an argument parser with --debug that raises UserError for unusable arguments."""
    out = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    out.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return out


def parse(flags: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags, and the `--config.section.key=value` overrides in their order.

    Raises:
      UserError: an argument that is neither.
    """
    for old, new in RENAMED.items():
        if any(a == old or a.startswith(f"{old}=") for a in argv):
            warn_once(f"{old} is now {new}; the next release drops the old name")
            argv = [new + a.removeprefix(old) if a.partition("=")[0] == old else a for a in argv]
    overrides = [a for a in argv if a.startswith("--config.")]
    return flags.parse_args([a for a in argv if not a.startswith("--config.")]), overrides


def run(main: Callable[[list[str]], None]) -> None:
    """Calls main(argv) and exits with 0, 1 (a failed run) or 2 (unusable arguments or config).

    An error is one line on stderr; --debug adds the traceback.
    """
    argv = sys.argv[1:]
    try:
        main(argv)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe (`| head`) has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILED)
    except Exception as error:
        sys.stdout.flush()
        if "--debug" in argv:
            traceback.print_exc()
        print(f"error: {describe(error)}", file=sys.stderr, flush=True)
        sys.exit(EXIT_UNUSABLE if isinstance(error, UserError) else EXIT_FAILED)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
        sys.exit(EXIT_FAILED)


def write_output(flag: str, path: str | pathlib.Path, text: str) -> None:
    """Writes the file that --`flag` names.

    Raises:
      UserError: it cannot be written.
    """
    try:
        pathlib.Path(path).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--{flag}={path}: cannot be written ({error.strerror})") from error


def describe(error: Exception) -> str:
    """Returns one line: the message of an error of this package; of any other, its type and first line."""
    message = first_line(error)
    if type(error).__module__.startswith("mtp_jax"):
        return message
    return f"{type(error).__name__}: {message} (--debug shows where)"
