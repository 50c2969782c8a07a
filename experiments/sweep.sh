# sweep ARGUMENTS: a sweep of mtp_jax, JOBS runs at a time. On CPUs a run has its share of the cores; with SIZE=gpu all runs
# share one GPU, which a small model alone does not fill. To be sourced by run.sh.
sweep() {
  local jobs=${JOBS:-1} share pid status=0 pids=()
  if [ "${SIZE:-cpu}" = cpu ]; then
    ${PYTHON:-python} -m mtp_jax.tools.sweep --jobs="$jobs" "$@"
    return
  fi
  export XLA_PYTHON_CLIENT_PREALLOCATE=false
  trap 'kill $(jobs -p); wait; exit 143' INT TERM # the sweeps stop their runs, which save their state
  for ((share = 0; share < jobs; share++)); do
    ${PYTHON:-python} -m mtp_jax.tools.sweep --share="$share/$jobs" "$@" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
  trap - INT TERM
  return "$status"
}
