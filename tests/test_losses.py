"""The chunked losses against plain autodiff over full logits, and their values against the oracle (cross-entropy's in
test_model.py)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.config import MeshConfig
from mtp_jax.kernels.device import pretend
from mtp_jax.losses import (
    CrossEntropy,
    EndToEndTotalVariation,
    HiddenTerm,
    KLDivergence,
    ListNet,
    Term,
    TotalVariation,
    agreement,
    depth_sums,
    evaluate,
    expected_tokens_per_pass,
    weight_sum,
)
from mtp_jax.sharding import make_mesh
from tests.reference import losses as oracle

K, B, T, D, V = 3, 4, 12, 8, 50
Z = 0.01
WEIGHT = jnp.array([1.0, 0.3, 0.1])


@pytest.fixture(scope="module")
def arrays():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, head = jax.random.normal(keys[0], (K, B, T, D)), jax.random.normal(keys[1], (D, V))
    targets = jax.random.randint(keys[2], (K, B, T), 0, V)
    return hidden, head, targets, jax.random.bernoulli(keys[3], 0.7, (K, B, T))


def mesh_of(sizes):
    num = math.prod(sizes.values())
    if jax.device_count() < num:
        pytest.skip(f"takes {num} devices")
    return make_mesh(MeshConfig(**{"data": 1} | sizes), jax.devices()[:num])


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


@pytest.mark.parametrize(("chunk_tokens", "is_head_detached"), [(1, True), (8, False), (20, True), (1000, False)])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])  # which compute the same sums differently
def test_value_and_gradients_do_not_depend_on_the_chunk(arrays, chunk_tokens, is_head_detached, platform):
    hidden, head, targets, mask = arrays

    def chunked(hidden, head):
        each = term(hidden, head, targets, mask, is_head_detached=is_head_detached)
        return 2.5 * evaluate([each], chunk_tokens)[0]

    with pretend(platform):
        value, grads = jax.jit(jax.value_and_grad(chunked, (0, 1)))(hidden, head)
        alone = jax.jit(chunked)(hidden, head)  # the path without gradients
    expected, expected_grads = jax.jit(
        jax.value_and_grad(lambda h, w: 2.5 * plain(h, w, targets, mask, is_head_detached), (0, 1))
    )(hidden, head)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    assert float(alone) == pytest.approx(float(expected), rel=1e-5)
    for got, wanted in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [{"data": 2}, {"fsdp": 2, "context": 2}, {"data": 2, "tensor": 2}])
@pytest.mark.parametrize("capability", ["8.0", "9.0"])  # without and with the kernel
def test_rows_on_several_gpus_have_the_same_loss_and_gradients(arrays, sizes, capability):
    hidden, head, targets, mask = arrays

    def chunked(hidden, head):
        return evaluate([term(hidden, head, targets, mask)], 8)[0]

    expected = jax.jit(jax.value_and_grad(chunked, (0, 1)))(hidden, head)
    mesh = mesh_of(sizes)
    jax.clear_caches()
    with jax.set_mesh(mesh), pretend("gpu", capability):
        found = jax.jit(jax.value_and_grad(chunked, (0, 1)))(hidden, head)
    for got, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [{}, {"data": 2}, {"fsdp": 2, "context": 2}, {"tensor": 2}])
@pytest.mark.parametrize("precision", ["bfloat16", "fp8"])
def test_the_kernel_of_the_gradient_changes_nothing(arrays, sizes, precision):
    hidden, head, targets, mask = arrays
    hidden = hidden.astype(jnp.bfloat16)

    def chunked(hidden, head):
        return evaluate([term(hidden, head, targets, mask)], 8, precision)

    mesh, found = mesh_of(sizes), []
    for capability in ("8.0", "9.0"):
        jax.clear_caches()
        with jax.set_mesh(mesh), pretend("gpu", capability):
            traced = jax.jit(jax.value_and_grad(chunked, (0, 1), has_aux=True)).trace(hidden, head)
            assert ("softmax_gradient" in str(traced.jaxpr)) == (capability == "9.0" and "tensor" not in sizes)
            found.append(traced.lower().compile()(hidden, head))
    (expected, expected_grads), (values, grads) = found
    for got, wanted in zip(jax.tree.leaves(values), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5)
    for got, wanted in zip(grads, expected_grads, strict=True):
        error = np.linalg.norm((got - wanted).astype(jnp.float32)) / np.linalg.norm(wanted.astype(jnp.float32))
        assert error < 3e-3  # a rounding of bfloat16 or 8 bits falls the other way here and there


@pytest.mark.parametrize(("precision", "num_chunks"), [("default", 4), ("bfloat16", 2), ("fp8", 2)])
def test_a_chunk_has_twice_as_many_logits_in_bfloat16(precision, num_chunks):
    """12 positions of 4 rows at most 12 at a time: 4 chunks."""
    hidden = jax.ShapeDtypeStruct((1, 4, 12, D), jnp.bfloat16)

    def chunked(hidden, head):
        each = term(hidden, head, jnp.zeros((1, 4, 12), jnp.int32), jnp.ones((1, 4, 12)), jnp.ones(1))
        return evaluate([each], 12, precision)[0]

    program = str(jax.make_jaxpr(chunked)(hidden, jax.ShapeDtypeStruct((D, V), jnp.float32)))
    assert f" length={num_chunks}\n" in program


def test_8_bits_keep_the_gradients_of_unlikely_tokens():
    """A token far less likely than others is one of very many: together their gradients matter."""
    keys = jax.random.split(jax.random.key(0), 2)
    hidden = jax.random.normal(keys[0], (1, 1, 16, D)).at[..., 0].set(1.0)
    head = jax.random.normal(keys[1], (D, V)).at[0, V // 2 :].set(-17.0)
    targets = jnp.arange(16)[None, None]

    def chunked(head, precision):
        return evaluate([term(hidden, head, targets, jnp.ones((1, 1, 16)), jnp.ones(1))], 8, precision)[0]

    found, expected = (jax.jit(jax.grad(chunked), static_argnums=1)(head, name) for name in ("fp8", "default"))
    for part in (np.s_[:, : V // 2], np.s_[:, V // 2 :]):
        error = np.linalg.norm(found[part] - expected[part]) / np.linalg.norm(expected[part])
        assert error < 0.1


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
    agree, num = agreement(picks, everything.at[0, 0, 2].set(False))  # the main head has no prediction at position 2
    assert agree.tolist() == [3, 1, 0] and num.tolist() == [3, 2, 1]


def test_expected_tokens_per_pass():
    assert expected_tokens_per_pass([]) == 1.0
    assert expected_tokens_per_pass([0.8, 0.5]) == pytest.approx(1 + 0.8 + 0.4)


# Losses that compare with a teacher or with a list of words.

COMPARED = {
    "tv": TotalVariation(),
    "e2e_tv": EndToEndTotalVariation(),
    "kl": KLDivergence(),
    "listnet": ListNet(),
}
W = 6


class Arrays(NamedTuple):
    """Arrays that a loss is differentiated in, teachers included."""

    hidden: jax.Array
    head: jax.Array
    teacher: jax.Array
    weight: jax.Array
    scale: jax.Array


@pytest.fixture(scope="module")
def compared():
    """Arrays, targets, and a list of words with probabilities, of which some are 0 and name a word of the list again.

    Some weights are 0, the others no round numbers.
    """
    keys = jax.random.split(jax.random.key(1), 8)
    hidden, teacher = (0.7 * jax.random.normal(key, (K, B, T, D)) for key in keys[:2])
    head, targets = 0.7 * jax.random.normal(keys[2], (D, V)), jax.random.randint(keys[3], (K, B, T), 0, V)
    weight = jax.random.uniform(keys[4], (K, B, T)) * jax.random.bernoulli(keys[5], 0.8, (K, B, T))
    words = jnp.argsort(jax.random.uniform(keys[6], (K, B, T, V)))[..., :W].at[..., -1].set(0)
    scores = jax.random.normal(keys[7], (K, B, T, W)).at[..., -1].set(-jnp.inf)
    return Arrays(hidden, head, teacher, weight, jnp.array([1.0, 0.3, 0.1])), targets, words, jax.nn.softmax(scores)


def compared_term(name, arrays, targets, words, probs, share=None):
    is_list = name == "listnet"
    return Term(
        COMPARED[name],
        arrays.hidden,
        arrays.head,
        targets,
        arrays.weight,
        arrays.scale,
        teacher_KBTD=None if is_list else arrays.teacher,
        words_KBTW=words if is_list else None,
        probs_KBTW=probs if is_list else None,
        head_share_K=share,
    )


def plain_compared(name, arrays, words, probs, share=None):
    """Value of every position [K, B, T], over logits that all exist at once."""
    stop = jax.lax.stop_gradient
    heads = jnp.stack([arrays.head if keeps else stop(arrays.head) for keeps in (share or [1] * K)])
    log_q = jax.nn.log_softmax(jnp.einsum("kbtd,kdv->kbtv", arrays.hidden, heads))
    p = stop(jax.nn.softmax(arrays.teacher @ arrays.head))
    variation = jnp.abs(p - jnp.exp(log_q)).sum(-1) / 2
    if name == "tv":
        return variation
    if name == "e2e_tv":
        return jnp.stack([1 - jnp.prod(1 - variation[: k + 1], axis=0) for k in range(K)])
    if name == "kl":
        return (p * (jnp.log(p) - log_q)).sum(-1)
    return -(probs[..., None] * jax.nn.one_hot(words, V) * log_q[..., None, :]).sum((-1, -2))


def oracle_values(name, arrays, words, probs):
    """[K, B, T], position by position."""
    hidden, head, teacher, probs = (np.asarray(x, np.float64) for x in (*arrays[:3], probs))
    logits, teacher_logits, out = hidden @ head, teacher @ head, np.zeros((K, B, T))
    for b, i in np.ndindex(B, T):
        if name == "e2e_tv":
            out[:, b, i] = oracle.end_to_end_total_variation(logits[:, b, i], teacher_logits[:, b, i])
            continue
        for k in range(K):
            x, t = logits[k, b, i], teacher_logits[k, b, i]
            listed = zip(np.asarray(words)[k, b, i], probs[k, b, i], strict=True)
            scores = {int(word): np.log(p) for word, p in listed if p > 0}
            out[k, b, i] = {
                "tv": lambda x=x, t=t: oracle.total_variation(x, t),
                "kl": lambda x=x, t=t: oracle.kl(t, x),
                "listnet": lambda x=x, scores=scores: oracle.listnet(x, scores),
            }[name]()
    return out


@pytest.mark.parametrize("name", COMPARED)
def test_a_positions_value_is_the_oracles(compared, name):
    """The sums of positions, and each position's value as the gradient of its weight."""
    arrays, *data = compared
    expected = oracle_values(name, arrays, *data[1:])

    def loss(weight):
        return evaluate([compared_term(name, arrays._replace(weight=weight, scale=jnp.ones(K)), *data)], 7)

    (total, (sums,)), values = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays.weight)
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)
    by_depth, weights = oracle.weighted_sums(expected, np.asarray(arrays.weight))
    np.testing.assert_allclose(sums.value, by_depth, rtol=1e-5)
    np.testing.assert_allclose(sums.num, weights, rtol=1e-5)
    assert float(total) == pytest.approx(by_depth.sum(), rel=1e-5)
    one = jnp.zeros((K, B, T)).at[1, 2, 3].set(1.0)
    assert jax.jit(loss)(one)[1][0].value.tolist() == pytest.approx([0.0, expected[1, 2, 3], 0.0], rel=1e-4)


