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
.PHONY: help setup demo test interop lint format docs soak bench clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

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
