PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
FASHION := /usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz

.PHONY: run report test lint data release clean

run: $(INSTALLED) data
	$(BIN)/deme run configs/fashion-quick.yaml

# Of another run: make report CONFIG=fashion-quick. What is finished is not done twice.
CONFIG ?= fashion
report: $(INSTALLED) data
	$(BIN)/deme run $(CONFIG) --out runs/$(CONFIG)
	$(BIN)/deme analyze runs/$(CONFIG)
	$(BIN)/deme report runs/$(CONFIG)

# In the order of names: reordered, the one test that compiles would come last, and leave the other workers idle.
test: $(INSTALLED) data
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

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

# All of a release but its publication.
release: $(INSTALLED)
	@test -n "$(VERSION)" || { echo "expected make release VERSION=1.2.3" && false; }
	@git diff --quiet HEAD || { echo "expected a tree without changes: commit them first" && false; }
	$(BIN)/pip install --quiet build twine
	sed -i 's/^__version__ = .*/__version__ = "$(VERSION)"/' src/decouple_merge/__init__.py
	sed -i "s/^## \[Unreleased\]$$/&\n\n## [$(VERSION)] - $$(date +%F)/" CHANGELOG.md
	$(MAKE) lint test
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	git commit --all --message "Version $(VERSION)"
	git tag --annotate v$(VERSION) --message "Version $(VERSION)"

clean:
	rm -rf $(VENV) runs
