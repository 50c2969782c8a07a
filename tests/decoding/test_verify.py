"""Speculation changes no probability: what `verify` lets through has the distribution of the main model.

Shape letters: N rows, B = N, K drafts, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.decoding.samplers import GREEDY, make_sampler
from mtp_jax.decoding.verify import verify
from tests.decoding.statistics import LIKELY, count_rows, p_value
from tests.reference import decoding as oracle

NUM_ROWS = 100_000


class Case:
    """A main model and a drafting one over V tokens, each with logits that depend on the token before.

    p, q: functions from the tokens before to probabilities, by the definitions. draft: [V + 1, V] raw logits after each
    token, the last row for no token before; so is main.
    """

    def __init__(self, num_speculative_tokens, vocab, numbers, quality, seed=0):
        rng = np.random.default_rng(seed)
        self.num_speculative_tokens, self.vocab, self.numbers = num_speculative_tokens, vocab, numbers
        self.main = rng.normal(0, 1.2, (vocab + 1, vocab))
        noise = rng.normal(0, 1.2, self.main.shape)
        self.draft = {
            "good": self.main,
            "near": self.main + 0.5 * noise,
            "reversed": -self.main,
            "disjoint": 4 * noise - 3 * self.main,
            "one-hot": np.where(np.arange(vocab) == np.argmax(self.main + 0.5 * noise, 1)[:, None], 0.0, -np.inf),
        }[quality]
        self.p = self._table(self.main)
        self.q = self._table(self.draft) if quality != "one-hot" else (lambda before: oracle.softmax(self._row(before)))

    def _table(self, logits):
        probs = [oracle.distribution(row, *self.numbers) for row in logits]
        return lambda before: probs[before[-1] if before else -1]

    def _row(self, before):
        return self.draft[before[-1] if before else -1]

    def run(self, seed=1, num_drafts=None):
        """(num_accepted [N], tokens of each step [N, K + 1], -1 behind its end).

        Args:
          num_drafts: (drafts [N, K], their distributions [N, K, V]) -> number of them to verify [N]; None: all.
        """
        rng = np.random.default_rng(seed)
        drafts = np.zeros((NUM_ROWS, self.num_speculative_tokens), int)
        last = np.full(NUM_ROWS, self.vocab)
        tables = np.array([self.q((v,)) for v in range(self.vocab)] + [self.q(())])
        for k in range(self.num_speculative_tokens):
            u = rng.random((NUM_ROWS, 1))
            drafts[:, k] = np.minimum((tables[last].cumsum(1) < u).sum(1), self.vocab - 1)
            last = drafts[:, k]
        before = np.concatenate([np.full((NUM_ROWS, 1), self.vocab), drafts], axis=1)
        sampler = make_sampler(*self.numbers)
        with np.errstate(divide="ignore"):
            draft_logits = np.log(tables)[before[:, :-1]]
        stops = None if num_drafts is None else jnp.asarray(num_drafts(drafts, tables[before[:, :-1]]), jnp.int32)
        verdict = _verify(
            sampler,
            jnp.asarray(self.main[before], jnp.float32),
            jnp.asarray(drafts, jnp.int32),
            jnp.asarray(draft_logits, jnp.float32),
            jax.random.split(jax.random.key(seed), NUM_ROWS),
            stops,
        )
        num = np.asarray(verdict.num_accepted_B)
        index = np.arange(self.num_speculative_tokens + 1)
        padded = np.concatenate([drafts, drafts[:, :1]], axis=1)
        emitted = np.where(index == num[:, None], np.asarray(verdict.next_B)[:, None], padded)
        return num, np.where(index <= num[:, None], emitted, -1)


_verify = jax.jit(verify)

PLAIN, COLD, NUCLEUS, LIMITED = (1.0, None, None), (0.6, None, None), (1.0, None, 0.75), (1.4, 4, 0.9)
CASES = [
    *((1, 8, numbers, "reversed") for numbers in (PLAIN, LIMITED)),
    *((2, 5, PLAIN, quality) for quality in ("reversed", "disjoint")),
    (1, 5, NUCLEUS, "one-hot"),
    (2, 5, LIMITED, "near"),
    *((3, 5, numbers, "near") for numbers in (COLD, NUCLEUS)),
    (3, 5, PLAIN, "one-hot"),
]


@functools.cache
def written(*case):
    case = Case(*case)
    return case, *case.run()


def name_of(case):
    return "-".join(map(str, case)).replace(" ", "").replace("None", "")


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_what_is_written_is_distributed_as_without_drafts(case):
    """The first token as p, the second after each first as p of that prefix, and so on; and the whole step, its length
    included, as following every draft and every verdict gives."""
    case, num, emitted = written(*case)
    for place in range(case.num_speculative_tokens + 1):
        reached = emitted[emitted[:, place] >= 0][:, : place + 1]
        counts = count_rows(reached, case.vocab).reshape(-1, case.vocab)
        for prefix_index in np.flatnonzero(counts.sum(1)):
            prefix = np.unravel_index(prefix_index, (case.vocab,) * place) if place else ()
            if counts[prefix_index].sum() > 200:
                value = p_value(counts[prefix_index], case.p(tuple(map(int, prefix))))
                assert value > LIKELY / 100, (place, prefix, value)  # up to 150 questions a case
    steps = oracle.speculative_step(case.p, case.q, case.num_speculative_tokens)
    names = {tokens: i for i, tokens in enumerate(steps)}
    seen = [names.get(tuple(int(t) for t in row if t >= 0), len(names)) for row in emitted]
    counts = np.bincount(seen, minlength=len(names) + 1)
    assert p_value(counts, [*steps.values(), 0.0]) > LIKELY


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_drafts_are_kept_as_often_as_p_and_q_overlap(case):
    """sum_x min(p(x), q(x)), of the first draft and of the second where the first was kept."""
    case, num, emitted = written(*case)
    assert_rate((num > 0).mean(), np.minimum(case.p(()), case.q(())).sum(), NUM_ROWS)
    if case.num_speculative_tokens > 1:
        for v in range(case.vocab):
            kept = (num > 0) & (emitted[:, 0] == v)
            if kept.sum() > 200:
                assert_rate((num[kept] > 1).mean(), np.minimum(case.p((v,)), case.q((v,))).sum(), kept.sum())


@pytest.mark.parametrize(("num_speculative_tokens", "numbers"), [(1, NUCLEUS), (3, PLAIN)], ids=["one", "three"])
def test_drafts_of_the_main_model_itself_are_all_kept(num_speculative_tokens, numbers):
    case = Case(num_speculative_tokens, 7, numbers, "good")
    num, emitted = case.run()
    assert (num == num_speculative_tokens).mean() > 1 - 1e-4  # float32 logarithms on the way to `verify`
    counts = count_rows(emitted[num == num_speculative_tokens][:, :2], case.vocab)
    assert p_value(counts, [case.p(()) * 0 + case.p(())[a] * case.p((a,)) for a in range(7)]) > LIKELY


def test_a_draft_outside_the_nucleus_is_never_kept():
    """top_p limits what is written, whatever its source: drafts from another sampler's tail are replaced."""
    main = np.array([3.0, 2.0, 0.0, -1.0, -1.0])
    p = oracle.distribution(main, 1.0, None, 0.8)
    out_of_it = int(np.flatnonzero(p == 0)[0])
    shape = (1000, 1)
    q = np.full((*shape, 5), -np.inf, np.float32)
    q[..., out_of_it] = 0.0
    verdict = _verify(
        make_sampler(1.0, None, 0.8),
        jnp.broadcast_to(jnp.asarray(main, jnp.float32), (1000, 2, 5)),
        jnp.full(shape, out_of_it, jnp.int32),
        jnp.asarray(q),
        jax.random.split(jax.random.key(0), 1000),
    )
    assert not np.asarray(verdict.num_accepted_B).any()
    assert p_value(np.bincount(np.asarray(verdict.next_B), minlength=5), p) > LIKELY


