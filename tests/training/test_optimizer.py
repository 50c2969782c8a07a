"""The rule of each weight, Muon on stacks, and the placement of optimizer state."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from mtp_jax.config import MuonConfig, OptimizerConfig
from mtp_jax.layers.param import ParamInfo
from mtp_jax.training import optimizer
from tests.conftest import PATIENT_FLAGS, QUICK_FLAGS

INFOS = {
    "embedding": {"table": ParamInfo(("vocab", "embed"))},
    "unembed": {"kernel": ParamInfo(("embed", "vocab"), (-2,), (-1,))},
    "blocks": {
        "norm": {"scale": ParamInfo(("embed",))},
        "query": {"kernel": ParamInfo(("embed", "heads", None), (-3,), (-2, -1))},
        "out": {"kernel": ParamInfo(("heads", None, "embed"), (-3, -2), (-1,))},
        "router": {"kernel": ParamInfo(("embed", "router"), (-2,), (-1,))},
        "experts": {"up": ParamInfo(("experts", "embed", "ffn"), (-2,), (-1,))},
    },
}
SHAPES = {  # 3 layers stacked
    "embedding": {"table": (10, 8)},
    "unembed": {"kernel": (8, 10)},
    "blocks": {
        "norm": {"scale": (3, 8)},
        "query": {"kernel": (3, 8, 2, 5)},
        "out": {"kernel": (3, 2, 5, 8)},
        "router": {"kernel": (3, 8, 4)},
        "experts": {"up": (3, 4, 8, 6)},
    },
}


def _random(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda shape: jnp.asarray(rng.normal(size=shape), dtype), SHAPES, is_leaf=is_shape)


def _config(**kwargs):
    return OptimizerConfig(
        **{"schedule": "constant", "warmup_steps": 0, "learning_rate": 0.1, "clip_norm": 0.0, **kwargs}
    )


def _update(config, params, grads, infos=INFOS):
    tx = optimizer.build(config, 100, infos)
    return jax.jit(tx.update)(grads, tx.init(params), params)[0]


def _is_info(x):
    return isinstance(x, ParamInfo)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_decay_reaches_matrices_only(name):
    """Stacked norm scales have two dims and are still vectors."""
    params, zero = _random(0), jax.tree.map(jnp.zeros_like, _random(0))
    updates = _update(_config(name=name, weight_decay=0.5), params, zero)
    expected = jax.tree.map(lambda i, p: -0.1 * 0.5 * p * i.is_matrix, INFOS, params, is_leaf=_is_info)
    jax.tree.map(lambda u, e: np.testing.assert_allclose(u, e, rtol=1e-5, atol=1e-7), updates, expected)


def test_adamw_equals_optax_adamw():
    params, grads = _random(0), _random(1)
    mask = jax.tree.map(lambda i: i.is_matrix, INFOS, is_leaf=_is_info)
    config = _config(clip_norm=1.0, schedule="cosine", warmup_steps=2)
    ours = optimizer.build(config, 10, INFOS)
    theirs = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optimizer.schedules.learning_rate(config, 10), 0.9, 0.95, 1e-8, weight_decay=0.1, mask=mask),
    )
    results = []
    for tx in (ours, theirs):
        p, state = params, tx.init(params)
        for i in range(4):
            updates, state = jax.jit(tx.update)(jax.tree.map(lambda g: g * (i + 1), grads), state, p)  # noqa: B023
            p = optax.apply_updates(p, updates)
        results.append(p)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), *results)


def test_muon_takes_matrices_and_leaves_the_rest_to_adam():
    labels = jax.tree.map(lambda i: optimizer.label(_config(name="muon"), i), INFOS, is_leaf=_is_info)
    assert labels == {
        "embedding": {"table": "adam"},
        "unembed": {"kernel": "adam_decayed"},
        "blocks": {
            "norm": {"scale": "adam"},
            "query": {"kernel": "muon"},
            "out": {"kernel": "muon"},
            "router": {"kernel": "adam_decayed"},
            "experts": {"up": "muon"},
        },
    }


@pytest.mark.parametrize("path, rows", [(("experts", "up"), 8), (("query", "kernel"), 8), (("out", "kernel"), 10)])
def test_muon_on_a_stack_equals_muon_on_each_matrix(path, rows):
    """The oracle is optax's own muon on one 2D matrix at a time."""
    params, grads = _random(0), _random(1)
    updates = _update(_config(name="muon", weight_decay=0.1), params, grads)["blocks"][path[0]][path[1]]
    param, grad = (np.asarray(t["blocks"][path[0]][path[1]]) for t in (params, grads))
    alone = optax.contrib.muon(0.1, beta=0.95, weight_decay=0.1, consistent_rms=0.2)
    update_2d = jax.jit(lambda g, p: alone.update(g, alone.init(p), p)[0])
    lead = param.ndim - (2 if path[0] == "experts" else 3)
    for index in np.ndindex(param.shape[:lead]):
        expected = update_2d(grad[index].reshape(rows, -1), param[index].reshape(rows, -1))
        np.testing.assert_allclose(np.asarray(updates[index]).reshape(rows, -1), expected, rtol=1e-3, atol=1e-4)


def test_muon_updates_have_the_rms_of_adam():
    updates = _update(_config(name="muon", weight_decay=0.0, learning_rate=1.0), _random(0), _random(1))
    for name in ("query", "out"):
        assert 0.12 < float(jnp.sqrt(jnp.mean(updates["blocks"][name]["kernel"] ** 2))) < 0.26


