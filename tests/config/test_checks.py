"""Bounds of the config's numbers: each has some, and a value outside them is one line with key, value and bound."""

import dataclasses

import pytest

from mtp_jax.config import Config, ModelConfig, UserError, check_bounds, load_config, validate, walk

OTHER_LIMITS = {"mtp.depth"}  # the kind of MTP limits the depth


def test_every_number_has_a_lower_and_an_upper_bound():
    for key, value, found in walk(Config(model=ModelConfig(vocab_size=8))):
        if isinstance(value, (int, float)) and not isinstance(value, bool) and key not in OTHER_LIMITS:
            assert found.at_least is not None or found.above is not None, key
            assert found.at_most is not None or found.below is not None, key


def test_defaults_keep_their_bounds():
    check_bounds(Config(), {"mla", "gqa", "moe"})


OUT_OF_BOUNDS = {
    "data.batch_size=999999999999": "must be at most 2^24",
    "data.prefetch=1000000000": "must be at most 2^10",
    "data.num_workers=10000": "must be at most 2^9",
    "data.sequence_length=100000000000": "must be at most 2^24",
    "data.synthetic_documents=100000000000": "must be at most 10,000,000",
    "model.num_layers=1000000000": "must be at most 2^12",
    "model.norm_eps=-1": "must be above 0",
    "model.latent_norm_eps=0.0": "must be above 0",
    "model.rope.theta=0": "must be above 1",
    "model.init_std=1e38": "must lie between 0 and 10",
    "model.rope.yarn.beta_slow=-1": "must be above 0",
    "optimizer.eps=-1": "must be above 0",
    "optimizer.weight_decay=1e999": "must be finite",
    "optimizer.beta1=1.0": "must stay below 1",
    "mtp.weight_values=(0.1, -1.0)": "must lie between 0 and 1e+06",
    "checkpoint.every=100000000000000000000": "must stay below 2^31",
    "training.log_every=100000000000000000000": "must stay below 2^31",
    "seed=-1": "must be at least 0",
}


@pytest.mark.parametrize("override", OUT_OF_BOUNDS)
def test_a_value_out_of_bounds(override):
    key, _, _ = override.partition("=")
    config = load_config("configs/tiny.py", [f"--config.{override}"])
    with pytest.raises(UserError) as error:
        validate(config, 1)
    assert str(error.value).startswith(f"{key}=") and str(error.value).endswith(f": {OUT_OF_BOUNDS[override]}")


def test_bounds_of_a_part_that_is_not_in_use_do_not_count():
    dense = ModelConfig(num_experts=0, expert_dim=0, attention="mla", num_kv_heads=0)
    validate(Config(model=dense), 1)
    for other, key in ((dict(num_experts=4), "expert_dim"), (dict(attention="gqa"), "num_kv_heads")):
        with pytest.raises(UserError, match=f"^model.{key}=0: must be at least 1$"):
            validate(Config(model=dataclasses.replace(dense, **other)), 1)
