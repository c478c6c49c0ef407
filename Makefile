# make demo    two trained checkpoints fused: writes outputs/demo.png
# make test    all tests
# make webui   the WebUI with this extension and the demo's checkpoints, where a host is installed
# make lint    ruff and mypy
# make clean   removes the virtual environment and all output
#
# Each target sets up what it needs in .venv. PYTHON picks the interpreter (3.10 to 3.13), TORCH the build of torch:
#   make demo PYTHON=python3.12 TORCH="torch==2.9.0"
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
# Where the CPU build of torch is on offer beside the package index; used only if it answers and there is no NVIDIA GPU.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test webui lint clean

demo: $(VENV)/.engine
	$(BIN)/python -m lib_fusion demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

webui: $(VENV)/.dev
	$(BIN)/python -m tests.webui_live.serve

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v < (3, 14) else \
	  f"PYTHON={sys.executable} is Python {v[0]}.{v[1]}; allowed: 3.10 to 3.13, for example make demo PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@index=""; \
	if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && \
	   $(BIN)/python -c 'import urllib.request as u; u.urlopen("$(TORCH_CPU_INDEX)/torch/", timeout=3)' 2>/dev/null; \
	then index="--extra-index-url $(TORCH_CPU_INDEX)"; fi; \
	echo "installing $(TORCH)"; $(PIP) $$index "$(TORCH)"
	@touch $@

$(VENV)/.engine: $(VENV)/.torch pyproject.toml
	@echo "installing the engine's libraries"
	@$(PIP) --editable ".[engine]"
	@touch $@

# The LDM U-Net class, which ours is held against, comes without the old packages that it names.
$(VENV)/.dev: $(VENV)/.engine
	@echo "installing the tests' libraries"
	@$(PIP) --editable ".[engine,dev]"
	@$(PIP) --no-deps stable-diffusion-sdkit==2.1.5
	@touch $@

clean:
	rm -rf $(VENV) outputs
