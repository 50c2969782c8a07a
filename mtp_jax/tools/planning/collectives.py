"""What a program sends between devices: kind, bytes a step, and the mesh axes that each exchange runs along."""

import re
from dataclasses import dataclass

import numpy as np

from mtp_jax.tools.planning.hlo import Instruction, Module, num_bytes

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_IOTA = r"\[?([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"  # devices counted, transposed and reshaped


@dataclass(frozen=True)
class Collective:
    """One exchange of the program, as often as it runs in a step.

    axes: mesh axes it runs along, in the mesh's order. group: devices that take part together.
    bytes: what a device sends a step. payload: bytes a device holds of it, its own part or the collected whole,
    whichever is larger, times runs. times: runs a step. source: "file:line", or "".
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    bytes: float
    payload: float
    times: float
    source: str


def collectives(module: Module, mesh_shape: dict[str, int]) -> list[Collective]:
    """Every exchange of the program between more than one device."""
    out = []
    for name, instructions in module.computations.items():
        times = module.times.get(name, 0.0)
        shapes = {i.name: i.shape for i in instructions}
        for instruction in instructions if times else []:
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # on TPUs a fusion: an all-reduce of which each device keeps its slice
            group, axes = participants(instruction, mesh_shape)
            if group > 1:
                payload, sent = _sizes(kind, instruction, shapes, group)
                source = module.source(instruction)
                out.append(Collective(kind, axes, group, sent * times, payload * times, times, source))
    return out


def _sizes(kind: str, instruction: Instruction, shapes: dict[str, str], group: int) -> tuple[float, float]:
    """(payload, bytes a device sends) of one run: a ring's all-gather passes on every part but one, a reduction does
    so twice, an exchange keeps its own part, a permute sends all it has."""
    held = float(sum(num_bytes(shapes.get(o, "")) for o in instruction.operands))
    if kind == "all-gather":
        return held * group, held * (group - 1)
    if kind == "all-reduce":
        return held, 2 * held * (group - 1) / group
    if kind in ("reduce-scatter", "all-to-all"):
        return held, held * (group - 1) / group
    if kind == "ragged-all-to-all":  # operands: what is sent, where it goes to, and four small arrays of sizes
        held = float(num_bytes(shapes.get(instruction.operands[0], "")))
        return held, held * (group - 1) / group
    return held, held


def participants(instruction: Instruction, mesh_shape: dict[str, int]) -> tuple[int, tuple[str, ...]]:
    """How many devices take part together, and the mesh axes along which they differ.

    Device numbers are places in the mesh, row by row, as the program's device assignment has them.
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
    """The groups of a collective, in any of the three ways the text writes them.

    {{0,1},{2,3}}; [2,2]<=[4] or [2,2]<=[2,2]T(1,0), an iota reshaped, transposed and cut; and
    mesh['a'=2,'b'=2] {'a'}, groups along the named axes of a mesh of its own, whose axes may be split: 'a':(1)2.
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
    # Split each axis where a part of it is used: 'a':(pre)size is the part of `size` after `pre` on the major side.
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
    cut = [d for d, (_, _, is_used) in enumerate(dims) if is_used]
    group = int(np.prod([dims[d][1] for d in cut], dtype=np.int64))
    return grid.transpose(*kept, *cut).reshape(-1, group).tolist()


def _places(iota: re.Match, num_devices: int) -> np.ndarray:
    places = np.arange(num_devices).reshape(_ints(iota[2]))
    return places.transpose(_ints(iota[3])) if iota[3] else places


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]
