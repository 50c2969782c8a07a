"""Parts shared by tests of single MTP kinds: a small model, its state, a batch, training on meshes and as a command."""

import dataclasses
import math

from mtp_jax.config import MeshConfig, load_config
from mtp_jax.training.loop import Resume, train
from mtp_jax.training.metrics import read_metrics
from tests.test_mistakes import rows, run_steps

SMALL = [
    "--config.model.vocab_size=40",
    "--config.model.num_layers=2",
    "--config.model.num_dense_layers=1",
    "--config.data.sequence_length=16",
]


def small(*overrides):
    """configs/tiny.py made smaller, on one device."""
    return dataclasses.replace(load_config("configs/tiny.py", [*SMALL, *overrides]), mesh=MeshConfig(data=1))


def batch_of(config, seed=0, num_padding=2):
    """Packed random documents, int32[B, T + 1 + lookahead] each."""
    return rows(config, seed, num_padding)


def steps(config, batches, **sizes):
    """Metrics of one step per batch on a mesh of these sizes, and the final state."""
    mesh = MeshConfig(**{"data": 1, **sizes})
    num_devices = math.prod(vars(mesh).values())
    state, metrics = run_steps(dataclasses.replace(config, mesh=mesh), batches, num_devices)
    return metrics, state


def trained_and_resumed(config, workdir):
    """Metrics of a run of four steps, and of the same run continued from its checkpoint of step 2."""
    data = dataclasses.replace(config.data, source="synthetic", synthetic_documents=200)
    checkpoint = dataclasses.replace(config.checkpoint, every=2)
    training = dataclasses.replace(config.training, num_steps=4, eval_batches=1, sample_tokens=0)
    config = dataclasses.replace(config, data=data, checkpoint=checkpoint, training=training, mesh=MeshConfig())
    found = []
    for resume in (None, Resume(step=2)):
        train(config, str(workdir / "run"), resume)
        found.append(read_metrics(workdir / "run" / "metrics.jsonl"))
    assert (workdir / "run" / "checkpoints" / "4.superseded").is_dir()  # the second run did begin at step 2
    return found
