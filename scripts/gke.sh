#!/usr/bin/env bash
# Fills gke.yaml in and starts it; the same again goes on, after `kubectl delete jobset`.
#   NAME=gsm8k IMAGE=… CLAIM=… CONFIG=configs/sft.py:gsm8k \
#     FLAGS='--config.data.batch_size=64' scripts/gke.sh
set -eu
: "${NAME:?of the JobSet}" "${IMAGE:?with educe in /educe}" "${CLAIM:?a PersistentVolumeClaim}"
: "${CONFIG:?as configs/sft.py:gsm8k}"
export NAME IMAGE CLAIM CONFIG
export FLAGS=${FLAGS:-} SLICES=${SLICES:-1} HOSTS=${HOSTS:-4} CHIPS=${CHIPS:-4}
export ACCELERATOR=${ACCELERATOR:-tpu-v6e-slice} TOPOLOGY=${TOPOLOGY:-4x4}
envsubst < "$(dirname "$0")/gke.yaml" | ${APPLY:-kubectl apply -f -}
