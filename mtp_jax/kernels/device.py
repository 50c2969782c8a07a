"""The device that programs are compiled for, and its measured traits, on which other modules base decisions."""

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass

import jax

_PRETENDED: contextvars.ContextVar["Device | None"] = contextvars.ContextVar("pretended_device", default=None)


@dataclass(frozen=True)
class Device:
    """The kind of device a program is compiled for.

    platform: "cpu", "tpu" or a GPU platform. compute_capability: "9.0" on Hopper; empty for other platforms.
    """

    platform: str
    compute_capability: str = ""

    @property
    def family(self) -> str:
        """ "cpu", "tpu" or "gpu"; the latter for every GPU platform."""
        return self.platform if self.platform in ("cpu", "tpu") else "gpu"

    @property
    def has_ragged_all_to_all(self) -> bool:
        """Returns whether `jax.lax.ragged_all_to_all` compiles; the CPU backend does not implement it."""
        return self.family != "cpu"

    @property
    def gathers_are_fast(self) -> bool:
        """Returns whether gathering elements or rows of an array is faster than reducing or sorting it.

        Gathering the target and maximum logits in the loss instead of reducing: 37.5 -> 36.1 ms (H200, vocabulary of
        102,400). Gathers in both passes of expert dispatch and combine save 4 of the 294 ms of a step (moe_4b, H200).
        """
        return self.family == "gpu"

    @property
    def copies_sliced_weights(self) -> bool:
        """Returns whether a slice of a weight is copied before a matmul; CPUs read slices in place.

        For a single token the copy takes longer than a matmul with the whole weight, which has twice the FLOPs.
        """
        return self.family != "cpu"

    @property
    def prefers_outputs_first(self) -> bool:
        """Returns whether matmuls of a single row are faster with the contracted dim of the weight last in memory.

        XLA compiles them to reductions. The products and norms of a layer (width 1024, feed-forward 4096, H200) take
        21.7 us with the contracted dims last, 46 us with them first, and 29.6 us as matmuls of two rows.
        """
        return self.family == "gpu"

    @property
    def loops_copy_activations(self) -> bool:
        """Returns whether a scan copies every saved activation into a stack and out again.

        70 of the 302 ms of a training step without recomputation (dense_1b, H100), 12 ms if unrolled. Weights read as
        bits before a cast are copied too: 7.5 ms of a step (moe_4b, H200).
        """
        return self.family == "gpu"

    @property
    def prefers_dense_experts(self) -> bool:
        """Returns whether running every expert on every token is at least as fast as a grouped matmul.

        On CPUs `ragged_dot` computes every group densely (64 experts: 232 ms forward, 5.8 ms for matmuls of equal
        groups).
        """
        return self.family == "cpu"

    @property
    def multiplies_fp8(self) -> bool:
        """Returns whether matmuls of two float8_e4m3fn operands have hardware: NVIDIA GPUs since Ada.

        1,440 to 1,555 TFLOP/s where bfloat16 reaches 680 to 820 (H200, jax 0.11.2). Elsewhere the compiler converts the
        operands to a larger dtype first, with the same result.
        """
        major, _, minor = self.compute_capability.partition(".")
        return major.isdecimal() and minor.isdecimal() and (int(major), int(minor)) >= (8, 9)

    @property
    def compiler_options(self) -> dict[str, bool]:
        """Returns options of the compiler for training steps.

        XLA for GPUs would compile matmuls with Triton as well, in many tile sizes, and keep the fastest. cuBLAS alone
        is as fast (moe_4b, H200: 78.9 k tokens/s instead of 78.5 k) and compiles in 21 s instead of 53; with 8-bit
        operands in 17 s instead of minutes (docs/log.md).
        """
        return {"xla_gpu_enable_triton_gemm": False} if self.family == "gpu" else {}

    def lacks_hopper(self) -> str:
        """Returns why kernels for Hopper GPUs cannot run; empty if they can."""
        if self.compute_capability == "9.0":
            return ""
        found = self.compute_capability or self.platform
        return f"it is for GPUs of compute capability 9.0, and this is {found}"

    def lacks_tpu(self) -> str:
        """Returns why kernels for TPUs cannot run; empty if they can."""
        return "" if self.platform == "tpu" else f"it is for TPUs, and this is {self.platform}"


def device() -> Device:
    """Returns the target device: that of the ambient mesh (`jax.set_mesh`), attached or not, or the default device."""
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
    """Makes `device()` return the given device inside the context; for tests that trace code but do not run it.

    jax reuses traced programs: clear its caches if the same function was traced before.
    """
    token = _PRETENDED.set(Device(platform, compute_capability))
    try:
        yield
    finally:
        _PRETENDED.reset(token)