@pytest.mark.parametrize(
    ("precision", "gradient_error"), [("bfloat16", 0.05), ("fp8", 0.1)]
)  # signs of total variation change
@pytest.mark.parametrize("name", ["cross_entropy", *COMPARED])
def test_lower_precisions_are_close_to_full_logits(compared, name, precision, gradient_error):
    arrays, *data = compared

    def run(hidden, head, precision):
        changed = arrays._replace(hidden=hidden, head=head)
        if name == "cross_entropy":
            each = term(hidden, head, data[0], arrays.weight > 0, arrays.scale)
        else:
            each = compared_term(name, changed, *data)
        return evaluate([each], 8, precision)[0]

    both = jax.jit(jax.value_and_grad(run, (0, 1)), static_argnums=2)
    value, grads = both(arrays.hidden, arrays.head, precision)
    expected, expected_grads = both(arrays.hidden, arrays.head, "default")
    assert 0 < abs(float(value / expected) - 1) < 3e-3
    for got, wanted in zip(grads, expected_grads, strict=True):
        assert got.dtype == wanted.dtype
        assert 0 < np.linalg.norm(got - wanted) < gradient_error * np.linalg.norm(wanted)


@pytest.mark.parametrize("chunk_tokens", [1, 20])
@pytest.mark.parametrize("name", COMPARED)
def test_compared_gradients_are_those_of_full_logits(compared, name, chunk_tokens):
    """In hidden states, head, weights and scales; the teacher receives none. Depth 1 gives the head nothing."""
    arrays, *data = compared
    share = [1, 0, 1]

    def chunked(arrays):
        return 2.5 * evaluate([compared_term(name, arrays, *data, jnp.array(share, jnp.float32))], chunk_tokens)[0]

    def plain(arrays):
        values = plain_compared(name, arrays, *data[1:], share)
        return 2.5 * jnp.einsum("k,kbt,kbt->", arrays.scale, arrays.weight, values)

    value, grads = jax.jit(jax.value_and_grad(chunked))(arrays)
    expected, expected_grads = jax.jit(jax.value_and_grad(plain))(arrays)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    assert float(jax.jit(chunked)(arrays)) == pytest.approx(float(expected), rel=1e-5)  # the path without gradients
    for field, got, wanted in zip(Arrays._fields, grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5, err_msg=field)
    assert not np.asarray(grads.teacher).any()
    assert min(float(jnp.abs(g).max()) for g in grads._replace(teacher=jnp.ones(1))) > 0.01


