# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Small networks run faster as two processes of one thread than as one of two.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-all extras docs slurm slurm-all recipes estimates results-small gpu lock setup lint types fmt check wheel clean

demo: setup
	$(BIN)/voxelith demo output=voxelith-demo

test: setup
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow and not gpu and not slurm and not extra"

test-all: setup
	$(BIN)/pytest -m "not gpu and not slurm and not extra"

# What is installed on demand, and its tests.
extras: setup
	$(BIN)/pip install --quiet --disable-pip-version-check \
		--config-settings editable_mode=compat --editable ".[lora,onnx,mlflow]"
	$(BIN)/pytest -n 2 -m extra tests/finetune/test_lora.py tests/finetune/test_step_zero.py \
		tests/pretrain/test_portable.py tests/pretrain/test_tracking.py

# The site of docs/ into build/site; a link that leads nowhere is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Jobs of a real SLURM on this machine: apt-get install slurm-wlm munge.
slurm: setup
	VOXELITH_NEEDS_SLURM=1 $(BIN)/pytest -p no:xdist -m "slurm and not slow" tests/slurm

# And two nodes, the doctor, a prep as an array.
slurm-all: setup
	VOXELITH_NEEDS_SLURM=1 $(BIN)/pytest -p no:xdist -m slurm tests/slurm

# The small recipes on the sample scans, their logs and pictures: about half an hour.
recipes: setup
	$(BIN)/python benchmarks/recipes.py

# Parameters, FLOP and memory of the full recipes, on fake tensors: minutes.
estimates: setup
	$(BIN)/python benchmarks/recipe_costs.py

# One row of the results from the sample scans and the encoder that comes along: 20 minutes.
results-small: setup
	$(BIN)/python -W ignore benchmarks/results_small.py

# What only a GPU can show: tests, then a step of every full recipe. See docs/gpu.md.
gpu: setup
	$(BIN)/python benchmarks/gpu.py

# requirements.lock: the versions of this environment, that tests ran with, and their hashes.
lock: setup
	$(BIN)/pip install --quiet --disable-pip-version-check "uv>=0.9,<1"
	$(BIN)/pip freeze --exclude-editable > $(VENV)/versions.txt
	$(BIN)/uv pip compile pyproject.toml --extra tensorboard --extra s3 --constraint $(VENV)/versions.txt \
		--universal --python-version 3.11 --generate-hashes --no-annotate --quiet \
		--custom-compile-command "make lock" --output-file requirements.lock

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is $$($(PYTHON) --version); voxelith needs Python 3.11 or newer: make PYTHON=python3.11 ..."; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null \
		|| { echo "error: this Python cannot make environments; on Debian: apt-get install python3-venv"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	# compat puts this folder on the path: any folder named `pretrain` would shadow a lazy finder.
	$(BIN)/pip install --quiet --disable-pip-version-check \
		--config-settings editable_mode=compat --editable ".[dev,tensorboard]"
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

fmt: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint types test

# The built wheel, used from a folder whose names could shadow ours.
wheel: setup
	bash tests/wheel.sh $(BIN)

clean:
	rm -rf $(VENV) build dist *.egg-info voxelith-demo
