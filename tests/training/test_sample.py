"""sample.py with images beside prompts, and what else a large teacher needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.helpers import tiny_families
from tests.helpers.tiny_experts import save_experts
from training import sample
from training.data.buckets import SampleSize
from training.data.examples import Example, PromptError
from training.data.teacher import TeacherSource
from training.evaluation.sampler import Decoder, Sampler, default_device


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample") / "teacher"
    tiny_families.wan_image_two_networks().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def experts(teacher: Path) -> Path:
    return save_experts(teacher.parent / "experts", teacher, (32, 16, 5), ("transformer", "transformer_2"))


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for i, path in enumerate(paths):
        tiny_families.picture(i, (64, 48)).save(path)
    return paths


def test_images_of_the_command_line_are_those_of_a_jsonl_file(
    experts: Path, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["a boat", "a car"]
    lines = [json.dumps({"prompt": p, "image": i.name}) for p, i in zip(prompts, images, strict=True)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines), encoding="utf-8")
    given = [word for p, i in zip(prompts, images, strict=True) for word in ("--prompt", p, "--image", str(i))]
    common = ["--experts", str(experts), "--seeds", "1", "--device", "cpu", "--output"]
    assert sample.main([*common, str(tmp_path / "a.png"), *given]) == 0
    assert sample.main([*common, str(tmp_path / "b.png"), "--prompts", str(tmp_path / "p.jsonl")]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    one_for_all = ["--prompt", "a boat", "--prompt", "a car", "--image", str(images[0])]
    assert sample.main([*common, str(tmp_path / "c.png"), *one_for_all]) == 0
    with Image.open(tmp_path / "a.gif") as own, Image.open(tmp_path / "c.gif") as other:
        assert own.size == other.size and own.n_frames == 5
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()

    def refused(*arguments: str) -> str:
        capsys.readouterr()
        assert sample.main([*common, str(tmp_path / "d.png"), *arguments]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sample.py: ")]
        return line

    assert "takes an image with each prompt, 1 of 1 have none" in refused("--prompt", "x")
    assert "there is no image nowhere.png" in refused("--prompt", "x", "--image", "nowhere.png")
    three = [word for image in (*images, images[0]) for word in ("--image", str(image))]
    assert "one for each --prompt (2) or one for all of them, found 3" in refused(*one_for_all[:4], *three)
    assert not (tmp_path / "d.png").exists()


def test_images_without_prompts_belong_to_nothing(images: list[Path]) -> None:
    with pytest.raises(PromptError, match=r"for each --prompt \(0\)"):
        sample.given_examples([], images[:1])
    assert sample.given_examples(["a", "b"], images[:1]) == [Example("a", images[0]), Example("b", images[0])]
    assert sample.given_examples(["a"], []) == [Example("a")]


def test_networks_take_the_dtype_and_the_autoencoder_stays_exact(
    teacher: Path, experts: Path, images: list[Path], tmp_path: Path
) -> None:
    size, example = SampleSize(16, 32, 5, 12), Example("a boat", images[0])
    exact = Sampler(str(teacher), size, [example], tmp_path, device="cpu")
    half = Sampler(str(teacher), size, [example], tmp_path, device="cpu", dtype=torch.bfloat16)
    assert half.pipeline.transformer.dtype == half.pipeline.transformer_2.dtype == torch.bfloat16
    assert half.pipeline.vae.dtype == torch.float32
    latents, other = (sampler.with_teacher([(0, 1)], 2, 3.0, 2.0, None) for sampler in (exact, half))
    assert latents.dtype == other.dtype == torch.float32
    assert 0 < (latents - other).abs().max() < 0.5
    decoder = Decoder(TeacherSource(str(teacher)), size, "cpu")
    assert getattr(decoder.pipeline, "transformer", None) is None
    assert torch.equal(decoder(latents), exact.decode(latents, None))


def test_guidance_moves_away_from_the_negative_prompt(teacher: Path, images: list[Path], tmp_path: Path) -> None:
    size, example = SampleSize(16, 32, 5, 12), Example("a boat", images[0])
    plain, blurry = (
        Sampler(str(teacher), size, [example], tmp_path, device="cpu", negative_prompt=text) for text in ("", "blurry")
    )
    first, second = (sampler.with_teacher([(0, 1)], 2, 3.0, 2.0, None) for sampler in (plain, blurry))
    assert (first - second).abs().max() > 1e-5
    first, second = (sampler.with_teacher([(0, 1)], 2, 3.0, 1.0, None) for sampler in (plain, blurry))
    assert torch.equal(first, second)


def test_steps_are_told_and_batches_fit_the_size(teacher: Path, images: list[Path], tmp_path: Path) -> None:
    size, example = SampleSize(16, 32, 5, 12), Example("a boat", images[0])
    sampler = Sampler(str(teacher), size, [example], tmp_path, device="cpu", batch=2)
    told: list[int] = []
    sampler.with_teacher([(0, seed) for seed in range(3)], 2, 3.0, 1.0, None, lambda: told.append(1))
    assert len(told) == 2 * 2
    assert default_device("cpu") == torch.device("cpu")
    assert Sampler(str(teacher), size, [example], tmp_path, device="cpu").batch == 64
