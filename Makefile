# make demo, make test: from a bare checkout, each sets up .venv, builds what has changed, and runs.
# Needs Python >= 3.10 with its headers, a C++20 compiler with OpenMP, and make.

PYTHON ?= python3
TORCH ?= torch==2.13.0  # the version that the tests are run with; any from 2.11 on will do

BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CSRC := $(shell find csrc -type f)
NATIVE := $(CSRC) $(shell find tests/native tests/consumer benchmarks/native cmake -type f)

.PHONY: demo test bench lint docs clean

demo: .venv/installed
	$(BIN)/gpt-ext demo

test: .venv/installed build/native/built
	$(BIN)/ctest --test-dir build/native --output-on-failure --parallel $(shell nproc)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadscope

bench: .venv/installed build/native/built
	$(BIN)/python benchmarks/bench_ops.py
	for program in build/native/benchmarks/native/bench_*; do $$program || exit 1; done

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy

# The site, in build/docs/index.html; the notebook is executed for it.
docs: .venv/docs
	$(BIN)/sphinx-build -W --keep-going -n -E -q -c docs . build/docs

clean:
	rm -rf build dist *.egg-info gpt_ext/_C*.so .venv/installed

# torch and the tools that build against it, once.
.venv/torch:
	@$(PYTHON) -c 'import ensurepip' || \
	  { echo "$(PYTHON) cannot make environments (on Debian: apt-get install python3-venv)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(INSTALL) '$(strip $(TORCH))' 'setuptools>=77' 'pybind11>=2.12' ninja 'cmake>=3.24'
	touch $@

# The package in place, with its extension. Only what has changed is compiled again.
.venv/installed: .venv/torch pyproject.toml setup.py $(CSRC)
	$(INSTALL) --no-build-isolation --editable '.[plot,tensorboard,test]'
	touch $@

.venv/dev: .venv/installed
	$(INSTALL) --no-build-isolation --editable '.[dev]'
	touch $@

.venv/docs: .venv/installed
	$(INSTALL) --no-build-isolation --editable '.[docs]'
	touch $@

# The kernels, their native tests and the C++ harness, without torch.
build/native/built: .venv/torch CMakeLists.txt $(NATIVE)
	$(BIN)/cmake -S . -B build/native -G Ninja -DGPT_EXT_CUDA=OFF \
	  -DCMAKE_MAKE_PROGRAM='$(CURDIR)/$(BIN)/ninja'
	$(BIN)/cmake --build build/native
	touch $@
