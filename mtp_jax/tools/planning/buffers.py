"""Contents of a chip's memory, from the compiler's buffer assignment and live ranges.

The assignment is a list of allocations: arguments (the state and the batch), outputs that do not reuse an argument's
memory, constants, and one heap for everything else. Each value of the program has a size and an offset in its
allocation; values with disjoint live ranges share bytes. The chip must have free the sum of the allocations in its main
memory, including gaps in the heap; the compiler compares this sum with the chip's memory.
"""

import re
from dataclasses import dataclass

from mtp_jax.tools.planning.hlo import Module

_ALLOCATION = re.compile(r"allocation (\d+): size (\d+), (.*)")
_VALUE = re.compile(r" value: <\d+ (\S+?)(\{[\d,]*\})?( \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (.*)")
_RANGE = re.compile(r"\s+(\S+?)(\{[\d,]*\})(?: \(phi\))?:(\d+)-(\d+)")
SMALL = 1 << 16  # bytes; smaller values (flags, counters) are in no table


@dataclass(frozen=True)
class Buffer:
    """A value of the heap. start, end: first and last instruction of its live range, in the program's order."""

    name: str
    shape: str
    size: int
    offset: int
    start: int
    end: int


@dataclass(frozen=True)
class Largest:
    """A row of the table of large buffers: `count` buffers of one shape and source line, live at the peak. bytes: of
    all of them. source: "file:line" or the compiler's name."""

    bytes: int
    count: int
    shape: str
    source: str


@dataclass(frozen=True)
class Memory:
    """Bytes per device. total: the program's requirement. arguments: the state and the batch. heap: temporaries, of
    which `live` are in use at the peak and the rest are gaps. largest: the values that are live at the peak."""

    total: int
    arguments: int
    heap: int
    live: int
    largest: list[Largest]


def read_memory(assignment: str, live_ranges: str, module: Module) -> Memory:
    """Reads sizes and the table of large buffers from the compiler's texts."""
    ranges = _ranges(live_ranges)
    total, arguments, heap = 0, 0, 0
    buffers: list[Buffer] = []
    is_heap = False
    for line in assignment.splitlines():
        if found := _ALLOCATION.match(line):
            size, kind = int(found[2]), found[3]
            in_main_memory = "color" not in kind and "thread-local" not in kind
            is_heap = in_main_memory and "preallocated-temp" in kind
            total += size if in_main_memory else 0
            arguments += size if "parameter" in kind and in_main_memory else 0
            heap += size if is_heap else 0
        elif is_heap and (found := _VALUE.match(line)):
            name = found[1] + (found[2] if found[2] not in (None, "{}") else "")
            if name in ranges and int(found[4]) >= SMALL:
                buffers.append(Buffer(name, found[6], int(found[4]), int(found[5]), *ranges[name]))
    live, at_peak = peak(buffers)
    return Memory(total, arguments, heap, live, largest(at_peak, module))


def _ranges(text: str) -> dict[str, tuple[int, int]]:
    """Maps values to the first and last instruction of their live ranges; several ranges (from loops) are joined."""
    out: dict[str, tuple[int, int]] = {}
    for line in text.partition("BufferLiveRange:")[2].splitlines()[1:]:
        found = _RANGE.match(line)
        if not found:
            break
        name = found[1] + (found[2] if found[2] != "{}" else "")
        start, end = int(found[3]), int(found[4])
        before = out.get(name, (start, end))
        out[name] = (min(before[0], start), max(before[1], end))
    return out


def peak(buffers: list[Buffer]) -> tuple[int, list[Buffer]]:
    """Returns the most bytes in use at one instruction and the values that use them; each byte is counted once."""
    best, at_best = 0, []
    for moment in sorted({b.start for b in buffers}):
        alive = [b for b in buffers if b.start <= moment <= b.end]
        if sum(b.size for b in alive) > best:
            kept = _without_overlaps(alive)
            if sum(b.size for b in kept) > best:
                best, at_best = sum(b.size for b in kept), kept
    return best, at_best


def _without_overlaps(buffers: list[Buffer]) -> list[Buffer]:
    """Drops buffers that overlap a larger one: an input that is updated in place shares its buffer with the output."""
    kept: list[Buffer] = []
    for one in sorted(buffers, key=lambda b: -b.size):
        if all(one.offset >= b.offset + b.size or b.offset >= one.offset + one.size for b in kept):
            kept.append(one)
    return kept


def largest(buffers: list[Buffer], module: Module) -> list[Largest]:
    """Sums up the buffers of each shape and source line, largest first."""
    instructions = {i.name: i for computation in module.computations.values() for i in computation}
    groups: dict[tuple[str, str], list[int]] = {}
    for buffer in buffers:
        name = buffer.name.partition("{")[0]
        source = module.source(instructions[name]) if name in instructions else ""
        shape = buffer.shape.partition("{")[0]
        groups.setdefault((shape, source or f"({name.rstrip('.0123456789')})"), []).append(buffer.size)
    rows = [Largest(sum(sizes), len(sizes), shape, source) for (shape, source), sizes in groups.items()]
    return sorted(rows, key=lambda row: -row.bytes)
