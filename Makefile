# `make demo` and `make test` need Python 3.11 or later and, the first time, a network; they set up .venv by themselves.
# pip decides where packages come from: for torch's small CPU build, or without a network, configure it as usual
# (PIP_EXTRA_INDEX_URL; PIP_NO_INDEX=1 with PIP_FIND_LINKS=<folder of wheels>).
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint lock clean

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v $$p && break; done)
JOBS ?= 2
VENV := .venv
READY := $(VENV)/.ready
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
PYTEST := $(VENV)/bin/python -m pytest -q -n $(JOBS) --dist loadfile

help:
	@echo "make demo      set up .venv and make clips from the weights in the box"
	@echo "make test      set up .venv and run the tests, except slow ones"
	@echo "make test-all  the same with the slow ones"
	@echo "make lint      check style"
	@echo "make lock      resolve requirements.lock anew"
	@echo "make clean     remove .venv and what builds and tests left behind; keep outputs/"

$(READY): requirements-torch.txt requirements.lock pyproject.toml
	@[ -n "$(PYTHON)" ] || { echo "reelm needs Python 3.11 or later; install it or run: make PYTHON=/path/to/python3 ..."; exit 1; }
	@echo "[1/4] $(VENV), with $$($(PYTHON) --version)"
	@[ -x $(VENV)/bin/python ] || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "Python's venv module is missing (Debian: apt install python3-venv)"; exit 1; }
	@$(call install,2,torch (the largest part; minutes on a slow line),-r requirements-torch.txt)
	@$(call install,3,the locked packages (some minutes),--require-hashes --no-deps -r requirements.lock)
	@$(call install,4,reelm itself,--no-deps --no-build-isolation -e .)
	@touch $@

# $(call install,step,what,pip's arguments)
install = echo "[$(1)/4] $(2)"; $(PIP) install -q $(3) || { \
	echo "Installing $(2) failed; pip's reason is above. Once the network or pip's settings are right, the same command goes on from here."; exit 1; }

demo: $(READY)
	$(VENV)/bin/python scripts/generate.py prompt="a red star moves left while a blue circle bounces" samples=4 output=outputs/demo.mp4

test: $(READY)
	$(PYTEST) -m "not slow"

test-all: $(READY)
	$(PYTEST)

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install -q uv==0.13.8
	.venv-lock/bin/uv pip compile -q --upgrade pyproject.toml --extra dev --extra flow -c requirements-torch.txt -o requirements.lock
	rm -rf .venv-lock

clean:
	rm -rf $(VENV) .venv-lock build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