def test_cross_entropy_has_gradients_in_weights_and_scales(compared):
    arrays, targets, *_ = compared

    def loss(weight, scale):
        return 2.5 * evaluate([term(arrays.hidden, arrays.head, targets, weight, scale)], 8)[0]

    grads = jax.grad(loss, (0, 1))(arrays.weight, arrays.scale)
    log_z = jax.nn.logsumexp(arrays.hidden @ arrays.head, axis=-1)
    target_logit = jnp.take_along_axis(arrays.hidden @ arrays.head, targets[..., None], -1)[..., 0]
    values = log_z - target_logit + Z * log_z**2
    np.testing.assert_allclose(grads[0], 2.5 * arrays.scale[:, None, None] * values, rtol=1e-4)
    np.testing.assert_allclose(grads[1], 2.5 * (arrays.weight * values).sum((1, 2)), rtol=1e-4)


NAMES = ("ce", "e2e_tv", "listnet", "hidden")


def test_several_terms_add_up_and_their_sums_are_constants(compared):
    """Terms of all sorts, a joint one and one that needs no head among them."""
    arrays, targets, *data = compared

    def terms(arrays, names=NAMES):
        made = {
            "ce": term(arrays.hidden, arrays.head, targets, arrays.weight, arrays.scale),
            "e2e_tv": compared_term("e2e_tv", arrays, targets, *data),
            "listnet": compared_term("listnet", arrays, targets, *data),
            "hidden": HiddenTerm("norm", (arrays.hidden**2).sum(-1), arrays.weight, arrays.scale),
        }
        return [made[name] for name in names]

    total, grads = jax.value_and_grad(lambda x: evaluate(terms(x), 8)[0])(arrays)
    sums = evaluate(terms(arrays), 8)[1]
    parts = [jax.value_and_grad(lambda x, name=name: evaluate(terms(x, [name]), 8)[0])(arrays) for name in NAMES]
    assert float(total) == pytest.approx(sum(float(part) for part, _ in parts), rel=1e-6)
    jax.tree.map(
        lambda got, *each: np.testing.assert_allclose(got, sum(each), rtol=1e-5, atol=1e-6),
        grads,
        *(grad for _, grad in parts),
    )
    assert len(sums) == 4
    for found, (part, _) in zip(sums[1:], parts[1:], strict=True):  # in the order of the terms
        assert float((arrays.scale * found.value).sum()) == pytest.approx(float(part), rel=1e-5)
    constants = jax.grad(lambda x: sum((s.value + s.num).sum() for s in evaluate(terms(x), 8)[1]))(arrays)
    assert not any(np.asarray(leaf).any() for leaf in constants)


