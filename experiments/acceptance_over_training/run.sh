#!/usr/bin/env bash
# Agreement over training, three kinds, depth 3, three seeds: the tables, and the same in
# experiments/acceptance_over_training/results/. With SIZE=gpu a main model of 24 M parameters and 33 M bytes of
# Python, in results_gpu/.
set -euo pipefail
cd "$(dirname "$0")/../.."
. experiments/sweep.sh
SIZE=${SIZE:-cpu} python=${PYTHON:-python} here=experiments/acceptance_over_training
out=runs/experiments/acceptance_over_training results=$here/results config=()
[ "$SIZE" = cpu ] || out=${out}_$SIZE results=${results}_$SIZE
if [ "$SIZE" = gpu ]; then
  config=(--config.data.sequence_length=512 --config.data.batch_size=64 --config.model.num_layers=8
    --config.model.embed_dim=512 --config.model.num_heads=8 --config.model.num_kv_heads=8 --config.model.head_dim=64
    --config.model.ffn_dim=1280 --config.model.compute_dtype=bfloat16 --config.optimizer.learning_rate=3e-3
    --config.training.num_steps=1000 --config.training.log_every=10 --config.checkpoint.every=1000)
fi
# The seeds of a kind share their compiled programs.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/$out/programs}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.2

sweep --config=$here/config.py --workdir=$out/runs \
  --over="mtp.kind=${KINDS:-none,parallel,sequential}" --over="seed=${SEEDS:-0,1,2}" "${config[@]}" \
  --tasks=loss,acceptance,speculative --eval.limit=16 --eval.max_new_tokens=64 --eval.batch_size=4 "$@"
mkdir -p $results
$python -m mtp_jax.tools.report --sweep=$out/runs --output=$results/curves.png \
  --markdown=$results/table.md --json=$results/table.json
PYTHONPATH=. $python $here/agreement.py --sweep=$out/runs --output=$results
