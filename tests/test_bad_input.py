"""Bad input of every command and of `mtp_jax.load`: exit code 2, one line with cause and remedy, nothing left."""

import gzip
import json
import os
import resource

import numpy as np
import pytest
from safetensors.numpy import save_file

import eval as eval_script
import mtp_jax
import train as train_script
from mtp_jax.config import load_config, to_dict
from mtp_jax.tools import convert, plan, report, sweep
from tests.commands import run_here

TINY = "configs/tiny.py"
DEEP = "[" * 100_000 + "]" * 100_000
LONG = "x" * 300  # a file name may have 255 bytes
TRAIN = [f"--config={TINY}", "--workdir=TMP/run"]
SYNTHETIC = [*TRAIN, "--config.data.source=synthetic", "--config.training.num_steps=2"]
FILES = [*TRAIN, "--config.data.source=text_files"]
CONFIG = json.dumps(to_dict(load_config(TINY, ["--config.model.vocab_size=264", *SYNTHETIC[2:]])))
METRICS = '{"step": 1, "loss": 1.0}\n'


def train_on_a_full_disk(argv):
    """Runs train.py where files can be made but not grow; the limit of a process stands in for a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, old[1]))
    try:
        train_script.main(argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def load(argv):
    mtp_jax.load(argv[0])


# --- what the files of a case hold ------------------------------------------------------------------------------------

LLAMA = {
    **{"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64},
}


def weights(prefix="model."):
    """A function that writes the tensors of LLAMA."""
    block = {"input_layernorm": (16,), "post_attention_layernorm": (16,)}
    block |= {f"self_attn.{name}_proj": (16, 16) for name in "qkvo"}
    block |= {"mlp.gate_proj": (32, 16), "mlp.up_proj": (32, 16), "mlp.down_proj": (16, 32)}
    shapes = {f"{prefix}layers.0.{name}.weight": shape for name, shape in block.items()}
    shapes |= {f"{prefix}embed_tokens.weight": (32, 16), f"{prefix}norm.weight": (16,), "lm_head.weight": (32, 16)}
    return lambda path: save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, path)


def hf(text=None, **fields):
    """A Hugging Face folder."""
    return {"hf/config.json": text or json.dumps(LLAMA | fields), "hf/model.safetensors": weights()}


def tokenizer(vocab, **model):
    return {"t.json": json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": vocab, "merges": []} | model})}


def link(target):
    return lambda path: path.symlink_to(target)


# --- cases: name -> (files, arguments, words of the line) -------------------------------------------------------------

PARALLEL = ("mtp.kind=parallel",)
TEXT = "data.source=text_files"

# overrides -> what the line must name: the key, its value, the remedy
OVERRIDES = {
    "unknown key": (["optimizer.learning_rat=1"], ["optimizer.learning_rat:", "did you mean optimizer.learning_rate?"]),
    "key of another section": (["training.depth=1"], ["training.depth:", "did you mean mtp.depth?"]),
    "a section": (["mtp=1"], ["mtp:", "no such config key"]),
    "no value": (["mtp.depth"], ["--config.mtp.depth:", "--config.section.key=value"]),
    "text for a number": (["training.num_steps=many"], ["training.num_steps='many'", "type int", "the command line"]),
    "a fraction for a count": (["training.num_steps=1.5"], ["training.num_steps=1.5", "type int"]),
    "a number for a switch": (["mtp.detach_decoder=1"], ["mtp.detach_decoder=1", "type bool"]),
    "bad choice": (["mtp.kind=serial"], ["mtp.kind='serial'", "'none' or 'parallel' or 'sequential'"]),
    "no steps": (["training.num_steps=0"], ["training.num_steps=0", "at least 1"]),
    "too deep": (["mtp.depth=99"], ["mtp.depth=99", "between 1 and 16"]),
    "no decoder left": ([*PARALLEL, "mtp.depth=3"], ["mtp.depth=3", "model.num_layers=4", "a depth of at most 2"]),
    "no layer for experts": (["model.num_dense_layers=4"], ["model.num_dense_layers=4", "set model.num_experts=0"]),
    "dense layers given up": (
        [*PARALLEL, "model.num_dense_layers=3"],
        ["mtp.depth=2", "model.num_dense_layers=3", "use mtp.parameter_matched=false"],
    ),
    "nothing to freeze around": (
        ["mtp.kind=none", "mtp.freeze_decoder=true"],
        ["mtp.freeze_decoder=true", "set mtp.kind"],
    ),
    "odd rotary": (["model.attention=gqa", "model.rotary_fraction=0.34"], ["model.rotary_fraction=0.34", "in pairs"]),
    "no key heads": (["model.attention=gqa", "model.num_kv_heads=0"], ["model.num_kv_heads=0", "at least 1"]),
    "below zero": (["optimizer.warmup_steps=-1"], ["optimizer.warmup_steps=-1", "at least 0"]),
    "not finite": (["optimizer.learning_rate=1e999"], ["optimizer.learning_rate=inf", "finite"]),
    "decay of one": (["optimizer.beta2=1.0"], ["optimizer.beta2=1.0", "below 1"]),
    "huge seed": (["seed=99999999999999999999"], ["seed=9999", "below 2^31"]),
    "schedule in halves": (["mtp.weight_values=(0.1,)"], ["mtp.weight_values=(0.1,)", "mtp.weight_boundaries=()"]),
    "draft loss": (["mtp.kind=top", "mtp.loss=tv"], ["mtp.loss=tv", "mtp.kind=top", "use cross_entropy"]),
    "draft loss of latents": (
        ["mtp.kind=nextlat", "mtp.loss=end_to_end_tv"],
        ["mtp.loss=end_to_end_tv", "mtp.kind=nextlat", "use cross_entropy"],
    ),
    "no draft loss": (["mtp.loss=total"], ["mtp.loss='total'", "'tv'"]),
    "share of everything": (
        ["mtp.cross_entropy_share=0.1"],
        ["mtp.cross_entropy_share=0.1", "mtp.loss=cross_entropy", "use 0"],
    ),
    "whole share": (["mtp.loss=tv", "mtp.cross_entropy_share=1.0"], ["mtp.cross_entropy_share=1.0", "below 1"]),
    "batch and mesh": (["data.batch_size=6", "mesh.data=8"], ["data.batch_size=6", "data=8", "a multiple of 8"]),
    "batch and parts": (["training.grad_accum_steps=3"], ["training.grad_accum_steps=3", "a multiple of"]),
    "context axis": (["data.sequence_length=60", "mesh.context=8"], ["mesh.context=8", "data.sequence_length=60"]),
    "tensor axis": (["mesh.tensor=8"], ["mesh.tensor=8", "model.num_heads=4"]),
    "expert axis": (["model.num_experts=0", "mesh.expert=2"], ["mesh.expert=2", "no experts", "use mesh.data"]),
    "experts and mesh": (["model.num_experts=12", "mesh.expert=8"], ["mesh.expert=8", "model.num_experts=12"]),
    "mesh product": (["mesh.data=3"], ["data=3", "takes 3 devices, there are 8", "set one axis to -1"]),
    "two free axes": (["mesh.fsdp=-1"], ["mesh.data=-1 and mesh.fsdp=-1", "only one"]),
    "axis of no devices": (["mesh.tensor=0"], ["mesh.tensor=0", "at least 1"]),
    "small vocabulary": (["model.vocab_size=256"], ["model.vocab_size=256", "261", "use at least 261"]),
    "no tokenizer": (["data.tokenizer=none/tokenizer.json"], ["data.tokenizer=none/tokenizer.json", "use bytes"]),
    "no files": ([TEXT, "data.files=none/*.txt"], ["data.files=none/*.txt", "matches no file"]),
    "files not given": ([TEXT], ["data.files is empty"]),
    "a huge batch": (["data.batch_size=999999999999"], ["data.batch_size=999999999999", "at most 2^24"]),
    "a long queue": (["data.prefetch=1000000000"], ["data.prefetch=1000000000", "at most 2^10"]),
    "a queue larger than memory": (
        ["data.batch_size=16777216", "data.sequence_length=16777216"],
        ["data.batch_size=16777216", "data.sequence_length=16777216", "data.prefetch=4", "GiB", "lower one"],
    ),
    "too many workers": (["data.num_workers=10000"], ["data.num_workers=10000", "at most 2^9"]),
    "no splits": (["data.split=x"], ["data.split=x", "data.source=python_source has no splits"]),
    "a folder": ([TEXT, "data.files=configs"], ["data.files=configs", "is a folder", "configs/**/*.txt"]),
    "source nowhere": (["init_from=none/run"], ["init_from=none/run", "has no checkpoints/ folder"]),
}

NESTED = "def get_config():\n    out = {}\n    for _ in range(9999):\n        out = {'model': out}\n    return out\n"
CONFIG_FILES = {
    "nested": (NESTED, ["mine.py: get_config() returned a dict nested deeper than 32 levels", "return a config"]),
    "missing": (None, ["no such file", "get_config()"]),
    "syntax error": ("def get_config(:\n", ["invalid syntax"]),
    "no function": ("x = 1\n", ["has no get_config()"]),
    "unknown key": (
        "from mtp_jax.config import default_config\n\n\ndef get_config():\n    config = default_config()\n"
        "    config.mtp.depht = 2\n    return config\n",
        ["(line 6)", "depht", "depth"],
    ),
    "unknown key in a dict": ("def get_config():\n    return {'mtp': {'depht': 2}}\n", ["mtp.depht", "mtp.depth?"]),
    "wrong type": ("def get_config():\n    return {'seed': 'one'}\n", ["seed='one'", "type int"]),
    "raises": ("def get_config():\n    return 1 / 0\n", ["(line 2)", "division by zero"]),
    "exits": ("import sys\n\nsys.exit(0)\n", ["(line 3)", "exits with 0", "return the config"]),
    "exits in the function": ("def get_config():\n    raise SystemExit\n", ["(line 2)", "exits with None"]),
    "exits with a message": ("def get_config():\n    exit('two\\nlines')\n", ["exits with 'two\\nlines'"]),
    "nothing returned": ("def get_config():\n    pass\n", ["returned NoneType", "ConfigDict"]),
}

RUN = {"run/config.json": CONFIG}
STEP = "run/checkpoints/1"
PATHS = {
    "no workdir given": ({}, [f"--config={TINY}"], ["--workdir", "--help"]),
    "no config given": ({}, ["--workdir=TMP/run"], ["--config", "--help"]),
    "an unknown flag": ({}, [*TRAIN, "--steps=3"], ["--steps=3", "--help"]),
    "an argument without a flag": ({}, [*TRAIN, TINY], [TINY, "--help"]),
    "the beginning of a flag": ({}, [*TRAIN, "--work=x"], ["--work=x", "--help"]),
    "an empty workdir": ({}, [f"--config={TINY}", "--workdir="], ["--workdir=: is empty; give a path"]),
    "a long workdir": (
        {},
        [*SYNTHETIC, f"--workdir=TMP/{LONG}"],
        [f"/{LONG}: cannot be written (File name too long)", "use another folder"],
    ),
    "a deep workdir": (
        {},
        [*SYNTHETIC, f"--workdir=TMP/{'x/' * 2500}"],
        ["(File name too long)", "use another folder"],
    ),
    "a null character": ({}, [*SYNTHETIC, "--workdir=TMP/a\0b"], ["a\\x00b: has a null character", "remove it"]),
    "two lines": ({}, [*SYNTHETIC, "--workdir=ftp://a\nb"], ["ftp://a\\nb: ftp:// is not supported", "gs://"]),
    "a workdir that is a file": ({"run": ""}, SYNTHETIC, ["/run: is a file", "give a folder"]),
    "a workdir in a file": ({"run": ""}, [*SYNTHETIC, "--workdir=TMP/run/a"], ["(Not a directory)", "use another"]),
    "a link to nothing": ({"run": link("none")}, SYNTHETIC, ["/run: is a link to none, which leads nowhere", "remove"]),
    "a link to itself": ({"run": link("run")}, SYNTHETIC, ["/run: is a link to run, which leads nowhere", "remove"]),
    "a deep config.json": (
        {"run/config.json": DEEP},
        SYNTHETIC,
        ["config.json: is nested deeper than 32", "restore it"],
    ),
    "config.json is a folder": ({"run/config.json/": ""}, SYNTHETIC, ["config.json in it is a folder", "remove it"]),
    "metrics.jsonl is a folder": (
        {**RUN, "run/metrics.jsonl/": ""},
        SYNTHETIC,
        ["metrics.jsonl in it is a folder", "remove it"],
    ),
    "checkpoints is a file": ({**RUN, "run/checkpoints": ""}, SYNTHETIC, ["checkpoints in it is a file", "remove it"]),
    "checkpoints that vanished": (
        {**RUN, "run/metrics.jsonl": '{"step": 99}\n'},
        SYNTHETIC,
        ["goes to step 99 and checkpoints/ has no checkpoint", "--resume_step=0"],
    ),
    "checkpoints without a config": (
        {"run/checkpoints/9/commit_success.txt": ""},
        SYNTHETIC,
        ["has checkpoints but no config.json", "restore the file"],
    ),
    "a step that is no number": (
        {**RUN, "run/checkpoints/4²/commit_success.txt": ""},
        [*SYNTHETIC, "--resume_step=2"],
        ["--resume_step=2: no checkpoint of this step", "it has none"],
    ),
    "a step below zero": (
        {},
        [*SYNTHETIC, "--resume_step=-1"],
        ["--resume_step=-1", "between 0 and training.num_steps=2"],
    ),
    "a change of what may not": ({}, [*SYNTHETIC, "--change=seed"], ["--change=seed: cannot change", "learning_rate"]),
    "a source without a checkpoint": (
        {"s/config.json": CONFIG, "s/checkpoints/4²/x": ""},
        [*SYNTHETIC, "--config.init_from=TMP/s"],
        ["init_from=", "/s: has no checkpoint that can be read", "the workdir of a trained run"],
    ),
    "a deep source": (
        {"hf/config.json": DEEP},
        [*SYNTHETIC, "--config.init_from=TMP/hf"],
        ["hf/config.json: is nested deeper than 32 levels", "fetch it again"],
    ),
}
BIG = "9" * 400
VALUES = {
    "brackets without end": (["mtp.weight_values=" + "(" * 5000], ["mtp.weight_values='(((", "...", "as in (1, 2)"]),
    "signs without end": ([f"mtp.weight_values={'-' * 5000}1"], ["mtp.weight_values='---", "...", "as in (1, 2)"]),
    "a number beyond floats": ([f"optimizer.learning_rate={BIG}"], ["optimizer.learning_rate=999", "must be finite"]),
    "a number beyond text": ([f"seed={BIG}9"], ["seed=999", "...", "below 2^31"]),
    "half a character": (
        ["training.sample_prompt=ab\udcff"],
        ["training.sample_prompt='ab\\udcff': character 2 is not text", "remove it"],
    ),
    "an unknown tracker": (["training.trackers=('csv',)"], ["training.trackers='csv': no such", "tensorboard"]),
    "steps to trace": (["training.profile=12:10"], ["training.profile='12:10'", "such as 10:12"]),
    "synthetic splits": (
        ["data.split=x", "data.source=synthetic"],
        ["data.split=x", "synthetic has no splits", "leave it"],
    ),
    "file splits": (["data.split=x", TEXT], ["data.split=x", "text_files has no splits", "leave it out"]),
    "no source": (["data.source="], ["data.source=: TFDS cannot open it", "python_source, text_files and synthetic"]),
    "an empty tokenizer": (["data.tokenizer="], ["data.tokenizer=: is empty", "give a path"]),
    "epsilon": (["optimizer.eps=-1"], ["optimizer.eps=-1", "must be above 0"]),
    "epsilon of norms": (["model.norm_eps=-1"], ["model.norm_eps=-1", "must be above 0"]),
    "rotation": (["model.rope.theta=0"], ["model.rope.theta=0", "must be above 1"]),
    "initial weights": (["model.init_std=1e38"], ["model.init_std=1e+38", "between 0 and 10"]),
    "never a checkpoint": ([f"checkpoint.every={10**20}"], [f"checkpoint.every={10**20}", "below 2^31"]),
}
DATA = {
    "brackets": (
        "a.jsonl",
        f'{{"text": {DEEP}}}\n',
        ["a.jsonl line 1: objects or lists are nested too deeply", "remove"],
    ),
    "digits": (
        "a.jsonl",
        '{"text": %s}\n' % ("9" * 5000),
        ["a.jsonl line 1: a number has too many digits", "write it as"],
    ),
    "null": (
        "a.jsonl",
        '{"text": null}\n',
        ["a.jsonl line 1: field 'text' is null", "set data.text_field, or remove the"],
    ),
    "a joined file": (
        "a.jsonl",
        '{"text": "x"}\n\ufeff{"text": "y"}\n',
        ["a.jsonl line 2: begins with a byte order mark", "remove these"],
    ),
    "half a line": ("a.jsonl", '{"text": \n', ["a.jsonl line 1: not JSON", "correct or remove it"]),
    "a surrogate": ("a.jsonl", '{"text": "\\ud800"}\n', ["a.jsonl line 1: field 'text' holds half a", "remove it"]),
    "other fields": (
        "a.jsonl",
        json.dumps({f"field{i}": 1 for i in range(1000)}),
        ["a.jsonl line 1: has no field 'text', only ['field0'", "...; set data.text_field"],
    ),
    "compressed": (
        "a.txt.gz",
        lambda path: path.write_bytes(gzip.compress(b"text\n" * 99)[:-9]),
        ["a.txt.gz: is a truncated or corrupt gzip file", "copy it again"],
    ),
    "a pipe": ("a.txt", os.mkfifo, ["a.txt is a device or a pipe, not a file", "leave it out"]),
    "a link": ("a.txt", link("none"), ["a.txt: cannot be read (No such file or directory)", "remove it from the list"]),
    "no text": ("a.txt", "", ["a.txt: holds no text", "give documents"]),
}
TOKENIZERS = {
    "no tokens": (tokenizer({}), ["t.json: its vocabulary is empty", "give a tokenizer.json with tokens"]),
    "a huge id": (
        tokenizer({"a": 2**32 - 1, "b": 0}, type="WordLevel", unk_token="b"),
        ["t.json: has an id 4,294,967,295", "number its tokens from 0"],
    ),
    "no unknown token": (
        tokenizer({"a": 0}, type="WordLevel", unk_token="[UNK]"),
        ["t.json: cannot encode a text", "[UNK]", "use another tokenizer"],
    ),
    "deep": ({"t.json": f'{{"model": {DEEP}}}'}, ["t.json: not a readable tokenizer.json"]),
    "no JSON": ({"t.json": b"\xff"}, ["t.json: not a readable tokenizer.json", "utf-8"]),
    "a folder": ({"t.json/": ""}, ["t.json: no such file", "the path of a tokenizer.json"]),
}
NAMES = {
    "[1]data.txt": ["data.files=[1]data.txt: not a tuple of strings", "write ./[1]data.txt"],
    "(" * 5000: ["data.files=(((", "not a tuple of strings"],
}
EVALUATED = {
    "no workdir": ({}, [], ["--workdir", "--help"]),
    "no folder": ({}, ["--workdir=none/run"], ["--workdir=none/run: no such folder", "give the folder of a run"]),
    "no run": ({}, ["--workdir=configs"], ["--workdir=configs: has no config.json", "give the folder of a run"]),
    "a file": ({"run": ""}, ["--workdir=TMP/run"], ["/run: is a file", "give the folder of a run"]),
    "no checkpoint": (RUN, ["--workdir=TMP/run"], ["has no checkpoints yet", "train it first"]),
    "a step that is no number": (
        {**RUN, "run/checkpoints/4²/commit_success.txt": ""},
        ["--workdir=TMP/run"],
        ["has no checkpoints yet", "train it first"],
    ),
    "a step without a list": (
        {**RUN, f"{STEP}/commit_success.txt": "", f"{STEP}/integrity/metadata": "{}"},
        ["--workdir=TMP/run"],
        ["checkpoints: none of its checkpoints is valid (steps [1]; 1: its list of leaves", "restore one from a copy"],
    ),
    "a step with a deep list": (
        {**RUN, f"{STEP}/commit_success.txt": "", f"{STEP}/integrity/metadata": DEEP},
        ["--workdir=TMP/run"],
        ["none of its checkpoints is valid", "its list of leaves cannot be read", "restore one from a copy"],
    ),
    "a step with a folder": (
        {**RUN, f"{STEP}/commit_success.txt": "", f"{STEP}/integrity/metadata/": ""},
        ["--workdir=TMP/run"],
        ["none of its checkpoints is valid", "Is a directory", "restore one from a copy"],
    ),
    "an unknown task": (
        RUN,
        ["--workdir=TMP/run", "--tasks=loss,aceptance"],
        ["--tasks=aceptance: no such task; did you mean acceptance?"],
    ),
    "no task": (RUN, ["--workdir=TMP/run", "--tasks="], ["--tasks=: is empty", "give loss"]),
    "no limit": (RUN, ["--workdir=TMP/run", "--limit=0"], ["--limit=0: must be at least 1"]),
    "a limit in words": (RUN, ["--workdir=TMP/run", "--limit=few"], ["--limit", "'few'"]),
    "a setting": (RUN, ["--workdir=TMP/run", "--config.seed=1"], ["--config.seed=1: eval.py takes the config of the"]),
    "an unknown flag": (RUN, ["--workdir=TMP/run", "--out=x.json"], ["--out=x.json", "--help"]),
    "an output nowhere": (
        RUN,
        ["--workdir=TMP/run", "--output=TMP/none/out.json"],
        ["none/out.json: its folder does not exist", "make it first"],
    ),
    "a long output": (RUN, ["--workdir=TMP/run", f"--output=TMP/{LONG}.json"], ["(File name too long)", "use another"]),
}
LOADED = {
    "nothing": ({}, "none", ["path=", "none: no such folder", "give the folder of a run"]),
    "a file": ({"run": ""}, "run", ["path=", "run: is a file", "give the folder of a run"]),
    "an empty folder": ({"run/": ""}, "run", ["path=", "run: has no config.json", "give the folder of a run"]),
    "a run without a checkpoint": (RUN, "run", ["run: has no checkpoints yet", "train it first"]),
    "a deep file": (hf(DEEP), "hf", ["config.json: is nested deeper than 32 levels", "fetch it again"]),
    "layers": (
        hf(num_hidden_layers=10**9),
        "hf",
        ["config.json: field 'num_hidden_layers'=1000000000 is more than the 1 in the files", "of another model"],
    ),
    "other names of tensors": (
        hf() | {"hf/model.safetensors": weights(prefix="")},
        "hf",
        ["its tensors are named layers.0.* and not model.layers.0.*", "save the whole model"],
    ),
    "a context": (
        hf(max_position_embeddings=10**12),
        "hf",
        ["config.json: field 'max_position_embeddings'=1000000000000 must be at most 16777216", "correct the file"],
    ),
    "a vocabulary": (hf(vocab_size=10**15), "hf", ["config.json: model.vocab_size=1000000000000000", "at most 2^24"]),
    "words for numbers": (
        hf(num_hidden_layers="1"),
        "hf",
        ["'num_hidden_layers'='1' must be an integer", "correct the"],
    ),
    "an end that is no token": (hf(eos_token_id="x"), "hf", ["'eos_token_id'='x' must be an integer", "correct it"]),
    "a deep side file": (
        hf() | {"hf/generation_config.json": DEEP},
        "hf",
        ["generation_config.json: is nested", "fetch"],
    ),
    "a tokenizer of nothing": (
        hf() | {"hf/tokenizer.json": "{}"},
        "hf",
        ["tokenizer.json: not a readable tokenizer.json"],
    ),
    "an index of other folders": (
        {"hf/config.json": json.dumps(LLAMA), "hf/model.safetensors.index.json": '{"weight_map": {"a": "../x"}}'},
        "hf",
        ["puts tensor 'a' into '../x', which is no file name", "download it again"],
    ),
}
CONVERTED = {
    "no folder": ({}, ["import", "--hf=", "--workdir=TMP/run"], ["--hf=: is empty", "give a path"]),
    "no workdir": (hf(), ["import", "--hf=TMP/hf", "--workdir="], ["--workdir=: is empty", "give a path"]),
    "layers": (
        hf(num_hidden_layers=10**9),
        ["import", "--hf=TMP/hf", "--workdir=TMP/run"],
        ["=1000000000 is more than"],
    ),
    "a deep run": (
        {"run/config.json": DEEP},
        ["export", "--workdir=TMP/run", "--hf=TMP/out"],
        ["run/config.json: is nested deeper than 32 levels", "restore it"],
    ),
    "a dtype": (
        RUN,
        ["export", "--workdir=TMP/run", "--hf=TMP/out", "--dtype=int8"],
        ["--dtype", "'int8'", "bfloat16"],
    ),
}
REPORTED = {
    "nothing": ({}, [], ["--workdir or --sweep is needed", "--help"]),
    "deep config.json": (
        {"run/metrics.jsonl": METRICS, "run/config.json": DEEP},
        ["--workdir=TMP/run"],
        ["run/config.json: is nested deeper than 32 levels", "remove it"],
    ),
    "metrics that are no numbers": (
        {"run/metrics.jsonl": '{"step": 1, "loss": "low"}\n'},
        ["--workdir=TMP/run"],
        ["run/metrics.jsonl: step 1: loss='low' is not a number", "remove it"],
    ),
    "steps that are no number": (
        {"run/metrics.jsonl": METRICS, "run/config.json": '{"training": {"num_steps": "x"}}'},
        ["--workdir=TMP/run"],
        ["run/config.json: has training.num_steps='x', which is not an integer", "remove it"],
    ),
    "a record of another kind": (
        {"s/a/sweep.json": '{"config": 4}'},
        ["--sweep=TMP/s"],
        ["a/sweep.json: holds a int as its config", "remove it"],
    ),
}
SWEPT = {
    "a long folder": ({}, [f"--workdir=TMP/{LONG}"], ["cannot be used (File name too long)", "give another folder"]),
    "a null character": ({}, ["--workdir=TMP/a\0b"], ["a\\x00b: has a null character", "remove it"]),
    "a record that is a list": ({"s/seed=0/sweep.json": "[]"}, [], ["seed=0/sweep.json: holds a list", "remove it"]),
    "a deep config.json": ({"s/seed=0/config.json": DEEP}, [], ["seed=0/config.json: is nested", "restore it"]),
}
PLANNED = {
    "no config": ({}, ["--config=TMP/a.py", "--topology=v5e:4x4"], ["a.py: no such file", "get_config()"]),
    "a topology": ({}, [f"--config={TINY}", "--topology=v9:2x2"], ["--topology=v9:2x2: unknown", "as in v"]),
    "an output": (
        {},
        [f"--config={TINY}", "--topology=v5e:4x4", "--json=TMP/none/x.json"],
        ["none/x.json: its folder does not exist"],
    ),
}


def overrides(texts):
    return [f"--config.{text}" for text in texts]


def cases():
    """Yields (id, main, files, argv, words)."""
    for name, (texts, words) in (OVERRIDES | VALUES).items():
        yield f"train, {name}", train_script.main, {}, [*TRAIN, *overrides(texts)], words
    for name, (text, words) in CONFIG_FILES.items():
        files = {} if text is None else {"mine.py": text}
        yield f"config file, {name}", train_script.main, files, ["--config=TMP/mine.py", "--workdir=TMP/run"], words
    for name, (file, content, words) in DATA.items():
        argv = [*FILES, f"--config.data.files=TMP/{file}"]
        yield f"data, {name}", train_script.main, {file: content}, argv, words
    for files, words in NAMES.items():
        yield f"data, {files[:20]}", train_script.main, {}, [*FILES, f"--config.data.files={files}"], words
    for name, (files, words) in TOKENIZERS.items():
        argv = [*SYNTHETIC, "--config.data.tokenizer=TMP/t.json"]
        yield f"tokenizer, {name}", train_script.main, files, argv, ["data.tokenizer=", *words]
    for command, main, table, common in (
        ("train", train_script.main, PATHS, []),
        ("eval", eval_script.main, EVALUATED, []),
        ("convert", convert.main, CONVERTED, []),
        ("report", report.main, REPORTED, []),
        ("sweep", sweep.main, SWEPT, [f"--config={TINY}", "--over=seed=0,1", "--workdir=TMP/s"]),
        ("plan", plan.main, PLANNED, []),
    ):
        for name, (files, argv, words) in table.items():
            yield f"{command}, {name}", main, files, [*common, *argv], words
    for name, (files, path, words) in LOADED.items():
        yield f"load, {name}", load, files, [f"TMP/{path}"], words
    words = ["/run: cannot be written (File too large)", "use another folder"]
    yield "train, a full disk", train_on_a_full_disk, {}, SYNTHETIC, words


CASES = {name: case for name, *case in cases()}


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir()
        elif callable(content):
            content(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())


def files_under(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_no_case_is_lost_under_a_name_that_is_there():
    assert len(CASES) == len(list(cases())) >= 60


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name, monkeypatch, capfd, tmp_path):
    main, files, argv, words = CASES[name]
    write(tmp_path, files)
    before = files_under(tmp_path)
    code = run_here(monkeypatch, main, *(text.replace("TMP", str(tmp_path)) for text in argv))
    printed = capfd.readouterr()
    assert (code, printed.out) == (2, ""), printed
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line, line
    assert files_under(tmp_path) == before  # no workdir, no output, nothing half-written
