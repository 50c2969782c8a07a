"""Grouped matmul: the rule that chooses, the gradients around any three kernels, and the kernels on a Hopper GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from mtp_jax.config import UserError
from mtp_jax.errors import warn_once
from mtp_jax.kernels import grouped_matmul as grouped
from mtp_jax.kernels.device import pretend
from mtp_jax.kernels.grouped_matmul import gradient, hopper, hopper_kernels
from tests.kernels.hopper import assert_close, hopper_only

SIZES = {
    "even": [64, 64, 64, 64],
    "uneven": [3, 190, 0, 63],
    "one takes all": [0, 0, 256, 0],
    "first and last empty": [0, 130, 126, 0],
    "rows left over": [10, 20, 30, 40],
}


def by_group(x_ND, w_EDF, sizes_E, y_NF):
    """float64 oracle, group by group: the product and, for the cotangent y, both gradients."""
    x_ND, w_EDF, y_NF = (np.asarray(a, np.float64) for a in (x_ND, w_EDF, y_NF))
    out, grad_x, grad_w = np.zeros((len(x_ND), w_EDF.shape[2])), np.zeros(x_ND.shape), np.zeros(w_EDF.shape)
    start = 0
    for group, size in enumerate(sizes_E):
        rows = slice(start, start := start + int(size))
        out[rows], grad_x[rows] = x_ND[rows] @ w_EDF[group], y_NF[rows] @ w_EDF[group].T
        grad_w[group] = x_ND[rows].T @ y_NF[rows]
    return out, grad_x, grad_w


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def random_operands(sizes_E, dtype, num_rows, dim, width):
    keys = jax.random.split(jax.random.key(0), 3)
    inside = (jnp.arange(num_rows) < sizes_E.sum())[:, None]
    x_ND = jnp.where(inside, jax.random.normal(keys[0], (num_rows, dim)), 0).astype(dtype)
    w_EDF = jax.random.normal(keys[1], (len(sizes_E), dim, width)).astype(dtype)
    y_NF = jnp.where(inside, jax.random.normal(keys[2], (num_rows, width)), 0).astype(dtype)
    return x_ND, w_EDF, sizes_E, y_NF


def operands(sizes, dtype, num_rows=256, dim=128, width=256):
    """x, w, sizes and a cotangent; rows after the last group are zero in all of them."""
    return random_operands(jnp.asarray(sizes, jnp.int32), dtype, num_rows, dim, width)


@functools.partial(jax.jit, static_argnames="kernel")
def forward_and_backward(x_ND, w_EDF, sizes_E, y_NF, kernel="auto"):
    out, pull = jax.vjp(lambda x, w: grouped.grouped_matmul(x, w, sizes_E, kernel), x_ND, w_EDF)
    return out, *pull(y_NF)


def check_forward_and_backward(arguments, tolerance, **kernel):
    for found, expected in zip(forward_and_backward(*arguments, **kernel), by_group(*arguments), strict=True):
        assert_close(found, expected, tolerance)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_values_and_gradients_are_those_of_each_row(sizes):
    with jax.default_matmul_precision("highest"):  # GPUs round float32 to TensorFloat-32 otherwise
        check_forward_and_backward(operands(sizes, jnp.float32, dim=24, width=40), 1e-5)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_kernels_are_called_right(stand_ins, sizes):
    forward_and_backward.clear_cache()
    check_forward_and_backward(operands(sizes, jnp.bfloat16), 1e-2)
    forward_and_backward.clear_cache()


def test_a_batch_of_products_is_done_one_by_one(stand_ins):
    x_ND, w_EDF, sizes_E, _ = operands(SIZES["uneven"], jnp.bfloat16)
    batch = jnp.stack([w_EDF, 2 * w_EDF])
    found = jax.vmap(lambda w_EDF: grouped.grouped_matmul(x_ND, w_EDF, sizes_E))(batch)
    expected = grouped.grouped_matmul(x_ND, w_EDF, sizes_E)
    np.testing.assert_array_equal(found, jnp.stack([expected, 2 * expected]))


REFUSED = {
    "another device": ({}, "9.0"),
    "another dtype": ({"dtype": jnp.float32}, "bfloat16"),
    "odd columns in": ({"dim": 64}, "multiples of 128"),
    "odd columns out": ({"width": 192}, "multiples of 128"),
    "few rows": ({"num_rows": 64}, "at least 128 rows"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_inputs_of_the_kernels_go_to_ragged_dot_with_one_notice(capsys, name):
    changes, reason = REFUSED[name]
    warn_once.cache_clear()
    arguments = {"sizes": [10, 20, 30, 4], "dtype": jnp.bfloat16} | changes
    x_ND, w_EDF, sizes_E, _ = operands(**arguments)
    with pretend("gpu", "8.0" if name == "another device" else "9.0"):
        for _ in range(2):
            np.testing.assert_array_equal(
                grouped.grouped_matmul(x_ND, w_EDF, sizes_E), jax.lax.ragged_dot(x_ND, w_EDF, sizes_E)
            )
        said = capsys.readouterr().err.splitlines()
        if name == "few rows":  # decoding, which is no slower for it
            assert not said
        else:
            assert len(said) == 1 and reason in said[0]
        with pytest.raises(UserError, match="model.expert_kernel=pallas_hopper"):
            grouped.grouped_matmul(x_ND, w_EDF, sizes_E, "pallas_hopper")


def test_the_config_can_choose_ragged_dot(stand_ins, capsys):
    x_ND, w_EDF, sizes_E, _ = operands(SIZES["even"], jnp.bfloat16)
    asked = jax.make_jaxpr(lambda x, w: grouped.grouped_matmul(x, w, sizes_E, "xla"))(x_ND, w_EDF)
    free = jax.make_jaxpr(lambda x, w: grouped.grouped_matmul(x, w, sizes_E))(x_ND, w_EDF)
    assert "ragged_dot" in str(asked) and "ragged_dot_general" not in str(free)
    assert not capsys.readouterr().err


def test_blocks_of_rows_hold_every_row_once():
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = rng.multinomial(1000, rng.dirichlet(np.full(rng.integers(1, 9), 0.3)))
        blocks = hopper_kernels.blocks_of_rows(jnp.asarray(sizes, jnp.int32), 1000, 128)
        group_of_row = np.full(1000, -1)
        for group, row, begin, size in zip(*map(np.asarray, blocks), strict=True):
            assert row % 128 == 0 and begin >= 0 and begin + size <= 128
            own = group_of_row[row + begin : row + begin + size]
            assert (own == -1).all()
            own[:] = group
        np.testing.assert_array_equal(group_of_row, np.repeat(np.arange(len(sizes)), sizes))


class SomeHopper:
    core_count = 132


@pytest.mark.parametrize(("dim", "width"), [(2048, 2816), (1408, 2048)])
@pytest.mark.parametrize("product", gradient.Kernels._fields)
def test_the_kernels_lower_for_cuda(monkeypatch, product, dim, width):
    monkeypatch.setattr(jax, "devices", lambda: [SomeHopper()])
    dtype = jnp.float8_e4m3fn if product.endswith("8bit") else jnp.bfloat16
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    x, y, w = shape((9088, dim)), shape((9088, width)), shape((8, dim, width))
    operands = {"forward": (x, w), "matrices": (x, y), "matrices_8bit": (shape((dim, 9088)), shape((width, 9088)))}
    run = jax.jit(getattr(hopper.kernels(), product))
    traced = run.trace(*operands.get(product, (y, w)), jax.ShapeDtypeStruct((8,), "int32"))
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


class SmallHopper:
    core_count = 2


@pytest.mark.skipif(not hasattr(plgpu, "InterpretGPUParams"), reason="this jax does not interpret kernels for GPUs")
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="kernels for GPUs are interpreted on CPUs")
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("name", ["uneven", "first and last empty"])
def test_interpreted_kernels_equal_the_oracle(monkeypatch, name, dtype):
    monkeypatch.setattr(jax, "devices", lambda: [SmallHopper()])
    interpreted = functools.partial(plgpu.kernel, interpret=plgpu.InterpretGPUParams())
    monkeypatch.setattr(hopper_kernels.plgpu, "kernel", interpreted)
    sizes = list(SIZES[name])
    sizes[2] += 256 - sum(sizes)
    x_ND, w_EDF, sizes_E, y_NF = operands(sizes, dtype)
    is_8bit = x_ND.dtype.itemsize == 1
    tiles = hopper_kernels.Tiles(block_k=128 if is_8bit else 64)
    product = functools.partial(hopper_kernels.product, sizes_E=sizes_E, tiles=tiles)
    rows_ND = product(y_NF, w_EDF, is_transposed=True)
    if is_8bit:
        out_NF = product(x_ND, jnp.swapaxes(w_EDF, 1, 2), is_transposed=True)
        matrices_EDF = hopper_kernels.matrices_8bit(x_ND.T, y_NF.T, sizes_E, tiles)
    else:
        out_NF = product(x_ND, w_EDF, is_transposed=False)
        matrices_EDF = hopper_kernels.matrices(x_ND, y_NF, sizes_E, tiles)
    expected = by_group(x_ND, w_EDF, sizes_E, y_NF)
    for found, of_oracle in zip((out_NF, rows_ND, matrices_EDF), expected, strict=True):
        assert found.dtype == jnp.bfloat16
        assert_close(found, of_oracle, 3e-3)


@hopper_only
@pytest.mark.parametrize(("num_rows", "dim", "width"), [(256, 128, 256), (1000, 256, 384), (5000, 2048, 1408)])
@pytest.mark.parametrize("name", SIZES)
def test_on_hopper_the_kernels_equal_the_oracle(name, num_rows, dim, width):
    sizes = [size * num_rows // 256 for size in SIZES[name]]
    if name != "rows left over":
        sizes[2] += num_rows - sum(sizes)
    check_forward_and_backward(operands(sizes, jnp.bfloat16, num_rows, dim, width), 1e-2, kernel="pallas_hopper")


@hopper_only
@pytest.mark.parametrize(("num_rows", "dim", "width"), [(256, 128, 256), (1024, 256, 384), (5120, 2048, 1408)])
@pytest.mark.parametrize("name", SIZES)
def test_on_hopper_the_8_bit_kernels_equal_the_oracle(name, num_rows, dim, width):
    sizes = [size * num_rows // 256 for size in SIZES[name]]
    sizes[2] += num_rows - sum(sizes)
    x_ND, w_EDF, sizes_E, y_NF = operands(sizes, jnp.float8_e4m3fn, num_rows, dim, width)
    kernels = hopper.kernels()
    found = (
        kernels.rows_8bit(x_ND, jnp.swapaxes(w_EDF, 1, 2), sizes_E),
        kernels.rows_8bit(y_NF, w_EDF, sizes_E),
        kernels.matrices_8bit(x_ND.T, y_NF.T, sizes_E),
    )
    for one, expected in zip(found, by_group(x_ND, w_EDF, sizes_E, y_NF), strict=True):
        assert_close(one, expected, 3e-3)
