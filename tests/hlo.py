"""Collectives of a compiled program by mesh axis, read from its text."""

import math
import re
from typing import NamedTuple

import numpy as np

OPS = ("all-gather", "all-reduce", "reduce-scatter", "ragged-all-to-all", "all-to-all", "collective-permute")
LINE = re.compile(rf"= (.+?) ({'|'.join(OPS)})(?:-start)?\((.*)")
NAMED = r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}"
LAYOUT = re.compile(r"\]\{([\d,]+)")
ARRAY = re.compile(r"\b(pred|[a-z]+\d+)\[([\d,]*)\]")


class Collective(NamedTuple):
    """results: (dtype, shape) of each array that comes out. axes: of the mesh, that its groups of devices span.

    is_contiguous: whether the dim that is gathered or scattered is the leading one of row-major arrays.
    """

    op: str
    results: list[tuple[str, tuple[int, ...]]]
    axes: frozenset[str]
    is_contiguous: bool = True

    @property
    def floats(self):
        """Shapes of the floating-point results that hold more than one number."""
        return [shape for dtype, shape in self.results if "f" in dtype and math.prod(shape) > 1]


def arrays(text):
    """(dtype, shape) of every array named in the text."""
    return [(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in ARRAY.findall(text)]


def collectives(text, mesh):
    """Every collective of a compiled program over `mesh`, those inside loops once."""
    out = []
    for line in text.splitlines():
        found = LINE.search(line)
        if found:
            results, op, rest = found.groups()
            out.append(Collective(op, arrays(results), _axes(rest, mesh), _is_contiguous(results, rest)))
    return out


def _is_contiguous(results, rest):
    is_leading = re.search(r"dimensions=\{(\d+)\}", rest)
    orders = [_ints(order) for order in LAYOUT.findall(results)]
    return (is_leading is None or is_leading.group(1) == "0") and all(o == sorted(o, reverse=True) for o in orders)


def _axes(rest, mesh):
    """Devices of a program are numbered along the mesh."""
    place = np.stack(np.unravel_index(np.arange(mesh.size), mesh.devices.shape), axis=1)
    groups = [place[group] for group in _groups(rest, mesh.size)]
    return frozenset(
        name for i, name in enumerate(mesh.axis_names) if any(np.ptp(group[:, i]) for group in groups if len(group))
    )


def _groups(rest, num_devices):
    """The groups of device numbers, in each of the forms that XLA prints."""
    listed = re.search(r"(?:source_target_pairs|replica_groups)=\{(\{.*?\})\}", rest)
    if listed:  # {{0,1},{2,3}}
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed.group(1))]
    counted = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if counted:  # [4,2]<=[2,4]T(1,0)
        shape, source, order = counted.groups()
        return list(_numbers(source, order).reshape(_ints(shape)))
    named = re.search(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}", rest
    )
    if named:  # mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}
        sizes, source, order, chosen = named.groups()
        names, shape = zip(*re.findall(r"'(\w+)'=(\d+)", sizes), strict=True)
        numbers = _numbers(source or str(num_devices), order).reshape([int(n) for n in shape])
        inside = [names.index(name) for name in re.findall(r"'(\w+)'", chosen)]
        assert "(" not in chosen, rest
        last = np.moveaxis(numbers, inside, range(-len(inside), 0))
        return list(last.reshape(-1, math.prod(numbers.shape[i] for i in inside)))
    assert "replica_groups={}" in rest, rest
    return [list(range(num_devices))]


def _numbers(source, order):
    numbers = np.arange(math.prod(_ints(source))).reshape(_ints(source))
    return numbers.transpose(_ints(order)) if order else numbers


def _ints(text):
    return [int(n) for n in text.split(",")]
