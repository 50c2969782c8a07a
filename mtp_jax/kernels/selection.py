"""Selection of the backend of an operation."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mtp_jax.errors import UserError, warn_once
from mtp_jax.kernels.device import Device, device


class Backend(NamedTuple):
    """One implementation of an operation.

    name: the value of the config field that selects it. run: the operation, or the module with its functions.
    unsupported_reason: (operands) -> the reason why the backend does not support them; empty if it does.
    native_to: the device family the backend is written for ("gpu", "tpu"), where other backends are slow; empty if it
      runs everywhere.
    device_lacks: (device) -> the reason why the backend cannot run on it; empty if it can.
    """

    name: str
    run: Any
    unsupported_reason: Callable[..., str] = lambda *_: ""
    native_to: str = ""
    device_lacks: Callable[[Device], str] = lambda _: ""

    def refuses(self, *operands: Any) -> str:
        """Returns why the backend cannot run the operands on the target device; empty if it can."""
        return self.device_lacks(device()) or self.unsupported_reason(*operands)


def select(setting: str, asked: str, backends: Sequence[Backend], *operands: Any, warns: bool = True) -> Backend:
    """Returns the backend of the requested name, or for "auto" the first one that supports the operands.

    Args:
      setting: the config field that names the backend.
      asked: the value of that field.
      backends: in order of preference; the last one supports everything.
      warns: whether to report, once on stderr, why "auto" refused all backends native to the device.

    Raises:
      UserError: the requested backend does not support the operands.
    """
    if asked != "auto":
        backend = next(b for b in backends if b.name == asked)
        if reason := backend.refuses(*operands):
            raise UserError(f"{setting}={asked}: {reason}; use {setting}=auto")
        return backend
    refused = []
    for backend in backends:
        reason = backend.refuses(*operands)
        if not reason:
            break
        if backend.native_to == device().family:
            refused.append(f"not {backend.name}, {reason}")
    if warns and refused and backend.native_to != device().family:
        warn_once(f"{setting}={backend.name}, slow here: {'; '.join(refused)}")
    return backend
