"""One model, any mesh: the same losses, gradient norms and router biases as on one device."""

import itertools
from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mtp_jax.config import MeshConfig, UserError, load_config, mesh_sizes
from mtp_jax.model import abstract_model, validate
from mtp_jax.sharding import LOGICAL_AXES, make_mesh, weight_spec
from mtp_jax.training.step import make_trainer
from tests.test_mistakes import rows, run_steps, tiny


@pytest.fixture(scope="module")
def one_device():
    """Kind -> (config, batches, final state, metrics) on one device."""
    cache = {}

    def get(kind):
        if kind not in cache:
            config = tiny(f"--config.mtp.kind={kind}", "--config.mtp.depth=1")
            batches = [rows(config, seed, num_padding=2) for seed in range(3)]
            cache[kind] = (config, batches, *run_steps(config, batches))
        return cache[kind]

    return get


@pytest.mark.parametrize("sizes", [{"data": 4, "tensor": 2}], ids="_".join)
def test_grouped_experts_stay_with_their_tokens(one_device, sizes):
    """moe_dispatch="ragged" gives the same losses on a mesh, and no device holds every device's tokens."""
    config, batches, _, expected = one_device("sequential")
    ragged = replace(
        config, model=replace(config.model, moe_dispatch="ragged"), mesh=MeshConfig(**{"data": 1, **sizes})
    )
    _, metrics = run_steps(ragged, batches, num_devices=8)
    for a, b in zip(expected, metrics, strict=True):
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-7), name
    mesh = make_mesh(ragged.mesh, jax.devices()[:8])
    with jax.set_mesh(mesh):
        trainer = make_trainer(ragged, mesh)
        batch = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in batches[0].items()}
        text = trainer.step.lower(trainer.abstract_state, batch).compile().as_text()
    # What was sent to an expert is as long as the tokens times the experts each has chosen.
    routed = config.data.batch_size * config.data.sequence_length * config.model.num_experts_per_token
    shards = int(np.prod([n for axis, n in sizes.items() if axis != "tensor"]))
    sorts = [line for line in text.splitlines() if " sort(" in line]
    assert any(f"s32[{routed // shards}]" in line for line in sorts)
    assert not any(f"s32[{routed}]" in line for line in sorts)


def test_weights_and_moments_are_really_sharded():
    config = replace(tiny(), mesh=MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    mesh = make_mesh(config.mesh, jax.devices()[:8])
    abstract = make_trainer(config, mesh).abstract_state
    gate = abstract["params"]["trunk"]["blocks"]["ffn"]["gate"]  # [layers, experts, embed, ffn]
    layers, experts, dim, width = gate.shape
    assert gate.sharding.shard_shape(gate.shape) == (layers, experts // 4, dim, width // 2)
    by_shape = {}
    for leaf in jax.tree.leaves(abstract["opt_state"]):
        by_shape.setdefault(leaf.shape, set()).add(leaf.sharding.shard_shape(leaf.shape))
    assert by_shape[gate.shape] == {gate.sharding.shard_shape(gate.shape)}


def test_weights_outside_the_experts_are_sharded_by_the_expert_axis_too():
    """Else each device of that axis would hold its own copy of them and of their moments."""
    config = replace(tiny(), mesh=MeshConfig(data=1, fsdp=2, expert=4))
    mesh = make_mesh(config.mesh, jax.devices()[:8])
    blocks = make_trainer(config, mesh).abstract_state["params"]["trunk"]["blocks"]
    for leaf, parts in ((blocks["ffn"]["gate"], 8), (blocks["attention"]["kv_a"], 8)):
        assert np.prod(leaf.sharding.shard_shape(leaf.shape)) * parts == leaf.size


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("experts", "embed", "ffn"), (8, 64, 32), (("expert", "fsdp"), None, "tensor")),
        (("layers", "experts", "ffn", "embed"), (4, 8, 32, 64), (None, ("expert", "fsdp"), "tensor", None)),
        (("experts", "embed", "ffn"), (6, 64, 32), ("expert", "fsdp", "tensor")),  # 4 does not divide 6 experts
        (("ffn", "embed"), (32, 64), (("tensor", "fsdp", "expert"), None)),
        (("heads", None, "embed"), (4, 16, 64), ("tensor", None, ("fsdp", "expert"))),  # 8 does not divide 4 heads
        (("embed", "heads", None), (64, 4, 24), (("fsdp", "expert"), "tensor", None)),
        (("vocab", "embed"), (96, 64), ("tensor", ("fsdp", "expert"))),
        (("ffn",), (32,), ("tensor",)),
    ],
)
def test_weights_are_sharded_along_the_first_dim_that_divides(axes, shape, expected):
    sizes = {"data": 1, "fsdp": 2, "expert": 2, "context": 1, "tensor": 2}
    assert weight_spec(axes, shape, sizes) == PartitionSpec(*expected)


def test_every_logical_axis_goes_to_axes_of_the_mesh():
    axes = set(mesh_sizes(MeshConfig(), 1))
    assert all(set(mapped) <= axes for mapped in LOGICAL_AXES.values())


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(data=-1, fsdp=-1), "only one axis may be -1"),
        (MeshConfig(data=3), "takes 3 devices, there are 8"),
        (MeshConfig(data=-1, fsdp=3), "takes 3 devices, there are 8"),
        (MeshConfig(data=0), "mesh.data=0: an axis is at least 1"),
    ],
)
def test_meshes_that_cannot_be(mesh, message):
    with pytest.raises(UserError, match=message):
        mesh_sizes(mesh, 8)


AXES = ("data", "fsdp", "expert", "context", "tensor")
MESHES_OF_8 = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=5) if np.prod(sizes) == 8]
ODD_SIZES = [
    ["model.kv_lora_rank=36"],
    ["model.q_lora_rank=20"],
    ["model.embed_dim=68"],
    ["model.expert_dim=38"],
    ["model.ffn_dim=46"],
    ["model.vocab_size=46"],
    ["model.num_experts=12"],
    ["model.num_heads=6"],
    ["model.attention=gqa", "model.num_kv_heads=2"],
    ["data.sequence_length=12"],
    ["data.batch_size=12"],
]


@pytest.mark.parametrize("keys", ODD_SIZES, ids=" ".join)
def test_a_mesh_is_refused_in_one_line_or_shards_everything_evenly(keys):
    config = tiny(*(f"--config.{key}" for key in keys))
    built, refused = abstract_model(config.architecture), 0
    for sizes in MESHES_OF_8:
        mesh = MeshConfig(**dict(zip(AXES, sizes, strict=True)))
        try:
            validate(replace(config, mesh=mesh), 8)
        except UserError as error:
            assert "\n" not in str(error) and "mesh" in str(error)
            refused += keys[-1].split("=")[0] in str(error)
            continue
        params, _ = built.shardings(make_mesh(mesh, jax.devices()[:8]))
        jax.tree.map(lambda place, leaf: place.shard_shape(leaf.shape), params, built.params)
    assert 0 < refused < len(MESHES_OF_8)


def test_minus_one_is_the_rest():
    assert mesh_sizes(MeshConfig(data=-1, fsdp=2), 8)["data"] == 4
    config = load_config("configs/tiny.py")
    assert mesh_sizes(config.mesh, 8)["data"] == 8
