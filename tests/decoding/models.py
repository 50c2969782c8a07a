"""Tiny models with random weights, and their predictions for whole rows, without caches.

Shape letters: B rows, N tokens, T positions, K depths (1 + extra), V vocabulary.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax import sharding, targets
from mtp_jax.config import (
    Config,
    DataConfig,
    LocalConfig,
    MeshConfig,
    ModelConfig,
    MTPConfig,
    RopeConfig,
    conventions,
)
from mtp_jax.config.schema import ParallelConfig
from mtp_jax.decoding.generator import Generator
from mtp_jax.model import abstract_model
from mtp_jax.mtp import kind_of
from tests.bridge import to_model
from tests.reference.params import random_params

MLA = ModelConfig(
    vocab_size=16,
    num_layers=2,
    embed_dim=16,
    num_heads=2,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=6,
    num_kv_heads=1,
    head_dim=8,
    ffn_dim=20,
)
EXPERTS: dict[str, Any] = {"num_experts": 4, "expert_dim": 8, "routed_scaling_factor": 1.7}
MOE = replace(MLA, **EXPERTS)
GQA = replace(MLA, attention="gqa", rope=RopeConfig(interleaved=False))


WINDOW: dict[str, Any] = {  # layers of different shapes, and a ring that turns many times
    "num_layers": 4,
    "local": LocalConfig(window=5, pattern="LG", rope_theta=30.0, num_kv_heads=2, sinks=True),
}


def sequential(depth, **fields):
    return MTPConfig(kind="sequential", depth=depth, **fields)


def parallel(depth, **fields):
    """Heads beside the whole main model, so that it is the same at every depth."""
    return MTPConfig(kind="parallel", depth=depth, parameter_matched=False, **fields)


def markov(depth, rank=3):
    """Parallel heads with a Markov head."""
    return parallel(depth, parallel=ParallelConfig(markov_rank=rank))


@dataclass(frozen=True)
class Built:
    """reference: the oracle's parameters. params, biases: the same, as the model's."""

    config: Config
    reference: Any
    params: Any
    biases: Any

    def decoder(self, mesh=None, draft_vocabulary=None):
        """Over one device, or all of a MeshConfig."""
        devices = jax.devices() if mesh else jax.devices()[:1]
        mesh = sharding.make_mesh(mesh or MeshConfig(), devices)
        return Generator(self.config, self.params, self.biases, mesh, draft_vocabulary)

    def logits(self, tokens_BN):
        """[B, T, K, V] of every depth, T = N - D, as `MTPModel` computes them in training."""
        return np.asarray(_logits(self.config.architecture, self.params, self.biases, jnp.asarray(tokens_BN)))

    def main_logits(self, tokens_BN):
        """[B, N, V] of the next-token model."""
        return np.asarray(_main_logits(self.config.architecture, self.params, self.biases, jnp.asarray(tokens_BN)))


def build(model, mtp=None, context=512, seed=0, blocks=1.0):
    """A model whose main part depends on the seed alone, whatever its extra depths.

    Args:
      blocks: how much they add to the residual stream. With little, and modules that hand on the embedding, sequential
        depths often predict as the main model will, and not always.
    """
    config = Config(model=model, mtp=mtp or MTPConfig(), data=DataConfig(sequence_length=context))
    reference = random_params(config, kind_of(config).num_main_layers, conventions(config.mtp).output_norm, seed)
    if blocks < 1:
        reference = _damped(reference, blocks)
    return Built(config, reference, *to_model(reference))


def _damped(tree, by):
    """Outputs of attention and feed-forward scaled; projections near the identity on the first half, the embedding."""
    out = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            out[name] = _damped(value, by)
        elif name == "projection":
            first = np.arange(value.shape[1])[:, None] == np.arange(value.shape[2])
            out[name] = by * value + first
        else:
            out[name] = by * value if name in ("o", "down") else value
    return out


def prompts_of(lengths, vocab_size, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, length) for length in lengths]


@functools.partial(jax.jit, static_argnums=0)
def _logits(architecture, params, biases, tokens_BN):
    model = abstract_model(architecture).merge(params, biases)
    hidden_KBTD = model(targets.one_document_rows(tokens_BN, kind_of(architecture).depth)).hidden
    return jnp.einsum("kbtd,dv->btkv", hidden_KBTD, model.head())


@functools.partial(jax.jit, static_argnums=0)
def _main_logits(architecture, params, biases, tokens_BN):
    model = abstract_model(architecture).merge(params, biases)
    return model.main(targets.one_document_rows(tokens_BN, 0)) @ model.main_head()
