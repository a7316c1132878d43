#!/usr/bin/env bash
# One stage on all nodes of a Slurm job: srun starts torchrun.sh once a node. Called inside the allocation, by
# slurm.sbatch for a single stage and by launch/pipeline.py (--launch) for each stage of a recipe; the arguments are
# those of launch/stage.py. NNODES, MASTER_ADDR and the like are set by slurm.sbatch.
#
# SIGTERM to this shell has SIGTERM sent to the ranks, which save: srun itself would turn it into SIGKILL.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
signals=0
trap 'signals=$((signals + 1)); scancel --signal=TERM "$SLURM_JOB_ID"' TERM # every step of the job, not its shells

# --cpus-per-task: srun does not inherit it from sbatch, and would bind a node's ranks to one core.
# --kill-on-bad-exit, --wait: a node that ends first leaves the others two minutes to save, or to say why they fail;
# then they are ended, since without it they cannot go on.
# LOCAL_ADDR: Slurm's name of a node, which MASTER_ADDR leans on as well, and not whatever its own host name may be.
# shellcheck disable=SC2016  # these are each task's own
srun --nodes="$NNODES" --ntasks="$NNODES" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" \
    --kill-on-bad-exit=0 --wait=120 \
    bash -c 'NODE_RANK=$SLURM_NODEID LOCAL_ADDR=${LOCAL_ADDR:-$SLURMD_NODENAME} exec bash "$0" "$@"' \
    "$root/launch/cluster/torchrun.sh" "$@" &
step=$!
while true; do # a signal ends `wait` before srun has ended
    seen=$signals
    wait "$step"
    status=$?
    ((signals == seen)) && exit "$status"
done
