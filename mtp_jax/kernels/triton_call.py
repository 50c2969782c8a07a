"""Calls of Pallas kernels written for Triton, which are interpreted where the program is compiled for a CPU."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


def triton_call(
    kernel: Callable[..., None],
    *arrays: jax.Array,
    grid: tuple[int, ...],
    out_shape: Sequence[jax.ShapeDtypeStruct],
    name: str,
    num_warps: int = 4,
    num_stages: int = 2,
    has_barrier: bool = False,
    **options: Any,
) -> tuple[jax.Array, ...]:
    """Runs a kernel that addresses whole arrays; the other arguments are those of `pallas_call`.

    Args:
      num_warps: warps of 32 threads per program.
      num_stages: iterations of a loop whose loads are in flight at the same time.
      has_barrier: whether the kernel takes a keyword argument `barrier`, a function that returns when all threads of
        the program have called it; accesses to memory stay on their side of it. It does nothing in the interpreter.
    """

    def call(is_interpreted: bool) -> Callable[..., tuple[jax.Array, ...]]:
        barrier = (lambda: None) if is_interpreted else plgpu.debug_barrier
        return pl.pallas_call(
            functools.partial(kernel, barrier=barrier) if has_barrier else kernel,
            grid=grid,
            out_shape=tuple(out_shape),
            name=name,
            compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages),
            interpret=is_interpreted,
            **options,
        )

    return jax.lax.platform_dependent(*arrays, cpu=call(True), default=call(False))
