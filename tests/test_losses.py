"""The chunked losses against plain autodiff over full logits; cross-entropy against the oracle is in test_model.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.kernels.device import pretend
from mtp_jax.losses import CrossEntropy, Term, agreement, depth_sums, evaluate, expected_tokens_per_pass

K, B, T, D, V = 3, 4, 12, 8, 50
Z = 0.01
WEIGHT = jnp.array([1.0, 0.3, 0.1])


@pytest.fixture(scope="module")
def arrays():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, head = jax.random.normal(keys[0], (K, B, T, D)), jax.random.normal(keys[1], (D, V))
    targets = jax.random.randint(keys[2], (K, B, T), 0, V)
    return hidden, head, targets, jax.random.bernoulli(keys[3], 0.7, (K, B, T))


def term(hidden, head, targets, mask, scale=WEIGHT, is_head_detached=False):
    share = jnp.ones(len(hidden)).at[1:].set(0.0 if is_head_detached else 1.0)
    weight = jnp.asarray(mask, jnp.float32)
    return Term(CrossEntropy(Z), hidden, head, targets, weight, scale, first_depth=0, head_share_K=share)


def plain(hidden, head, targets, mask, is_head_detached=False):
    def depth(k):
        weight = jax.lax.stop_gradient(head) if is_head_detached and k else head
        logits = hidden[k] @ weight
        log_z = jax.nn.logsumexp(logits, axis=-1)
        nll = log_z - jnp.take_along_axis(logits, targets[k][..., None], -1)[..., 0]
        return WEIGHT[k] * jnp.where(mask[k], nll + Z * log_z**2, 0.0).sum()

    return sum(depth(k) for k in range(K))


@pytest.mark.parametrize("chunk_tokens", [1, 8, 20, 1000])
@pytest.mark.parametrize("is_head_detached", [False, True])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])  # whose ways to the same sums differ
def test_value_and_gradients_do_not_depend_on_the_chunk(arrays, chunk_tokens, is_head_detached, platform):
    hidden, head, targets, mask = arrays

    def chunked(hidden, head):
        each = term(hidden, head, targets, mask, is_head_detached=is_head_detached)
        return 2.5 * evaluate([each], chunk_tokens)[0]

    with pretend(platform):
        value, grads = jax.jit(jax.value_and_grad(chunked, (0, 1)))(hidden, head)
        alone = chunked(hidden, head)  # the path without gradients
    expected, expected_grads = jax.value_and_grad(
        lambda h, w: 2.5 * plain(h, w, targets, mask, is_head_detached), (0, 1)
    )(hidden, head)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    assert float(alone) == pytest.approx(float(expected), rel=1e-5)
    for got, wanted in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_bfloat16_hidden_states_keep_a_float32_loss_and_head_gradient(arrays):
    hidden, head, targets, mask = arrays
    hidden = hidden.astype(jnp.bfloat16)

    def chunked(hidden, head):
        return evaluate([term(hidden, head, targets, mask)], 8)[0]

    value, (grad_hidden, grad_head) = jax.value_and_grad(chunked, (0, 1))(hidden, head)
    assert (value.dtype, grad_hidden.dtype, grad_head.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    wanted = jax.grad(plain, 1)(hidden.astype(jnp.float32), head, targets, mask)
    error = np.linalg.norm(grad_head - wanted) / np.linalg.norm(wanted)
    assert error < 0.01


def test_nothing_masked_in_is_nothing(arrays):
    hidden, head, targets, mask = arrays
    each = term(hidden, head, targets, jnp.zeros_like(mask))
    total, sums = evaluate([each], 8)
    assert float(total) == 0.0
    assert all(float(jnp.abs(x).max()) == 0.0 for x in depth_sums([each], sums))


def test_agreement_compares_with_the_main_head_k_positions_later():
    picks = jnp.array([[[5, 6, 7, 8]], [[6, 7, 9, 0]], [[7, 0, 0, 0]]])
    everything = jnp.ones((3, 1, 4), bool)
    agree, num = agreement(picks, everything)
    assert agree.tolist() == [4, 2, 1] and num.tolist() == [4, 3, 2]
    agree, num = agreement(picks, everything.at[0, 0, 2].set(False))  # the main head has no say at position 2
    assert agree.tolist() == [3, 1, 0] and num.tolist() == [3, 2, 1]


def test_expected_tokens_per_pass():
    assert expected_tokens_per_pass([]) == 1.0
    assert expected_tokens_per_pass([0.8, 0.5]) == pytest.approx(1 + 0.8 + 0.4)
