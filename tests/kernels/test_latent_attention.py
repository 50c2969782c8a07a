"""Kernels of latent attention over a cache, interpreted on CPUs, compared with the numpy oracle of the layer."""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtp_jax.config import LocalConfig, ModelConfig, RopeConfig
from mtp_jax.kernels import latent_attention
from mtp_jax.kernels.device import pretend
from mtp_jax.kernels.latent_attention import triton
from mtp_jax.layers import rope
from mtp_jax.layers.attention.mla import MultiHeadLatentAttention
from mtp_jax.layers.cache import NOWHERE, slots_at
from mtp_jax.layers.linear import outputs_first
from mtp_jax.layers.spec import layer_specs
from tests.kernels.hopper import assert_close, hopper_only
from tests.reference.mla import mla

MODEL = ModelConfig(
    **{"vocab_size": 16, "num_layers": 1, "embed_dim": 24, "num_heads": 2, "kv_lora_rank": 32, "ffn_dim": 16},
    **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32},
)
NUM_SLOTS = 40  # no multiple of the slots that a program reads


def layer(model):
    attention = MultiHeadLatentAttention(model, layer_specs(model, 1)[0].attention, nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for name in weights_of(model):
        getattr(attention, name)[...] = jnp.asarray(0.3 * rng.standard_normal(getattr(attention, name).shape))
    for norm in norms_of(model):
        scale = getattr(attention, norm).scale
        scale[...] = jnp.asarray(1 + rng.random(scale.shape))
    return attention


def weights_of(model):
    return (("q_a", "q_b") if model.q_lora_rank else ("q",)) + ("kv_a", "kv_b", "o")


def norms_of(model):
    return (("q_a_norm",) if model.q_lora_rank else ()) + ("kv_a_norm",)


def as_in_inference(attention, model):
    """Returns the layer with its contracted dims last and the weights of its input joined."""
    for name in weights_of(model):
        weight = getattr(attention, name)
        if weight.get_metadata()["info"].is_linear:
            setattr(attention, name, outputs_first(weight))
    attention = attention.joined()
    assert not hasattr(attention, "kv_a") and attention.down.shape[1] == model.embed_dim
    return attention


def used_kernels(run, *args):
    """Returns the names of the Pallas kernels of a traced function."""
    return set(re.findall(r"\blatent_[a-z]+", str(jax.make_jaxpr(run)(*args))))


KERNELS = {"latent_prepare", "latent_attend", "latent_combine"}


@pytest.mark.parametrize(
    ("is_interleaved", "is_joined", "q_lora_rank"), [(True, False, 0), (False, True, 0), (True, True, 6)]
)
@pytest.mark.parametrize("num_rows", [2, 7])
def test_every_token_equals_the_oracle(num_rows, is_interleaved, is_joined, q_lora_rank, as_on_hopper):
    """One token at a time and three at a time, in rows at different positions; 7 rows of three tokens use tiles."""
    assert 2 * 3 <= triton.FEW < 7 * 3
    rotary = RopeConfig(theta=50.0, interleaved=is_interleaved)
    model = replace(MODEL, rope=rotary, q_lora_rank=q_lora_rank)
    attention, length, lag_B = layer(model), 38, 3 * np.arange(num_rows)
    x_BLD = np.random.default_rng(1).standard_normal((num_rows, length, model.embed_dim), np.float32)
    params = {name: np.asarray(getattr(attention, name)[...], np.float64) for name in weights_of(model)}
    for norm in norms_of(model):
        params[norm] = {"scale": np.asarray(getattr(attention, norm).scale[...], np.float64)}
    if is_joined:
        attention = as_in_inference(attention, model)
    positions_BL = np.broadcast_to(np.arange(length), (num_rows, length))
    expected = mla(params, model, x_BLD.astype(np.float64), np.ones((num_rows, length), int), positions_BL)

    def step(x_BTD, positions_BT, cache):
        return attention.decode(x_BTD, slots_at(positions_BT, NUM_SLOTS), cache)

    for size in (1, 3):
        run, cache = jax.jit(step), attention.empty_cache(num_rows, NUM_SLOTS, size, jnp.float32)
        found, checked = np.zeros(expected.shape), np.zeros((num_rows, length), bool)
        for first in range(0, length + max(lag_B) + size, size):
            positions = first + np.arange(size) - lag_B[:, None]
            inside = (positions >= 0) & (positions < length)
            at = np.where(inside, positions, 0)
            args = np.take_along_axis(x_BLD, at[..., None], axis=1), np.where(inside, positions, -1), cache
            if first == 0:
                assert used_kernels(step, *args) == KERNELS
            out_BTD, cache = run(*args)
            rows = np.broadcast_to(np.arange(num_rows)[:, None], at.shape)[inside]
            found[rows, at[inside]], checked[rows, at[inside]] = np.asarray(out_BTD)[inside], True
        assert checked.all()
        assert_close(found, expected, 1e-6)


def operands(num_rows=1, num_new=2, model=MODEL, dtype=jnp.float32):
    """Returns the arguments of `decode`, without slots for the last row's tokens."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    heads, width = model.num_heads, model.kv_lora_rank + model.qk_rope_head_dim
    positions_BT = jnp.broadcast_to(jnp.arange(num_new), (num_rows, num_new))
    entries = latent_attention.Entries(
        draw(num_rows, num_new, heads * (model.qk_nope_head_dim + model.qk_rope_head_dim)),
        draw(num_rows, num_new, width),
        *rope.rotation(model.qk_rope_head_dim, positions_BT, model.rope),
        positions_BT,
        positions_BT.at[-1].add(NOWHERE),
    )
    kv_b_CHX = draw(model.kv_lora_rank, heads, model.qk_nope_head_dim + model.v_head_dim)
    return entries, kv_b_CHX, draw(num_rows, NUM_SLOTS, width), model.qk_nope_head_dim


def unsupported_reason(**change):
    entries, *others = operands(**change)
    return latent_attention.unsupported_reason(entries.positions_BT, *others)


def test_tokens_without_a_slot_write_no_entry():
    entries, kv_b_CHX, cache, nope = operands(num_rows=2)
    decode = jax.jit(functools.partial(latent_attention.decode, eps=1e-6, nope=nope, scale=0.1, is_interleaved=True))
    _, written = decode(entries, kv_b_CHX, jnp.ones(MODEL.kv_lora_rank), cache_BSW=cache)
    np.testing.assert_array_equal(written[1], cache[1])
    np.testing.assert_array_equal(written[0, 2:], cache[0, 2:])
    assert (np.asarray(written[0, :2]) != np.asarray(cache[0, :2])).all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"model": replace(MODEL, kv_lora_rank=48)}, "powers of two"),
        ({"model": replace(MODEL, v_head_dim=8)}, "at least 16"),
        ({"dtype": jnp.float16}, "bfloat16 or float32"),
        ({"num_new": 9}, "few tokens"),
        ({"num_rows": 129}, "few tokens"),
        ({"model": replace(MODEL, num_heads=128)}, "few tokens"),
    ],
)
def test_other_operands_are_refused(change, reason, as_on_hopper):
    found = unsupported_reason(**change)
    assert reason in found and bool(found) == bool(reason)


def test_other_devices_are_refused():
    with pretend("gpu", "8.0"):
        assert "compute capability 9.0" in unsupported_reason()


@pytest.mark.parametrize("change", [{"local": LocalConfig(window=4)}, {"local": LocalConfig(window=4, sinks=True)}])
def test_windows_and_sinks_use_other_operations(change, as_on_hopper):
    attention = layer(replace(MODEL, **change))
    cache = attention.empty_cache(1, NUM_SLOTS, 1, jnp.float32)
    slots = slots_at(jnp.array([[5]]), NUM_SLOTS)
    assert not used_kernels(lambda x: attention.decode(x, slots, cache), jnp.ones((1, 1, MODEL.embed_dim)))


@hopper_only
@pytest.mark.parametrize(("num_rows", "num_new"), [(1, 1), (1, 4), (8, 1), (8, 4), (9, 3), (32, 4)])
def test_on_a_gpu_as_other_operations(num_rows, num_new):
    """The size of configs/code_400m.py, in bfloat16."""
    model = ModelConfig(
        **{"vocab_size": 16, "num_layers": 1, "embed_dim": 1024, "num_heads": 16, "kv_lora_rank": 256, "ffn_dim": 16},
        **{"qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64},
    )
    attention = layer(model)
    for name in weights_of(model):  # scores of a few units, as of trained models
        getattr(attention, name)[...] *= 0.1
    rng = np.random.default_rng(1)
    x_BTD = jnp.asarray(rng.standard_normal((num_rows, num_new, 1024)), jnp.bfloat16)
    cache = jnp.asarray(rng.standard_normal((num_rows, 700, 288)), jnp.bfloat16)
    positions_BT = rng.integers(0, 690, num_rows)[:, None] + np.arange(num_new)
    slots = slots_at(jnp.asarray(positions_BT), 700)
    outputs = []
    for capability in ("9.0", "8.0"):
        with pretend("gpu", capability):
            run = lambda x, cache: attention.decode(x, slots, cache)  # noqa: E731
            assert used_kernels(run, x_BTD, cache) == (KERNELS if capability == "9.0" else set())
            outputs.append(jax.jit(run)(x_BTD, cache))
    (found, found_cache), (expected, expected_cache) = outputs
    assert_close(found, expected, 1e-2)
    assert_close(found_cache, expected_cache, 1e-4)
