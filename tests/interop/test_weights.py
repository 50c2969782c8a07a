"""Lazy leaves: any block of a leaf is what the whole has there, and only its tensors and rows are read."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtp_jax.config import Config, ModelConfig, MTPConfig
from mtp_jax.interop import weights
from mtp_jax.interop.tensorfiles import TensorFolder, write_folder
from mtp_jax.model import abstract_model

CONFIG = Config(
    model=ModelConfig(
        **{"vocab_size": 16, "num_layers": 3, "embed_dim": 8, "num_heads": 4, "q_lora_rank": 4, "kv_lora_rank": 6},
        **{"qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 6, "ffn_dim": 12, "num_experts": 4},
        **{"expert_dim": 10, "num_shared_experts": 1},
    ),
    mtp=MTPConfig(kind="sequential", depth=2),
)
LISTED = weights.tensors(CONFIG, "deepseek_v3")


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    path = tmp_path_factory.mktemp("folder")
    rng = np.random.default_rng(0)
    arrays = {t.name: rng.standard_normal(t.shape).astype(np.float32) for t in LISTED}
    write_folder(path, {n: ("F32", a.shape) for n, a in arrays.items()}, arrays.items())
    folder = TensorFolder(path)
    yield folder, arrays, flatten_dict(weights.lazy_arrays(folder, CONFIG, LISTED))


def test_every_tensor_of_the_layout_has_one_place_and_every_leaf_is_filled():
    names = [t.name for t in LISTED]
    assert len(set(names)) == len(names)
    built = abstract_model(CONFIG.architecture)
    leaves = flatten_dict({"params": built.params, "biases": built.biases})
    own = [t for t in LISTED if not t.repeats]
    assert {t.path for t in own} == set(leaves)
    assert sum(int(np.prod(t.shape)) for t in own) == sum(leaf.size for leaf in leaves.values())


def test_matrices_by_hand(opened):
    """Entry by entry: theirs is [out, in] and flat over heads, ours is named by its letters."""
    _, theirs, leaves = opened
    model = CONFIG.model
    q_LCHQ = leaves["params", "trunk", "blocks", "attention", "q_b"][...]
    o_LHVD = leaves["params", "trunk", "blocks", "attention", "o"][...]
    down_NEFD = leaves["params", "mtp", "module", "block", "ffn", "down"][...]
    projection_NXD = leaves["params", "mtp", "module", "projection"][...]
    width = model.qk_nope_head_dim + model.qk_rope_head_dim
    for c, h, q in [(0, 0, 0), (3, 2, 5), (1, 3, 1)]:
        assert q_LCHQ[1, c, h, q] == theirs["model.layers.2.self_attn.q_b_proj.weight"][h * width + q, c]
    for h, v, d in [(0, 0, 0), (3, 5, 7), (2, 1, 4)]:
        assert o_LHVD[0, h, v, d] == theirs["model.layers.1.self_attn.o_proj.weight"][d, h * model.v_head_dim + v]
    for e, f, d in [(0, 0, 0), (3, 9, 7), (2, 4, 1)]:
        assert down_NEFD[1, e, f, d] == theirs[f"model.layers.4.mlp.experts.{e}.down_proj.weight"][d, f]
    assert projection_NXD[0, 9, 3] == theirs["model.layers.3.eh_proj.weight"][3, 9]


def test_any_block_is_a_block_of_the_whole(opened):
    _, _, leaves = opened
    rng = np.random.default_rng(1)
    for path, leaf in leaves.items():
        whole = leaf[...]
        assert whole.shape == leaf.shape and whole.dtype == leaf.dtype
        for _ in range(8):
            bounds = [sorted(rng.choice(n + 1, 2, replace=False)) for n in leaf.shape]
            index = tuple(slice(int(a), int(b)) for a, b in bounds)
            np.testing.assert_array_equal(leaf[index], whole[index], err_msg=str(path))
        np.testing.assert_array_equal(leaf[0], whole[0])
        assert sorted(leaf.split_order) == list(range(whole.ndim))


def test_back_to_theirs_is_what_was_read(opened):
    _, theirs, leaves = opened
    tree = unflatten_dict(leaves)
    dtypes = dict.fromkeys(theirs, np.dtype(np.float32))
    for t, (name, array) in zip(LISTED, weights.their_arrays(tree, LISTED, dtypes), strict=True):
        if not t.repeats:
            np.testing.assert_array_equal(array, theirs[name])


def test_a_shard_reads_its_own_tensors_and_rows(opened, monkeypatch):
    folder, _, leaves = opened
    mesh = jax.make_mesh((2, 4), ("expert", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    read, sizes = folder.read, []

    def counting(name, rows=slice(None)):
        out = read(name, rows)
        sizes.append((name, out.size))
        return out

    monkeypatch.setattr(folder, "read", counting)
    path = ("params", "trunk", "blocks", "ffn", "down")  # [L, E, F, D]
    where = NamedSharding(mesh, P(None, "expert", None, "tensor"))
    want = jax.ShapeDtypeStruct(leaves[path].shape, np.float32, sharding=where)
    placed = weights.place(unflatten_dict(leaves), unflatten_dict({path: want}))
    array = flatten_dict(placed)[path]
    assert array.sharding == where
    assert sum(size for _, size in sizes) == array.size  # nothing was read twice
    np.testing.assert_array_equal(np.asarray(array), leaves[path][...])
