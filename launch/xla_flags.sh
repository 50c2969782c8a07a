# shellcheck shell=bash
# The compiler and network settings that matter, per platform, in one place. Source it with the platform:
#
#   . launch/xla_flags.sh tpu    # or gpu
#
# What is set already comes last and wins. An unknown flag aborts the process, so only flags that jaxlib 0.10.2 (GPU)
# and libtpu of the same release (TPU) were seen to accept are here; tests/test_launch.py parses the GPU flags again
# with the jaxlib that is installed. None was timed on a pod: take one out before blaming the model.

case "${1:-}" in
  tpu)
    mtp_flags=(
      # The all-gathers of fsdp weights run inside the matmuls before them, over several steps of the loop, instead of
      # in front of them. Mostly the defaults; stated here so that a change of defaults is not a change of speed.
      --xla_enable_async_all_gather=true
      --xla_tpu_enable_async_collective_fusion=true
      --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
      --xla_tpu_enable_async_collective_fusion_multiple_steps=true
      --xla_tpu_overlap_compute_collective_tc=true
      # Several slices: the gradients' all-reduce over the data-centre network overlaps with the next backward layers.
      --xla_tpu_enable_data_parallel_all_reduce_opt=true
      --xla_tpu_data_parallel_opt_different_sized_ops=true
    )
    export LIBTPU_INIT_ARGS="${mtp_flags[*]} ${LIBTPU_INIT_ARGS:-}"
    ;;
  gpu)
    mtp_flags=(
      # Collectives start as early and end as late as their data allow; without it they run one after the other.
      --xla_gpu_enable_latency_hiding_scheduler=true
      # Our blocks are a scan: the weights of the next layer are gathered, and the gradients of the last one scattered,
      # while this one computes, which needs them moved across iterations of the loop.
      --xla_gpu_enable_pipelined_all_gather=true
      --xla_gpu_enable_pipelined_reduce_scatter=true
      --xla_gpu_enable_pipelined_all_reduce=true
      # The loop unrolled by two, so that the pipelined weights are not copied from one buffer to another.
      --xla_gpu_enable_while_loop_double_buffering=true
      # A layer's many small weights travel together: NCCL reaches its bandwidth only in messages this large.
      --xla_gpu_all_gather_combine_threshold_bytes=134217728
      --xla_gpu_reduce_scatter_combine_threshold_bytes=67108864
      --xla_gpu_all_reduce_combine_threshold_bytes=134217728
    )
    export XLA_FLAGS="${mtp_flags[*]} ${XLA_FLAGS:-}"
    # NCCL's own buffers lie outside XLA's pool: leave them room.
    export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}"
    # Errors with their cause, nothing else; INFO shows which network NCCL took, the first thing to look at when slow.
    export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
    ;;
  *)
    echo "xla_flags.sh: '${1:-}' is no platform; give tpu or gpu" >&2
    # shellcheck disable=SC2317
    return 2 2>/dev/null || exit 2
    ;;
esac
unset mtp_flags

# A dead peer ends the others after so many seconds (train.py --heartbeat_seconds).
export MTP_HEARTBEAT_SECONDS="${MTP_HEARTBEAT_SECONDS:-30}"
