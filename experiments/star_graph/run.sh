#!/usr/bin/env bash
# Star graph G(2,3), three kinds, five seeds: the table, and the same in experiments/star_graph/results/.
# With SIZE=gpu G(2,5) with 100 labels (GRAPH=5,5 for another), a model of 11 M parameters and five kinds, in results_gpu_2_5/.
set -euo pipefail
cd "$(dirname "$0")/../.."
. experiments/sweep.sh
SIZE=${SIZE:-cpu} python=${PYTHON:-python} here=experiments/star_graph
out=runs/experiments/star_graph results=$here/results task=star_graph data=() seeds=0,1,2,3,4
config=() variants='(none,1),(parallel,1),(sequential,1)'
if [ "$SIZE" = gpu ]; then
  IFS=, read -r arms length <<<"${GRAPH:-2,5}"
  export STAR_GRAPH=$arms,$length,100 # read by graphs.py
  out=${out}_gpu_${arms}_$length results=${results}_gpu_${arms}_$length task=star_graph_large data=(--num_train=200000)
  seeds=0,1,2 variants="(none,1),(parallel,$((length - 2))),(sequential,1),(top,1),(nextlat,$((length - 2)))"
  # The tokens of a row: an edge has three, and after the edges there are centre, end, =, the path, bos and eos.
  config=(--config.data.files=$out/data/train.jsonl --config.data.tokenizer=$out/data/tokenizer.json
    --config.data.sequence_length=$((3 * arms * (length - 1) + 3 + length + 2 - 1)) --config.data.batch_size=256
    --config.model.num_layers=6 --config.model.embed_dim=384 --config.model.num_heads=6 --config.model.num_kv_heads=6
    --config.model.head_dim=64 --config.model.ffn_dim=1024 --config.model.compute_dtype=bfloat16
    --config.optimizer.name=adamw --config.optimizer.learning_rate=5e-4 --config.optimizer.beta2=0.95
    --config.optimizer.weight_decay=0.1 --config.training.num_steps=6000 --config.training.log_every=100
    --config.checkpoint.every=2000)
fi
# The seeds of a variant share their compiled programs.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/$out/programs}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.2

[ -s $out/data/train.jsonl ] || PYTHONPATH=. $python $here/graphs.py --output=$out/data "${data[@]}"
sweep --config=$here/config.py --workdir=$out/runs \
  "${config[@]}" --over="seed=${SEEDS:-$seeds}" --over="mtp.kind,mtp.depth=${VARIANTS:-$variants}" \
  --tasks=$task --eval.tasks_dir=$here --eval.batch_size=125 "$@"
mkdir -p $results
$python -m mtp_jax.tools.report --sweep=$out/runs --output=$results/curves.png \
  --markdown=$results/table.md --json=$results/table.json
