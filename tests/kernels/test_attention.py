"""Attention in blocks of queries, and by kernels; its values against the numpy oracle are in tests/test_model.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.extend.core import jaxprs_in_params

from mtp_jax.config import UserError
from mtp_jax.errors import warn_once
from mtp_jax.kernels import attention
from mtp_jax.kernels.attention import Mask, cudnn, hopper, xla
from mtp_jax.kernels.attention.hopper import blocks
from mtp_jax.kernels.device import pretend
from mtp_jax.layers.stack import POLICIES
from tests.kernels.hopper import assert_close, hopper_only

# On Hopper the kernels are compiled as in use.


@pytest.mark.parametrize(
    ("length", "limit", "value"), [(32, "QUERY_BLOCK", 10), (36, "SCORE_BYTES", 2 * 4 * 36 * 4 * 10)]
)
@pytest.mark.parametrize("window", [0, 1, 7, 100])
def test_blocks_of_queries_change_neither_values_nor_gradients(monkeypatch, length, limit, value, window):
    q, k, v, _ = inputs(length=length, dims=(6, 5), dtype=jnp.float32)
    segments = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 4, (2, length)), axis=1))

    def loss(q, k, v):
        out = attention.attend(q, k, v, Mask(segments, window=window), 0.3)
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out

    def run():  # traced anew: the limits are no arguments
        return jax.jit(jax.value_and_grad(lambda *qkv: loss(*qkv), (0, 1, 2), has_aux=True))(q, k, v)

    (_, whole), whole_grads = run()
    monkeypatch.setattr(xla, limit, value)  # 10 queries at most: 4 blocks of 8, or of 9
    assert xla._num_blocks(2, length, 4, length) == 4
    (_, blocked), blocked_grads = run()
    np.testing.assert_allclose(blocked, whole, atol=1e-6)
    for a, b in zip(blocked_grads, whole_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("limit", [8, 512])  # queries per block of 32
@pytest.mark.parametrize("remat", ["none", "dots", "kernels"])
def test_scores_are_computed_twice_and_not_kept(monkeypatch, limit, remat):
    monkeypatch.setattr(xla, "QUERY_BLOCK", limit)
    q, k, v, grad = inputs(length=32, dims=(6, 6), dtype=jnp.float32)

    def attend(q, k, v):
        return xla.attend(jnp.sin(q), k, v, Mask(documents(True)[:, :32]), None, 0.3)

    def both_passes(q, k, v):
        out, pull = jax.vjp(jax.checkpoint(attend, policy=POLICIES[remat]) if remat != "none" else attend, q, k, v)
        return pull, out, pull(grad)

    kept, *_ = jax.eval_shape(both_passes, q, k, v)
    num_scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[1]
    assert max(x.size for x in jax.tree.leaves(kept)) < num_scores
    # Two products forward; then the first one again, delta and the four of the gradients.
    program = jax.jit(lambda *qkv: both_passes(*qkv)[1:]).lower(q, k, v).as_text()
    assert program.count("stablehlo.dot_general") == 8


def test_rows_of_one_document_need_no_segments():
    q, k, v, _ = inputs(length=12, heads=2, dims=(4, 4), dtype=jnp.float32)
    np.testing.assert_array_equal(
        attention.attend(q, k, v, Mask(), 0.3), attention.attend(q, k, v, Mask(jnp.ones((2, 12), jnp.int32)), 0.3)
    )


def inputs(num_rows=2, length=256, heads=4, groups=2, dims=(192, 128), dtype=jnp.bfloat16):
    rng = np.random.default_rng(1)  # numpy: jax compiles a program of seconds for each shape
    shapes = (heads, dims[0]), (groups, dims[0]), (groups, dims[1]), (heads, dims[1])
    return [jnp.asarray(rng.standard_normal((num_rows, length, *shape)), dtype) for shape in shapes]


REFUSED = {  # by our kernels, then by cuDNN too
    "another device": ({}, {}, "8.0", "8.0"),
    "a CUDA that compiles wrongly": ({"length": 255}, {"cuda": 12080}, "CUDA 12.8 to 12.9.0", "even length"),
    "another dtype": ({"dtype": jnp.float32}, {}, "float32", "float32"),
    "odd head dims": ({"dims": (20, 20)}, {}, "multiples of 64", "head dims"),
    "large head dims": ({"dims": (320, 320)}, {}, "together at most 320", "head dims"),
    "values that are larger": ({"dims": (64, 128)}, {}, "no larger", "head dims"),
    "split rows": ({"length": 192}, {"first": jnp.int32(0)}, "multiples of 128", "whole rows"),
    "an old cuDNN": ({"length": 192}, {"version": 90900}, "multiples of 128", "9.10"),
    "a huge mask": ({"length": 192}, {"limit": 1 << 10}, "multiples of 128", "mask"),
}


def program(qkv, mask, kernel):
    """The operations of the attention, as text."""
    return str(jax.make_jaxpr(functools.partial(attention.attend, mask=mask, scale=0.3, kernel=kernel))(*qkv))


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_inputs_of_all_kernels_go_to_the_compiler_with_one_notice(monkeypatch, capsys, name):
    shape, more, *reasons = REFUSED[name]
    more = {"version": 91500, "limit": cudnn.MASK_BYTES, "first": 0, "cuda": 12091} | more
    monkeypatch.setattr(hopper, "_cuda_version", lambda: more["cuda"])
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: more["version"])
    monkeypatch.setattr(cudnn, "MASK_BYTES", more["limit"])
    warn_once.cache_clear()
    *qkv, _ = inputs(**shape)
    mask = Mask(jnp.ones(qkv[0].shape[:2], jnp.int32), more["first"])
    with pretend("gpu", "8.0" if name == "another device" else "9.0"):
        for _ in range(2):
            assert program(qkv, mask, "auto") == program(qkv, mask, "xla")
        (said,) = capsys.readouterr().err.splitlines()
        for kernel, reason in zip(("pallas_hopper", "cudnn"), reasons, strict=True):
            assert reason in said
            with pytest.raises(UserError, match=f"model.attention_kernel={kernel}: .*{reason}"):
                attention.attend(*qkv, mask, 0.3, kernel=kernel)


def test_cudnn_has_no_sinks(as_on_hopper):
    with pytest.raises(UserError, match="model.attention_kernel=cudnn: it does not support attention sinks"):
        attention.attend(*inputs()[:3], Mask(), 0.3, jnp.zeros(4), kernel="cudnn")


@pytest.mark.parametrize("window", [0, 1, 4])
@pytest.mark.parametrize("is_packed", [False, True])
def test_sinks_take_their_share_of_the_softmax(window, is_packed):
    """Values and gradients against the formula on whole rows of scores."""
    q, k, v, grad = inputs(length=12, dims=(6, 6), groups=4, dtype=jnp.float32)
    segments_BS = jnp.repeat(jnp.array([[1, 2, 3]] * 2), 4, axis=1) if is_packed else None
    sinks_H = jnp.array([-1.0, 0.0, 0.5, 2.0])
    index = np.arange(12)
    seen = (index[None] <= index[:, None]) & (index[None] > index[:, None] - (window or 12))
    if is_packed:
        seen &= index[None] // 4 == index[:, None] // 4

    def formula(q, k, v, sinks_H):
        scores = jnp.where(seen, jnp.exp(0.3 * jnp.einsum("bthd,bshd->bhts", q, k)), 0)
        total = scores.sum(-1, keepdims=True) + jnp.exp(sinks_H)[:, None, None]
        return jnp.einsum("bhts,bshd->bthd", scores / total, v)

    def attend(q, k, v, sinks_H):
        return attention.attend(q, k, v, Mask(segments_BS, window=window), 0.3, sinks_H)

    def forward_and_backward(function):
        def run(*args):
            out, pull = jax.vjp(function, *args)
            return out, *pull(grad)

        return jax.jit(run)(q, k, v, sinks_H)

    for a, b in zip(forward_and_backward(attend), forward_and_backward(formula), strict=True):
        assert_close(a, b, 2e-6)


@pytest.mark.parametrize("window", [0, 1, 5, 30])
@pytest.mark.parametrize(("first", "num_queries"), [(0, 24), (6, 10)])
def test_ranges_are_what_queries_and_keys_of_a_document_see(first, num_queries, window):
    segments_BS = np.array([[1] * 3 + [0] * 2 + [2] + [3] * 10 + [0] * 8, [7] * 24])
    start_BT, end_BS, _ = blocks.ranges(Mask(jnp.asarray(segments_BS), first, window), 2, 24, num_queries)
    limit = window or 24
    for b, row in enumerate(segments_BS):
        runs = np.cumsum(np.r_[0, row[1:] != row[:-1]])
        for j in range(24):
            assert end_BS[b, j] == min(np.flatnonzero(runs == runs[j]).max() + 1, j + limit)
        for t in range(num_queries):
            assert start_BT[b, t] == max(np.flatnonzero(runs == runs[first + t]).min(), first + t + 1 - limit)


def walk(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from walk(inner)


@pytest.mark.parametrize("segments_BT", [None, jnp.ones((2, 256), jnp.int32)], ids=["one_document", "packed"])
@pytest.mark.parametrize(("kernel", "counted"), [("pallas_hopper", "attention_forward"), ("cudnn", cudnn.FORWARD)])
def test_recomputation_runs_the_attention_kernel_once_where_its_outputs_are_kept(
    monkeypatch, as_on_hopper, segments_BT, kernel, counted
):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91500)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(fused_attention_stablehlo, "is_cuda_compute_capability_equal", lambda capability: False)

    def runs(policy):
        def loss(q, k, v):
            attend = functools.partial(attention.attend, mask=Mask(segments_BT), scale=0.3, kernel=kernel)
            return jax.checkpoint(attend, policy=policy)(q, k, v).sum()

        equations = walk(jax.make_jaxpr(jax.value_and_grad(loss, (0, 1, 2)))(*inputs()[:3]).jaxpr)
        return sum(counted in (eqn.primitive.name, eqn.params.get("name")) for eqn in equations)

    assert {name: runs(policy) for name, policy in POLICIES.items()} == {"dots": 1, "kernels": 1, "full": 2}


def documents(is_packed):
    """Documents with padding between them, as the deeper depths of MTP have; one of them of a single token."""
    if not is_packed:
        return None
    segments_BT = jnp.asarray(np.sort(np.random.default_rng(4).integers(1, 6, (2, 384)), axis=1))
    segments_BT = jnp.where(jnp.diff(segments_BT, append=9, axis=1) != 0, 0, segments_BT)
    return segments_BT.at[:, -2].set(6)


@hopper_only
@pytest.mark.parametrize("kernel", ["pallas_hopper", "cudnn"])
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize(
    ("heads", "groups", "dims"), [(4, 4, (192, 128)), (4, 2, (128, 128)), (4, 1, (192, 128)), (2, 1, (64, 64))]
)
def test_on_hopper_kernels_equal_the_slow_path_in_float32(heads, groups, dims, is_packed, kernel):
    check_on_hopper(inputs(length=384, heads=heads, groups=groups, dims=dims), Mask(documents(is_packed)), kernel)


@pytest.mark.parametrize("dims", [(96, 64), (80, 48), (192, 128)])
def test_unequal_head_dims_are_padded_for_our_kernels(monkeypatch, dims):
    """The kernel is replaced by XLA operations; it must get supported dims, and padding must not change the result."""
    seen = []

    def as_kernel(q, k, v, ranges, sinks_H, scale, tiles):
        seen.append((q.shape[3], k.shape[3], v.shape[3]))
        return xla.attend(q, k, v, Mask(), sinks_H, scale)

    monkeypatch.setattr("mtp_jax.kernels.attention.hopper.kernel.attend", as_kernel)
    q, k, v, grad = inputs(dims=dims, dtype=jnp.float32)
    found, pull = jax.vjp(lambda *qkv: hopper.attend(*qkv, Mask(), None, 0.1), q, k, v)
    expected, expected_pull = jax.vjp(lambda *qkv: xla.attend(*qkv, Mask(), None, 0.1), q, k, v)
    assert all(dim % 64 == 0 for dim in seen[0]) and seen[0][0] - dims[0] < 64
    for a, b in zip((found, *pull(grad)), (expected, *expected_pull(grad)), strict=True):
        assert_close(a, b, 1e-5)


@hopper_only
@pytest.mark.parametrize("is_packed", [False, True])
def test_on_hopper_padded_head_dims_equal_the_slow_path_in_float32(is_packed):
    check_on_hopper(inputs(length=384, dims=(96, 64)), Mask(documents(is_packed)), "pallas_hopper")


@hopper_only
@pytest.mark.parametrize("first", [0, 128, 256])
@pytest.mark.parametrize("is_packed", [False, True])
def test_on_hopper_split_rows_equal_the_slow_path_in_float32(first, is_packed):
    q, k, v, grad = inputs(length=384, heads=4, groups=2)
    check_on_hopper([q[:, :128], k, v, grad[:, :128]], Mask(documents(is_packed), jnp.int32(first)), "pallas_hopper")


@hopper_only
@pytest.mark.parametrize("first", [0, 256])
@pytest.mark.parametrize("window", [1, 100, 128, 300])
@pytest.mark.parametrize("is_packed", [False, True])
def test_on_hopper_windows_and_sinks_equal_the_slow_path_in_float32(is_packed, window, first):
    q, k, v, grad = inputs(length=384, heads=4, groups=2)
    mask = Mask(documents(is_packed), jnp.int32(first), window)
    check_on_hopper([q[:, :128], k, v, grad[:, :128]], mask, "pallas_hopper", jnp.linspace(-1.0, 2.0, 4))


@hopper_only
@pytest.mark.parametrize("is_packed", [False, True])
def test_on_hopper_windows_of_cudnn_equal_the_slow_path_in_float32(is_packed):
    check_on_hopper(inputs(length=384), Mask(documents(is_packed), window=100), "cudnn")


def check_on_hopper(qkv_grad, mask, kernel, sinks_H=None):
    """But for padding, whose positions see other padding or do not, and are not read."""
    *qkv, grad = qkv_grad
    if mask.segments_BS is not None:
        is_real_BT = jax.lax.dynamic_slice_in_dim(mask.segments_BS, mask.first, grad.shape[1], axis=1) != 0
        grad = jnp.where(is_real_BT[..., None, None], grad, 0)

    def forward_and_backward(kernel, *args):
        def attend(q, k, v, sinks_H):
            return attention.attend(q, k, v, mask, 0.07, sinks_H, kernel)

        out, pull = jax.vjp(attend, *args, sinks_H)
        return jax.tree.leaves([jnp.where(grad == 0, 0, out), pull(grad.astype(out.dtype))])

    found = jax.jit(functools.partial(forward_and_backward, kernel))(*qkv)
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(functools.partial(forward_and_backward, "xla"))(*(x.astype(jnp.float32) for x in qkv))
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 1e-2)
