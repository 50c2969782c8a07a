"""The mesh and the one table from logical axes to mesh axes. Layers name logical axes and know of no mesh."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding, PartitionSpec

from mtp_jax.config import MeshConfig, UserError, mesh_sizes

Axes = tuple[str | None, ...]

# Weights: "embed" is cut by fsdp whatever the weight, and by expert too unless that cuts the experts themselves: else
# every weight outside the experts would be there once for each of them. Activations: rows over every axis that holds
# whole examples (the expert axis too: outside the experts it is one more data axis), positions over context.
LOGICAL_AXES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "length": ("context",),
    "moe_batch": ("data", "fsdp"),  # inside the experts, where the expert axis holds experts and not rows
    "embed": ("fsdp", "expert"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "ffn": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("expert",),
    "layers": (),  # the leading dim of stacked weights
}


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh over `devices` (all of them by default), with -1 filled in.

    Several TPU slices are joined along the data axis alone, the one that can wait for the slow network between them:
    each slice holds an equal run of it.

    Raises:
      UserError: the axes' product is not the number of devices, or data is no multiple of the slices.
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
        # A torus dim may be split between axes: 16 x 16 on 8 x 8 x 4.
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    auto = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.sharding.Mesh(placed, tuple(sizes), axis_types=auto)


def check_divides(mesh: MeshConfig, num_devices: int, sharded: Iterable[tuple[str, str, int]]) -> None:
    """Refuse a mesh whose axes do not divide what they shard.

    Args:
      sharded: (logical axis, field, value) of each size.

    Raises:
      UserError: on the first size that is no multiple, naming the mesh axes and the field.
    """
    sizes = mesh_sizes(mesh, num_devices)
    for name, key, value in sharded:
        axes = LOGICAL_AXES[name]
        if value % math.prod(sizes[axis] for axis in axes):
            shown = " x ".join(f"mesh.{axis}={sizes[axis]}" for axis in axes)
            raise UserError(f"{shown}: does not divide {key}={value}, which it shards")


def spec(axes: Axes) -> PartitionSpec:
    """The PartitionSpec of logical axes; names outside the table are not cut.

    A mesh axis cuts one dim of an array, the first that asks for it: expert cuts the experts where there are any, and
    the model dim of all other weights.
    """
    cuts: list[tuple[str, ...] | None] = []
    for name in axes:
        taken = {axis for cut in cuts if cut for axis in cut}
        cuts.append(tuple(a for a in LOGICAL_AXES.get(name or "", ()) if a not in taken) or None)
    return PartitionSpec(*cuts)


def named(mesh: jax.sharding.Mesh, axes: Axes) -> NamedSharding:
    """The sharding of logical axes on a mesh."""
    return NamedSharding(mesh, spec(axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` placed by logical axes on the ambient mesh (`jax.set_mesh`); unchanged where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))


def local(fn: Callable[..., Any], in_axes: tuple[Axes, ...], out_axes: Axes) -> Callable[..., Any]:
    """`fn` run by each device of the ambient mesh on its own part of the arguments; `fn` itself where there is none.

    For what the compiler would not cut by itself, or would cut worse. Inside, collectives name mesh axes; the gradient
    of an argument is summed over the axes its own do not name.

    Args:
      in_axes: the logical axes of each argument. out_axes: of the one result; it must differ over no other axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return fn
    return jax.shard_map(fn, in_specs=tuple(map(spec, in_axes)), out_specs=spec(out_axes), check_vma=False)


def whole_length(x: jax.Array) -> jax.Array:
    """Inside `local`: all positions (dim 1) of an array cut by "length". The gradient is scattered back."""
    return jax.lax.all_gather(x, LOGICAL_AXES["length"], axis=1, tiled=True) if num_shards("length") > 1 else x


def first_position(length: int) -> jax.Array | int:
    """Inside `local`: where in the row this device's `length` positions begin."""
    return jax.lax.axis_index(LOGICAL_AXES["length"]) * length if num_shards("length") > 1 else 0


def num_shards(name: str) -> int:
    """Over how many devices of the ambient mesh a logical axis is cut."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    return int(np.prod([mesh.shape[axis] for axis in LOGICAL_AXES[name]]))
