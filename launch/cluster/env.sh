# shellcheck shell=bash disable=SC2154
# What the processes of a run find in their environment, the same on every node; sourced by torchrun.sh and
# slurm.sbatch with `root` set to the repository. Each setting stands here with its reason, and one that the caller has
# made already wins.

# The interpreter: the one that `make setup` made, else the one on PATH.
if [[ -z ${PYTHON:-} && -x $root/.venv/bin/python ]]; then
    PYTHON=$root/.venv/bin/python
fi
export PYTHON=${PYTHON:-python}

# The folder that these arguments of launch/stage.py write to; "None" where they name no stage.
folder=$(PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} "$PYTHON" -Pc \
    'import sys; from launch.stage import output_dir; print(output_dir(sys.argv[1:]))' "$@") || exit

# --- Starting and stopping ---------------------------------------------------------------------------------------

# A store of its own for every attempt of --max-restarts. torch shares one between the agents and the ranks of all
# attempts; restarted ranks then read the addresses of dead ones (pytorch/pytorch#135712). One node alone could tell
# the attempts apart by TORCHELASTIC_RESTART_COUNT, as train/distributed.py does, but each node counts for itself: one
# that restarts because another's rank died counts nothing, and the ranks would wait for each other under two names.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}

# Seconds between SIGTERM, which torchrun passes on to its ranks, and SIGKILL. They finish their step and save; torch's
# 30 may be less than one step. Keep it below what the scheduler grants (slurm.sbatch: --signal, 300).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}

# --- NCCL (GPUs; ranks on CPUs talk through gloo) ----------------------------------------------------------------

# By default NCCL prints nothing; at WARN it says what went wrong, and still nothing while all is well.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# Where each rank writes its last 2,000 collectives when one runs into its time limit (30 minutes): which rank stood
# where. torch keeps that record anyway and would leave it in ~/.cache, where another run overwrites it. Read it with
# `python -m torch.distributed.flight_recorder.fr_trace FOLDER -p nccl_rank_`.
export TORCH_FR_DUMP_TEMP_FILE=${TORCH_FR_DUMP_TEMP_FILE:-$folder/nccl_rank_}

# NCCL and gloo choose a network by themselves. Only where they choose wrongly (the log says "no route to host", or
# shows ranks that never meet), name the interface that all nodes share; NCCL reads a list of prefixes, gloo one name:
#   export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0
# The same holds for InfiniBand adapters, of which NCCL takes all that are up; name them where some are for storage:
#   export NCCL_IB_HCA==mlx5_0,mlx5_1,mlx5_4,mlx5_5 (the second = asks for these very names)

# --- Memory ------------------------------------------------------------------------------------------------------

# An expert gets another number of rows in every step and there is no capacity that would even it out, so a freed
# block seldom fits the next request. Segments that grow keep the pieces usable; the default cuts them up.
if [[ -z ${PYTORCH_CUDA_ALLOC_CONF:-} ]]; then # the older name, which torch reads first
    export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
fi
