# `make help` lists the targets. Everything is set up in $(VENV); nothing outside this
# folder is changed. Options: PYTHON=..., VENV=..., FLASHJAX_CUDA=AUTO|ON|OFF,
# JAX="jax==0.10.2" or JAX="jax[cuda13]", PYTEST_ARGS=...
.DEFAULT_GOAL := help
SHELL := /bin/sh
.DELETE_ON_ERROR:

VENV ?= .venv
BUILD ?= build/$(patsubst .%,%,$(notdir $(VENV)))
JAX ?= jax
FLASHJAX_CUDA ?= AUTO
export FLASHJAX_CUDA
FLASHJAX_SANITIZE ?=
export FLASHJAX_SANITIZE
PYTEST_ARGS ?=
RUN ?=
# Much of the time is compiling for XLA, which uses one core.
WORKERS = -n auto --maxprocesses=4 --dist worksteal
PYTEST = $(PY) -m pytest $(WORKERS)

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
# The editable install knows each module's file: a module that turns into a package
# needs a new one.
NATIVE_SOURCES := CMakeLists.txt pyproject.toml \
  flashjax/__init__.py $(wildcard flashjax/*/__init__.py) \
  $(wildcard cmake/*.cmake cpu/* cuda/* cuda/common/* bindings/*)

.PHONY: help demo test gpu-test multi-gpu nightly sanitize lint docs format install requirements clean FORCE

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.installed ## set up, build, and generate text from the pruned demo model
	@$(PY) examples/demo.py

test: $(VENV)/.installed ## set up, build, and run the tests
	@$(PYTEST) $(PYTEST_ARGS)

gpu-test: $(VENV)/.installed ## the tests that need a GPU (set JAX="jax[cuda13]")
	@$(PY) -m pytest -m gpu $(PYTEST_ARGS)

# The tables and the plot of docs/multi-gpu.md; takes four H200s and some 15 minutes.
multi-gpu: $(VENV)/.installed ## OPT-175B on 1, 2 and 4 GPUs, measured and written into docs/multi-gpu.md
	@$(PY) benchmarks/opt_parallel.py --model opt-175b --devices 1,2,4 --length 320 --steps 16 \
	  --batch 8,16,32,64,128 --profile --name opt-175b-all
	@$(PY) benchmarks/update_readme.py
	@$(PY) benchmarks/scaling_model.py

nightly: $(VENV)/.installed ## the tests that take minutes or gigabytes, and a night of fuzzing
	@$(PY) -m pytest -m nightly $(PYTEST_ARGS)
	@$(PYTEST) tests/fuzz tests/checkpoint/test_hostile_files.py --hypothesis-profile=nightly \
	  $(PYTEST_ARGS)

# The tests of native code, in an environment of their own. Python is not built with the
# sanitizers, so their library comes first, and the C++ library that it wraps second.
SANITIZED = tests/cpu tests/test_native.py tests/fuzz tests/emulation \
  tests/checkpoint/test_hostile_files.py
SANITIZE = FLASHJAX_SANITIZE=address,undefined
RUN_SANITIZED = env $(SANITIZE) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  LD_PRELOAD="$(foreach lib,libasan libstdc++,$(shell $(CXX) -print-file-name=$(lib).so))"
sanitize: ## the tests of native code under AddressSanitizer and UBSan
	@$(MAKE) --no-print-directory install VENV=.venv-sanitize FLASHJAX_CUDA=OFF $(SANITIZE) \
	  RUN='$(RUN_SANITIZED)'
	@$(RUN_SANITIZED) .venv-sanitize/bin/python -m pytest $(WORKERS) \
	  $(SANITIZED) $(PYTEST_ARGS)

install: $(VENV)/.installed ## set up and build only

requirements: $(VENV)/.requirements ## set up without building

lint: $(VENV)/.dev ## ruff, clang-format and mypy
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@git ls-files '*.cc' '*.h' '*.cu' '*.cuh' | xargs $(VENV)/bin/clang-format --dry-run --Werror
	@$(PY) -m mypy
	@$(PY) -m mypy tests/users_program.py

docs: $(VENV)/.docs ## the documentation as a site, in build/site
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict
	@echo "open build/site/index.html"

format: $(VENV)/.dev ## rewrite the sources in the project's style
	@$(PY) -m ruff check --fix-only --quiet .
	@$(PY) -m ruff format .
	@git ls-files '*.cc' '*.h' '*.cu' '*.cuh' | xargs $(VENV)/bin/clang-format -i

clean: ## remove the environments, builds and caches made here
	rm -rf .venv .venv-* build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment: made again when its interpreter is gone or the folder was moved.
$(VENV)/.made: FORCE
	@version='import sys; print(sys.version_info[:2])'; \
	if ! { [ "$$(cat $@ 2>/dev/null)" = "$(CURDIR)" ] && has=$$($(PY) -c "$$version" 2>/dev/null) && \
	    { [ -z "$$PYTHON" ] || [ "$$($$PYTHON -c "$$version")" = "$$has" ]; }; }; then \
	  python=$${PYTHON:-$$(.ci/find-python)} || exit 1; \
	  "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "FlashJAX needs Python 3.11 or newer; $$python is not" >&2; exit 1; }; \
	  echo "Making $(VENV) with $$python"; \
	  rm -rf $(VENV) && "$$python" -m venv $(VENV) || exit 1; \
	  $(PIP) uv || \
	    echo "uv could not be installed; pip does its work, more slowly"; \
	  echo "$(CURDIR)" > $@; \
	fi

# What the environment depends on besides files; rewritten only when it changes.
$(VENV)/.settings: $(VENV)/.made FORCE
	@settings="CUDA=$(FLASHJAX_CUDA) nvcc=$$(command -v nvcc) $$CUDACXX $$CUDA_HOME $$CUDAARCHS"; \
	settings="$$settings $(JAX) $(FLASHJAX_SANITIZE)"; \
	[ "$$(cat $@ 2>/dev/null)" = "$$settings" ] || echo "$$settings" > $@

$(VENV)/.requirements: $(VENV)/.made $(VENV)/.settings pyproject.toml .ci/requirements.py
	@echo "Installing requirements into $(VENV)"
	@$(PY) .ci/requirements.py test > $(VENV)/requirements.txt
	@$(call install,-r $(VENV)/requirements.txt "$(JAX)")
	@touch $@

$(VENV)/.installed: $(VENV)/.requirements $(NATIVE_SOURCES)
	@echo "Building FlashJAX in $(BUILD) (takes minutes where there is nvcc)"
	@$(PIP) --no-build-isolation --no-deps --config-settings=build-dir=$(BUILD) -e .
	@cd $(VENV) && $(RUN) bin/python -c "import flashjax._native as n; i = n.build_info(); print( \
	  'Built for the CPU and CUDA', i['cuda_version'] + ':', i['cuda_architectures']) \
	  if n.cuda else print('Built for the CPU alone:', i['cuda_missing'])"
	@touch $@

$(VENV)/.dev: $(VENV)/.requirements
	@$(PY) .ci/requirements.py dev > $(VENV)/requirements-dev.txt
	@$(call install,-r $(VENV)/requirements-dev.txt)
	@touch $@

$(VENV)/.docs: $(VENV)/.dev
	@$(PY) .ci/requirements.py docs > $(VENV)/requirements-docs.txt
	@$(call install,-r $(VENV)/requirements-docs.txt)
	@touch $@

# uv where it works; a machine where it does not (own certificates, say) still has pip.
define install
if $(PY) -m uv --version >/dev/null 2>&1; then \
  $(PY) -m uv pip install --quiet --python $(PY) $(1) || { \
    echo "uv failed; trying pip" >&2; \
    $(PIP) $(1); }; \
else \
  $(PIP) $(1); \
fi
endef
