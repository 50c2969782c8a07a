"""Type aliases shared by several packages."""

from types import EllipsisType
from typing import Any, Protocol

import numpy as np

PyTree = Any  # of arrays or of their descriptions
Tree = dict[str, Any]  # nested dicts; the form of parameter trees
Cache = Any  # KV cache of one block; its structure depends on the attention variant
JsonObject = dict[str, Any]  # a parsed JSON object, or one to write
Index = int | slice | EllipsisType | tuple[int | slice, ...]  # index of an array; basic indexing only


class ReadableArray(Protocol):
    """Array with shape and dtype that is read by indexing: a numpy, jax or lazy array."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def __getitem__(self, index: Index) -> np.ndarray: ...
