# Two commands for a newcomer: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= runs/demo
export OMP_WAIT_POLICY = PASSIVE

.PHONY: demo test docs audit test-long test-oldest test-comfyui test-comfyui-load test-matrix environment clean

demo: $(VENV)/.training
	$(BIN)/python training/distill.py --config training/configs/embedded_demo.yaml --output_dir $(DEMO) --resume
	$(BIN)/python training/evaluate.py --experts $(DEMO)/experts --output_dir $(DEMO)

test: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pydoclint --quiet pdmd_core
	$(BIN)/mypy
	$(BIN)/python -m pytest
	$(MAKE) test-comfyui

# The documentation site in build/site; a warning is an error
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Known vulnerabilities in the pinned packages; without network only a warning
audit: environment
	$(BIN)/python .ci/audit.py

# The full size of tests that the suite runs in small: minutes to hours
test-long: environment
	$(BIN)/python -m pytest -m long

# Families, roles, pipelines and the Hub on the lowest versions that pyproject.toml allows, laid over the environment; without
# offloading, which diffusers 0.40 does in groups only where there is an accelerator
OLDEST := pipelines experts/hub experts/convert/test_released.py families roles scheduler
test-oldest: environment
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .oldest --requirement .ci/oldest.txt
	PYTHONPATH=.oldest $(BIN)/python -m pytest $(wildcard $(addprefix tests/pdmd_core/,$(OLDEST))) -k "not offload"

# In an environment of its own, with the real ComfyUI and Chromium; clones share it by setting PHASED_DMD_COMFYUI
export PHASED_DMD_COMFYUI ?= $(CURDIR)/.comfyui
test-comfyui:
	$(PYTHON) tests/comfyui/install.py --browser
	$(PHASED_DMD_COMFYUI)/venv/bin/python -m pytest -c tests/comfyui/pytest.ini --rootdir . tests/comfyui

# 500 prompts of all kinds, with interrupts and memory that runs out: the full size of what test-comfyui does in small
test-comfyui-load:
	$(PYTHON) tests/comfyui/install.py
	$(PHASED_DMD_COMFYUI)/venv/bin/python -m pytest -c tests/comfyui/pytest.ini --rootdir . -s -m long \
		--override-ini timeout=14400 tests/comfyui

# The nodes on older ComfyUI; 0.3.75 cannot load the tiny teacher, so no server is started there
MATRIX := 0.27.0 0.18.2 0.16.3 0.3.75
IN_PROCESS := $(wildcard tests/comfyui/test_composite*.py tests/comfyui/test_nodes*.py)
test-matrix:
	$(PYTHON) tests/comfyui/install.py $(addprefix --version ,$(MATRIX))
	for version in $(MATRIX); do \
		tests="$(IN_PROCESS)"; \
		[ $$version = 0.3.75 ] || tests="$$tests tests/comfyui/test_server.py tests/comfyui/test_diffusers_folder.py"; \
		PHASED_DMD_COMFYUI_VERSION=$$version $(PHASED_DMD_COMFYUI)/venv/bin/python -m pytest \
			-c tests/comfyui/pytest.ini --rootdir . $$tests || exit 1; \
	done

environment: $(VENV)/.installed

$(VENV)/.training: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install --quiet torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --editable ".[training]" -c constraints.txt
	touch $@

$(VENV)/.docs: pyproject.toml constraints.txt
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[docs]" -c constraints.txt
	touch $@

$(VENV)/.installed: $(VENV)/.training
	$(BIN)/python -m pip install --quiet --editable ".[dev]" -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) runs build dist *.egg-info
