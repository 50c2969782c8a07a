"""The oracles of the losses, TOP and NextLat: cases computed by hand, by another formula, or known from a symmetry."""

import math

import numpy as np
import pytest

from tests.reference import losses, nextlat, targets, top
from tests.reference.loss import depth_sums, expected_tokens
from tests.reference.norm import rms_norm

ONE_TO_FIVE = np.log([1.0, 2.0, 5.0])  # probabilities 1/8, 2/8, 5/8


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def probabilities(logits):
    """The softmax as it is written down, without the maximum taken out."""
    return np.exp(logits) / np.sum(np.exp(logits))


# ---------------------------------------------------------------------------------------------------------------
# losses of one position


def test_cross_entropy_by_hand():
    assert losses.cross_entropy(ONE_TO_FIVE, 1) == pytest.approx(math.log(4))
    assert losses.cross_entropy(ONE_TO_FIVE, 2, 0.1) == pytest.approx(math.log(8 / 5) + 0.1 * math.log(8) ** 2)


def test_cross_entropy_of_large_logits():
    assert losses.cross_entropy(1000 + ONE_TO_FIVE, 1) == pytest.approx(math.log(4))
    assert losses.cross_entropy(ONE_TO_FIVE - 1000, 1, 1.0) == pytest.approx(math.log(4) + (math.log(8) - 1000) ** 2)


def test_cross_entropy_sums_to_those_of_the_depth():
    logits, labels, valid = normal(1, 4, 5), np.array([[3, 0, 4, 1]]), np.array([[True, True, False, True]])
    values = np.array([[[losses.cross_entropy(logits[0, i], labels[0, i]) for i in range(4)]]])
    sums, weights = losses.weighted_sums(values, valid[None].astype(float))
    expected = depth_sums(logits, labels, valid)
    np.testing.assert_allclose([sums[0], weights[0]], [expected["nll"], expected["count"]])


def test_total_variation_by_hand():
    """p = (1/2, 1/2, 0), q = (1/4, 1/4, 1/2): half of 1/4 + 1/4 + 1/2."""
    p, q = np.array([0.0, 0.0, -800.0]), np.log([1.0, 1.0, 2.0])
    assert losses.total_variation(q, p) == pytest.approx(1 / 2)
    assert losses.total_variation(p, q) == pytest.approx(1 / 2)


def test_total_variation_is_what_the_distributions_do_not_share():
    p, q = normal(2, 7)
    shared = np.minimum(probabilities(p), probabilities(q)).sum()
    assert 0.1 < shared < 0.9
    assert losses.total_variation(q, p) == pytest.approx(1 - shared)
    assert losses.total_variation(p, p + 3) == pytest.approx(0, abs=1e-15)
    assert losses.total_variation(np.array([50.0, 0]), np.array([0, 50.0])) == pytest.approx(1)


def test_end_to_end_total_variation_by_hand():
    """TV 1/2, then 0, then 1/4: products 1/2, 1/2, 3/8."""
    teacher = np.log([[1e-300, 1.0, 1.0], [1.0, 2.0, 3.0], [1.0, 1.0, 1e-300]])
    logits = np.log([[2.0, 1.0, 1.0], [1.0, 2.0, 3.0], [1.0, 3.0, 1e-300]])
    terms = losses.end_to_end_total_variation(logits, teacher)
    assert terms == pytest.approx([1 / 2, 1 / 2, 5 / 8])
    assert np.mean(terms) == pytest.approx(1 - (1 / 2 + 1 / 2 + 3 / 8) / 3)
    reverse = losses.end_to_end_total_variation(logits[::-1], teacher[::-1])
    assert reverse == pytest.approx([1 / 4, 1 / 4, 5 / 8])


def test_end_to_end_total_variation_of_one_draft_is_its_total_variation():
    logits, teacher = normal(2, 1, 6)
    expected = losses.total_variation(logits[0], teacher[0])
    assert losses.end_to_end_total_variation(logits, teacher) == pytest.approx([expected])


