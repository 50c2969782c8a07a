#!/usr/bin/env bash
# Induction with n = 1 and n = 2, three seeds: the table, and the same in experiments/induction/results/. With
# SIZE=gpu the four sizes of the paper, 1 M to 30 M parameters, in results_gpu/.
set -euo pipefail
cd "$(dirname "$0")/../.."
. experiments/sweep.sh
SIZE=${SIZE:-cpu} python=${PYTHON:-python} here=experiments/induction
out=runs/experiments/induction results=$here/results data=()
# width, width of the feed-forward layers, layers, heads, key and value heads, size of a head
sizes='(64,192,4,4,4,16)'
[ "$SIZE" = cpu ] || out=${out}_$SIZE results=${results}_$SIZE
config=(--config.data.files=$out/data/train.jsonl --config.data.tokenizer=$out/data/tokenizer.json)
if [ "$SIZE" = gpu ]; then
  sizes='(128,384,5,4,4,32),(256,768,4,8,8,32),(384,1024,6,8,8,48),(512,1280,10,8,8,64)' data=(--num_train=400000)
  config+=(--config.data.sequence_length=512 --config.data.batch_size=32 --config.optimizer.learning_rate=3e-3
    --config.training.num_steps=2000 --config.training.log_every=50 --config.checkpoint.every=2000)
fi
# The seeds of a variant share their compiled programs.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/$out/programs}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.2

[ -s $out/data/train.jsonl ] || PYTHONPATH=. $python $here/stories.py --output=$out/data "${data[@]}"
shape=model.embed_dim,model.ffn_dim,model.num_layers,model.num_heads,model.num_kv_heads,model.head_dim
sweep --config=$here/config.py --workdir=$out/runs \
  --over="$shape=${SIZES:-$sizes}" --over="mtp.kind=${KINDS:-none,parallel}" --over="seed=${SEEDS:-0,1,2}" \
  "${config[@]}" --tasks=induction --eval.tasks_dir=$here --eval.batch_size=125 "$@"
mkdir -p $results
$python -m mtp_jax.tools.report --sweep=$out/runs --output=$results/curves.png \
  --markdown=$results/table.md --json=$results/table.json
