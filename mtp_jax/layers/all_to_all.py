"""All-to-all dispatch of tokens to the devices that own their experts, and the return of the outputs.

Every device has rows sorted by expert. The device that owns expert e orders the rows it receives by expert, and by
source device within an expert, so they are already grouped for a grouped matmul. In the worst case, where all tokens
choose the same expert, this layout has the rows of all devices. It is therefore processed in rounds of a fixed number
of rows, as many as the fullest device needs: no row is dropped, and no buffer has the worst-case size.

Shape letters: P devices of the expert axis, E experts, L experts of a device (E = P * L), N rows of a device (tokens
times experts per token), R rows of a round, W rows from one device to another in a round, D model.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.kernels.device import device
from mtp_jax.sharding import LOGICAL_AXES
from mtp_jax.typing import PyTree

# Rows of a round, relative to the rows per device of an even load. With a balanced router the fullest device is a few
# percent above the mean and one round suffices; each further round sends and computes R rows again.
ROUND_SLACK = 1.25


def exchanged(
    x_ND: jax.Array, sizes_E: jax.Array, weights: PyTree, experts: Callable[..., jax.Array], per_token: int
) -> jax.Array:
    """Returns the outputs [N, D] of each row's expert; for use inside shard_map over all axes of the mesh.

    Args:
      x_ND: rows of this device, sorted by expert.
      sizes_E: int32, number of these rows per expert, for all experts of the model.
      weights: weights of the experts on this device.
      experts: (rows sorted by local expert, int32[L] sizes, weights) -> outputs of the rows.
      per_token: K, the number of experts per token, which divides N.
    """
    (axis,) = LOGICAL_AXES["experts"]
    num_devices, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    num_rows, num_local = x_ND.shape[0], sizes_E.shape[0] // num_devices
    layout = make_layout(jax.lax.all_gather(sizes_E, axis))
    most = num_rows // per_token * min(per_token, num_local)  # a token has at most this many rows for one device
    round_rows = min(num_devices * most, 8 * math.ceil(ROUND_SLACK * num_rows / 8))
    transport = Transport(axis, min(most, round_rows), is_ragged=device().has_ragged_all_to_all)

    def one_round(number, constants, inputs):
        slices = slices_of_round(constants[0], constants[1], number, round_rows)
        rows_RD = transport.send(inputs[0], slices, round_rows)
        y_RD = experts(rows_RD, slices.in_sizes.reshape(num_devices, num_local).sum(axis=0), inputs[1])
        return transport.give_back(y_RD, slices, num_rows)

    # The maximum over all mesh axes, not only this one: every device must run the same collectives.
    count = jax.lax.pmax(num_rounds(layout, round_rows), jax.sharding.get_abstract_mesh().axis_names)
    return sum_of_rounds(one_round, count, (layout, me), (x_ND, weights))


class Layout(NamedTuple):
    """Source and destination of every device's rows; int32[P, E], equal on all devices of the axis.

    sizes: number of rows that device p has for expert e. sent_from: offset of the first one in the sorted rows of p.
    lands_at: offset of the first one in the layout of the device that owns e.
    """

    sizes: jax.Array
    sent_from: jax.Array
    lands_at: jax.Array


class Slices(NamedTuple):
    """Offsets and sizes of one round, in the form of `jax.lax.ragged_all_to_all`; int32[E], L slices per peer.

    Outgoing slice (p, l): rows of this device for expert l of device p. out_at, out_sizes: its offset and size in the
    sorted rows of this device. out_lands: its offset in the round of device p.
    Incoming slice (p, l): rows of device p for expert l of this device. in_at, in_sizes: its offset and size in the
    round of this device. in_lands: its offset in the sorted rows of device p, for the return.
    """

    out_at: jax.Array
    out_sizes: jax.Array
    out_lands: jax.Array
    in_at: jax.Array
    in_sizes: jax.Array
    in_lands: jax.Array


def make_layout(sizes_PE: jax.Array) -> Layout:
    """Returns the layout of all rows, given the number of rows per device and expert."""
    num_devices, num_experts = sizes_PE.shape
    total_PL = sizes_PE.sum(axis=0).reshape(num_devices, -1)
    begins_E = (jnp.cumsum(total_PL, axis=1) - total_PL).reshape(num_experts)
    before_PE = jnp.cumsum(sizes_PE, axis=0) - sizes_PE
    return Layout(sizes_PE, jnp.cumsum(sizes_PE, axis=1) - sizes_PE, begins_E + before_PE)


def num_rounds(layout: Layout, round_rows: int) -> jax.Array:
    """Returns the number of rounds that the fullest device of this axis needs."""
    num_devices = layout.sizes.shape[0]
    fullest = layout.sizes.sum(axis=0).reshape(num_devices, -1).sum(axis=1).max()
    return (fullest + round_rows - 1) // round_rows


def slices_of_round(layout: Layout, me: jax.Array, number: jax.Array | int, round_rows: int) -> Slices:
    """Returns the part of every slice in rows number * R .. (number + 1) * R of the destination's layout."""
    num_devices, num_experts = layout.sizes.shape
    begin = number * round_rows
    first_PE = jnp.clip(layout.lands_at, begin, begin + round_rows)
    sizes_PE = jnp.clip(layout.lands_at + layout.sizes, begin, begin + round_rows) - first_PE
    # An empty slice begins at 0: its own offset may be out of bounds, which no transport is guaranteed to accept.
    lands_PE = jnp.where(sizes_PE > 0, first_PE - begin, 0)
    from_PE = jnp.where(sizes_PE > 0, layout.sent_from + first_PE - layout.lands_at, 0)
    num_local = num_experts // num_devices

    def mine(x_PE):  # [P, L]: of this device's experts
        return jax.lax.dynamic_slice_in_dim(x_PE, me * num_local, num_local, axis=1).reshape(-1)

    return Slices(from_PE[me], sizes_PE[me], lands_PE[me], mine(lands_PE), mine(sizes_PE), mine(from_PE))


