# Main targets: quickstart, test. Everything runs in .venv inside this folder.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
# On a machine without an NVIDIA GPU, torch's CPU build (a tenth of the size) comes from torch's own index.
TORCH_INDEX ?= $(shell command -v nvidia-smi >/dev/null 2>&1 || echo "--extra-index-url https://download.pytorch.org/whl/cpu")

.PHONY: quickstart quickstart-smoke export-smoke test check paper install install-use engines browser clean

quickstart: install-use
	@if [ -f runs/quickstart/stages/write_report.json ]; then echo "runs/quickstart is there; checking that it is complete."; fi
	$(BIN)/puzzle run recipes/quickstart.yaml

quickstart-smoke: install-use
	$(BIN)/puzzle run recipes/quickstart-smoke.yaml
	$(BIN)/puzzle show runs/quickstart-smoke --json > /dev/null
	$(BIN)/puzzle generate runs/quickstart-smoke "What is the capital of France?" --max-new-tokens 16

# The real child, verified by the engines that serve it.
export-smoke: quickstart-smoke engines
	$(BIN)/puzzle export runs/quickstart-smoke --to gguf --quantize q8_0
	$(BIN)/puzzle export runs/quickstart-smoke --to vllm

# A process for each core, each with one thread.
test: install engines browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

# What exports are verified with, once for each machine: llama.cpp is built from source, vLLM is 3.4 GB.
engines: install-use
	$(BIN)/puzzle engine install llama.cpp
	$(BIN)/puzzle engine install vllm

# In which the tests look at report.html: the machine's own Chromium, else playwright's, else apt's.
browser: install
	@for name in chromium chromium-browser google-chrome; do command -v $$name && exit 0; done; \
	$(BIN)/python -m playwright install $$(test $$(id -u) != 0 || echo --with-deps) chromium \
	|| { apt-get update -qq && apt-get install -y -qq chromium; }

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# The paper's tables beside ours: docs/paper.md. Goes on where it stopped. BUDGET=gpu spends more.
BUDGET ?= cpu
TABLES := $(basename $(notdir $(wildcard benchmarks/paper/table_*.py benchmarks/paper/figure_*.py)))
paper: install
	@for table in $(TABLES); do $(BIN)/python -m benchmarks.paper.$$table --budget $(BUDGET) || exit; done
	@$(BIN)/python -m benchmarks.paper.summary

# For use and development.
install: $(VENV)/.installed-dev
# For use only.
install-use: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "puzzle-nas needs Python 3.11 or newer; say which with: make quickstart PYTHON=python3.12"; exit 2; }
	@echo "Installing into $(VENV), torch first (about a minute, 1.6 GB)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --retries 1 $(TORCH_INDEX) "$(TORCH)"
	@$(BIN)/python -m pip install -qq -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(BIN)/python -m pip install -qq -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) runs
