#!/usr/bin/env bash
# n = 1, 2, 4, 8 on bytes of Python: the table, and the same in experiments/code_search/results/.
# With SIZE=gpu a main model of 85 M parameters in its blocks, on the files FILES with the tokenizer TOKENIZER (a
# tokenizer.json), and questions about held-out code, in results_gpu/.
set -euo pipefail
cd "$(dirname "$0")/../.."
. experiments/sweep.sh
SIZE=${SIZE:-cpu} python=${PYTHON:-python} here=experiments/code_search
out=runs/experiments/code_search results=$here/results config=() seeds=0,1
tasks=(--tasks=loss,acceptance,speculative --eval.limit=16 --eval.max_new_tokens=64 --eval.batch_size=4)
[ "$SIZE" = cpu ] || out=${out}_$SIZE results=${results}_$SIZE
if [ "$SIZE" = gpu ]; then
  seeds=0
  config=(--config.data.source=text_files "--config.data.files=$FILES" "--config.data.tokenizer=$TOKENIZER"
    --config.data.on_bad_record=skip --config.data.validation_fraction=0.02 --config.data.sequence_length=512
    --config.data.batch_size=64 --config.model.num_layers=12 --config.model.embed_dim=768
    --config.model.num_heads=12 --config.model.num_kv_heads=12 --config.model.head_dim=64 --config.model.ffn_dim=2048
    --config.model.compute_dtype=bfloat16 --config.model.scan_unroll=12 --config.optimizer.muon.matmul_precision=bfloat16
    --config.optimizer.learning_rate=3e-3 --config.checkpoint.every=800)
  export CODE_QUESTIONS=$out/questions # read by questions.py
  tasks=(--tasks=loss,acceptance,next_line,identifier --eval.tasks_dir=$here --eval.batch_size=125)
  [ -s $CODE_QUESTIONS/identifier.jsonl ] || PYTHONPATH=. $python $here/questions.py --config=$here/config.py \
    --output=$CODE_QUESTIONS "${config[@]}"
fi
# The seeds of a variant share their compiled programs.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/$out/programs}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.2

keys=mtp.kind,mtp.depth variants='(none,1),(parallel,1),(parallel,3),(parallel,7),(sequential,1),(sequential,3),(sequential,7)'
if [ "$SIZE" = gpu ]; then # and next-token models with the compute of n = 2 (1.30 and 1.37 times) and n = 4 (1.90 and 2.11 times)
  keys+=,training.num_steps variants="${variants//)/,800)},(none,1,1070),(none,1,1600)"
fi
sweep --config=$here/config.py --workdir=$out \
  --over="$keys=${VARIANTS:-$variants}" --over="seed=${SEEDS:-$seeds}" "${config[@]}" "${tasks[@]}" "$@"
mkdir -p $results
$python -m mtp_jax.tools.report --sweep=$out --output=$results/curves.png \
  --markdown=$results/table.md --json=$results/table.json