def test_a_hidden_term_is_plain_arithmetic(compared):
    arrays = compared[0]
    value = jax.random.normal(jax.random.key(2), (K, B, T))

    def loss(value, weight, scale):
        return evaluate([HiddenTerm("x", value, weight, scale)], 1)

    args = value, arrays.weight, arrays.scale
    (total, (sums,)), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*args)
    expected = jax.value_and_grad(lambda v, w, s: jnp.einsum("k,kbt,kbt->", s, w, v), (0, 1, 2))(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), (total, grads), expected)
    np.testing.assert_allclose(sums.value, (arrays.weight * value).sum((1, 2)), rtol=1e-5)
    assert (sums.nll, sums.correct, sums.picks) == (None, None, None)


@pytest.mark.parametrize("name", COMPARED)
def test_bfloat16_hidden_states_keep_a_float32_comparison(compared, name):
    """Logits are float32 sums of products of bfloat16 numbers, the teacher's too."""
    arrays, *data = compared
    low = arrays._replace(hidden=arrays.hidden.astype(jnp.bfloat16), teacher=arrays.teacher.astype(jnp.bfloat16))
    value, grads = jax.value_and_grad(lambda x: evaluate([compared_term(name, x, *data)], 8)[0])(low)
    assert (value.dtype, grads.head.dtype, grads.weight.dtype) == (jnp.float32,) * 3
    assert grads.hidden.dtype == jnp.bfloat16

    rounded = Arrays(*(x.astype(jnp.bfloat16).astype(jnp.float32) for x in low[:3]), *arrays[3:])
    expected, wanted = jax.value_and_grad(
        lambda x: jnp.einsum("k,kbt,kbt->", x.scale, x.weight, plain_compared(name, x, *data[1:]))
    )(rounded)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    for got, want in ((grads.hidden.astype(jnp.float32), wanted.hidden), (grads.head, wanted.head)):
        assert np.linalg.norm(got - want) / np.linalg.norm(want) < 0.01


