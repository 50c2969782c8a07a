"""Tables as terminal text and as Markdown, and the format of their numbers."""

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

from mtp_jax.tools.reporting.variants import Sample

MISSING = "-"
MARK = "*"


@dataclass(frozen=True)
class Table:
    """A table of text cells. A row of one cell is a heading inside the table.

    notes: explanations of the numbers, below the title.
    has_title: whether `text` includes the title.
    joined: names of columns that `text` keeps beside the column before.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: tuple[str, ...] = ()
    has_title: bool = True
    joined: tuple[str, ...] = ()

    def text(self, width: int = 80) -> str:
        """Returns the table with columns padded to their widest cell and numbers right-aligned.

        A table that is wider than `width` characters is split into parts, one below the other, each with the first
        column and as many of the others as there is room for, at least one.
        """
        full = [self.header, *(row for row in self.rows if len(row) > 1)]
        widths = [max(len(row[i]) for row in full) for i in range(len(self.header))]
        lines = [textwrap.fill(self.title, width)] if self.has_title else []
        lines += [textwrap.fill(note, width, subsequent_indent="  ") for note in self.notes]
        for n, columns in enumerate(self._parts(widths, width)):
            lines += [""] if n else []
            for row in [self.header, *self.rows]:
                cells = [(row[i], widths[i], self.header[i]) for i in columns if i < len(row)]
                is_left = (self.header[0], "state")
                padded = [c.ljust(w) if name in is_left else c.rjust(w) for c, w, name in cells]
                lines.append("  ".join(padded).rstrip())
        return "\n".join(lines)

    def _parts(self, widths: list[int], width: int) -> list[list[int]]:
        """Returns the columns of each part of the text, the first column included."""
        groups: list[list[int]] = []
        for i, name in enumerate(self.header[1:], start=1):
            if groups and name in self.joined:
                groups[-1].append(i)
            else:
                groups.append([i])
        parts: list[list[int]] = []
        room = 0
        for group in groups:
            needed = sum(2 + widths[i] for i in group)
            if not parts or needed > room:
                parts.append([0])
                room = width - widths[0]
            parts[-1] += group
            room -= needed
        return parts or [[0]]

    def markdown(self) -> str:
        """Returns a heading, the notes and the table."""
        num_blank = len(self.header) - 1
        lines = [_line([_escaped(name) for name in self.header]), _line(["---", *["---:"] * num_blank])]
        for row in self.rows:
            cells = [_escaped(cell.strip()) for cell in row]
            lines.append(_line(cells if len(row) > 1 else [f"*{cells[0]}*", *[""] * num_blank]))
        return "\n\n".join([f"### {self.title}", *map(_escaped, self.notes), "\n".join(lines)])


def number(value: float | None, digits: int) -> str:
    """Formats a number with thousands separators; `-` for None."""
    return MISSING if value is None else f"{value:,.{digits}f}"


def mean_and_std(sample: Sample | None, digits: int, num_expected: int | None = None) -> str:
    """Formats a sample as `1.327 ± 0.012`, mean and sample standard deviation, or `1.327` for a single run. If fewer
    runs than `num_expected` have it, their number follows in brackets."""
    if sample is None:
        return MISSING
    text = number(sample.mean, digits)
    if sample.deviation is not None:
        text += f" ± {number(sample.deviation, digits)}"
    count = len(sample.values)
    return text if num_expected in (None, count) else f"{text} [{count}]"


def depths(row: Mapping[str, float | None], kind: str, digits: int) -> str:
    """Formats the values of one metric, of the main head and of every depth; agreement has no main value."""
    values = [row[f"{kind}_main"]] if f"{kind}_main" in row else []
    depth = 1
    while f"{kind}_mtp_{depth}" in row:
        values.append(row[f"{kind}_mtp_{depth}"])
        depth += 1
    return " ".join(number(v, digits) for v in values) or MISSING


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")
