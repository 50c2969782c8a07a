"""Conversion between the tensors of a folder and our stacked arrays, from the family's tables and the model's shapes.

`tensors(config, model_type)` lists every tensor once, with its place in our arrays; both directions iterate over it.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from types import EllipsisType
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from numpy.typing import DTypeLike

from mtp_jax.config import Config, UserError
from mtp_jax.interop import fp8, mxfp4
from mtp_jax.interop.families import FAMILIES, OUTSIDE_BLOCKS, Family, Names
from mtp_jax.interop.tensorfiles import TensorFolder
from mtp_jax.layers.param import ParamInfo
from mtp_jax.layers.spec import layer_places
from mtp_jax.model import abstract_model
from mtp_jax.mtp import kind_of
from mtp_jax.typing import Index, ReadableArray, Tree

Path = tuple[str, ...]

SCALE = "_scale_inv"
BLOCKS, SCALES = "_blocks", "_scales"  # suffixes of a tensor in mxfp4
MXFP4 = "MXFP4"  # in place of a safetensors dtype
TABLE = ("vocab", "embed")  # axes of the embedding, stored in rows in both formats
BIAS_DTYPE = "F32"  # of router biases, in our arrays and in released files


class Tensor(NamedTuple):
    """One tensor of a layout and its place in our arrays.

    name, shape: in the files. path: of our leaf, from "params" or "biases" on. at: index of the layer (and expert) in
      that leaf.
    info: of our leaf. repeats: True for an additional copy; another tensor of the list stores the leaf itself.
    stacked: (first, n) if the tensor has the order of our dims, with all experts of a layer: every n-th element of its
      last dim, starting at first, belongs to the leaf. The other leaves in it follow in the list, under the same name.
    """

    name: str
    shape: tuple[int, ...]
    path: Path
    at: tuple[int, ...]
    info: ParamInfo
    repeats: bool = False
    stacked: tuple[int, int] | None = None


def tensors(config: Config, model_type: str) -> list[Tensor]:
    """Returns every tensor of `config`'s model in the layout of `model_type`: outside the blocks, blocks, MTP modules.

    Raises:
      UserError: a weight for which the layout has no name.
    """
    family, built = FAMILIES[model_type], abstract_model(config.architecture)
    stack = ("mtp", *(kind_of(config).released_path or ()))
    leaves = flatten_dict({"params": built.params, "biases": built.biases})
    infos = flatten_dict({"params": built.infos})
    out: list[Tensor] = []
    used: set[Path] = set()

    def add(prefix: str, path: Path, names: Names, index: tuple[int, ...]) -> None:
        for ours, theirs in names.items():
            for kind in ("params", "biases"):
                full = (kind, *path, *ours.split("."))
                if full in leaves:
                    info = infos.get(full, ParamInfo((None,)))
                    rows = (1,) if ours in family.row_vectors else ()
                    if ours in family.stacked:
                        out.append(
                            _of_stack(prefix + theirs, full, index, info, leaves[full].shape, family.stacked[ours])
                        )
                    else:
                        out.extend(_of_leaf(prefix + theirs, full, index, info, leaves[full].shape, rows))
                    used.add(full)

    add("", ("trunk",), OUTSIDE_BLOCKS, ())
    if config.model.tie_embeddings:  # some files also contain the tied head
        out.append(out[0]._replace(name=OUTSIDE_BLOCKS["unembed"], repeats=True))
    num_layers = kind_of(config).num_main_layers
    for layer, (group, i) in enumerate(layer_places(config.model, num_layers)):
        names = family.expert_block if _has_experts(leaves, ("params", "trunk", group)) else family.block
        add(family.layer.format(layer=layer), ("trunk", group), names, (i,))
    for depth in range(_num_stacked(leaves, ("params", *stack))):
        prefix = family.module_layer.format(layer=num_layers + depth, depth=depth)
        add(prefix, stack, family.module, (depth,))
        names = family.expert_block if _has_experts(leaves, ("params", *stack, "block")) else family.block
        names = family.module_block or names
        add(prefix, (*stack, "block"), names, (depth,))
        out.extend(_again(prefix, family, out))
    # A layout without router biases represents the model while they are zero, which export checks.
    unnamed = sorted(".".join(path) for path in set(leaves) - used if path[0] != "biases")
    if unnamed:
        raise UserError(f"{unnamed[0]}: the {model_type} layout has no name for it; the model cannot be stored in it")
    return out


def _of_leaf(
    name: str, path: Path, index: tuple[int, ...], info: ParamInfo, shape: tuple[int, ...], rows: tuple[int, ...]
) -> Iterator[Tensor]:
    """Yields the tensors of one layer of a leaf: one, or one per expert."""
    inner = shape[len(index) :]
    if "{expert}" not in name:
        yield Tensor(name, rows + _their_shape(info, inner), path, index, info)
        return
    for expert in range(inner[0]):
        yield Tensor(name.format(expert=expert), _their_shape(info, inner[1:]), path, (*index, expert), info)


def _of_stack(
    name: str, path: Path, index: tuple[int, ...], info: ParamInfo, shape: tuple[int, ...], stacked: tuple[int, int]
) -> Tensor:
    """Returns the tensor that stores one layer of a leaf with all of its experts."""
    inner = shape[len(index) :]
    return Tensor(name, (*inner[:-1], inner[-1] * stacked[1]), path, index, info, stacked=stacked)


def _again(prefix: str, family: Family, listed: list[Tensor]) -> list[Tensor]:
    """Returns the tensors of the main model that an MTP layer repeats; a tied head is the embedding."""
    by_path = {t.path[-1]: t for t in listed if len(t.path) == 3 and not t.repeats}
    return [
        by_path.get(ours, by_path["embed"])._replace(name=prefix + theirs, repeats=True)
        for theirs, ours in family.repeated.items()
    ]


def _their_shape(info: ParamInfo, inner: tuple[int, ...]) -> tuple[int, ...]:
    """Shape in the files: [out, in] for a matrix, heads flattened; unchanged for the embedding; flat for vectors."""
    if info.is_matrix:
        ins = math.prod(inner[d] for d in info.in_dims)
        return math.prod(inner) // ins, ins
    return inner if info.axes == TABLE else (math.prod(inner),)


def to_theirs(array: np.ndarray, tensor: Tensor) -> np.ndarray:
    """Converts one layer (and expert) of our leaf to the layout's tensor."""
    if tensor.info.is_matrix:
        out, ins = tensor.shape
        return array.reshape(ins, out).T
    return array.reshape(tensor.shape)