@pytest.mark.parametrize(("precision", "is_rounded"), [("default", False), ("bfloat16", True)])
def test_products_of_muon_have_the_configured_precision(precision, is_rounded):
    """CPUs compute in float32 in both cases, so the lowered program is compared."""
    tx = optimizer.build(_config(name="muon", muon=MuonConfig(matmul_precision=precision)), 100, INFOS)
    params = _random(0)
    program = jax.jit(tx.update).lower(_random(1), tx.init(params), params).as_text()
    dots = [line for line in program.splitlines() if "stablehlo.dot_general" in line]
    assert len(dots) >= 3  # those of an iteration
    assert all(("lhs_precision_type = bf16" in line) == is_rounded for line in dots)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_tied_embedding_is_updated_once_by_the_embedding_rule(name):
    """Megatron-LM #4641: the tied weight must not also be treated as an output matrix."""
    infos, params, grads = ({"embedding": t["embedding"]} for t in (INFOS, _random(0), _random(1)))
    updates = _update(_config(name=name, weight_decay=0.5), params, grads, infos)
    adam = optax.adam(0.1, 0.9, 0.95, 1e-8)
    expected = adam.update(grads, adam.init(params))[0]
    np.testing.assert_allclose(updates["embedding"]["table"], expected["embedding"]["table"], rtol=1e-5)
    state = optimizer.build(_config(name=name), 100, infos).init(params)
    assert sum(leaf.shape == (10, 8) for leaf in jax.tree.leaves(state)) == 2  # one first and one second moment


@pytest.mark.parametrize("dtype", ["bfloat16", "bfloat16_stochastic"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_are_kept_in_the_moment_dtype(name, dtype):
    config = _config(name=name, moment_dtype=dtype)
    tx = optimizer.build(config, 100, INFOS)
    state = tx.init(_random(0))
    _, after = jax.jit(tx.update)(_random(1), state, _random(0))
    for tree in (state, after):
        large = [leaf for leaf in jax.tree.leaves(tree) if leaf.size > 3]
        assert len(large) == (14 if name == "adamw" else 11)
        assert all(leaf.dtype == jnp.bfloat16 for leaf in large)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.dtype, b.dtype), state, after)


def test_bfloat16_weights_get_float32_moments():
    state = optimizer.build(_config(), 100, INFOS).init(_random(0, jnp.bfloat16))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state) if leaf.ndim)


def test_clip_is_by_the_global_norm():
    grads = jax.tree.map(lambda p: 100 * p, _random(1))
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    kwargs = {"eps": 1.0, "weight_decay": 0.0}  # a large eps keeps Adam from hiding the scale
    updates = _update(_config(clip_norm=1.0, **kwargs), _random(0), grads)
    expected = _update(_config(**kwargs), _random(0), jax.tree.map(lambda g: g / norm, grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-8), updates, expected)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_quadratic_converges(name):
    target = _random(1)
    rate = {"adamw": 0.1, "muon": 0.3}[name]  # a Muon step covers 0.2 sqrt(max(fans)) of it along each singular vector
    config = _config(name=name, learning_rate=rate, schedule="cosine", final_fraction=0.0, weight_decay=0.0)
    tx = optimizer.build(config, 200, INFOS)

    def loss(p):
        return sum(jnp.sum((a - b) ** 2) for a, b in zip(jax.tree.leaves(p), jax.tree.leaves(target), strict=True))

    def step(carry, _):
        p, state = carry
        updates, state = tx.update(jax.grad(loss)(p), state, p)
        return (optax.apply_updates(p, updates), state), None

    params = _random(0)
    (after, _), _ = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=200))(params)
    assert float(loss(after)) < 1e-3 * float(loss(params))


PLACEMENT = """
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    from mtp_jax.training import optimizer
    from tests.training.test_optimizer import INFOS, _config, _random

    assert jax.device_count() == 8
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
    replicated = NamedSharding(mesh, P())
    params = _random(0)
    specs = jax.tree.map(lambda p: NamedSharding(mesh, P()), params)
    specs["blocks"]["query"]["kernel"] = NamedSharding(mesh, P(None, "fsdp", "tensor"))
    specs["blocks"]["experts"]["up"] = NamedSharding(mesh, P(None, "fsdp", None, "tensor"))
    specs["embedding"]["table"] = NamedSharding(mesh, P("tensor", "fsdp"))
    for name in ("adamw", "muon"):
        tx = optimizer.build(_config(name=name), 100, INFOS)
        shardings = optimizer.state_shardings(tx, jax.eval_shape(lambda: params), specs, replicated)
        placed = jax.device_put(params, specs)
        state = jax.jit(tx.init, out_shardings=shardings)(placed)
        assert jax.tree.structure(state) == jax.tree.structure(shardings)
        by_shape = {p.shape: s for p, s in zip(jax.tree.leaves(params), jax.tree.leaves(specs))}
        sharded = 0
        for leaf in jax.tree.leaves(state):
            expected = by_shape.get(leaf.shape, replicated)
            assert leaf.sharding.is_equivalent_to(expected, leaf.ndim), (name, leaf.shape, leaf.sharding)
            sharded += not leaf.sharding.is_fully_replicated
        assert sharded == (6 if name == "adamw" else 4), sharded
        update = jax.jit(tx.update, out_shardings=(specs, shardings))
        updates, _ = update(jax.device_put(_random(1), specs), state, placed)
        alone, _ = jax.jit(tx.update)(_random(1), tx.init(params), params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), updates, alone)
    print("placed")
"""


def test_state_is_placed_with_its_weights_on_eight_devices():
    flags = f"{QUICK_FLAGS} {PATIENT_FLAGS} --xla_force_host_platform_device_count=8"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-c", textwrap.dedent(PLACEMENT)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout == "placed\n", done.stderr[-3000:]
