"""The bank of conditioning: what the pipelines compute, kept on disk, read back by bucket."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from diffusers import DiffusionPipeline

from pdmd_core.families import family
from tests.helpers.families.flux import flux
from tests.helpers.families.ltx2 import ltx2
from tests.helpers.families.parts import picture
from tests.helpers.families.qwen_image import qwen_image
from tests.helpers.families.wan import wan_image_clip
from tests.helpers.tiny import wan_pipeline
from training.data import encoder as encoder_module
from training.data import prompt_cache
from training.data.buckets import ANY, Bucket, SampleSize
from training.data.encoder import Encoder
from training.data.examples import Example, PromptError
from training.data.prompt_cache import PromptCache, encode_examples, open_prompt_cache
from training.data.prompt_identity import identity
from training.data.teacher import TeacherSource, load_text_side

WAN = family("wan")
CPU, FIRST = torch.device("cpu"), torch.tensor([0])


def encode(teacher: Path, cache: Path, texts: list[str], negative: str = "") -> PromptCache:
    size = SampleSize(16, 16, 1, 12)
    return encode_examples([Example(text) for text in texts], negative, TeacherSource(str(teacher)), WAN, size, cache)


def test_embeddings_are_those_of_the_pipeline(teacher: Path, tmp_path: Path) -> None:
    bank = encode(teacher, tmp_path, ["a fox", "a panda"], "blurry")
    pipeline = DiffusionPipeline.from_pretrained(teacher, dtype=torch.float32)
    positive, negative = pipeline.encode_prompt(
        ["a panda"], "blurry", do_classifier_free_guidance=True, max_sequence_length=12
    )
    found = bank.conditioning(torch.tensor([1]), torch.device("cpu"))["prompt_embeds"]
    torch.testing.assert_close(found, positive, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        bank.conditioning_pair(torch.tensor([0, 1, 1]), torch.device("cpu"))[1]["prompt_embeds"],
        negative.expand(3, -1, -1),
        atol=1e-5,
        rtol=0,
    )


def test_the_text_encoder_is_loaded_once_and_not_again(teacher: Path, tmp_path: Path) -> None:
    first = encode(teacher, tmp_path, ["a fox"])
    with mock.patch.object(encoder_module, "load_text_side", side_effect=AssertionError("loaded again")):
        again = encode(teacher, tmp_path, ["a fox"])
        assert torch.equal(*(bank.conditioning(FIRST, CPU)["prompt_embeds"] for bank in (first, again)))
        with pytest.raises(AssertionError, match="loaded again"):
            encode(teacher, tmp_path, ["a fox", "another"])
        with pytest.raises(AssertionError, match="loaded again"):
            encode(teacher, tmp_path, ["a fox"], "other negative prompt")


@pytest.fixture(scope="module")
def image_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("image_teacher")
    wan_image_clip().save_pretrained(folder)
    return folder


def encode_images(teacher: Path, folder: Path, names: list[str]) -> PromptCache:
    examples = [Example(f"a {name}", folder / f"{name}.png") for name in names]
    return encode_examples(
        examples, "bad", TeacherSource(str(teacher)), WAN, SampleSize(16, 32, 5, 12), folder / "cache"
    )


def test_image_conditioning_is_kept_until_an_image_changes(image_teacher: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("fox", "panda")):
        picture(seed, (64, 32)).save(tmp_path / f"{name}.png")
    bank = encode_images(image_teacher, tmp_path, ["fox", "panda"])
    indices, cpu = torch.tensor([1, 0, 1]), torch.device("cpu")
    positive, negative = bank.conditioning_pair(indices, cpu)
    assert set(positive) == set(negative) == {"prompt_embeds", "image_latents", "image_embeds"}
    for name in ("image_latents", "image_embeds"):
        assert torch.equal(positive[name], negative[name]), "guidance keeps the image"
        assert torch.equal(positive[name][0], positive[name][2]) and not torch.equal(
            positive[name][0], positive[name][1]
        )
    assert not torch.equal(positive["prompt_embeds"], negative["prompt_embeds"])
    assert torch.equal(negative["prompt_embeds"][0], negative["prompt_embeds"][1])
    with mock.patch.object(encoder_module, "load_text_side", side_effect=AssertionError("loaded again")):
        again = encode_images(image_teacher, tmp_path, ["fox", "panda"])
        assert torch.equal(*(b.conditioning(indices, cpu)["image_latents"] for b in (again, bank)))
        picture(2, (64, 32)).save(tmp_path / "fox.png")
        with pytest.raises(AssertionError, match="loaded again"):
            encode_images(image_teacher, tmp_path, ["fox", "panda"])


def test_a_file_that_is_no_image_is_one_line(image_teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "fox.png").write_text("no picture", encoding="utf-8")
    with pytest.raises(PromptError, match=r"fox\.png: not a readable image") as error:
        encode_images(image_teacher, tmp_path, ["fox"])
    assert len(str(error.value).splitlines()) == 1


def test_prompts_of_different_lengths_get_their_zeros_back(tmp_path: Path) -> None:
    pipeline = qwen_image()
    pipeline.save_pretrained(tmp_path / "qwen")
    texts = ["a fox", "a panda that eats bamboo", "x"]
    encoder = Encoder(TeacherSource(str(tmp_path / "qwen")), family("qwen_image"), 400, batch=1)
    bank = open_prompt_cache([Example(t) for t in texts], "bad", encoder, [Bucket(32, 32, 1)], tmp_path)
    found, negative = bank.conditioning_pair(torch.arange(3), CPU)
    lengths = found["prompt_mask"].sum(1)
    assert len(set(lengths.tolist())) == 3
    assert found["prompt_embeds"].shape[1] == negative["prompt_embeds"].shape[1] == lengths.max()
    for i, text in enumerate(texts):
        expected, mask = pipeline.encode_prompt([text])
        assert mask is None, "one prompt alone has no padding"
        embeds = found["prompt_embeds"][i]
        torch.testing.assert_close(embeds[: lengths[i]], expected[0], rtol=1e-4, atol=1e-5)
        assert not embeds[lengths[i] :].any()
    size = sum(path.stat().st_size for path in tmp_path.rglob("0*.safetensors"))
    assert size < 2 * int(lengths.sum()) * expected.shape[2] * 4 + 10_000, "zeros are not kept on disk"


def test_a_bank_in_the_network_s_precision_gives_what_the_network_would_make_of_it(
    teacher: Path, tmp_path: Path
) -> None:
    encoder = Encoder(TeacherSource(str(teacher)), WAN, 12)
    arguments = ([Example("a fox")], "bad", encoder, [Bucket(16, 16, 1)], tmp_path)
    full, half = open_prompt_cache(*arguments), open_prompt_cache(*arguments, dtype=torch.bfloat16)
    assert torch.equal(
        full.conditioning(FIRST, CPU)["prompt_embeds"].bfloat16(), half.conditioning(FIRST, CPU)["prompt_embeds"]
    )


def test_images_go_to_the_bucket_of_their_shape_and_prompts_alone_to_all(image_teacher: Path, tmp_path: Path) -> None:
    buckets = [Bucket(32, 16, 5), Bucket(16, 32, 9)]
    shapes = [(64, 30), (20, 64), (64, 32), (31, 64), (70, 32)]
    examples = []
    for seed, size in enumerate(shapes):
        picture(seed, size).save(tmp_path / f"{seed}.png")
        examples.append(Example(f"number {seed}", tmp_path / f"{seed}.png"))
    with mock.patch.object(prompt_cache, "CHUNK", 2):
        bank = open_prompt_cache(
            examples, "bad", Encoder(TeacherSource(str(image_teacher)), WAN, 12), buckets, tmp_path
        )
    assert len(bank) == 5
    wide, high = (bank.members(bucket).tolist() for bucket in (0, 1))
    assert (wide, high) == ([0, 2, 4], [1, 3])
    latents = [bank.conditioning(torch.tensor(m), CPU)["image_latents"].shape for m in (wide, high)]
    assert [shape[2:] for shape in latents] == [(2, 2, 4), (3, 4, 2)]
    assert bank.prompts([3, 0]) == ["number 3", "number 0"]
    for number in range(5):  # each row is that of its own example, encoded alone
        bucket = buckets[number in high]
        size = SampleSize(bucket.height, bucket.width, bucket.frames, 12)
        alone = encode_examples([examples[number]], "bad", TeacherSource(str(image_teacher)), WAN, size, tmp_path)
        for name, value in alone.conditioning(FIRST, CPU).items():
            torch.testing.assert_close(bank.conditioning(torch.tensor([number]), CPU)[name], value)


def test_prompts_alone_suit_every_bucket(teacher: Path, tmp_path: Path) -> None:
    examples = [Example("a fox"), Example("a panda", size=(9, 16, None))]
    buckets = [Bucket(32, 16, 1), Bucket(16, 32, 1)]
    bank = open_prompt_cache(examples, "", Encoder(TeacherSource(str(teacher)), WAN, 12), buckets, tmp_path)
    assert [bank.members(bucket).tolist() for bucket in (0, 1)] == [[0], [0, 1]]
    assert [bank.sized(bucket) for bucket in (0, 1, ANY)] == [0, 1, 1]


def test_encoding_that_was_stopped_goes_on_where_it_was(teacher: Path, tmp_path: Path) -> None:
    examples = [Example(f"number {i}") for i in range(5)]
    asked: list[str] = []
    texts = Encoder.texts

    def stops(self: Encoder, part: list[Example], bucket: Bucket | None) -> dict[str, torch.Tensor]:
        asked.extend(example.prompt for example in part)
        if asked == [f"number {i}" for i in range(4)]:
            raise KeyboardInterrupt
        return texts(self, part, bucket)

    def make() -> PromptCache:
        encoder = Encoder(TeacherSource(str(teacher)), WAN, 12)
        return open_prompt_cache(examples, "", encoder, [Bucket(16, 16, 1)], tmp_path)

    with mock.patch.object(prompt_cache, "CHUNK", 2), mock.patch.object(Encoder, "texts", stops):
        with pytest.raises(KeyboardInterrupt):
            make()
        assert len(make()) == 5
    assert asked == [f"number {i}" for i in (0, 1, 2, 3, 2, 3, 4)], "the first chunk was there"


def test_a_batch_reads_its_own_rows_and_no_others(teacher: Path, tmp_path: Path) -> None:
    encoder = Encoder(TeacherSource(str(teacher)), WAN, 12)
    examples = [Example(f"number {i}") for i in range(300)]
    bank = open_prompt_cache(examples, "", encoder, [Bucket(16, 16, 1)], tmp_path)
    with mock.patch.object(PromptCache, "_read", autospec=True, side_effect=PromptCache._read) as read:
        found = bank.conditioning(torch.tensor([5, 299]), CPU)["prompt_embeds"]
    assert [(call.args[1].name, call.args[2]) for call in read.call_args_list] == [
        ("000000.safetensors", 5),
        ("000002.safetensors", 43),
    ]
    single = encode(teacher, tmp_path, ["number 299"]).conditioning(FIRST, CPU)["prompt_embeds"]
    torch.testing.assert_close(found[1:], single)


def test_both_sides_of_guidance_read_each_example_once(image_teacher: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("fox", "panda")):
        picture(seed, (64, 32)).save(tmp_path / f"{name}.png")
    encoder = Encoder(TeacherSource(str(image_teacher)), WAN, 12)
    examples = [Example(f"a {name}", tmp_path / f"{name}.png") for name in ("fox", "panda")]
    bank = open_prompt_cache(examples, "bad", encoder, [Bucket(32, 16, 5)], tmp_path)
    indices = torch.tensor([1, 0, 1])
    alone = bank.conditioning(indices, CPU)
    with mock.patch.object(PromptCache, "_read", autospec=True, side_effect=PromptCache._read) as read:
        positive, negative = bank.conditioning_pair(indices, CPU)
    assert [call.args[2] for call in read.call_args_list] == [1, 0, 1]
    assert list(positive) == list(alone) and all(torch.equal(positive[name], alone[name]) for name in alone)
    assert list(negative) == list(alone) and not torch.equal(positive["prompt_embeds"], negative["prompt_embeds"])
    assert positive["image_latents"] is negative["image_latents"], "on the device once"


@pytest.mark.parametrize("content", [b"", b"\0" * 100])
def test_a_damaged_file_of_a_bank_is_one_line(content: bytes, teacher: Path, tmp_path: Path) -> None:
    encoder = Encoder(TeacherSource(str(teacher)), WAN, 12)
    bank = open_prompt_cache([Example("a fox")], "", encoder, [Bucket(16, 16, 1)], tmp_path)
    (bank.folder / "000000.safetensors").write_bytes(content)
    with pytest.raises(PromptError, match=r"000000\.safetensors: damaged since this run began; start again") as error:
        bank.conditioning(FIRST, CPU)
    assert "\n" not in str(error.value)


def test_few_examples_outlive_their_folder(teacher: Path, tmp_path: Path) -> None:
    bank = encode(teacher, tmp_path / "cache", ["a fox", "a panda"])
    before = bank.conditioning(torch.tensor([1, 0]), CPU)["prompt_embeds"]
    shutil.rmtree(tmp_path / "cache")
    assert torch.equal(bank.conditioning(torch.tensor([1, 0]), CPU)["prompt_embeds"], before)


def test_processes_share_the_work_and_find_the_same(teacher: Path, tmp_path: Path) -> None:
    examples, encoded, here = [Example(f"number {i}") for i in range(7)], {0: 0, 1: 0}, threading.local()
    texts = Encoder.texts
    encoders = [Encoder(TeacherSource(str(teacher)), WAN, 12) for _ in range(2)]
    assert all(encoder.pipeline for encoder in encoders), "loaded one after the other, as in processes of their own"

    def counted(self: Encoder, part: list[Example], bucket: Bucket | None) -> dict[str, torch.Tensor]:
        encoded[here.rank] += len(part)
        return texts(self, part, bucket)

    def process(rank: int) -> PromptCache:
        here.rank = rank
        return open_prompt_cache(examples, "", encoders[rank], [Bucket(16, 16, 1)], tmp_path)

    with (
        mock.patch.object(prompt_cache, "CHUNK", 2),
        mock.patch.object(prompt_cache, "process_number", lambda: (here.rank, 2)),
        mock.patch.object(prompt_cache, "of_first_process", lambda compute: compute()),
        mock.patch.object(Encoder, "texts", counted),
        ThreadPoolExecutor(2) as pool,
    ):
        banks = list(pool.map(process, range(2)))
    assert encoded == {0: 4, 1: 3}
    first, second = (bank.conditioning(torch.arange(7), CPU)["prompt_embeds"] for bank in banks)
    assert torch.equal(first, second)


def flip(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["000001.safetensors", "negative.safetensors", "index.json"])
def test_a_damaged_file_is_encoded_again_and_said(
    name: str, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flipped bit wherever it lies, an empty file, another file's content, none at all."""
    examples, encoder = [Example(f"number {i}") for i in range(5)], Encoder(TeacherSource(str(teacher)), WAN, 12)

    def values() -> list[torch.Tensor]:
        with mock.patch.object(prompt_cache, "CHUNK", 2):
            bank = open_prompt_cache(examples, "blurry", encoder, [Bucket(16, 16, 1)], tmp_path)
        own = torch.arange(5)
        return [side["prompt_embeds"] for side in bank.conditioning_pair(own, CPU)]

    expected = values()
    (folder,) = tmp_path.iterdir()
    harms = [partial(flip, folder / name, place / 19) for place in range(20)]
    harms += [
        partial((folder / name).write_bytes, b""),
        partial(shutil.copy, folder / "000000.safetensors", folder / name),
    ]
    if name != "index.json":  # without one it was never complete
        harms.append((folder / name).unlink)
    for harm in harms:
        harm()
        assert all(torch.equal(a, b) for a, b in zip(values(), expected, strict=True)), harm
        said = capsys.readouterr().err
        assert f"warning: {folder / name} is damaged (" in said and "): it is encoded again" in said, harm


