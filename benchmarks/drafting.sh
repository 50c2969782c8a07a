#!/usr/bin/env bash
# Speculative decoding of one model with differently trained drafts: lines in benchmarks/results/drafting.jsonl.
#
#   TOKENIZER=PATH/tokenizer.json FILES='/usr/lib/python3/**/*.py' bash benchmarks/drafting.sh
#
# Trains configs/code_400m.py with the tokenizer on the files, with one sequential module, and from its weights a
# model with HEADS parallel heads (HEADS_FROM= trains it from scratch); distils modules and heads by several losses, and
# measures each at batch 1, 8 and 32, greedy, and at batch 32 at temperature 1. Heads are measured with three drafts and
# with all. The prompts that are measured on are parts of documents that are held out, and no training document has them.
#
# The same command again does what is missing: a training continues from its last checkpoint, answers and measurements
# from the last one that was written. STAGES="base prompts" does a part of the work, in the order of the default below;
# stages joined by + run at once on one device. Two commands with CUDA_VISIBLE_DEVICES=0 and 1 do different stages on two
# GPUs: those of modules (base, cross_entropy, end_to_end, measure_modules) need none of those of heads. Speed-ups are those of the results, not of a stage's own table.
# BASE_FLAGS changes the training of the models, DISTILL_FLAGS that of all drafts, MODULE_FLAGS that of sequential modules,
# HEAD_FLAGS that of parallel heads, MEASURE_FLAGS the measurements; OUT is the folder of everything but the results.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python} out=${OUT:-runs/drafting} results=${RESULTS:-benchmarks/results/drafting.jsonl}
batches=${BATCHES:-1,8,32} sampled=${SAMPLED:-32} new=${NEW:-256} held_out=${HELD_OUT:-384}
length=${LENGTH:-96} heads=${HEADS:-7}
stages=${STAGES:-base heads prompts cross_entropy parallel end_to_end+markov measure_modules measure_heads measure_markov results}
mkdir -p "$out"
# Programs of plain decoding are the same for several models, and those of a killed command are not compiled again.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$(cd "$out" && pwd)/programs}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1

measure() { # model, drafts, temperatures, batches, further flags
  local model=$1 drafts=$2 temperatures=$3 sizes=$4
  shift 4
  $python benchmarks/decode.py --workdir="$out/$model" --prompts="$out/prompts/inner.jsonl" --num_prompts="$held_out" \
    --batches="$sizes" --temperatures="$temperatures" --max_new_tokens="$new" --drafts="$drafts" --only_missing \
    --output="$out/results.jsonl" ${MEASURE_FLAGS:-} "$@"
}
distill() { # name, model, flags
  local name=$1 model=$2
  shift 2
  [ -s "$out/$name/distill.json" ] || $python -m mtp_jax.tools.distill --model="$out/$model" --workdir="$out/$name" \
    --prompts="$out/prompts/inner.jsonl" --held_out="$held_out" --answers="$out/answers_$model" --max_new_tokens="$new" \
    --batch_size=64 --measured_tokens="$new" --measured_batch_size="$sampled" ${DISTILL_FLAGS:-} "$@"
}

train() { # name, flags
  local name=$1
  shift
  [ -e "$out/$name/done" ] || $python train.py --config="${CONFIG:-configs/code_400m.py}" --workdir="$out/$name" \
    --config.data.source=text_files --config.data.files="$FILES" --config.data.tokenizer="$TOKENIZER" \
    ${BASE_FLAGS:-} "$@"
  touch "$out/$name/done" # a run that is stopped by a signal fails
}

base() { train base; }
heads() {
  train heads --config.mtp.kind=parallel --config.mtp.depth="$heads" --config.mtp.parameter_matched=False \
    --config.init_from="${HEADS_FROM-$out/base}"
}
prompts() {
  [ -s "$out/prompts/inner.jsonl" ] || $python experiments/distillation/prompts.py --config="$out/base/config.json" \
    --output="$out/prompts" --length="$length" --inner=0.2,0.4,0.6,0.8 --num_train="${NUM_TRAIN:-4096}" \
    --num_held_out="$held_out" --unseen
}
cross_entropy() { distill cross_entropy base --loss=cross_entropy ${MODULE_FLAGS:-}; }
end_to_end() {
  distill end_to_end base --loss=end_to_end_tv --draft_vocabulary="${VOCABULARY:-8192}" ${MODULE_FLAGS:-}
}
parallel() { distill parallel heads --loss=cross_entropy --num_speculative_tokens="$heads" ${HEAD_FLAGS:-}; }
markov() {
  distill markov heads --loss=cross_entropy --num_speculative_tokens="$heads" \
    --draft_vocabulary="${VOCABULARY:-8192}" --config.mtp.parallel.markov_rank=256 ${HEAD_FLAGS:-}
}
measure_modules() {
  measure base 3 0 "$batches"
  measure cross_entropy 3 0 "$batches"
  measure end_to_end 3 0 "$batches" --vocabulary=whole,draft
  measure base 3 1 "$sampled"
  measure cross_entropy 3 1 "$sampled"
  measure end_to_end 3 1 "$sampled" --vocabulary=whole
  measure end_to_end 3 0 "$batches" --min_confidence=0.3
}
measure_heads() {
  measure heads "3,$heads" 0 "$batches"
  measure parallel "3,$heads" 0 "$batches"
}
measure_markov() { measure markov "3,$heads" 0 "$batches" --vocabulary=whole,draft; }
results() {
  cp "$out/results.jsonl" "$results.part" && mv "$results.part" "$results"
}

timed() { # stage
  local began=$SECONDS
  $1
  echo "stage $1: $((SECONDS - began)) s"
}
for group in $stages; do
  read -ra members <<<"${group//+/ }"
  pids=()
  for stage in "${members[@]}"; do
    XLA_PYTHON_CLIENT_MEM_FRACTION=.$((80 / ${#members[@]})) timed "$stage" &
    pids+=($!)
  done
  failed=0
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
  [ $failed = 0 ]
done
