#!/usr/bin/env bash
# Several processes on one machine, as on several hosts; on CPUs with virtual devices.
#   scripts/local.sh --config=configs/sft.py:demo,debug --run_dir=runs/two --config.data.batch_size=8
# Ctrl-C or a SIGTERM to any of them stops all, saved; the same command goes on.
set -eu
PROCESSES=${PROCESSES:-2}
DEVICES=${DEVICES:-4}  # virtual CPU devices of each
PORT=${PORT:-12321}
PYTHON=${PYTHON:-python}

export JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$DEVICES"
pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM
for ((process = 0; process < PROCESSES; process++)); do
  "$PYTHON" -m educe train "$@" --coordinator="127.0.0.1:$PORT" \
    --processes="$PROCESSES" --process="$process" --wait=120 &
  pids+=("$!")
done
code=0
for pid in "${pids[@]}"; do
  while true; do
    status=0
    wait "$pid" || status=$?
    kill -0 "$pid" 2>/dev/null || break  # a signal ended the wait, not the process
  done
  if [ "$status" -ne 0 ]; then code=$status; fi
done
exit "$code"
