"""FLOPs of a traced step's matrix products, before compilation: with recomputation, without fusion."""

import math
from collections.abc import Iterable
from typing import cast

import jax.extend.core

from mtp_jax.kernels.attention import splash


def matmul_flops(jaxpr: jax.extend.core.Jaxpr, num_devices: int) -> float:
    """FLOPs of the matrix products of a traced program, over all devices: 2 x rows x columns x contracted size.

    A scan's body counts once per iteration, a shard_map's body once per device, a grouped product once per row. A loop
    whose bound is known only at run time counts as not run, as in `hlo`. Products that the compiler would remove as
    unused are counted. The body of a Pallas kernel counts once per computed block, unless the kernel has a cost
    estimate; kernels whose number of blocks is known only at run time have one.
    """
    total = 0.0
    times: float
    for eqn in jaxpr.eqns:
        times = 1
        if eqn.primitive.name == "dot_general":
            (lhs_dims, _), _ = eqn.params["dimension_numbers"]
            summed = _product(_shape(eqn.invars[0])[d] for d in lhs_dims)
            total += 2.0 * _product(_shape(eqn.outvars[0])) * summed
        elif eqn.primitive.name == "ragged_dot_general":
            total += _ragged_flops(eqn)
        elif eqn.primitive.name == "scan":
            times = eqn.params["length"]
        elif eqn.primitive.name == "shard_map":
            times = num_devices
        elif eqn.primitive.name == "while":
            times = 0
        elif eqn.primitive.name == "pallas_call" and eqn.params["cost_estimate"]:
            total, times = total + eqn.params["cost_estimate"].flops, 0
        elif eqn.primitive.name == "pallas_call":
            times = _blocks(eqn)
        total += times * sum(matmul_flops(inner, num_devices) for inner in _inner(eqn))
    return total


def _inner(eqn: jax.extend.core.JaxprEqn) -> list[jax.extend.core.Jaxpr]:
    """Returns the programs among an equation's parameters, without their constants."""
    out: list[jax.extend.core.Jaxpr] = []
    for value in eqn.params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            one = getattr(one, "jaxpr", one)
            if isinstance(one, jax.extend.core.Jaxpr):
                out.append(one)
    return out


def _blocks(eqn: jax.extend.core.JaxprEqn) -> float:
    """Number of blocks that a Pallas kernel computes: the points of its grid, less those splash attention skips."""
    name, grid = eqn.params["name"], eqn.params["grid_mapping"].grid
    return splash.computed_blocks(name, grid) if name.startswith("splash_") else _product(grid)


def _ragged_flops(eqn: jax.extend.core.JaxprEqn) -> float:
    """FLOPs of a grouped product, which multiplies each row by one group: 2 x rows x contracted size x output size, for
    any of these dimensions ragged."""
    (lhs, rhs), dims = map(_shape, eqn.invars[:2]), eqn.params["ragged_dot_dimension_numbers"]
    (_, rhs_summed), (_, rhs_batch) = dims.dot_dimension_numbers
    kept = [n for d, n in enumerate(rhs) if d not in (*rhs_summed, *rhs_batch, *dims.rhs_group_dimensions)]
    return 2.0 * _product(lhs) * _product(kept)


def _shape(variable: jax.extend.core.Var | jax.extend.core.Literal) -> tuple[int, ...]:
    return cast(jax.core.ShapedArray, variable.aval).shape


def _product(sizes: Iterable[int]) -> float:
    return math.prod(sizes, start=1.0)
