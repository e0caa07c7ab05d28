#!/usr/bin/env bash
# Several processes on this machine, each with a few fake CPU devices: a rehearsal of a run on several hosts.
# Of the recipes in this folder it is the one that the tests run; the others were never on a cluster.
#
#   launch/local.sh PROCESSES DEVICES_EACH --config configs/tiny_base.py --workdir runs/local [flags of train.py]
#
# PYTHON and PORT may be set in the environment.
set -euo pipefail
processes=${1:?PROCESSES DEVICES_EACH --config FILE --workdir DIR are needed} devices=${2:?DEVICES_EACH is needed}
shift 2
port=${PORT:-$((20000 + RANDOM % 10000))}
export JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"

pids=()
for ((i = 0; i < processes; i++)); do
  "${PYTHON:-python}" "$(dirname "$0")/../train.py" \
    --coordinator "localhost:$port" --num_processes "$processes" --process_id "$i" "$@" &
  pids+=($!)
  echo "process $i: pid $!"
done
told= # a signal ends bash's wait, not what it waits for
# A process that has begun to listen gets a terminal's Ctrl-C as well, and takes the two for one.
trap 'told=1; kill "${pids[@]}" 2>/dev/null' INT TERM

code=0
for pid in "${pids[@]}"; do
  while told= && wait "$pid" && ended=0 || ended=$? && [[ $told ]]; do :; done
  [[ $ended == 0 ]] || code=$ended
done
exit "$code" # 75: saved after SIGTERM, start it again
