"""Training step of the same model in PyTorch on one device, in a separate process, for benchmarks/train_step.py.

    python benchmarks/train_step_torch.py '{"batches": "batches.npz", "steps": 10, "model": {...}, ...}'

The model that a config of mtp_jax describes: multi-head latent attention without query compression, SwiGLU, mixture of
experts, sequential MTP modules. Weights in bfloat16 with fp32 masters in AdamW, torch.compile, `_grouped_mm` on tokens
sorted by expert, cuDNN attention for rows of one document and FlexAttention for packed ones, and gradients of the head
computed in the forward pass. There is no balance loss, and router biases count the tokens of padding too. On a CPU, for
tests/test_train_step_torch.py, weights are in fp32 and nothing is compiled. The last line is a JSON object.

Shape letters: B rows, T positions, N = B * T tokens, D model, H heads, C latent, R rotary dims, F width, E experts,
K experts per token, M = N * K copies of tokens.
"""

import contextlib
import json
import math
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

NUM_WARM = 3
LOSS_CHUNK = 8192  # tokens whose logits are in memory at a time
IS_CUDA = torch.cuda.is_available()


def compiled(function, **options):
    return torch.compile(function, **options) if IS_CUDA else function


def grouped(x_MD, w_EDF, ends_E):
    """Product of each row and the matrix of its expert, of which ends_E has the last row plus 1; int32."""
    if IS_CUDA:
        return torch._grouped_mm(x_MD, w_EDF, ends_E)
    return torch.cat([x @ w for x, w in zip(x_MD.tensor_split(ends_E[:-1].tolist()), w_EDF, strict=True)])