def test_a_step_without_drafts_draws_from_the_main_model():
    main = np.array([0.5, -1.0, 2.0, 0.0])
    keys = jax.random.split(jax.random.key(5), NUM_ROWS)
    logits = jnp.broadcast_to(jnp.asarray(main, jnp.float32), (NUM_ROWS, 1, 4))
    verdict = _verify(make_sampler(0.7), logits, jnp.zeros((NUM_ROWS, 0), jnp.int32), None, keys)
    assert not np.asarray(verdict.num_accepted_B).any()
    assert p_value(np.bincount(np.asarray(verdict.next_B), minlength=4), oracle.distribution(main, 0.7)) > LIKELY


@pytest.mark.parametrize("num_speculative_tokens", [1, 2, 3])
def test_greedy_keeps_the_leading_drafts_that_are_the_main_models_choice(num_speculative_tokens):
    rng = np.random.default_rng(num_speculative_tokens)
    logits = rng.normal(size=(500, num_speculative_tokens + 1, 3)).astype(np.float32)
    drafts = rng.integers(0, 3, (500, num_speculative_tokens))
    keys = jax.random.split(jax.random.key(0), 500)
    verdict = _verify(GREEDY, jnp.asarray(logits), jnp.asarray(drafts, jnp.int32), None, keys)
    for b in range(500):
        num = 0
        while num < num_speculative_tokens and int(np.argmax(logits[b, num])) == drafts[b, num]:
            num += 1
        assert (verdict.num_accepted_B[b], verdict.next_B[b]) == (num, np.argmax(logits[b, num]))


