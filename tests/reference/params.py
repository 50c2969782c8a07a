"""Random parameters of the contract's names and shapes, for any config."""

import numpy as np

from mtp_jax.layers.spec import layer_places
from tests.reference.decoder import of_layer, of_mtp


def random_params(config, num_main_layers, output_norm="own", seed=0):
    """{"trunk", "mtp"} of a model, every matrix N(0, 0.5^2), scales near 1, router biases small but not 0.

    Args:
      config: has .model and .mtp; model.vocab_size is set.
      num_main_layers: blocks on the path to the next token.
      output_norm: "own" or "main", of sequential modules.
    """
    make = _Maker(config.model, np.random.default_rng(seed))
    params = {"trunk": make.decoder(num_main_layers)}
    mtp = config.mtp
    if mtp.kind == "sequential":
        count = 1 if mtp.shared_depths else mtp.depth
        params["mtp"] = stack([make.module(of_mtp(make.model, mtp), mtp, output_norm) for _ in range(count)])
    elif mtp.kind == "parallel":
        is_moe = make.is_moe(config.model.num_layers - 1) and not mtp.dense_ffn
        params["mtp"] = {"block": stack([make.block(of_mtp(make.model, mtp), is_moe) for _ in range(mtp.depth)])}
        if mtp.parallel.markov_rank:
            shape = config.model.vocab_size, mtp.parallel.markov_rank
            params["mtp"]["markov"] = {"w_in": make.matrix(*shape), "w_out": make.matrix(*shape[::-1])}
    return params


def stack(trees):
    """Nested dicts of the same shape, leaf by leaf on a new leading axis."""
    if isinstance(trees[0], dict):
        return {name: stack([tree[name] for tree in trees]) for name in trees[0]}
    return np.stack(trees)


class _Maker:
    def __init__(self, model, rng):
        self.model, self.rng = model, rng

    def matrix(self, *shape):
        return 0.5 * self.rng.standard_normal(shape)

    def norm(self, size):
        return {"scale": 1.0 + 0.1 * self.rng.standard_normal(size)}

    def is_moe(self, layer):
        return self.model.num_experts > 0 and layer >= self.model.num_dense_layers

    def decoder(self, num_layers):
        m = self.model
        out = {"embed": self.matrix(m.vocab_size, m.embed_dim), "final_norm": self.norm(m.embed_dim)}
        stacks = {}
        for layer, (name, _) in enumerate(layer_places(m, num_layers)):
            stacks.setdefault(name, []).append(self.block(of_layer(m, layer), self.is_moe(layer)))
        out |= {name: stack(blocks) for name, blocks in stacks.items()}
        if not m.tie_embeddings:
            out["unembed"] = self.matrix(m.embed_dim, m.vocab_size)
        return out

    def module(self, model, mtp, output_norm):
        D = self.model.embed_dim
        out = {"embed_norm": self.norm(D), "hidden_norm": self.norm(D), "projection": self.matrix(2 * D, D)}
        out["block"] = self.block(model, self.is_moe(self.model.num_layers - 1) and not mtp.dense_ffn)
        if output_norm == "own":
            out["output_norm"] = self.norm(D)
        return out

    def block(self, model, is_moe):
        D = self.model.embed_dim
        return {
            "attention_norm": self.norm(D),
            "attention": self.attention(model),
            "ffn_norm": self.norm(D),
            "ffn": self.moe() if is_moe else self.ffn(self.model.ffn_dim),
        }

    def attention(self, m):
        out = self.mla(m) if m.attention == "mla" else self.gqa(m)
        return out | ({"sinks": self.matrix(m.num_heads)} if m.sinks else {})

    def mla(self, m):
        H, N, R, C = m.num_heads, m.qk_nope_head_dim, m.qk_rope_head_dim, m.kv_lora_rank
        if m.q_lora_rank:
            out = {"q_a": self.matrix(m.embed_dim, m.q_lora_rank), "q_a_norm": self.norm(m.q_lora_rank)}
            out["q_b"] = self.matrix(m.q_lora_rank, H, N + R)
        else:
            out = {"q": self.matrix(m.embed_dim, H, N + R)}
        out |= {"kv_a": self.matrix(m.embed_dim, C + R), "kv_a_norm": self.norm(C)}
        return out | {"kv_b": self.matrix(C, H, N + m.v_head_dim), "o": self.matrix(H, m.v_head_dim, m.embed_dim)}

    def gqa(self, m):
        D, H, G, hd = m.embed_dim, m.num_heads, m.num_kv_heads, m.head_dim
        value = m.value_head_dim or hd
        out = {"q": self.matrix(D, H, hd), "k": self.matrix(D, G, hd), "v": self.matrix(D, G, value)}
        out["o"] = self.matrix(H, value, D)
        if m.qkv_bias:
            out |= {"q_bias": self.matrix(H, hd), "k_bias": self.matrix(G, hd), "v_bias": self.matrix(G, value)}
        if m.output_bias:
            out["o_bias"] = self.matrix(D)
        if m.qk_norm:
            out |= {"q_norm": self.norm(hd), "k_norm": self.norm(hd)}
        return out

    def ffn(self, width):
        D = self.model.embed_dim
        return {"gate": self.matrix(D, width), "up": self.matrix(D, width), "down": self.matrix(width, D)}

    def moe(self):
        m = self.model
        D, E, F = m.embed_dim, m.num_experts, m.expert_dim
        out = {"router": self.matrix(D, E), "bias": 0.1 * self.rng.standard_normal(E)}
        out |= {"gate": self.matrix(E, D, F), "up": self.matrix(E, D, F), "down": self.matrix(E, F, D)}
        if m.expert_bias:
            out |= {"gate_bias": self.matrix(E, F), "up_bias": self.matrix(E, F), "down_bias": self.matrix(E, D)}
        if m.router.logit_bias:
            out["logit_bias"] = self.matrix(E)
        if m.num_shared_experts:
            out["shared"] = self.ffn(m.num_shared_experts * F)
        return out
