"""Compilation of one training step for a topology: the program's text, buffers and live ranges.

Buffers are read from the compiler's dump (`xla_dump_to`, a temporary folder): the buffer assignment lists every value
with its size and its offset in the heap, the live ranges state when it is in use. Both are written before the compiler
refuses a program that does not fit, so such a program is reported like any other.
"""

import pathlib
import tempfile
import time
from dataclasses import dataclass, replace
from typing import cast

import jax

from mtp_jax import sharding
from mtp_jax.config import Config
from mtp_jax.data import tokenizer
from mtp_jax.errors import first_line
from mtp_jax.model import Tree, validate
from mtp_jax.mtp import kind_of
from mtp_jax.tools.planning.matmul_flops import matmul_flops
from mtp_jax.tools.planning.topology import Topology
from mtp_jax.training.run import with_vocabulary
from mtp_jax.training.step import Trainer, make_trainer


class CompilerError(RuntimeError):
    """Raised if the compiler fails for a reason other than memory. Exit code 1."""


@dataclass(frozen=True)
class Program:
    """A compiled step.

    hlo, buffers, live: the compiler's texts of the scheduled program, the buffer assignment and the live ranges.
    is_over_full: True if it needs more memory than the chip has.
    flops: of the executed matrix products, including recomputation, FLOP per device and step.
    lower_seconds, compile_seconds: elapsed time.
    """

    mesh: jax.sharding.Mesh
    trainer: Trainer
    hlo: str
    buffers: str
    live: str
    is_over_full: bool
    flops: float
    lower_seconds: float
    compile_seconds: float


def resolve(config: Config, topology: Topology) -> Config:
    """Returns `config` as it would run on the topology: vocabulary size set, "auto" resolved for TPUs, validated
    against the devices.

    Raises:
      UserError: the config cannot run there.
    """
    num_devices = len(topology.devices)
    if config.model.vocab_size is None:
        config = with_vocabulary(config, tokenizer.load(config.data.tokenizer).vocab_size)
    if config.model.moe_dispatch == "auto":
        config = replace(config, model=replace(config.model, moe_dispatch="ragged"))
    validate(config, num_devices)
    return config


def compile_step(config: Config, topology: Topology) -> Program:
    """Lowers and compiles the step that train.py would run; allocates nothing.

    Args:
      config: from `resolve`.

    Raises:
      CompilerError: the compiler failed for a reason other than memory.
    """
    started = time.perf_counter()
    mesh = sharding.make_mesh(config.mesh, topology.devices)
    with jax.set_mesh(mesh):
        trainer = make_trainer(config, mesh)
        traced = cast(jax.stages.Wrapped, trainer.step).trace(trainer.abstract_state, abstract_batch(config, trainer))
        flops = matmul_flops(traced.jaxpr.jaxpr, mesh.size) / mesh.size
        lowered = traced.lower(lowering_platforms=("tpu",))
        lowered_at = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="mtp_jax_plan_") as folder:
            is_over_full = _compile(lowered, folder)
            return Program(
                mesh,
                trainer,
                hlo=_dumped(folder, "after_optimizations"),
                buffers=_dumped(folder, "buffer-assignment"),
                live=_dumped(folder, "live-range"),
                is_over_full=is_over_full,
                flops=flops,
                lower_seconds=lowered_at - started,
                compile_seconds=time.perf_counter() - lowered_at,
            )


def abstract_batch(config: Config, trainer: Trainer) -> Tree:
    """Returns the shapes of a step's batch."""
    shape = (config.data.batch_size, config.data.sequence_length + 1 + kind_of(config).lookahead)
    one = jax.ShapeDtypeStruct(shape, "int32", sharding=trainer.batch_sharding)
    batch = {"tokens": one, "segment_ids": one, "positions": one}
    if any(source.has_loss_weights for source in config.data.sources):
        batch["loss_mask"] = jax.ShapeDtypeStruct(shape, "float32", sharding=trainer.batch_sharding)
    return batch


def _compile(lowered: jax.stages.Lowered, folder: str) -> bool:
    """Compiles and leaves the dump in `folder`; returns True if the program does not fit."""
    options: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    try:
        lowered.compile(compiler_options=options)
    except Exception as error:  # the compiler raises one type for every reason
        text = str(error)
        if "RESOURCE_EXHAUSTED" in text and "hbm" in text.lower():
            return True
        raise CompilerError(f"the compiler refuses the program: {first_line(error)}") from error
    return False


def _dumped(folder: str, part: str) -> str:
    """Returns the text of the training step's dump whose name ends in `part`."""
    found = [p for p in pathlib.Path(folder).glob(f"*{part}.txt") if ".jit_step." in p.name]
    if not found:
        raise CompilerError(f"the compiler left no {part} text; this libtpu is not known to work, use the one jax pins")
    return found[-1].read_text(encoding="utf-8")
