"""Bytes moved per step between a chip's main memory and its cores.

Every instruction outside a fusion reads its operands and writes its result; inside a fusion nothing is written. Arrays
in the chip's vector memory (space 1 of the layout) are not counted. A fusion that slices an operand reads the slice
only, and one that updates a slice in place writes the slice only; loops access stacked weights in this form. The result
is an upper bound where a large operand is read in part in another form.
"""

import re

from mtp_jax.tools.planning.hlo import Instruction, Module, num_bytes

# These name or regroup existing data, or are counted in the computation that they call.
_FREE = frozenset(
    ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota")
    + ("after-all", "partition-id", "replica-id", "opt-barrier", "custom-call-start", "custom-call-done")
)
_SLICES = ("dynamic-slice", "slice", "gather")


def memory_bytes(module: Module) -> float:
    """Bytes read and written in main memory, per device and step."""
    total = 0.0
    for name, instructions in module.computations.items():
        times = module.times.get(name, 0.0)
        if times and name not in module.fused:
            shapes = {i.name: i.shape for i in instructions}
            total += times * sum(_touched(i, shapes, module) for i in instructions)
    return total


def _touched(instruction: Instruction, shapes: dict[str, str], module: Module) -> float:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0.0
    operands = [shapes.get(o, "") for o in instruction.operands]
    result = num_bytes(instruction.shape, "0")
    if opcode == "copy-start":  # the result is a tuple of source and copy
        return sum(num_bytes(o, "0") for o in operands)
    if opcode == "fusion":
        return _fusion(instruction, operands, module)
    if opcode in _SLICES:
        return 2.0 * result
    if opcode == "dynamic-update-slice":
        return 2.0 * num_bytes(operands[1], "0")
    return result + sum(num_bytes(o, "0") for o in operands)


def _fusion(instruction: Instruction, operands: list[str], module: Module) -> float:
    """Bytes of the operands that a fusion reads and of the result that it writes."""
    called = re.search(r"calls=%?([^, ]+)", instruction.rest)
    body = module.computations.get(called[1], []) if called else []
    parameters = {i.name: int(i.rest.partition(")")[0]) for i in body if i.opcode == "parameter"}
    read = [num_bytes(shape, "0") for shape in operands]
    written = num_bytes(instruction.shape, "0")
    shapes = {i.name: i.shape for i in body}
    uses: dict[str, list[Instruction]] = {}
    for one in body:
        for operand in dict.fromkeys(one.operands):
            uses.setdefault(operand, []).append(one)
    for name, number in parameters.items():
        users = uses.get(name, [])
        if number >= len(read) or not read[number] or not users:
            continue
        if all(u.opcode in _SLICES and u.operands[0] == name for u in users):
            read[number] = min(read[number], sum(num_bytes(u.shape) for u in users))
        elif all(u.opcode == "dynamic-update-slice" and u.operands[0] == name for u in users):
            read[number] = 0
            update = sum(num_bytes(shapes.get(u.operands[1], "")) for u in users)
            written -= num_bytes(operands[number], "0") - update
    return float(sum(read) + max(written, 0))
