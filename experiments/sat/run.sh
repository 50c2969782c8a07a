#!/usr/bin/env bash
# 3-SAT over n = 1, 2, 4, three seeds: the table, and the same in experiments/sat/results/. With SIZE=gpu formulas of 8
# variables and 34 clauses, a model of 14.5 M parameters and n = 7 too, in experiments/sat/results_gpu/.
set -euo pipefail
cd "$(dirname "$0")/../.."
. experiments/sweep.sh
SIZE=${SIZE:-cpu} python=${PYTHON:-python} here=experiments/sat
out=runs/experiments/sat results=$here/results task=sat variants='(none,1),(parallel,1),(parallel,3)'
[ "$SIZE" = cpu ] || out=${out}_$SIZE results=${results}_$SIZE
data=(--output=$out/data)
config=(--config.data.files=$out/data/train.jsonl --config.data.tokenizer=$out/data/tokenizer.json)
if [ "$SIZE" = gpu ]; then
  task=sat_large variants="$variants,(parallel,6)"
  data+=(--num_variables=8 --num_clauses=34 --num_train=250000)
  config+=(--config.data.sequence_length=44 --config.data.batch_size=256 --config.model.num_layers=8
    --config.model.embed_dim=384 --config.model.num_heads=6 --config.model.num_kv_heads=6 --config.model.head_dim=64
    --config.model.ffn_dim=1024 --config.model.compute_dtype=bfloat16 --config.training.num_steps=4000
    --config.training.log_every=200 --config.checkpoint.every=1000)
fi

[ -s $out/data/train.jsonl ] || PYTHONPATH=. $python $here/formulas.py "${data[@]}"
sweep --config=$here/config.py --workdir=$out/runs \
  --over="mtp.kind,mtp.depth=${VARIANTS:-$variants}" --over="seed=${SEEDS:-0,1,2}" "${config[@]}" \
  --tasks=$task --eval.tasks_dir=$here --eval.batch_size=125 "$@"
mkdir -p $results
$python -m mtp_jax.tools.report --sweep=$out/runs --output=$results/curves.png \
  --markdown=$results/table.md --json=$results/table.json
