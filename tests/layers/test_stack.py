"""Stacks of modules: what their weights declare, and that a layer of a stack is the layer alone."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mtp_jax.config import ModelConfig
from mtp_jax.layers.ffn import SwiGLU
from mtp_jax.layers.param import ParamInfo
from mtp_jax.layers.stack import scan_over, stacked, unstacked
from mtp_jax.sharding import LOGICAL_AXES, spec

CONFIG = ModelConfig(embed_dim=8, ffn_dim=12, remat="full")


def params(module):
    return [x for x in jax.tree.leaves(module, is_leaf=lambda x: isinstance(x, nnx.Param)) if isinstance(x, nnx.Param)]


def assert_declared(module, leading):
    for weight in params(module):
        info = weight.get_metadata()["info"]
        assert len(info.axes) == weight.ndim
        assert (info.axes[0] == "layers") == leading and "layers" not in info.axes[1:]


def test_the_stacked_dim_is_an_axis_inside_and_outside_the_scan():
    module = stacked(lambda rngs: SwiGLU(12, CONFIG, rngs), 3, nnx.Rngs(params=jax.random.key(0)))
    assert_declared(module, leading=True)
    layers = unstacked(module)
    assert len(layers) == 3 and len(params(layers[0])) == 3
    x_BTD = jax.random.normal(jax.random.key(1), (2, 4, 8))

    def body(layer, x_BTD, _):
        assert_declared(layer, leading=False)
        return layer(x_BTD), None

    found, _ = scan_over(module, body, x_BTD, None, CONFIG)
    for layer in layers:
        assert_declared(layer, leading=False)
        x_BTD = layer(x_BTD)
    np.testing.assert_allclose(found, x_BTD, rtol=1e-5)
    first = stacked(lambda rngs: SwiGLU(12, CONFIG, rngs), 1, nnx.Rngs(params=jax.random.key(0)))
    scan_over(first, body, jnp.ones((2, 4, 8)), jnp.arange(3), CONFIG, is_shared=True)


def test_a_mesh_axis_may_shard_the_layers(monkeypatch):
    info = ParamInfo(("embed", "ffn"), (-2,), (-1,)).stacked()
    assert spec(info.axes)[0] is None
    monkeypatch.setitem(LOGICAL_AXES, "layers", ("data",))
    assert spec(info.axes) == jax.sharding.PartitionSpec("data", ("fsdp", "expert"), ("tensor",))
