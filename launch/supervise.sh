#!/usr/bin/env bash
# Run a command and run it again when it fails; train.py then goes on from its newest checkpoint.
#
#   launch/supervise.sh python3 train.py --config=... --workdir=...
#
#   MTP_MAX_RESTARTS      how often to start it again (default 20)
#   MTP_RESTART_SECONDS   pause before each (default 10): the others of a run need time to notice and end, too
#
# Not restarted: 0 (done), 2 (unusable arguments or config: the same again would fail the same), and any end after
# SIGTERM or SIGINT, which are passed on. The exit code is the command's last.
set -uo pipefail

max_restarts=${MTP_MAX_RESTARTS:-20}
pause=${MTP_RESTART_SECONDS:-10}
if [[ $# -eq 0 || ! $max_restarts =~ ^[0-9]+$ || ! $pause =~ ^[0-9]+$ ]]; then
  echo "usage: [MTP_MAX_RESTARTS=20] [MTP_RESTART_SECONDS=10] launch/supervise.sh COMMAND [ARGUMENT ...]" >&2
  exit 2
fi

child=
stopped=
stop() {
  stopped=1
  [[ -n $child ]] && kill -TERM "$child" 2>/dev/null
}
trap stop TERM INT

# `wait` returns early when a trapped signal arrives; the process is over only when kill -0 no longer finds it.
wait_for() {
  wait "$1"
  local code=$?
  while kill -0 "$1" 2>/dev/null; do
    wait "$1"
    code=$?
  done
  return "$code"
}

for ((attempt = 0; ; attempt++)); do
  "$@" &
  child=$!
  [[ -n $stopped ]] && kill -TERM "$child" 2>/dev/null # the signal came between the check and the start
  wait_for "$child"
  code=$?
  child=
  if [[ $code -eq 0 || $code -eq 2 || -n $stopped ]]; then
    exit "$code"
  fi
  if ((attempt >= max_restarts)); then
    echo "supervise: exit code $code; given up after $max_restarts restarts (MTP_MAX_RESTARTS)" >&2
    exit "$code"
  fi
  echo "supervise: exit code $code; restart $((attempt + 1)) of $max_restarts in $pause s" >&2
  sleep "$pause" &
  wait $!
  [[ -n $stopped ]] && exit "$code"
done
