#!/usr/bin/env bash
# The same by XPK, which writes the JobSet itself.
#   NAME=gsm8k CLUSTER=… ZONE=… PROJECT=… IMAGE=… STORAGE=… RUN_DIR=/shared/gsm8k \
#     scripts/xpk.sh --config=configs/sft.py:gsm8k --config.data.batch_size=64
# RUN_DIR lies on STORAGE, which is attached to the cluster (xpk storage attach …); so may
# EDUCE_DATA, where data:// leads.
set -eu
: "${NAME:?of the workload}" "${CLUSTER:?name of the cluster}" "${ZONE:?its zone}"
: "${PROJECT:?its project}" "${IMAGE:?with educe in /educe}" "${RUN_DIR:?a shared folder}"
: "${STORAGE:?its name, as attached}"
TPU_TYPE=${TPU_TYPE:-v6e-16}
SLICES=${SLICES:-1}

flags=${*:+$(printf ' %q' "$@")}
data=${EDUCE_DATA:+export EDUCE_DATA=$(printf %q "$EDUCE_DATA") && }
xpk workload create --workload="$NAME" --cluster="$CLUSTER" --zone="$ZONE" \
  --project="$PROJECT" --tpu-type="$TPU_TYPE" --num-slices="$SLICES" \
  --storage="$STORAGE" --docker-image="$IMAGE" --max-restarts=100 \
  --termination-grace-period-seconds=600 \
  --command="cd /educe && ${data}exec bash scripts/stoppable.sh python -m educe train --multihost --wait=900 --run_dir=$(printf %q "$RUN_DIR")$flags"
