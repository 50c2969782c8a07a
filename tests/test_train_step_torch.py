"""benchmarks/train_step_torch.py computes the loss, gradients and update of mtp_jax, so their speed can be compared."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import train_step
from benchmarks.measuring import batch_of
from mtp_jax.config import load_config
from mtp_jax.layers.spec import layer_places
from mtp_jax.losses import weight_sum
from mtp_jax.model import abstract_model, init
from mtp_jax.mtp import kind_of
from mtp_jax.training import optimizer
from mtp_jax.training.step import loss_scales, make_loss, rows_of
from tests.commands import QUICK, run_process

torch = pytest.importorskip("torch", reason="make hf installs it")
if torch.cuda.is_available():
    pytest.skip("on a GPU its weights are in bfloat16", allow_module_level=True)
from benchmarks import train_step_torch as peer  # noqa: E402

SMALL = [
    *("--config.model.vocab_size=96", "--config.model.num_layers=3", "--config.model.embed_dim=32"),
    *("--config.model.num_heads=2", "--config.model.kv_lora_rank=16", "--config.model.qk_nope_head_dim=8"),
    *("--config.model.qk_rope_head_dim=4", "--config.model.v_head_dim=12", "--config.model.ffn_dim=48"),
    *("--config.model.expert_dim=24", "--config.model.compute_dtype=float32", "--config.model.balance_loss_weight=0.0"),
    *("--config.model.num_experts=8", "--config.model.init_std=0.2"),
    *("--config.data.sequence_length=64", "--config.data.batch_size=2"),
    # epsilon: Adam divides by the gradient, and small ones are roundings
    *("--config.optimizer.schedule=constant", "--config.optimizer.warmup_steps=2", "--config.optimizer.eps=1e-3"),
    *("--config.optimizer.clip_norm=0.1", "--config.optimizer.learning_rate=0.2"),
]
DENSE = ["--config.model.num_experts=0"]
SOFTMAX = [
    *("--config.model.router.score=softmax", "--config.model.router.renormalize=False"),
    *("--config.model.routed_scaling_factor=2.5", "--config.model.num_shared_experts=0"),
]
DEPTH_1, DEPTH_2 = (["--config.mtp.kind=sequential", f"--config.mtp.depth={depth}"] for depth in (1, 2))


def as_torch(tree, config):
    """Weights, or their gradients, of mtp_jax by the names of the peer's parameters."""
    out = {"embed.weight": tree["trunk"]["embed"], "unembed.weight": tree["trunk"]["unembed"].T}
    out["final_norm.weight"] = tree["trunk"]["final_norm"]["scale"]
    for layer, (name, index) in enumerate(layer_places(config.model, config.model.num_layers)):
        out |= block(jax.tree.map(lambda x, i=index: x[i], tree["trunk"][name]), f"blocks.{layer}.")
    for depth in range(kind_of(config).depth):
        module = jax.tree.map(lambda x, i=depth: x[i], tree["mtp"]["module"])
        out |= {f"mtp.{depth}.{name}.weight": module[name]["scale"] for name in module if name.endswith("_norm")}
        out[f"mtp.{depth}.projection.weight"] = module["projection"].T
        out |= block(module["block"], f"mtp.{depth}.block.")
    return {name: np.asarray(value) for name, value in out.items()}


def block(tree, at):
    attention, ffn = tree["attention"], tree["ffn"]
    flat = lambda w: w.reshape(w.shape[0], -1)  # noqa: E731
    out = {
        "attention_norm": tree["attention_norm"]["scale"],
        "ffn_norm": tree["ffn_norm"]["scale"],
        "attention.down": jnp.concatenate([flat(attention["q"]), attention["kv_a"]], 1).T,
        "attention.norm": attention["kv_a_norm"]["scale"],
        "attention.up": flat(attention["kv_b"]).T,
        "attention.o": attention["o"].reshape(-1, attention["o"].shape[-1]).T,
    }
    if "router" in ffn:
        out["ffn.router"] = ffn["router"]["weight"].T
        if "shared" in ffn:
            out |= dense(ffn["shared"], "ffn.shared")
    else:
        out |= dense(ffn, "ffn")
    out = {f"{at}{name}.weight": value for name, value in out.items()}
    if "router" in ffn:
        out[f"{at}ffn.gate_up"] = jnp.concatenate([ffn["gate"], ffn["up"]], 2)
        out[f"{at}ffn.down"] = ffn["down"]
    return out


def dense(tree, at):
    return {f"{at}.gate_up": jnp.concatenate([tree["gate"], tree["up"]], 1).T, f"{at}.down": tree["down"].T}


