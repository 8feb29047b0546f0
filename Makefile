# make demo     train a small transformer with the fused loss, on whatever this machine has: a minute on 2 cores
# make demo-llm  a real language model learns to answer sums through TRL's trainer: 7 minutes on 2 cores, plus a download
# make test     the whole suite; without a GPU the kernels run in Triton's interpreter
# make test-core  what must hold on every supported version of PyTorch and Triton, in the environment of `make test`
# make test-oldest, test-middle  the suite's core on the oldest PyTorch and Triton that we support, and on ones between
# make verl-env what the tests against the real verl import, in $(VENV)/verl; `make test` makes it too
# make smollm   download SmolLM2-135M (93 MB) into .cache/, for the tests and studies on a real model; `make test` does it too
# make lint     ruff, and the types by mypy and pyright
# make peers    install the heads that the benchmarks compare with: Liger's and cut-cross-entropy's
# make bench    measure on this machine's GPU, else its CPU (over half an hour), and the peers' heads; rewrite tables, plots
# make precision  measure the precision recipes on this CPU (minutes), redraw the plots, rewrite docs/precision.md
# make real     what a real model's own tokens say, from the recording: precision, engines, sparse gradients, speed
# make record   make that recording again, from SmolLM2-135M itself, and the record of `make demo-llm`: 15 minutes
# make sparsity  what sparse_grad saves and costs on this machine, its plot, docs/sparse.md
# make fuzz     20,000 random calls against the fp64 oracle, on all cores; FUZZ_ARGS="--cases 100000 --seed 7"
# make longrun  2,000 optimiser steps on recorded streams, ours beside fp64, sparse gradients beside exact; bench_results/
# make stability  which loss and which δ, on a real vocabulary: over two hours on 2 cores, resumable; docs/stability.md
# make compile  compile every kernel for sm_80, sm_90, sm_100, gfx942; fails on spills, narrow or repeated loads, slow loops
# make compile-oldest, compile-middle  the same under the Triton of test-oldest, test-middle
# make doctor   what this machine has, which backend will run, and a self-check
# make wheel    dist/drpo_kernels-<version>-py3-none-any.whl
# make clean    remove what the above made, except the virtual environment and .cache; make distclean removes these too
#
# Everything runs in a virtual environment, made on first use and renewed when pyproject.toml changes:
#   make test VENV=/elsewhere PYTHON=python3.12 PYTEST_ARGS="-x -k gspo"

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
FUZZ_ARGS ?=
STABILITY_ARGS ?=
DEMO_ARGS ?=
DIST ?= dist

# Without a GPU: one exact version of each, because a range resolves to the newest CUDA build, and Triton by name, because
# the CPU build of PyTorch does not depend on it (3.9 is also the first whose interpreter runs on NumPy 2.4).
# With one: any supported PyTorch and the Triton that it brings. Override TORCH for a build from elsewhere (ROCm).
GPU := $(shell nvidia-smi -L 2>/dev/null | head -1)$(wildcard /dev/kfd)
TORCH ?= $(if $(strip $(GPU)),"torch>=2.8","torch==2.13.0" "triton==3.9.0")

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VERL := $(VENV)/verl
PEERS := $(VENV)/.peers

# What must hold on every version that we support, on the GPU machines' too
CORE := cases conformance edges error_messages errors exact_products fp8 fused_head fused_head_adapters graph_fields graphs \
	invariance kept_ids launches layouts main_grad outputs planned_sweep saved_tensors sharded_rows sparse sparse_calls \
	sparse_edges token_losses
