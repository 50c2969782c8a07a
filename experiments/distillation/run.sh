#!/usr/bin/env bash
# A model with one module, and its drafts after distillation: the table, and the same in experiments/distillation/results/.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python} here=experiments/distillation out=runs/experiments/distillation

[ -d $out/base/checkpoints/400 ] || $python train.py --config=$here/config.py --workdir=$out/base
[ -s $out/prompts/inner.jsonl ] || $python $here/prompts.py --output=$out/prompts
distill() { # name, flags
  local name=$1
  shift
  if [ -s $out/before.json ]; then # measured once: it is the same for all
    mkdir -p "$out/$name" && cp $out/before.json "$out/$name/before.json"
  fi
  [ -s "$out/$name/distill.json" ] || $python -m mtp_jax.tools.distill --model=$out/base --workdir="$out/$name" \
    --prompts=$out/prompts/starts.jsonl --prompts=$out/prompts/inner.jsonl --held_out=32 --answers=$out/answers \
    --max_new_tokens=80 --measured_tokens=80 --measured_batch_size=32 --measured_temperature=1 --epochs=5 \
    --config.optimizer.learning_rate=2e-3 "$@"
  cp "$out/$name/before.json" $out/before.json
}
distill cross_entropy --loss=cross_entropy
distill total_variation --loss=tv
distill end_to_end --loss=end_to_end_tv --draft_vocabulary=64
distill parallel --kind=parallel --loss=cross_entropy
distill markov --kind=parallel --loss=cross_entropy --config.mtp.parallel.markov_rank=32
$python $here/table.py --runs=$out --output=$here/results