def biases_of(biases, config):
    """Router biases by the names of the peer's buffers."""
    out = {}
    for layer, (name, index) in enumerate(layer_places(config.model, config.model.num_layers)):
        if name in biases.get("trunk", {}):
            out[f"blocks.{layer}.ffn.bias"] = biases["trunk"][name]["ffn"]["router"]["bias"][index]
    for depth, bias_E in enumerate(
        biases["mtp"]["module"]["block"]["ffn"]["router"]["bias"] if "mtp" in biases else ()
    ):
        out[f"mtp.{depth}.block.ffn.bias"] = bias_E
    return {name: np.asarray(value) for name, value in out.items()}


def of_jax(config, params, biases, batch):
    built = abstract_model(config.architecture)
    rows = rows_of({name: jnp.asarray(value) for name, value in batch.items()}, kind_of(config))
    scales = loss_scales(config, weight_sum(rows.weight_KBT), jnp.int32(0))
    num_rows = jnp.full(1 + kind_of(config).depth, float(config.data.batch_size))
    with jax.default_matmul_precision("highest"):
        run = jax.jit(jax.value_and_grad(make_loss(config, built), has_aux=True))
        (loss, _), grads = run(params, {}, biases, rows, scales, num_rows)
    return float(loss), grads


def updated(config, params, grads):
    """Weights after one step of the optimizer."""
    tx = optimizer.build(config.optimizer, config.training.num_steps, abstract_model(config.architecture).infos)
    assert optax.tree.norm(grads) > config.optimizer.clip_norm
    return optax.apply_updates(params, tx.update(grads, tx.init(params), params)[0])


def assert_close(found, wanted):
    """Compares arrays by name, with a tolerance that is relative to the largest element of each."""
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        largest = np.abs(wanted[name]).max()
        assert largest > 0, name
        np.testing.assert_allclose(value.detach(), wanted[name], rtol=1e-4, atol=1e-5 * largest, err_msg=name)


@pytest.mark.parametrize(
    ("packing", "overrides"),
    [("contiguous", DENSE), ("packed", SOFTMAX), ("contiguous", DEPTH_1), ("packed", DEPTH_2)],
    ids=["dense", "softmax router", "one depth", "two depths, packed"],
)
def test_loss_gradients_and_update_are_those_of_mtp_jax(packing, overrides, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.measuring.DOCUMENT", 12)
    config = load_config("configs/moe_4b.py", [*SMALL, f"--config.data.packing={packing}", *overrides])
    params, biases = init(config.architecture, 0)
    biases = jax.tree.map(lambda b: 0.1 * jax.random.normal(jax.random.key(b.size), b.shape), biases)
    batch = batch_of(config, np.random.default_rng(1))
    loss, grads = of_jax(config, params, biases, batch)

    asked = SimpleNamespace(**json.loads(json.dumps(train_step.torch_request(config, 1, tmp_path))))
    model = peer.Model(SimpleNamespace(**asked.model), asked.depth)
    state = as_torch(params, config) | biases_of(biases, config)
    model.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in state.items()})
    step = peer.Optimizer(model, SimpleNamespace(**asked.optimizer)).step
    loss_of = peer.make_loss(model, asked.depth, asked.mtp_weight, asked.is_packed)
    found = loss_of({name: torch.from_numpy(value).long() for name, value in batch.items()})
    assert found.item() == pytest.approx(loss, rel=1e-6)
    assert_close({name: w.grad for name, w in model.named_parameters()}, as_torch(grads, config))
    step()
    assert_close(dict(model.named_parameters()), as_torch(updated(config, params, grads), config))


def test_a_step_is_compared_with_the_peer_in_one_command(tmp_path):
    out = tmp_path / "lines.jsonl"
    overrides = [*SMALL, *DENSE, "--config.model.num_layers=1", "--config.data.packing=contiguous"]
    flags = ["--config=configs/moe_4b.py", "--steps=1", "--peer=torch", f"--output={out}"]
    done = run_process("benchmarks/train_step.py", *flags, *overrides, env=QUICK)
    assert done.returncode == 0, done.stderr
    line = json.loads(out.read_text())
    assert line["peer"] == f"torch {torch.__version__}" and len(line["peer_losses"]) == peer.NUM_WARM + 1
    assert line["ratio"] == pytest.approx(line["tokens_per_second"] / line["peer_tokens_per_second"], abs=1e-3)
    assert f"{line['ratio']:.2f} times {line['peer']}" in done.stdout
    assert line["peer_losses"][0] == pytest.approx(line["losses"][0], rel=0.1)  # other weights of the same distribution


@pytest.mark.parametrize("field", ["attention=gqa", "q_lora_rank=8", "tie_embeddings=True", "router.num_groups=2"])
def test_a_model_that_the_peer_does_not_have_is_refused(field, tmp_path):
    more = ["--config.model.router.groups_per_token=1"] if "groups" in field else []
    config = load_config("configs/moe_4b.py", [*SMALL, f"--config.model.{field}", *more])
    with pytest.raises(SystemExit, match="--peer=torch: benchmarks/train_step_torch.py has no model"):
        train_step.torch_request(config, 1, tmp_path)
