# `make` lists the targets. Everything is installed into .venv and nothing outside this folder is touched.
PYTHON ?= python3
JOBS ?= 2
SOAK ?= tests

BIN := .venv/bin
INSTALLED := .venv/.installed
DEMO := build/demo
INTEROP := build/interop
LLAMA := $(INTEROP)/vendor/llama.cpp
QUANTIZE := $(INTEROP)/build/bin/llama-quantize
CMAKE := $(or $(shell command -v cmake),$(INTEROP)/tools/bin/cmake)
GLMCONV := HF_HUB_OFFLINE=1 $(BIN)/glmconv

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test interop lint format docs soak bench clean download torch_dist hf fp8 awq gguf verify all

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9_]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(INSTALLED) ## Install glmconv and all that its tests need into .venv

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "glmconv needs Python 3.10 or later; pass PYTHON=/path/to/python3")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,peers]'
	@touch $@

demo: $(INSTALLED) ## Make a toy GLM-4.5, convert it to torch_dist and back, verify both
	@rm -rf $(DEMO) && mkdir -p $(DEMO)
	$(GLMCONV) toy glm4.5-355B-A32B -o $(DEMO)/hf
	$(GLMCONV) convert $(DEMO)/hf $(DEMO)/torch_dist --to torch_dist
	$(GLMCONV) convert $(DEMO)/torch_dist $(DEMO)/back --to hf
	$(GLMCONV) verify $(DEMO)/hf $(DEMO)/torch_dist
	$(GLMCONV) verify $(DEMO)/hf $(DEMO)/back
	@for file in $(DEMO)/hf/*.safetensors; do cmp "$$file" "$(DEMO)/back/$${file##*/}" || exit 1; done
	@printf '\n%-24s %8s %14s  %s\n' folder files bytes 'same tensors as hf'
	@for folder in hf torch_dist back; do \
		case $$folder in hf) same='(the source)' ;; torch_dist) same='yes, bit for bit' ;; back) same='yes, and the same .safetensors files' ;; esac; \
		find $(DEMO)/$$folder -type f -not -path '*/.glmconv/*' -printf '%s\n' | \
			awk -v folder=$(DEMO)/$$folder -v same="$$same" '{ bytes += $$1 } END { printf "%-24s %8d %14d  %s\n", folder, NR, bytes, same }'; \
	done

test: $(INSTALLED) ## Run all tests in their short form
	@$(BIN)/python -m pytest -n $(JOBS) -q -m 'not soak' --durations=10

interop: $(INSTALLED) $(QUANTIZE) ## Build llama.cpp, hold whole GGUF files against its own, and write tests/vectors/interop anew
	$(BIN)/python -m tests.gguf.interop.live $(INTEROP)

# The sources lie inside PyPI's llama-cpp-python. Its own build makes a library for Python; these are its programs
$(QUANTIZE): tests/gguf/interop/llama_cpp.txt | $(INSTALLED)
	@command -v c++ >/dev/null || { echo 'a C++ compiler is needed to build llama.cpp' >&2; exit 1; }
	rm -rf $(INTEROP) && mkdir -p $(INTEROP)
	command -v cmake >/dev/null || { $(PYTHON) -m venv $(INTEROP)/tools && $(INTEROP)/tools/bin/pip install --quiet cmake; }
	$(BIN)/python -m pip download --quiet --no-deps --no-binary :all: --require-hashes -d $(INTEROP) -r $<
	tar -xzf $(INTEROP)/llama_cpp_python-*.tar.gz -C $(INTEROP) --strip-components=1 --wildcards '*/vendor/llama.cpp'
	$(CMAKE) -S $(LLAMA) -B $(INTEROP)/build -DCMAKE_BUILD_TYPE=Release -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
		-DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_MTMD=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_OPENSSL=OFF >$(INTEROP)/cmake.log
	$(CMAKE) --build $(INTEROP)/build --parallel $(JOBS) --target llama-quantize llama-gguf-split >$(INTEROP)/build.log
	@touch $@

