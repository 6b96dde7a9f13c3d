"""Workflows and words are those of the nodes, and complete."""

from __future__ import annotations

import json
from typing import Any

import pytest
from PIL import Image

from tests.helpers.comfyui.blueprints import BLUEPRINTS
from tests.helpers.comfyui.example_workflows import WORKFLOWS
from tests.helpers.comfyui.server import REPOSITORY, Server
from tests.helpers.comfyui.write_assets import blueprint_text, english_text, workflow_text

FOLDER = REPOSITORY / "workflows"
LOADERS = ("UNETLoader", "CLIPLoader", "VAELoader", "LoraLoaderModelOnly", "CheckpointLoaderSimple")
LOADERS += ("LTXVAudioVAELoader", "LTXAVTextEncoderLoader", "LatentUpscaleModelLoader")


@pytest.fixture(scope="module")
def info(server: Server) -> dict[str, Any]:
    return server.get("/object_info")


def without_choices(workflow: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on the files that this machine has."""
    for node in workflow["nodes"]:
        if node["type"] == "LoadImage":
            node["widgets_values"] = []
    return workflow


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_committed_workflow_is_the_one_that_its_source_makes(info, name: str) -> None:
    committed = json.loads((FOLDER / f"{name}.json").read_text())
    assert without_choices(committed) == without_choices(json.loads(workflow_text(info, name)))


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_the_committed_blueprint_is_the_one_that_its_source_makes_and_is_served(info, server, name: str) -> None:
    committed = json.loads((REPOSITORY / f"subgraphs/{name}.json").read_text())
    assert committed == json.loads(blueprint_text(info, name))
    served = {each["name"] for each in server.get("/global_subgraphs").values()}
    assert name in served and {path.stem for path in (REPOSITORY / "subgraphs").iterdir()} == set(BLUEPRINTS)


def test_no_other_files_are_templates() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(WORKFLOWS)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_has_a_note_a_thumbnail_and_its_downloads(info, name: str) -> None:
    workflow = json.loads((FOLDER / f"{name}.json").read_text())
    kinds = [node["type"] for node in workflow["nodes"]]
    assert "MarkdownNote" in kinds and any(kind.startswith("PhasedDMD") for kind in kinds)
    for node in workflow["nodes"]:
        kind = node["type"]
        assert (
            kind == "MarkdownNote"
            or info[kind]["python_module"].endswith(("phased-dmd", "nodes"))
            or (info[kind]["python_module"].startswith("comfy_extras"))
        ), kind
        for model in node["properties"].get("models", []):
            assert model["url"].startswith("https://huggingface.co/") and model["url"].endswith(model["name"])
            assert model["name"] in node["widgets_values"]
        if kind in LOADERS:
            assert node["properties"]["models"], (name, kind)
    with Image.open(FOLDER / f"{name}.jpg") as picture:
        assert picture.size == (480, 300)
    assert (FOLDER / f"{name}.jpg").stat().st_size < 60_000


def test_the_english_words_are_those_of_the_nodes(info) -> None:
    committed = json.loads((REPOSITORY / "locales/en/nodeDefs.json").read_text())
    assert committed == json.loads(english_text(info))
