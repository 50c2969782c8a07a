"""Layers as values: patterns, groups of equal layers and their names, keys that a query sees."""

from dataclasses import replace

import numpy as np
import pytest

from mtp_jax.config import Config, LocalConfig, ModelConfig, UserError, validate
from mtp_jax.layers.spec import AttentionSpec, layer_groups, layer_places, layer_specs
from mtp_jax.model import abstract_model

MODEL = ModelConfig(vocab_size=8, embed_dim=8, num_heads=4, kv_lora_rank=4, ffn_dim=8)
EXPERTS = replace(MODEL, num_experts=4, expert_dim=8, num_dense_layers=1)


def grouped(model, num_layers):
    """(windows of the period, names, repetitions) of every group."""
    groups = layer_groups(model, num_layers)
    return [([spec.attention.window for spec in group.specs], list(group.names), group.count) for group in groups]


def local(pattern, window=3):
    return LocalConfig(window=window, pattern=pattern)


@pytest.mark.parametrize(
    ("model", "num_layers", "expected"),
    [
        (MODEL, 5, [([0], ["blocks"], 5)]),
        (MODEL, 1, [([0], ["blocks"], 1)]),
        (EXPERTS, 5, [([0], ["dense_blocks"], 1), ([0], ["blocks"], 4)]),
        (replace(EXPERTS, num_dense_layers=0), 3, [([0], ["blocks"], 3)]),
        (EXPERTS, 1, [([0], ["dense_blocks"], 1)]),
        (replace(MODEL, local=local("L")), 5, [([3], ["blocks"], 5)]),
        (replace(MODEL, local=local("LG", 0)), 4, [([0], ["blocks"], 4)]),
        (replace(MODEL, local=local("LG")), 6, [([3, 0], ["blocks", "blocks_1"], 3)]),
        (
            replace(MODEL, local=local("LLG")),
            8,
            [([3, 3, 0], ["blocks", "blocks_1", "blocks_2"], 2), ([3], ["blocks_3"], 2)],
        ),
        (
            replace(EXPERTS, local=local("GLL")),
            7,
            [([0], ["dense_blocks"], 1), ([3, 3, 0], ["blocks", "blocks_1", "blocks_2"], 2)],
        ),
    ],
)
def test_equal_layers_are_stacked_and_keep_their_order(model, num_layers, expected):
    assert grouped(model, num_layers) == expected
    places = layer_places(model, num_layers)
    assert len(set(places)) == num_layers
    specs = {name: spec for g in layer_groups(model, num_layers) for name, spec in zip(g.names, g.specs, strict=True)}
    assert [specs[name] for name, _ in places] == layer_specs(model, num_layers)
    built = abstract_model(Config(model=replace(model, num_layers=num_layers)).architecture).params["trunk"]
    assert {name for name in built if "blocks" in name} == set(specs)


@pytest.mark.parametrize("window", [0, 1, 5, 12, 100])
def test_pairs_per_query_are_those_of_the_mask(window):
    """A query's own key counts one half, as T / 2 keys per query does without a window."""
    length = 12
    seen = sum(min(i + 1, window or length) for i in range(length)) - length / 2
    spec = AttentionSpec(MODEL.rope, 4, window)
    expected = seen if not window or window >= length else seen + (length - window) / 2
    # Behind the first queries each sees a whole window, which begins in the middle of a key as it ends in one.
    np.testing.assert_allclose(spec.pairs_per_query(length) * length, expected)


@pytest.mark.parametrize("pattern", ["", "G", "LX", "lg"])
def test_a_pattern_without_local_layers_is_refused(pattern):
    with pytest.raises(UserError, match="model.local.pattern"):
        validate(Config(model=replace(MODEL, local=local(pattern))), 1)
