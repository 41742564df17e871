#!/usr/bin/env bash
# One process of a run on each host, in this folder, which all of them must see:
#
#     HOSTS="node1 node2" examples/train_over_ssh.sh configs/stage2_vicuna_7b.py [--field value ...]
#
# The others meet at the first host (PORT, 8476). When one process fails, all end, and the run goes on from its last
# checkpoint, at most RESTARTS (5) times. Other exit statuses than those of failures (2: bad input; 143: asked to stop) end it.
set -uo pipefail
read -ra hosts <<< "${HOSTS:?as HOSTS=\"node1 node2\"}"
words=$(printf '%q ' "$@")
ended=0
trap 'kill $(jobs -p) 2> /dev/null' EXIT

for attempt in $(seq 0 "${RESTARTS:-5}"); do
    [ "$attempt" = 0 ] || echo "attempt $attempt, after exit status $ended"
    processes=()
    for i in "${!hosts[@]}"; do
        who="LMM_COORDINATOR=${hosts[0]}:${PORT:-8476} LMM_PROCESSES=${#hosts[@]} LMM_PROCESS=$i"
        ${SSH:-ssh} "${hosts[$i]}" "cd $(printf '%q' "$PWD") && $who ${PYTHON:-python} -m train $words" &
        processes+=($!)
    done
    ended=0
    for process in "${processes[@]}"; do
        wait "$process"
        status=$?
        [ "$status" = 0 ] || ended=$status
    done
    case "$ended" in 0 | 2 | 143) exit "$ended" ;; esac
done
exit "$ended"
