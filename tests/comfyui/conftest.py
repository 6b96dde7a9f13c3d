"""Tests against the real ComfyUI. They run in its own environment (``make test-comfyui``) and nowhere else."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.comfyui import install

VERSION = os.environ.get("PHASED_DMD_COMFYUI_VERSION", install.NEWEST)
IN_COMFYUI = Path(sys.prefix).resolve() == install.cache() / "venv"
collect_ignore_glob = [] if IN_COMFYUI else ["test_*.py"]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI's base directory, with this repository as its only node pack."""
    from tests.comfyui.server import make_base

    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def pack(base: Path):
    """The node pack, loaded by ComfyUI's own loader in this process."""
    from tests.comfyui.in_process import load_pack

    return load_pack(install.tree(VERSION), base)


@pytest.fixture(scope="session")
def models(pack, tmp_path_factory: pytest.TempPathFactory):
    """Tiny models in ComfyUI's hands."""
    from tests.comfyui.tiny_models import TinyModels

    return TinyModels(tmp_path_factory.mktemp("models"))


EXPERTS = "embedded/models/experts"
"""The repository's experts by the name that nodes list; random ones stand in until it ships some."""


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory):
    """The real server with this pack, the embedded teacher and its experts."""
    from pdmd_core.phases import PhasePlan
    from tests.comfyui.server import REPOSITORY, make_base, make_named_files, running
    from tests.comfyui.tiny_models import teacher_experts

    folder = make_base(tmp_path_factory.mktemp("server"))
    make_named_files(folder)
    if not (REPOSITORY / "training" / EXPERTS / "phased_experts.json").is_file():
        teacher_experts(folder / "models/phased_experts" / EXPERTS, PhasePlan.from_steps([2, 2], shift=5.0))
    with running(install.tree(VERSION), folder) as server:
        yield server
