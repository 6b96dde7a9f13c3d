"""The command that compares methods: its report, its pictures, and what it says when it cannot."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image

from pdmd_core.experts import PhasedExperts, read_manifest
from pdmd_core.experts.convert.conversions import Conversion
from pdmd_core.experts.hub.card import write_card
from pdmd_core.hashing import sha256_of
from pdmd_core.metrics import ImageReward
from tests.helpers.families.parts import picture
from tests.helpers.image_reward import save_image_reward
from tests.helpers.tiny import randn
from tests.helpers.tiny_experts import save_experts
from training import evaluate
from training.evaluation.comparison import METRICS
from training.evaluation.sampler import Sampler

ROOT = Path(__file__).parents[2]
MARGIN = 2
"""Between pictures of a grid."""


@pytest.fixture(scope="module")
def experts(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_experts(tmp_path_factory.mktemp("evaluate") / "run" / "experts", teacher, (64, 64, 1))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by the tests of a module, as reports share one."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "p.txt"
    path.write_text("a panda on a blue background\na fox on a red background\n", encoding="utf-8")
    return path


@pytest.fixture
def arguments(experts: Path, cache: Path, prompts: Path, tmp_path: Path) -> Callable[..., list[str]]:
    def make(
        *more: str, experts: Sequence[str] = (str(experts),), cache: Path = cache, reference: bool = True
    ) -> list[str]:
        steps = ["--teacher_steps", "3"] if reference else []
        fixed = ["--output_dir", str(tmp_path / "report"), "--prompts", str(prompts), "--cache_dir", str(cache)]
        return ["--experts", *experts, *fixed, "--device", "cpu", *steps, "--seeds", "3", *more]

    return make


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def without_seconds(folder: Path) -> dict[str, Any]:
    data = report(folder)
    for row in data["rows"]:
        assert row.pop("seconds") > 0
    return data


def failure(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    capsys.readouterr()
    try:
        status: Any = evaluate.main(arguments)
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evaluate.py: ")]
    return line


def test_a_report_has_every_number_with_its_interval(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    assert evaluate.main(arguments()) == 0
    data, text = report(tmp_path / "report"), (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert (data["prompts"], data["seeds"], data["samples"], data["features"]) == (2, 3, 6, "FD-Emoji")
    assert [(row["method"], row["network_evaluations"]) for row in data["rows"]] == [
        ("teacher, 3 steps with guidance", 6),
        ("teacher, 2 steps with guidance", 4),
        ("phase experts, 2 steps", 2),
    ]
    keys = ["frechet", "frechet_corrected", "diversity", "agreement", "kernel", "recall", "coverage", "precision"]
    assert [metric["key"] for metric in data["metrics"]] == keys
    for metric in data["metrics"]:
        assert [value["method"] for value in metric["values"]] == [row["method"] for row in data["rows"]]
        for row, value in zip(data["rows"], metric["values"], strict=True):
            assert row[metric["key"]] == value["value"]
            assert value["count"] == (2 if metric["key"] == "diversity" else 6)
            if metric["key"] == "frechet":
                assert value["low"] is value["high"] is None
            else:
                assert value["low"] <= value["value"] <= value["high"]
        assert metric["label"] in text and metric["definition"] in text
    for row in data["rows"]:
        assert row["frechet"] > 0 and row["diversity"] > 0 and row["seconds"] >= 0
        assert row["method"] in text
    assert "A raw Frechet distance" in text and "FD-Emoji to the teacher, corrected" in text
    assert "noise floor" in text and "6 samples a method: 2 prompts, 3 seeds" in text


def test_the_pictures_are_methods_as_columns_with_the_same_seeds(
    arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    assert evaluate.main(arguments("--metrics", "diversity")) == 0
    folder = tmp_path / "report"
    with Image.open(folder / "report.png") as overview:
        assert overview.height == 24 + 2 * (2 * 64 + MARGIN) + 2
    assert sorted(path.name for path in (folder / "report").iterdir()) == ["prompt-000.png", "prompt-001.png"]
    with Image.open(folder / "report" / "prompt-001.png") as sheet:
        assert sheet.height == 46 + 2 * (3 * 64 + 2 * MARGIN) + 2
        assert sheet.width > 3 * 2 * 64
    assert "[a fox on a red background](report/prompt-001.png)" in (folder / "report.md").read_text(encoding="utf-8")
    (folder / "report" / "prompt-099.png").write_bytes(b"of another report")
    assert evaluate.main(arguments("--metrics", "diversity", "--shown_prompts", "1")) == 0
    assert [path.name for path in (folder / "report").iterdir()] == ["prompt-000.png"]


def test_a_stopped_run_goes_on_to_the_same_report_and_a_damaged_file_changes_nothing(
    arguments: Callable[..., list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own, quick = tmp_path / "cache", ["--metrics", "diversity", "agreement", "--no_noise_floor", "--batch_size", "2"]
    command = [str(ROOT / "training/evaluate.py"), *arguments(*quick, cache=own, reference=False)]
    killed = "import os, sys, runpy, training.evaluation.cache as s; add = s.TensorCache.add; count = [0]\n"
    killed += "def dies(self, *rest):\n    add(self, *rest); count[0] += 1; count[0] == 5 and os._exit(9)\n"
    killed += f"s.TensorCache.add = dies; sys.argv = {command!r}; runpy.run_path({command[0]!r}, run_name='__main__')"
    assert subprocess.run([sys.executable, "-c", killed], cwd=ROOT, capture_output=True).returncode == 9
    assert not (tmp_path / "report" / "report.json").exists()
    left = list(own.rglob("latents/*.safetensors"))
    assert len(left) == 5
    assert evaluate.main(command[1:]) == 0
    assert all(path.exists() for path in left), "what was there is used"
    resumed = without_seconds(tmp_path / "report")
    for kind in ("latents", "emoji-", "preview-"):
        path = min(path for path in own.rglob("*.safetensors") if path.parent.name.startswith(kind))
        path.write_bytes(path.read_bytes()[:-2])
    capfd.readouterr()
    assert evaluate.main(command[1:]) == 0
    assert capfd.readouterr().err.count("damaged") == 3
    assert without_seconds(tmp_path / "report") == resumed
    shutil.rmtree(own)
    assert evaluate.main(command[1:]) == 0
    assert without_seconds(tmp_path / "report") == resumed


def test_a_report_is_rendered_anew_from_the_cache_alone_and_reads_each_file_once(
    arguments: Callable[..., list[str]], experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, quick = tmp_path / "cache", ["--metrics", "diversity", "frechet"]
    says = failure(capsys, arguments(*quick, "--no_sampling", cache=own))
    assert "--no_sampling: 6 samples of 'phase experts, 2 steps' are not in" in says
    assert evaluate.main(arguments(*quick, cache=own)) == 0
    first = report(tmp_path / "report")
    shutil.rmtree(tmp_path / "report")
    files, read = list(own.rglob("*.safetensors")), []

    def counted(path: Path) -> str:
        read.append(path)
        return sha256_of(path)

    forbidden = mock.patch.object(Sampler, "__init__", side_effect=AssertionError("sampled"))
    with forbidden, mock.patch("training.evaluation.cache.sha256_of", counted):
        assert evaluate.main(arguments(*quick, "--no_sampling", cache=own)) == 0
    assert report(tmp_path / "report") == first, "the times of sampling too"
    kept = [path for path in files if not path.parent.name.startswith("prompts")]
    assert sorted(read) == sorted(kept), "each file is verified, once"


def test_several_experts_stand_side_by_side_under_their_names(
    arguments: Callable[..., list[str]], experts: Path, teacher: Path, tmp_path: Path
) -> None:
    other = save_experts(tmp_path / "sgts" / "experts", teacher, (64, 64, 1), seed=1)
    few = ["--metrics", "diversity", "--no_noise_floor", "--few_steps"]
    named = [f"mine={experts}", str(other), f"copy={experts}"]
    assert evaluate.main(arguments(*few, experts=named, reference=False)) == 0
    rows = report(tmp_path / "report")["rows"]
    assert [row["method"] for row in rows] == ["mine", "sgts, 2 steps", "copy"]
    assert rows[0]["diversity"] == rows[2]["diversity"] != rows[1]["diversity"]
    assert "noise floor" not in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")


def test_the_teacher_as_its_own_expert_is_at_the_noise_floor(
    arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Rows of the same samples are equal, and its other samples are as far as they are from the reference."""
    assert evaluate.main(arguments("--few_steps", "3", "1", "--metrics", "frechet", "kernel")) == 0
    rows = report(tmp_path / "report")["rows"]
    assert [row["method"] for row in rows][:2] == ["teacher, 3 steps with guidance", "teacher, 1 step with guidance"]
    assert rows[1]["frechet"] > rows[0]["frechet"] and rows[1]["kernel"] > rows[0]["kernel"]


