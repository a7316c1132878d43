#!/usr/bin/env bash
# One node's part of a run: starts a rank for every GPU and hands all arguments to launch/stage.py.
#
#   launch/cluster/torchrun.sh +stage=sparse_adapt train.steps=1000                   one node, all its GPUs
#   NNODES=4 MASTER_ADDR=node0 launch/cluster/torchrun.sh +stage=sparse_adapt ...     the same line on each of four
#
# NNODES        nodes of the run (1)
# NPROC         ranks on this node (its GPUs; 1 where it has none)
# MASTER_ADDR   a node of the run under a name or address that all others reach; needed for more than one node
# MASTER_PORT   a port that is free there (29500)
# NODE_RANK     optional: 0 on MASTER_ADDR's node, anything else on the others; else it knows itself by the name.
#               Ranks are numbered by the nodes' host names, whatever stands here
# LOCAL_ADDR    optional: how the others reach this node, where its own host name does not serve
# RUN_ID        a name that the nodes of a run share, where several runs use one MASTER_PORT (winnow)
# MAX_RESTARTS  how often this node starts its ranks again after a fault (0)
# NUMA_BINDING  optional, see below
#
# SIGTERM on every node saves after the step and ends the run; the same lines go on from there.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
source "$root/launch/cluster/env.sh"

nodes=${NNODES:-1}
ranks=${NPROC:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 1)')}

# CPU threads of a rank. torch alone takes every core for each of them, torchrun gives each a single one: weights are
# read and converted on the CPU, and without a GPU the whole model runs there.
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}

options=(--nnodes="$nodes" --nproc-per-node="$ranks" --max-restarts="${MAX_RESTARTS:-0}")
if ((nodes == 1)); then
    options+=(--standalone) # a free port of its own, so two runs on one machine do not meet
else
    if [[ -z ${MASTER_ADDR:-} ]]; then
        echo "MASTER_ADDR is not set and NNODES=$nodes: give a node that all others reach, the same on every node" >&2
        exit 2
    fi
    # c10d and not the static rendezvous: when one node starts its ranks again, the others learn of it and follow
    options+=(--rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:${MASTER_PORT:-29500}" --rdzv-id="${RUN_ID:-winnow}")
    if [[ -n ${NODE_RANK:-} ]]; then
        options+=(--rdzv-conf="is_host=$((NODE_RANK == 0))")
    fi
    if [[ -n ${LOCAL_ADDR:-} ]]; then
        options+=(--local-addr="$LOCAL_ADDR")
    fi
fi

# NUMA_BINDING=node keeps each rank on the cores beside its GPU, so that the kernels it launches and the batches it
# copies do not cross between sockets. It needs `numactl`, and a GPU for every rank. Not the default: torch speaks of
# 1 to 10%, often nothing, and it was not measured on this code; compare perf/tokens_per_s of two short runs.
if [[ -n ${NUMA_BINDING:-} ]]; then
    options+=(--numa-binding="$NUMA_BINDING")
fi

# exec: signals are for torchrun, and no shell stands between
exec "$PYTHON" -m torch.distributed.run "${options[@]}" "$root/launch/stage.py" "$@"
