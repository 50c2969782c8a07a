"""Contents of each axis's collectives in compiled steps: tokens, not experts; latents, not heads; never logits."""

import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from mtp_jax.config import MeshConfig
from mtp_jax.mtp import kind_of
from mtp_jax.sharding import make_mesh
from mtp_jax.training.step import make_trainer
from tests import hlo
from tests.test_mistakes import tiny

# Sizes that tell arrays apart: no two below are equal, nor products of two others.
SIZES = {
    "model.num_layers": 2,
    "model.num_dense_layers": 0,
    "model.embed_dim": 80,
    "model.num_heads": 4,
    "model.q_lora_rank": 0,
    "model.kv_lora_rank": 24,
    "model.qk_nope_head_dim": 18,
    "model.qk_rope_head_dim": 6,
    "model.v_head_dim": 22,
    "model.expert_dim": 56,
    "model.vocab_size": 1048,
    "model.remat": "full",
    "mtp.depth": 1,
    "data.sequence_length": 64,
    "data.batch_size": 8,
    "training.loss_chunk": 32,
}


def crossing(sizes, *overrides):
    """(config, collectives) of the compiled training step over a mesh of `sizes`, sequential MTP of one depth."""
    keys = [f"--config.{key}={value}" for key, value in SIZES.items()]
    config = replace(tiny(*keys, *overrides), mesh=MeshConfig(**{"data": 1, **sizes}))
    mesh = make_mesh(config.mesh, jax.devices()[: math.prod(sizes.values())])
    with jax.set_mesh(mesh):
        trainer = make_trainer(config, mesh)
        shape = (config.data.batch_size, config.data.sequence_length + 1 + kind_of(config).depth)
        row = jax.ShapeDtypeStruct(shape, np.int32, sharding=trainer.batch_sharding)
        batch = dict.fromkeys(("tokens", "segment_ids", "positions"), row)
        text = trainer.step.lower(trainer.abstract_state, batch).compile().as_text()
    return config, hlo.collectives(text, mesh)


def expert_weights(collectives, config):
    """Collectives that bring together weights of several experts over the expert axis."""
    dim, width = config.model.embed_dim, config.model.expert_dim
    return [
        c
        for c in collectives
        if c.op in ("all-gather", "all-reduce") and "expert" in c.axes
        for shape in c.floats
        if len(shape) >= 3 and sorted(shape[-2:]) == sorted((dim, width)) and math.prod(shape[:-2]) > 1
    ]


def test_tokens_travel_to_their_experts_and_weights_stay():
    config, found = crossing({"fsdp": 2, "expert": 2, "tensor": 2})
    dim = config.model.embed_dim
    tokens = [c for c in found if c.op == "all-to-all" and c.axes == {"expert"} and any(s[-1] == dim for s in c.floats)]
    assert len(tokens) >= 4  # there and back, forward and backward
    assert not expert_weights(found, config)


def test_the_reader_finds_expert_weights_that_are_collected():
    """The dense dispatch keeps rows instead: it gathers them over the expert axis, and has no exchange of tokens."""
    config, found = crossing({"expert": 4}, "--config.model.moe_dispatch=dense")
    rows = config.data.batch_size, config.data.sequence_length, config.model.embed_dim
    assert any(c.op == "all-gather" and "expert" in c.axes and rows in c.floats for c in found)
    gathered = hlo.Collective("all-gather", [("f32", (8, rows[2], config.model.expert_dim))], frozenset({"expert"}))
    assert expert_weights([gathered], config)


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "expert": 2}, {"fsdp": 2, "tensor": 2}], ids="_".join)
def test_weights_are_gathered_by_concatenation(sizes):
    """Over a leading dim and in row-major order: shards of another dim are transposed before and after."""
    config, found = crossing(sizes, "--config.model.moe_dispatch=ragged")
    gathered = [c for c in found if c.op == "all-gather" and "fsdp" in c.axes and c.floats]
    model = config.model
    shapes = {shape for c in gathered for shape in c.floats}
    experts, width = model.num_experts // sizes.get("expert", 1), model.expert_dim // sizes.get("tensor", 1)
    assert {(experts, model.embed_dim, width), (experts, width, model.embed_dim)} <= shapes
    assert not [c for c in gathered if not c.is_contiguous]
    moved = {shape for c in found if "all-to-all" in c.op for shape in c.floats}
    assert all(config.data.sequence_length in shape or shape[-1] == model.embed_dim for shape in moved), moved


