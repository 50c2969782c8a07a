"""The exchange alone: rows go to the experts' owners and come back, whatever the routing, with either transport."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.config import MeshConfig
from mtp_jax.kernels.device import pretend
from mtp_jax.layers import all_to_all
from mtp_jax.sharding import make_mesh

DEVICES, EXPERTS, TOKENS, CHOSEN, DIM = 4, 8, 12, 2, 6  # 12 tokens per device, two experts each


def routings():
    """Name -> int[devices, tokens, chosen], distinct experts per token."""
    rng = np.random.default_rng(0)
    skew = np.exp2(-np.arange(EXPERTS))
    draw = lambda p: np.stack(  # noqa: E731
        [rng.choice(EXPERTS, CHOSEN, replace=False, p=p / p.sum()) for _ in range(DEVICES * TOKENS)]
    ).reshape(DEVICES, TOKENS, CHOSEN)
    return {
        "all to one device": np.broadcast_to([5, 4], (DEVICES, TOKENS, CHOSEN)),
        "one expert gets none": draw(np.where(np.arange(EXPERTS) == 3, 0.0, 1.0)),
        "uneven": draw(skew),
        "even": draw(np.ones(EXPERTS)),
        "each device to its own": np.broadcast_to(np.arange(EXPERTS).reshape(DEVICES, 1, 2), (DEVICES, TOKENS, CHOSEN)),
    }


def as_documented(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`jax.lax.ragged_all_to_all` after its docstring, for platforms without it; NaN where recv_sizes is not right."""
    per_device = len(send_sizes) // jax.lax.axis_size(axis_name)
    gather = lambda x: jax.lax.all_gather(x, axis_name)  # noqa: E731
    mine = jax.lax.axis_index(axis_name) * per_device + jnp.arange(per_device)
    data, begins, sizes, lands = gather(operand), gather(input_offsets), gather(send_sizes), gather(output_offsets)
    row = jnp.arange(len(output))
    for source in range(len(data)):
        for i in mine:
            at = row - lands[source, i]
            inside = (at >= 0) & (at < sizes[source, i])
            taken = data[source].at[jnp.where(inside, begins[source, i] + at, 0)].get(mode="fill", fill_value=jnp.nan)
            output = jnp.where(inside[:, None], taken, output)
    return jnp.where((sizes[:, mine].reshape(-1) == recv_sizes).all(), output, jnp.nan)


def experts(rows_RD, sizes_L, weights_LDD):
    return jnp.tanh(jax.lax.ragged_dot(rows_RD, weights_LDD, sizes_L))


@pytest.mark.parametrize("slack", [1.25, 0.3], ids=["few_rounds", "many_rounds"])
@pytest.mark.parametrize("transport", ["padded", "ragged"])
def test_the_exchange_equals_each_row_through_its_expert(monkeypatch, transport, slack):
    monkeypatch.setattr(all_to_all, "ROUND_SLACK", slack)
    if transport == "ragged":
        monkeypatch.setattr(jax.lax, "ragged_all_to_all", as_documented)
    rng = np.random.default_rng(1)
    shape = (DEVICES, TOKENS * CHOSEN, DIM)
    x_PND, cotangent_PND = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    weights_EDD = jnp.asarray(rng.normal(size=(EXPERTS, DIM, DIM)), jnp.float32)

    def one_device(x_PND, sizes_PE, weights_LDD):
        return all_to_all.exchanged(x_PND[0], sizes_PE[0], weights_LDD, experts, CHOSEN)[None]

    def travelled(x_PND, weights_EDD, expert_PN):
        sizes_PE = (expert_PN[..., None] == jnp.arange(EXPERTS)).sum(axis=1, dtype=jnp.int32)
        axis = jax.sharding.PartitionSpec("expert")
        run = jax.shard_map(one_device, in_specs=(axis, axis, axis), out_specs=axis, check_vma=False)
        return run(x_PND, sizes_PE, weights_EDD)

    def stayed(x_PND, weights_EDD, expert_PN):
        return jnp.tanh(jnp.einsum("pnd,pndf->pnf", x_PND, weights_EDD[expert_PN], precision="highest"))

    def forward_and_backward(run):
        def value(x_PND, weights_EDD, expert_PN):
            out_PND = run(x_PND, weights_EDD, expert_PN)
            return (out_PND * cotangent_PND).sum(), out_PND

        return jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True))

    mesh = make_mesh(MeshConfig(data=1, expert=DEVICES), jax.devices()[:DEVICES])
    with jax.set_mesh(mesh), pretend("tpu" if transport == "ragged" else "cpu"):
        one, other = forward_and_backward(stayed), forward_and_backward(travelled)
        for name, chosen in routings().items():
            expert_PN = jnp.asarray(np.sort(chosen.reshape(DEVICES, -1), axis=1))
            expected, found = (run(x_PND, weights_EDD, expert_PN) for run in (one, other))
            for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
                np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5, err_msg=name)


def test_rounds_are_as_many_as_the_fullest_device_needs():
    sizes_PE = np.zeros((DEVICES, EXPERTS), np.int32)
    sizes_PE[:, 5] = 24
    layout = all_to_all.make_layout(jnp.asarray(sizes_PE))
    assert [int(all_to_all.num_rounds(layout, rows)) for rows in (96, 95, 32, 1)] == [1, 2, 3, 96]
    even = all_to_all.make_layout(jnp.full((DEVICES, EXPERTS), 3, jnp.int32))
    assert int(all_to_all.num_rounds(even, 24)) == 1
