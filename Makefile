# make demo | test | test-lowest | sanitize | lint | format | stub | wheel | clean
# Everything lives in .venv and build/. A second run reuses what is there.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
# The oldest transformers the project supports; the newest is the one in .venv.
LOWEST := 5.19.0

VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
STAMPS := $(VENV)/.stamps
NATIVE := CMakeLists.txt $(shell find src/magicpig -name '*.cpp' -o -name '*.h')

.PHONY: setup demo test test-lowest sanitize lint format stub wheel clean
.DEFAULT_GOAL := setup

setup: $(STAMPS)/install

demo: setup
	$(BIN)/magicpig demo $(ARGS)

test: lint
	$(BIN)/python -m pytest --cov --cov-report=term $(ARGS)

# The integration once more, on the lowest transformers in front of the one in .venv.
test-lowest: setup $(STAMPS)/lowest-$(LOWEST)
	PYTHONPATH=$(VENV)/lowest $(BIN)/python -c \
	  "import transformers as t; assert t.__version__ == '$(LOWEST)', t.__version__; print('transformers', t.__version__)"
	PYTHONPATH=$(VENV)/lowest $(BIN)/python -m pytest tests/integrations $(ARGS)

# What the kernels do with memory, watched: their tests on a build that stops at the first wrong address. Takes minutes.
# Python itself is not built for it, so the runtime is loaded before; leaks are Python's affair.
CHECKED  := build/sanitize
RUNTIME  := $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libstdc++.so)
WATCHED  := tests/kernels tests/test_decode.py tests/test_int8.py tests/test_sketch.py tests/test_store.py
sanitize: setup
	CXX='$(CXX)' $(BIN)/cmake -S . -B $(CHECKED) -G Ninja -DPython_EXECUTABLE='$(abspath $(BIN)/python)' \
	  -DMAGICPIG_SANITIZE=ON -DMAGICPIG_EMULATE_BF16=ON
	$(BIN)/cmake --build $(CHECKED)
	LD_PRELOAD='$(RUNTIME)' ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(BIN)/python .ci/with_native.py $(CHECKED)/_native.abi3.so --no-cov --capture=sys $(WATCHED) $(ARGS)

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(filter-out CMakeLists.txt,$(NATIVE))
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# Python's view of the compiled module, for mypy.
stub: setup
	$(BIN)/python -m nanobind.stubgen -q -m magicpig.kernels._native -O src/magicpig/kernels
	$(BIN)/ruff format -q src/magicpig/kernels/_native.pyi

format: setup
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(filter-out CMakeLists.txt,$(NATIVE))

wheel: setup
	$(PIP) wheel --no-deps --no-build-isolation -w dist .

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage
	rm -f $(STAMPS)/install

# Each stamp is touched after its step went through, so an interrupted step is done again and a finished one is not.
$(STAMPS)/venv:
	$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: $(STAMPS)/venv
	$(PIP) install '$(TORCH)'
	touch $@

$(STAMPS)/build-tools: $(STAMPS)/torch
	$(PIP) install 'scikit-build-core>=1.1' 'nanobind>=3.1,<4' 'cmake>=3.20' ninja
	touch $@

$(STAMPS)/install: $(STAMPS)/build-tools pyproject.toml $(NATIVE)
	$(PIP) install --no-build-isolation --check-build-dependencies --editable '.[dev]' \
	  -C build-dir=build/dev -C cmake.define.MAGICPIG_EMULATE_BF16=ON
	touch $@

$(STAMPS)/lowest-$(LOWEST): $(STAMPS)/install
	rm -rf $(VENV)/lowest
	$(PIP) install --no-deps --target $(VENV)/lowest transformers==$(LOWEST)
	touch $@
