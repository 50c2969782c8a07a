"""Extension of griffe, which reads docstrings for the API reference: a table of settings per section of the config.

The fields of `mtp_jax.config.schema` are described by comments, above a field or behind it. The site shows them with
the type and the default.
"""

import ast
import re
from typing import Any

import griffe

MODULE = "mtp_jax.config.schema"


def default(value: str) -> str:
    """Returns the default of a field from its expression: `4` from `setting(4, at_least=1)`."""
    call = ast.parse(value, mode="eval").body
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
        if call.func.id == "setting":
            return ast.unparse(call.args[0])
        if call.func.id == "field":
            return ast.unparse(call.keywords[0].value) + "()"
    return value


def comment(lines: list[str], first: int, last: int) -> str:
    """Returns the comment of the field in lines first to last, 0-based: above it, then behind it."""
    above: list[str] = []
    while first and (found := re.match(r" +# (.*)", lines[first - 1])):
        above.insert(0, found[1])
        first -= 1
    behind = re.search(r"  # (.*)", lines[last])
    return "; ".join(filter(None, [" ".join(above), behind[1] if behind else ""]))


class Settings(griffe.Extension):
    """Adds the section `Attributes` to the docstrings of the config."""

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        if cls.module.path != MODULE or not cls.docstring:
            return
        lines, rows = cls.lines_collection[cls.filepath], []
        for name, field in cls.attributes.items():
            if field.value is not None and field.annotation is not None:
                text = comment(lines, field.lineno - 1, field.endlineno - 1)
                shown = f"default `{default(str(field.value))}`"
                rows.append(f"\n  {name}: " + (f"{text} ({shown})" if text else shown))
        if rows:
            cls.docstring.value += "\n\nAttributes:" + "".join(rows)
