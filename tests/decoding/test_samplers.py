"""Filters against their definitions, draws against their probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from mtp_jax.config import UserError
from mtp_jax.decoding.samplers import GREEDY, Greedy, Temperature, TopK, TopP, draw, filtered, make_sampler
from tests.decoding.statistics import LIKELY, p_value
from tests.reference import decoding as oracle

V = 6
NUM_DRAWS = 100_000
# Few different values: ties everywhere. The fine ones differ by less than a softmax in float32 resolves.
LOGITS = st.lists(st.sampled_from([-30.0, -2.0, -1.0, 0.0, 0.25, 1.0, 1.0000001, 3.0]), min_size=V, max_size=V)


def is_clear(logits, mass):
    """Returns whether rounding cannot decide which token reaches the mass."""
    probs = np.sort(oracle.softmax(logits))[::-1]
    return np.abs(np.cumsum(probs) - mass).min() > 1e-5


@settings(max_examples=150, deadline=None)
@given(LOGITS, st.integers(1, V + 3))
@example([0.0] * V, 1)
def test_top_k_is_its_definition(logits, num):
    logits = np.array(logits, np.float32)
    found = np.asarray(TopK(num).filter(jnp.asarray(logits)))
    np.testing.assert_array_equal(found, oracle.top_k(logits, num).astype(np.float32))
    num_kept = np.isfinite(found).sum()
    assert num_kept >= min(num, V)
    assert np.sum(logits > found[np.isfinite(found)].min()) < num  # one more only where it is as likely as the last


@settings(max_examples=150, deadline=None)
@given(LOGITS, st.floats(0.01, 1.0))
@example([0.0] * V, 0.4)
@example([3.0, 1.0, 1.0, 1.0, 0.0, 0.0], 0.75)  # the mass is reached within a tie
def test_top_p_is_its_definition(logits, mass):
    logits = np.array(logits, np.float32)
    assume(is_clear(logits.astype(float), mass))
    found = np.asarray(TopP(mass).filter(jnp.asarray(logits)))
    np.testing.assert_array_equal(found, oracle.top_p(logits.astype(float), mass).astype(np.float32))
    probs, kept = oracle.softmax(logits.astype(float)), np.isfinite(found)
    assert probs[kept].sum() >= mass - 1e-5  # reached, and not without the last
    assert probs[logits > logits[kept].min()].sum() < mass


@settings(max_examples=100, deadline=None)
@given(LOGITS, st.floats(0.1, 3.0), st.none() | st.integers(1, V), st.none() | st.floats(0.05, 0.99))
def test_steps_are_applied_in_the_usual_order(logits, temperature, num, mass):
    logits = np.array(logits, np.float32)
    limited = oracle.temperature(logits.astype(float), temperature)
    limited = limited if num is None else oracle.top_k(limited, num)
    # Tokens so close that the division makes them equal are another question than the one asked here.
    apart = np.diff(np.unique(logits))
    assume(not len(apart) or apart.min() > 1e-3)
    assume(mass is None or is_clear(limited, mass))
    found = jax.nn.softmax(filtered(make_sampler(temperature, num, mass), jnp.asarray(logits)))
    np.testing.assert_allclose(found, oracle.distribution(logits.astype(float), temperature, num, mass), atol=1e-5)


def test_limits_that_reach_everything_rule_out_nothing():
    logits = jnp.array([[0.0, -8.0, 5.0, 5.0, -6.0, 1.0]])  # each more than float32 can overlook beside 1
    for limit in (TopK(V), TopK(V + 1), TopP(1.0)):
        np.testing.assert_array_equal(limit.filter(logits), logits)


def test_greedy_is_the_first_of_the_likeliest():
    logits = jnp.array([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    kept = np.isfinite(np.asarray(Greedy().filter(logits)))
    np.testing.assert_array_equal(kept, [[False, True, False, False], [True, False, False, False]])
    assert make_sampler(0.0) == GREEDY and make_sampler() == GREEDY


@pytest.mark.parametrize(
    ("temperature", "num", "mass"),
    [(0.3, None, None), (1.0, None, None), (2.5, None, None), (1.0, None, 0.6), (0.8, 4, 0.9), (1.5, 3, None)],
)
def test_draws_have_the_probabilities_of_the_definition(temperature, num, mass):
    logits = np.array([1.0, -0.5, 0.3, 2.0, 0.3, -1.5])
    keys = jax.random.split(jax.random.key(3), NUM_DRAWS)
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (NUM_DRAWS, V))
    drawn = np.asarray(_draw(make_sampler(temperature, num, mass), rows, keys))
    counts = np.bincount(drawn, minlength=V)
    assert p_value(counts, oracle.distribution(logits, temperature, num, mass)) > LIKELY
    assert p_value(counts, oracle.distribution(logits, temperature * 1.1, num, mass)) < LIKELY  # it could tell


def test_a_row_draws_by_its_own_key_alone():
    keys = jax.random.split(jax.random.key(0), 200)
    logits = jax.random.normal(jax.random.key(1), (200, V))
    all_rows = np.asarray(draw(logits, keys))
    np.testing.assert_array_equal(draw(logits[50:60], keys[50:60]), all_rows[50:60])
    assert np.any(np.asarray(draw(logits, keys[::-1])) != all_rows)


def test_other_numbers_are_not_another_program():
    rows, keys = jnp.zeros((2, V)), jax.random.split(jax.random.key(0), 2)
    _draw(make_sampler(0.7, 3, 0.9), rows, keys)
    size = _draw._cache_size()
    for numbers in ((0.9, 3, 0.9), (0.7, 5, 0.9), (1, 3, 0.5), (1.3, 2, 1.0)):
        _draw(make_sampler(*numbers), rows, keys)
    assert _draw._cache_size() == size


UNUSABLE = {
    "temperature that overflows": ((1e-40, None, None), ["temperature=1e-40", "use 0"]),
    "no temperature": ((None, None, None), ["temperature=None"]),
    "half a token": ((1.0, 2.5, None), ["top_k=2.5", "integer"]),
    "negative temperature": ((-0.5, None, None), ["temperature=-0.5", "greedy"]),
    "temperature not a number": ((float("nan"), None, None), ["temperature=nan"]),
    "endless temperature": ((float("inf"), None, None), ["temperature=inf"]),
    "no token": ((1.0, 0, None), ["top_k=0", "at least 1", "leave it out"]),
    "no mass": ((1.0, None, 0.0), ["top_p=0.0", "above 0", "leave it out"]),
    "too much mass": ((1.0, None, 1.5), ["top_p=1.5", "at most 1"]),
    "mass not a number": ((1.0, None, float("nan")), ["top_p=nan"]),
    "top_k beside greedy": ((0.0, 5, None), ["top_k=5", "temperature=0"]),
    "top_p beside greedy": ((0.0, None, 0.9), ["top_p=0.9", "temperature=0"]),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_numbers_that_cannot_be_used_are_one_clear_line(name):
    numbers, words = UNUSABLE[name]
    with pytest.raises(UserError) as caught:
        make_sampler(*numbers)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


@jax.jit
def _draw(sampler, logits, keys):
    return draw(filtered(sampler, logits), keys)


def test_samplers_of_one_structure_are_one_type_of_pytree():
    one, other = make_sampler(0.7, 3, 0.9), make_sampler(1.1, 50, 0.2)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert [type(step) for step in one] == [Temperature, TopK, TopP]


def test_the_smallest_mass_leaves_the_likeliest_token_and_all_of_it_rules_out_none():
    logits = 3 * np.random.default_rng(0).normal(size=(2, 100_000)).astype(np.float32)
    for mass, kept in ((1e-50, 1), (1.0, 100_000)):
        found = np.isfinite(np.asarray(filtered((TopP(jnp.float32(mass)),), jnp.asarray(logits)))).sum(axis=-1)
        np.testing.assert_array_equal(found, kept)
