"""Tokens travel to the devices that own their experts and back: what runs inside the experts' shard_map.

Every device has rows sorted by expert. Expert e's owner lays them out expert by expert, and within one by the device
they came from, so what arrives is already grouped for a grouped matmul. That layout may be as long as everybody's rows
together (all tokens want one expert), so it is worked off in rounds of a fixed number of rows, as many as the fullest
device needs: nothing is dropped, and no buffer is sized for the worst case.

Shape letters: P devices of the expert axis, E experts, L experts of a device (E = P * L), N rows of a device (tokens
times experts a token), R rows of a round, W rows from one device to another in a round, D model.
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

# Rows of a round over the rows a device gets when the load is even. Once the balancing has settled the fullest device
# is a few per cent above the mean and one round does; every further one sends, and computes, a round's rows again.
ROUND_SLACK = 1.25


def exchanged(
    x_ND: jax.Array, sizes_E: jax.Array, weights: PyTree, experts: Callable[..., jax.Array], per_token: int
) -> jax.Array:
    """The experts' outputs of every row, wherever the experts live. Inside shard_map over all axes of the mesh.

    Args:
      x_ND: this device's rows, sorted by expert.
      sizes_E: int32, how many for each expert of the whole model.
      weights: this device's experts'.
      experts: (rows sorted by local expert, int32[L] sizes, weights) -> outputs of the rows.
      per_token: K, experts a token chooses; N is a multiple of it.
    """
    (axis,) = LOGICAL_AXES["experts"]
    num_devices, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    num_rows, num_local = x_ND.shape[0], sizes_E.shape[0] // num_devices
    layout = make_layout(jax.lax.all_gather(sizes_E, axis))
    most = num_rows // per_token * min(per_token, num_local)  # no token has more rows for one device
    round_rows = min(num_devices * most, 8 * math.ceil(ROUND_SLACK * num_rows / 8))
    transport = Transport(axis, min(most, round_rows), is_ragged=device().has_ragged_all_to_all)

    def one_round(number, constants, inputs):
        slices = slices_of_round(constants[0], constants[1], number, round_rows)
        rows_RD = transport.send(inputs[0], slices, round_rows)
        y_RD = experts(rows_RD, slices.in_sizes.reshape(num_devices, num_local).sum(axis=0), inputs[1])
        return transport.give_back(y_RD, slices, num_rows)

    # The same count on all devices, not on this axis only: collectives of one program must be met by everybody.
    count = jax.lax.pmax(num_rounds(layout, round_rows), jax.sharding.get_abstract_mesh().axis_names)
    return sum_of_rounds(one_round, count, (layout, me), (x_ND, weights))


class Layout(NamedTuple):
    """Where every device's rows are, and where they go; int32[P, E], the same on all devices of the axis.

    sizes: rows device p has for expert e. sent_from: where they begin among p's sorted rows. lands_at: where they begin
    in the layout of e's owner.
    """

    sizes: jax.Array
    sent_from: jax.Array
    lands_at: jax.Array


class Slices(NamedTuple):
    """One round of a device's exchange, as `jax.lax.ragged_all_to_all` takes it; int32[E], L slices for each peer.

    Slice (p, l) out: my rows for expert l of device p. Slice (p, l) in: what device p has for my expert l.
    out_at, out_sizes: in my sorted rows; out_lands: in the owner's round. in_at, in_sizes: in my round; in_lands: in
    p's sorted rows, for the way back.
    """

    out_at: jax.Array
    out_sizes: jax.Array
    out_lands: jax.Array
    in_at: jax.Array
    in_sizes: jax.Array
    in_lands: jax.Array


def make_layout(sizes_PE: jax.Array) -> Layout:
    """The layout of all devices' rows, from how many each has for each expert."""
    num_devices, num_experts = sizes_PE.shape
    total_PL = sizes_PE.sum(axis=0).reshape(num_devices, -1)
    begins_E = (jnp.cumsum(total_PL, axis=1) - total_PL).reshape(num_experts)
    before_PE = jnp.cumsum(sizes_PE, axis=0) - sizes_PE
    return Layout(sizes_PE, jnp.cumsum(sizes_PE, axis=1) - sizes_PE, begins_E + before_PE)


def num_rounds(layout: Layout, round_rows: int) -> jax.Array:
    """Rounds until the fullest device of this axis has had all its rows."""
    num_devices = layout.sizes.shape[0]
    fullest = layout.sizes.sum(axis=0).reshape(num_devices, -1).sum(axis=1).max()
    return (fullest + round_rows - 1) // round_rows


