"""Reports on tiny teachers of other families: clips of two networks, clips from images, pictures of Qwen-Image."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.families.parts import picture
from tests.helpers.families.qwen_image import qwen_image
from tests.helpers.families.wan import wan_image_clip, wan_image_two_networks, wan_two_networks
from tests.helpers.tiny_experts import save_experts
from training import evaluate


@dataclass(frozen=True)
class Kind:
    build: Callable[[], Any]
    size: tuple[int, int, int]
    """Width, height, frames."""
    tokens: int = 12
    images: bool = False
    two: bool = False
    seeds: int = 2


KINDS = {
    "wan 2.2 a14b": Kind(wan_two_networks, (32, 16, 5), two=True),
    "wan 2.2 a14b image": Kind(wan_image_two_networks, (16, 16, 5), images=True, two=True),
    "qwen image": Kind(qwen_image, (48, 32, 1), 330, seeds=3),
}
MOVING = {"flow", "dynamic_degree", "smoothness", "clip_frechet"}


def write_prompts(folder: Path, images: bool) -> Path:
    if not images:
        path = folder / "prompts.txt"
        path.write_text("a panda\na fox on red ice\n", encoding="utf-8")
        return path
    lines = []
    for i, prompt in enumerate(("a panda", "a fox on red ice")):
        picture(i, (64, 48)).save(folder / f"{i}.png")
        lines.append(json.dumps({"prompt": prompt, "image": f"{i}.png"}))
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def clips(folder: Path) -> Path:
    """Two GIFs of six frames."""
    folder.mkdir()
    for i in range(2):
        frames = [picture(7 * i + t, (48, 40)) for t in range(6)]
        frames[0].save(folder / f"{i}.gif", save_all=True, append_images=frames[1:])
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_a_report_of_any_family(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind, teacher, output = KINDS[name], tmp_path / "teacher", tmp_path / "report"
    kind.build().save_pretrained(teacher)
    components = ("transformer", "transformer_2") if kind.two else ("transformer",) * 2
    experts = save_experts(tmp_path / "experts", teacher, kind.size, components, max_sequence_length=kind.tokens)
    prompts = write_prompts(tmp_path, kind.images)
    arguments = ["--experts", str(experts), "--output_dir", str(output), "--prompts", str(prompts), "--device", "cpu"]
    arguments += ["--seeds", str(kind.seeds), "--teacher_steps", "2", "--few_steps"]
    if kind.size[2] > 1:
        arguments += ["--data", str(clips(tmp_path / "data")), "--vbench", str(tmp_path / "vbench")]
    assert evaluate.main(arguments) == 0

    data = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert data["features"] == "FD-EffLite0"
    assert [row["network_evaluations"] for row in data["rows"]] == [4, 2]
    keys = {metric["key"] for metric in data["metrics"]}
    assert keys >= {"frechet", "diversity", "kernel"} and "agreement" not in keys
    assert ("recall" in keys) == ("coverage" not in data["not_measured"]) == (kind.seeds == 3)
    moving = kind.size[2] > 1
    assert (keys & MOVING == MOVING and "data_frechet" in keys) if moving else not keys & MOVING
    for row in data["rows"]:
        assert row["frechet"] > 0 and 0 < row["diversity"] < 2
    with Image.open(output / "report" / "prompt-001.png") as sheet:
        assert sheet.width > (2 * 5 if moving else 2) * 2 * kind.size[0]
    animation = output / "report" / "prompt-001.gif"
    assert animation.exists() == (output / "report.gif").exists() == moving
    if moving:
        with Image.open(animation) as image:
            assert image.n_frames == 5
            first = np.asarray(image.convert("RGB")).astype(int)
            image.seek(4)
            assert np.abs(np.asarray(image.convert("RGB")).astype(int) - first).max() > 20, "it moves"
        methods = [path for path in (tmp_path / "vbench").iterdir() if path.is_dir()]
        assert {path.name for path in methods} == {"teacher_2_steps_with_guidance", "phase_experts_2_steps"}
        names = {f"{prompt}-{i}.mp4" for prompt in ("a panda", "a fox on red ice") for i in range(2)}
        assert all({path.name for path in folder.iterdir()} == names for folder in methods)

    (tmp_path / "prompts.txt").write_text("a panda\n", encoding="utf-8")
    if kind.images:
        capsys.readouterr()
        assert evaluate.main([*arguments, "--prompts", str(tmp_path / "prompts.txt")]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evaluate.py: ")]
        assert len(lines) == 1 and "takes an image with each prompt, 1 of 1 have none" in lines[0]


def test_two_images_with_one_prompt_are_two_examples(tmp_path: Path) -> None:
    teacher, output = tmp_path / "teacher", tmp_path / "report"
    wan_image_clip().save_pretrained(teacher)
    experts = save_experts(tmp_path / "experts", teacher, (16, 16, 1))
    for i in range(2):
        picture(i, (64, 48)).save(tmp_path / f"{i}.png")
    lines = [json.dumps({"prompt": "it moves", "image": f"{i}.png"}) for i in (0, 1, 0)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines), encoding="utf-8")
    arguments = ["--experts", str(experts), "--output_dir", str(output), "--prompts", str(tmp_path / "p.jsonl")]
    arguments += ["--seeds", "2", "--metrics", "diversity", "--no_noise_floor", "--few_steps"]
    assert evaluate.main([*arguments, "--dtype", "bfloat16", "--device", "cpu"]) == 0
    assert json.loads((output / "report.json").read_text(encoding="utf-8"))["prompts"] == 2
    assert len(list((output / "report").glob("*.png"))) == 2