def attention(q, k, v, mask):
    """Causal attention, [B, H, T, dims]. mask: from `attention_mask`."""
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if IS_CUDA:
        return flex_attention(q, k, v, block_mask=mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


compiled_block_mask = compiled(create_block_mask)


def attention_mask(segments_BT):
    """Mask of packed documents for FlexAttention, or on a CPU as bool[B, 1, T, T]."""
    num_rows, length = segments_BT.shape
    if not IS_CUDA:
        causal_TT = torch.ones(length, length, dtype=torch.bool).tril()
        return (causal_TT & (segments_BT[:, :, None] == segments_BT[:, None]))[:, None]

    def sees(b, h, q, k):
        return (q >= k) & (segments_BT[b, q] == segments_BT[b, k])

    return compiled_block_mask(sees, num_rows, None, length, length, device=segments_BT.device)


def matrix(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


def rotate(x, rotation):
    """Rotates the pairs (2i, 2i + 1) of [B, T, heads, R]."""
    (cos, sin), (a, b) = rotation, x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.dims = c.num_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.kv_lora_rank
        heads, nope, rotary, value, latent = self.dims
        self.down = matrix(c.embed_dim, heads * (nope + rotary) + latent + rotary)  # queries, latent and rotary key
        self.norm = nn.RMSNorm(latent, c.latent_norm_eps)
        self.up = matrix(latent, heads * (nope + value))
        self.o = matrix(heads * value, c.embed_dim)

    def forward(self, x_BTD, rotation, mask):
        heads, nope, rotary, value, latent = self.dims
        q, latent_BTC, k = self.down(x_BTD).split([heads * (nope + rotary), latent, rotary], -1)
        q_nope, q = q.unflatten(-1, (heads, -1)).split([nope, rotary], -1)
        k_nope, v = self.up(self.norm(latent_BTC)).unflatten(-1, (heads, -1)).split([nope, value], -1)
        k = rotate(k[:, :, None], rotation).expand(*k_nope.shape[:3], rotary)
        q, k = torch.cat([q_nope, rotate(q, rotation)], -1), torch.cat([k_nope, k], -1)
        out = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
        return self.o(out.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, dim, width):
        super().__init__()
        self.gate_up, self.down = matrix(dim, 2 * width), matrix(width, dim)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Dispatch(torch.autograd.Function):
    """Copies of tokens in the order of their experts. Its gradient sums the copies of a token without atomics."""

    @staticmethod
    def forward(ctx, x_ND, order_M, places_NK):
        ctx.save_for_backward(places_NK)
        return x_ND[order_M // places_NK.shape[1]]

    @staticmethod
    def backward(ctx, grad_MD):
        return grad_MD[ctx.saved_tensors[0]].sum(1), None, None


class Combine(torch.autograd.Function):
    """Sum of the copies of each token: the transpose of `Dispatch`."""

    @staticmethod
    def forward(ctx, x_MD, order_M, places_NK):
        ctx.save_for_backward(order_M)
        ctx.num_copies = places_NK.shape[1]
        return x_MD[places_NK].sum(1)

    @staticmethod
    def backward(ctx, grad_ND):
        return grad_ND[ctx.saved_tensors[0] // ctx.num_copies], None, None


class Experts(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c, self.router = c, matrix(c.embed_dim, c.num_experts)
        self.gate_up = nn.Parameter(torch.empty(c.num_experts, c.embed_dim, 2 * c.expert_dim))
        self.down = nn.Parameter(torch.empty(c.num_experts, c.expert_dim, c.embed_dim))
        self.shared = SwiGLU(c.embed_dim, c.num_shared_experts * c.expert_dim) if c.num_shared_experts else None
        self.register_buffer("bias", torch.zeros(c.num_experts))

    def forward(self, x_BTD):
        c, x_ND = self.c, x_BTD.flatten(0, 1)
        logits_NE = F.linear(x_ND.float(), self.router.weight.float())
        scores_NE = logits_NE.sigmoid() if c.router["score"] == "sigmoid" else logits_NE.softmax(-1)
        chosen_NK = (scores_NE.detach() + self.bias).topk(c.num_experts_per_token).indices
        gates_NK = scores_NE.gather(1, chosen_NK)
        if c.router["renormalize"]:
            gates_NK = gates_NK / (gates_NK.sum(1, keepdim=True) + 1e-20)
        gates_NK = (gates_NK * c.routed_scaling_factor).to(x_ND.dtype)
        experts_M, order_M = chosen_NK.flatten().short().sort(stable=True)  # radix sort: few bits are faster
        experts_E = torch.arange(c.num_experts, device=x_ND.device, dtype=torch.short)
        ends_E = torch.searchsorted(experts_M, experts_E, right=True, out_int32=True)
        places_M = torch.arange(len(order_M), device=x_ND.device)
        places_NK = torch.empty_like(order_M).scatter(0, order_M, places_M).view_as(chosen_NK)
        gate, up = grouped(Dispatch.apply(x_ND, order_M, places_NK), self.gate_up, ends_E).chunk(2, -1)
        h_MF = F.silu(gate) * up * gates_NK.flatten()[order_M, None]
        out_ND = Combine.apply(grouped(h_MF, self.down, ends_E), order_M, places_NK)
        with torch.no_grad():
            load_E = ends_E.diff(prepend=ends_E.new_zeros(1)).float()
            self.bias += c.router["bias_rate"] * torch.sign(load_E.mean() - load_E)
        out_BTD = out_ND.view_as(x_BTD)
        return out_BTD if self.shared is None else out_BTD + self.shared(x_BTD)


class Block(nn.Module):
    def __init__(self, c, is_moe):
        super().__init__()
        self.attention_norm, self.ffn_norm = (nn.RMSNorm(c.embed_dim, c.norm_eps) for _ in range(2))
        self.attention, self.ffn = Attention(c), Experts(c) if is_moe else SwiGLU(c.embed_dim, c.ffn_dim)

    def forward(self, h_BTD, rotation, mask):
        h_BTD = h_BTD + self.attention(self.attention_norm(h_BTD), rotation, mask)
        return h_BTD + self.ffn(self.ffn_norm(h_BTD))


class MTPModule(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed_norm, self.hidden_norm, self.output_norm = (nn.RMSNorm(c.embed_dim, c.norm_eps) for _ in range(3))
        self.projection, self.block = matrix(2 * c.embed_dim, c.embed_dim), Block(c, c.num_experts > 0)

    def forward(self, embedding_BTD, hidden_BTD, rotation, mask):
        joined = torch.cat([self.embed_norm(embedding_BTD), self.hidden_norm(hidden_BTD)], -1)
        return self.block(self.projection(joined), rotation, mask)


class Model(nn.Module):
    def __init__(self, c, depth):
        super().__init__()
        self.c, self.embed = c, nn.Embedding(c.vocab_size, c.embed_dim)
        self.blocks = nn.ModuleList(
            Block(c, c.num_experts > 0 and layer >= c.num_dense_layers) for layer in range(c.num_layers)
        )
        self.final_norm = nn.RMSNorm(c.embed_dim, c.norm_eps)
        self.mtp = nn.ModuleList(MTPModule(c) for _ in range(depth))
        self.unembed = matrix(c.embed_dim, c.vocab_size)

    def forward(self, tokens, positions_BT, masks):
        """Returns the normed hidden states [B, T, D] of every depth, given int[B, T + depth] and a mask per depth."""
        length, rotary = positions_BT.shape[1], self.c.qk_rope_head_dim
        pairs = torch.arange(0, rotary, 2, device=tokens.device)
        angles = positions_BT[:, :, None, None] * self.c.rope["theta"] ** (-pairs.double() / rotary).float()
        rotation = angles.cos(), angles.sin()
        embedded = self.embed(tokens)
        h_BTD = embedded[:, :length]
        for block in self.blocks:
            h_BTD = block(h_BTD, rotation, masks[0])
        h_BTD = self.final_norm(h_BTD)
        hidden = [h_BTD]
        for k, module in enumerate(self.mtp, 1):
            h_BTD = module(embedded[:, k : k + length], h_BTD, rotation, masks[k])
            hidden.append(module.output_norm(h_BTD))
        return hidden


@compiled
def loss_chunk(hidden_ND, head, targets_N, scale_N):
    """Returns the loss of some tokens and its gradient with respect to their logits."""
    logits = F.linear(hidden_ND, head).float()
    total = logits.logsumexp(-1)
    loss = (scale_N * (total - logits.gather(1, targets_N[:, None])[:, 0])).sum()
    is_target = torch.arange(len(head), device=head.device) == targets_N[:, None]
    return loss, (scale_N[:, None] * ((logits - total[:, None]).exp() - is_target.float())).to(head.dtype)


@torch.no_grad()
def head_loss(hidden, head, targets, scales):
    """Returns the loss of all depths and its gradients with respect to each hidden state and the head."""
    loss, grad_head, grads = torch.zeros((), device=head.device), torch.zeros_like(head), []
    for x_BTD, targets_BT, scale_BT in zip(hidden, targets, scales, strict=True):
        parts = [t.split(LOSS_CHUNK) for t in (x_BTD.flatten(0, 1), targets_BT.flatten(), scale_BT.flatten())]
        found = []
        for x_ND, targets_N, scale_N in zip(*parts, strict=True):
            value, grad_logits = loss_chunk(x_ND, head, targets_N, scale_N)
            loss += value
            found.append(grad_logits @ head)
            grad_head.addmm_(grad_logits.T, x_ND)
        grads.append(torch.cat(found).view_as(x_BTD))
    return loss, grads, grad_head


def make_loss(model, depth, mtp_weight, is_packed):
    """Returns a function batch -> loss, which leaves the gradients in the weights."""
    forward = compiled(model)

    def loss_of(batch):
        tokens, segments, positions = batch["tokens"], batch["segment_ids"], batch["positions"]
        length = tokens.shape[1] - 1 - depth
        here = segments[:, :length]
        # A position counts at depth k if its input, its target and itself are of one document; segment 0 if not.
        usable = [
            here * (here == segments[:, k : k + length]) * (here == segments[:, k + 1 : k + 1 + length])
            for k in range(depth + 1)
        ]
        targets = [tokens[:, k + 1 : k + 1 + length] for k in range(depth + 1)]
        factors = [1.0] + [mtp_weight / depth for _ in range(depth)]
        scales = [w * (s != 0) / (usable[0] != 0).sum() for w, s in zip(factors, usable, strict=True)]
        masks = [attention_mask(s) if is_packed else None for s in usable]
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if IS_CUDA else contextlib.nullcontext():
            hidden = forward(tokens[:, : length + depth], positions[:, :length], masks)
            loss, grads, model.unembed.weight.grad = head_loss(hidden, model.unembed.weight, targets, scales)
            torch.autograd.backward(hidden, grads)
        return loss

    return loss_of


def adamw(weight, grad, master, mean, square, scale, correction, rate, o, decay):
    """Updates the fp32 master and both moments in place, and the weight, of one flattened tensor."""
    grad = grad.float() * scale
    mean.lerp_(grad, 1 - o.beta1)
    square.lerp_(grad * grad, 1 - o.beta2)
    update = mean / correction[0] / ((square / correction[1]).sqrt() + o.eps)
    master.sub_(rate * (update + decay * master))
    weight.copy_(master)


class Optimizer:
    """AdamW with fp32 masters; weight decay on matrices, clipping by the global norm and warmup, as in mtp_jax."""

    def __init__(self, model, o):
        self.o, self.num_steps, self.weights = o, 0, list(model.parameters())
        masters = [w.detach().float().flatten() for w in self.weights]
        self.states = [(m, torch.zeros_like(m), torch.zeros_like(m)) for m in masters]
        self.decays = [0.0 if w.ndim < 2 or w is model.embed.weight else o.weight_decay for w in self.weights]
        self.update = compiled(adamw, dynamic=True)
        for weight in self.weights:
            weight.data = weight.data.bfloat16() if IS_CUDA else weight.data

    @torch.no_grad()
    def step(self):
        grads = [w.grad for w in self.weights]
        norm = torch.stack(torch._foreach_norm(grads, dtype=torch.float32)).norm()
        scale = (self.o.clip_norm / norm).clamp(max=1.0) if self.o.clip_norm else torch.ones_like(norm)
        self.num_steps += 1
        correction = torch.tensor([1 - b**self.num_steps for b in (self.o.beta1, self.o.beta2)]).to(norm.device)
        warmup = min(self.num_steps / max(self.o.warmup_steps, 1), 1.0)
        rate = torch.tensor(self.o.learning_rate * warmup).to(norm.device)  # as a number it would be compiled in
        for weight, grad, state, decay in zip(self.weights, grads, self.states, self.decays, strict=True):
            self.update(weight.data.flatten(), grad.flatten(), *state, scale, correction, rate, self.o, decay)
            weight.grad = None


def main():
    asked = SimpleNamespace(**json.loads(sys.argv[1]))
    device, arrays = "cuda" if IS_CUDA else "cpu", np.load(asked.batches)
    names = ("tokens", "segment_ids", "positions")
    batches = [
        {name: torch.from_numpy(arrays[name][i]).long().to(device) for name in names}
        for i in range(len(arrays["tokens"]))
    ]
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # of the router alone
    with torch.device(device):
        model = Model(SimpleNamespace(**asked.model), asked.depth)
    for weight in model.parameters():
        nn.init.normal_(weight, std=asked.model["init_std"]) if weight.ndim > 1 else nn.init.ones_(weight)
    optimizer = Optimizer(model, SimpleNamespace(**asked.optimizer))
    loss_of = make_loss(model, asked.depth, asked.mtp_weight, asked.is_packed)
    losses, begun = [], time.perf_counter()
    for number in range(NUM_WARM + asked.steps):
        if number == NUM_WARM:
            losses[-1].item()  # waits for the device
            started = time.perf_counter()
        losses.append(loss_of(batches[number % len(batches)]))
        optimizer.step()
    if IS_CUDA:
        torch.cuda.synchronize()
    ended = time.perf_counter()
    found = {
        "peer": f"torch {torch.__version__}",
        "tokens_per_second": math.prod(batches[0]["tokens"][:, 1 + asked.depth :].shape)
        * asked.steps
        / (ended - started),
        "warm_seconds": started - begun,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if IS_CUDA else None,
        "losses": [loss.item() for loss in losses],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