class Transport(NamedTuple):
    """All-to-all over the expert axis.

    axis: name of the mesh axis. width: W, the maximum number of rows from one device to another in a round. is_ragged:
    whether the platform has a ragged all-to-all.
    """

    axis: str
    width: int
    is_ragged: bool

    def send(self, x_ND: jax.Array, slices: Slices, round_rows: int) -> jax.Array:
        """Dispatches sorted rows to their experts: [N, D] -> [R, D], grouped by expert; unused rows are zero."""
        zero_RD = jnp.zeros((round_rows, x_ND.shape[-1]), x_ND.dtype)
        return self._exchange(x_ND, zero_RD, slices.out_at, slices.out_sizes, slices.out_lands, slices.in_sizes)

    def give_back(self, y_RD: jax.Array, slices: Slices, num_rows: int) -> jax.Array:
        """Returns rows to where they were sent from: [R, D] -> [N, D]; rows of other rounds are zero."""
        zero_ND = jnp.zeros((num_rows, y_RD.shape[-1]), y_RD.dtype)
        return self._exchange(y_RD, zero_ND, slices.in_at, slices.in_sizes, slices.in_lands, slices.out_sizes)

    def _exchange(self, operand, output, offsets, sizes, lands, received):
        if self.is_ragged:
            return jax.lax.ragged_all_to_all(operand, output, offsets, sizes, lands, received, axis_name=self.axis)
        return padded_all_to_all(operand, output, offsets, sizes, lands, received, self.axis, self.width)


def padded_all_to_all(operand, output, offsets, sizes, lands, received, axis: str, width: int) -> jax.Array:
    """Equivalent of `jax.lax.ragged_all_to_all` into zeros, for platforms without it.

    An all-to-all of equal parts padded to the maximum size: every device sends and receives P * W rows.
    """
    num_devices = jax.lax.axis_size(axis)
    swap = functools.partial(jax.lax.all_to_all, axis_name=axis, split_axis=0, concat_axis=0, tiled=True)
    rows_PW = _rows(offsets.reshape(num_devices, -1), sizes.reshape(num_devices, -1), width)
    arrived_PWD = swap(operand.at[rows_PW].get(mode="fill", fill_value=0))
    rows_PW = _rows(swap(lands).reshape(num_devices, -1), received.reshape(num_devices, -1), width)
    return output.at[rows_PW].add(arrived_PWD, mode="drop")


def _rows(offsets_PL: jax.Array, sizes_PL: jax.Array, width: int) -> jax.Array:
    """Returns the concatenated row numbers of each device's slices, then out-of-bounds numbers; int32[P, W]."""
    ends_PL = jnp.cumsum(sizes_PL, axis=1)
    index_W = jnp.arange(width, dtype=jnp.int32)
    slice_PW = (index_W[None, :, None] >= ends_PL[:, None, :]).sum(axis=-1)
    shift_PL = offsets_PL - (ends_PL - sizes_PL)
    shift_PW = jnp.take_along_axis(shift_PL, jnp.minimum(slice_PW, sizes_PL.shape[1] - 1), axis=1)
    return jnp.where(index_W < ends_PL[:, -1:], index_W + shift_PW, jnp.iinfo(jnp.int32).max)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sum_of_rounds(
    one_round: Callable[..., jax.Array], count: jax.Array, constants: PyTree, inputs: PyTree
) -> jax.Array:
    """Returns the sum over r < count of one_round(r, constants, inputs), for a count >= 1 known only at run time.

    The first round is differentiated as usual. Further rounds, which are rare, are recomputed in the backward pass,
    since memory for an unbounded number of rounds cannot be reserved.

    Args:
      count: int32, equal on every device that takes part in the collectives of a round.
      constants: integers, not differentiated.
    """
    return _add_rounds(one_round, count, constants, inputs, one_round(0, constants, inputs))


def _add_rounds(one_round, count, constants, inputs, first):
    def add_round(r, total):
        return total + one_round(r, constants, _tied_to_round(r, inputs))

    return jax.lax.fori_loop(1, count, add_round, first)


def _tied_to_round(r: jax.Array, inputs: PyTree) -> PyTree:
    """Returns `inputs` with a dependency on the round number.

    Without it the compiler converts the rows to their layout in the all-to-all before the loop, and keeps that copy
    until the last round.
    """
    return jax.lax.optimization_barrier((r, inputs))[1]


def _rounds_forward(one_round, count, constants, inputs):
    first, first_back = jax.vjp(lambda inputs: one_round(0, constants, inputs), inputs)
    return _add_rounds(one_round, count, constants, inputs, first), (first_back, count, constants, inputs)


def _rounds_backward(one_round, residuals, cotangent):
    first_back, count, constants, inputs = residuals

    def add_round(r, grads):
        here, cotangent_here = _tied_to_round(r, (inputs, cotangent))
        back = jax.vjp(lambda inputs: one_round(r, constants, inputs), here)[1]
        return jax.tree.map(jnp.add, grads, back(cotangent_here)[0])

    return None, None, jax.lax.fori_loop(1, count, add_round, first_back(cotangent)[0])


sum_of_rounds.defvjp(_rounds_forward, _rounds_backward)
