"""Products of activations and weights: their values, and that they are made in one place."""

import ast
import pathlib

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtp_jax.config import ModelConfig
from mtp_jax.layers.ffn import SwiGLU
from mtp_jax.layers.linear import linear, outputs_first, sum_over_experts
from mtp_jax.layers.moe import MixtureOfExperts
from mtp_jax.layers.param import matrix

ROOT = pathlib.Path(__file__).parent.parent.parent / "mtp_jax"
PRODUCTS = {"einsum", "dot", "matmul", "tensordot", "dot_general", "ragged_dot", "vdot", "inner"}


def weight(shape, axes, in_dims, dtype="float32"):
    return matrix(nnx.Rngs(params=jax.random.key(0)), shape, axes, in_dims, ModelConfig(param_dtype=dtype))


@pytest.mark.parametrize(
    ("shape", "axes", "in_dims", "einsum"),
    [
        ((6, 5), ("embed", "ffn"), 1, "btd,df->btf"),
        ((6, 3, 4), ("embed", "heads", None), 1, "btd,dhq->bthq"),
        ((2, 3, 6), ("heads", None, "embed"), 2, "bthv,hvd->btd"),
        ((4, 6, 5), ("experts", "embed", "ffn"), 1, "btd,edf->btef"),
    ],
)
def test_the_declared_dims_are_summed(shape, axes, in_dims, einsum):
    param = weight(shape, axes, in_dims)
    summed = shape[:in_dims] if axes[0] != "experts" else shape[1:2]
    x = jax.random.normal(jax.random.key(1), (2, 7, *summed)).astype(jnp.bfloat16)
    expected = jnp.einsum(einsum, x, param[...].astype(jnp.bfloat16))
    found = linear(x, param)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, expected)
    if axes[0] == "experts":
        assert not param.get_metadata()["info"].is_linear
    else:  # with the contracted dims last
        last = outputs_first(param)
        np.testing.assert_allclose(np.float32(linear(x, last)), np.float32(expected), rtol=1e-2, atol=1e-3)
        stack = nnx.Param(jnp.stack([param[...]] * 2), info=param.get_metadata()["info"].stacked())
        moved = outputs_first(stack)
        np.testing.assert_array_equal(moved[...][1], last[...])
        assert moved.get_metadata()["info"] == last.get_metadata()["info"].stacked()


def test_outputs_of_experts_are_summed():
    param = weight((4, 5, 6), ("experts", "ffn", "embed"), 1)
    x_BTEF = jax.random.normal(jax.random.key(1), (2, 7, 4, 5))
    found = sum_over_experts(x_BTEF, param)
    np.testing.assert_array_equal(found, jnp.einsum("btef,efd->btd", x_BTEF, param[...]))


def products_of_weights(source):
    """Line numbers of `@` and of calls of jnp's or lax's products that read `self.<weight>[...]`; of any `@` at all."""
    for node in ast.walk(ast.parse(source)):
        is_matmul = isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult)
        is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in PRODUCTS
        reads = any(
            isinstance(inner, ast.Subscript) and isinstance(inner.value, ast.Attribute) for inner in ast.walk(node)
        )
        if is_matmul or (is_call and reads):
            yield node.lineno


def test_no_other_file_multiplies_by_a_weight():
    files = [*(ROOT / "layers").rglob("*.py"), *(ROOT / "mtp").rglob("*.py")]
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in files
        if path.name != "linear.py"
        for line in products_of_weights(path.read_text(encoding="utf-8"))
    ]
    assert not found, f"use mtp_jax.layers.linear: {found}"
    assert list(products_of_weights('x @ y\njnp.einsum("td,df->tf", x, self.up[...].astype(d))')) == [1, 2]


@pytest.mark.parametrize("precision", ["default", "high", "highest"])
def test_products_by_dense_weights_have_the_configured_precision(precision):
    """Read from the program, since this machine's float32 products are exact in any case."""
    config = ModelConfig(vocab_size=8, embed_dim=16, ffn_dim=24, matmul_precision=precision)
    layer = SwiGLU(24, config, nnx.Rngs(params=jax.random.key(0)))
    jaxpr = jax.make_jaxpr(layer)(jnp.ones((1, 2, 16)))
    found = [e.params["precision"] for e in jaxpr.jaxpr.eqns if e.primitive.name == "dot_general"]
    expected = None if precision == "default" else (jax.lax.Precision(precision),) * 2
    assert found == [expected] * 3


def test_products_by_dense_weights_are_in_8_bits_but_for_the_router():
    config = ModelConfig(vocab_size=8, embed_dim=16, num_experts=2, expert_dim=8, matmul_precision="fp8")
    layer = MixtureOfExperts(config, nnx.Rngs(params=jax.random.key(0)))
    jaxpr = jax.make_jaxpr(layer)(jnp.ones((1, 2, 16)), jnp.ones((1, 2), bool))
    found = [operands for operands in dots(jaxpr.jaxpr)]
    assert found.count(("float32", "float32")) == 1  # the router
    assert found.count(("float8_e4m3fn", "float8_e4m3fn")) == len(found) - 1 == 6  # routed and shared experts


def dots(jaxpr):
    """Yields the dtypes of the operands of every dot_general, those in inner programs too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield tuple(v.aval.dtype.name for v in eqn.invars)
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from dots(inner)
