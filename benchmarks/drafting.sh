#!/usr/bin/env bash
# Speculative decoding of one model with differently trained drafts: lines in benchmarks/results/drafting.jsonl.
#
#   TOKENIZER=PATH/tokenizer.json FILES='/usr/lib/python3/**/*.py' bash benchmarks/drafting.sh
#
# Trains configs/code_400m.py with the tokenizer on the files (one sequential module), distils its module and new parallel
# heads by several losses, and measures each at batch 1, 8 and 32, greedy and at temperature 1. BASE_FLAGS changes the
# training of the model, DISTILL_FLAGS that of the drafts, OUT the folder. The same command again does what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python} out=${OUT:-runs/drafting} results=${RESULTS:-benchmarks/results/drafting.jsonl}
batches=${BATCHES:-1,8,32} new=${NEW:-256} held_out=${HELD_OUT:-32}

[ -s "$out/base/goodput.json" ] || $python train.py --config="${CONFIG:-configs/code_400m.py}" --workdir="$out/base" \
  --config.data.source=text_files --config.data.files="$FILES" --config.data.tokenizer="$TOKENIZER" ${BASE_FLAGS:-}
[ -s "$out/prompts/inner.jsonl" ] || $python experiments/distillation/prompts.py --config="$out/base/config.json" \
  --output="$out/prompts" --length=96 --num_train="${NUM_TRAIN:-768}" --num_held_out="$held_out"

measure() { # workdir, drafts, further flags
  local workdir=$1 drafts=$2
  shift 2
  for temperature in 0 1; do
    $python benchmarks/decode.py --workdir="$workdir" --prompts="$out/prompts/inner.jsonl" --drafts="$drafts" \
      --batches="$batches" --max_new_tokens="$new" --temperature=$temperature --output="$results" "$@"
  done
}
distill() { # name, flags
  local name=$1
  shift
  if [ -s "$out/before.json" ]; then # measured once: it is the same for all
    mkdir -p "$out/$name" && cp "$out/before.json" "$out/$name/before.json"
  fi
  [ -s "$out/$name/distill.json" ] || $python -m mtp_jax.tools.distill --model="$out/base" --workdir="$out/$name" \
    --prompts="$out/prompts/starts.jsonl" --prompts="$out/prompts/inner.jsonl" --held_out="$held_out" \
    --answers="$out/answers" --max_new_tokens="$new" --batch_size=64 --measured_tokens=64 ${DISTILL_FLAGS:-} "$@"
  cp "$out/$name/before.json" "$out/before.json"
}

measure "$out/base" 1,3
distill cross_entropy --loss=cross_entropy
measure "$out/cross_entropy" 3
distill end_to_end --loss=end_to_end_tv --draft_vocabulary="${VOCABULARY:-8192}"
measure "$out/end_to_end" 3 --whole_vocabulary
measure "$out/end_to_end" 3
measure "$out/end_to_end" 3 --min_confidence=0.3
distill parallel --kind=parallel --loss=cross_entropy ${HEAD_FLAGS:-}
measure "$out/parallel" 3
distill markov --kind=parallel --loss=cross_entropy --config.mtp.parallel.markov_rank=256 ${HEAD_FLAGS:-}
measure "$out/markov" 3