def test_three_runs_mend_and_read_one_cache_together(teacher: Path, tmp_path: Path) -> None:
    examples = [Example(f"number {i}") for i in range(7)]
    encoders = [Encoder(TeacherSource(str(teacher)), WAN, 12) for _ in range(3)]
    assert all(encoder.pipeline for encoder in encoders), "loaded one after the other, as in processes of their own"

    def run(encoder: Encoder) -> torch.Tensor:
        bank = open_prompt_cache(examples, "", encoder, [Bucket(16, 16, 1)], tmp_path)
        return bank.conditioning(torch.arange(7), CPU)["prompt_embeds"]

    with mock.patch.object(prompt_cache, "CHUNK", 2):
        expected = run(encoders[0])
        (folder,) = tmp_path.iterdir()
        for name in ("000000.safetensors", "000002.safetensors"):
            flip(folder / name, 0.9)
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(run, encoders))
        assert all(torch.equal(values, expected) for values in found)
        path = folder / "000000.safetensors"
        whole = path.read_bytes()
        flip(path, 0.9)
        path.with_suffix(".part").write_bytes(whole)
        path.with_suffix(".part").replace(path)
        assert torch.equal(run(encoders[0]), expected), "damaged while it was open, and mended by another run"


def test_prompts_that_are_cut_off_are_counted(teacher: Path, tmp_path: Path) -> None:
    def longer(tokens: int) -> int:
        examples = [Example("a fox"), Example("a fox " * 20), Example("a panda " * 20)]
        encoder = Encoder(TeacherSource(str(teacher)), WAN, tokens)
        opened = open_prompt_cache(examples, "", encoder, [Bucket(16, 16, 1)], tmp_path)
        again = open_prompt_cache(examples, "", encoder, [Bucket(16, 16, 1)], tmp_path)
        assert opened.longer == again.longer
        return opened.longer

    assert (longer(12), longer(500)) == (2, 0)


