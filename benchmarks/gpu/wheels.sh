#!/usr/bin/env bash
# Collects what a GPU machine without network lacks into a folder: benchmarks/gpu/wheels.sh [FOLDER]
#
# Run it on a machine with network, then take the checkout there with the folder (.whl, which git ignores).
# benchmarks/gpu/environment.sh installs from it with --no-index. The GPU machine is expected to have torch, triton,
# lightning, numpy, PyYAML, psutil, rich, safetensors, xxhash, pytest and ninja; what it has besides is left alone.
#   PYTHON       the interpreter that downloads (python3)
#   FOR_PYTHON   the Python version of the GPU machine (3.12), on x86-64
set -euo pipefail
out=${1:-.whl}
python=${PYTHON:-python3}
version=${FOR_PYTHON:-3.12}
mkdir -p "$out"
rm -f "$out"/*.whl # two versions of one package would stop the installation
pip=("$python" -m pip --disable-pip-version-check)
# Ours needs the first line, DeepSpeed the second. torchao is another contestant.
"${pip[@]}" download -q --no-deps --only-binary=:all: --implementation cp --python-version "$version" \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
  --platform manylinux2014_x86_64 --platform any -d "$out" \
  omegaconf jsonargparse docstring-parser typeshed-client typing-extensions \
  pydantic==2.14.4 pydantic-core==2.50.5 annotated-types typing-inspection \
  torchao==0.18.0
# These come as sources. Without DS_BUILD_OPS the wheel carries DeepSpeed's C++ and compiles it at the first use.
DS_BUILD_OPS=0 "${pip[@]}" wheel -q --no-deps -w "$out" hjson
# DeepSpeed's setup imports torch and setuptools: those of the interpreter, not a build environment's.
DS_BUILD_OPS=0 "${pip[@]}" wheel -q --no-deps --no-build-isolation -w "$out" deepspeed==0.19.8
ls -l "$out"
