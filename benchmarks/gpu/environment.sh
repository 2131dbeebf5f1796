# Sourced: an environment for the GPU checks and benchmarks, also on a machine without network.
#
# Installs the wheels of .whl (benchmarks/gpu/wheels.sh collects them) into build/gpu/site, without an index, and starts
# the compilation of DeepSpeed's CPUAdam in the background. Where there is no such folder, the interpreter must have all.
#   PYTHON       the interpreter (python3)
#   LSS_WHEELS   the folder of wheels (.whl)
#   LSS_GPU_BUILD  where all of this goes (build/gpu)
# Sets `python`, PYTHONPATH and TORCH_EXTENSIONS_DIR.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
wheels=${LSS_WHEELS:-$root/.whl}
made=${LSS_GPU_BUILD:-$root/build/gpu} # ignored by git; a machine that is kept finds it again
mkdir -p "$made"
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$made/extensions}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1

if compgen -G "$wheels/*.whl" >/dev/null; then
  state=$( ("$python" --version; cd "$wheels" && sha256sum ./*.whl) | sha256sum | cut -c 1-16)
  site=$made/site-$state
  if [ ! -e "$site/.installed" ]; then
    "$python" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir --upgrade \
      --target "$site" "$wheels"/*.whl && mkdir -p "$site" && touch "$site/.installed" || return 1
  fi
  # First, since the machine may have older versions of one of them.
  PYTHONPATH=$site:$PYTHONPATH
fi

# A killed build leaves a lock, for which every later load would wait for ever.
rm -f "$TORCH_EXTENSIONS_DIR"/*/lock "$TORCH_EXTENSIONS_DIR"/*/*/lock
start_cpu_adam() { # takes 60 to 100 s of a core; whoever loads it meanwhile waits for it
  "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('deepspeed') is None)" || return 0
  "$python" -W ignore -c "from deepspeed.ops.op_builder import CPUAdamBuilder as B; B().load(verbose=False)" \
    >"$made/cpu_adam.log" 2>&1 &
}
