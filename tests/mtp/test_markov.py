"""The Markov head of parallel drafts: logits, a new head, loading of heads without one, and update rules."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import mtp_jax
from mtp_jax.config import to_dict
from mtp_jax.layers.param import ParamInfo
from mtp_jax.model import abstract_model, count_parameters, init
from mtp_jax.training import optimizer
from mtp_jax.training.checkpoint import Checkpoints
from mtp_jax.training.init_from import check_source, load_from
from tests.decoding.models import MLA, build, markov, parallel, prompts_of
from tests.mtp.kinds import small
from tests.reference.model import forward

MODEL = dataclasses.replace(MLA, vocab_size=264)
HEADS = ["--config.mtp.kind=parallel", "--config.mtp.parameter_matched=false", "--config.model.vocab_size=264"]
RANK = "--config.mtp.parallel.markov_rank=3"


def test_logits_are_the_oracles():
    """Those of the parallel heads, and W_out of W_in of the token before the predicted one."""
    with_head, without = build(MLA, markov(2), seed=3), build(MLA, parallel(2), seed=3)
    tokens = np.array(prompts_of([9, 9], 16))
    found, plain = with_head.logits(tokens), without.logits(tokens)
    length = found.shape[1]
    w_in, w_out = (with_head.reference["mtp"]["markov"][name] for name in ("w_in", "w_out"))
    np.testing.assert_allclose(found[:, :, 0], plain[:, :, 0], rtol=0, atol=1e-5)
    for k in (1, 2):
        expected = plain[:, :, k] + w_in[tokens[:, k : k + length]] @ w_out
        np.testing.assert_allclose(found[:, :, k], expected, rtol=0, atol=1e-4)
    row = np.pad(tokens, ((0, 0), (0, 1)))
    positions = np.broadcast_to(np.arange(length), (2, length))
    reference = forward(with_head.reference, with_head.config, row, np.ones_like(row), positions)["logits"]
    np.testing.assert_allclose(found, np.moveaxis(reference, 0, 2), rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """(heads without a Markov head, a workdir with their weights)."""
    built, workdir = build(MODEL, parallel(2), context=16, seed=3), tmp_path_factory.mktemp("parallel")
    save(workdir, built.config, {"params": built.params, "biases": built.biases})
    return built, workdir


def save(workdir, config, state):
    workdir.mkdir(exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(to_dict(config)))
    with Checkpoints(workdir / "checkpoints", config.checkpoint) as saved:
        saved.save(1, state)


def fresh_state(config):
    """(params and biases, their shapes)."""
    params, biases = jax.jit(lambda: init(config.architecture, 0))()
    state = {"params": params, "biases": biases}
    return state, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def test_heads_are_loaded_and_a_markov_head_is_added(source, tmp_path):
    """It starts fresh, which changes no logits."""
    old, workdir = source
    config = dataclasses.replace(old.config, mtp=markov(2))
    fresh, abstract = fresh_state(config)
    check_source(str(workdir), abstract)
    state, note = load_from(str(workdir), config, fresh, abstract)
    assert note == f"decoder and MTP modules of {workdir}, step 1; of the MTP modules, markov starts fresh"
    assert jax.tree.structure(state) == jax.tree.structure(fresh)
    jax.tree.map(np.testing.assert_array_equal, state["params"]["trunk"], old.params["trunk"])
    jax.tree.map(np.testing.assert_array_equal, state["params"]["mtp"]["block"], old.params["mtp"]["block"])
    jax.tree.map(np.testing.assert_array_equal, state["params"]["mtp"]["markov"], fresh["params"]["mtp"]["markov"])
    assert not fresh["params"]["mtp"]["markov"]["w_out"].any() and fresh["params"]["mtp"]["markov"]["w_in"].all()
    save(tmp_path / "new", config, state)
    tokens = np.array(prompts_of([9, 9], 264))
    np.testing.assert_allclose(mtp_jax.load(str(tmp_path / "new")).logits(tokens), old.logits(tokens), atol=1e-4)


def test_other_heads_start_fresh_as_before(source):
    """Weights of MTP modules that are not optional are loaded all or not at all."""
    old, workdir = source
    config = dataclasses.replace(old.config, mtp=markov(1))
    abstract = abstract_model(config.architecture)
    shapes = {"params": abstract.params, "biases": abstract.biases}
    fresh = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), shapes)
    state, note = load_from(str(workdir), config, fresh, shapes)
    assert note == f"decoder of {workdir}, step 1; the MTP modules start fresh"
    jax.tree.map(np.testing.assert_array_equal, state["params"]["mtp"], fresh["params"]["mtp"])
    jax.tree.map(np.testing.assert_array_equal, state["params"]["trunk"], old.params["trunk"])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_w_in_is_updated_as_an_embedding_table_and_w_out_as_an_output_head(name):
    config = small(*HEADS, RANK)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, name=name))
    infos = abstract_model(config.architecture).infos
    is_info = lambda x: isinstance(x, ParamInfo)  # noqa: E731
    labels = jax.tree.map(lambda i: optimizer.label(config.optimizer, i), infos, is_leaf=is_info)
    assert labels["mtp"]["markov"] == {"w_in": labels["trunk"]["embed"], "w_out": labels["trunk"]["unembed"]}
    assert labels["mtp"]["markov"] == {"w_in": "adam", "w_out": "adam_decayed"}
    assert labels["mtp"]["block"]["attention"]["o"] == {"adamw": "adam_decayed", "muon": "muon"}[name]


@pytest.mark.parametrize("tied", ["true", "false"])
def test_w_in_is_looked_up_and_not_multiplied_with(tied):
    """Of the active weights W_out alone, [3, 264]."""
    without, with_head = (
        count_parameters(small(*HEADS, f"--config.model.tie_embeddings={tied}", *more).architecture)
        for more in ((), (RANK,))
    )
    assert with_head.mtp_total - without.mtp_total == 2 * 3 * 264
    assert with_head.mtp_active - without.mtp_active == 3 * 264
    assert with_head[:2] == without[:2]
