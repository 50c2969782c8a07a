"""A sandbox that renders the Jinja templates of chats as transformers does, with limits on time and memory.

A template comes with a model from elsewhere. It sees plain values only (texts, numbers, lists, dicts), has no access to
files, modules or attributes of Python's own, and ends: loops and calls are counted, and so are the characters that it
writes and those that an operator makes.
"""

import contextvars
import dataclasses
import datetime
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.sandbox
import jinja2.visitor
from jinja2 import nodes

MAX_STEPS = 200_000  # iterations and calls per text
MAX_CHARACTERS = 2**26  # of a text, and of a value that an operator makes
MAX_INTEGER = 2**20  # of the arguments of calls: widths and repetitions
MAX_BITS = 4096  # of an integer that an operator makes

# Errors that a template or the values that it reads can cause.
RENDER_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class LimitError(jinja2.TemplateError):
    """A template that takes too long, or whose text is too long."""


@dataclasses.dataclass
class _Rendering:
    """State of the text that is being rendered."""

    now: datetime.datetime
    steps: int = 0
    characters: int = 0  # written, also into variables and macros
    length: int = 0  # of the text so far
    spans: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # of {% generation %} blocks

    def count(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise LimitError(f"takes more than {MAX_STEPS:,} iterations and calls")


_rendering: contextvars.ContextVar[_Rendering] = contextvars.ContextVar("rendering")


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`, which marks what the assistant writes."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        text, state = caller(), _rendering.get()
        state.spans.append((state.length, state.length + len(text)))
        return text


class _Counters(jinja2.visitor.NodeTransformer):
    """Puts filters that count around what loops read, what is written, and texts that `~` joins."""

    def __init__(self, environment: jinja2.Environment):
        self.environment = environment

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.iter = self._filtered(node.iter, "_iterations")
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [self._filtered(part, "_written") for part in node.nodes]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._filtered(node, "_made")

    def _filtered(self, node: Any, name: str) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=self.environment)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def _generate(self, source: nodes.Template, *args: Any, **options: Any) -> str:
        return super()._generate(_Counters(self).visit(source), *args, **options)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _check_format(left)
        elif isinstance(left, int) and isinstance(right, int):
            bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * max(right, 0)}
            if bits.get(operator, 0) > MAX_BITS:
                raise LimitError(f"computes an integer of more than {MAX_BITS:,} bits")
        elif operator == "*":
            sized, factor = (right, left) if isinstance(left, int) else (left, right)
            if isinstance(factor, int) and hasattr(sized, "__len__"):
                _check_length(len(sized) * max(factor, 0))
        elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            _check_length(len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902, N805
        _rendering.get().count()
        _check_integers(args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)


def _check_length(length: int) -> None:
    if length > MAX_CHARACTERS:
        raise LimitError(f"makes a value of more than {MAX_CHARACTERS:,} characters or elements")


def _check_integers(args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and value > MAX_INTEGER:
            raise LimitError(f"calls a function with {value:,}, which is above {MAX_INTEGER:,}")


def _check_format(text: str) -> None:
    """Refuses `%` formats of a great width; `*` takes it from an argument."""
    if re.search(r"%[^a-zA-Z%]*(\d{6}|\*)", text):
        raise LimitError("formats a value with a width above 99,999")


@jinja2.pass_context
def _iterations(context: Any, values: Any) -> Iterator[Any]:
    for value in values:
        _rendering.get().count()
        yield value


@jinja2.pass_context
def _written(context: Any, value: Any) -> Any:
    state = _rendering.get()
    state.characters += len(value) if isinstance(value, str) else 0
    _check_length(state.characters)
    return value


@jinja2.pass_context
def _made(context: Any, value: Any) -> Any:
    _check_length(len(value))
    return value


@jinja2.pass_context
def _center(context: Any, value: str, width: int = 80) -> str:
    _check_integers([width], {})
    return jinja2.filters.do_center(value, width)


@jinja2.pass_context
def _indent(context: Any, value: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    _check_integers([width], {})
    return jinja2.filters.do_indent(value, width, first, blank)


@jinja2.pass_context
def _format(context: Any, value: Any, *args: Any, **kwargs: Any) -> str:
    _check_format(str(value))
    return jinja2.filters.do_format(value, *args, **kwargs)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Returns JSON without Jinja's escapes of HTML; the arguments are those of the json module."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return _rendering.get().now.strftime(form)


def _environment() -> _Environment:
    made = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols])
    made.filters |= {"tojson": _tojson, "center": _center, "indent": _indent, "format": _format}
    made.filters |= {"_iterations": _iterations, "_written": _written, "_made": _made}
    made.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return made


def compile_template(source: str) -> jinja2.Template:
    """Returns a template for `render`.

    Raises:
      jinja2.TemplateSyntaxError: not a Jinja template.
    """
    return _environment().from_string(source)


def render(
    template: jinja2.Template, values: Mapping[str, Any], now: datetime.datetime
) -> tuple[str, list[tuple[int, int]]]:
    """Returns the text, and the characters [start, end) of its `{% generation %}` blocks.

    Args:
      template: of `compile_template`.
      values: variables of the template: plain values as in JSON.
      now: the time that `strftime_now` formats.

    Raises:
      RENDER_ERRORS: the template refuses the values, cannot read them, or exceeds a limit.
    """
    state, pieces = _Rendering(now), []
    token = _rendering.set(state)
    try:
        for piece in template.generate(values):
            pieces.append(piece)
            state.length += len(piece)
    finally:
        _rendering.reset(token)
    return "".join(pieces), state.spans
