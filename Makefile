# Each target is sufficient on its own: it makes .venv, installs what it needs, and works.
PYTHON ?= python3
BIN := .venv/bin
# Threads that wait for each other soon make room for other programs (README, "When something goes wrong").
export GOMP_SPINCOUNT ?= 1000

.PHONY: demo test clean

demo: .venv/demo.stamp
	$(BIN)/python demo.py

test: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

.venv/demo.stamp: requirements.txt
	$(call install,requirements.txt)
	touch $@

.venv/test.stamp: requirements.txt requirements-optional.txt requirements-dev.txt
	$(call install,requirements-dev.txt)
	touch .venv/demo.stamp $@

clean:
	rm -rf .venv demo_data

define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement $(1)
endef
