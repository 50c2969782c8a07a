"""Peak memory of a training step by number of MTP depths, and of one more block of the decoder.

    python benchmarks/depth_memory.py [--config=configs/moe_4b.py] [--depths=4] [--config.section.key=VALUE ...]

Runs benchmarks/train_step.py for depth 0 to --depths and for a decoder with one more layer, each in a separate process,
and appends one line to benchmarks/results/h200.jsonl: `peak_gib` by depth; `added_gib` by each depth; `block_gib`, the
memory of one more block of the decoder (weights, moments, gradients, activations). A sequential module is such a block
and the projection M_k, whose weights, moments and gradients are `projection_gib`. `step_ms` and `mfu` are by depth.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks.measuring import RESULTS, ROOT, append  # noqa: E402
from mtp_jax.config import load_config  # noqa: E402

BYTES = 4 + 4 + 4 + 2  # of a weight, its two moments and its gradient in the compute dtype


def measured(config: str, overrides: list[str]) -> dict:
    """Returns the line of a few steps of the config."""
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder) / "line.jsonl"
        command = [sys.executable, str(ROOT / "benchmarks" / "train_step.py"), f"--config={config}", "--steps=5"]
        subprocess.run([*command, f"--output={output}", *overrides], stdout=subprocess.DEVNULL, check=True)
        return json.loads(output.read_text())


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--config", default="configs/moe_4b.py")
    flags.add_argument("--depths", type=int, default=4)
    flags.add_argument("--output", type=pathlib.Path, default=RESULTS)
    args, overrides = flags.parse_known_args()
    model = load_config(args.config, overrides).model
    modules = [["--config.mtp.kind=sequential", f"--config.mtp.depth={d}"] for d in range(1, args.depths + 1)]
    lines = [measured(args.config, overrides + more) for more in [["--config.mtp.kind=none"], *modules]]
    layer = ["--config.mtp.kind=none", f"--config.model.num_layers={model.num_layers + 1}"]
    lines.append(measured(args.config, overrides + layer))
    *peaks, with_block = (line["peak_gib"] for line in lines)
    line = {"benchmark": "depth_memory", "config": pathlib.Path(args.config).stem, "overrides": overrides}
    line |= {"peak_gib": peaks, "added_gib": [round(b - a, 2) for a, b in zip(peaks, peaks[1:], strict=False)]}
    line |= {"block_gib": round(with_block - peaks[0], 2)}
    line |= {"projection_gib": round(BYTES * 2 * model.embed_dim**2 / 2**30, 2)}
    line |= {"step_ms": [each["step_ms"] for each in lines[:-1]], "mfu": [each["mfu"] for each in lines[:-1]]}
    append(args.output, line)


if __name__ == "__main__":
    main()