def slices_of_round(layout: Layout, me: jax.Array, number: jax.Array | int, round_rows: int) -> Slices:
    """The part of every slice that lies in rows number * R .. (number + 1) * R of its owner's layout."""
    num_devices, num_experts = layout.sizes.shape
    begin = number * round_rows
    first_PE = jnp.clip(layout.lands_at, begin, begin + round_rows)
    sizes_PE = jnp.clip(layout.lands_at + layout.sizes, begin, begin + round_rows) - first_PE
    # An empty slice begins at 0: its true place may lie outside the array, which no transport promises to bear.
    lands_PE = jnp.where(sizes_PE > 0, first_PE - begin, 0)
    from_PE = jnp.where(sizes_PE > 0, layout.sent_from + first_PE - layout.lands_at, 0)
    num_local = num_experts // num_devices

    def mine(x_PE):  # [P, L]: of my own experts
        return jax.lax.dynamic_slice_in_dim(x_PE, me * num_local, num_local, axis=1).reshape(-1)

    return Slices(from_PE[me], sizes_PE[me], lands_PE[me], mine(lands_PE), mine(sizes_PE), mine(from_PE))


class Transport(NamedTuple):
    """How rows cross the expert axis.

    axis: its name. width: W, the most rows from one device to another in a round. is_ragged: whether the platform has a
    ragged all-to-all.
    """

    axis: str
    width: int
    is_ragged: bool

    def send(self, x_ND: jax.Array, slices: Slices, round_rows: int) -> jax.Array:
        """My sorted rows to their owners: [N, D] -> [R, D], grouped by expert; rows that nobody sent are zero."""
        zero_RD = jnp.zeros((round_rows, x_ND.shape[-1]), x_ND.dtype)
        return self._exchange(x_ND, zero_RD, slices.out_at, slices.out_sizes, slices.out_lands, slices.in_sizes)

    def give_back(self, y_RD: jax.Array, slices: Slices, num_rows: int) -> jax.Array:
        """The way back: [R, D] -> [N, D], each row where it was sent from; rows not of this round are zero."""
        zero_ND = jnp.zeros((num_rows, y_RD.shape[-1]), y_RD.dtype)
        return self._exchange(y_RD, zero_ND, slices.in_at, slices.in_sizes, slices.in_lands, slices.out_sizes)

    def _exchange(self, operand, output, offsets, sizes, lands, received):
        if self.is_ragged:
            return jax.lax.ragged_all_to_all(operand, output, offsets, sizes, lands, received, axis_name=self.axis)
        return padded_all_to_all(operand, output, offsets, sizes, lands, received, self.axis, self.width)


def padded_all_to_all(operand, output, offsets, sizes, lands, received, axis: str, width: int) -> jax.Array:
    """What `jax.lax.ragged_all_to_all` does into zeros, by an all-to-all of equal parts, each as long as the longest
    possible: P * W rows on either side, where the ragged one sends no more than there is. For platforms without it."""
    num_devices = jax.lax.axis_size(axis)
    swap = functools.partial(jax.lax.all_to_all, axis_name=axis, split_axis=0, concat_axis=0, tiled=True)
    rows_PW = _rows(offsets.reshape(num_devices, -1), sizes.reshape(num_devices, -1), width)
    arrived_PWD = swap(operand.at[rows_PW].get(mode="fill", fill_value=0))
    rows_PW = _rows(swap(lands).reshape(num_devices, -1), received.reshape(num_devices, -1), width)
    return output.at[rows_PW].add(arrived_PWD, mode="drop")


def _rows(offsets_PL: jax.Array, sizes_PL: jax.Array, width: int) -> jax.Array:
    """int32[P, W]: the row numbers of each device's slices, one after another, then numbers outside any array."""
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
    """sum over r < count of one_round(r, constants, inputs), count >= 1 and known at run time only.

    The first round is differentiated like any other code. Further ones, which are rare, are run again in the backward
    pass: their number has no bound to reserve memory for.

    Args:
      count: int32, the same on every device that takes part in the rounds' collectives.
      constants: integers; not differentiated.
    """
    return _add_rounds(one_round, count, constants, inputs, one_round(0, constants, inputs))


def _add_rounds(one_round, count, constants, inputs, first):
    def add_round(r, total):
        return total + one_round(r, constants, _in_the_loop(r, inputs))

    return jax.lax.fori_loop(1, count, add_round, first)


def _in_the_loop(r: jax.Array, inputs: PyTree) -> PyTree:
    """`inputs`, tied to the round. Else the compiler copies the rows to the layout in which they are sent before the
    loop, and keeps the copies beside them until the last round."""
    return jax.lax.optimization_barrier((r, inputs))[1]


def _rounds_forward(one_round, count, constants, inputs):
    first, first_back = jax.vjp(lambda inputs: one_round(0, constants, inputs), inputs)
    return _add_rounds(one_round, count, constants, inputs, first), (first_back, count, constants, inputs)


def _rounds_backward(one_round, residuals, cotangent):
    first_back, count, constants, inputs = residuals

    def add_round(r, grads):
        here, cotangent_here = _in_the_loop(r, (inputs, cotangent))
        back = jax.vjp(lambda inputs: one_round(r, constants, inputs), here)[1]
        return jax.tree.map(jnp.add, grads, back(cotangent_here)[0])

    return None, None, jax.lax.fori_loop(1, count, add_round, first_back(cotangent)[0])


sum_of_rounds.defvjp(_rounds_forward, _rounds_backward)