CORE_TESTS = $(foreach name,$(CORE),$(wildcard tests/*/test_$(name).py))

.PHONY: help venv verl-env smollm versions demo demo-llm test test-core lint peers bench precision real record sparsity fuzz \
	longrun stability compile doctor wheel test-oldest test-middle compile-oldest compile-middle clean distclean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# make /make /p' Makefile

venv: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m drpo_kernels demo $(DEMO_ARGS)

demo-llm: $(STAMP)
	$(BIN)/python -m examples.smollm_arithmetic $(DEMO_ARGS)

# Apart from the environment, whose own versions of shared packages come first; a change of pyproject.toml does not renew it.
verl-env: $(VERL)/.installed

$(VERL)/.installed: tests/requirements-verl.txt | $(STAMP)
	rm -rf $(VERL)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --retries 1 --no-deps --target $(VERL) -r $<
	@touch $@

smollm: $(STAMP)
	$(BIN)/python -m examples.smollm

test: $(STAMP)
	@$(MAKE) --no-print-directory verl-env || echo "make verl-env failed: the tests against verl will be skipped"
	@$(MAKE) --no-print-directory smollm || echo "make smollm failed: the tests on a real model will be skipped"
	$(BIN)/python -m pytest -n auto --dist worksteal $(PYTEST_ARGS)

test-core: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist worksteal $(CORE_TESTS) $(PYTEST_ARGS)

# Several GB each, of PyTorch's CUDA builds: there are no others of these versions. The package is not installed in them.
versions: $(VENV)/oldest/.installed $(VENV)/middle/.installed

$(VENV)/oldest/.installed $(VENV)/middle/.installed: $(VENV)/%/.installed: tests/requirements-%.txt
	$(PYTHON) -m venv --clear $(VENV)/$*
	$(VENV)/$*/bin/python -m pip install --disable-pip-version-check --no-compile --progress-bar off -r $<
	@touch $@

test-oldest test-middle: test-%: $(VENV)/%/.installed
	$(VENV)/$*/bin/python -m pytest -n auto --dist worksteal $(CORE_TESTS) $(PYTEST_ARGS)

compile-oldest compile-middle: compile-%: $(VENV)/%/.installed
	$(VENV)/$*/bin/python -m drpo_kernels compile

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/basedpyright

# Without their dependencies, which are here: a peer must not bring another PyTorch.
peers: $(PEERS)

$(PEERS): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps "liger-kernel>=0.8" "cut-cross-entropy>=25.1"
	@touch $@

ifeq ($(strip $(GPU)),)
bench: $(PEERS)
	$(BIN)/python -m benchmarks.speed && $(BIN)/python -m benchmarks.trainers && $(BIN)/python -m benchmarks.report
else
bench: $(PEERS)
	-$(BIN)/python -m benchmarks.device --sitting first --out bench_results/gpu
	-$(BIN)/python -m benchmarks.device --sitting second --out bench_results/gpu
	-$(BIN)/python -m benchmarks.device --sitting third --out bench_results/gpu
	$(BIN)/python -m benchmarks.report
endif

precision: $(STAMP)
	$(BIN)/python -m benchmarks.precision && $(BIN)/python -m benchmarks.report

REAL_METHODS := gemms_whole eager trl linear_policy_loss linear_policy_loss_frozen_head linear_token_logprobs

real: $(STAMP)
	$(BIN)/python -m benchmarks.precision --regimes real
	$(BIN)/python -m benchmarks.sparsity --device cpu --parts real tails
	$(BIN)/python -m benchmarks.speed --device cpu --workloads SmolLM2-135M --tokens 2048 --inputs real \
		--methods $(REAL_METHODS) --active-shares 1 0.5
	$(BIN)/python -m benchmarks.report

record: $(STAMP)
	$(BIN)/python -m benchmarks.smollm
	$(BIN)/python -m examples.smollm_arithmetic --device cpu --out demo_llm_out
	cp demo_llm_out/history.jsonl bench_results/smollm/demo.jsonl

sparsity: $(STAMP)
	$(BIN)/python -m benchmarks.sparsity && $(BIN)/python -m benchmarks.report

fuzz: $(STAMP)
	$(BIN)/python tests/support/run_fuzz.py $(FUZZ_ARGS)

longrun: $(STAMP)
	$(BIN)/python -m benchmarks.longrun && $(BIN)/python -m benchmarks.longrun.sparse

stability: $(STAMP)
	$(BIN)/python -m benchmarks.stability $(STABILITY_ARGS) && $(BIN)/python -m benchmarks.report

compile: $(STAMP)
	$(BIN)/python -m drpo_kernels compile

doctor: $(STAMP)
	$(BIN)/python -m drpo_kernels doctor

wheel: $(STAMP)
	rm -rf build  # setuptools would pack modules that have been deleted since
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir $(DIST) .
	rm -rf build

clean:
	rm -rf build dist demo_out demo_llm_out *.egg-info .pytest_cache .ruff_cache .hypothesis
	find drpo_kernels examples tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) .cache
