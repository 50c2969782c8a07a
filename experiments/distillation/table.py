"""Writes the table and the picture of the distillation experiment.

python experiments/distillation/table.py --runs=FOLDER --output=FOLDER
"""

import argparse
import json
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

LABELS = {
    "before": "one module, trained for one draft",
    "cross_entropy": "distilled, cross-entropy",
    "total_variation": "distilled, total variation",
    "end_to_end": "distilled, end-to-end total variation",
    "parallel": "new parallel heads, cross-entropy",
    "markov": "new parallel heads with a Markov head",
}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--runs", type=pathlib.Path, required=True)
    flags.add_argument("--output", type=pathlib.Path, required=True)
    args = flags.parse_args()
    results = {path.parent.name: json.loads(path.read_text()) for path in args.runs.glob("*/distill.json")}
    values = {"before": next(iter(results.values()))["before"]}
    values |= {name: results[name]["after"] for name in LABELS if name in results}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "table.json").write_text(json.dumps(values, indent=2) + "\n")
    lines = ["| drafts | prompts | acceptance of draft 1, 2, 3 | tokens per forward pass |", "|---|---|---|---|"]
    for name, domains in values.items():
        for domain, result in domains.items():
            rates = " / ".join(f"{rate:.1%}" for rate in result["acceptance"])
            lines.append(f"| {LABELS[name]} | {domain} | {rates} | {result['tokens_per_forward']:.2f} |")
    text = "\n".join(lines)
    (args.output / "table.md").write_text(text + "\n")
    print(text)
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, domains in values.items():
        rates = [result["acceptance"] for result in domains.values()]
        mean = [sum(each) / len(each) for each in zip(*rates, strict=True)]
        axes.plot(range(1, 1 + len(mean)), mean, marker="o", label=LABELS[name])
    axes.set(xlabel="draft", ylabel="acceptance", xticks=range(1, 4), ylim=(0, 1))
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(args.output / "curves.png", dpi=120)


if __name__ == "__main__":
    main()
