"""The configs that come with mtp_jax: `--config=NAME` finds one by its name, `--config=?` lists them."""

import argparse
import ast
import difflib
import pathlib
import textwrap
from collections.abc import Sequence
from typing import Any

_PACKAGE = pathlib.Path(__file__).parents[1]
LIST = "?"


def folder() -> pathlib.Path:
    """Returns the folder of the configs: mtp_jax/configs of an installed package, configs/ of a clone."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def names() -> list[str]:
    """Returns the names of the configs, sorted."""
    return sorted(path.stem for path in folder().glob("*.py") if not path.stem.startswith("_"))


def find(path: str) -> str:
    """Returns the file of a config that --config names.

    Args:
      path: a file, or the name of a config of `folder()`, as in "quickstart". A file comes first.
    """
    is_name = not pathlib.Path(path).is_file() and path in names()
    return str(folder() / f"{path}.py") if is_name else path


def suggestion(path: str) -> str:
    """Returns the remedy for a --config that is no file and no name."""
    near = difflib.get_close_matches(pathlib.PurePath(path).stem, names(), 1)
    named = f", as in --config={near[0]}" if near else ""
    return f"give a Python file with get_config(), or a name that --config='{LIST}' lists{named}"


def listing() -> str:
    """Returns the name of each config with the first line of its docstring, in 80 columns."""
    width = max((len(name) for name in names()), default=0)
    rows = [f"configs of {folder()}, for --config=NAME:"]
    for name in names():
        line, indent = _first_line(folder() / f"{name}.py"), " " * (width + 4)
        rows.append(textwrap.fill(line, 80, initial_indent=f"  {name:<{width}}  ", subsequent_indent=indent))
    return "\n".join(rows)


def _first_line(path: pathlib.Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


class _Config(argparse.Action):
    """The flag --config, which prints the list and ends the process for `?`, as --help does."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        if values == LIST:
            print(listing())
            parser.exit()
        setattr(namespace, self.dest, values)


def add_flag(flags: argparse.ArgumentParser) -> None:
    """Adds the flag --config of a command that reads a config."""
    help = f"a name that --config='{LIST}' lists, or a Python file with get_config()"
    flags.add_argument("--config", required=True, action=_Config, metavar="NAME|FILE", help=help)