def test_end_to_end_total_variation_counts_the_drafts_that_are_not_accepted():
    """1 + sum_j (1 - v_j) is the expected number of tokens per forward pass at acceptance rates 1 - TV_j."""
    logits, teacher = normal(2, 3, 6)
    acceptance = [1 - losses.total_variation(q, p) for q, p in zip(logits, teacher, strict=True)]
    terms = losses.end_to_end_total_variation(logits, teacher)
    assert 1 + sum(1 - v for v in terms) == pytest.approx(expected_tokens(acceptance))


def test_kl_by_hand():
    """p = (1/2, 1/2), q = (1/4, 3/4): KL(p || q) = (ln 2 + ln(2/3)) / 2 = ln(4/3) / 2."""
    p, q = np.zeros(2), np.log([1.0, 3.0])
    assert losses.kl(p, q) == pytest.approx(math.log(4 / 3) / 2)
    assert losses.kl(q, p) == pytest.approx(math.log(1 / 2) / 4 + 3 * math.log(3 / 2) / 4)


def test_kl_is_positive_unless_the_distributions_are_equal():
    for seed in range(5):
        p, q = normal(2, 6, seed=seed)
        assert losses.kl(p, q) > 0.01
        assert 2 * losses.total_variation(q, p) ** 2 <= losses.kl(p, q), "Pinsker's inequality"
    assert losses.kl(p, p - 2) == pytest.approx(0, abs=1e-14)


def test_kl_of_a_certain_teacher_is_cross_entropy():
    certain = np.array([-np.inf, 0.0, -np.inf])
    assert losses.kl(certain, ONE_TO_FIVE) == pytest.approx(math.log(4))


def test_listnet_by_hand():
    """Scores ln 1 and ln 3 make a target (1/4, 0, 3/4)."""
    expected = math.log(8) / 4 + 3 * math.log(8 / 5) / 4
    assert losses.listnet(ONE_TO_FIVE, {0: 0.0, 2: math.log(3)}) == pytest.approx(expected)
    assert losses.listnet(ONE_TO_FIVE, {2: 900 + math.log(3), 0: 900.0}) == pytest.approx(expected)


def test_listnet_of_one_word_is_cross_entropy():
    logits = normal(6)
    for score in (-3.0, 5.0):
        assert losses.listnet(logits, {4: score}) == pytest.approx(losses.cross_entropy(logits, 4))


def test_listnet_is_kl_plus_the_entropy_of_the_target():
    logits, scores = normal(2, 6)
    target = probabilities(scores)
    entropy = -np.sum(target * np.log(target))
    got = losses.listnet(logits, dict(enumerate(scores)))
    assert got == pytest.approx(losses.kl(scores, logits) + entropy)


def test_listnet_without_words_is_refused():
    with pytest.raises(ValueError, match="no word has a score"):
        losses.listnet(ONE_TO_FIVE, {})


def test_smooth_l1_by_hand():
    """Differences 0.5, -3, 1, 1.5: (0.125 + 2.5 + 0.5 + 1) / 4."""
    got = losses.smooth_l1(np.array([0.5, -1.0, 3.0, 8.5]), np.array([0.0, 2.0, 2.0, 7.0]))
    assert got == pytest.approx(4.125 / 4)


def test_weighted_sums_by_hand():
    values = np.array([[[1.0, 2.0], [3.0, np.nan]], [[10.0, 20.0], [30.0, 40.0]]])
    weights = np.array([[[1.0, 0.5], [2.0, 0.0]], [[0.0, 0.0], [0.25, 1.0]]])
    sums, totals = losses.weighted_sums(values, weights)
    np.testing.assert_allclose(sums, [1 + 1 + 6, 7.5 + 40])
    np.testing.assert_allclose(totals, [3.5, 1.25])


# ---------------------------------------------------------------------------------------------------------------
# gradients


