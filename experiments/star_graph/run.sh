#!/usr/bin/env bash
# Star graph G(2,3), three kinds, five seeds, after 1000 and 2500 steps: the table, and the same in experiments/star_graph/results/.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python} here=experiments/star_graph out=runs/experiments/star_graph

[ -s $out/data/train.jsonl ] || $python $here/graphs.py --output=$out/data
$python -m mtp_jax.tools.sweep --config=$here/config.py --workdir=$out/runs --jobs="${JOBS:-1}" \
  --over='training.num_steps=1000,2500' --over="seed=${SEEDS:-0,1,2,3,4}" \
  --over='mtp.kind,mtp.depth=(none,1),(parallel,1),(sequential,1)' \
  --tasks=star_graph --eval.tasks_dir=$here --eval.batch_size=125 "$@"
mkdir -p $here/results
$python -m mtp_jax.tools.report --sweep=$out/runs --output=$here/results/curves.png \
  --markdown=$here/results/table.md --json=$here/results/table.json
