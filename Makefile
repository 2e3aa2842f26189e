# Main targets: quickstart, test. Everything runs in .venv inside this folder.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
# On a machine without an NVIDIA GPU, torch's CPU build (a tenth of the size) comes from torch's own index.
TORCH_INDEX ?= $(shell command -v nvidia-smi >/dev/null 2>&1 || echo "--extra-index-url https://download.pytorch.org/whl/cpu")

.PHONY: quickstart quickstart-smoke export-smoke test test-quick check paper install install-use engines browser clean

QUESTIONS := "What is the capital of France?" "What colour is the sky on a clear day?" "Write a poem of two lines about the sea."

# llama.cpp is built from source, once for each machine: minutes.
quickstart: install-use
	@if [ -f runs/quickstart/stages/write_report.json ]; then echo "runs/quickstart is there; checking that it is complete."; fi
	$(BIN)/puzzle engine install llama.cpp
	$(BIN)/puzzle run recipes/quickstart.yaml
	$(BIN)/puzzle export runs/quickstart --to gguf
	$(BIN)/puzzle generate runs/quickstart $(QUESTIONS) --with-parent --max-new-tokens 48
	@echo; echo "Serve it: $(BIN)/puzzle serve $$(ls -td runs/quickstart/exports/gguf-* | head -1) --engine llama.cpp"

quickstart-smoke: install-use
	$(BIN)/puzzle engine install llama.cpp
	$(BIN)/puzzle run recipes/quickstart-smoke.yaml
	$(BIN)/puzzle show runs/quickstart-smoke --json > /dev/null
	$(BIN)/puzzle generate runs/quickstart-smoke "What is the capital of France?" --max-new-tokens 16 --with-parent

# The real child and parent, verified by the engines that serve them.
export-smoke: quickstart-smoke engines
	$(BIN)/puzzle export runs/quickstart-smoke --to gguf
	$(BIN)/puzzle export runs/quickstart-smoke/parent --to vllm --out runs/quickstart-smoke/exports

# A process for each core, each with one thread. Files in their order: by their number of tests, the slowest come last.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
# What tells in minutes whether the tree is sound: no engine, no browser, no whole run.
QUICK := $(addprefix tests/,data commands exporters families formats modeling planning search \
	choosing/test_cost_fit.py choosing/test_costs.py parents/test_problems.py \
	subblocks/test_experts.py training/test_losses.py training/test_optimiser.py report/test_terminal.py \
	test_architecture.py test_cli.py test_contracts.py test_estimates.py test_hub.py test_machine.py test_recipe.py \
	test_removed_settings.py)

test: test-quick engines browser
	$(PYTEST) $(addprefix --ignore=,$(QUICK))

test-quick: install
	$(PYTEST) $(QUICK)

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
paper: install
	$(BIN)/python -m benchmarks paper --budget $(BUDGET)

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