def test_numerical_gradient_of_known_functions():
    x = normal(2, 3)
    kept = x.copy()
    got = losses.numerical_gradient(lambda a: np.sum(np.sin(a) * [[1.0], [2.0]]), x)
    np.testing.assert_allclose(got, np.cos(x) * [[1.0], [2.0]], atol=1e-9)
    np.testing.assert_array_equal(x, kept)
    assert losses.numerical_gradient(lambda a: float(a**3), 2.0) == pytest.approx(12)


def test_gradients_of_the_losses():
    """Against the closed forms: q - target for the cross-entropies, and the derivative of |p - q| through softmax."""
    logits, teacher, scores = normal(3, 5)
    q, p, t = probabilities(logits), probabilities(teacher), probabilities(scores)
    log_z = math.log(np.exp(logits).sum())
    signs = np.sign(q - p)
    target = np.eye(5)[3]
    for name, f, expected in (
        ("cross-entropy", lambda x: losses.cross_entropy(x, 3, 0.1), q - target + 0.2 * log_z * q),
        ("KL", lambda x: losses.kl(teacher, x), q - p),
        ("ListNet", lambda x: losses.listnet(x, dict(enumerate(scores))), q - t),
        ("total variation", lambda x: losses.total_variation(x, teacher), q * (signs - signs @ q) / 2),
        ("smooth L1", lambda x: losses.smooth_l1(x, np.zeros(5)), np.clip(logits, -1, 1) / 5),
    ):
        got = losses.numerical_gradient(f, logits)
        np.testing.assert_allclose(got, expected, atol=1e-9, err_msg=name)


# ---------------------------------------------------------------------------------------------------------------
# token order prediction


def test_top_scores_of_a_sentence():
    """the=0 cat=1 saw=2 dog=3: "the cat saw the dog", "the dog" and one padding."""
    tokens, segment_ids = [0, 1, 2, 0, 3, 0, 3, 0], [1, 1, 1, 1, 1, 2, 2, 0]
    expected = [
        {1: 3.0, 2: 2.0, 0: 1.0},
        {2: 3.0, 0: 2.0, 3: 1.0},
        {0: 3.0, 3: 2.0},
        {3: 3.0},
        {},
        {3: 3.0},
        {},
        {},
    ]
    for i in range(8):
        assert top.scores(tokens, segment_ids, i, 3) == expected[i], i


def test_top_scores_take_the_nearest_occurrence():
    assert top.scores([9, 5, 5, 6, 5], [1] * 5, 0, 4) == {5: 4.0, 6: 2.0}
    assert top.scores([9, 5, 5, 6, 5], [1] * 5, 0, 2) == {5: 2.0}


def test_top_scores_by_looking_for_each_word():
    rng = np.random.default_rng(1)
    tokens, window = rng.integers(0, 5, 20), 6
    segment_ids = np.repeat([1, 2, 3, 0], [9, 4, 5, 2])
    for i in range(18):
        end = {1: 9, 2: 13, 3: 18}[segment_ids[i]]
        following = list(tokens[i + 1 : min(i + 1 + window, end)])
        expected = {word: window - following.index(word) for word in set(following)}
        assert top.scores(tokens, segment_ids, i, window) == expected, i
    assert top.scores(tokens, segment_ids, 18, window) == {}, "padding"


def test_top_loss_of_window_one_is_cross_entropy_of_the_next_token():
    B, T, D, V = 2, 6, 3, 5
    tokens = np.random.default_rng(2).integers(0, V, (B, T + 1 + 2))
    segment_ids = np.array([[1, 1, 1, 2, 0, 0, 0, 0, 0], [1] * 9])
    hidden, unembed = normal(B, T, D), normal(D, V)
    built = targets.build(tokens[:, : T + 1], segment_ids[:, : T + 1], 0)
    expected = depth_sums(hidden @ unembed, built.targets[0], built.valid[0])
    total, count = top.top_loss_sum(hidden, unembed, tokens, segment_ids, 1, T)
    assert count == expected["count"] == 2 + 6
    assert total == pytest.approx(expected["nll"])


