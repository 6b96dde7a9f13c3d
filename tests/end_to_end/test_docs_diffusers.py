"""Every Python snippet of docs/diffusers.md, in its order, in a copy of the folder that it speaks of."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

from pdmd_core.experts.__main__ import main
from pdmd_core.phases import PhasePlan
from tests.helpers.families.cases import CASES
from tests.helpers.tiny_pipelines import lora_experts

ROOT = Path(__file__).resolve().parents[2]
MODELS = Path("training/embedded/models")
TEXT = (ROOT / "docs/diffusers.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", TEXT, re.S | re.M)
COMMANDS = re.findall(r"^phased-dmd (.*)$", TEXT, re.M)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the embedded models, where examples may write."""
    monkeypatch.chdir(tmp_path)
    MODELS.mkdir(parents=True)
    for path in (ROOT / MODELS).iterdir():
        (MODELS / path.name).symlink_to(path, target_is_directory=True)
    if not (MODELS / "experts").exists():  # a tree without the embedded experts: random ones
        teacher = DiffusionPipeline.from_pretrained(MODELS / "teacher")
        lora_experts(MODELS / "experts", teacher, PhasePlan.from_steps([2, 2], shift=5.0), base=str(MODELS / "teacher"))
    qwen = CASES["qwen_image"].build()
    qwen.save_pretrained("qwen-image")
    lora_experts(Path("qwen-image-experts"), qwen, PhasePlan.from_steps([2, 2], shift=3.0), base="qwen-image")
    return tmp_path


def test_the_snippets_run_as_written(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    compiled, compile_network = [], nn.Module.compile

    def with_a_quick_backend(network: nn.Module, **options: object) -> None:
        compiled.append(network)
        compile_network(network, backend="eager", **options)

    monkeypatch.setattr(nn.Module, "compile", with_a_quick_backend)
    names: dict[str, object] = {}
    assert len(SNIPPETS) > 12 and len(COMMANDS) == 1
    for command in COMMANDS:
        main(shlex.split(command))
    for number, snippet in enumerate(SNIPPETS):
        exec(compile(snippet, f"docs/diffusers.md, snippet {number}", "exec"), names)  # noqa: S102
        if "picture" in names:
            assert isinstance(names["picture"], Image.Image)
    assert compiled and (clone / "offloaded").is_dir() and (clone / "panda-pipeline" / "phased_experts.json").is_file()
    assert len(names["edited"]) == 9 and names["again"].phased.plan == names["edit"].phased.plan


def test_the_costs_are_those_that_the_benchmarks_wrote() -> None:
    speed, switch = (
        {row["what" if "what" in row else "experts"]: row for row in json.loads(path.read_text())["rows"]}
        for path in (ROOT / "docs/benchmarks/few_step_speed.json", ROOT / "docs/benchmarks/expert_switch.json")
    )
    for name, title, switched in (
        ("full", "full experts, 4 steps", "full, the expert changes"),
        ("LoRA, rank 16", "LoRA experts of rank 16, 4 steps", None),
        ("LoRA, rank 64", "LoRA experts of rank 64, 4 steps", "LoRA rank 64, the expert changes"),
    ):
        share = f"{switch[switched]['percent_of_forward']['median']:.2f} %" if switched else ""
        row = f"| {name} | {speed[title]['times_faster']['median']:.1f} | {share}".rstrip()
        assert row in TEXT, row