def test_a_teacher_of_the_hub_that_is_copied_here_encodes_the_same(teacher: Path, tmp_path: Path) -> None:
    local, there = TeacherSource(str(teacher)), TeacherSource("user/teacher", "main")
    index, kind = local.index(), local.pipeline_class()
    with (
        mock.patch.object(TeacherSource, "index", lambda self: index),
        mock.patch.object(TeacherSource, "pipeline_class", lambda self: kind),
        mock.patch("training.data.teacher.DiffusionPipeline.download", return_value=str(teacher)) as download,
    ):
        names = {
            identity([Example("a fox")], "", Encoder(source, WAN, 12), [Bucket(16, 16, 1)], torch.float32)
            for source in (local, there)
        }
    assert len(names) == 1
    assert download.call_args.kwargs["revision"] == "main" and "transformer" in download.call_args.kwargs


def test_every_text_encoder_and_every_image_counts(tmp_path: Path) -> None:
    """Of FLUX.1 the second encoder, of clips between two images the last one."""
    picture().save(tmp_path / "a.png")
    picture(1).save(tmp_path / "b.png")
    pipeline = flux()
    pipeline.save_pretrained(tmp_path / "one")
    with torch.no_grad():
        pipeline.text_encoder_2.shared.weight.add_(0.1)
    pipeline.save_pretrained(tmp_path / "two")
    wan_image_clip(last=True).save_pretrained(tmp_path / "both")
    kind = {"one": family("flux"), "two": family("flux"), "both": WAN}

    def named(teacher: str, *examples: Example) -> str:
        encoder = Encoder(TeacherSource(str(tmp_path / teacher)), kind[teacher], 12)
        return identity(examples, "", encoder, [Bucket(16, 16, 1)], torch.float32)

    assert named("one", Example("a fox")) != named("two", Example("a fox"))
    a, b = tmp_path / "a.png", tmp_path / "b.png"
    assert named("both", Example("x", a, last_image=a)) != named("both", Example("x", a, last_image=b))
    with pytest.raises(
        PromptError, match="1 of 1 prompts have no last image, and this teacher makes clips between two"
    ):
        named("both", Example("x", a))
    with pytest.raises(PromptError, match="WanPipeline takes no last image"):
        wan_pipeline().save_pretrained(tmp_path / "text")
        kind["text"] = WAN
        named("text", Example("x", last_image=a))


def test_what_comes_after_a_narrow_text_encoder_is_narrow_too(tmp_path: Path) -> None:
    ltx2().save_pretrained(tmp_path)
    found = family("ltx2")
    pipeline = load_text_side(TeacherSource(str(tmp_path)), found, dtype=torch.bfloat16)
    assert found.encode_prompts(pipeline, ["a fox"], 24)["prompt_audio_embeds"].dtype == torch.bfloat16
