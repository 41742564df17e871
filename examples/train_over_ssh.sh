#!/usr/bin/env bash
# One process of a run on each host, in this folder, which all of them must see:
#
#     HOSTS="node1 node2" examples/train_over_ssh.sh configs/stage2_vicuna_7b.py [--field value ...]
#
# They meet at the first host (PORT, 8476). When one fails, all end, and the run goes on from its last checkpoint after PAUSE
# (10) seconds, at most RESTARTS (5) times. Bad input (exit status 2) and a wish to stop (143) are no failures. PYTHON (python)
# is run on each host by way of SSH (ssh -tt: what is interrupted here ends there).
set -uo pipefail
read -ra hosts <<< "${HOSTS:?as HOSTS=\"node1 node2\"}"
words=$(printf '%q ' "$@")
trap 'kill $(jobs -p) 2> /dev/null' EXIT

for attempt in $(seq 0 "${RESTARTS:-5}"); do
    [ "$attempt" = 0 ] || { echo "attempt $attempt, after exit status $ended"; sleep "${PAUSE:-10}"; }
    processes=()
    for i in "${!hosts[@]}"; do
        who="LMM_COORDINATOR=${hosts[0]#*@}:${PORT:-8476} LMM_PROCESSES=${#hosts[@]} LMM_PROCESS=$i"
        ${SSH:-ssh -tt} "${hosts[$i]}" "cd $(printf '%q' "$PWD") && $who ${PYTHON:-python} -m train $words" &
        processes+=($!)
    done
    statuses=" "
    for process in "${processes[@]}"; do
        wait "$process"
        statuses+="$? "
    done
    for ended in 2 143; do
        case "$statuses" in *" $ended "*) exit "$ended" ;; esac
    done
    ended=$(tr ' ' '\n' <<< "$statuses" | sort -n | tail -1)
    [ "$ended" = 0 ] && exit 0
done
exit "$ended"
