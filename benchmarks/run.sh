#!/usr/bin/env bash
# The CPU benchmarks of single claims (make bench-claims): benchmarks/run.sh VENV. JSON goes to runs/bench/; exits with 1 when a limit is missed.
#   BENCH_OPTIONS   passed on to step_cost.py and zero.py, for example --quick
set -uo pipefail
cd "$(dirname "$0")/.."
venv=${1:?usage: benchmarks/run.sh VENV}
out=runs/bench
mkdir -p "$out"
export PYTHONUNBUFFERED=1
peers=none
if [ -e "$venv-peers/.installed" ]; then
  peers=$venv-peers
else
  echo "no DeepSpeed in this run; to have it compared: bash benchmarks/peers.sh $venv-peers"
fi
status=0
"$venv/bin/python" benchmarks/ops.py --output "$out/ops.json" || status=1
# shellcheck disable=SC2086  # several options
"$venv/bin/python" benchmarks/step_cost.py --peers "$peers" --json "$out/step_cost.json" ${BENCH_OPTIONS:-} || status=1
# shellcheck disable=SC2086  # several options
"$venv/bin/python" benchmarks/zero.py --peers "$peers" --json "$out/zero.json" ${BENCH_OPTIONS:-} || status=1
"$venv/bin/python" benchmarks/superoffload.py --peers "$peers" --json "$out/superoffload.json" || status=1
# DeepSpeed's ZenFlow works in another version: 0.19.8 scrambles weights when it starts.
zenflow_peers=none
if [ -e "$venv-peers-0.19.6/.installed" ]; then
  zenflow_peers=$venv-peers-0.19.6
else
  echo "no DeepSpeed ZenFlow and sequence parallelism in this run; to have them compared: bash benchmarks/peers.sh $venv-peers-0.19.6 0.19.6"
fi
"$venv/bin/python" benchmarks/zenflow.py --peers "$zenflow_peers" --json "$out/zenflow.json" || status=1
"$venv/bin/python" benchmarks/sequence.py --peers "$zenflow_peers" --lengths 512 1024 2048 \
  --json "$out/sequence.json" --picture "$out/sequence.png" || status=1
"$venv/bin/python" benchmarks/precision.py --ranks 2 --peers "$peers" --json "$out/precision.json" || status=1
"$venv/bin/python" benchmarks/convergence.py --json "$out/convergence.json" --picture "$out/convergence.png" || status=1
"$venv/bin/python" benchmarks/checkpoint.py --peers "$peers" --json "$out/checkpoint.json" || status=1
"$venv/bin/python" benchmarks/layout_176b.py --json "$out/layout_176b.json" || status=1
"$venv/bin/python" benchmarks/monitor.py --json "$out/monitor.json" || status=1
"$venv/bin/python" benchmarks/estimate.py --json "$out/estimate.json" || status=1
"$venv/bin/python" benchmarks/simulation.py --json "$out/simulation.json" || status=1
echo "JSON is in $out"
exit $status
