#!/usr/bin/env bash
# Generation against likelihood without and with multi-token prediction, three seeds: the tables, and the same in
# experiments/generative_against_likelihood/results/. With SIZE=gpu harder questions, a model of 24 M parameters and
# n = 4 too, in results_gpu/.
set -euo pipefail
cd "$(dirname "$0")/../.."
. experiments/sweep.sh
export SIZE=${SIZE:-cpu} # read by questions.py
python=${PYTHON:-python} here=experiments/generative_against_likelihood
out=runs/experiments/generative_against_likelihood results=$here/results variants='(none,1),(sequential,1),(parallel,1)'
[ "$SIZE" = cpu ] || out=${out}_$SIZE results=${results}_$SIZE variants="$variants,(parallel,3)"
data=(--output=$out/data)
config=(--config.data.tokenizer=$out/data/tokenizer.json "--config.data.mixture[0].files=$out/data/train.jsonl"
  "--config.data.mixture[1].files=$out/data/facts.jsonl")
if [ "$SIZE" = gpu ]; then
  data+=(--num_questions=400000 --num_statements=200000)
  config+=(--config.data.batch_size=128 --config.model.num_layers=8 --config.model.embed_dim=512 --config.model.num_heads=8
    --config.model.num_kv_heads=8 --config.model.head_dim=64 --config.model.ffn_dim=1280 --config.model.compute_dtype=bfloat16
    --config.optimizer.learning_rate=3e-3 --config.training.num_steps=3000 --config.training.log_every=200
    --config.checkpoint.every=1000)
fi

[ -s $out/data/facts.jsonl ] || PYTHONPATH=. $python $here/questions.py "${data[@]}"
sweep --config=$here/config.py --workdir=$out/runs \
  --over="mtp.kind,mtp.depth=${VARIANTS:-$variants}" --over="seed=${SEEDS:-0,1,2}" "${config[@]}" \
  --tasks=copy,sum,lookup,fact --eval.tasks_dir=$here --eval.batch_size=125 "$@"
mkdir -p $results
$python -m mtp_jax.tools.report --sweep=$out/runs --output=$results/curves.png \
  --markdown=$results/table.md --json=$results/table.json
