# SPDX-License-Identifier: Apache-2.0
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.NOTPARALLEL:
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CXX_FILES = $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

.PHONY: help pretrain test fuzz kill sanitize build lint format hook cpp package wheel bench bench-check gpu-check clean

help:
	@echo "make pretrain   set up, build, and pre-train on the default data (ARGS='--epochs 5' adds options)"
	@echo "make test       set up for development, build, and run the test suite"
	@echo "make fuzz       new problems for the losses, on every backend (SECONDS=600)"
	@echo "make kill       kill a small training 50 times, fill its disk, and see that nothing is lost; some minutes"
	@echo "make sanitize   the C++ test of the CPU kernels under AddressSanitizer, UBSan and ThreadSanitizer"
	@echo "make build      the set-up alone: $(VENV) and the extension in place"
	@echo "make lint       ruff, clang-format and mypy        make format   let them mend what they can"
	@echo "make hook       have git run make lint before each commit"
	@echo "make cpp        the kernels as a C++ library, their C++ test and microbenchmark (CMake)"
	@echo "make package    sdist and wheel, installed into an empty folder and imported"
	@echo "make wheel      one wheel for every Python and every torch from 2.10 on, in dist/"
	@echo "make gpu-check  on a GPU, with the system's own packages: build, tests, benchmarks, profile, training; 10 minutes"
	@echo "make bench      the data behind the figures, about 20 minutes, then README.md and docs/performance.md from it"
	@echo "make bench-check  are we still as far ahead of others as the committed data say? informs only"

# Pre-training needs less than tests and linters: the dependency groups pretrain and dev, each installed once and again
# when pyproject.toml has changed.
$(VENV)/installed-%: pyproject.toml | $(BIN)/pip
	@mkdir -p build
	@echo "installing the packages of the group $* into $(VENV) (torch with its CUDA libraries is 3 GB)"
	@$(BIN)/python -m pip install --upgrade 'pip>=25.1' > build/install.txt 2>&1 \
		&& $(BIN)/python -m pip install --no-compile --group $* 2>&1 | tee -a build/install.txt \
		| sed -unE "s/^Collecting ([^ ]+)$$/  \1/p; s/^Installing collected.*/  unpacking/p" \
		|| { cat build/install.txt; exit 1; }
	@touch $@

$(BIN)/pip:  # a venv that failed half way has a python, but no pip
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "mio_ext needs Python 3.11 or later; try: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "no venv module; on Debian: apt-get install python3-venv python3-dev g++ make"; exit 1; }

# setup.py knows what has changed; of what it says, a line for each compiled file is shown.
build: $(VENV)/installed-pretrain
	@mkdir -p build
	@$(BIN)/python -u setup.py build_ext 2>&1 | tee build/log.txt \
		| sed -unE "s/^mio_ext: //p; s/^building '(.*)' extension/building \1 (the first time a minute, some with CUDA kernels)/p; s/^(\[[0-9/]+\]).* -c [^ ]*(csrc\/[^ ]+) .*/  \1 \2/p" \
		|| { cat build/log.txt; exit 1; }

# What this machine can run: CUDA kernels where a GPU is visible.
pretrain: export FORCE_CUDA ?= gpu
pretrain: build
	$(BIN)/python train/pretrain.py $(ARGS)

# Threads that wait do not take the processor from the other half of the tests.
test: export OMP_WAIT_POLICY ?= passive
test: $(VENV)/installed-dev build
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# New problems on every backend until the time is up or one fails.
SECONDS ?= 600
fuzz: $(VENV)/installed-dev build
	@end=$$(( $$(date +%s) + $(SECONDS) )); while [ $$(date +%s) -lt $$end ]; do \
		MIO_FUZZ=1 $(BIN)/python -m pytest -q -x tests/package/test_fuzz_op.py tests/package/test_fuzz_losses.py || exit 1; done

kill: build
	$(BIN)/python tests/train/kill.py $(ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy

# Before each commit, in this clone.
hook:
	printf '#!/bin/sh\nexec make lint\n' > "$$(git rev-parse --git-path hooks)/pre-commit"
	chmod +x "$$(git rev-parse --git-path hooks)/pre-commit"

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# The CUDA kernels for one architecture, with warnings as errors; setup.py has compiled them for all.
cpp: $(VENV)/installed-dev
	$(BIN)/cmake -S . -B build/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_CUDA_ARCHITECTURES=90a-real > build/cmake.log || { cat build/cmake.log; exit 1; }
	$(BIN)/cmake --build build/cmake
	$(BIN)/ctest --test-dir build/cmake --output-on-failure --parallel 2

# Of the kernels and their test alone, optimised less.
sanitize: sanitize-address sanitize-thread
sanitize-address: KIND = address,undefined
sanitize-thread: KIND = thread
sanitize-%: $(VENV)/installed-dev
	@MAKEFLAGS= $(BIN)/cmake -S . -B build/$@ -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DMIO_CUDA=OFF \
		-DMIO_SANITIZE=$(KIND) -DCMAKE_CXX_FLAGS_RELEASE=-O1 > build/$@.log || { cat build/$@.log; exit 1; }
	@MAKEFLAGS= $(BIN)/cmake --build build/$@ --target pairwise_bce_test
	build/$@/pairwise_bce_test

# The CUDA kernels are in the sdist; `build` has compiled them where that can be done.
package: build
	rm -rf build/package && mkdir -p build/package
	$(BIN)/python setup.py --quiet sdist --dist-dir build/package > build/package.log 2>&1 || { cat build/package.log; exit 1; }
	FORCE_CUDA=0 $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --target build/package/installed build/package/*.tar.gz
	tar -tf build/package/*.tar.gz > build/package/files && grep -q csrc/cuda/instantiate/hopper.cu build/package/files
	cd build/package && PYTHONPATH=installed $(abspath $(BIN))/python -m mio_ext
	cd build/package && PYTHONPATH=installed installed/bin/mio-pretrain --dry-run
	cd build/package && PYTHONPATH=installed $(abspath $(BIN))/python -c 'import mio_ext; assert "cpu" in mio_ext.available_backends()'

# One for every Python and every torch from 2.10 on: dist/mio_ext-*-py3-none-manylinux_2_28_x86_64.whl
wheel: build
	rm -rf build/wheel dist/mio_ext-*-py3-none-manylinux_2_28_x86_64.whl
	MIO_WHEEL=1 $(BIN)/python setup.py --quiet bdist_wheel > build/wheel.log 2>&1 || { cat build/wheel.log; exit 1; }
	$(BIN)/python packaging/manylinux.py dist/mio_ext-*-py3-none-manylinux_2_28_x86_64.whl

# The peers of the extra [bench] are installed on the way; mio_ext itself stays the one in place.
bench: build
	$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['bench'], sep='\n')" > build/bench.txt
	$(BIN)/python -m pip install --quiet -r build/bench.txt
	$(BIN)/python benchmarks/loss.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/accuracy.py
	$(BIN)/python benchmarks/report.py

bench-check: build
	$(BIN)/python benchmarks/check_ratios.py

# Nothing is installed, so with the system's Python: make gpu-check PYTHON=python3 ARGS='--part card tests-cuda'
gpu-check:
	@$(PYTHON) benchmarks/gpu_check.py $(ARGS)

clean:
	rm -rf build mio_ext/*.so
