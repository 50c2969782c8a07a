"""One training step, compiled for a topology: the program's text, its buffers, and what the compiler says of memory.

The compiler's own dump is where buffers are read from (`xla_dump_to`, a temporary folder): the buffer assignment lists
every value with its size and its place in the heap, the live ranges say when it is in use. Both are written before an
over-full program is refused, so such a program is reported like any other.
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
    """The compiler failed for another reason than memory. Exit code 1."""


@dataclass(frozen=True)
class Program:
    """A compiled step.

    hlo, buffers, live: the compiler's texts: scheduled program, buffer assignment, live ranges.
    is_over_full: it needs more memory than the chip has.
    flops: of matrix products as executed, recomputation included, FLOP a device and step.
    lower_seconds, compile_seconds: wall clock.
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
    """`config` as it would run on the topology: vocabulary known, "auto" decided for TPUs, checked against the devices.

    Raises:
      UserError: what cannot run there.
    """
    num_devices = len(topology.devices)
    if config.model.vocab_size is None:
        config = with_vocabulary(config, tokenizer.load(config.data.tokenizer).vocab_size)
    if config.model.moe_dispatch == "auto":
        config = replace(config, model=replace(config.model, moe_dispatch="ragged"))
    validate(config, num_devices)
    return config


def compile_step(config: Config, topology: Topology) -> Program:
    """Lower and compile the step that train.py would run; nothing is allocated.

    Args:
      config: from `resolve`.

    Raises:
      CompilerError: the compiler failed, memory excepted.
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
    """A step's batch as shapes."""
    shape = (config.data.batch_size, config.data.sequence_length + 1 + kind_of(config).lookahead)
    one = jax.ShapeDtypeStruct(shape, "int32", sharding=trainer.batch_sharding)
    return {"tokens": one, "segment_ids": one, "positions": one}


def _compile(lowered: jax.stages.Lowered, folder: str) -> bool:
    """Compile and leave the dump in `folder`; True where the program does not fit."""
    options: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    try:
        lowered.compile(compiler_options=options)
    except Exception as error:  # one type for every reason
        text = str(error)
        if "RESOURCE_EXHAUSTED" in text and "hbm" in text.lower():
            return True
        raise CompilerError(f"the compiler refuses the program: {first_line(error)}") from error
    return False


def _dumped(folder: str, part: str) -> str:
    """The text of the training step's dump that ends in `part`."""
    found = [p for p in pathlib.Path(folder).glob(f"*{part}.txt") if ".jit_step." in p.name]
    if not found:
        raise CompilerError(f"the compiler left no {part} text; this libtpu is not known to work, use the one jax pins")
    return found[-1].read_text(encoding="utf-8")