def test_top_loss_by_hand():
    """Uniform logits: the loss is ln V whatever the scores; then one position with scores 2 and 1."""
    tokens, segment_ids = np.array([[0, 1, 2, 3]]), np.array([[1, 1, 1, 2]])
    total, count = top.top_loss_sum(np.zeros((1, 2, 2)), np.ones((2, 4)), tokens, segment_ids, 2, 2)
    assert (total, count) == (pytest.approx(2 * math.log(4)), 2)
    hidden, unembed = np.array([[[1.0, 0.0]]]), np.log([[1.0, 2.0, 4.0, 1.0], [9.0, 9.0, 1.0, 1.0]])
    total, count = top.top_loss_sum(hidden, unembed, tokens, segment_ids, 2, 1)
    near = math.e**2 / (math.e**2 + math.e)
    assert (total, count) == (pytest.approx(near * math.log(8 / 2) + (1 - near) * math.log(8 / 4)), 1)


# ---------------------------------------------------------------------------------------------------------------
# next-latent prediction

B, T, D, V, M, DEPTH = 2, 5, 3, 7, 4, 2
SEGMENT_IDS = np.array([[1, 1, 1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 2, 2, 0, 0]])
TOKENS = np.random.default_rng(3).integers(0, V, (B, T + 1 + DEPTH))
EMBEDDING, UNEMBED = normal(V, D, seed=4), normal(D, V, seed=5)


def embed(word):
    return EMBEDDING[word]


def head(h):
    return h @ UNEMBED


def nextlat_params(seed=6):
    rng = np.random.default_rng(seed)
    layers = [rng.standard_normal(shape) / 2 for shape in ((2 * D, M), (M, M), (M, D))]
    return {"norm": {"scale": rng.uniform(0.5, 1.5, 2 * D)}, "layers": layers}


def test_gelu_by_hand():
    x = np.array([0.0, 1.0, -1.0])
    np.testing.assert_allclose(nextlat.gelu(x), [0, 0.8413447460685429, -0.15865525393145707])
    np.testing.assert_allclose(nextlat.gelu(x, True), [0, 0.8411919906082768, -0.1588080093917232])


def test_nextlat_by_hand():
    """d = 1, m = 1: one step of (h, e) = (3, 4), whose rms is 5 / sqrt 2, and the next of (p_1, -1)."""
    params = {
        "norm": {"scale": np.array([1.0, 2.0])},
        "layers": [np.ones((2, 1)), np.full((1, 1), 2.0), np.full((1, 1), 2.0)],
    }
    vectors = {0: np.array([100.0]), 1: np.array([4.0]), 2: np.array([-1.0])}
    tokens = np.array([[0, 1, 2, 0]])
    first, second = nextlat.hidden_states(params, np.array([[[3.0]]]), lambda w: vectors[w], tokens, 2)

    def phi(x):
        return x * (1 + math.erf(x / math.sqrt(2))) / 2

    p = 3.0 + 2 * phi(2 * phi((3 + 2 * 4) / math.sqrt(12.5)))
    np.testing.assert_allclose(first, [[[p]]], rtol=1e-6)
    p += 2 * phi(2 * phi((p - 2) / math.sqrt((p**2 + 1) / 2)))
    np.testing.assert_allclose(second, [[[p]]], rtol=1e-6)


def test_nextlat_without_its_last_layer_is_the_identity():
    params, h = nextlat_params(), normal(B, T, D)
    params["layers"][2] = np.zeros((M, D))
    for p in nextlat.hidden_states(params, h, embed, TOKENS, DEPTH):
        np.testing.assert_array_equal(p, h)


def test_nextlat_unrolls_one_step_on_its_own_predictions():
    """Depth 2 at i is depth 1 of a row that starts one token later and holds p_1 as its hidden states."""
    params, h = nextlat_params(), normal(B, T, D)
    first, second = nextlat.hidden_states(params, h, embed, TOKENS, 2)
    (again,) = nextlat.hidden_states(params, first, embed, TOKENS[:, 1:], 1)
    np.testing.assert_array_equal(second, again)
    assert np.abs(second - first).max() > 1e-2


