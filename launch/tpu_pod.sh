#!/usr/bin/env bash
# A Cloud TPU pod slice: the same command on every host of it. jax finds the hosts by itself. Not tested on a pod.
#
# Once:
#   gcloud compute tpus tpu-vm create POD --zone ZONE --accelerator-type v5litepod-16 --version v2-alpha-tpuv5-lite
#   gcloud compute tpus tpu-vm ssh POD --zone ZONE --worker=all --command \
#     "git clone URL_OF_THIS_REPOSITORY longlora_jax && pip install -r longlora_jax/requirements.txt 'jax[tpu]'"
# and on every host a file system that all of them share (Filestore), with the base model, the data and the workdir.
#
# Every start, also after a host was lost, or with exit code 75 (saved after SIGTERM): the run resumes. Of spot or queued
# resources that were taken away, create the pod again first.
#   launch/tpu_pod.sh POD ZONE --config configs/7b_32k.py --workdir /mnt/shared/runs/7b_32k \
#     --config.mesh.fsdp=2 --config.mesh.context=8 --config.accumulation=32 [flags of train.py]
set -euo pipefail
pod=${1:?POD ZONE --config FILE --workdir DIR are needed} zone=${2:?ZONE is needed}
shift 2
gcloud compute tpus tpu-vm ssh "$pod" --zone "$zone" --worker=all \
  --command "cd longlora_jax && python3 train.py $(printf '%q ' "$@")"
