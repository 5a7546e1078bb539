#!/usr/bin/env bash
# A run on nodes of SLURM, one process a GPU, as JAX takes it there (without GPUs: one a
# node, --ntasks-per-node=1 --gpus-per-node=0).
#   RUN_DIR=/shared/runs/gsm8k sbatch --nodes=4 scripts/slurm.sh --config=configs/sft.py:gsm8k
# Two minutes before its time is up it saves, and is queued again.
#SBATCH --job-name=educe
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=educe-%j.log
set -u
: "${RUN_DIR:?a folder that all nodes see}"
PYTHON=${PYTHON:-.venv/bin/python}

stopped=
# The wait below, not srun, is what the signal reaches: srun hands it on to every task.
trap 'stopped=1; kill -TERM "$pid" 2>/dev/null' TERM
srun --kill-on-bad-exit=1 "$PYTHON" -m educe train --multihost --wait=900 \
  --run_dir="$RUN_DIR" "$@" &
pid=$!
wait "$pid"
code=$?
while kill -0 "$pid" 2>/dev/null; do
  wait "$pid"
  code=$?
done
if [ -n "$stopped" ] && [ "$code" -eq 0 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
