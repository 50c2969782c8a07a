"""Splash attention, as plain jax on a CPU: against the slow path, and the rule that chooses it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval

from mtp_jax import sharding
from mtp_jax.config import MeshConfig, UserError
from mtp_jax.errors import warn_once
from mtp_jax.kernels import attention
from mtp_jax.kernels.attention import Mask, splash
from mtp_jax.kernels.device import pretend
from mtp_jax.layers.stack import POLICIES
from mtp_jax.sharding import first_position, local, whole_length
from tests.kernels.hopper import assert_close

LENGTH, SCALE = 256, 0.2
NO_MASK = Mask()


@pytest.fixture
def as_on_tpu(monkeypatch):
    """Backends are selected as on a TPU; the kernels run as plain jax, in blocks of 128."""
    monkeypatch.setattr(splash, "BLOCK", 128)
    interpreted = functools.partial(splash.attend, interpret=True)
    backends = [b._replace(run=interpreted) if b.name == "splash" else b for b in attention.BACKENDS]
    monkeypatch.setattr(attention, "BACKENDS", backends)
    with pretend("tpu"):
        yield


def inputs(heads=4, groups=2, dims=(24, 16), dtype=jnp.float32, length=LENGTH):
    """q, k, v and a cotangent."""
    keys = jax.random.split(jax.random.key(1), 4)
    shapes = (heads, dims[0]), (groups, dims[0]), (groups, dims[1]), (heads, dims[1])
    return [jax.random.normal(key, (2, length, *s)).astype(dtype) for key, s in zip(keys, shapes, strict=True)]


def documents(length=LENGTH):
    """Documents with padding between them, as the deeper depths of MTP have, and padding at the end."""
    segments_BT = jnp.sort(jax.random.randint(jax.random.key(4), (2, length), 1, 6), axis=1)
    segments_BT = jnp.where(jnp.diff(segments_BT, append=9, axis=1) != 0, 0, segments_BT)
    return segments_BT.at[:, -40:].set(0)


@functools.partial(jax.jit, static_argnames="kernel")
def forward_and_backward(q, k, v, grad, mask=NO_MASK, sinks_H=None, kernel="auto"):
    def attend(q, k, v, sinks_H):
        return attention.attend(q, k, v, mask, SCALE, sinks_H, kernel)

    out, pull = jax.vjp(attend, q, k, v, sinks_H)
    return jax.tree.leaves((out, pull(grad.astype(out.dtype))))


@pytest.mark.parametrize(
    ("heads", "groups", "dims", "is_packed", "window", "has_sinks"),
    [
        (2, 2, (192, 128), True, 0, False),
        (4, 2, (24, 16), False, 0, False),
        (4, 1, (32, 32), True, 0, True),
        (4, 2, (24, 16), True, 70, True),
        (4, 2, (24, 16), False, 130, False),
        (2, 1, (24, 16), False, 1, True),
    ],
)
def test_values_and_gradients_are_those_of_the_slow_path(as_on_tpu, heads, groups, dims, is_packed, window, has_sinks):
    arguments = inputs(heads, groups, dims)
    mask = Mask(documents() if is_packed else None, window=window)
    sinks_H = jnp.linspace(-1.0, 2.0, heads) if has_sinks else None
    found = forward_and_backward(*arguments, mask, sinks_H, kernel="splash")
    for a, b in zip(found, forward_and_backward(*arguments, mask, sinks_H, kernel="xla"), strict=True):
        assert_close(a, b, 2e-6)


def test_bfloat16_is_about_as_near_to_float32_as_the_slow_path_is(as_on_tpu, monkeypatch):
    """At a scale that models have: queries are scaled before the product, and rounded once more than there."""
    monkeypatch.setitem(globals(), "SCALE", 192**-0.5)
    forward_and_backward.clear_cache()
    arguments = inputs(2, 2, (192, 128), jnp.bfloat16)
    exact = forward_and_backward(*(x.astype(jnp.float32) for x in arguments), Mask(documents()), kernel="xla")

    def errors(kernel):
        found = forward_and_backward(*arguments, Mask(documents()), kernel=kernel)
        return [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(found, exact, strict=True)]

    for ours, slow in zip(errors("splash"), errors("xla"), strict=True):
        assert ours < 1.6 * slow < 0.01
    forward_and_backward.clear_cache()


@pytest.mark.parametrize("window", [0, 150])
def test_parts_of_a_row_begin_at_the_offset_of_the_run(as_on_tpu, window):
    q, k, v, grad = inputs(2, 1, length=512)
    for part in range(4):  # one program
        section = slice(128 * part, 128 * part + 128)
        arguments = (q[:, section], k, v, grad[:, section], Mask(documents(512), jnp.int32(128 * part), window))
        found = forward_and_backward(*arguments, kernel="splash")
        for a, b in zip(found, forward_and_backward(*arguments, kernel="xla"), strict=True):
            assert_close(a, b, 2e-6)


def test_on_a_mesh_that_shards_rows_positions_and_heads(as_on_tpu):
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2))
    heads, groups = ("batch", "length", "heads", None), ("batch", "length", "kv_heads", None)

    def run(kernel, q, k, v, segments_BS, grad):
        def one_device(q, k, v, segments_BS):
            mask = Mask(segments_BS, first_position(q.shape[1]))
            return attention.attend(q, whole_length(k), whole_length(v), mask, SCALE, kernel=kernel)

        attend = local(one_device, (heads, groups, groups, ("batch", None)), heads)
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, segments_BS), q, k, v)
        return out, *pull(grad)

    q, k, v, grad = inputs(length=256)
    with jax.set_mesh(mesh):
        found = jax.jit(functools.partial(run, "splash"))(q, k, v, documents(256), grad)
    for a, b in zip(found, forward_and_backward(q, k, v, grad, Mask(documents(256)), kernel="xla"), strict=True):
        assert_close(a, b, 2e-6)


REFUSED = {
    "another dtype": ({"dtype": jnp.float16}, "float16"),
    "a short row": ({"length": 64}, "multiple of 128"),
    "an odd row": ({"length": 200}, "multiple of 128"),
    "large heads": ({"dims": (320, 128)}, "at most 256"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_inputs_of_splash_go_to_the_compiler_with_one_notice(as_on_tpu, capsys, name):
    shape, reason = REFUSED[name]
    warn_once.cache_clear()
    *qkv, _ = inputs(**shape)
    for _ in range(2):
        found = attention.attend(*qkv, NO_MASK, SCALE)
        np.testing.assert_array_equal(found, attention.attend(*qkv, NO_MASK, SCALE, kernel="xla"))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and reason in said[0]
    with pytest.raises(UserError, match="model.attention_kernel=splash"):
        attention.attend(*qkv, NO_MASK, SCALE, kernel="splash")


def test_splash_is_for_tpus():
    with pytest.raises(UserError, match="model.attention_kernel=splash: .* and this is cpu"):
        attention.attend(*inputs()[:3], NO_MASK, SCALE, kernel="splash")


@pytest.mark.parametrize(("kernel", "is_splash"), [("auto", True), ("splash", True), ("xla", False)])
def test_a_tpu_takes_it_where_it_can_and_the_config_can_choose_another(as_on_tpu, capsys, kernel, is_splash):
    *qkv, _ = inputs()
    text = str(jax.make_jaxpr(lambda *qkv: attention.attend(*qkv, Mask(documents()), SCALE, kernel=kernel))(*qkv))
    assert ("splash_mha_fwd" in text) == is_splash
    assert not capsys.readouterr().err


def test_recomputation_runs_the_kernel_once_where_its_outputs_are_kept(as_on_tpu):
    def runs(policy):
        def loss(q, k, v):
            return jax.checkpoint(lambda *qkv: attention.attend(*qkv, Mask(documents()), SCALE), policy=policy)(
                q, k, v
            ).sum()

        jaxpr = jax.make_jaxpr(jax.value_and_grad(loss, (0, 1, 2)))(*inputs()[:3]).jaxpr
        used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
        return str(used).count("name=splash_mha_fwd")

    assert {name: runs(policy) for name, policy in POLICIES.items()} == {"dots": 1, "kernels": 1, "full": 2}


@pytest.mark.parametrize(("length", "block"), [(128, 128), (384, 384), (640, 128), (1024, 512), (4096, 512)])
def test_blocks_divide_the_row(length, block):
    assert splash.block_of(length) == block
