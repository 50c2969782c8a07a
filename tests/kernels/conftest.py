"""Stand-ins for the device that this machine need not have, and for its kernels."""

import jax.numpy as jnp
import pytest

from mtp_jax.kernels.device import pretend
from mtp_jax.kernels.grouped_matmul import hopper, hopper_kernels


@pytest.fixture
def as_on_hopper():
    """Backends are selected as on a Hopper GPU."""
    with pretend("gpu", "9.0"):
        yield


def one_hot(sizes_E, num_rows):
    ends_E = jnp.cumsum(sizes_E)
    index_N1 = jnp.arange(num_rows)[:, None]
    return ((index_N1 < ends_E) & (index_N1 >= ends_E - sizes_E)).astype(jnp.float32)


def stand_in_product(x_ND, w_EDF, sizes_E, tiles, is_transposed):
    """Our kernel in plain jnp; what it would not write is NaN, and what it would not take is an error."""
    assert not x_ND.shape[1] % tiles.block_k and (is_transposed or x_ND.dtype.itemsize > 1)
    member_NE = one_hot(sizes_E, len(x_ND))
    w_EDF = jnp.swapaxes(w_EDF, 1, 2) if is_transposed else w_EDF
    out = jnp.einsum("nd,edf,ne->nf", x_ND.astype(jnp.float32), w_EDF.astype(jnp.float32), member_NE)
    return jnp.where(member_NE.any(1)[:, None], out, jnp.nan).astype(result_dtype(x_ND.dtype))


def result_dtype(dtype):
    return jnp.bfloat16 if dtype.itemsize == 1 else dtype


def stand_in_matrices(x_ND, y_NF, sizes_E, tiles):
    assert not y_NF.shape[1] % tiles.block_n
    return jnp.einsum("nd,nf,ne->edf", x_ND, y_NF, one_hot(sizes_E, len(x_ND))).astype(x_ND.dtype)


def stand_in_matrices_8bit(x_DN, y_FN, sizes_E, tiles):
    assert x_DN.dtype.itemsize == y_FN.dtype.itemsize == 1 and not x_DN.shape[1] % 128
    x_ND, y_NF = x_DN.T.astype(jnp.float32), y_FN.T.astype(jnp.float32)
    return stand_in_matrices(x_ND, y_NF, sizes_E, tiles).astype(jnp.bfloat16)


@pytest.fixture
def stand_ins(monkeypatch, as_on_hopper):
    """The dispatch as on Hopper, over stand-ins that take what the kernels take."""
    monkeypatch.setattr(hopper_kernels, "product", stand_in_product)
    monkeypatch.setattr(hopper_kernels, "matrices", stand_in_matrices)
    monkeypatch.setattr(hopper_kernels, "matrices_8bit", stand_in_matrices_8bit)
    hopper.kernels.cache_clear()
    yield
    hopper.kernels.cache_clear()
