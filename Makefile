# Everything that people do with this project; CI runs the same targets.
PYTHON ?= python3
BIN := .venv/bin
PORT ?= 8000
MODEL ?= models/needle
# The suite takes two cores: its engines and servers are single-threaded.
WORKERS ?= -n 2 --dist loadgroup

# Without bytecode files every start of vLLM compiles them anew.
unexport PYTHONDONTWRITEBYTECODE
# The models here are local folders: no look-ups on the network.
export HF_HUB_OFFLINE ?= 1
export VLLM_CPU_KVCACHE_SPACE ?= 1

CSRC := $(wildcard csrc/*.h csrc/*.cpp csrc/kernels/*.h csrc/kernels/*.cpp)

.PHONY: help setup demo serve test test-all soak sanitize docs contract lint format type clean needle

help:  ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup:  ## Make .venv with vLLM for CPUs, this project and its tools
	@$(PYTHON) tools/setup_env.py

demo: setup  ## Serve the needle model, ask it for a pass key, show the KV memory, stop
	@$(BIN)/python tools/demo.py

serve: setup  ## Serve MODEL (default: the needle model) on PORT until Ctrl-C
	$(BIN)/vllm serve $(MODEL) --attention-backend duo --dtype float32 --port $(PORT)

test: setup  ## The whole suite but its slow cases
	$(BIN)/python -m pytest -m "not slow and not soak" $(WORKERS)

test-all: setup  ## The whole suite with the slow cases
	$(BIN)/python -m pytest -m "not soak" $(WORKERS)

soak: setup  ## The long ones: 2,000 mixed requests over HTTP, 10,000 cases a fuzz, a million scheduler steps
	VLLM_DUO_SOAK_REQUESTS=2000 $(BIN)/python -m pytest tests/e2e/test_soak.py -s
	VLLM_DUO_FUZZ_CASES=10000 $(BIN)/python -m pytest tests/fuzz tests/e2e/test_fuzz_http.py
	$(BIN)/python -m pytest -m soak

sanitize: setup  ## The operator tests over kernels built with ASan and UBSan
	$(BIN)/python tools/sanitize.py

lint: setup  ## ruff, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CSRC)

contract: setup  ## What moved in another vLLM: VLLM=<version, wheel, environment or folder>
	@$(BIN)/python tools/contract.py "$(VLLM)"

docs: setup  ## Build the documentation into build/site; a warning or a broken link is an error
	$(BIN)/python tools/compatibility.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: setup  ## Let ruff format and fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CSRC)

type: setup  ## Types alone
	$(BIN)/mypy

needle: setup  ## Train models/needle again (under 20 minutes on one core)
	$(BIN)/python -m models.train_needle --out models/needle

clean:  ## Remove the environment and all caches
	rm -rf .venv .demo .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -prune -exec rm -rf {} +
