# One target for each thing people do; `make` alone lists them.

PYTHON ?= python3
GPU_PYTHON ?= python3
RESULTS ?= bench/results
# Triton versions and GPUs that `make aot` compiles for: that of the GPU machine, and the newest.
TRITON ?= 3.6.0 3.9.0
ARCH ?= 80 89 90 100 120
# Not from the environment: names this general belong to other tools too.
ARGS =
OUT = demo.mp4

VENV := .venv
STAMP := $(VENV)/.setup-done
CHECKPOINT := build/tiny-checkpoint
# GPU machines may have no network: there, an interpreter that has torch already runs the checkout as it lies.
GPU_RUN = PYTHONPATH="$(CURDIR):$(CURDIR)/kernels" "$(GPU_PYTHON)"
GPU_BENCH = mkdir -p "$(RESULTS)" && $(GPU_RUN) -m liveavatar_engine.bench

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test lint format endurance aot csrc test-gpu gpu-gate gpu-compare bench-kernels clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## create .venv with everything needed (PYTHON=python3.12, TORCH=cpu|cuda to choose)

# Set up again, too, when the checkout was moved or copied with its environment (the stamp holds the path) or TORCH is given.
ifneq "$(TORCH)$(shell cat $(STAMP) 2>/dev/null)" "$(CURDIR)"
.PHONY: $(STAMP)
endif
$(STAMP): pyproject.toml setup.py constraints.txt tools/setup_env.sh
	@rm -f $@
	@bash tools/setup_env.sh "$(PYTHON)"
	@pwd -P > $@

demo: $(CHECKPOINT).ready ## make demo.mp4 from the sample portrait and speech, with a tiny random checkpoint (OUT=file.mp4)
	$(VENV)/bin/liveavatar-engine generate --checkpoint $(CHECKPOINT) --image assets/portrait.png --audio assets/speech.wav \
		--prompt "A friendly person talks to the camera" --size "256*256" --out "$(OUT)"
	@echo "The video is in $(OUT) (the weights are random: expect moving patterns, not a person)."

$(CHECKPOINT).ready: $(STAMP)
	rm -rf $(CHECKPOINT)
	@mkdir -p $(dir $(CHECKPOINT))
	$(VENV)/bin/liveavatar-engine make-checkpoint --preset tiny $(CHECKPOINT)
	@touch $@

test: $(STAMP) ## run the tests that need no GPU (ARGS="-k ring" goes to pytest)
	@bash tools/run_tests.sh $(VENV)/bin/python $(ARGS)

lint: $(STAMP) ## check style, format and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(STAMP) ## format the code and apply ruff's safe fixes
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

endurance: $(STAMP) ## run the tiny model for 10,000 s of video; memory, speed and statistics must stay flat; writes docs/endurance.md
	$(VENV)/bin/python -m bench.endurance --out docs/endurance.md $(ARGS)

aot: $(TRITON:%=build/triton-%) ## compile every Triton kernel ahead of time, tables in RESULTS (ARCH="90 120", TRITON="3.6.0")
	@for version in $(TRITON); do \
		PYTHONPATH=build/triton-$$version PYTHONWARNINGS=ignore $(VENV)/bin/python -m bench.aot --arch $(ARCH) \
			--out "$(RESULTS)/aot-triton-$$version.md" $(ARGS) || exit 1; \
	done

build/triton-%: | $(STAMP)
	$(VENV)/bin/python -m pip install --quiet --no-deps --target $@ triton==$*

csrc: $(STAMP) ## compile csrc/ for Hopper GPUs into the checkout and look at the machine code; needs nvcc (ARGS="-j 1": less memory)
	$(VENV)/bin/python -m pip install --quiet --no-deps -c constraints.txt pybind11 ninja nvidia-cutlass
	LIVEAVATAR_BUILD_CUDA=1 $(VENV)/bin/python setup.py -q build_ext --inplace --build-temp build $(ARGS)
	$(VENV)/bin/python csrc/sass_report.py build/csrc

test-gpu: ## run the GPU tests with GPU_PYTHON (default python3), which must have torch; installs nothing
	$(GPU_RUN) -m pytest -q -m gpu tests/gpu $(ARGS)

gpu-gate: ## before a release, on a GPU: build, GPU tests, kernels, step, vae, stream, into RESULTS (ARGS="--again")
	$(GPU_RUN) -m bench.gate --results "$(RESULTS)" $(ARGS)

gpu-compare: ## time the reference's own code beside the engine, on a GPU (REFERENCE=its checkout); writes RESULTS/compare.*
	$(GPU_BENCH) compare --reference "$(REFERENCE)" --json "$(RESULTS)/compare.json" --html "$(RESULTS)/compare.html" $(ARGS)

bench-kernels: ## check and time every kernel at the 14B model's sizes with GPU_PYTHON; writes RESULTS/kernels.json
	$(GPU_BENCH) kernels --json "$(RESULTS)/kernels.json" $(ARGS)

clean: ## remove what was built (.venv stays)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo.mp4 kernels/liveavatar_kernels/_C*
	find . -path "./$(VENV)" -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