def temporary_bytes(depth, length, chunk_tokens, vocab_size=4096):
    """Of the end-to-end loss and its gradients, and the bytes of the logits of one depth."""
    shape = (depth, 2, length, 16)
    floats = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    arrays = Arrays(floats(*shape), floats(16, vocab_size), floats(*shape), floats(*shape[:3]), floats(depth))
    targets = jax.ShapeDtypeStruct(shape[:3], jnp.int32)

    def loss(arrays, targets):
        return evaluate([compared_term("e2e_tv", arrays, targets, None, None)], chunk_tokens)[0]

    compiled = jax.jit(jax.value_and_grad(loss)).lower(arrays, targets).compile()
    return compiled.memory_analysis().temp_size_in_bytes, 2 * length * vocab_size * 4


def test_a_joint_loss_keeps_no_more_logits_than_a_chunk():
    """All depths of a position are in one chunk, in whose tokens each of them counts, and so does its teacher."""
    base, logits = temporary_bytes(2, 64, 64)
    for deep_or_long in (temporary_bytes(8, 64, 64)[0], temporary_bytes(2, 256, 64)[0]):
        assert deep_or_long - base < logits / 4
    whole, _ = temporary_bytes(2, 64, 512)
    assert whole - base > logits  # the measure does see logits


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_are_summed_beyond_the_integers_of_float32(compiled):
    """2^24 + 1 is no float32 number: a running sum of ones stops there."""
    sums = jax.jit(weight_sum) if compiled else weight_sum
    ones = np.ones((1, 5000, 4096), np.float32)
    assert ones.size > 2**24 and float(sums(ones)[0]) == ones.size
    # A CPU adds in several running sums, short enough to be right about ones in any order. Here a single running sum
    # of all positions is wrong on any device, as is one that the compiler makes of two: 2^25 + 1 is 2^25, and
    # 2^25 + 4 is not.
    heavy = np.ones((1, 1000, 4), np.float32)
    heavy[0, 0] = 2.0**25, 0, 0, 0
    assert float(sums(heavy)[0]) == 2**25 + 4 * 999
