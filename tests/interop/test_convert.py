"""Import and export by the command line: bit-equal round trips, equality with transformers, and what is refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest

import mtp_jax
from mtp_jax import data, storage
from mtp_jax.config import MeshConfig, UserError, load_config
from mtp_jax.evaluation import conventions
from mtp_jax.interop import checkpoint_folder as hf_folder
from mtp_jax.interop import folder_checks, fp8
from mtp_jax.interop.tensorfiles import TensorFolder, write_folder
from mtp_jax.model import abstract_model
from mtp_jax.mtp import kind_of
from mtp_jax.tools import convert
from mtp_jax.training import init_from, loop
from mtp_jax.training.checkpoint import Checkpoints, write_streamed
from mtp_jax.training.run import restore, with_vocabulary
from mtp_jax.training.workdir import open_workdir
from tests.commands import CPU, SMALL, run_here
from tests.conftest import ROOT
from tests.interop import hf_models

TINY = "configs/tiny.py"
ROUND_TRIPS = [
    *(
        ("deepseek_v3", "float32", "new", 1),
        ("deepseek_v3", "bfloat16", "released", 3),
        ("moonlight", "bfloat16", "new", 1),
    ),
    *(
        ("deepseek_v2", "float32", "released", 1),
        ("kimi_k2", "bfloat16", "released", 1),
        ("mistral", "float32", "new", 1),
        ("mistral_wide_window", "bfloat16", "released", 1),
        ("mistral_window", "float32", "released", 1),
        ("ministral", "bfloat16", "released", 1),
        ("qwen2_window", "bfloat16", "new", 1),
        ("mimo_v2_flash", "bfloat16", "released", 2),
        ("mimo_v2_flash_other_lists", "float32", "new", 1),
        ("gpt_oss", "bfloat16", "released", 2),
        ("gpt_oss_other_types", "float32", "new", 1),
        ("qwen3_moe", "bfloat16", "new", 2),
        ("ernie4_5_moe", "bfloat16", "released", 1),
        ("ernie4_5_moe_untied", "float32", "new", 2),
        ("qwen3_moe_plain_gates", "float32", "released", 1),
        ("glm4_moe", "bfloat16", "released", 2),
        ("mimo", "bfloat16", "new", 1),
    ),
    *(("llama3_tied", "float32", "released", 1), ("qwen2_tied", "bfloat16", "new", 1), ("qwen3", "float32", "new", 1)),
]


def tensors_of(path):
    """name -> (dtype, shape, bytes)."""
    files = TensorFolder(path)
    return {n: (i.dtype, i.shape, files.read(n).tobytes()) for n, i in files.infos.items()}


def convert_here(monkeypatch, *argv):
    assert run_here(monkeypatch, convert.main, *argv) == 0


def assert_same_model(a, b):
    """The same architecture and bits: what any program computes from either is the same."""
    assert a.config.architecture == b.config.architecture
    jax.tree.map(np.testing.assert_array_equal, (a.params, a.biases), (b.params, b.biases))
    assert jax.tree.map(lambda leaf: leaf.dtype, a.params) == jax.tree.map(lambda leaf: leaf.dtype, b.params)


@pytest.mark.parametrize(("name", "dtype", "style", "shards"), ROUND_TRIPS)
def test_import_then_export_is_the_same_folder(monkeypatch, tmp_path, caplog, name, dtype, style, shards):
    hf, workdir, back = tmp_path / "hf", tmp_path / "run", tmp_path / "back"
    hf_models.build(name, hf, dtype=dtype, style=style, shards=shards)
    (hf / "tokenizer_config.json").write_text("{}")
    convert_here(monkeypatch, "import", f"--hf={hf}", f"--workdir={workdir}")
    assert "OCDBT" not in caplog.text  # orbax warns of files that one process does not write
    convert_here(monkeypatch, "export", f"--workdir={workdir}", f"--hf={back}")
    assert tensors_of(back) == tensors_of(hf)
    assert json.loads((back / "config.json").read_text()) == json.loads((hf / "config.json").read_text())
    assert (back / "tokenizer_config.json").read_text() == "{}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "hf", "run"]  # no temporary folder is left
    assert_same_model(mtp_jax.load(workdir), mtp_jax.load(hf))


# ---------------------------------------------------------------------------------------------------------------
# Models of our own


def trained(workdir, *overrides, seed=0):
    """A workdir with random weights in every leaf, router biases too, as if trained."""
    config = with_vocabulary(load_config(TINY, [*SMALL, "--config.mesh.data=1", *overrides]), 261)
    built, rng = abstract_model(config.architecture), np.random.default_rng(seed)

    def values(path, leaf):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return (mean + 0.1 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

    open_workdir(workdir, config)
    state = {"params": built.params, "biases": built.biases}
    write_streamed(workdir / "checkpoints", 7, jax.tree_util.tree_map_with_path(values, state))
    return config


# The dims of configs/tiny.py stay; what these layouts have and it has not is set here.
GROUPED = ("--config.model.attention=gqa", "--config.model.rope.interleaved=false", "--config.model.head_dim=8")
UNGROUPED = ("--config.model.router.num_groups=1", "--config.model.router.groups_per_token=1")
WINDOWED = {
    "gpt_oss": (
        *(*GROUPED, *UNGROUPED, "--config.mtp.depth=2", "--config.model.num_kv_heads=2"),
        *("--config.model.num_shared_experts=0", "--config.model.num_dense_layers=0"),
        *("--config.model.router.score=softmax", "--config.model.router.bias_rate=0"),
        *("--config.model.router.logit_bias=true", "--config.model.expert_bias=true", "--config.model.sinks=true"),
        *("--config.model.local.sinks=true", "--config.model.local.window=4", "--config.model.local.pattern=LG"),
        *("--config.model.gated_unit.offset=1", "--config.model.gated_unit.limit=7"),
        *("--config.model.gated_unit.alpha=2", "--config.model.routed_scaling_factor=1"),
    ),
    "mimo_v2_flash": (
        *(*GROUPED, *UNGROUPED, "--config.mtp.depth=2", "--config.model.num_kv_heads=1"),
        *("--config.model.num_shared_experts=0", "--config.model.local.num_kv_heads=2"),
        *("--config.model.local.sinks=true", "--config.model.local.window=4", "--config.model.local.pattern=GL"),
        *("--config.model.local.rope_theta=500", "--config.model.rotary_fraction=0.5"),
        *("--config.model.value_head_dim=6", "--config.model.value_scale=0.5", "--config.mtp.family=mimo_v2_flash"),
        *("--config.mtp.window=4", "--config.mtp.dense_ffn=true"),
    ),
}
NATIVE = {
    **WINDOWED,
    "deepseek_v3 dense": ("--config.model.num_experts=0", "--config.mtp.depth=1"),
    "deepseek_v3 shared depths": ("--config.mtp.shared_depths=true", "--config.mtp.depth=3"),
    "deepseek_v3 other conventions": ("--config.mtp.concat_order=hidden_first", "--config.mtp.output_norm=main"),
    "deepseek_v2": (
        *("--config.model.router.score=softmax", "--config.model.router.renormalize=false"),
        *("--config.model.router.group_score=max", "--config.mtp.kind=none"),
    ),
    "llama": (
        *("--config.model.attention=gqa", "--config.model.rope.interleaved=false", "--config.model.num_experts=0"),
        *("--config.model.num_kv_heads=2", "--config.model.head_dim=8"),
    ),
}


def zero_router_biases(workdir):
    with Checkpoints(workdir / "checkpoints") as saved:
        _, state = saved.open_part(("params", "biases"))
        state = jax.tree.map(lambda leaf: leaf[...], state)
    state["biases"] = jax.tree.map(np.zeros_like, state["biases"])
    write_streamed(workdir / "checkpoints", 8, state)


@pytest.mark.parametrize("name", NATIVE)
def test_a_model_of_ours_comes_back_as_it_went_out(monkeypatch, tmp_path, name):
    overrides = NATIVE[name]
    if name == "deepseek_v2":
        overrides = (*overrides, "--config.model.router.bias_rate=0")
    config = trained(tmp_path / "run", *overrides)
    if name in ("deepseek_v2", "gpt_oss"):  # its layout has no router biases; zero ones are not lost
        zero_router_biases(tmp_path / "run")
    convert_here(monkeypatch, "export", f"--workdir={tmp_path / 'run'}", f"--hf={tmp_path / 'hf'}")
    convert_here(monkeypatch, "import", f"--hf={tmp_path / 'hf'}", f"--workdir={tmp_path / 'again'}")
    rows = np.random.default_rng(0).integers(0, 261, (2, 12))
    ours, again = mtp_jax.load(tmp_path / "run"), mtp_jax.load(tmp_path / "again")
    assert kind_of(again.config).depth == kind_of(config).depth
    np.testing.assert_array_equal(again.logits(rows), ours.logits(rows))


def test_router_biases_are_not_dropped_in_silence(monkeypatch, tmp_path, capfd):
    trained(tmp_path / "run", *NATIVE["deepseek_v2"])
    assert (
        run_here(monkeypatch, convert.main, "export", f"--workdir={tmp_path / 'run'}", f"--hf={tmp_path / 'hf'}") == 2
    )
    assert "router.bias: is not zero and the deepseek_v2 layout has no place" in capfd.readouterr().err
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("kind", "layers"), [("deepseek_v3", 61), ("glm4_moe", 46), ("gpt_oss", 3), ("mimo_v2_flash", 3)]
)
def test_transformers_loads_an_export_with_no_key_missing_or_unexpected(monkeypatch, tmp_path, kind, layers):
    """With as many layers as released, for transformers identifies the MTP layer by its number."""
    hf_models.needs_torch()
    import torch
    import transformers

    small = ["--config.model.num_experts=8", "--config.model.router.num_groups=4"]  # transformers' groups have two
    small += [f"--config.model.num_layers={layers}", "--config.mtp.depth=1", "--config.model.expert_dim=8"]
    if kind == "glm4_moe":
        small += [
            "--config.model.attention=gqa",
            "--config.model.rope.interleaved=false",
            "--config.mtp.family=glm4_moe",
        ]
        small += ["--config.model.num_kv_heads=2", "--config.model.head_dim=8", "--config.model.rotary_fraction=0.5"]
    if kind in WINDOWED:
        small = [*WINDOWED[kind], f"--config.model.num_layers={layers}"]
        small += ["--config.mtp.kind=none"] if kind == "gpt_oss" else []  # transformers has no MTP for it
    trained(tmp_path / "run", *small)
    if kind == "gpt_oss":
        zero_router_biases(tmp_path / "run")
    convert_here(monkeypatch, "export", f"--workdir={tmp_path / 'run'}", f"--hf={tmp_path / 'hf'}")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    rows = np.random.default_rng(0).integers(0, 261, (1, 10))
    with torch.no_grad():
        expected = model(torch.tensor(rows), use_cache=False).logits.numpy()
    ours = mtp_jax.load(tmp_path / "run").logits(rows)
    np.testing.assert_allclose(ours[:, :, 0], expected[:, : ours.shape[1]], atol=1e-4)


def test_training_continues_from_an_imported_model(monkeypatch, tmp_path):
    """The first step's losses are those that evaluation finds, from a workdir and straight from the folder alike."""
    trained(tmp_path / "run", "--config.model.num_layers=2", "--config.mtp.depth=1")
    convert_here(monkeypatch, "export", f"--workdir={tmp_path / 'run'}", f"--hf={tmp_path / 'hf'}", "--dtype=bfloat16")
    convert_here(monkeypatch, "import", f"--hf={tmp_path / 'hf'}", f"--workdir={tmp_path / 'imported'}")
    lines = {}
    for source in ("imported", "hf"):
        base = load_config(str(tmp_path / "imported" / "config.json"), [f"--config.init_from={tmp_path / source}"])
        tiny = load_config(TINY, SMALL)
        model = replace(base.model, param_dtype="float32", compute_dtype="float32")
        training = replace(tiny.training, num_steps=1)
        mesh = MeshConfig(data=1, fsdp=2, expert=2, context=2)  # read straight into the shards
        optimizer = replace(tiny.optimizer, learning_rate=0.0)
        config = replace(base, model=model, training=training, mesh=mesh, optimizer=optimizer, data=tiny.data)
        run = loop.train(config, str(tmp_path / f"from_{source}"))
        metrics = (tmp_path / f"from_{source}" / "metrics.jsonl").read_text()
        lines[source] = [json.loads(line) for line in metrics.splitlines()]
        assert (tmp_path / f"from_{source}" / "hf" / "mtp_jax.json").is_file()  # travels on to the next export
    batch = next(iter(run.corpus.batches("train", 0)))
    lm = mtp_jax.load(tmp_path / "hf", compute_dtype="float32")
    depth, rows = kind_of(lm.config).depth, batch["tokens"]
    expected = expected_losses(lm, rows, batch["segment_ids"], batch["positions"], run.config)
    for found in lines.values():
        got = [found[0]["loss_main"], *(found[0][f"loss_mtp_{k}"] for k in range(1, depth + 1))]
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_what_came_with_an_import_is_in_the_export_after_training(monkeypatch, tmp_path, capfd):
    """config.json, side files, dtypes; a depth added since has its biases in float32 and its repetitions too."""
    hf_models.build("deepseek_v3", tmp_path / "hf", dtype="bfloat16", style="released")
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages }}")
    convert_here(monkeypatch, "import", f"--hf={tmp_path / 'hf'}", f"--workdir={tmp_path / 'imported'}")
    config = load_config(str(tmp_path / "imported" / "config.json"), ["--config.mtp.depth=2"])
    config = replace(config, model=replace(config.model, param_dtype="float32"), init_from=str(tmp_path / "imported"))
    run = tmp_path / "continued"
    open_workdir(run, config)
    built = abstract_model(config.architecture)
    write_streamed(run / "checkpoints", 1, zeros({"params": built.params, "biases": built.biases}))
    init_from.copy_sides(config.init_from, str(run))
    convert_here(monkeypatch, "export", f"--workdir={run}", f"--hf={tmp_path / 'back'}")
    assert "in bfloat16" in capfd.readouterr().out  # as imported, and said
    before, after = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "back")
    new = {name for name in after if name.startswith("model.layers.4.")}
    assert set(after) - new == set(before)
    assert {name: kind for name, (kind, *_) in after.items() if name not in new} == {
        n: k for n, (k, *_) in before.items()
    }
    assert {"model.layers.4.embed_tokens.weight", "model.layers.4.shared_head.head.weight"} <= new
    assert after["model.layers.4.mlp.gate.e_score_correction_bias"][0] == "F32"
    assert after["model.layers.4.eh_proj.weight"][0] == "BF16"
    values = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "back")]
    assert values[1] == values[0] | {"num_nextn_predict_layers": 2}
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == "{{ messages }}"


