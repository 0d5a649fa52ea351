PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
FASHION := /usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz

.PHONY: run test lint data clean

run: $(INSTALLED) data
	$(BIN)/deme run configs/fashion-quick.yaml

test: $(INSTALLED) data
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Without a torch, the one that is known to work is installed first: a plain requirement would fetch gigabytes of CUDA.
$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

# Debian has Fashion-MNIST as a package; where it can't be installed, the first run downloads it.
data:
	@test -f $(FASHION) || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
		apt-get install --yes --quiet dataset-fashion-mnist; } || \
		{ test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update --quiet && \
		apt-get install --yes --quiet dataset-fashion-mnist; } || true

clean:
	rm -rf $(VENV) runs
