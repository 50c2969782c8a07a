"""A model trained in seconds to write simple sentences, as a workdir."""

import json
import random

import jax
import pytest

from mtp_jax import sharding
from mtp_jax.config import load_config
from mtp_jax.training.loop import train
from tests.conftest import ROOT

CONTEXT = 96
SMALL = {
    **{"model.num_layers": 1, "model.embed_dim": 48, "model.num_experts": 0, "model.ffn_dim": 64, "model.num_heads": 2},
    **{"model.attention": "gqa", "model.num_kv_heads": 2, "model.head_dim": 24},  # learns in half the steps of mla
    **{
        "data.source": "text_files",
        "data.sequence_length": CONTEXT,
        "data.batch_size": 8,
        "data.packing": "contiguous",
    },
    **{"optimizer.learning_rate": 1e-2, "training.num_steps": 60, "training.log_every": 30, "training.eval_batches": 1},
    **{"training.sample_tokens": 0, "checkpoint.every": 60, "mtp.depth": 2},
}


def sentences(num, seed=0):
    """Texts of a few words, one of them with letters of two and three bytes."""
    rng = random.Random(seed)
    places, names = ["café", "station", "library"], ["Ann", "Bob", "Eve"]
    out = []
    for _ in range(num):
        lines = [
            f"the {rng.choice(places)} is open → {rng.choice(names)} comes at {rng.randrange(1, 5)}." for _ in range(12)
        ]
        out.append("\n".join(lines) + "\n")
    return out


def train_small(folder, **fields):
    """The workdir of a run on one device."""
    pages, workdir = folder / "pages.jsonl", folder / "run"
    pages.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(300)))
    fields = {**SMALL, "data.files": pages, **fields}
    config = load_config(str(ROOT / "configs/tiny.py"), [f"--config.{name}={value}" for name, value in fields.items()])
    make_mesh = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda mesh, devices=None: make_mesh(mesh, jax.devices()[:1]))
        train(config, str(workdir))
    return workdir