def zeros(tree):
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)


def test_router_biases_stay_float32_whatever_the_dtype(monkeypatch, tmp_path):
    trained(tmp_path / "run")
    for dtype in ("float32", "bfloat16"):
        argv = [f"--workdir={tmp_path / 'run'}", f"--hf={tmp_path / dtype}", f"--dtype={dtype}"]
        convert_here(monkeypatch, "export", *argv)
    full, half = tensors_of(tmp_path / "float32"), tensors_of(tmp_path / "bfloat16")
    biases = [name for name in full if "e_score" in name]
    assert biases and all(half[name] == full[name] and half[name][0] == "F32" for name in biases)
    assert {kind for name, (kind, *_) in half.items() if name not in biases} == {"BF16"}


def test_a_layout_without_router_biases_is_trained_without(tmp_path):
    """Moved, they could not be exported any more."""
    hf_models.build("deepseek_v2_lite", tmp_path / "v2")
    hf_models.build("deepseek_v3", tmp_path / "v3")
    v2, v3 = hf_folder.open_model(tmp_path / "v2"), hf_folder.open_model(tmp_path / "v3")
    assert v2.config.model.router.bias_rate == 0.0 < v3.config.model.router.bias_rate


def test_a_v2_stays_what_it_was_under_its_familys_name(monkeypatch, tmp_path):
    hf_models.build("deepseek_v2", tmp_path / "hf", style="released")
    argv = ["--family=deepseek_v3", f"--workdir={tmp_path / 'run'}"]
    convert_here(monkeypatch, "import", *argv, f"--hf={tmp_path / 'hf'}")
    convert_here(monkeypatch, "export", *argv, f"--hf={tmp_path / 'back'}")
    values = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "back")]
    assert values[0] == values[1]


