#!/usr/bin/env bash
# A run on nodes of SLURM, one process a GPU, as JAX takes it there (without GPUs: one a
# node, --ntasks-per-node=1 --gpus-per-node=0).
#   RUN_DIR=/shared/runs/gsm8k sbatch --nodes=4 scripts/slurm.sh \
#     --config=configs/sft.py:gsm8k --config.data.batch_size=64
# Two minutes before its time is up it saves, and is queued again; `scancel --signal=TERM JOB`
# saves and ends it.
#SBATCH --job-name=educe
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=educe-%j.log
set -u
: "${RUN_DIR:?a folder that all nodes see}"
PYTHON=${PYTHON:-.venv/bin/python}

stopped=
# srun makes SIGKILL of a SIGTERM that it gets; SLURM itself hands its tasks theirs (and
# none to this script).
trap 'stopped=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
# Somebody cancelled the job, or another took its place: whether it comes back is SLURM's.
trap : TERM
srun --kill-on-bad-exit=1 "$PYTHON" -m educe train --multihost --wait=900 \
  --run_dir="$RUN_DIR" "$@" &
pid=$!
wait "$pid"
while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done  # a signal ended the wait, not srun
wait "$pid"  # it has ended, maybe while a signal was seen to: its own code
code=$?
if [ -n "$stopped" ] && [ "$code" -eq 0 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
