"""Attention in blocks of queries, and by cuDNN; its values against the numpy oracle are in tests/test_model.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from mtp_jax.config import UserError
from mtp_jax.layers import attention, attention_cudnn
from mtp_jax.layers.block import POLICIES
from mtp_jax.layers.dispatch import note
from tests.layers.hopper import assert_close, hopper_only


@pytest.mark.parametrize("length", [32, 36])
@pytest.mark.parametrize(("limit", "value"), [("QUERY_BLOCK", 10), ("SCORE_BYTES", 2 * 4 * 36 * 4 * 10)])
def test_blocks_of_queries_change_neither_values_nor_gradients(monkeypatch, length, limit, value):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k = jax.random.normal(keys[0], (2, length, 4, 6)), jax.random.normal(keys[1], (2, length, 2, 6))
    v = jax.random.normal(keys[2], (2, length, 2, 5))
    segments = jnp.sort(jax.random.randint(keys[3], (2, length), 0, 4), axis=1)

    def loss(q, k, v):
        out = attention.attend(q, k, v, segments, 0.3)
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out

    run = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
    (_, whole), whole_grads = run(q, k, v)
    monkeypatch.setattr(attention, limit, value)  # 10 queries at most: 4 blocks of 8, or of 9
    assert attention._num_blocks(2, length, 4, length) == 4
    (_, blocked), blocked_grads = run(q, k, v)
    np.testing.assert_allclose(blocked, whole, atol=1e-6)
    for a, b in zip(blocked_grads, whole_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_rows_of_one_document_need_no_segments():
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 12, 2, 4)) for i in range(3))
    np.testing.assert_array_equal(
        attention.attend(q, k, v, None, 0.3), attention.attend(q, k, v, jnp.ones((2, 12), jnp.int32), 0.3)
    )


def inputs(num_rows=2, length=256, heads=4, groups=2, dims=(192, 128), dtype=jnp.bfloat16):
    keys = jax.random.split(jax.random.key(1), 4)
    shapes = (heads, dims[0]), (groups, dims[0]), (groups, dims[1]), (heads, dims[1])
    return [
        jax.random.normal(key, (num_rows, length, *shape)).astype(dtype)
        for key, shape in zip(keys, shapes, strict=True)
    ]


REFUSED = {
    "another device": ({}, {}, "9.0"),
    "another dtype": ({"dtype": jnp.float32}, {}, "float32"),
    "cut rows": ({}, {"first": jnp.int32(0)}, "whole rows"),
    "other head dims": ({"dims": (48, 32)}, {}, "head dims"),
    "odd head dims": ({"dims": (20, 20)}, {}, "head dims"),
    "an old cuDNN": ({}, {"version": 90900}, "9.10"),
    "a huge mask": ({}, {"limit": 1 << 16}, "mask"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cudnn_cannot_take_goes_to_the_compiler_and_is_said_once(monkeypatch, as_on_hopper, capsys, name):
    shape, more, reason = REFUSED[name]
    more = {"version": 91500, "limit": attention_cudnn.MASK_BYTES, "first": 0} | more
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: more["version"])
    monkeypatch.setattr(attention_cudnn, "MASK_BYTES", more["limit"])
    if name == "another device":
        monkeypatch.setattr(attention_cudnn, "compute_capability", lambda: "8.0")
    note.cache_clear()
    *qkv, _ = inputs(length=256, **shape)
    segments_BT = jnp.ones((2, 256), jnp.int32)
    for _ in range(2):
        found = attention.attend(*qkv, segments_BT, 0.3, more["first"])
        np.testing.assert_array_equal(found, attention.attend(*qkv, segments_BT, 0.3, kernel="xla"))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and reason in said[0]
    with pytest.raises(UserError, match="model.attention_kernel=cudnn"):
        attention.attend(*qkv, segments_BT, 0.3, more["first"], kernel="cudnn")


@pytest.mark.parametrize("segments_BT", [None, jnp.ones((2, 256), jnp.int32)], ids=["one_document", "packed"])
def test_recomputation_runs_the_attention_kernel_once_where_its_outputs_are_kept(
    monkeypatch, as_on_hopper, segments_BT
):
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91500)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)

    def runs(policy):
        def loss(q, k, v):
            return jax.checkpoint(lambda *qkv: attention.attend(*qkv, segments_BT, 0.3), policy=policy)(q, k, v).sum()

        return str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*inputs()[:3])).count(f"{attention_cudnn.FORWARD}[")

    assert {name: runs(policy) for name, policy in POLICIES.items()} == {"dots": 1, "kernels": 1, "full": 2}


@hopper_only
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize(("heads", "groups", "dims"), [(4, 4, (192, 128)), (4, 2, (128, 128)), (4, 1, (192, 128))])
def test_on_hopper_cudnn_equals_the_slow_path_in_float32(heads, groups, dims, is_packed):
    q, k, v, grad = inputs(length=384, heads=heads, groups=groups, dims=dims)
    segments_BT = None
    if is_packed:  # documents with padding between them, as the deeper depths of MTP have
        segments_BT = jnp.sort(jax.random.randint(jax.random.key(4), (2, 384), 1, 6), axis=1)
        segments_BT = jnp.where(jnp.diff(segments_BT, append=9, axis=1) != 0, 0, segments_BT)

    def both_ways(kernel, *args):
        out, pull = jax.vjp(lambda q, k, v: attention.attend(q, k, v, segments_BT, 0.07, kernel=kernel), *args)
        return [out, *pull(grad.astype(out.dtype))]

    found = jax.jit(functools.partial(both_ways, "cudnn"))(q, k, v)
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(functools.partial(both_ways, "xla"))(*(x.astype(jnp.float32) for x in (q, k, v)))
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 1.5e-2)
