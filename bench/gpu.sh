#!/usr/bin/env bash
# Checks and times every Triton kernel on this machine's GPU, in under 4 minutes; the result is $OUT/gpu.json, or
# bench/results/gpu.json. `bash bench/gpu.sh sweep [seconds] [parts]` times other configurations (bench/gpu_sweep.py).
# Needs torch, triton, numpy and pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if [[ ${1:-} == sweep ]]; then
    exec timeout "$((${2:-150} + 45))" "$python" -m bench.gpu_sweep "${@:2}"
fi
exec timeout 240 "$python" -m bench.gpu "$@"
