#!/usr/bin/env bash
# One pod's part of a run on Kubernetes: torchrun.sh, and an exit status that tells the controller how the run ended.
#
#   0     finished
#   143   saved after SIGTERM (drain, preemption, deletion): start it again and it goes on
#   2     the user's mistake: starting it again would only tell it again
#   else  a fault
#
# NODE_RANK is Kubernetes' index of the pod (Indexed Job) or the operator's RANK (PyTorchJob); the rest stands at the
# head of torchrun.sh. torchrun itself says 1 for all but 0, so what the ranks left in the run's folder decides.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
source "$root/launch/cluster/env.sh"
export NODE_RANK=${NODE_RANK:-${JOB_COMPLETION_INDEX:-${RANK:-0}}}
if ((NODE_RANK == 0)); then
    rm -f "$folder/preempted" "$folder/error.txt" # of the life before: here they would speak of this one
fi

signals=0
bash "$root/launch/cluster/torchrun.sh" "$@" &
ranks=$!
trap 'signals=$((signals + 1)); kill -TERM "$ranks"' TERM
while true; do # a signal ends `wait` before the ranks have ended
    seen=$signals
    wait "$ranks"
    status=$?
    ((signals == seen)) && break
done
((status == 0)) && exit 0
ls "$folder" >/dev/null 2>&1 # NFS: before the folder is opened, a file that another pod wrote may still be unknown
[[ -e $folder/preempted ]] && exit 143
if [[ -e $folder/error.txt ]]; then
    tail -n 1 "$folder/error.txt" >&2
    (($(wc -l <"$folder/error.txt") == 1)) && exit 2 # a mistake is one line, a fault leaves its trace
fi
exit "$status"