def test_nextlat_takes_the_norm_and_the_activation_it_is_given():
    params, h = nextlat_params(), normal(B, T, D)
    plain = nextlat.hidden_states(params, h, embed, TOKENS, 1)[0]
    tanh = nextlat.hidden_states(params, h, embed, TOKENS, 1, approximate_gelu=True)[0]
    assert 1e-6 < np.abs(plain - tanh).max() < 1e-2
    inner = rms_norm(params["norm"], np.concatenate([h, EMBEDDING[TOKENS[:, 1 : T + 1]]], axis=-1), 1e-6)
    for weights in params["layers"][:2]:
        inner = nextlat.gelu(inner @ weights, True)
    np.testing.assert_allclose(tanh, h + inner @ params["layers"][2])
    coarse = nextlat.hidden_states(params, h, embed, TOKENS, 1, norm=lambda p, x: rms_norm(p, x, 1.0))[0]
    assert np.abs(plain - coarse).max() > 1e-2
    zeroed = nextlat.hidden_states(params, h, embed, TOKENS, 1, norm=lambda _, x: np.zeros_like(x))[0]
    np.testing.assert_array_equal(zeroed, h)
    arguments = (params, h, head, embed, TOKENS, SEGMENT_IDS, 1)
    usual = nextlat.losses(*arguments)[0]
    for options in ({"approximate_gelu": True}, {"norm": lambda p, x: rms_norm(p, x, 1.0)}):
        other = nextlat.losses(*arguments, **options)[0]
        for name in ("smooth_l1", "kl", "nll"):
            assert abs(other[name] - usual[name]) > 1e-6, (name, options)


def test_nextlat_counts_by_hand():
    """Row 0 has documents of 5 and 3 tokens, row 1 of 2 and 4, then padding; T = 5.

    Tokens: depth 1 row 0 i = 0, 1, 2 of document one (x[2], x[3], x[4]); row 1 i = 2, 3 (x[4], x[5]). Depth 2: row 0
    i = 0, 1; row 1 i = 2. There is a hidden state to compare with at all of them: h[1] .. h[3], h[3], h[4]; and h[2],
    h[3], h[4].
    """
    got = nextlat.losses(nextlat_params(), normal(B, T, D), head, embed, TOKENS, SEGMENT_IDS, DEPTH)
    assert [(s["token_count"], s["latent_count"]) for s in got] == [(5, 5), (3, 3)]
    one_document = np.ones_like(SEGMENT_IDS)
    got = nextlat.losses(nextlat_params(), normal(B, T, D), head, embed, TOKENS, one_document, DEPTH)
    assert [(s["token_count"], s["latent_count"]) for s in got] == [(10, 8), (10, 6)]
    got = nextlat.losses(nextlat_params(), normal(B, T, D), head, embed, TOKENS, 0 * one_document, DEPTH)
    assert [(s["token_count"], s["latent_count"]) for s in got] == [(0, 0), (0, 0)], "padding"


def test_nextlat_latent_target_is_of_the_same_document():
    """If an id returns after another document, h[i + j] may be foreign though x[i + 1 + j] has i's id."""
    assert nextlat.token_valid([1, 2, 1], 0, 1)
    assert not nextlat.latent_valid([1, 2, 1], 0, 1, 2)
    assert nextlat.latent_valid([1, 1, 1], 0, 1, 2)


@pytest.mark.parametrize("segment_ids", [SEGMENT_IDS, np.ones_like(SEGMENT_IDS)])
def test_nextlat_token_targets_are_those_of_the_depth(segment_ids):
    params, h = nextlat_params(), normal(B, T, D)
    predictions = nextlat.hidden_states(params, h, embed, TOKENS, DEPTH)
    got = nextlat.losses(params, h, head, embed, TOKENS, segment_ids, DEPTH)
    built = targets.build(TOKENS, segment_ids, DEPTH)
    for j in range(1, DEPTH + 1):
        expected = depth_sums(predictions[j - 1] @ UNEMBED, built.targets[j], built.valid[j])
        assert got[j - 1]["token_count"] == expected["count"]
        assert got[j - 1]["nll"] == pytest.approx(expected["nll"])


