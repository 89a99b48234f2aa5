PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
CONSTRAINTS ?= constraints.txt

export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: install format test test-sweeps test-oldest test-faults test-launchers matrix fuzz test-gpu lint docs dist zoo zoo-experts zoo-context demo bench bench-peers bench-zoo bench-gpu clean

install: $(READY)

$(READY): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint $(CONSTRAINTS) --editable '.[dev,megatron-fsdp]'
	touch $@

# Two at a time: ranks wait for each other, and many tests have none. A part: make test TESTS=tests/planning
test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu and not fault and not launcher and not sweep" $(TESTS)

# More cases of what make test covers, ten minutes of them.
test-sweeps: install
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "sweep and not gpu"

test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

test-faults: install
	$(BIN)/python -m pytest -n 2 --dist worksteal -m fault

# Two hours on two cores; writes its tables into docs/checkpoints.md.
matrix: install
	$(BIN)/python tests/faults/matrix.py --write

# 20,000 damaged files; a quarter of an hour.
fuzz: install
	$(BIN)/python tests/faults/fuzz.py

# Those whose launcher is not installed are skipped, with the name of what is missing.
test-launchers: install
	$(BIN)/python -m pytest -m launcher

test-gpu: install
	$(BIN)/python -m pytest -m gpu

# What make lint can mend.
format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The pages, in build/site. A warning (a broken link, a name that is not there) fails.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# The source archive and the wheel made from it. tests/packaging installs both.
dist: install
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

zoo: install
	$(BIN)/python -m shardwright.verify.zoo --output docs/architectures.md

zoo-experts: install
	$(BIN)/python -m shardwright.verify.zoo --experts --output docs/experts_zoo.md

zoo-context: install
	$(BIN)/python -m shardwright.verify.zoo --context --output docs/context_zoo.md

demo: install
	$(BIN)/python -m shardwright.cli demo

# Peers come from the package index, into environments of their own below build/benchmarks.
bench-peers: install
	$(BIN)/python benchmarks/environments.py

bench: bench-peers
	$(BIN)/python benchmarks/run.py

bench-zoo: bench-peers
	$(BIN)/python benchmarks/zoo_comparison.py

bench-gpu: install
	$(BIN)/python benchmarks/gpu.py

clean:
	rm -rf $(VENV) runs build dist
