"""sample.py with images beside prompts, and what else a large teacher needs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image

from pdmd_core.experts import PhasedExperts
from pdmd_core.experts.convert.conversions import Conversion
from pdmd_core.scheduler import PhasedDMDScheduler
from tests.helpers.families.parts import picture
from tests.helpers.families.wan import wan_image_clip, wan_image_two_networks
from tests.helpers.tiny_experts import save_experts
from training import sample
from training.config.command_line import UserError
from training.data.buckets import SampleSize
from training.data.examples import Example, PromptError
from training.data.teacher import TeacherSource
from training.evaluation.distilled import teacher_source
from training.evaluation.pictures import save_samples
from training.evaluation.sampler import Decoder, Sampler, default_device


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample") / "teacher"
    wan_image_two_networks().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def experts(teacher: Path) -> Path:
    return save_experts(teacher.parent / "experts", teacher, (32, 16, 5), ("transformer", "transformer_2"))


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for i, path in enumerate(paths):
        picture(i, (64, 48)).save(path)
    return paths


def test_the_file_of_each_expert_is_read_once(
    experts: Path, images: list[Path], tmp_path: Path, hashed: list[str]
) -> None:
    arguments = ["--prompt", "a boat", "--image", str(images[0]), "--seeds", "1", "--device", "cpu"]
    assert sample.main(["--experts", str(experts), *arguments, "--output", str(tmp_path / "a.png")]) == 0
    names = [name for name in hashed if name.endswith("_noise.safetensors")]
    assert sorted(names) == ["high_noise.safetensors", "low_noise.safetensors"]


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


def test_a_quantized_base_samples_near_what_it_did(
    experts: Path, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for kind in ("none", "int8", "nf4"):
        given = ["--experts", str(experts), "--prompt", "a boat", "--image", str(images[0]), "--quantization", kind]
        assert sample.main([*given, "--seeds", "1", "--output", str(tmp_path / f"{kind}.png")]) == 0
        with Image.open(tmp_path / f"{kind}.png") as picture:
            found[kind] = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8).float()
    for kind in found.keys() - {"none"}:
        assert 0 < (found[kind] - found["none"]).abs().mean() < 16, kind
    Conversion(PhasedExperts.open(experts), tmp_path / "full").to_full()
    for words, more in (
        ("these are full networks", ["--experts", str(tmp_path / "full")]),
        ("--offload blocks is for plain weights", ["--experts", str(experts), "--offload", "blocks"]),
    ):
        capsys.readouterr()
        assert sample.main([*more, "--prompt", "x", "--image", str(images[0]), "--quantization", "int8"]) == 2
        assert words in capsys.readouterr().err


def edited(experts: Path, folder: Path, **changes: Any) -> str:
    """A copy of an experts folder with other fields in its manifest: of ``base``, of ``training``, of its own."""
    shutil.copytree(experts, folder)
    path = folder / "phased_experts.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for name, value in changes.items():
        section, _, inner = name.partition("__")
        (manifest[section] if inner else manifest)[inner or section] = value
    path.write_text(json.dumps(manifest), encoding="utf-8")
    return str(folder)


def test_the_teacher_is_loaded_at_the_revision_that_the_experts_name(
    experts: Path, images: list[Path], tmp_path: Path
) -> None:
    named, found = edited(experts, tmp_path / "named", base__model="user/base", base__revision="v2"), []

    def load(source: TeacherSource, *rest: Any) -> None:
        found.append((source.path, source.revision))
        raise UserError("seen")

    common = ["--experts", named, "--prompt", "x", "--image", str(images[0]), "--device", "cpu"]
    with mock.patch("training.evaluation.sampler.pipeline_on_meta", load):
        for more in ([], ["--teacher", "user/base"], ["--teacher", "user/fine-tune"]):
            assert sample.main([*common, *more]) == 2
    assert found == [("user/base", "v2"), ("user/base", "v2"), ("user/fine-tune", None)]


def test_more_steps_refine_the_plan_of_the_experts(
    experts: Path, teacher: Path, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--experts", str(experts), "--prompt", "a boat", "--image", str(images[0]), "--seeds", "1"]

    def sampled(name: str, *more: str) -> bytes:
        assert sample.main([*common, "--device", "cpu", "--output", str(tmp_path / f"{name}.png"), *more]) == 0
        return (tmp_path / f"{name}.png").read_bytes()

    plain, same = sampled("plain"), sampled("same", "--steps", "2")
    assert plain == same and "trained on" not in capsys.readouterr().err
    four = sampled("four", "--steps", "4")
    assert "trained on 2 sigmas, the other 2 of the 4 steps lie between them" in capsys.readouterr().err
    own = PhasedExperts.open(experts)
    sampler = Sampler(
        str(teacher), SampleSize(16, 32, 5, 12), [Example("a boat", images[0])], tmp_path, own, device="cpu"
    )
    plan = own.manifest.plan.refined(4)
    save_samples(tmp_path / "expected.png", sampler.decode(sampler.with_experts([(0, 1)], None, plan=plan), None), 1)
    assert four == (tmp_path / "expected.png").read_bytes() != plain
    assert sample.main([*common, "--steps", "1"]) == 2
    assert "at least the 2 steps of the plan, found 1" in capsys.readouterr().err


def test_what_experts_do_not_say_is_asked_for(
    experts: Path, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--prompt", "a boat", "--image", str(images[0]), "--seeds", "1", "--device", "cpu"]
    unsized = edited(experts, tmp_path / "unsized", training__size=None, training__max_sequence_length=None)
    assert sample.main(["--experts", unsized, *common]) == 2
    assert "do not say what size they were distilled for: give --width and --height" in capsys.readouterr().err
    given = ["--width", "32", "--height", "16", "--output", str(tmp_path / "a.png")]
    assert sample.main(["--experts", unsized, *common, *given]) == 0
    assert not (tmp_path / "a.gif").exists(), "one frame"
    capsys.readouterr()
    for changes, says in (
        ({"guidance_scale": 1.5}, "sample with guidance 1.5, here experts sample without"),
        ({"training__pipeline": ["x"]}, "training.pipeline cannot be ['x']"),
    ):
        other = edited(experts, tmp_path / next(iter(changes)), **changes)
        assert sample.main(["--experts", other, *common]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("sample.py: ") and says in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--experts", "{experts}", "--shift", "5"], "--shift is for a teacher alone"),
        (["--experts", "{experts}", "--guidance_scale", "1"], "--guidance_scale is for a teacher alone"),
        (["--experts", "{experts}", "--negative_prompt", ""], "--negative_prompt is for a teacher alone"),
        (["--teacher", "x", "--guidance_scale", "1", "--negative_prompt", "blurry"], "--guidance_scale 1 is none"),
        (["--teacher", "nowhere"], "the teacher 'nowhere' is neither a folder"),
        (["--teacher", "{teacher}", "--pipeline", "NoPipeline"], "'NoPipeline' is not a pipeline class of diffusers"),
        (["--teacher", "x", "--shift", "0"], "--shift: expected a number above 0, found '0'"),
        (["--teacher", "x", "--shift", "nan"], "--shift: expected a number above 0, found 'nan'"),
        (["--teacher", "x", "--guidance_scale", "-1"], "--guidance_scale: expected a number of at least 0"),
        (["--teacher", "x", "--steps", "0"], "--steps: expected a whole number of at least 1"),
        (["--teacher", "x", "--frames", "0"], "--frames: expected a whole number from 1 to 16384, found '0'"),
        (["--teacher", "x", "--width", "0"], "--width: expected"),
        (["--teacher", "x", "--max_sequence_length", "99999"], "from 1 to 16384, found '99999'"),
        (
            ["--teacher", "{teacher}", "--pipeline", "QwenImagePipeline"],
            "does not take its network, a Wan",
        ),
        (["--teacher", "x", "--prompts", "x" * 5000], "File name too long"),
        (["--teacher", "x", "--height", "-16"], "--height: expected"),
        (["--teacher", "x", "--max_sequence_length", "0"], "--max_sequence_length: expected"),
        (["--teacher", "x", "--batch_size", "0"], "--batch_size: expected"),
        (["--teacher", "x", "--seeds", "1", "-1"], "--seeds: expected a whole number from 0"),
        (["--teacher", "x", "--seeds", "one"], "found 'one'"),
        (["--teacher", "x", "--seeds"], "--seeds: expected at least one argument"),
        (["--teacher", "x", "--prompt", ""], "--prompt: expected some text"),
        (["--teacher", "x", "--prompts", ""], "--prompts: expected some text"),
        (["--teacher", "", "--device", "cpu"], "--teacher: expected some text"),
        (["--experts", ""], "--experts: expected a path"),
        (["--teacher", "x", "--output", "a.jpg"], "--output: expected a file name that ends in .png, found 'a.jpg'"),
        (["--teacher", "x", "--output", f"{__file__}/a.png"], "is a file"),
        (["--teacher", "x", "--dtype", "float8"], "--dtype: invalid choice: 'float8'"),
        (["--teacher", "x", "--step", "3"], "unknown option --step, did you mean --steps?"),
        (["--teacher", "x", "a boat"], "unexpected argument 'a boat'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_one_line(
    arguments: list[str], says: str, experts: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [word.format(experts=experts, teacher=teacher) for word in arguments]
    try:
        status = sample.main([*filled, "--prompt", "x"])
    except SystemExit as ended:
        status = ended.code
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2 and line.startswith("sample.py: ") and says in line


def test_samples_that_are_not_finite_are_told(
    experts: Path, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = mock.patch.object(Sampler, "with_experts", return_value=torch.full((1, 4), torch.nan))
    arguments = ["--experts", str(experts), "--prompt", "x", "--image", str(images[0]), "--device", "cpu"]
    with broken:
        assert sample.main([*arguments, "--output", str(tmp_path / "a.png")]) == 2
    assert "not finite" in capsys.readouterr().err and not (tmp_path / "a.png").exists()


def test_a_file_without_prompts_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("# nothing\n\n", encoding="utf-8")
    assert sample.main(["--teacher", "x", "--prompts", str(tmp_path / "p.txt")]) == 2
    assert "no prompts in it" in capsys.readouterr().err


def test_images_without_prompts_belong_to_nothing(images: list[Path]) -> None:
    with pytest.raises(PromptError, match=r"for each --prompt \(0\)"):
        sample.given_examples([], images[:1], [])
    with pytest.raises(PromptError, match=r"--last-image: expected one for each --prompt \(1\)"):
        sample.given_examples(["a"], images[:1], images * 2)
    assert sample.given_examples(["a", "b"], images[:1], []) == [Example("a", images[0]), Example("b", images[0])]
    assert sample.given_examples(["a"], images[:1], images[:1]) == [Example("a", images[0], last_image=images[0])]
    assert sample.given_examples(["a"], [], []) == [Example("a")]


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


@pytest.mark.parametrize("offload", ["network", "blocks"])
def test_what_waits_in_host_memory_changes_no_sample(
    teacher: Path, experts: Path, images: list[Path], tmp_path: Path, offload: Any
) -> None:
    example, own = Example("a boat", images[0]), PhasedExperts.open(experts)
    asked = (str(teacher), SampleSize(16, 32, 5, 12), [example], tmp_path, own)
    whole, away = (Sampler(*asked, device="cpu", offload=how) for how in ("none", offload))
    latents = whole.with_experts([(0, 1)], None)
    torch.testing.assert_close(away.with_experts([(0, 1)], None), latents)  # sums on other addresses
    guided = (sampler.with_teacher([(0, 1)], 2, 3.0, 2.0, None) for sampler in (whole, away))
    torch.testing.assert_close(*guided)
    assert torch.equal(whole.decode(latents, None), away.decode(latents, None))


def test_memory_that_runs_out_and_one_network_are_one_line(
    teacher: Path, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = tmp_path / "one"
    wan_image_clip().save_pretrained(one)
    common = ["--prompt", "a boat", "--image", str(images[0]), "--device", "cpu", "--steps", "1"]
    common += ["--width", "32", "--height", "16", "--max_sequence_length", "12"]
    assert sample.main([*common, "--teacher", str(one), "--offload", "network"]) == 2
    assert "--offload network is for teachers of two networks, this one has one" in capsys.readouterr().err
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB. GPU 0 has 79 GiB")
    with mock.patch.object(Sampler, "with_teacher", side_effect=full):
        assert sample.main([*common, "--teacher", str(teacher)]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line == (
        "sample.py: out of memory (CUDA out of memory): use --dtype bfloat16, --batch_size 1, --offload blocks, "
        "--decode tiled, or smaller samples"
    )


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


def test_exchanged_files_and_edited_sigmas_are_refused_before_anything_is_loaded(
    experts: Path, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where hashes were made to fit."""

    def refused(change: Callable[[dict[str, Any], Path], None]) -> str:
        folder = tmp_path / change.__name__
        shutil.copytree(experts, folder)
        PhasedDMDScheduler.from_plan(PhasedExperts.open(folder).manifest.plan).save_pretrained(folder / "scheduler")
        manifest = json.loads((folder / "phased_experts.json").read_text(encoding="utf-8"))
        change(manifest, folder)
        (folder / "phased_experts.json").write_text(json.dumps(manifest), encoding="utf-8")
        with mock.patch.object(TeacherSource, "load", side_effect=AssertionError("loaded")):
            asked = ["--experts", str(folder), "--prompt", "a boat", "--image", str(images[0])]
            assert sample.main([*asked, "--output", str(tmp_path / "a.png")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    def exchanged(manifest: dict[str, Any], folder: Path) -> None:
        first, second = manifest["experts"]
        first["file"], second["file"] = second["file"], first["file"]

    def exchanged_with_hashes(manifest: dict[str, Any], folder: Path) -> None:
        exchanged(manifest, folder)
        first, second = manifest["experts"]
        first["sha256"], second["sha256"] = second["sha256"], first["sha256"]

    def edited_sigmas(manifest: dict[str, Any], folder: Path) -> None:
        manifest["plan"]["phases"][-1]["sigmas"][-1] -= 0.01
        path = folder / "scheduler" / "scheduler_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(config | {"plan": manifest["plan"]}), encoding="utf-8")

    def edited_scheduler(manifest: dict[str, Any], folder: Path) -> None:
        path = folder / "scheduler" / "scheduler_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["plan"]["phases"][-1]["sigmas"][-1] -= 0.01
        path.write_text(json.dumps(config), encoding="utf-8")

    assert "the file was changed or cut off" in refused(exchanged)
    assert "files were exchanged" in refused(exchanged_with_hashes)
    assert "the manifest was edited" in refused(edited_sigmas)
    assert "its plan is not the manifest's" in refused(edited_scheduler)


def test_a_relative_base_lies_where_the_experts_are_or_is_asked_for(
    teacher: Path, experts: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    opened = PhasedExperts.open(experts)
    base = replace(opened.manifest.base, model="../teacher")
    beside = replace(opened, manifest=replace(opened.manifest, base=base))
    assert Path(teacher_source(beside, None, None).path).resolve() == teacher.resolve()
    lost = replace(opened, manifest=replace(opened.manifest, base=replace(base, model="models/of/others")))
    with pytest.raises(UserError, match=r"'models/of/others', is no folder here.*: say with --teacher where"):
        teacher_source(lost, None, None)
    assert teacher_source(lost, "user/teacher", None).path == "user/teacher"