def test_nextlat_of_constant_hidden_states_has_no_latent_loss():
    """p_j = h_i = h_{i + j}; the token's loss is that of the head on it."""
    params, h = nextlat_params(), np.broadcast_to(normal(D), (B, T, D))
    params["layers"][2] = np.zeros((M, D))
    for j, sums in enumerate(nextlat.losses(params, h, head, embed, TOKENS, SEGMENT_IDS, DEPTH), 1):
        assert sums["smooth_l1"] == 0.0
        assert sums["kl"] == pytest.approx(0, abs=1e-14)
        places = [(0, 0), (0, 1), (0, 2), (1, 2), (1, 3)] if j == 1 else [(0, 0), (0, 1), (1, 2)]
        expected = -sum(math.log(probabilities(head(h[0, 0]))[TOKENS[b, i + 1 + j]]) for b, i in places)
        assert sums["nll"] == pytest.approx(expected)


def test_nextlat_latent_losses_by_hand():
    """The identity on h = (0), (1), (3): distances 1 and 2 at depth 1, 3 at depth 2; the head's logits are (h, 0)."""
    params = {"norm": {"scale": np.ones(2)}, "layers": [np.zeros((2, 1)), np.zeros((1, 1)), np.zeros((1, 1))]}
    h, tokens = np.array([[[0.0], [1.0], [3.0]]]), np.zeros((1, 6), int)
    got = nextlat.losses(
        params, h, lambda v: np.array([v[0], 0.0]), lambda _: np.zeros(1), tokens, np.ones((1, 6), int), 2
    )

    def kl(target, prediction):
        p, q = (1 / (1 + math.exp(-x)) for x in (target, prediction))
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

    assert [s["smooth_l1"] for s in got] == pytest.approx([0.5 + 1.5, 2.5])
    assert [s["kl"] for s in got] == pytest.approx([kl(1, 0) + kl(3, 1), kl(3, 0)])
    assert [(s["latent_count"], s["token_count"]) for s in got] == [(2, 3), (1, 3)]


def test_nextlat_gradient_stops_at_the_targets():
    """Hidden state 1 moves its own predictions only: with T = 2 the latent losses of depth 1 come from position 0."""
    params, h = nextlat_params(), normal(1, 2, D)
    tokens, segment_ids = TOKENS[:1, :4], np.ones((1, 4), int)

    def loss_of(target_h, name):
        def f(moved):
            arguments = (params, moved, head, embed, tokens, segment_ids, 1)
            return nextlat.losses(*arguments, target_h_BTD=target_h, teacher_head_fn=head)[0][name]

        return losses.numerical_gradient(f, h)

    for name in ("smooth_l1", "kl"):
        stopped, through = loss_of(h, name), loss_of(None, name)
        np.testing.assert_array_equal(stopped[0, 1], np.zeros(D))
        assert np.abs(through[0, 1]).max() > 1e-3
        np.testing.assert_allclose(stopped[0, 0], through[0, 0], atol=1e-9)
        assert np.abs(stopped[0, 0]).max() > 1e-3


def test_nextlat_gradient_stops_at_the_teacher_head():
    """With the teacher's head held, KL's derivative by the unembedding is sum p_j (q - p) over positions."""
    params, h = nextlat_params(), normal(1, 2, D)
    tokens, segment_ids = TOKENS[:1, :4], np.ones((1, 4), int)

    def f(unembed):
        arguments = (params, h, lambda v: v @ unembed, embed, tokens, segment_ids, 1)
        return nextlat.losses(*arguments, teacher_head_fn=head)[0]["kl"]

    prediction = nextlat.hidden_states(params, h, embed, tokens, 1)[0][0, 0]
    expected = np.outer(prediction, probabilities(head(prediction)) - probabilities(head(h[0, 1])))
    np.testing.assert_allclose(losses.numerical_gradient(f, UNEMBED), expected, atol=1e-8)
