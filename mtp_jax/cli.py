"""Common parts of the command lines: flags, config overrides, logging, and errors as one line with an exit code.

Imports only the standard library and light modules: train.py and eval.py import it before they handle signals.
"""

import argparse
import atexit
import faulthandler
import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from mtp_jax import streams
from mtp_jax.errors import EXIT_FAILED, UserError, first_line, one_line, warn_once
from mtp_jax.signals import EXIT_INTERRUPTED

SECONDS_TO_EXIT = 30  # after a failed run
RENAMED = {"--draft_length": "--num_speculative_tokens"}  # flags of earlier versions
EXIT_CODES = """\
exit codes:
  0    done
  1    the run failed; what is not a mistake in the input shows its traceback
  2    unusable arguments, config or input: the same command fails the same
  75   preempted: stopped by SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2, state saved; run the same command to go on
  76   another process of the run is lost, or a step stalled; run the same command to go on
  130  interrupted by Ctrl-C, state saved; run the same command to go on
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def parser(description: str, epilog: str = "") -> argparse.ArgumentParser:
    """Returns an argument parser with --debug that raises UserError for unusable arguments."""
    layout = argparse.RawDescriptionHelpFormatter
    out = _Parser(description=description, epilog=epilog, formatter_class=layout, allow_abbrev=False)
    out.add_argument("--debug", action="store_true", help="show the traceback of every error")
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
    """Calls main(argv) and exits with the code of its end, see EXIT_CODES.

    An error of this package is one line on stderr, and --debug adds the traceback; any other error is a traceback.
    Output that cannot be written is dropped.
    """
    argv = sys.argv[1:]
    streams.protect()
    set_up_logging()
    try:
        main(argv)
        sys.stdout.flush()
    except Exception as error:
        sys.stdout.flush()
        if "--debug" in argv or not _is_own(error):
            traceback.print_exc()
        if _is_own(error):
            line = one_line(error) if isinstance(error, UserError) else first_line(error)
            print(f"error: {line}", file=sys.stderr, flush=True)
        code = getattr(error, "exit_code", EXIT_FAILED)
        if code == EXIT_FAILED:
            atexit.register(_limit_exit)  # not now: the caller may go on, as a notebook does
        sys.exit(code)
    except KeyboardInterrupt:  # of a command that does not handle signals
        print("error: interrupted", file=sys.stderr, flush=True)
        sys.exit(EXIT_INTERRUPTED)


def _limit_exit() -> None:
    """Ends the process with EXIT_FAILED after SECONDS_TO_EXIT if the interpreter is still ending then.

    After a failed save, writes that are still under way in the threads of a library can block its end.
    """
    assert EXIT_FAILED == 1, "faulthandler exits with 1"
    faulthandler.dump_traceback_later(SECONDS_TO_EXIT, exit=True, file=open(os.devnull, "w"))


def set_up_logging(process_index: int | None = None) -> None:
    """Sends the logger `mtp_jax` to stderr, as lines with time, level and, among several processes, the index of this
    one. A logger that has another handler keeps it."""
    logger = logging.getLogger("mtp_jax")
    if any(not isinstance(handler, _Handler) for handler in logger.handlers):
        return
    where = "" if process_index is None else f" process {process_index}"
    handler = _Handler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s{where} %(levelname)s %(message)s"))
    logger.handlers = [handler]
    logger.propagate = False


class _Handler(logging.StreamHandler):
    """Writes to sys.stderr as it is when a line is logged."""

    @property
    def stream(self):
        return sys.stderr

    @stream.setter
    def stream(self, value: object) -> None:
        del value


def check_output(flag: str, path: str | os.PathLike[str]) -> None:
    """Refuses a file for `write_output` that cannot be written, before there is anything to write.

    Raises:
      UserError: it is a folder, its folder does not exist, or it cannot be written.
    """
    from mtp_jax import storage

    output, shown = storage.path(path, f"--{flag}"), f"--{flag}={path}"
    if storage.is_local(output) and not storage.is_dir(output.parent):
        raise UserError(f"{shown}: its folder does not exist; make it first")
    try:
        if storage.is_dir(output):
            raise UserError(f"{shown}: is a folder; give a file")
        partial = output.with_name(f"{output.name}.partial")
        storage.write_bytes(partial, b"")
        storage.remove(partial)
    except OSError as error:
        raise UserError(f"{shown}: cannot be written ({storage.reason(error)}); use another folder") from error


def write_output(flag: str, path: str | os.PathLike[str], text: str) -> None:
    """Writes the file that --`flag` names, a local path or a URL.

    Raises:
      UserError: it cannot be written.
    """
    from mtp_jax import storage

    try:
        storage.write_text(storage.path(path, f"--{flag}"), text + "\n")
    except OSError as error:
        raise UserError(f"--{flag}={path}: cannot be written ({storage.reason(error)}); give another path") from error


def _is_own(error: Exception) -> bool:
    """Returns whether an error is one of this package, whose message is one line with the remedy."""
    return type(error).__module__.startswith("mtp_jax")
