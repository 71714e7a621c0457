# make              set up .venv (nothing is assumed but Python 3.11 to 3.13 and, for system libraries, apt)
# make quickstart   the whole line on a CPU: demonstrations, training, closed-loop evaluation, a Hub-ready folder
# make test         ruff and all tests
# make lint         ruff, formatting included
# make format       let ruff repair what it can
# make clean        remove build outputs and caches; keeps .venv and runs/
#
# On a machine without an NVIDIA GPU, TORCH_INDEX=<URL of PyTorch's CPU wheel index> avoids the CUDA build of torch.

PYTHON ?= python3
OUTPUT ?= runs/quickstart
BIN := .venv/bin
STAMP := .venv/.installed
export MUJOCO_GL ?= egl
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# $(call apt,packages): install Debian packages if we may, else stop and say the one command
SUDO := $(if $(filter 0,$(shell id -u)),,sudo -n)
apt = { $(SUDO) apt-get update -qq && $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $(1); } || \
	{ echo "Missing system packages. Please run:  sudo apt-get install -y $(1)"; exit 1; }

.PHONY: venv graphics quickstart test lint format clean

venv: $(STAMP)

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { echo \
		"$(PYTHON) is missing or not Python 3.11 to 3.13 (MuJoCo 3.3.0 has no later wheels). Try: make PYTHON=python3.12"; \
		exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || $(call apt,$(notdir $(PYTHON))-venv)
	$(PYTHON) -m venv .venv

# torch first and alone: the second install finds it there and cannot choose another build
$(STAMP): pyproject.toml constraints.txt | $(BIN)/pip
	@if [ -z "$(TORCH_INDEX)" ] && ! command -v nvidia-smi >/dev/null; then \
		echo "No NVIDIA GPU here: if pip starts to download CUDA packages, stop it and use make TORCH_INDEX=<CPU wheel index>"; fi
	$(BIN)/pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt torch
	$(BIN)/pip install -c constraints.txt -e ".[sim,serve,space,urdf,text-actions,dev]"
	@touch $@

# MuJoCo renders through EGL, and PyOpenGL wants libOpenGL or libGL beside it
graphics: $(STAMP)
	@$(BIN)/python -c 'from ctypes.util import find_library as find; import sys; \
		sys.exit(not (find("EGL") and (find("OpenGL") or find("GL"))))' || \
		$(call apt,libegl1 libgl1-mesa-dri libopengl0)

quickstart: $(STAMP) graphics
	$(BIN)/wallvla quickstart --output $(OUTPUT)

# One thread per worker: more workers than cores x threads only slows torch down
test: $(STAMP) graphics
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 8 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
