#!/usr/bin/env bash
# Checks and times every Triton kernel on this machine's GPU, in under 8 minutes; the result is $OUT/gpu.json, or
# bench/results/gpu.json. Needs torch, triton, numpy and pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
exec timeout 475 "${PYTHON:-python3}" -m bench.gpu "$@"
