"""Memory and time of the weight conversion: a synthetic checkpoint is imported, exported and compared.

    python benchmarks/convert.py [--gib=4]

Appends a line to benchmarks/results/convert.jsonl: seconds and peak resident memory (VmHWM) of import and export, each
in a separate process, and the sizes of the checkpoint and of a layer. Requires three times the size on disk.
"""

import argparse
import datetime
import filecmp
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "convert.jsonl"
sys.path.insert(0, str(ROOT))

# Program of a child process: runs the command line, then prints the process's peak memory.
CHILD = """
import runpy, sys
try:
    runpy.run_module("mtp_jax.tools.convert", run_name="__main__")
finally:
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print("PEAK_KIB", peak.split()[1])
"""


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--gib", type=float, default=4.0)
    args = flags.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        config, num_bytes, layer_bytes = write_checkpoint(folder / "hf", args.gib)
        into = convert("import", f"--hf={folder / 'hf'}", f"--workdir={folder / 'run'}")
        out = convert("export", f"--workdir={folder / 'run'}", f"--hf={folder / 'back'}")
        names = sorted(p.name for p in (folder / "hf").iterdir())
        equal = filecmp.cmpfiles(folder / "hf", folder / "back", names, shallow=False)
        assert sorted(equal[0]) == names, f"differ: {equal[1]}, missing: {equal[2]}"
    record = {
        **{"benchmark": "convert", "gib": round(num_bytes / 2**30, 2), "layer_gib": round(layer_bytes / 2**30, 2)},
        **{
            f"{name}_{key}": value
            for name, found in (("import", into), ("export", out))
            for key, value in found.items()
        },
        **{"round_trip_equal": True, "layers": config["num_hidden_layers"], "cpus": os.cpu_count()},
        **{"machine": platform.machine(), "python": platform.python_version(), "commit": commit()},
        "date": datetime.date.today().isoformat(),
    }
    print(json.dumps(record))
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(record) + "\n")


def write_checkpoint(folder: pathlib.Path, gib: float) -> tuple[dict, int, int]:
    """Writes random bfloat16 weights in DeepSeek-V3's layout with one MTP layer; returns config.json, the bytes of the
    checkpoint and those of a layer."""
    import ml_dtypes

    from mtp_jax.config import Config, ModelConfig, MTPConfig
    from mtp_jax.interop import config_json, weights
    from mtp_jax.interop.tensorfiles import DTYPES, write_folder

    layer = 160e6 * 2  # bytes of one block with the sizes below
    model = ModelConfig(
        **{"vocab_size": 32_000, "num_layers": max(3, round(gib * 2**30 / layer) - 1), "embed_dim": 2048},
        **{"num_heads": 16, "q_lora_rank": 768, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
        **{"v_head_dim": 128, "ffn_dim": 10_944, "num_experts": 32, "expert_dim": 704, "num_shared_experts": 1},
        **{"num_experts_per_token": 4, "param_dtype": "bfloat16", "compute_dtype": "bfloat16"},
    )
    config = Config(model=model, mtp=MTPConfig(kind="sequential", depth=1))
    values = config_json.from_config(config, "deepseek_v3") | {"torch_dtype": "bfloat16"}
    listed = weights.tensors(config, "deepseek_v3")
    specs = {t.name: ("F32" if t.path[0] == "biases" else "BF16", t.shape) for t in listed}
    rng, first = np.random.default_rng(0), {}

    def arrays():
        for t in listed:
            array = first.get(t.path) if t.repeats else rng.standard_normal(t.shape, np.float32)
            if not t.repeats and t.path[-1] in ("embed", "unembed"):
                first[t.path] = array
            yield t.name, array.astype(DTYPES[specs[t.name][0]])

    assert DTYPES["BF16"] == ml_dtypes.bfloat16
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    write_folder(folder, specs, arrays(), shard_bytes=5_000_000_000)
    sizes = {name: DTYPES[kind].itemsize * int(np.prod(shape)) for name, (kind, shape) in specs.items()}
    per_layer = sum(size for name, size in sizes.items() if name.startswith("model.layers.1."))
    return values, sum(sizes.values()), per_layer


def convert(*argv: str) -> dict:
    """Returns seconds and peak GiB of one command in a separate process, on one device."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))} | {"JAX_PLATFORMS": "cpu"}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *argv], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    seconds = time.monotonic() - started
    peak = next(line for line in done.stdout.splitlines() if line.startswith("PEAK_KIB"))
    return {"seconds": round(seconds, 1), "peak_gib": round(int(peak.split()[1]) / 2**20, 2)}


def commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