class FolderArray:
    """One leaf of our arrays, read from a folder when it is indexed.

    Attributes:
      shape, dtype: of the whole leaf.
    """

    def __init__(
        self,
        folder: TensorFolder,
        parts: Mapping[tuple[int, ...], Tensor],
        shape: tuple[int, ...],
        dtype: DTypeLike,
    ):
        """parts: tensor by index in the leaf, one per layer (and expert)."""
        self._folder, self._parts = folder, parts
        self.shape, self.dtype = shape, np.dtype(dtype)
        self._num_lead = len(next(iter(parts)))

    @property
    def split_order(self) -> list[int]:
        """Dims in the order in which to split a partial read: layers and experts, then the dims stored as file rows."""
        info, stacked = (part := next(iter(self._parts.values()))).info, part.stacked
        if stacked:
            return list(range(len(self.shape)))
        lead = list(range(self._num_lead))
        first = self._num_lead + len(info.in_dims)
        return [*lead, *range(first, len(self.shape)), *range(self._num_lead, first)]

    def __getitem__(self, index: Index) -> np.ndarray:
        """Returns a block of the leaf; only the tensors and rows that it needs are read.

        Args:
          index: a slice (step 1) or int for each of the first dims, as `jax.make_array_from_callback` passes them, or
            `...` for the whole leaf. An int removes its dim from the result.
        """
        given = index if isinstance(index, tuple) else () if isinstance(index, EllipsisType) else (index,)
        full = [*given, *[slice(None)] * (len(self.shape) - len(given))]
        ranges = [
            range(*i.indices(n)) if isinstance(i, slice) else range(i, i + 1)
            for i, n in zip(full, self.shape, strict=True)
        ]
        out = np.empty([len(r) for r in ranges], self.dtype)
        lead, inner = ranges[: self._num_lead], ranges[self._num_lead :]
        for at in itertools.product(*(range(len(r)) for r in lead)):
            out[at] = self._part(self._parts[tuple(r[i] for r, i in zip(lead, at, strict=True))], inner)
        return out.reshape([len(r) for r, i in zip(ranges, full, strict=True) if isinstance(i, slice)])

    def _part(self, tensor: Tensor, inner: list[range]) -> np.ndarray:
        """Returns the block of one tensor in our dims; only the rows that contain it are read."""
        shape = self.shape[self._num_lead :]
        if tensor.stacked:
            start, step = tensor.stacked
            kept = read(self._folder, tensor, slice(inner[0].start, inner[0].stop))[..., start::step]
            return kept[(slice(None), *(slice(r.start, r.stop) for r in inner[1:]))].astype(self.dtype)
        if not tensor.info.is_matrix:
            read_first, first = slice(inner[0].start, inner[0].stop), slice(None)
            if tensor.info.axes != TABLE:
                read_first, first = first, read_first
            kept = read(self._folder, tensor, read_first).reshape(-1, *shape[1:])
            return kept[(first, *(slice(r.start, r.stop) for r in inner[1:]))].astype(self.dtype)
        num_in = len(tensor.info.in_dims)
        outer = inner[num_in]
        width = math.prod(shape[num_in + 1 :])
        rows = read(self._folder, tensor, slice(outer.start * width, outer.stop * width))
        kept = rows.T.reshape(*shape[:num_in], len(outer), *shape[num_in + 1 :])
        where = [slice(r.start, r.stop) for r in inner]
        where[num_in] = slice(None)
        return kept[tuple(where)].astype(self.dtype)


