"""The README's lines for a released LoRA pair, with tiny networks and files in those repositories of a hub here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

from pdmd_core.families import family
from pdmd_core.phases import PhasePlan
from pdmd_core.presets import PRESETS, list_presets
from tests.helpers.families.cases import CASES
from tests.helpers.hub import Hub
from tests.helpers.hub_client import client_environment
from tests.helpers.lora_layouts import added, save, wan_of_2026
from tests.helpers.tiny_pipelines import euler

ROOT = Path(__file__).parents[2]
NAME = "wan2.2-lightx2v-4step"


def snippet(page: str) -> str:
    """The one block that speaks of the preset."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    (code,) = [block for block in blocks if NAME in block]
    return code


def test_the_lines_of_the_readme_are_those_of_the_page_and_its_list_is_the_command_s() -> None:
    assert snippet("README.md") == snippet("docs/lora-files.md")
    assert f"```text\n{list_presets()}\n```" in (ROOT / "docs/lora-files.md").read_text(encoding="utf-8")


def test_the_lines_of_the_readme_sample_with_the_released_pair(tmp_path: Path) -> None:
    """In a small size, on the CPU; equal to networks with the files' changes."""
    case, preset, wan = CASES["wan_two"], PRESETS[NAME], family("wan")
    case.build().save_pretrained(tmp_path / "base")
    networks = []
    with Hub() as hub:
        base = {str(p.relative_to(tmp_path / "base")): p.read_bytes() for p in (tmp_path / "base").rglob("*.*")}
        hub.put(preset.base, base)
        files = {}
        for k, file in enumerate(preset.files):
            network = getattr(case.build(), ("transformer", "transformer_2")[k])
            tensors, deltas = wan_of_2026(network, wan, k + 1)
            owner, repository, path = file.split("/", 2)
            files[path] = save(tmp_path / f"{k}.safetensors", tensors).read_bytes()
            networks.append(added(network, deltas))
        hub.put(f"{owner}/{repository}", files)
        code = snippet("README.md").replace('"cuda"', '"cpu"').replace("torch.bfloat16", "torch.float32")
        code = code.replace("height=480, width=832, num_frames=81", f"latents=torch.load('noise.pt'), **{case.call!r}")
        code = code.replace('"a panda skis down a slope", ', "").replace(
            ").frames[0]", ", output_type='latent').frames"
        )
        torch.save(case.noise(), tmp_path / "noise.pt")
        code += "\ntorch.save(clip, 'clip.pt')\n"
        environment = client_environment(hub.url, tmp_path / "home", token=None, PYTHONPATH=str(ROOT))
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    expected = euler(case, PhasePlan.preset(NAME), networks)
    torch.testing.assert_close(torch.load(tmp_path / "clip.pt"), expected, rtol=1e-4, atol=1e-4)
