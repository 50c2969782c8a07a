"""Matmuls in 8 bits: against the oracle, forward and backward, and at the edges of the format."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mtp_jax.errors import warn_once
from mtp_jax.kernels import fp8
from mtp_jax.kernels import grouped_matmul as grouped
from mtp_jax.kernels.device import Device, pretend
from tests.kernels.hopper import assert_close, hopper_only
from tests.reference import fp8 as reference

FORMATS = {reference.E4M3: ml_dtypes.float8_e4m3fn, reference.E5M2: ml_dtypes.float8_e5m2}


def outliers(num_tokens, dim, width, seed=0):
    """Activations with large channels and a few huge values, a weight, and a gradient that varies a lot by token."""
    rng = np.random.default_rng(seed)
    x_ND = rng.standard_normal((num_tokens, dim)) * np.exp(rng.normal(0, 0.5, dim))
    x_ND[:, rng.choice(dim, max(1, dim // 100))] *= 50
    x_ND[:2, rng.choice(dim, 2)] = 3000
    w_DF = 0.02 * rng.standard_normal((dim, width)) * np.exp(rng.normal(0, 0.5, width))
    g_NF = rng.standard_t(3, (num_tokens, width)) * np.exp(rng.normal(-10, 3, (num_tokens, 1)))
    return x_ND, w_DF, g_NF


@functools.partial(jax.jit, static_argnums=3)
def forward_and_backward(x, w, g, in_dims):
    y, pull = jax.vjp(lambda x, w: fp8.dot(x, w, in_dims), x, w)
    return y, *pull(g)


@pytest.mark.parametrize("form", FORMATS, ids=("e4m3", "e5m2"))
def test_the_oracle_rounds_to_the_nearest_value_and_halves_to_even(form):
    values = np.arange(256, dtype=np.uint8).view(FORMATS[form]).astype(np.float64)
    values = np.unique(values[np.isfinite(values)])
    assert values.max() == form.max_value
    between = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    drawn = np.random.default_rng(0).standard_normal(500) * np.exp2(np.linspace(-20, 7, 500))
    beside = np.nextafter(between, np.float32(0)), np.nextafter(between, np.float32(np.inf))
    x = np.concatenate([values, between, *beside, drawn]).astype(np.float32)
    np.testing.assert_array_equal(reference.rounded(x, form), x.astype(FORMATS[form]).astype(np.float64))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("x_shape", "w_shape", "in_dims"),
    [
        ((2, 9, 40), (40, 24), (0,)),
        ((2, 9, 40), (40, 3, 8), (0,)),
        ((2, 9, 5, 8), (5, 8, 24), (0, 1)),
        ((18, 40), (3, 40, 8), (1,)),
    ],
    ids=("matrix", "to heads", "from heads", "to experts"),
)
def test_products_and_gradients_equal_the_oracle(x_shape, w_shape, in_dims, dtype):
    dim = np.prod([w_shape[d] for d in in_dims])
    x_ND, w_DF, g_NF = outliers(18, dim, np.prod(w_shape) // dim)
    x_ND[3], g_NF[5] = 0, 0
    outputs = [d for d in range(len(w_shape)) if d not in in_dims]
    order = [*in_dims, *outputs]
    x, g = (
        jnp.asarray(x_ND.reshape(x_shape), dtype),
        g_NF.reshape(*x_shape[: -len(in_dims)], *np.take(w_shape, outputs)),
    )
    w = jnp.asarray(w_DF.reshape(np.take(w_shape, order)).transpose(np.argsort(order)), dtype)
    found = forward_and_backward(x, w, jnp.asarray(g, dtype), in_dims)
    as_stored = (np.asarray(jnp.asarray(a, dtype), np.float64) for a in (x_ND, w_DF, g_NF))
    y_NF, dx_ND, dw_DF = reference.per_token(*as_stored)
    expected = y_NF.reshape(g.shape), dx_ND.reshape(x_shape), dw_DF.reshape(np.take(w_shape, order))
    expected = *expected[:2], expected[2].transpose(np.argsort(order))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype and np.isfinite(np.asarray(a, np.float32)).all()
        # Hopper's tensor cores add up to 128 products with 14 bits before a sum in float32.
        exact = 1e-6 if jax.default_backend() == "cpu" else 1e-3
        assert_close(a, b, exact if dtype == "float32" else 4e-3)


def errors(found, exact):
    """Relative errors of the whole arrays, and the largest of one token of dx."""
    whole = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(found, exact, strict=True)]
    by_token = np.linalg.norm(found[1] - exact[1], axis=1) / np.linalg.norm(exact[1], axis=1)
    return whole, by_token.max()


def test_one_scale_per_token_is_as_exact_as_one_per_128_values():
    """And one per array is not: tokens with a small gradient lose it."""
    x_ND, w_DF, g_NF = outliers(64, 256, 256)
    exact = x_ND @ w_DF, g_NF @ w_DF.T, x_ND.T @ g_NF
    tiles, by_token = errors(reference.per_tile(x_ND, w_DF, g_NF), exact)
    tokens, by_token_too = errors(reference.per_token(x_ND, w_DF, g_NF), exact)
    np.testing.assert_allclose(tokens, tiles, rtol=0.02)
    assert 0.01 < min(tokens) and max(tokens) < 0.05 and by_token_too < 0.06 and by_token < 0.06
    assert errors(reference.per_tensor(x_ND, w_DF, g_NF), exact)[1] > 0.5
    gradients = errors(reference.per_token(x_ND, w_DF, g_NF, reference.E5M2), exact)[0][1:]
    assert all(1.3 * e4m3 < e5m2 for e4m3, e5m2 in zip(tokens[1:], gradients, strict=True))


def test_the_size_of_a_token_does_not_matter():
    """Powers of two commute with everything, from 1e-25 to 1e25; all zeros stay zero."""
    keys = jax.random.split(jax.random.key(0), 3)
    x_ND, w_DF, g_NF = (
        jax.random.normal(key, shape) for key, shape in zip(keys, ((6, 16), (16, 8), (6, 8)), strict=True)
    )
    by_N1 = jnp.asarray(np.exp2([-80.0, -20, 0, 3, 50, 80]), jnp.float32)[:, None]
    y_NF, dx_ND, _ = forward_and_backward(x_ND, w_DF, g_NF, (0,))
    y_too_NF, dx_too_ND, dw_DF = forward_and_backward(by_N1 * x_ND, w_DF, g_NF / by_N1, (0,))
    np.testing.assert_array_equal(y_too_NF, by_N1 * y_NF)
    np.testing.assert_array_equal(dx_too_ND, dx_ND / by_N1)
    np.testing.assert_array_equal(dw_DF, forward_and_backward(x_ND, w_DF, g_NF, (0,))[2])
    for zeros in ((0 * x_ND, w_DF, 0 * g_NF), (x_ND, 0 * w_DF, g_NF), (0 * x_ND, 0 * w_DF, 0 * g_NF)):
        found = forward_and_backward(*zeros, (0,))
        assert all(np.isfinite(a).all() for a in found) and not found[0].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", ["x", "w", "g"])
def test_what_is_not_finite_stays_so_where_it_counts(which, bad):
    x_ND, w_DF, g_NF = (jnp.asarray(a, jnp.float32) for a in outliers(6, 16, 8))
    place = (2, 3) if which != "w" else (3, 2)
    operands = {"x": x_ND, "w": w_DF, "g": g_NF}
    operands[which] = operands[which].at[place].set(bad)
    y_NF, dx_ND, dw_DF = forward_and_backward(*operands.values(), (0,))
    spoilt = {"x": (y_NF[2], dw_DF[3]), "w": (y_NF[:, 2], dx_ND[:, 3]), "g": (dx_ND[2], dw_DF[:, 3])}[which]
    assert not any(np.isfinite(a).any() for a in spoilt)
    clean = {"x": [y_NF[:2], dx_ND], "w": [dw_DF], "g": [y_NF, dx_ND[3:]]}[which]
    assert all(np.isfinite(a).all() for a in clean)


def test_the_operands_are_in_8_bits_in_all_three_products_and_between_the_passes():
    x_ND, w_DF, g_NF = (jnp.asarray(a, jnp.bfloat16) for a in outliers(6, 16, 8))
    jaxpr = jax.make_jaxpr(lambda *a: forward_and_backward.__wrapped__(*a, (0,)))(x_ND, w_DF, g_NF).jaxpr
    dots = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    assert [[v.aval.dtype.name for v in (*e.invars, *e.outvars)] for e in dots] == [
        ["float8_e4m3fn", "float8_e4m3fn", "bfloat16"]
    ] * 3
    for dot in dots:  # as Hopper's 8-bit instructions read both operands
        (contracted, batch), ndims = dot.params["dimension_numbers"], [v.aval.ndim for v in dot.invars]
        assert contracted == tuple((ndim - 1,) for ndim in ndims) and batch == ((), ())
    kept = jax.tree.leaves(jax.vjp(lambda x, w: fp8.dot(x, w, (0,)), x_ND, w_DF)[1])
    assert sorted((a.shape, a.dtype.name) for a in kept if a.size > 6) == [
        ((16, 6), "float8_e4m3fn"),
        ((16, 8), "float8_e4m3fn"),
    ]


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.dots_with_no_batch_dims_saveable])
def test_a_recomputed_product_has_the_same_gradients(policy):
    x_ND, w_DF, g_NF = (jnp.asarray(a, jnp.float32) for a in outliers(6, 16, 8))

    def layer(x, w):
        return jnp.tanh(fp8.dot(jnp.tanh(x), w, (0,)))

    found = [
        jax.jit(lambda x, w, run=run: jax.vjp(run, x, w)[1](g_NF))(x_ND, w_DF)
        for run in (layer, jax.checkpoint(layer, policy=policy))
    ]
    jax.tree.map(np.testing.assert_array_equal, *found)


SIZES = [10, 0, 130, 60]  # and 56 rows after the last group


@pytest.mark.parametrize(
    ("kernel", "dtype", "stands_in"),
    [
        ("xla", "float32", False),
        ("xla", "bfloat16", False),
        ("pallas_hopper", "bfloat16", True),
        pytest.param("pallas_hopper", "bfloat16", False, marks=hopper_only),
    ],
)
def test_grouped_products_and_gradients_equal_the_oracle(request, kernel, dtype, stands_in):
    if stands_in:
        request.getfixturevalue("stand_ins")
    parts = [outliers(size, 128, 128, seed) for seed, size in enumerate(SIZES)]
    x_ND, g_NF = (np.concatenate([*(part[i] for part in parts), np.zeros((56, 128))]) for i in (0, 2))
    x, g = jnp.asarray(x_ND, dtype), jnp.asarray(g_NF, dtype)
    w = jnp.asarray(np.stack([w_DF for _, w_DF, _ in parts]), dtype)

    @jax.jit
    def run(x, w, g):
        sizes_E = jnp.asarray(SIZES, jnp.int32)
        (y,), pull = jax.vjp(lambda x, w: grouped.grouped_matmuls(x, [w], sizes_E, kernel, is_fp8=True), x, w)
        return y, *pull([g])

    expected = np.zeros((256, 128)), np.zeros((256, 128)), np.zeros(w.shape)
    for group, end in enumerate(np.cumsum(SIZES)):
        rows = slice(end - SIZES[group], end)
        if SIZES[group]:
            one = (np.asarray(a, np.float64) for a in (x[rows], w[group], g[rows]))
            expected[0][rows], expected[1][rows], expected[2][group] = reference.per_token(*one)
    for a, b in zip(run(x, w, g), expected, strict=True):  # the scale of all groups' rows underflows at other values
        assert_close(a, b, 1e-4 if dtype == "float32" else 4e-3)


def test_experts_on_a_gpu_warn_where_they_are_no_faster(stand_ins, capsys):
    warn_once.cache_clear()
    x, w = jnp.ones((256, 128), jnp.bfloat16), jnp.ones((2, 128, 128), jnp.bfloat16)
    for kernel in ("auto", "xla", "xla"):
        grouped.grouped_matmuls(x, [w], jnp.asarray([100, 156], jnp.int32), kernel, is_fp8=True)
    (said,) = capsys.readouterr().err.splitlines()
    assert "multiplied in bfloat16" in said and "model.expert_kernel=xla has no fp8 kernel" in said


def test_a_device_without_the_matmul_is_reported(capsys):
    for capability, has_it in (("9.0", True), ("8.9", True), ("10.0", True), ("8.0", False), ("gfx942", False)):
        assert Device("gpu", capability).multiplies_fp8 == has_it, capability
    warn_once.cache_clear()
    with pretend("tpu"):
        jax.eval_shape(lambda x: fp8.dot(x, x, (0,)), jnp.ones((4, 4)))
    assert "slow here" in capsys.readouterr().err
    warn_once.cache_clear()
    with pretend("gpu", "9.0"):
        jax.eval_shape(lambda x: fp8.dot(x, x, (0,)), jnp.ones((4, 4)))
    assert not capsys.readouterr().err
