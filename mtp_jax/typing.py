"""Type aliases that several packages share."""

from types import EllipsisType
from typing import Any, Protocol

import numpy as np

PyTree = Any  # of arrays, or of what describes them
Tree = dict[str, Any]  # nested dicts: what a PyTree of parameters is here
Cache = Any  # what decoding keeps of the tokens read; of one block, in the form its attention chooses
JsonObject = dict[str, Any]  # parsed, or about to be written
Index = int | slice | EllipsisType | tuple[int | slice, ...]  # of an array, basic indexing only


class ReadableArray(Protocol):
    """What has a shape and a dtype and is read by indexing: a numpy or jax array, a lazy one."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def __getitem__(self, index: Index) -> np.ndarray: ...