def test_the_tokenizer_travels_and_folders_may_be_moved(monkeypatch, tmp_path, capfd, exported):
    """Out with a native run, in with the import, and found beside it once the workdir has another name."""
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]")).save(str(tmp_path / "tok.json"))
    trained(tmp_path / "run", f"--config.data.tokenizer={tmp_path / 'tok.json'}")
    convert_here(monkeypatch, "export", f"--workdir={tmp_path / 'run'}", f"--hf={tmp_path / 'hf'}")
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (tmp_path / "tok.json").read_bytes()
    convert_here(monkeypatch, "import", f"--hf={tmp_path / 'hf'}", f"--workdir={tmp_path / 'first'}")
    (tmp_path / "first").rename(tmp_path / "moved")
    assert mtp_jax.load(tmp_path / "moved").tokenizer.vocab_size == 3
    moved = str(tmp_path / "moved" / "hf" / "tokenizer.json")
    assert load_config(str(tmp_path / "moved" / "config.json")).data.tokenizer == moved
    assert "is gone; using" in capfd.readouterr().err
    # Without one, nothing pretends that the model reads bytes.
    convert_here(monkeypatch, "import", f"--hf={exported}", f"--workdir={tmp_path / 'none'}")
    assert mtp_jax.load(tmp_path / "none").tokenizer is None
    with pytest.raises(UserError, match=r"data.tokenizer=.*hf/tokenizer.json: no such file"):
        restore(str(tmp_path / "none"))


