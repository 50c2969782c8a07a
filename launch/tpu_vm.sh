#!/usr/bin/env bash
# Train on every worker of a Cloud TPU pod slice, from a machine with gcloud:
#
#   TPU=my-pod ZONE=us-east5-a launch/tpu_vm.sh --config=configs/deepseek_v2_lite_16b.py --workdir=/mnt/shared/run
#
#   TPU, ZONE            the slice; PROJECT where it is not gcloud's own
#   FOLDER               the clone of this project on every worker (default mtp_jax, below the home folder)
#   PYTHON               python with jax[tpu] on every worker (default .venv/bin/python, below FOLDER)
#   MTP_MAX_RESTARTS     and the other settings of supervise.sh, which runs on each worker
#
# On each worker supervise.sh restarts train.py after every exit code but 0, 2 and 130 (see there); the exit code of this
# command is that of gcloud, which fails when that of a worker is not 0. A lost connection is SIGHUP to each worker: the
# state is saved.
#
# --workdir is a folder that every worker sees (Filestore, or any other network disk). The run ends when this command
# is stopped or loses its connection: run it in tmux. Several slices: the same with `gcloud compute tpus
# queued-resources ssh NAME --node=all --worker=all`.
set -euo pipefail

if [[ $# -eq 0 || -z ${TPU:-} || -z ${ZONE:-} ]]; then
  echo "usage: TPU=NAME ZONE=ZONE [PROJECT=ID] launch/tpu_vm.sh --config=FILE --workdir=DIR [train.py's flags]" >&2
  exit 2
fi

settings=(
  "MTP_HEARTBEAT_SECONDS=${MTP_HEARTBEAT_SECONDS:-30}"
  "MTP_MAX_RESTARTS=${MTP_MAX_RESTARTS:-20}"
  "MTP_RESTART_SECONDS=${MTP_RESTART_SECONDS:-10}"
)
printf -v arguments ' %q' "$@"
printf -v folder '%q' "${FOLDER:-mtp_jax}"
printf -v python '%q' "${PYTHON:-.venv/bin/python}"
printf -v exports ' %q' "${settings[@]}"

# -tt: the remote processes get a hang-up when the connection goes, and do not keep the chips.
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"} --worker=all \
  --ssh-flag=-tt \
  --command="cd $folder && export$exports && . launch/xla_flags.sh tpu && launch/supervise.sh $python train.py$arguments"
