"""Reports: what they hold, that the reference is made once, and that features see what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml

from pdmd_core.experts import PhasedExperts
from pdmd_core.metrics import frechet_distance
from training import distill, evaluate
from training.embedded.features import LAYOUT, STYLE, load_features, see
from training.evaluation import Evaluation, wanted_classes


@pytest.fixture
def experts(settings_of_run: dict[str, Any], tmp_path: Path) -> Path:
    """Experts of one update at the size the feature network sees."""
    settings = {**settings_of_run, "updates": 1, "model": {**settings_of_run["model"], "height": 64, "width": 64}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert distill.main(["--config", str(path)]) == 0
    return tmp_path / "run" / "experts"


def test_a_report_has_a_row_and_a_picture_for_each_method(experts: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("a panda on a blue background\na fox on a red background\n", encoding="utf-8")
    output = tmp_path / "report"
    arguments = ["--experts", str(experts), "--output_dir", str(output), "--prompts", str(prompts)]
    assert evaluate.main([*arguments, "--seeds", "3", "--teacher_steps", "5"]) == 0
    data = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert (data["prompts"], data["seeds"]) == (2, 3)
    assert [row["network_evaluations"] for row in data["rows"]] == [10, 8, 4]
    for row in data["rows"]:
        assert set(row) == {"method", "network_evaluations", "frechet", "diversity", "agreement", "seconds"}
        assert row["frechet"] > 0 and row["diversity"] > 0 and row["seconds"] > 0
        assert row["method"] in (output / "report.md").read_text(encoding="utf-8")
    assert (output / "report.png").stat().st_size > 1000


def test_the_reference_is_sampled_once_for_one_teacher(experts: Path, tmp_path: Path) -> None:
    def evaluation(seeds: int) -> Evaluation:
        prompts = ["a panda on a blue background"]
        return Evaluation(PhasedExperts.open(experts), prompts, seeds, tmp_path / "cache", teacher_steps=2)

    first = evaluation(2).reference()
    again = evaluation(2)
    with mock.patch.object(Evaluation, "teacher", side_effect=AssertionError("sampled again")):
        assert torch.equal(again.reference(), first)
        with pytest.raises(AssertionError, match="sampled again"):
            evaluation(3).reference()


def test_the_teacher_against_itself_has_distance_zero(experts: Path, tmp_path: Path) -> None:
    prompts = ["a panda on a blue background", "a fox on a red background"]
    evaluation = Evaluation(PhasedExperts.open(experts), prompts, 3, tmp_path / "cache", teacher_steps=2)
    with mock.patch("training.evaluation.REFERENCE_SEED", 0):
        row, pixels = evaluation.measure_teacher(2)
    assert row.frechet == pytest.approx(0, abs=1e-3)
    assert pixels.shape == (6, 1, 3, 64, 64)


def test_style_is_blind_to_place_and_layout_is_not() -> None:
    network, _, _ = load_features()
    picture = torch.full((1, 1, 3, 64, 64), 0.5)
    left, right = picture.clone(), picture.clone()
    left[..., 16:32, 12:28] = torch.tensor([1.0, 0.2, 0.1]).view(3, 1, 1)
    right[..., 32:48, 32:48] = torch.tensor([1.0, 0.2, 0.1]).view(3, 1, 1)
    one, other, plain = see(network, left), see(network, right), see(network, picture)
    assert one.style.shape == (1, STYLE)
    assert one.layout.shape == (1, LAYOUT)

    def relative(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> float:
        return float((a - b).norm() / (a - c).norm())

    assert relative(one.style, other.style, plain.style) < 0.15
    assert relative(one.layout, other.layout, plain.layout) > 0.3


def test_style_distance_grows_with_blur() -> None:
    network, _, _ = load_features()
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(64, 1, 3, 16, 16, generator=generator).repeat_interleave(4, -1).repeat_interleave(4, -2)

    def blurred(size: int) -> torch.Tensor:
        flat = torch.nn.functional.avg_pool2d(pictures.flatten(0, 1), size, 1, size // 2, count_include_pad=False)
        return see(network, flat[:, :, :64, :64].unflatten(0, (64, 1))).style

    reference = blurred(1)
    distances = [frechet_distance(blurred(size), reference) for size in (1, 3, 5, 9)]
    assert distances == sorted(distances)
    assert distances[1] > 10 * max(distances[0], 1e-6)


def test_prompts_name_their_classes() -> None:
    emoji, backgrounds = ["red heart", "fox"], ["red", "blue"]
    wanted = wanted_classes(
        ["a fox on a red background", "a red heart on a blue background", "words"], emoji, backgrounds
    )
    assert wanted[0].tolist() == [1, 0, -1]
    assert wanted[1].tolist() == [0, 1, -1]
