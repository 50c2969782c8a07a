"""The device that programs are compiled for, and the measured traits that code elsewhere decides by."""

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass

import jax

_PRETENDED: contextvars.ContextVar["Device | None"] = contextvars.ContextVar("pretended_device", default=None)


@dataclass(frozen=True)
class Device:
    """The kind of device a program is compiled for.

    platform: "cpu", "tpu" or a GPU platform. compute_capability: "9.0" on Hopper; empty where no GPU is compiled for.
    """

    platform: str
    compute_capability: str = ""

    @property
    def family(self) -> str:
        """ "cpu", "tpu" or "gpu", whatever the GPU platform is called."""
        return self.platform if self.platform in ("cpu", "tpu") else "gpu"

    @property
    def has_ragged_all_to_all(self) -> bool:
        """`jax.lax.ragged_all_to_all` compiles; the CPU backend does not implement it."""
        return self.family != "cpu"

    @property
    def gathers_are_fast(self) -> bool:
        """Reading single elements or rows of an array in memory beats reducing or sorting it. The loss's target and
        maximum logit gathered instead of reduced: 37.5 -> 36.1 ms (H200, 102,400 words); tokens sorted by expert and
        back with gathers in both passes: 4 of a step's 294 ms (moe_4b, H200)."""
        return self.family == "gpu"

    @property
    def copies_sliced_weights(self) -> bool:
        """A slice of a weight is copied before it is multiplied. Reading one token, that takes longer than twice the
        multiplications on the whole weight; CPUs read slices in place."""
        return self.family != "cpu"

    @property
    def single_row_products_are_slow(self) -> bool:
        """XLA compiles products of a single row to reductions, slower than products of two rows: 1.9 ms against 1.3 ms
        per token (24 blocks of width 1024)."""
        return self.family == "gpu"

    @property
    def loops_copy_activations(self) -> bool:
        """A scan copies every activation that is kept into a stack and out again: 70 of 302 ms of a training step
        without recomputation (dense_1b, H100), 12 unrolled. Weights read as bits before a cast are copied too: 7.5 ms
        of a step (moe_4b, H200)."""
        return self.family == "gpu"

    @property
    def prefers_dense_experts(self) -> bool:
        """Every expert on every token takes no longer than a grouped matmul: the CPU's `ragged_dot` computes every
        group densely (64 experts: 232 ms forward where equal groups take 5.8)."""
        return self.family == "cpu"

    def lacks_hopper(self) -> str:
        """Why kernels for Hopper GPUs cannot run; empty where they can."""
        if self.compute_capability == "9.0":
            return ""
        found = self.compute_capability or self.platform
        return f"it is for GPUs of compute capability 9.0, and this is {found}"

    def lacks_tpu(self) -> str:
        """Why kernels for TPUs cannot run; empty where they can."""
        return "" if self.platform == "tpu" else f"it is for TPUs, and this is {self.platform}"


def device() -> Device:
    """The device compiled for: that of the ambient mesh (`jax.set_mesh`), which need not be one of this machine's."""
    pretended = _PRETENDED.get()
    if pretended is not None:
        return pretended
    mesh = jax.sharding.get_abstract_mesh()
    target = None if mesh.empty else mesh.abstract_device
    platform = jax.default_backend() if target is None else target.platform
    if platform in ("cpu", "tpu"):
        return Device(platform)
    return Device(platform, str(jax.devices()[0].compute_capability))


@contextlib.contextmanager
def pretend(platform: str, compute_capability: str = "") -> Iterator[None]:
    """`device()` is this one inside the context: the seam for tests, for code that traces but does not run elsewhere.

    jax reuses programs that it has traced already: clear their caches where the same function was traced before.
    """
    token = _PRETENDED.set(Device(platform, compute_capability))
    try:
        yield
    finally:
        _PRETENDED.reset(token)