def test_the_loss_never_gathers_logits():
    """With the vocabulary sharded over `tensor`, one number per token crosses that axis."""
    config, found = crossing({"fsdp": 2, "tensor": 4})
    vocab = config.model.vocab_size
    assert not [c for c in found if "tensor" in c.axes for shape in c.floats if vocab in shape]
    # Logits are there, a quarter of the vocabulary a device; were one gathered, this is what it would look like.
    assert all(vocab not in shape[-1:] for c in found for shape in c.floats if len(shape) == 3)


@pytest.mark.parametrize("attention", ["mla", "gqa"])
def test_latents_and_not_heads_cross_the_context_axis(attention):
    """Of the decoder and of every MTP depth, forward and backward."""
    overrides = ["--config.model.attention=gqa", "--config.model.num_kv_heads=2", "--config.model.head_dim=18"]
    config, found = crossing({"context": 4}, *(overrides if attention == "gqa" else []))
    model, rows = config.model, (config.data.batch_size, config.data.sequence_length)
    gathered = {shape for c in found if c.op == "all-gather" and "context" in c.axes for shape in c.floats}
    if attention == "mla":
        assert gathered == {(*rows, model.kv_lora_rank), (*rows, model.qk_rope_head_dim)}
    else:
        assert gathered == {(*rows, model.num_kv_heads, model.head_dim)}  # the groups of keys and values, no query
    per_device = (rows[0], rows[1] // 4)
    scattered = {shape for c in found if c.op == "reduce-scatter" and "context" in c.axes for shape in c.floats}
    assert scattered == {(*per_device, *shape[2:]) for shape in gathered}
    heads = (model.num_heads, model.num_heads * model.qk_nope_head_dim)
    moved = {s for c in found if c.op in ("all-to-all", "collective-permute") for s in c.floats}
    assert not [shape for shape in moved if set(shape) & set(heads)], moved  # no roll, no halo


LISTED = "%a = f32[4,8]{1,0} all-gather(%b), replica_groups={{0,2},{1,3},{4,6},{5,7}}, dimensions={0}"
COUNTED = "%a = (f32[4]{0}, s32[]) all-reduce(%b, %c), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add"
NAMED = "%a = f32[2,24,36]{2,1,0} reduce-scatter(%b), replica_groups=mesh['a'=4,'b'=2] {'b'}, dimensions={1}"
MOVED = "%a = bf16[8]{0} all-to-all(%b), replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}"
PAIRS = "%a = f32[] collective-permute(%b), source_target_pairs={{0,1},{1,0},{2,3},{3,2}}"
EVERYWHERE = "%a = f32[] all-reduce-start(%b), replica_groups={}, to_apply=%add"


@pytest.mark.parametrize(
    ("line", "axes"),
    [
        (LISTED, {"expert"}),
        (COUNTED, {"fsdp"}),
        (NAMED, {"context"}),
        (MOVED, {"context"}),
        (PAIRS, {"context"}),
        (EVERYWHERE, {"fsdp", "expert", "context"}),
    ],
)
def test_groups_of_devices_are_read_in_every_way_xla_writes_them(line, axes):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, context=2), jax.devices()[:8])
    (found,) = hlo.collectives(f"ENTRY\n  {line}\n  %d = f32[8] add(%a, %a)", mesh)
    assert found.axes == axes and found.op in line


def test_contiguous_shards_are_told_from_others():
    mesh = make_mesh(MeshConfig(data=8), jax.devices()[:8])
    lines = LISTED, NAMED, LISTED.replace("{1,0}", "{0,1}", 1)
    assert [hlo.collectives(line, mesh)[0].is_contiguous for line in lines] == [True, False, False]


def test_the_shapes_of_all_results_are_read():
    (found,) = hlo.collectives(COUNTED, make_mesh(MeshConfig(data=8), jax.devices()[:8]))
    assert found.results == [("f32", (4,)), ("s32", ())] and found.floats == [(4,)]
