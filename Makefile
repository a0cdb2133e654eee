# make run      the pipeline, from an empty folder to metrics/report.html; what DVC's default remote, where there is one,
#               holds of it is not run again
# make install  the environment alone, .venv
# make test     the tests
# make test-tpu the tests of training on TPUs, of which torch-xla makes two of the CPU, in an environment of their own
# make install-tpu that environment alone, .venv-tpu, for a machine with TPUs
# make lint     the linter
# make lock     requirements.in into requirements.txt, each package at its newest
# Another Python than python3: make run PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
TPU := .venv-tpu

.PHONY: run install install-tpu test test-tpu lint lock
.DELETE_ON_ERROR:

run: $(INSTALLED)
	@$(BIN)/python -m tools.doctor
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/dvc repro $$(test -z "$$($(BIN)/dvc config core.remote 2>/dev/null)" || echo --pull)

install: $(INSTALLED)

test: $(INSTALLED)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -n logical --dist worksteal

test-tpu: $(TPU)/.installed
	@PATH="$(CURDIR)/$(TPU)/bin:$$PATH" $(TPU)/bin/python -m pytest tests/tpu

install-tpu: $(TPU)/.installed

lint: $(INSTALLED)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

# touched last, so that an install that was interrupted is taken up again
$(INSTALLED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || \
		{ echo "error: $(PYTHON) is not Python 3.10 to 3.13; name one that is: make PYTHON=python3.12" >&2; exit 2; }
	@echo "installing into .venv, about two minutes, once" >&2
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

# torch is older than the other's, and brings its CUDA packages where pip finds no build without
$(TPU)/.installed: requirements.txt requirements-tpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || \
		{ echo "error: $(PYTHON) is not Python 3.10 to 3.13; name one that is: make PYTHON=python3.12" >&2; exit 2; }
	@echo "installing into $(TPU), several minutes, once" >&2
	@test -x $(TPU)/bin/pip || $(PYTHON) -m venv $(TPU)
	@sed '/^torch==/d' requirements.txt > $(TPU)/requirements.txt
	@$(TPU)/bin/pip install --quiet --disable-pip-version-check -r $(TPU)/requirements.txt -r requirements-tpu.txt
	@touch $@

# NVIDIA's packages are left out: the build of torch that pip picks pins its own, and on a CPU there are none
lock: $(INSTALLED)
	@$(BIN)/pip install --quiet --disable-pip-version-check uv==0.13.9
	@$(BIN)/uv pip compile requirements.in --universal --python-version 3.10 --no-header --annotation-style line \
		--quiet > .venv/lock.txt
	@{ echo "# Made by make lock: uv pip compile requirements.in --universal --python-version 3.10, without the" \
		"CUDA packages, because the build of torch that pip picks pins its own."; \
		grep -vE '^(nvidia-[^m]|cuda-|triton)' .venv/lock.txt; } > .venv/requirements.txt
	@mv .venv/requirements.txt requirements.txt
