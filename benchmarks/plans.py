"""Memory, FLOPs and compile time of the full-size models on TPU slices, from the planner on a CPU.

    python benchmarks/plans.py [NAME ...]      # all of them without a name; minutes each

Appends a line per plan to benchmarks/results/plans.jsonl: the command and its results. Settings as in measurements of
other frameworks: bf16 compute, fp32 weights, AdamW with fp32 moments, full recomputation, no offload, rows of 4096
tokens, 4 per chip. Requires libtpu (the extra tpu).
"""

import datetime
import json
import pathlib
import subprocess
import sys
import tempfile
from importlib import metadata

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "plans.jsonl"

LITE = ["--config=configs/deepseek_v2_lite_16b.py", "--topology=v5p:2x2x4", "--config.data.batch_size=64"]
V3 = ["--config=configs/deepseek_v3_671b.py", "--topology=v5p:8x8x4", "--config.optimizer.moment_dtype=float32"]
V3 += ["--config.data.batch_size=1024", "--config.training.grad_accum_steps=1"]
PURE_FSDP = ["--config.mesh.fsdp=-1", "--config.mesh.expert=1"]
TINY = ["--config=configs/tiny.py", "--config.model.remat=full"]
PLANS = {
    "16b_none_fsdp": [*LITE, *PURE_FSDP, "--config.mtp.kind=none"],
    "16b_depth1_fsdp": [*LITE, *PURE_FSDP],
    "671b_none": [*V3, "--config.mtp.kind=none"],
    "671b_depth1": V3,
    "671b_depth1_fsdp": [*V3, *PURE_FSDP],
    "671b_default": V3[:2],
    "moe_4b_depth1": [
        *("--config=configs/moe_4b.py", "--topology=v5p:2x2x1", "--config.data.batch_size=16"),
        *("--config.mtp.kind=sequential", "--config.mesh.data=1", "--config.mesh.fsdp=-1"),
    ],
    **{
        f"layers_{n}": [*TINY, "--topology=v5e:4x4", "--config.data.batch_size=16", f"--config.model.num_layers={n}"]
        for n in (4, 16, 61)
    },
    **{
        topology: [*TINY, f"--topology={topology}", f"--config.data.batch_size={rows}"]
        for topology, rows in (("v5p:4x4x4", 64), ("v6e:8x8", 64), ("tpu7x:4x4x4", 128), ("v5p:8x8x16", 1024))
    },
}
KEPT = ("fits", "peak_hbm_gib", "peak_live_gib", "hbm_gib", "arguments_gib", "params_gib_per_chip", "mesh", "remat") + (
    *(
        "optimizer_gib_per_chip",
        "model_tflops_per_chip",
        "executed_tflops_per_chip",
        "seconds",
        "bound",
        "mfu",
        "estimate",
    ),
    *("lower_seconds", "compile_seconds", "hlo_bytes"),
)


def main(names: list[str]) -> None:
    unknown = set(names) - set(PLANS)
    if unknown:
        sys.exit(f"{', '.join(sorted(unknown))}: no such plan; there are {', '.join(PLANS)}")
    for name in names or PLANS:
        line = record(name, PLANS[name])
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{name}: {line.get('peak_hbm_gib', float('nan')):.2f} GiB, {line.get('compile_seconds', 0):.0f} s")


def record(name: str, arguments: list[str]) -> dict:
    """Returns the result's line; a program that does not fit has one too."""
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder) / "plan.json"
        command = [sys.executable, "-m", "mtp_jax.tools.plan", *arguments, f"--json={output}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        found = json.loads(output.read_text()) if output.exists() else {}
    return {
        "benchmark": "plan",
        "name": name,
        "command": " ".join(["python -m mtp_jax.tools.plan", *arguments]),
        "date": datetime.date.today().isoformat(),
        "versions": {package: metadata.version(package) for package in ("jax", "libtpu")},
        **{key: found[key] for key in KEPT if key in found},
        "error": done.stderr.strip().splitlines()[-1:] if done.returncode else [],
    }


if __name__ == "__main__":
    main(sys.argv[1:])
