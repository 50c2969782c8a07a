"""The grouped matmul's kernels for TPUs, as plain jax on a CPU: against each group alone, and the rule that chooses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.config import UserError
from mtp_jax.errors import warn_once
from mtp_jax.kernels import grouped_matmul as grouped
from mtp_jax.kernels.device import pretend
from mtp_jax.kernels.grouped_matmul import megablox
from tests.kernels.test_grouped import SIZES, check_forward_and_backward, forward_and_backward, operands


@pytest.fixture
def as_on_tpu(monkeypatch):
    """The point of dispatch takes this machine for a TPU; the kernels run as plain jax, in tiles of 128."""
    monkeypatch.setattr(grouped, "NATIVE_SINCE", (99,))
    monkeypatch.setattr(megablox, "ROWS", 128)
    monkeypatch.setattr(megablox, "COLUMNS", 128)
    megablox.kernels.cache_clear()
    for name in ("product", "matrices"):
        interpreted = functools.partial(getattr(megablox, name), interpret=True)
        monkeypatch.setattr(megablox, name, interpreted)
    forward_and_backward.clear_cache()
    with pretend("tpu"):
        yield
    megablox.kernels.cache_clear()
    forward_and_backward.clear_cache()


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_values_and_gradients_are_those_of_each_row(as_on_tpu, sizes):
    check_forward_and_backward(operands(sizes, jnp.float32, dim=256, width=320), 1e-6)


def test_rows_that_fill_no_tile_in_bfloat16(as_on_tpu):
    check_forward_and_backward(operands([10, 120, 0, 70], jnp.bfloat16, num_rows=210, dim=128, width=40), 1e-2)


def test_a_batch_of_products_is_done_one_by_one(as_on_tpu):
    x_ND, w_EDF, sizes_E, _ = operands(SIZES["uneven"], jnp.float32, dim=24, width=40)
    found = jax.vmap(lambda w_EDF: grouped.grouped_matmul(x_ND, w_EDF, sizes_E))(jnp.stack([w_EDF, 2 * w_EDF]))
    np.testing.assert_allclose(found[1], 2 * found[0], rtol=1e-6)


REFUSED = {
    "another dtype": ({"dtype": jnp.float16}, "float16"),
    "few rows": ({"num_rows": 64}, "at least 128 rows"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_inputs_of_megablox_go_to_ragged_dot_with_one_notice(as_on_tpu, capsys, name):
    changes, reason = REFUSED[name]
    warn_once.cache_clear()
    arguments = {"sizes": [10, 20, 30, 4], "dtype": jnp.float32, "dim": 24, "width": 40} | changes
    x_ND, w_EDF, sizes_E, _ = operands(**arguments)
    for _ in range(2):
        found = grouped.grouped_matmul(x_ND, w_EDF, sizes_E)
        np.testing.assert_array_equal(found, jax.lax.ragged_dot(x_ND, w_EDF, sizes_E))
    said = capsys.readouterr().err.splitlines()
    if name == "few rows":  # decoding, which is no slower for it
        assert not said
    else:
        assert len(said) == 1 and reason in said[0]
    with pytest.raises(UserError, match=f"model.expert_kernel=megablox: .*{reason}"):
        grouped.grouped_matmul(x_ND, w_EDF, sizes_E, "megablox")


def test_megablox_is_for_tpus():
    x_ND, w_EDF, sizes_E, _ = operands(SIZES["even"], jnp.float32)
    with pytest.raises(UserError, match="model.expert_kernel=megablox: .* and this is cpu"):
        grouped.grouped_matmul(x_ND, w_EDF, sizes_E, "megablox")


@pytest.mark.parametrize(
    ("kernel", "native_since", "is_megablox"),
    [("auto", (99,), True), ("auto", (0, 1), False), ("megablox", (0, 1), True), ("xla", (99,), False)],
)
def test_a_tpu_takes_it_where_ragged_dot_is_dense(as_on_tpu, monkeypatch, capsys, kernel, native_since, is_megablox):
    monkeypatch.setattr(grouped, "NATIVE_SINCE", native_since)
    x_ND, w_EDF, sizes_E, _ = operands(SIZES["even"], jnp.float32)
    text = str(jax.make_jaxpr(lambda x, w: grouped.grouped_matmul(x, w, sizes_E, kernel))(x_ND, w_EDF))
    assert ("pallas_call" in text) == is_megablox and ("ragged_dot_general" in text) != is_megablox
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("shape", "itemsize", "tiles"),
    [
        ((98304, 2048, 1408), 2, (512, 1024, 768)),
        ((163840, 7168, 2048), 2, (512, 1024, 1024)),
        ((1280, 24, 1408), 4, (256, 24, 512)),
    ],
)
def test_tiles_share_columns_evenly_and_divide_the_rows(shape, itemsize, tiles):
    assert megablox._tiles(*shape, itemsize) == tiles
