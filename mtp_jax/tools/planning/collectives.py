"""Collectives of a compiled program: kind, bytes per step and mesh axes."""

import re
from dataclasses import dataclass

import numpy as np

from mtp_jax.tools.planning.hlo import Instruction, Module, num_bytes

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_IOTA = r"\[?([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"  # device numbers as an iota, transposed and reshaped


@dataclass(frozen=True)
class Collective:
    """A collective instruction, with all of its runs in a step.

    axes: mesh axes along which it runs, in the mesh's order. group: number of devices that take part together.
    bytes: sent per device and step. payload: bytes held per device, the larger of its own part and the gathered whole,
    times runs. times: runs per step. source: "file:line", or "".
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    bytes: float
    payload: float
    times: float
    source: str


def collectives(module: Module, mesh_shape: dict[str, int]) -> list[Collective]:
    """Returns every collective of the program that has more than one device."""
    out = []
    for name, instructions in module.computations.items():
        times = module.times.get(name, 0.0)
        shapes = {i.name: i.shape for i in instructions}
        for instruction in instructions if times else []:
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # on TPUs: a fused all-reduce and slice
            group, axes = participants(instruction, mesh_shape)
            if group > 1:
                payload, sent = _sizes(kind, instruction, shapes, group)
                source = module.source(instruction)
                out.append(Collective(kind, axes, group, sent * times, payload * times, times, source))
    return out


def _sizes(kind: str, instruction: Instruction, shapes: dict[str, str], group: int) -> tuple[float, float]:
    """Returns (payload, bytes sent) per device of one run. In a ring, an all-gather sends every part but one and an
    all-reduce twice as much; an all-to-all keeps its own part; a permute sends the whole operand."""
    held = float(sum(num_bytes(shapes.get(o, "")) for o in instruction.operands))
    if kind == "all-gather":
        return held * group, held * (group - 1)
    if kind == "all-reduce":
        return held, 2 * held * (group - 1) / group
    if kind in ("reduce-scatter", "all-to-all"):
        return held, held * (group - 1) / group
    if kind == "ragged-all-to-all":  # operands: data, output buffer, four small arrays of offsets and sizes
        held = float(num_bytes(shapes.get(instruction.operands[0], "")))
        return held, held * (group - 1) / group
    return held, held


def participants(instruction: Instruction, mesh_shape: dict[str, int]) -> tuple[int, tuple[str, ...]]:
    """Returns the number of devices that take part together and the mesh axes along which they differ.

    Device numbers are row-major positions in the mesh, as in the program's device assignment.
    """
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", instruction.rest)
    if pairs:
        groups = [[int(n) for n in re.findall(r"\d+", pair)] for pair in pairs[1].split("},")]
        axes = _axes(groups, mesh_shape)
        return int(np.prod([mesh_shape[a] for a in axes], dtype=np.int64)), axes
    groups = replica_groups(instruction.rest, int(np.prod(list(mesh_shape.values()))))
    return len(groups[0]), _axes(groups, mesh_shape)


def _axes(groups: list[list[int]], mesh_shape: dict[str, int]) -> tuple[str, ...]:
    sizes = tuple(mesh_shape.values())
    differs = np.zeros(len(sizes), bool)
    for group in groups:
        places = np.array(np.unravel_index(np.array(group), sizes))
        differs |= (places != places[:, :1]).any(1)
    return tuple(name for name, is_used in zip(mesh_shape, differs, strict=True) if is_used)


def replica_groups(rest: str, num_devices: int) -> list[list[int]]:
    """Returns the device groups of a collective, from any of the three notations of HLO text.

    {{0,1},{2,3}}; [2,2]<=[4] or [2,2]<=[2,2]T(1,0), an iota reshaped, transposed and split into rows; and
    mesh['a'=2,'b'=2] {'a'}, groups along the named axes of a mesh in the text, whose axes may be split: 'a':(1)2.
    """
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", rest)
    if listed:
        return [[int(n) for n in re.findall(r"\d+", one)] for one in re.findall(r"\{([\d, ]*)\}", listed[1])]
    iota = re.search(rf"replica_groups={_IOTA}", rest)
    if iota:
        return _places(iota, num_devices).reshape(_ints(iota[1])).tolist()
    named = re.search(r"replica_groups=mesh\[(.*?)\]\s*(?:,\s*device_ids=\(?\[?([^{]*?)\s*)?\{(.*?)\}", rest)
    if named:
        return _mesh_groups(named[1], named[2] or "", named[3], num_devices)
    return [list(range(num_devices))]


def _mesh_groups(axes: str, device_ids: str, used: str, num_devices: int) -> list[list[int]]:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    order = re.search(_IOTA, device_ids)
    places = _places(order, num_devices) if order else np.arange(num_devices)
    # An axis of which a part is used is split: 'a':(pre)size is the part of `size` after `pre` on the major side.
    dims: list[tuple[str, int, bool]] = []
    parts = {m[0]: (int(m[1]), int(m[2])) for m in re.findall(r"'([^']+)':\((\d+)\)(\d+)", used)}
    whole = set(re.findall(r"'([^']+)'(?!:)", used))
    for name, size in sizes.items():
        if name in parts:
            before, length = parts[name]
            after = size // before // length
            dims += [(name, before, False), (name, length, True), (name, after, False)]
        else:
            dims.append((name, size, name in whole))
    grid = places.reshape([size for _, size, _ in dims])
    kept = [d for d, (_, _, is_used) in enumerate(dims) if not is_used]
    joined = [d for d, (_, _, is_used) in enumerate(dims) if is_used]
    group = int(np.prod([dims[d][1] for d in joined], dtype=np.int64))
    return grid.transpose(*kept, *joined).reshape(-1, group).tolist()


def _places(iota: re.Match, num_devices: int) -> np.ndarray:
    places = np.arange(num_devices).reshape(_ints(iota[2]))
    return places.transpose(_ints(iota[3])) if iota[3] else places


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]
