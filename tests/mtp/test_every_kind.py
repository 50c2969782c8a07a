"""Properties of every registered kind of MTP."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.config import UserError
from mtp_jax.decoding.generator import check_drafts
from mtp_jax.losses import Term, token_terms
from mtp_jax.model import abstract_model
from mtp_jax.mtp import KINDS, Scales, kind_of
from mtp_jax.training.step import rows_of
from tests.mtp.kinds import batch_of, small, steps

pytestmark = pytest.mark.parametrize("name", KINDS)
SCALES = Scales(jnp.float32(1.0), jnp.ones(3), jnp.float32(1.0))


def config_of(name, *overrides):
    """Depth 3, where the kind has depths; layers enough to give some up."""
    settings = {"mtp.kind": name, "mtp.depth": 3, "mtp.top.window": 5, "model.num_layers": 6}
    return small(*(f"--config.{key}={value}" for key, value in settings.items()), *overrides)


def terms_of(config, params, biases):
    """The model's output, its rows, and the terms of its loss; under jit no more is computed than is read."""
    kind = kind_of(config)
    rows, model = rows_of(batch_of(config), kind), abstract_model(config.architecture).merge(params, biases)
    out = model(rows)
    return out, rows, model.terms(out.hidden, rows, SCALES._replace(depth_N=SCALES.depth_N[: kind.depth]), 0.0)


def abstract_run(config):
    """Shapes of the model's output and of the rows, and the terms with shapes in them; nothing is computed."""
    built, found = abstract_model(config.architecture), []

    def run(params, biases):
        out, rows, terms = terms_of(config, params, biases)
        found.extend(terms)
        return out, rows

    return *jax.eval_shape(run, built.params, built.biases), found


def test_depths_lookahead_and_layers_are_those_of_the_model(name):
    config = config_of(name)
    kind, model = kind_of(config), config.model
    out, rows, _ = abstract_run(config)
    assert kind.name == name and kind.lookahead >= kind.depth
    assert rows.positions_BT.shape == (8, 16)  # of a batch with just `lookahead` tokens more
    assert out.hidden.shape == (1 + kind.depth, 8, 16, model.embed_dim)
    num_moe = kind.num_main_layers - model.num_dense_layers
    assert {name: s.load_E.shape for name, s in out.decoder_stats.items()} == {"blocks": (num_moe, model.num_experts)}
    decoder = abstract_model(config.architecture).params["trunk"]
    stacks = [jax.tree.leaves(decoder[group])[0].shape[0] for group in ("dense_blocks", "blocks")]
    assert stacks == [model.num_dense_layers, num_moe]
    assert (out.mtp_stats is None) == (kind.num_blocks == 0)
    if out.mtp_stats is not None:
        assert out.mtp_stats.load_E.shape == (kind.num_blocks, model.num_experts)


def test_every_depth_is_reported_once(name):
    """By the rows of the terms that have a first depth; what another term is worth has a name of its own."""
    config = config_of(name)
    kind, (_, rows, terms) = kind_of(config), abstract_run(config)
    depths = [t.first_depth + row for t in token_terms(terms) for row in range(len(t.hidden_KBTD))]
    assert sorted(depths) == list(range(1 + kind.depth))
    others = [t.name for t in terms if not (isinstance(t, Term) and t.first_depth is not None)]
    assert all(others) and len(set(others)) == len(others)
    for t in terms:
        num = len(t.scale_K)
        assert t.weight_KBT.shape == (num, *rows.weight_KBT.shape[1:])
        if isinstance(t, Term):
            assert t.targets_KBT.shape == t.hidden_KBTD.shape[:3] == t.weight_KBT.shape


def test_depth_k_predicts_the_token_after_the_k_next_and_counts_nowhere_else(name):
    config = config_of(name)
    built = abstract_model(config.architecture)

    @jax.jit
    def run(params, biases):
        _, rows, terms = terms_of(config, params, biases)
        terms = sorted(token_terms(terms), key=lambda t: t.first_depth)
        targets, weights = (jnp.concatenate([getattr(t, f"{x}_KBT") for t in terms]) for x in ("targets", "weight"))
        return targets, weights, rows.targets_KBT, rows.weight_KBT

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (built.params, built.biases))
    targets, weights, expected, most = jax.device_get(run(*zeros))
    np.testing.assert_array_equal(targets, expected)
    np.testing.assert_array_equal(weights[0], most[0])
    assert (weights <= most).all() and weights.any((1, 2)).all()


def test_kinds_of_equal_architectures_are_equal(name):
    config = config_of(name)
    kind, again = kind_of(config), KINDS[name](config.architecture)
    assert again is not kind and again == kind and hash(again) == hash(kind)
    others = [KINDS[other](config_of(other).architecture) for other in KINDS if other != name]
    others.append(kind_of(config_of(name, "--config.mtp.weight=0.125")))
    others.append(kind_of(config_of(name, "--config.model.embed_dim=32")))
    assert kind not in others and len({kind, again, *others}) == 1 + len(others)


def test_a_misspelt_kind_is_refused_with_the_nearest(name):
    config = config_of(name)
    misspelt = dataclasses.replace(config, mtp=dataclasses.replace(config.mtp, kind=f"{name}z"))
    with pytest.raises(UserError, match=rf"mtp.kind='{name}z'.*did you mean {name}\?"):
        kind_of(misspelt)


def test_more_drafts_than_the_kind_has_are_refused(name):
    architecture = config_of(name).architecture
    most = kind_of(architecture).max_drafts
    check_drafts(architecture, 0)
    check_drafts(architecture, 9 if most is None else most)
    if most is not None:
        remedy = "can only be decoded plainly" if most == 0 else f"use at most {most}"
        with pytest.raises(UserError, match=remedy):
            check_drafts(architecture, most + 1)


def test_a_step_reports_the_loss_of_every_depth(name):
    config = config_of(name)
    (metrics,), state = steps(config, [batch_of(config)])
    assert np.isfinite(list(metrics.values())).all()
    depths = {f"loss_mtp_{k}" for k in range(1, 1 + kind_of(config).depth)}
    named = {f"loss_{t.name}" for t in abstract_run(config)[2] if t.name}
    losses = {key for key in metrics if key.startswith("loss")}
    assert losses == {"loss", "loss_main", *depths, *named}
    assert min(metrics[key] for key in losses) > 0
    assert int(state["step"]) == 1
