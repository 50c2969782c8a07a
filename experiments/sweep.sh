# sweep ARGUMENTS: a sweep of mtp_jax, JOBS runs at a time. On CPUs a run has its share of the cores; with SIZE=gpu all runs
# share one GPU, which a small model alone does not fill. To be sourced by run.sh.
sweep() {
  local jobs=${JOBS:-1} share status=0 pids=()
  if [ "${SIZE:-cpu}" = cpu ]; then
    ${PYTHON:-python} -m mtp_jax.tools.sweep --jobs="$jobs" "$@"
    return
  fi
  export XLA_PYTHON_CLIENT_PREALLOCATE=false
  for ((share = 0; share < jobs; share++)); do
    ${PYTHON:-python} -m mtp_jax.tools.sweep --share="$share/$jobs" "$@" &
    pids+=($!)
  done
  trap 'kill "${pids[@]}"' INT TERM # the sweeps then stop their runs, which save their state
  for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
  return "$status"
}