def test_one_seed_and_one_prompt_leave_out_what_needs_more(
    arguments: Callable[..., list[str]], prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(arguments("--seeds", "1")) == 0
    data = report(tmp_path / "report")
    assert set(data["not_measured"]) == {"diversity", "coverage"}
    assert "diversity" not in data["rows"][0] and "frechet" in data["rows"][0]
    assert "Not measured: diversity needs at least 2 seeds" in (tmp_path / "report" / "report.md").read_text("utf-8")
    assert "--metrics diversity: needs at least 2 seeds" in failure(
        capsys, arguments("--seeds", "1", "--metrics", "diversity")
    )
    prompts.write_text("a fox on a red background\n", encoding="utf-8")
    assert evaluate.main(arguments("--seeds", "1")) == 0
    assert [metric["key"] for metric in report(tmp_path / "report")["metrics"]] == ["agreement"]
    assert evaluate.main(arguments("--seeds", "2", "--metrics", "diversity")) == 0
    (metric,) = report(tmp_path / "report")["metrics"]
    assert metric["values"][0]["low"] is None, "one prompt has no interval"


def test_real_pictures_are_a_reference_too(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    for i in range(4):
        picture(i, (80, 72)).save(tmp_path / f"{i}.png")
    assert evaluate.main(arguments("--data", str(tmp_path), "--metrics", "data_frechet")) == 0
    raw, corrected = report(tmp_path / "report")["metrics"]
    assert raw["label"] == "FD-Emoji to the data" and "4 real samples" in raw["definition"]
    assert all(value["value"] > 0 for value in raw["values"]) and corrected["key"] == "data_frechet_corrected"


def test_wrong_data_is_told_before_anything_is_sampled(
    arguments: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, sampled = tmp_path / "data", mock.patch.object(Sampler, "__init__", side_effect=AssertionError("sampled"))
    data.mkdir()
    for name in ("a.png", "b.png"):
        picture(0, (80, 72)).save(data / name)
    given = ["--data", str(data), "--metrics", "data_frechet"]
    with sampled:
        says = failure(capsys, arguments(*given, cache=tmp_path / "cache"))
        assert "at least 2 files that differ" in says and "found 1" in says
        (data / "c.png").write_bytes(b"no picture")
        assert "take it out of the folder" in failure(capsys, arguments(*given, cache=tmp_path / "cache"))


def test_rewards_are_of_the_prompt_of_each_sample(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    given = ["--image_reward", str(save_image_reward(tmp_path)), "--metrics", "image_reward"]
    for panda in (1.0, 2.0):  # the second time nothing is looked at again
        rewards = {"a panda on a blue background": panda, "a fox on a red background": 4.0}
        found = lambda _, pixels, prompts: torch.tensor([rewards[prompt] for prompt in prompts])  # noqa: E731, B023
        with mock.patch.object(ImageReward, "forward", found):
            assert evaluate.main(arguments(*given)) == 0
        assert [row["image_reward"] for row in report(tmp_path / "report")["rows"]] == [2.5] * 3


def test_a_quantized_base_is_a_row_of_its_own(
    arguments: Callable[..., list[str]], experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(arguments("--quantization", "int8", "float8", "--metrics", "frechet", "--no_noise_floor")) == 0
    name = "phase experts, 2 steps"
    found = {row["method"]: row["frechet"] for row in report(tmp_path / "report")["rows"]}
    assert [method for method in found if method.startswith(name)] == [
        name,
        f"{name}, int8 base",
        f"{name}, float8 base",
    ]
    assert len(set(found.values())) == len(found), "each has samples of its own"
    near = [abs(found[f"{name}, {kind} base"] / found[name] - 1) for kind in ("int8", "float8")]
    assert 0 < near[0] < near[1] < 0.5, "float8 has fewer digits"
    assert evaluate.main(arguments("--quantization", "nf4", "--metrics", "frechet", "--no_noise_floor")) == 0
    found = {row["method"]: row["frechet"] for row in report(tmp_path / "report")["rows"]}
    price = abs(found[f"{name}, nf4 base"] / found[name] - 1)
    assert near[0] < price < 1, "4 bits cost more than 8"
    Conversion(PhasedExperts.open(experts), tmp_path / "full").to_full()
    assert "are full networks" in failure(capsys, arguments("--quantization", "int8", experts=[str(tmp_path / "full")]))


def test_a_strength_is_a_row_of_its_own(
    arguments: Callable[..., list[str]], experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--metrics", "frechet", "--no_noise_floor")
    assert evaluate.main(arguments("--strengths", "0", "1", "0.5", *common)) == 0
    name = "phase experts, 2 steps"
    found = {row["method"]: row["frechet"] for row in report(tmp_path / "report")["rows"]}
    bare = next(iter(found))
    assert list(found) == [bare, name, f"{name}, strength 0", f"{name}, strength 1", f"{name}, strength 0.5"]
    assert found[name] == found[f"{name}, strength 1"] and len(set(found.values())) == 4
    weak = shutil.copytree(experts, tmp_path / "weak" / "experts")
    PhasedExperts.open(weak).at_strength(0.5).save_pretrained(weak)
    assert evaluate.main(arguments(*common, experts=[f"weak={weak}"])) == 0
    assert report(tmp_path / "report")["rows"][1]["frechet"] == found[f"{name}, strength 0.5"]
    assert "from -10 to 10, found 11.0" in failure(capsys, arguments("--strengths", "11"))
    Conversion(PhasedExperts.open(experts), tmp_path / "full").to_full()
    assert "are full networks" in failure(capsys, arguments("--strengths", "0.5", experts=[str(tmp_path / "full")]))


def test_lpips_with_weights_is_diversity(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    shapes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    backbone = {f"features.{k}.weight": randn(a, b, n, n, seed=k) / 9 for k, (a, b, n) in shapes.items()}
    backbone |= {f"features.{k}.bias": torch.zeros(a) for k, (a, _, _) in shapes.items()}
    heads = {f"lin{i}.model.1.weight": torch.ones(1, a, 1, 1) for i, (a, _, _) in enumerate(shapes.values())}
    torch.save(backbone, tmp_path / "backbone.pth")
    torch.save(heads, tmp_path / "heads.pth")
    weights = ["--lpips_weights", str(tmp_path / "backbone.pth"), str(tmp_path / "heads.pth")]
    assert evaluate.main(arguments(*weights, "--metrics", "lpips", "diversity")) == 0
    rows = report(tmp_path / "report")["rows"]
    assert all(0 < row["lpips"] < 10 for row in rows)


def test_the_card_of_the_experts_shows_the_report(
    arguments: Callable[..., list[str]], experts: Path, tmp_path: Path
) -> None:
    assert evaluate.main(arguments()) == 0
    folder = shutil.copytree(experts, tmp_path / "pushed")
    shutil.copy(tmp_path / "report" / "report.json", folder)
    write_card(folder, read_manifest(folder))
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "| FD-Emoji to the teacher | diversity | prompt agreement | seconds |" in card
    assert "2 prompts, 3 seeds each" in card


def test_help_names_every_metric(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and metric.text in text for name, metric in METRICS.items())


def test_user_mistakes_are_one_line(
    arguments: Callable[..., list[str]],
    experts: Path,
    teacher: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(*more: str, **changes: Any) -> str:
        return failure(capsys, arguments(*more, **changes))

    def unheard(option: str, *more: str, **changes: Any) -> None:
        assert f"evaluate.py: {option} is for " in refused(*more, **changes)

    unheard("--data", "--data", str(tmp_path), "--metrics", "diversity")
    unheard("--lpips_weights", "--lpips_weights", "a", "b", "--metrics", "diversity")
    unheard("--image_reward", "--image_reward", "a", "--metrics", "diversity")
    unheard("--frame_rate", "--frame_rate", "8")
    unheard("--dino_weights", "--dino_weights", "a", "--features", "emoji")
    nothing = ["--metrics", "diversity", "--no_noise_floor", "--few_steps"]
    unheard("--shift", "--shift", "3", *nothing, reference=False)
    unheard("--guidance_scale", "--guidance_scale", "3", *nothing, reference=False)
    unheard("--negative_prompt", "--negative_prompt", "x", *nothing, reference=False)
    unheard("--negative_prompt", "--negative_prompt", "x", "--guidance_scale", "1")
    unheard("--teacher_steps", *nothing)
    unheard("--batch_size", "--batch_size", "1", "--no_sampling")
    assert "--shift: expected a number above 0, found '0'" in refused("--shift", "0")
    assert "--frames: expected a whole number from 1 to 16384, found '0'" in refused("--frames", "0")
    assert "--seeds: expected a whole number from 1 to 1000000, found '-1'" in refused("--seeds", "-1")
    assert "--prompts: expected some text" in refused("--prompts", "")
    assert "--guidance_scale: expected a number of at least 0, found 'nan'" in refused("--guidance_scale", "nan")
    assert "unknown option --metric, did you mean --metrics?" in refused("--metric", "frechet")
    assert f"and {prompts} is a file" in refused("--output_dir", str(prompts))
    assert "expected [NAME=]FOLDER, found '=x'" in refused(experts=["=x"])
    assert f"unknown fid, expected some of: {', '.join(METRICS)}" in refused("--metrics", "frechet", "fid")
    assert "--metrics motion: is for clips, these samples have 1 frame" in refused("--metrics", "motion")
    assert "--metrics lpips: needs --lpips_weights" in refused("--metrics", "lpips")
    assert "--metrics image_reward: needs --image_reward FOLDER" in refused("--metrics", "image_reward")
    assert "--vbench is for clips, these samples have 1 frame" in refused("--vbench", "clips")
    assert "--metrics data_frechet: needs --data" in refused("--metrics", "data_frechet")
    assert "a classifier that knows the prompts" in refused("--metrics", "agreement", "--features", "efflite0")
    assert "dinov3 needs --dino_weights" in refused("--features", "dinov3")
    assert "samples of 64x64 pixels, found 16x16" in refused("--features", "emoji", "--height", "16", "--width", "16")
    assert "expected a folder of pictures, found no" in refused("--data", str(tmp_path / "none"))
    assert "expected a folder of pictures, found the file" in refused("--data", __file__)
    assert "at least 2 files of .png" in refused("--data", str(teacher))
    assert "--seeds: expected a whole number from 1" in refused("--seeds", "0")
    assert "--batch_size: expected a whole number of at least 1, found '0'" in refused("--batch_size", "0")
    assert "--few_steps: expected a whole number of at least 1" in refused("--few_steps", "0")
    assert "at most 1000 steps, found 1001" in refused("--few_steps", "1001")
    assert "--device: expected one that torch can use here, found 'tpu9'" in refused("--device", "tpu9")
    assert "neither a folder" in refused("--teacher", "nowhere")
    assert "two are called 'a'" in refused(experts=[f"a={experts}", f"a={experts}"])
    assert "is the name of another row" in refused(experts=[f"teacher, 2 steps with guidance={experts}"])
    assert "no such folder" in refused(experts=["a=nowhere"])
    larger = save_experts(tmp_path / "larger", teacher, (128, 64, 1))
    assert "different sizes" in refused(experts=[str(experts), str(larger)])
    prompts.write_text("# nothing\n\n", encoding="utf-8")
    assert "no prompts in it" in refused()