def test_the_oracle_keeps_the_distribution():
    """The theorem of 2211.17192, appendix A.1, on the enumeration that the other tests measure by."""
    case = Case(2, 4, NUCLEUS, "reversed")
    steps = oracle.speculative_step(case.p, case.q, 2)
    assert sum(steps.values()) == pytest.approx(1)
    first = [sum(chance for tokens, chance in steps.items() if tokens[0] == v) for v in range(4)]
    np.testing.assert_allclose(first, case.p(()), atol=1e-12)
    for a in range(4):
        second = np.array([sum(c for t, c in steps.items() if t[:2] == (a, v)) for v in range(4)])
        if second.sum():
            np.testing.assert_allclose(second / second.sum(), case.p((a,)), atol=1e-12)


def assert_rate(found, rate, num):
    assert abs(found - rate) <= 4 * np.sqrt(rate * (1 - rate) / num) + 1e-9, (found, rate)


def by_distribution(drafts, q_NKV):
    """A draft is verified while the likeliest token of each distribution has more than 0.5."""
    return np.cumprod(q_NKV.max(-1) > 0.5, axis=1).sum(1)


def by_token(drafts, q_NKV):
    """A wrong rule: a draft is verified while the sampled tokens themselves have more than 0.2."""
    return np.cumprod(np.take_along_axis(q_NKV, drafts[..., None], axis=-1)[..., 0] > 0.2, axis=1).sum(1)


@pytest.mark.parametrize(("rule", "is_right"), [(by_distribution, True), (by_token, False)], ids=["right", "wrong"])
def test_a_stop_may_depend_on_distributions_and_not_on_the_token_it_discards(rule, is_right):
    """The first token, and the second after each first, have the distribution p; not so with a wrong rule."""
    case = Case(2, 5, PLAIN, "near", seed=3)
    num, emitted = case.run(num_drafts=rule)
    assert set(num) == {0, 1, 2}
    found = [p_value(count_rows(emitted[:, :1], 5), case.p(()))]
    reached = emitted[emitted[:, 1] >= 0]
    counts = count_rows(reached[:, :2], 5)
    found += [p_value(counts[v], case.p((v,))) for v in range(5) if counts[v].sum() > 200]
    assert (min(found) > LIKELY / 10) == is_right, found
