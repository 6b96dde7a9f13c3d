"""Tests against the real ComfyUI. They run in its own environment (``make test-comfyui``) and nowhere else."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.comfyui import install
from tests.helpers.garbage import pytest_collection_finish as pytest_collection_finish
from tests.helpers.garbage import pytest_collectstart as pytest_collectstart

if TYPE_CHECKING:
    from pdmd_core.phases import PhasePlan

VERSION = os.environ.get("PHASED_DMD_COMFYUI_VERSION", install.NEWEST)
IN_COMFYUI = Path(sys.prefix).resolve() == install.cache() / "venv"
collect_ignore_glob = [] if IN_COMFYUI else ["test_*.py"]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI's base directory, with this repository as its only node pack."""
    from tests.helpers.comfyui.server import make_base

    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def pack(base: Path):
    """The node pack, loaded by ComfyUI's own loader in this process."""
    from tests.helpers.comfyui.in_process import load_pack

    loaded = load_pack(install.tree(VERSION), base)
    gc.freeze()  # ComfyUI is imported there, see tests/helpers/garbage.py
    return loaded


@pytest.fixture(scope="session")
def models(pack, tmp_path_factory: pytest.TempPathFactory):
    """Tiny models in ComfyUI's hands."""
    from tests.helpers.comfyui.tiny_models import TinyModels

    return TinyModels(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def composite(pack):
    return pack.module("comfy_nodes.composite")


@pytest.fixture
def build(pack, composite, models):
    """``build(family, plan, kind)`` gives the composite and its experts' MODELs."""

    def build(family: str, plan: PhasePlan, kind: str = "full", cfgs: list[float | None] | None = None) -> Any:
        plan = pack.module("pdmd_core.phases").PhasePlan.from_json(plan.to_json())
        if kind == "full":
            experts = [models.load(family, seed) for seed in range(len(plan))]
        else:
            import comfy.sd

            from tests.helpers.comfyui.tiny_models import lora

            base = models.load(family)
            files = [lora(family, seed + 1) for seed in range(len(plan))]
            experts = [comfy.sd.load_lora_for_models(base, None, file, 1.0, 0.0)[0] for file in files]
        cfgs = cfgs or [None] * len(plan)
        entries = [composite.Expert(model, cfg) for model, cfg in zip(experts, cfgs, strict=True)]
        return composite.compose(plan, entries), experts

    return build


@pytest.fixture
def fails(pack):
    """``fails(message, node, **inputs)``: the node ends with this line."""

    def fails(message: str, node: str, **inputs: Any) -> None:
        kinds = [
            pack.module("comfy_nodes.errors").NodeError,
            pack.module("pdmd_core.phases").PhasePlanError,
            pack.module("pdmd_core.experts").ExpertsError,
        ]
        with pytest.raises(tuple(kinds)) as caught:
            pack.call(node, **inputs)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    return fails


@pytest.fixture(scope="module")
def our_nodes(pack) -> dict[str, Any]:
    import nodes

    found = {name: kind for name, kind in nodes.NODE_CLASS_MAPPINGS.items() if name.startswith("PhasedDMD")}
    assert len(found) >= 9
    return found


EXPERTS = "embedded/models/experts"
"""The repository's experts by the name that nodes list; random ones stand in until it ships some."""


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory):
    """The real server with this pack, the embedded teacher and its experts."""
    from pdmd_core.phases import PhasePlan
    from tests.helpers.comfyui.server import REPOSITORY, make_base, make_named_files, running
    from tests.helpers.comfyui.tiny_models import teacher_experts

    folder = make_base(tmp_path_factory.mktemp("server"))
    make_named_files(folder)
    if not (REPOSITORY / "training" / EXPERTS / "phased_experts.json").is_file():
        teacher_experts(folder / "models/phased_experts" / EXPERTS, PhasePlan.from_steps([2, 2], shift=5.0))
    with running(install.tree(VERSION), folder) as server:
        yield server
