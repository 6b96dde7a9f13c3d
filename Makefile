# `make help` lists what there is to make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= runs/demo
export OMP_WAIT_POLICY = PASSIVE
# Tests start many processes, each of which would compile ComfyUI and rewrite the tests' asserts again
unexport PYTHONDONTWRITEBYTECODE

# Tests of one file stay in one process, files that take minutes go first (tests/conftest.py)
WORKERS ?= auto
IN_PROCESSES := --numprocesses $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder
PYTEST := $(BIN)/python -m pytest $(IN_PROCESSES)

.PHONY: help demo check format test-fast test docs audit hooks test-long test-versions test-comfyui test-comfyui-load test-matrix \
	gpu-wheels environment clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# On one core it trains, on the other the teacher's samples of the report are made, for the shipped experts first
DEMO_EVALUATION := training/evaluate.py --seeds 6 --cache_dir $(DEMO)/evaluation
demo: $(VENV)/.training ## distil the embedded teacher and write a report, runs/demo/report.md
	mkdir -p $(DEMO)
	export OMP_NUM_THREADS=1; $(BIN)/python $(DEMO_EVALUATION) --experts training/embedded/models/experts --pipeline WanPipeline \
		--output_dir $(DEMO)/shipped > $(DEMO)/shipped.log 2>&1 & teacher=$$!; \
	OMP_NUM_THREADS=1 $(BIN)/python training/distill.py --config training/configs/embedded_demo.yaml --output_dir $(DEMO) --resume \
		|| { kill $$teacher; exit 1; }; wait
	$(BIN)/python $(DEMO_EVALUATION) --experts $(DEMO)/experts --output_dir $(DEMO)

check: environment ## lint, format, docstrings and types: under a minute
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pydoclint --quiet pdmd_core
	$(BIN)/mypy
	mkdir -p build/pack && ln -sfn $(CURDIR) build/pack/phased_dmd_pack  # under the name of a package, as ComfyUI loads the nodes
	MYPYPATH=build/pack $(BIN)/mypy --package phased_dmd_pack.comfy_nodes

format: environment ## mend what the linter can mend, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Rules of the house, the method, roles, scheduler, file formats, metrics, configuration, data, and runs of the trainer on a tiny
# teacher, from prompts to experts
FAST := house comfy_nodes benchmarks/claims/common \
	$(addprefix pdmd_core/,test_*.py roles scheduler metrics experts/format) \
	$(addprefix training/,config data embedded evaluation/test_cache.py evaluation/test_comparison.py monitoring/test_alerts.py \
	monitoring/test_sample_statistics.py monitoring/test_speed.py loop/test_checkpoints.py loop/test_optimizers.py loop/test_rng.py \
	loop/test_trainer.py)
test-fast: environment ## what to run after each edit: under two minutes on two cores
	$(PYTEST) $(wildcard $(addprefix tests/,$(FAST)))

# ComfyUI is downloaded meanwhile; what goes wrong there is said by the second call, which tries again
test: ## all that a change must pass, on all cores, with the real ComfyUI and Chromium: what CI runs
	$(PYTHON) tests/comfyui/install.py --browser > /dev/null 2>&1 &
	$(MAKE) check
	$(PYTEST)
	$(MAKE) test-comfyui

hooks: environment ## run `make check` before each commit
	$(BIN)/pre-commit install

docs: $(VENV)/.docs ## the documentation site in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

audit: environment ## known vulnerabilities in the pinned packages; without network only a warning
	$(BIN)/python .ci/audit.py

test-long: environment ## the full size of tests that the suite runs in small: minutes to hours
	$(BIN)/python -m pytest -m long

# Scheduler, roles, pipelines and the Hub, each row of .ci/versions.py in an environment of its own in .versions; where no
# package index has torch for the CPU, it is made to load without CUDA, by a C compiler and binutils
test-versions: ## on the lowest and the newest versions of Python, torch and diffusers: an hour
	$(PYTHON) .ci/versions.py

# In an environment of its own, with the real ComfyUI and Chromium; clones share it by setting PHASED_DMD_COMFYUI
export PHASED_DMD_COMFYUI ?= $(CURDIR)/.comfyui
test-comfyui: ## the nodes, in the real ComfyUI and in a browser
	$(PYTHON) tests/comfyui/install.py --browser
	$(PHASED_DMD_COMFYUI)/venv/bin/python -m pytest -c tests/comfyui/pytest.ini --rootdir . $(IN_PROCESSES) tests/comfyui

# 500 prompts of all kinds, with interrupts and memory that runs out: the full size of what test-comfyui does in small
test-comfyui-load: ## the nodes under load: hours
	$(PYTHON) tests/comfyui/install.py
	$(PHASED_DMD_COMFYUI)/venv/bin/python -m pytest -c tests/comfyui/pytest.ini --rootdir . -s -m long \
		--override-ini timeout=14400 tests/comfyui

# The nodes on older ComfyUI; 0.3.75 cannot load the tiny teacher, so no server is started there
MATRIX := 0.27.0 0.18.2 0.16.3 0.3.75
IN_PROCESS := $(wildcard tests/comfyui/test_composite*.py tests/comfyui/test_nodes*.py) $(addprefix tests/comfyui/,test_borders.py test_bypass.py)
test-matrix: ## the nodes on older ComfyUI
	$(PYTHON) tests/comfyui/install.py $(addprefix --version ,$(MATRIX))
	for version in $(MATRIX); do \
		tests="$(IN_PROCESS)"; \
		[ $$version = 0.3.75 ] || tests="$$tests tests/comfyui/test_server.py tests/comfyui/test_diffusers_folder.py"; \
		PHASED_DMD_COMFYUI_VERSION=$$version $(PHASED_DMD_COMFYUI)/venv/bin/python -m pytest \
			-c tests/comfyui/pytest.ini --rootdir . $$tests || exit 1; \
	done

# What benchmarks/gpu_check.py may miss on a machine with a GPU, Python 3.12 and torch but no network: 34 MiB
GPU_WHEELS := diffusers transformers tokenizers peft accelerate huggingface_hub safetensors pydantic pydantic_core \
	annotated-types typing-inspection pyyaml psutil tqdm filelock regex ftfy wcwidth importlib_metadata zipp httpx anyio httpcore \
	h11 idna certifi packaging torchao
gpu-wheels: environment ## wheels for benchmarks/gpu_check.py on a machine without a network, in build/gpu-wheels
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --abi cp312 \
		--abi abi3 --abi none --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 --dest build/gpu-wheels \
		-c constraints.txt $(GPU_WHEELS)

environment: $(VENV)/.installed ## install all that developing needs into .venv

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

clean: ## remove the environment and all that was built or run
	rm -rf $(VENV) runs build dist *.egg-info
