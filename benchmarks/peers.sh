#!/usr/bin/env bash
# Makes an environment that holds DeepSpeed beside this package, for comparisons: peers.sh [VENV] [VERSION].
# Ray Train and torchdata, whose workers and loaders train with it, are there too.
# Nothing of the package depends on it.
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${1:-.venv-peers}"
[ "${venv#/}" != "$venv" ] || venv="$PWD/$venv"
deepspeed="${2:-0.19.8}"
stamp="$venv/.installed"
has="$(cat "$stamp" 2>/dev/null || true)"
if [ "$has" != "$deepspeed" ] || [ ! "$stamp" -nt benchmarks/peers.sh ] || [ ! "$stamp" -nt pyproject.toml ]; then
  test -x "$venv/bin/python" || "${PYTHON:-python3}" -m venv "$venv"
  pip=("$venv/bin/python" -m pip install -q --disable-pip-version-check -c constraints-dev.txt)
  "${pip[@]}" "$(grep ^torch== constraints-dev.txt)"
  "${pip[@]}" "scikit-build-core>=0.10" ninja cmake setuptools wheel
  "${pip[@]}" --no-build-isolation -C wheel.cmake=false -C editable.mode=inplace -e ".[dev]"
  "${pip[@]}" transformers  # models of benchmarks/sequence.py, and what DeepSpeed's ALST registers with
  "${pip[@]}" "ray[train]==2.60.0" "torchdata==0.11.0"
  "${pip[@]}" "torchao==0.18.0"  # its CPUOffloadOptimizer
  DS_BUILD_OPS=0 "${pip[@]}" --no-build-isolation "deepspeed==$deepspeed"
  echo "$deepspeed" >"$stamp"
fi
# A killed build leaves a lock, and every later start of DeepSpeed would wait for it forever.
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$venv/extensions}"
rm -f "$TORCH_EXTENSIONS_DIR"/*/lock
export DS_ACCELERATOR=cpu PATH="$venv/bin:$PATH"
"$venv/bin/python" -W ignore -c "from deepspeed.ops.op_builder import CPUAdamBuilder as B; B().load()" >/dev/null
echo "peers are in $venv"
