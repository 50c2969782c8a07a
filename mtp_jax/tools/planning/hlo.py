"""Parser of a compiled program's text: instructions, number of runs, source lines and bytes.

A loop's body is in the text once. Its trip count is the constant with which the loop's condition compares its counter:
jax's scans and the compiler's own loops (a product interleaved with the gather of its operand) count from 0 by 1. A
loop whose bound is known only at run time counts as not run: these are the additional rounds of the all-to-all of
tokens between experts, which an even load does not need.
"""

import functools
import re
from dataclasses import dataclass, field, replace

import numpy as np

DTYPE_BITS = {
    "token": 0, "opaque": 0, "s4": 4, "u4": 4,
    "pred": 8, "s8": 8, "u8": 8, "f8e4m3fn": 8, "f8e5m2": 8, "f8e4m3b11fnuz": 8, "f8e8m0fnu": 8,
    "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32, "u32": 32, "f32": 32,
    "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
_SHAPE = re.compile(r"([a-z][a-z0-9]*)\[([\d,]*)\](\{[^{}]*\})?")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))")


@dataclass(frozen=True)
class Instruction:
    """An instruction. shape: as text, including tuples and layouts. rest: the text after the opening bracket."""

    name: str
    shape: str
    opcode: str
    rest: str

    @functools.cached_property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return re.findall(r"%([\w.\-]+)", self.rest.partition(")")[0])


@dataclass
class Module:
    """A compiled program.

    computations: name -> instructions in the order they run. times: runs of a computation per step.
    sources: stack frame number -> "file:line" in this package, if any. fused: computations inside fusions.
    """

    computations: dict[str, list[Instruction]] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    sources: dict[int, str] = field(default_factory=dict)
    fused: set[str] = field(default_factory=set)

    def source(self, instruction: Instruction) -> str:
        """Returns "file:line" of the innermost frame in this package; "" for instructions that the compiler added."""
        found = re.search(r"stack_frame_id=(\d+)", instruction.rest)
        return self.sources.get(int(found[1]), "") if found else ""


def parse(text: str) -> Module:
    """Parses the text of a compiled program."""
    module, entry, current = Module(), "", None
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = module.computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line.startswith("}") and not line.startswith("}}"):
            current = None
        elif current is not None:
            found = _INSTRUCTION.match(line)
            if found:
                current.append(Instruction(*found.groups()))
            elif current:  # an attribute of several lines, as in Pallas kernels; the last begins with "}}"
                current[-1] = replace(current[-1], rest=f"{current[-1].rest} {line}")
    module.sources = _sources(text)
    _count(module, entry)
    return module


def _count(module: Module, entry: str) -> None:
    """Fills `times` and `fused` from the entry down; calls of a computation from several places are added up."""
    pending = [(entry, 1.0)]
    while pending:
        name, times = pending.pop()
        module.times[name] = module.times.get(name, 0.0) + times
        for instruction in module.computations.get(name, []):
            called = _called(instruction.rest)
            if instruction.opcode == "while":
                condition = re.search(r"condition=%?([\w.\-]+)", instruction.rest)
                assert condition is not None
                trips = trip_count(module.computations[condition[1]], instruction.rest)
                pending += [(one, times * trips) for one in called if one != condition[1]]
            else:
                pending += [(one, times) for one in called]
                if instruction.opcode == "fusion":
                    module.fused.update(called)


def _called(rest: str) -> list[str]:
    names = [name for found in _CALLED.findall(rest) for name in (found[0] or found[1]).split(",")]
    return [name.strip().lstrip("%") for name in names if name.strip()]


def trip_count(condition: list[Instruction], rest: str = "") -> int:
    """Returns a loop's number of iterations: the compiler's annotation, else the constant of its condition, else 0."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', rest)
    if known:
        return int(known[1])
    bounds = [int(m[1]) for i in condition if i.opcode == "constant" and (m := re.match(r"(\d+)\)", i.rest))]
    return max(bounds, default=0)


def num_bytes(shape: str, space: str | None = None) -> int:
    """Bytes of the arrays in a shape's text, without the padding of tiles.

    Args:
      space: counts only arrays in this memory space of the layout ("0" is HBM, "1" the chip's vector memory).
    """
    total = 0
    for dtype, dims, layout in _SHAPE.findall(shape):
        if dtype not in DTYPE_BITS:
            continue
        where = re.search(r"S\((\d+)\)", layout or "")
        if space is None or (where[1] if where else "0") == space:
            total += int(np.prod([int(d) for d in dims.split(",") if d], dtype=np.int64)) * DTYPE_BITS[dtype] // 8
    return total


def _sources(text: str) -> dict[int, str]:
    """Maps stack frames to the innermost frame in this package, from the tables at the head of the text."""
    files, places, frames, table = {}, {}, {}, ""
    for line in text.splitlines():
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            table = line
        elif table and (found := re.match(r"(\d+) (.*)", line)):
            number, rest = int(found[1]), found[2]
            values = {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", rest)}
            if table == "FileNames":
                files[number] = rest.strip('"')
            elif table == "FileLocations":
                places[number] = (values["file_name_id"], values["line"])
            elif table == "StackFrames":
                frames[number] = (values["file_location_id"], values.get("parent_frame_id", 0))
        elif line.startswith("%") or line.startswith("ENTRY"):
            break
    return {number: name for number in frames if (name := _innermost(number, frames, places, files))}


def _innermost(number: int, frames: dict, places: dict, files: dict) -> str:
    seen: set[int] = set()
    while number in frames and number not in seen:
        seen.add(number)
        place, number = frames[number]
        file_id, line = places.get(place, (0, 0))
        path = files.get(file_id, "")
        if "/mtp_jax/" in path and "/mtp_jax/tools/" not in path:
            return f"{path.rpartition('/mtp_jax/')[2]}:{line}"
    return ""
