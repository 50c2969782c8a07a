"""Multi-token prediction: the registry of kinds. No module outside this package refers to a kind by name.

To add a kind, subclass `Kind` in a new file and list it in `KINDS`.
"""

import difflib
import functools

from mtp_jax.config import Architecture, Config, UserError
from mtp_jax.mtp.kind import Caches, DecoderInputs, Extra, Kind, MainModel, Propose, Scales, Text
from mtp_jax.mtp.nextlat import NextLatent
from mtp_jax.mtp.none import NoMTP
from mtp_jax.mtp.parallel import Parallel
from mtp_jax.mtp.sequential import Sequential
from mtp_jax.mtp.top import TokenOrder

KINDS: dict[str, type[Kind]] = {kind.name: kind for kind in (NoMTP, Parallel, Sequential, TokenOrder, NextLatent)}
RELEASED = Sequential.name  # the kind of the MTP layers of released checkpoints
NONE = NoMTP.name


def kind_of(config: Config | Architecture) -> Kind:
    """Returns the MTP kind named by `mtp.kind`, for the configured model.

    Raises:
      UserError: the kind does not exist.
    """
    return _kind(config.architecture if isinstance(config, Config) else config)


def reads(name: str, key: str) -> bool:
    """Returns whether a run with mtp.kind=`name` reads the config key `key` ("section.field")."""
    section, _, rest = key.partition(".")
    if section != "mtp" or name not in KINDS:
        return True
    owner = rest.partition(".")[0]
    return owner == name if owner in KINDS else KINDS[name].reads(rest)


@functools.lru_cache(maxsize=256)
def _kind(architecture: Architecture) -> Kind:
    name = architecture.mtp.kind
    if name not in KINDS:
        near = difflib.get_close_matches(name, KINDS, 1, 0.0)
        raise UserError(f"mtp.kind={name!r}: must be {' or '.join(map(repr, KINDS))}; did you mean {near[0]}?")
    return KINDS[name](architecture)


__all__ = [
    "KINDS",
    "NONE",
    "RELEASED",
    "Caches",
    "DecoderInputs",
    "Extra",
    "Kind",
    "MainModel",
    "Propose",
    "Scales",
    "Text",
    "kind_of",
    "reads",
]
