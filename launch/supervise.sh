#!/usr/bin/env bash
# Run a command and run it again when it fails; train.py then goes on from its newest checkpoint.
#
#   launch/supervise.sh python3 train.py --config=... --workdir=...
#
#   MTP_MAX_RESTARTS      how often to start it again (default 20)
#   MTP_RESTART_SECONDS   pause before the first (default 10): the others of a run need time to notice and end, too. It
#                         doubles after each failure that follows within an hour, up to 5 minutes; not after 75 and 76
#
# Not restarted: 0 (done), 2 (unusable arguments or config: the same again would fail the same), 130 (Ctrl-C), and any
# end after SIGTERM, SIGINT or SIGHUP, which are passed on as SIGTERM. Restarted: 1 (failed), 75 (preempted, state saved),
# 76 (another process is lost, or a step stalled), 134 (abort) and other signals. The exit code is the command's last.
set -uo pipefail

max_restarts=${MTP_MAX_RESTARTS:-20}
pause=${MTP_RESTART_SECONDS:-10}
max_pause=300
if [[ $# -eq 0 || ! $max_restarts =~ ^[0-9]+$ || ! $pause =~ ^[0-9]+$ ]]; then
  echo "usage: [MTP_MAX_RESTARTS=20] [MTP_RESTART_SECONDS=10] launch/supervise.sh COMMAND [ARGUMENT ...]" >&2
  exit 2
fi

child=
stopped=
stop() { # passed on as SIGTERM: bash starts commands in the background with SIGINT ignored
  stopped=1
  [[ -n $child ]] && kill -TERM "$child" 2>/dev/null
}
trap stop TERM INT HUP

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
  began=$SECONDS
  "$@" &
  child=$!
  [[ -n $stopped ]] && kill -TERM "$child" 2>/dev/null # the signal came between the check and the start
  wait_for "$child"
  code=$?
  child=
  if [[ $code -eq 0 || $code -eq 2 || $code -eq 130 || -n $stopped ]]; then
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
  if ((code == 75 || code == 76 || SECONDS - began > 3600)); then
    pause=${MTP_RESTART_SECONDS:-10}
  else
    pause=$((pause * 2 < max_pause ? pause * 2 : max_pause))
  fi
done
