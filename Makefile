# Two commands for a newcomer: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= runs/demo
export OMP_WAIT_POLICY = PASSIVE

.PHONY: demo test test-comfyui environment clean

demo: environment
	$(BIN)/python training/distill.py --config training/configs/embedded_demo.yaml --output_dir $(DEMO) --resume
	$(BIN)/python training/evaluate.py --experts $(DEMO)/experts --output_dir $(DEMO)

test: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest
	$(MAKE) test-comfyui

# In an environment of its own, with the real ComfyUI and Chromium; clones share it by setting PHASED_DMD_COMFYUI
export PHASED_DMD_COMFYUI ?= $(CURDIR)/.comfyui
test-comfyui:
	$(PYTHON) tests/comfyui/install.py --browser
	$(PHASED_DMD_COMFYUI)/venv/bin/python -m pytest -c tests/comfyui/pytest.ini --rootdir . tests/comfyui

environment: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install --quiet torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --editable ".[dev]" -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) runs build dist *.egg-info
