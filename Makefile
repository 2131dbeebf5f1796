# One command on a fresh machine: every target sets up what it needs.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PYTHONUNBUFFERED := 1
# torch's threads spin while they wait, which on busy cores slows a step many times over; let them sleep.
export OMP_WAIT_POLICY ?= passive

PEERS ?= .venv-peers

# Tests spawn ranks and processes and wait for them; three files at a time keep two cores busy.
WORKERS ?= 3
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: setup demo test test-fast test-all test-peers soak check format docs docs-serve wheel bench bench-claims bench-scaling gpu-check gpu-bench gpu-long gpu-wheels clean

setup: $(STAMP)

# torch goes first and alone: the pin in constraints-dev.txt keeps a CUDA build of several GB away.
$(STAMP): pyproject.toml constraints-dev.txt CMakeLists.txt lightning_superscale/ops/native/build.py $(shell find csrc -type f 2>/dev/null)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check "$$(grep ^torch== constraints-dev.txt)"
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints-dev.txt "scikit-build-core>=0.10" ninja cmake
	# The editable install compiles nothing: the libraries are built once, into a cache keyed by their sources.
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints-dev.txt --no-build-isolation \
		-C wheel.cmake=false -C editable.mode=inplace -e ".[dev,docs,examples]"
	$(BIN)/python -m lightning_superscale.ops.native.build
	touch $(STAMP)

demo: setup
	$(BIN)/python examples/language_model/demo.py

test: setup
	$(PYTEST)

test-fast: setup
	$(PYTEST) -m "not slow"

test-all: setup
	LSS_TEST_ALL=1 $(PYTEST)

# DeepSpeed itself, in an environment of its own: it writes and we read, we export and it loads. And Ray Train, whose
# workers train with our strategies, and torchdata's loaders.
test-peers:
	bash benchmarks/peers.sh $(PEERS)
	TORCH_EXTENSIONS_DIR="$(CURDIR)/$(PEERS)/extensions" DS_ACCELERATOR=cpu PATH="$(CURDIR)/$(PEERS)/bin:$$PATH" \
		$(PEERS)/bin/python -m pytest tests/peers

# Random kills, full disks, damage and NaN, changes of ranks and strategy; ends with the bits of an undisturbed run.
soak: setup
	$(BIN)/python -W ignore -m tests.soak

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix -q . || true
	$(BIN)/ruff format -q .

# The documentation as a site. A link or an anchor that leads nowhere is an error, as is a file of another host.
docs docs-serve: export NO_MKDOCS_2_WARNING := 1
docs: setup
	$(BIN)/python -m mkdocs build --strict
	$(BIN)/python -m tests.docs.site build/site

docs-serve: setup
	$(BIN)/python -m mkdocs serve

# The wheel, built in an empty environment, installed into another.
wheel: setup
	bash .ci/wheel $(BIN)/python

# Every technique beside every peer: one table, one picture. PEERS=none leaves the peers out, BENCH_OPTIONS=--quick takes
# minutes. DeepSpeed is there twice, as its ZenFlow scrambles weights in the newer version.
ZENFLOW_PEERS ?= $(if $(filter none,$(PEERS)),none,$(PEERS)-0.19.6)
BENCH_OPTIONS ?=
bench: setup
	test "$(PEERS)" = none || bash benchmarks/peers.sh $(PEERS)
	test "$(ZENFLOW_PEERS)" = none || bash benchmarks/peers.sh $(ZENFLOW_PEERS) 0.19.6
	$(BIN)/python benchmarks/versus/bench.py --peers $(PEERS) --zenflow-peers $(ZENFLOW_PEERS) \
		--json runs/bench/versus.json --picture runs/bench/versus.png $(BENCH_OPTIONS)

# One script per claim, each with its limits.
bench-claims: setup
	bash benchmarks/run.sh $(VENV)

# How the cost of a step grows with parameters and ranks.
bench-scaling: setup
	$(BIN)/python benchmarks/scaling.py --json runs/bench/scaling.json --picture runs/bench/scaling.png

# On a machine with a GPU: is everything right, how fast is it, and what of large models and long sequences? Each ends
# within 9.5 minutes. OUT takes the JSON lines; GPU_OPTIONS="--device cpu --tiny" rehearses without a GPU. No network is
# needed: `make gpu-wheels` on another machine collects what this one may lack. See docs/gpu.md.
OUT ?= runs/gpu
GPU_OPTIONS ?=
gpu-check gpu-bench gpu-long:
	PYTHON="$(PYTHON)" bash benchmarks/gpu/run.sh $(@:gpu-%=%) $(OUT) $(GPU_OPTIONS)

gpu-wheels:
	PYTHON="$(PYTHON)" bash benchmarks/gpu/wheels.sh .whl

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .mypy_cache .ruff_cache