def test_the_ends_of_a_text_are_the_folders_own(monkeypatch, tmp_path, exported):
    """A chat model's turn ends with a token that is not the tokenizer's eos. Imported, it ends the same."""
    folder = tmp_path / "hf"
    shutil.copytree(exported, folder)
    assert mtp_jax.load(folder).end_tokens == ()
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"eos_token_id": 5}))
    assert mtp_jax.load(folder).end_tokens == (5,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 3, 10**6]}))
    lm = mtp_jax.load(folder)
    assert lm.end_tokens == (7, 3)
    convert_here(monkeypatch, "import", f"--hf={folder}", f"--workdir={tmp_path / 'run'}")
    assert mtp_jax.load(tmp_path / "run").end_tokens == (7, 3)
    plain = lm.generate([[1, 2]], 20, stop_tokens=()).tokens[0]
    ends = replace(lm, eos_ids=(int(plain[4]),))
    assert ends.generate([[1, 2]], 20).tokens[0].tolist() == plain[: plain.tolist().index(plain[4]) + 1].tolist()
    (folder / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(UserError, match="generation_config.json: field 'eos_token_id'='</s>'"):
        mtp_jax.load(folder)


def expected_losses(lm, rows, segments, positions, config):
    """Losses of a batch from `LanguageModel.logits`, document by document: each alone, as the mask makes it."""
    depth, length = kind_of(config).depth, config.data.sequence_length
    sums, count = np.zeros(depth + 1), 0
    for row, segment in zip(rows, segments, strict=True):
        for document in np.unique(segment[segment != 0]):
            at = np.flatnonzero(segment == document)
            at = at[at <= length + depth]
            tokens = row[at]
            for k in range(depth + 1):
                # Depth k at i reads to i + k and predicts i + 1 + k; rows end at `length`, the lookahead is beyond.
                keep = [i for i in range(len(tokens) - 1 - k) if at[i] < length]
                if not keep:
                    continue
                padded = np.concatenate([tokens, np.zeros(length + 1 + 2 * depth - len(tokens), int)])
                logits = lm.logits(padded[None])[0, :, k]
                logp = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
                logp -= logits.max(-1, keepdims=True)
                sums[k] -= sum(logp[i, tokens[i + 1 + k]] for i in keep)
                count += len(keep) if k == 0 else 0
    return sums / count


# ---------------------------------------------------------------------------------------------------------------
# fp8


def test_block_wise_fp8_is_dequantised(monkeypatch, tmp_path):
    """A folder with fp8 weights equals the folder with the values of their plain loop, rounded to bfloat16."""
    trained(tmp_path / "run", "--config.model.embed_dim=160", "--config.mtp.depth=1")
    convert_here(
        monkeypatch, "export", f"--workdir={tmp_path / 'run'}", f"--hf={tmp_path / 'bf16'}", "--dtype=bfloat16"
    )
    files = TensorFolder(tmp_path / "bf16")
    arrays = {name: files.read(name) for name in files.infos}
    specs, out, expected = {}, {}, dict(arrays)
    rng = np.random.default_rng(0)
    for name, array in arrays.items():
        if array.ndim == 2 and "proj" in name and "eh_proj" not in name:
            scale = rng.uniform(0.5, 2.0, [-(-n // fp8.BLOCK) for n in array.shape]).astype(np.float32)
            quantised = array.astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
            out[name], out[name + "_scale_inv"] = quantised, scale
            rows, columns = (np.arange(n) // fp8.BLOCK for n in array.shape)
            full = scale[rows][:, columns] * quantised.astype(np.float32)
            expected[name] = full.astype(ml_dtypes.bfloat16)
        else:
            out[name] = array
    kinds = {"float8_e4m3fn": "F8_E4M3", "bfloat16": "BF16", "float32": "F32"}
    specs = {name: (kinds[array.dtype.name], array.shape) for name, array in out.items()}
    shutil.copytree(tmp_path / "bf16", tmp_path / "fp8")
    (tmp_path / "fp8" / "model.safetensors").unlink()
    write_folder(tmp_path / "fp8", specs, out.items())
    values = json.loads((tmp_path / "bf16" / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(values))

    convert_here(monkeypatch, "import", f"--hf={tmp_path / 'fp8'}", f"--workdir={tmp_path / 'imported'}")
    convert_here(monkeypatch, "export", f"--workdir={tmp_path / 'imported'}", f"--hf={tmp_path / 'back'}")
    found = tensors_of(tmp_path / "back")
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name] == (kinds[array.dtype.name], array.shape, array.tobytes()), name
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


# ---------------------------------------------------------------------------------------------------------------
# Conventions


@pytest.mark.usefixtures("one_device")
def test_check_tells_the_order_a_model_was_trained_with_from_the_other(monkeypatch, capfd, tmp_path):
    """An import under the wrong order, as stated by config.json, is noticed."""
    small = ["--config.model.num_layers=2", "--config.model.num_experts=0", "--config.mtp.depth=1"]
    small += ["--config.data.sequence_length=64", "--config.optimizer.learning_rate=1e-2"]
    small += ["--config.training.num_steps=100", "--config.training.log_every=50", "--config.checkpoint.every=100"]
    loop.train(load_config(TINY, [*SMALL, *small]), str(tmp_path / "run"))
    convert_here(monkeypatch, "export", f"--workdir={tmp_path / 'run'}", f"--hf={tmp_path / 'hf'}")
    reconfigure(tmp_path / "hf", mtp_conventions={"concat_order": "hidden_first"})
    capfd.readouterr()
    tokenizer = data.load_tokenizer("bytes")
    monkeypatch.setattr(data, "load_tokenizer", lambda path: tokenizer)
    argv = ["import", f"--hf={tmp_path / 'hf'}", f"--workdir={tmp_path / 'wrong'}"]
    assert run_here(monkeypatch, convert.main, *argv, "--check") == 2  # no tokenizer, no text
    assert "no tokenizer.json" in capfd.readouterr().err and not (tmp_path / "wrong").exists()
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    convert_here(monkeypatch, *argv, f"--check={ROOT / 'mtp_jax' / 'cli.py'}")
    printed = capfd.readouterr().out
    losses = re.findall(r"^(\w+_first) .* (\d+\.\d+)(  <- configured)?$", printed, re.MULTILINE)
    right, wrong = ([float(loss) for order, loss, _ in losses if order == wanted] for wanted in ORDERS)
    assert len(right) == len(wrong) == 4 and max(right) + 0.1 < min(wrong)
    assert [order for order, _, mark in losses if mark] == ["hidden_first"]
    assert "warning: the configured conventions have an MTP loss of" in printed
    assert re.search(r"with .*mtp.concat_order=embedding_first", printed)


ORDERS = ("embedding_first", "hidden_first")


def test_check_is_content_where_the_configured_conventions_are_best():
    choices = [{"concat_order": order, "decoder_hidden": "after_norm"} for order in ORDERS]
    best, other = conventions.Outcome(choices[0], (2.0, 2.5)), conventions.Outcome(choices[1], (2.0, 8.0))
    assert "the configured conventions have the lowest MTP loss (main model 2.000)" in conventions.table([best, other])
    assert "2.500 with mtp.concat_order=embedding_first" in conventions.table([other, best])
    near = conventions.Outcome(choices[1], (2.0, 2.505))
    assert "text does not distinguish them" in conventions.table([near, best])
    assert "not finite" in conventions.table([best, conventions.Outcome(choices[1], (2.0, float("nan")))])


# ---------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A valid folder, exported once."""
    folder = tmp_path_factory.mktemp("exported")
    trained(folder / "run")
    sys.argv = ["convert"]
    convert.main(["export", f"--workdir={folder / 'run'}", f"--hf={folder / 'hf'}"])
    return folder / "hf"


def rewrite(path, change):
    """The folder's tensors after change(dict name -> array)."""
    files = TensorFolder(path)
    arrays = {name: files.read(name) for name in files.infos}
    change(arrays)
    (path / "model.safetensors").unlink()
    write_folder(path, {n: ("F32", a.shape) for n, a in arrays.items()}, arrays.items())


def without(name):
    return lambda path: rewrite(path, lambda tensors: tensors.pop(name))


def reconfigure(path, **values):
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def truncate(path):
    file = path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1000)


def index(path):
    names = dict.fromkeys(tensors_of(path), "model-00001-of-00002.safetensors")
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    names["model.norm.weight"] = "model-00002-of-00002.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def as_integers(path):
    files = TensorFolder(path)
    arrays = {name: files.read(name) for name in files.infos}
    arrays["model.norm.weight"] = arrays["model.norm.weight"].astype(np.int8)
    (path / "model.safetensors").unlink()
    kinds = {"int8": "I8", "float32": "F32"}
    write_folder(path, {n: (kinds[a.dtype.name], a.shape) for n, a in arrays.items()}, arrays.items())


def late(path):
    """In the last row, where nothing is compared with the first ones any more."""

    def change(tensors):
        tensors[HEAD] = tensors[HEAD].copy()
        tensors[HEAD][-1, -1] += 1

    rewrite(path, change)


def without_mtp(path):
    """As transformers saves such a model: config.json states MTP layers, the files have none."""

    def change(tensors):
        for name in [n for n in tensors if n.startswith(("model.layers.3.", "model.layers.4."))]:
            del tensors[name]

    rewrite(path, change)


def test_mtp_layers_that_are_stated_and_absent_are_left_out_with_one_line(monkeypatch, capfd, tmp_path, exported):
    """Wherever such a folder is named: mtp_jax.load, eval.py, init_from and convert import."""
    from mtp_jax.evaluation import decode_tasks

    rows = np.random.default_rng(0).integers(0, 261, (2, 12))
    expected = mtp_jax.load(exported, depth=0).logits(rows)
    for name in ("load", "eval", "init_from", "import"):
        shutil.copytree(exported, tmp_path / name)
        without_mtp(tmp_path / name)
    capfd.readouterr()
    loaded = [mtp_jax.load(tmp_path / "load"), decode_tasks.load_model(str(tmp_path / "eval"))]
    convert_here(monkeypatch, "import", f"--hf={tmp_path / 'import'}", f"--workdir={tmp_path / 'imported'}")
    built = abstract_model(loaded[0].config.architecture)
    init_from.check_source(str(tmp_path / "init_from"), {"params": built.params, "biases": built.biases})
    for lm in (*loaded, mtp_jax.load(tmp_path / "imported")):
        assert kind_of(lm.config).depth == 0
        np.testing.assert_array_equal(lm.logits(rows), expected)
    lines = [line for line in capfd.readouterr().err.splitlines() if "MTP layer(s)" in line]
    assert len(lines) == 4 and all(
        "states 2 MTP layer(s) and the files have none: loaded at depth 0" in n for n in lines
    )
    with pytest.raises(UserError, match="has no tensor model.layers.3"):
        mtp_jax.load(tmp_path / "load", depth=2)


def test_tensors_that_a_family_cannot_hold_are_left_out_with_one_line(capfd, tmp_path):
    """ERNIE's own MTP layer, under names that no table has."""
    reference = hf_models.build("ernie4_5_moe", tmp_path / "hf", style="released")
    files = TensorFolder(tmp_path / "hf")
    arrays = {name: files.read(name) for name in files.infos}
    arrays["model.mtp_block.0.mlp.gate_proj.weight"] = np.ones((3, 4), np.float32)
    (tmp_path / "hf" / "model.safetensors").unlink()
    write_folder(tmp_path / "hf", {n: ("F32", a.shape) for n, a in arrays.items()}, arrays.items())
    reconfigure(tmp_path / "hf", num_nextn_predict_layers=1)
    rows = hf_models.tokens_of("ernie4_5_moe")
    ours = mtp_jax.load(tmp_path / "hf", compute_dtype="float32").logits(rows)
    np.testing.assert_allclose(ours, reference.logits(rows), atol=2e-5, rtol=0)
    err = capfd.readouterr().err
    assert "states 1 MTP layer(s)" in err and "tensors model.mtp_* are left out: its MTP layer is a dense block" in err


HEAD = "model.layers.3.shared_head.head.weight"
MAIN_ALONE = ["mtp_jax.tools.convert import --hf=FOLDER --workdir=DIR --depth=0` and give DIR", "load(..., depth=0)"]
CORRUPT = {
    "missing tensor": (without("model.layers.1.mlp.gate.weight"), ["model.layers.1.mlp.gate.weight"]),
    "missing MTP tensor": (without("model.layers.4.enorm.weight"), ["model.layers.4.enorm", *MAIN_ALONE]),
    "extra tensor": (lambda p: rewrite(p, lambda t: t.update(more=t[HEAD])), ["tensor more", "does not imply"]),
    "wrong shape": (lambda p: reconfigure(p, vocab_size=300), ["(264, 32)", "(300, 32)"]),
    "a head of its own": (lambda p: rewrite(p, lambda t: t.update({HEAD: t[HEAD] + 1})), [HEAD, "lm_head.weight"]),
    "more blocks than there are": (
        lambda p: reconfigure(p, num_hidden_layers=10**9),
        ["'num_hidden_layers'=1000000000 is more than the 5 in the files"],
    ),
    "more experts than there are": (
        lambda p: reconfigure(p, n_routed_experts=65_536, n_group=1, topk_group=1),
        ["'n_routed_experts'=65536 is more than the 4 in the files"],
    ),
    "nested": (
        lambda p: (p / "config.json").write_text('{"model_type": ' + "[" * 50_000 + "]" * 50_000 + "}"),
        ["config.json", "nested deeper than 32 levels"],
    ),
    "truncated": (truncate, ["model.safetensors", "bytes"]),
    "missing shard": (index, ["model-00002-of-00002.safetensors"]),
    "unknown family": (lambda p: reconfigure(p, model_type="gemma3"), ["gemma3", "four norms", "deepseek_v3"]),
    "unsupported value": (lambda p: reconfigure(p, hidden_act="gelu"), ["hidden_act", "gelu"]),
    "unknown field": (lambda p: reconfigure(p, attention_sinks=4), ["attention_sinks", "ignore"]),
    "no config": (lambda p: (p / "config.json").unlink(), ["config.json"]),
    "integer weights": (as_integers, ["model.norm.weight", "I8", "bfloat16"]),
    "a repetition that differs late": (late, [HEAD, "lm_head.weight"]),
    "MTP layers unannounced": (lambda p: reconfigure(p, num_nextn_predict_layers=0), ["_predict_layers", *MAIN_ALONE]),
    "a dangling side file": (lambda p: (p / "vocab.txt").symlink_to("nowhere"), ["vocab.txt", "cannot be copied"]),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), ["safetensors"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CORRUPT)
def test_a_corrupt_folder_is_refused_in_one_line(monkeypatch, capfd, tmp_path, exported, name):
    change, parts = CORRUPT[name]
    monkeypatch.setattr(folder_checks, "_ROWS", 100)  # of the repeated tensors compared at a time, of 264
    shutil.copytree(exported, tmp_path / "hf")
    change(tmp_path / "hf")
    assert (
        run_here(monkeypatch, convert.main, "import", f"--hf={tmp_path / 'hf'}", f"--workdir={tmp_path / 'run'}") == 2
    )
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line, line
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


REFUSED = {
    "no action": ([], ["action"]),
    "unknown action": (["convert"], ["convert"]),
    "no folder": (["import", "--hf=nowhere", "--workdir={tmp}/run"], ["nowhere"]),
    "another family": (["import", "--hf={hf}", "--workdir={tmp}/run", "--family=mimo"], ["=mimo", "deepseek_v3"]),
    "an unknown family": (["import", "--hf={hf}", "--workdir={tmp}/run", "--family=gpt"], ["--family=gpt", "glm4_moe"]),
    "a workdir that exists": (["import", "--hf={hf}", "--workdir={hf}"], ["exists already"]),
    "a workdir under a file": (["import", "--hf={hf}", "--workdir={hf}/config.json/run"], ["cannot be written"]),
    "no run": (["export", "--workdir={tmp}/run", "--hf={tmp}/hf"], ["no such folder"]),
    "overrides": (["import", "--hf={hf}", "--workdir={tmp}/run", "--config.seed=1"], ["--config.seed=1"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_unusable_arguments_are_refused_in_one_line(monkeypatch, capfd, tmp_path, exported, name):
    argv, parts = REFUSED[name]
    argv = [a.format(tmp=tmp_path, hf=exported) for a in argv]
    assert run_here(monkeypatch, convert.main, *argv) == 2
    (line,) = capfd.readouterr().err.splitlines()
    for part in parts:
        assert part in line, line
    assert not list(tmp_path.iterdir())


def test_parallel_heads_have_no_layout_but_their_main_model_has(monkeypatch, capfd, tmp_path):
    trained(tmp_path / "run", "--config.mtp.kind=parallel", "--config.mtp.depth=1")
    argv = ["export", f"--workdir={tmp_path / 'run'}", f"--hf={tmp_path / 'hf'}"]
    assert run_here(monkeypatch, convert.main, *argv) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "parallel" in line and "depth" in line and not (tmp_path / "hf").exists()
    convert_here(monkeypatch, *argv, "--depth=0")
    rows = np.random.default_rng(0).integers(0, 261, (2, 12))
    ours, alone = mtp_jax.load(tmp_path / "run"), mtp_jax.load(tmp_path / "hf")
    np.testing.assert_allclose(alone.logits(rows)[:, :11, 0], ours.logits(rows)[:, :, 0], atol=1e-5)


@pytest.mark.parametrize("action", ["import", "export"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, exported, action):
    """Files may not grow beyond 20 kB: the system's error is then handled like that of a full disk."""
    trained(tmp_path / "run")
    argv = {
        "import": ["import", f"--hf={exported}", f"--workdir={tmp_path / 'out'}"],
        "export": ["export", f"--workdir={tmp_path / 'run'}", f"--hf={tmp_path / 'out'}"],
    }[action]
    limit = "import resource, signal, runpy, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
    limit += "runpy.run_module('mtp_jax.tools.convert', run_name='__main__')"
    command = [sys.executable, "-B", "-c", limit, *argv]  # -B: bytecode written under the limit would be truncated
    done = subprocess.run(command, cwd=ROOT, env=CPU, capture_output=True, text=True, timeout=300, check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode in (1, 2) and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    assert re.search(r"out.*(cannot|too large)", errors[0]), errors
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_too_little_space_is_reported_before_anything_is_written(monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with (
        pytest.raises(UserError, match=r"out: needs 5\.0 GiB and the disk has 0\.0"),
        storage.fresh_folder(tmp_path / "out", 5 << 30),
    ):
        pytest.fail("the block must not run")
    assert not list(tmp_path.iterdir())
