#!/usr/bin/env bash
# What `make gpu-check`, `make gpu-bench` and `make gpu-long` run: benchmarks/gpu/run.sh check|bench|long OUT [options]
#
# Needs a GPU and torch with CUDA; nvcc for our CUDA kernels; no network (environment.sh). Each ends within 9.5 minutes.
# OUT gets one file of JSON lines and one log for each, and a trace from the check; the exit status says whether all
# rows are ok. `--device cpu --tiny` rehearses it without a GPU.
set -uo pipefail
part=${1:?usage: benchmarks/gpu/run.sh check|bench|long OUT [options]}
out=${2:?usage: benchmarks/gpu/run.sh check|bench|long OUT [options]}
shift 2
module=$part more=()
if [ "$part" = long ]; then module=bench more=(--long); fi
mkdir -p "$out"
out=$(cd "$out" && pwd)
{
    # shellcheck source=benchmarks/gpu/environment.sh
    . "$(dirname "${BASH_SOURCE[0]}")/environment.sh" || exit 1
    cd "$root" || exit 1
    start_cpu_adam
    # The rows have limits of their own; this one is for what no row foresees.
    timeout --signal=TERM --kill-after=5 555 "$python" -m "benchmarks.gpu.$module" "$out" "${more[@]}" "$@"
} 2>&1 | tee "$out/$part.log"
exit "${PIPESTATUS[0]}"