lint: $(INSTALLED) ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## Sort the imports and format
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED) ## Write docs/models.md and the MODEL_ARGS scripts anew from the architectures' tables
	$(BIN)/python docs/models.py
	$(BIN)/python compat/scripts/models/write.py

soak: $(INSTALLED) ## Run crash, race and fuzz tests in their long form (hours) and write down their figures
	@mkdir -p build
	GLMCONV_SOAK=1 $(BIN)/python -m pytest -n $(JOBS) -q --durations=20 --junit-xml=build/soak.xml -o junit_logging=system-out $(SOAK)
	$(BIN)/python tests/soak_figures.py build/soak.xml docs/reliability.md

bench: $(INSTALLED) ## Run the benchmarks
	@test -d bench || { echo 'no bench/ here yet' >&2; exit 1; }
	@for script in bench/*.py; do echo "== $$script"; $(BIN)/python "$$script" || exit 1; done

clean: ## Remove what was built, except .venv
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

# Pipelines: `make all MODEL=zai-org/GLM-4.5 BASE_DIR=/data`. What is done already is left alone, by its manifest; `make -n` shows the commands.
# On many nodes the same line on each, with NNODES=, NODE_RANK= and MASTER_ADDR=, or with HOSTFILE= (a host a line) and NODE_RANK=.
MODEL ?=
BASE_DIR ?=
NAME ?= $(notdir $(MODEL))
GGUF_TYPE ?= Q4_K_M
TRAINED ?= $(BASE_DIR)/$(NAME)_torch_dist
HOSTFILE ?=
HOSTS := $(if $(HOSTFILE),$(shell awk '$$1 && $$1 !~ /^\#/ { print $$1 }' '$(HOSTFILE)'))
NNODES ?= $(if $(HOSTS),$(words $(HOSTS)),1)
NODE_RANK ?= 0
NPROC_PER_NODE ?= 1
MASTER_ADDR ?= $(or $(firstword $(HOSTS)),127.0.0.1)
MASTER_PORT ?= 12345

STEPS := download torch_dist hf fp8 awq gguf verify all
NO_PROXY_HERE := env -u http_proxy -u https_proxy -u all_proxy -u HTTP_PROXY -u HTTPS_PROXY -u ALL_PROXY
TORCHRUN = $(NO_PROXY_HERE) $(BIN)/torchrun --nnodes $(NNODES) --nproc-per-node $(NPROC_PER_NODE) --node-rank $(NODE_RANK) \
	--master-addr $(MASTER_ADDR) --master-port $(MASTER_PORT) --max-restarts 3 -m glmconv
RELEASE = pipelines/release.yaml --set 'MODEL=$(MODEL)' --set 'GGUF_TYPE=$(GGUF_TYPE)'$(if $(filter all,$@),, --only $@)
PIPELINE = $(if $(filter hf,$@),pipelines/export.yaml --set 'TRAINED=$(TRAINED)',$(RELEASE)) --set 'BASE_DIR=$(BASE_DIR)' --set 'NAME=$(NAME)'
ALONE = $(filter download verify,$@)$(filter 1x1,$(NNODES)x$(NPROC_PER_NODE))

download: ## Pipeline: fetch MODEL (a Hub id or preset) into BASE_DIR
torch_dist: ## Pipeline: BASE_DIR/NAME to Megatron's torch_dist
hf: ## Pipeline: TRAINED, a torch_dist checkpoint, back to Hugging Face
fp8: ## Pipeline: BASE_DIR/NAME to FP8
awq: ## Pipeline: BASE_DIR/NAME to 4 bits
gguf: ## Pipeline: BASE_DIR/NAME to llama.cpp's file, GGUF_TYPE=Q4_K_M
verify: ## Pipeline: check every output that is there
all: ## Pipeline: all of these but hf, the source read once

$(STEPS): $(INSTALLED)
	$(if $(and $(MODEL),$(BASE_DIR)),,$(error make $@ needs MODEL= and BASE_DIR=: make $@ MODEL=zai-org/GLM-4.5 BASE_DIR=/data))
	$(if $(ALONE),$(BIN)/glmconv,$(TORCHRUN)) run $(PIPELINE)
