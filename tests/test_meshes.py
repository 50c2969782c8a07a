"""Any mesh equals one device: five steps over meshes that shard weights, experts, sequences and heads.

The data axis is in test_sharding.py and test_mistakes.py.
"""

import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from mtp_jax.config import MeshConfig
from mtp_jax.sharding import make_mesh
from mtp_jax.training.step import make_trainer
from tests.test_mistakes import rows, tiny

MIXED = [{"fsdp": 2, "expert": 2, "context": 2}, {"expert": 2, "context": 2, "tensor": 2}]
CASES = [("sequential", mesh) for mesh in ({"context": 8}, *MIXED)]
CASES += [("parallel", MIXED[0]), ("window", MIXED[1])]
NUM_STEPS = 5
# The rest counts tokens: one whose two best experts or words are a rounding apart may go to the other.
CONTINUOUS = ("loss", "grad_norm", "learning_rate", "mtp_lambda")


def small(kind):
    """configs/tiny.py with the fewest layers every kind can have, all of them with experts: less to compile.

    "gqa" is sequential modules with grouped-query attention, "window" the same with a sliding window and sinks in every
    other layer and in the modules, and with experts that have biases.
    """
    more = {"model.local.window": 5, "model.local.pattern": "LG", "model.local.num_kv_heads": 2, "mtp.window": 5}
    more |= dict.fromkeys(("model.local.sinks", "model.expert_bias", "model.router.logit_bias"), True)
    more = more if kind == "window" else {}
    kind, attention = ("sequential", "gqa") if kind in ("gqa", "window") else (kind, "mla")
    config = tiny(
        *(f"--config.mtp.kind={kind}", "--config.mtp.parameter_matched=false", "--config.data.sequence_length=32"),
        *(f"--config.model.attention={attention}", "--config.model.num_layers=2", "--config.model.num_dense_layers=0"),
        *(f"--config.{key}={value}" for key, value in more.items()),
    )
    return replace(config, mesh=MeshConfig(data=1))


def train(config, batches, state=None):
    """(state before, state after, metrics of each step) on all devices of the config's mesh, from `state` if given."""
    mesh = make_mesh(config.mesh, jax.devices()[: math.prod(vars(config.mesh).values())])
    with jax.set_mesh(mesh):
        trainer = make_trainer(config, mesh)
        first = trainer.init() if state is None else jax.device_put(state, _shardings(trainer))
        first, state, out = jax.device_get(first), first, []
        for batch in batches:
            state, metrics = trainer.step(state, jax.device_put(batch, trainer.batch_sharding))
            out.append(metrics)
        return first, jax.device_get(state), jax.device_get(out)


def _shardings(trainer):
    return jax.tree.map(lambda leaf: leaf.sharding, trainer.abstract_state)


@pytest.fixture(scope="module")
def one_device():
    """Kind -> (config, batches, initial state, final state, metrics) on one device."""
    cache = {}

    def get(kind):
        if kind not in cache:
            config = small(kind)
            batches = [rows(config, seed, num_padding=2) for seed in range(NUM_STEPS)]
            cache[kind] = (config, batches, *train(config, batches))
        return cache[kind]

    return get


@pytest.mark.parametrize(("kind", "sizes"), CASES, ids=lambda x: x if isinstance(x, str) else "_".join(x))
def test_steps_on_a_mesh_of_eight_equal_one_device(one_device, kind, sizes):
    """Mistake 3: a roll on a shard of the sequence; packed documents cross the shards' borders here."""
    config, batches, first, last, expected = one_device(kind)
    mesh = MeshConfig(**{"data": 1, **sizes})
    _, state, metrics = train(replace(config, mesh=mesh), batches, first)
    for step, (a, b) in enumerate(zip(expected, metrics, strict=True)):
        for name in (name for name in a if name.startswith(CONTINUOUS)):
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-7), (step, name)
    assert min(np.abs(bias).max() for bias in jax.tree.leaves(last["biases"])) > 0.009  # they have moved
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-7), last["biases"], state["biases"])


def test_a_mesh_starts_from_the_same_weights(one_device):
    config, _, first, *_ = one_device("sequential")
    started, *_ = train(replace(config, mesh=MeshConfig(data=1, fsdp=2, expert=2, tensor=2)), [])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-7), first, started)
