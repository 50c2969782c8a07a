"""The device mesh and the table from logical axes to mesh axes; layers refer to logical axes only."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding, PartitionSpec

from mtp_jax.config import MeshConfig, UserError, mesh_sizes

Axes = tuple[str | None, ...]

# Weights: "embed" is sharded over fsdp, and over expert unless the weight has an "experts" dim; otherwise every device
# of the expert axis would hold a copy of the weights outside the experts. `weight_spec` moves these axes to a leading
# dim of the weight. Activations: rows are sharded over data, fsdp and expert (outside the experts the latter is another
# data axis), positions over context.
LOGICAL_AXES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "length": ("context",),
    "moe_batch": ("data", "fsdp"),  # inside the experts, where the expert axis shards experts instead of rows
    "embed": ("fsdp", "expert"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "ffn": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("expert",),
    "layers": (),  # leading dim of stacked weights
}
# Dims before "embed" that take over its mesh axes. Not "vocab": looking up tokens in a table that is split by token
# moves whole activations, in one split by "embed" only a part.
LEADING = ("experts", "ffn", "heads")
# Programs that the host may enqueue before it waits for one of them. XLA's CPU client enqueues 32 per device; the next
# one occupies a thread of the pool that runs the programs, and once no thread is left for a device that the others
# wait for in a collective, all wait forever. Accelerators need no more to stay busy.
MAX_PROGRAMS_AHEAD = 16


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> jax.sharding.Mesh:
    """Returns the mesh over `devices` (all by default), with a size of -1 inferred.

    Several TPU slices are joined along the data axis, which tolerates the slow network between them; each slice has an
    equal contiguous part of it.

    Raises:
      UserError: the product of the axes is not the number of devices, or data is not a multiple of the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    shape, num_slices = tuple(sizes.values()), len({getattr(d, "slice_index", 0) for d in devices})
    if devices[0].platform == "tpu" and num_slices > 1:
        if sizes["data"] % num_slices:
            raise UserError(
                f"mesh.data={sizes['data']}: is no multiple of the {num_slices} slices, which only the data axis may "
                f"join; use mesh.data={num_slices}"
            )
        across = (num_slices,) + (1,) * (len(shape) - 1)
        within = (shape[0] // num_slices, *shape[1:])
        placed = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    else:
        # A torus dim may be split between mesh axes, such as 16 x 16 on 8 x 8 x 4.
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    auto = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.sharding.Mesh(placed, tuple(sizes), axis_types=auto)


def check_divides(mesh: MeshConfig, num_devices: int, sharded: Iterable[tuple[str, str, int]]) -> None:
    """Checks that the mesh axes divide the sizes that they shard.

    Args:
      sharded: (logical axis, field, value) of each size.

    Raises:
      UserError: on the first size that is not a multiple, naming the mesh axes and the field.
    """
    sizes = mesh_sizes(mesh, num_devices)
    for name, key, value in sharded:
        axes = LOGICAL_AXES[name]
        if value % math.prod(sizes[axis] for axis in axes):
            shown = " x ".join(f"mesh.{axis}={sizes[axis]}" for axis in axes)
            raise UserError(f"{shown}: does not divide {key}={value}, which it shards")


def spec(axes: Axes) -> PartitionSpec:
    """Returns the PartitionSpec of logical axes; dims with names outside the table are not sharded.

    A mesh axis shards only the first dim of an array that maps to it: expert shards the "experts" dim of expert
    weights, and the model dim of all other weights.
    """
    return _partition(_mesh_axes(axes))


def _mesh_axes(axes: Axes) -> list[tuple[str, ...]]:
    """Returns the mesh axes of each dim; a mesh axis belongs to the first dim that maps to it."""
    dims: list[tuple[str, ...]] = []
    for name in axes:
        used = {axis for dim in dims for axis in dim}
        dims.append(tuple(a for a in LOGICAL_AXES.get(name or "", ()) if a not in used))
    return dims


def _partition(dims: list[tuple[str, ...]]) -> PartitionSpec:
    return PartitionSpec(*(dim or None for dim in dims))


def weight_spec(axes: Axes, shape: Sequence[int], sizes: Mapping[str, int]) -> PartitionSpec:
    """Returns the PartitionSpec in which a weight is stored: `spec`, with the mesh axes of "embed" moved forward.

    They shard the first dim before "embed" that is in `LEADING` and that they divide, together with its own mesh axes:
    [experts, embed, ffn] is split by expert. The shards of a leading dim are contiguous, so an all-gather only
    concatenates them. Shards of another dim must be transposed before it, after it, and again for the reduce-scatter of
    the gradient, unless the consumer reads them in either order; GPU kernels for experts do not.

    Args:
      shape: of the weight, one size per axis name.
      sizes: of the mesh axes.
    """
    dims = _mesh_axes(axes)
    if "embed" in axes:
        last = axes.index("embed")
        moved = dims[last]
        for dim in range(last):
            together = dims[dim] + moved
            if axes[dim] in LEADING and shape[dim] % math.prod(sizes[axis] for axis in together) == 0:
                dims[dim], dims[last] = together, ()
                break
    return _partition(dims)


def named(mesh: jax.sharding.Mesh, axes: Axes) -> NamedSharding:
    """Returns the sharding of logical axes on a mesh."""
    return NamedSharding(mesh, spec(axes))


def named_weight(mesh: jax.sharding.Mesh, axes: Axes, shape: Sequence[int]) -> NamedSharding:
    """Returns the sharding in which a weight is stored on a mesh."""
    return NamedSharding(mesh, weight_spec(axes, shape, mesh.shape))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains the sharding of `x` by logical axes on the ambient mesh (`jax.set_mesh`); no-op without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))


def constrain_weight(weight: jax.Array, axes: Axes) -> jax.Array:
    """Constrains a weight to the sharding in which it is stored; no-op without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return weight
    return jax.lax.with_sharding_constraint(weight, weight_spec(axes, weight.shape, mesh.shape))


def local(fn: Callable[..., Any], in_axes: tuple[Axes, ...], out_axes: Axes) -> Callable[..., Any]:
    """Maps `fn` over the shards of its arguments on the ambient mesh; returns `fn` itself without a mesh.

    For operations that the compiler does not partition, or partitions less efficiently. Inside, collectives use mesh
    axes. The gradient of an argument is summed over the mesh axes that do not shard it.

    Args:
      in_axes: logical axes of each argument.
      out_axes: logical axes of the result, which must be equal along all other mesh axes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return fn
    return jax.shard_map(fn, in_specs=tuple(map(spec, in_axes)), out_specs=spec(out_axes), check_vma=False)


def whole_length(x: jax.Array) -> jax.Array:
    """Inside `local`: gathers all positions (dim 1) of an array sharded by "length"; the gradient is scattered back."""
    return jax.lax.all_gather(x, LOGICAL_AXES["length"], axis=1, tiled=True) if num_shards("length") > 1 else x


def first_position(length: int) -> jax.Array | int:
    """Inside `local`: returns the position in the row of the first of this device's `length` positions."""
    return jax.lax.axis_index(LOGICAL_AXES["length"]) * length if num_shards("length") > 1 else 0


def is_on_one_device() -> bool:
    """Returns whether the ambient mesh has a single device, or there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def num_shards(name: str) -> int:
    """Returns the number of shards of a logical axis on the ambient mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    return int(np.prod([mesh.shape[axis] for axis in LOGICAL_AXES[name]]))
