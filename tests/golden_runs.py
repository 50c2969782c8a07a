"""Losses and gradient norms of reference runs, and the state they start from, to compare a changed program with.

    python -m tests.golden_runs --record     # writes tests/golden/; only where a change of numbers is intended

Every run trains a small packed model for 20 steps on random documents drawn by numpy, so neither the data pipeline nor
the version of Python matters. `tests/test_golden.py` compares.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile

from mtp_jax.mtp import kind_of

GOLDEN = pathlib.Path(__file__).parent / "golden"
RUNS = GOLDEN / "runs.json"
EXPORTS = GOLDEN / "exports.json"
CHECKPOINTS = GOLDEN / "checkpoints"  # one archive of a workdir for each kind of RESUMED, with expected.json in it

KINDS = ("none", "parallel", "sequential")
RESUMED = ("parallel", "sequential")
MESHES = {"one": {"data": 1}, "eight": {"data": 1, "fsdp": 2, "expert": 2, "context": 2}}
NUM_STEPS = 20
RESUME = [
    "--config=configs/tiny.py",
    *("--config.data.source=synthetic", "--config.data.sequence_length=16", "--config.data.batch_size=8"),
    *("--config.training.sample_tokens=0", "--config.training.eval_batches=1", "--config.checkpoint.every=2"),
    *("--config.model.num_layers=3", "--config.model.embed_dim=16", "--config.model.num_heads=2"),
    *("--config.model.ffn_dim=16", "--config.model.expert_dim=8", "--config.mtp.depth=1"),
    *("--config.mtp.parameter_matched=false", "--config.data.synthetic_documents=200"),
]


def config_of(kind):
    """A small model of a kind, with the fewest blocks that every kind can have."""
    from tests.test_meshes import small

    return small(kind)


def run(kind, mesh_name):
    """[(loss, gradient norm)] of each step."""
    import jax
    import numpy as np

    from mtp_jax.config import MeshConfig
    from mtp_jax.sharding import make_mesh
    from mtp_jax.training.step import make_trainer

    was_quick = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)  # compiled in half the time
    config = dataclasses.replace(config_of(kind), mesh=MeshConfig(**MESHES[mesh_name]))
    mesh = make_mesh(config.mesh, jax.devices()[: math.prod(vars(config.mesh).values())])
    with jax.set_mesh(mesh):
        trainer = make_trainer(config, mesh)
        state, found = trainer.init(), []
        for seed in range(NUM_STEPS):
            batch = jax.device_put(_batch(config, seed), trainer.batch_sharding)
            state, metrics = trainer.step(state, batch)
            found.append((metrics["loss"], metrics["grad_norm"]))
    jax.config.update("jax_disable_most_optimizations", was_quick)
    return [[float(np.asarray(x)) for x in pair] for pair in jax.device_get(found)]


def _batch(config, seed):
    import numpy as np

    from tests.bridge import packed_rows

    shape = config.data.batch_size, config.data.sequence_length + 3, config.model.vocab_size
    tokens, segment_ids, positions = packed_rows(np.random.default_rng(seed), *shape, num_padding=2)
    values = {"tokens": tokens, "segment_ids": segment_ids, "positions": positions}
    length = config.data.sequence_length + 1 + _lookahead(config)
    return {name: np.asarray(value[:, :length], np.int32) for name, value in values.items()}


def _lookahead(config):
    return kind_of(config).depth


def exports():
    """SHA-256 of every file that a model of each layout, with random weights, is exported to."""
    import numpy as np
    from flax.traverse_util import flatten_dict

    from mtp_jax.config import with_values
    from mtp_jax.interop import config_json, layouts, weights
    from mtp_jax.interop.tensorfiles import write_folder
    from mtp_jax.model import abstract_model

    found = {}
    for kind, changes in {"none": {}, "sequential": {}, "sequential_gqa": {"attention": "gqa"}}.items():
        config = config_of("gqa" if changes else kind)
        if changes:  # as GLM-4.5 lays its heads out
            config = with_values(config, {"model.rope.interleaved": False})
        built, rng = abstract_model(config.architecture), np.random.default_rng(3)
        shapes = sorted(flatten_dict({"params": built.params, "biases": built.biases}).items())
        leaves = {path: rng.standard_normal(leaf.shape, np.float32) for path, leaf in shapes}
        layout = layouts.layout_of(config)
        listed = [t for t in weights.tensors(config, layout) if not t.repeats]
        specs = {t.name: ("F32", t.shape) for t in listed}
        arrays = ((t.name, weights.to_theirs(np.asarray(leaves[t.path][t.at]), t)) for t in listed)
        with tempfile.TemporaryDirectory() as where:
            path = pathlib.Path(where)
            (path / "config.json").write_text(json.dumps(config_json.from_config(config, layout), indent=2))
            write_folder(path, specs, arrays, shard_bytes=5_000_000_000)
            for file in sorted(path.iterdir()):
                found[f"{kind}/{file.name}"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def resume(kind, workdir, num_steps):
    """Train `kind` to a step in a workdir by the command itself, and return its metrics lines."""
    command = [sys.executable, "train.py", *RESUME, f"--config.mtp.kind={kind}", f"--workdir={workdir}"]
    command += [f"--config.training.num_steps={num_steps}", "--config.optimizer.schedule=constant"]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    root = pathlib.Path(__file__).parent.parent
    subprocess.run(command, cwd=root, env=environment, check=True, stdout=subprocess.DEVNULL)
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [{k: row[k] for k in ("step", "loss", "grad_norm")} for row in map(json.loads, lines)]


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--record", action="store_true", required=True)
    flags.parse_args()
    import jax

    GOLDEN.mkdir(exist_ok=True)
    record = {"jax": jax.__version__, "platform": "cpu"}
    record |= {f"{kind}/{name}": run(kind, name) for kind in KINDS for name in MESHES}
    RUNS.write_text(json.dumps(record, indent=1) + "\n")
    EXPORTS.write_text(json.dumps(exports(), indent=1) + "\n")
    CHECKPOINTS.mkdir(exist_ok=True)
    for kind in RESUMED:
        with tempfile.TemporaryDirectory() as where:
            workdir = pathlib.Path(where) / "saved"
            resume(kind, workdir, 2)
            copied = shutil.copytree(workdir, pathlib.Path(where) / "run")
            (workdir / "expected.json").write_text(json.dumps(resume(kind, copied, 4), indent=1) + "\n")
            for events in workdir.glob("events*"):
                events.unlink()
            with tarfile.open(CHECKPOINTS / f"{kind}.tar.xz", "w:xz") as archive:
                archive.add(workdir, arcname=".")


if __name__ == "__main__":
    import tests.conftest  # noqa: F401  eight devices, before jax starts

    main()
