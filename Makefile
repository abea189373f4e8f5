# Each target sets itself up: the first one that runs makes .venv and installs the pinned development set into it.
PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/.ready
# One thread a worker: two pytest workers share two cores.
TESTENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: demo test test-slow lint check bench gpu-check clean

demo: $(READY)
	$(PY) examples/demo.py --output_dir outputs/demo

test: $(READY)
	$(TESTENV) $(PY) -m pytest -n 2

test-slow: $(READY)
	$(PY) -m pytest -m slow

lint: $(READY)
	$(PY) -m ruff check src tests examples benchmarks
	$(PY) -m ruff format --check src tests examples benchmarks
	$(PY) -m mypy

check: lint test

bench: $(READY)
	bash scripts/setup.sh bench
	$(PY) benchmarks/sft.py
	$(PY) benchmarks/dpo.py
	$(PY) benchmarks/rm.py
	$(PY) benchmarks/ppo.py

gpu-check: $(READY)
	$(PY) benchmarks/gpu_check.py

$(READY): pyproject.toml constraints.txt scripts/setup.sh
	PYTHON=$(PYTHON) bash scripts/setup.sh dev

clean:
	rm -rf .venv outputs build dist .pytest_cache .mypy_cache .ruff_cache
