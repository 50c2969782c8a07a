#!/usr/bin/env bash
# n = 1, 2, 4, 8 on bytes of Python: the table, and the same in experiments/code_search/results/.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python} here=experiments/code_search out=runs/experiments/code_search

variants='(none,1),(parallel,1),(parallel,3),(parallel,7),(sequential,1),(sequential,3),(sequential,7)'
$python -m mtp_jax.tools.sweep --config=$here/config.py --workdir=$out --jobs="${JOBS:-1}" \
  --over="mtp.kind,mtp.depth=$variants" --over="seed=${SEEDS:-0,1}" \
  --tasks=loss,acceptance,speculative --eval.limit=16 --eval.max_new_tokens=64 --eval.batch_size=4 "$@"
mkdir -p $here/results
$python -m mtp_jax.tools.report --sweep=$out --output=$here/results/curves.png \
  --markdown=$here/results/table.md --json=$here/results/table.json
