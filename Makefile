# make train: a trained model from a fresh machine. make test: all tests. make bench: docs/benchmarks.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install train test lint types check bench clean

install: $(VENV)/installed

# PIP_ARGS: further options for pip, such as a local mirror.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(PIP_ARGS) --editable ".[dev]"
	touch $@

train: install
	$(BIN)/accelerate launch --config_file accelerate_config.yaml train/classify.py --config train/recipes/digits.yaml
	@echo
	@echo "Next:  . $(BIN)/activate"
	@echo "  python train/classify.py --config train/recipes/digits.yaml --seed 1        another run beside it"
	@echo "  python train/classify.py --dataset FOLDER_OF_IMAGES --image_size 64         your own images"
	@echo "  python train/classify.py --config train/recipes/mnist.yaml                  99.2 % on MNIST in 360 steps"
	@echo "  Stop any of them with Ctrl-C, or kill -9: the same command goes on where it was."

# Three on two cores: the tests of clusters mostly wait.
test: install
	$(BIN)/python -m pytest -n 3 --dist worksteal

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

check: test lint types

# Some hours, on a machine that does nothing else. MNIST: a folder with its Parquet files; without it, what needs
# them is left out. ONLY: titles of sections to make anew, such as ONLY='"Start-up" "Resuming"'.
bench: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(PIP_ARGS) --editable ".[dev,bench]"
	PYTHONPATH=. $(BIN)/python bench/report.py $(if $(MNIST),--mnist $(MNIST)) $(if $(ONLY),--only $(ONLY))

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
