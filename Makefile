# Each target is sufficient on its own: it makes .venv, installs what it needs, and works.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip
QUIET := >/dev/null 2>&1
# Threads that wait for each other soon make room for other programs (docs/troubleshooting.md).
export GOMP_SPINCOUNT ?= 1000

.PHONY: demo test clean
.NOTPARALLEL:  # the targets share .venv

demo:
	$(call install,requirements.txt)
	$(BIN)/python demo.py

test:
	$(call install,requirements-dev.txt)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

clean:
	rm -rf .venv demo_data

# A .venv without pip (uv makes them so) gets one, a broken .venv is made anew; that nothing is missing,
# pip sees in two seconds.
define install
	@$(PIP) --version $(QUIET) || { $(BIN)/python -m ensurepip $(QUIET) && $(PIP) --version $(QUIET); } || { \
		$(PYTHON) -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer with its venv module is needed: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }; \
		$(PYTHON) -m venv --clear .venv; }
	$(PIP) install --quiet --requirement $(1)
endef
