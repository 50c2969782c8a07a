"""Text from a model without caches: the whole row is run again for every token. Sampling as plain loops.

Speculative decoding as in 2211.17192 and 2302.01318, with drafts by the extra depths (2412.19437, section 2.2;
2404.19737, section 2). A text is a list of token ids, x[0] .. x[n], and n = len(text) - 1 its last position.
"""

from typing import NamedTuple

import numpy as np

from tests.reference.model import forward


def next_logits(params, config, conventions, text):
    """[V]: the main model's logits of x[n + 1]."""
    return _at(params, config, conventions, text, 0, len(text) - 1)


def draft_logits(params, config, conventions, text, drafts):
    """[V]: prediction of depth k = 1 + len(drafts) for x[n + k], given the text and the k - 1 drafts after it.

    Depth k at position i predicts x[i + 1 + k], so it is position n - 1 that predicts x[n + k]. A sequential module
    reads x[i + k], which is the newest draft there, and the hidden state of depth k - 1 at i, which has read the draft
    before.
    """
    assert len(text) > 1, "position n - 1 is before the text"
    return _at(params, config, conventions, [*text, *drafts], 1 + len(drafts), len(text) - 2)


def _at(params, config, conventions, tokens, depth, position):
    """Logits of one depth at one position. After the tokens that are given there are zeros, which it cannot see."""
    num_positions = position + 1
    num_extra = 0 if config.mtp.kind == "none" else config.mtp.depth
    row = np.zeros((1, num_positions + 1 + num_extra), int)
    row[0, : len(tokens)] = tokens
    positions = np.arange(num_positions)[None]
    return forward(params, config, row, np.ones_like(row), positions, conventions)["logits"][depth, 0, position]


def greedy(params, config, conventions, prompt, num_new):
    """The `num_new` tokens after the prompt, each the likeliest."""
    text = list(prompt)
    for _ in range(num_new):
        text.append(int(np.argmax(next_logits(params, config, conventions, text))))
    return text[len(prompt) :]


class Speculated(NamedTuple):
    """tested, accepted: int[K], drafts of each place in the step that were judged, and kept."""

    tokens: list
    num_speculative_steps: int
    tested: np.ndarray
    accepted: np.ndarray


def speculative_greedy(params, config, conventions, prompt, num_new, num_speculative_tokens):
    """The same text, a step at a time: K drafts, the leading ones that the main model agrees with, and its next token.

    A draft counts as judged if those before it were kept and the text has room for it.
    """
    text, num_speculative_steps = list(prompt), 0
    tested, accepted = np.zeros(num_speculative_tokens, int), np.zeros(num_speculative_tokens, int)
    while len(text) < len(prompt) + num_new:
        drafts = []
        for _ in range(num_speculative_tokens):
            drafts.append(int(np.argmax(draft_logits(params, config, conventions, text, drafts))))
        room = len(prompt) + num_new - len(text)
        for place in range(num_speculative_tokens + 1):
            if place == room:
                break
            choice = int(np.argmax(next_logits(params, config, conventions, text)))
            text.append(choice)
            if place == num_speculative_tokens:
                break
            tested[place] += 1
            if drafts[place] != choice:
                break
            accepted[place] += 1
        num_speculative_steps += 1
    return Speculated(text[len(prompt) :], num_speculative_steps, tested, accepted)


def softmax(logits):
    """exp(l_v) / sum_v exp(l_v); a token of logit -inf has probability 0."""
    weights = [0.0 if logit == -np.inf else np.exp(logit - max(logits)) for logit in logits]
    return np.array([weight / sum(weights) for weight in weights])


def only(logits, kept):
    """The logits of the kept tokens; the others -inf."""
    return np.array([logit if v in kept else -np.inf for v, logit in enumerate(logits)])


def temperature(logits, value):
    """Logits divided by the temperature."""
    return np.array([logit / value for logit in logits])


def top_k(logits, num):
    """The `num` likeliest tokens and whatever is as likely as the last of them."""
    order = sorted(range(len(logits)), key=lambda v: -logits[v])
    last = logits[order[: min(num, len(order))][-1]]
    return only(logits, {v for v in order if logits[v] >= last})


def top_p(logits, mass):
    """Tokens from the likeliest down until their probabilities reach the mass, and what is as likely as the last."""
    probs, reached, kept = softmax(logits), 0.0, []
    for v in sorted(range(len(logits)), key=lambda v: -logits[v]):
        if reached >= mass:
            break
        kept.append(v)
        reached += probs[v]
    last = logits[kept[-1]]
    return only(logits, {v for v in range(len(logits)) if logits[v] >= last})


def distribution(logits, temperature_value, num=None, mass=None):
    """[V]: what a token is drawn from: temperature, then top-k, then top-p."""
    logits = temperature(logits, temperature_value)
    if num is not None:
        logits = top_k(logits, num)
    if mass is not None:
        logits = top_p(logits, mass)
    return softmax(logits)


def speculative_step(target, draft, num_speculative_tokens, prefix=()):
    """Distribution of the tokens that one step emits, over every draft and every verdict: {tokens: probability}.

    Draft x ~ q is kept with probability min(1, p(x) / q(x)). Where it is not, a token from max(p - q, 0), normalised,
    ends the step; where all are kept, one from p does.

    Args:
      target, draft: functions from the tuple of tokens before to the probabilities p, q of the next.
    """
    p = target(prefix)
    if len(prefix) == num_speculative_tokens:
        return {(*prefix, v): p[v] for v in range(len(p)) if p[v] > 0}
    q, out = draft(prefix), {}
    left = [max(p[v] - q[v], 0.0) for v in range(len(p))]
    for x in range(len(q)):
        if q[x] == 0:
            continue
        keeps = min(1.0, p[x] / q[x])
        if keeps > 0:
            for tokens, chance in speculative_step(target, draft, num_speculative_tokens, (*prefix, x)).items():
                out[tokens] = out.get(tokens, 0.0) + q[x] * keeps * chance
        if keeps < 1:
            for v in range(len(p)):
                if left[v] > 0:
                    tokens = (*prefix, v)
                    out[tokens] = out.get(tokens, 0.0) + q[x] * (1 - keeps) * left[v] / sum(left)
    return out
