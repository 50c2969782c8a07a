"""Inside the walls: run a program, then its check, and report."""

import builtins
import json
import os
import sys
import types

NAME = "program"  # its __name__: not __main__, so what it would do as a script is not done
READY = b"ready\n"
MAX_DETAIL = 500


def run(code: str, check: str, token: bytes, report: int) -> None:
    """Execute `code` and then `check` in one namespace; does not return.

    The token is written to `report` only after the last line of `check`, so a program that ends itself before, whatever
    its exit code and whatever it prints, has not passed. What it changes in builtins is put back before the check, and
    all that is used here is looked up before the program starts.
    """
    write, leave, compiled, execute = os.write, os._exit, compile, exec
    names, kept, untrace, unprofile = vars(builtins), dict(vars(builtins)), sys.settrace, sys.setprofile
    module = types.ModuleType(NAME)
    for name in [name for name in sys.modules if name.split(".")[0] == __name__.split(".")[0]]:
        del sys.modules[name]
    sys.modules[NAME] = module
    namespace = vars(module)
    write(report, READY)
    try:
        execute(compiled(code, "program.py", "exec", dont_inherit=True), namespace)
        names.update(kept)
        namespace["__builtins__"] = builtins
        untrace(None)
        unprofile(None)
        execute(compiled(check, "check.py", "exec", dont_inherit=True), namespace)
    except BaseException as error:
        names.update(kept)
        write(report, describe(error))
        leave(1)
    write(report, token)
    leave(0)


def describe(error: BaseException) -> bytes:
    """{"kind", "line", "detail"} of an exception as JSON: of a program's own, so anything may raise."""
    kind = "memory" if isinstance(error, MemoryError) else "exit" if isinstance(error, SystemExit) else "error"
    try:
        line = str(error).strip().split("\n")[0][:MAX_DETAIL]
        detail = f"{type(error).__name__}: {line}" if line else str(type(error).__name__)
    except BaseException:
        detail = "an exception that cannot be shown"
    try:
        sys.stdout.flush()
    except BaseException:
        pass
    return json.dumps({"kind": kind, "detail": detail}).encode()
