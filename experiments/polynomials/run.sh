#!/usr/bin/env bash
# Polynomial arithmetic with n = 1, 2, three seeds: the tables, and the same in experiments/polynomials/results/. With
# SIZE=gpu the ring of the paper, F_7[X]/(X^5), a model of 24 M parameters and n = 4 too, in results_gpu/.
set -euo pipefail
cd "$(dirname "$0")/../.."
. experiments/sweep.sh
export SIZE=${SIZE:-cpu} # read by expressions.py
python=${PYTHON:-python} here=experiments/polynomials
out=runs/experiments/polynomials results=$here/results variants='(none,1),(parallel,1)' data=()
[ "$SIZE" = cpu ] || out=${out}_$SIZE results=${results}_$SIZE
config=(--config.data.files=$out/data/train.jsonl)
if [ "$SIZE" = gpu ]; then
  variants="$variants,(parallel,3)" data=(--num_train=600000)
  config+=(--config.data.sequence_length=128 --config.data.batch_size=128 --config.model.num_layers=8
    --config.model.embed_dim=512 --config.model.num_heads=8 --config.model.num_kv_heads=8 --config.model.head_dim=64
    --config.model.ffn_dim=1280 --config.model.compute_dtype=bfloat16 --config.optimizer.learning_rate=3e-3
    --config.training.num_steps=4000 --config.training.log_every=200 --config.checkpoint.every=2000)
fi
# The seeds of a variant share their compiled programs.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/$out/programs}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.2

[ -s $out/data/train.jsonl ] || $python $here/expressions.py --output=$out/data "${data[@]}"
sweep --config=$here/config.py --workdir=$out/runs \
  --over="mtp.kind,mtp.depth=${VARIANTS:-$variants}" --over="seed=${SEEDS:-0,1,2}" "${config[@]}" \
  --tasks=polynomials_in,polynomials_out --eval.tasks_dir=$here --eval.batch_size=200 "$@"
mkdir -p $results
$python -m mtp_jax.tools.report --sweep=$out/runs --output=$results/curves.png \
  --markdown=$results/table.md --json=$results/table.json
PYTHONPATH=. $python $here/by_operations.py --json=$results/table.json --output=$results