def read(folder: TensorFolder, tensor: Tensor, rows: slice = slice(None)) -> np.ndarray:
    """Returns a tensor, or some of its rows; a quantized tensor is dequantized to float32."""
    if stored_dtype(folder, tensor.name) == MXFP4:  # [experts, out, in] in blocks along `in`
        values = mxfp4.dequantize(folder.read(tensor.name + BLOCKS, rows), folder.read(tensor.name + SCALES, rows))
        return values.swapaxes(-1, -2)
    raw = folder.read(tensor.name, rows)
    if folder.infos[tensor.name].dtype != "F8_E4M3":
        return raw
    return fp8.dequantize(raw, folder.read(tensor.name + SCALE), first_row=rows.indices(tensor.shape[0])[0])


def is_stored(folder: TensorFolder, name: str) -> bool:
    """True if the folder has the tensor, in mxfp4 or another dtype."""
    return name in folder.infos or name + BLOCKS in folder.infos


def stored_dtype(folder: TensorFolder, name: str) -> str:
    """Dtype of the tensor in the files; `MXFP4` if it is stored in blocks."""
    return folder.infos[name].dtype if name in folder.infos else MXFP4


def lazy_arrays(folder: TensorFolder, config: Config, listed: list[Tensor]) -> Tree:
    """Returns {"params": ..., "biases": ...} of our model, with lazy leaves in the config's param_dtype.

    Args:
      listed: `tensors(config, model_type)`; the folder has all of them in their shapes (`check_folder`).
    """
    built = abstract_model(config.architecture)
    parts: dict[Path, dict[tuple[int, ...], Tensor]] = {}
    for tensor in listed:
        if not tensor.repeats:
            parts.setdefault(tensor.path, {})[tensor.at] = tensor
    leaves: dict[Path, ReadableArray] = {}
    for path, leaf in flatten_dict({"params": built.params, "biases": built.biases}).items():
        dtype = ml_dtypes.bfloat16 if leaf.dtype == "bfloat16" else leaf.dtype
        if path in parts:
            leaves[path] = FolderArray(folder, parts[path], leaf.shape, dtype)
        else:  # the layout has no tensor for it
            leaves[path] = np.broadcast_to(np.zeros((), dtype), leaf.shape)
    return {"params": {}, "biases": {}} | unflatten_dict(leaves)


def place(arrays: Tree, abstract: Tree) -> Tree:
    """Converts lazy arrays to jax arrays: each device's shard is read separately, by the process that has the device.

    Args:
      abstract: ShapeDtypeStructs with shardings, of the leaves to convert.
    """
    out = {}
    leaves = flatten_dict(arrays)
    for path, want in flatten_dict(abstract).items():
        leaf, dtype = leaves[path], want.dtype

        def block(index: tuple[slice, ...] | None, leaf: ReadableArray = leaf, dtype: np.dtype = dtype) -> np.ndarray:
            return np.asarray(leaf[index or ()]).astype(dtype)

        out[path] = jax.make_array_from_callback(want.shape, want.sharding, block)
    return {name: {} for name in abstract} | unflatten_dict(out)


def their_arrays(
    arrays: Tree, listed: list[Tensor], dtypes: Mapping[str, np.dtype]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, array) of every listed tensor, once and in order; one layer of each leaf is in memory at a time.

    Args:
      arrays: {"params": ..., "biases": ...} of `ReadableArray`s.
      dtypes: numpy dtype by tensor name.
    """
    leaves = flatten_dict(arrays)
    layer: tuple[Path, tuple[int, ...]] | None = None
    slabs: dict[Path, np.ndarray] = {}
    together: list[np.ndarray] = []  # the leaves of one stacked tensor
    for t in listed:
        if layer != (t.path[1:3], t.at[:1]):  # the previous layer is complete
            layer = t.path[1:3], t.at[:1]
            slabs.clear()
        if t.path not in slabs:
            slabs[t.path] = np.asarray(leaves[t.path][t.at[0] if t.at else ...])
        if t.stacked:
            together.append(slabs[t.path])
            if len(together) == t.stacked[1]:
                whole = np.stack(together, -1).reshape(t.shape)
                together.clear()
                yield t.name, whole.astype(dtypes[t.name])
            continue
        array = slabs[t.path][t.at[1:]]
        yield t.name, np.ascontiguousarray(to_theirs(array, t).astype(dtypes[t.name]))


def _num_stacked(leaves: Mapping[Path, ReadableArray], prefix: Path) -> int:
    return next((leaf.shape[0] for path, leaf in leaves.items() if path[: len(prefix)] == prefix), 0)


def _has_experts(leaves: Mapping[Path, ReadableArray], prefix: Path) -> bool:
    return (*prefix, "ffn", "router", "weight") in leaves
