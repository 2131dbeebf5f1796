#!/usr/bin/env bash
# Build, test and measure the GPU ops on this machine: benchmarks/gpu/run.sh OUT_DIR [run.py options]
#
# Needs a GPU, nvcc, torch with CUDA and Triton; no network; at most ten minutes. OUT_DIR receives JSON
# files and logs, whatever fails; the exit status says whether anything did.
#   PYTHON      the interpreter (python3)
#   LSS_WHEELS  a directory of wheels for packages that the interpreter lacks
set -uo pipefail
out=${1:?usage: benchmarks/gpu/run.sh OUT_DIR [options]}
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
{
    if [ -n "${LSS_WHEELS:-}" ]; then
        site=$(mktemp -d)
        "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$LSS_WHEELS"/*.whl || exit 1
        export PYTHONPATH="$PYTHONPATH:$site"
    fi
    cd "$root" && PYTHONUNBUFFERED=1 timeout --signal=INT --kill-after=10 590 "$python" -m benchmarks.gpu.run "$out" "$@"
} 2>&1 | tee "$out/run.log"
exit "${PIPESTATUS[0]}"
