"""A run prepared for training or evaluation: data, mesh, step, and the weights of a checkpoint."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from mtp_jax import data, sharding, storage
from mtp_jax.config import Config, MeshConfig, UserError
from mtp_jax.data.corpus import Split
from mtp_jax.model import Tree, validate
from mtp_jax.mtp import kind_of
from mtp_jax.training import workdir as workdirs
from mtp_jax.training.checkpoint import Checkpoints
from mtp_jax.training.init_from import MODEL_PARTS
from mtp_jax.training.step import Trainer, make_trainer


@dataclass(frozen=True)
class Run:
    """A prepared run and its current state."""

    config: Config
    corpus: data.Corpus
    mesh: jax.sharding.Mesh
    trainer: Trainer
    state: Tree

    @property
    def step(self) -> int:
        """Number of steps done."""
        return int(self.state["step"])


def restore(workdir: str) -> Run:
    """Returns the run in `workdir` at its newest valid checkpoint, for evaluation on any number of devices.

    Where the mesh of the training does not fit, rows are sharded over as many of the devices as divide them.

    Raises:
      UserError: no run in `workdir`, or one that has saved nothing yet.
      CheckpointError: none of its checkpoints is valid.
    """
    config, num_devices = workdirs.read_config(workdir), jax.device_count()
    try:
        validate(config, num_devices)
    except UserError:
        parts = replace(config.training, grad_accum_steps=1)
        num_devices = next(n for n in range(num_devices, 0, -1) if config.data.batch_size % n == 0)
        config = replace(config, mesh=MeshConfig(), training=parts)
    run = set_up(config, num_devices)
    with jax.set_mesh(run.mesh), Checkpoints(storage.path(workdir) / workdirs.CHECKPOINTS) as saved:
        if not saved.steps():
            raise UserError(f"--workdir={workdir}: has no checkpoints yet; train it first")
        step, state = saved.restore_part(None, {name: run.trainer.abstract_state[name] for name in MODEL_PARTS})
    return replace(run, state=state | {"step": np.int32(step)})


def set_up(config: Config, num_devices: int | None = None) -> Run:
    """Checks the config, prepares the data and builds the mesh and the step; allocates no weights.

    Args:
      config: the run.
      num_devices: number of devices to use; None: all.

    Raises:
      UserError: a config, data or mesh that cannot be used.
    """
    devices = jax.devices()[:num_devices]
    validate(config, len(devices))
    corpus = data.prepare(config, kind_of(config).lookahead, jax.process_count())
    config = with_vocabulary(config, corpus.tokenizer.vocab_size)
    validate(config, len(devices), corpus.tokenizer.vocab_size)
    mesh = sharding.make_mesh(config.mesh, devices)
    return Run(config, corpus, mesh, make_trainer(config, mesh), state={})


def with_vocabulary(config: Config, tokenizer_size: int) -> Config:
    """Returns `config` with model.vocab_size set: its own, or the tokenizer's rounded up to a multiple of 8."""
    if config.model.vocab_size is not None:
        return config
    return replace(config, model=replace(config.model, vocab_size=-(-tokenizer_size // 8) * 8))


def global_batches(run: Run, split: Split, start_step: int = 0) -> Any:
    """Returns an iterator over global device arrays; each process reads only the rows its devices hold."""
    config, where = run.config, run.trainer.batch_sharding
    shape = (config.data.batch_size, config.data.sequence_length + 1 + run.corpus.lookahead)
    rows = [index[0].indices(shape[0]) for index in where.addressable_devices_indices_map(shape).values()]
    low, high = min(r[0] for r in rows), max(r[1] for r in rows)
    with iter(run.corpus.batches(split, start_step, row_slice=(low, high))) as batches:
        for batch in batches:
            yield {name: _place(value, where, shape, low) for name, value in batch.items()}


def _place(local: np.ndarray, where: Any, shape: tuple[int, int], low: int) -> jax.Array:
    def part(index):
        start, stop, _ = index[0].indices(shape[0])
        return local[start - low : stop - low]

    return jax.make_array_from_callback(shape, where, part)
