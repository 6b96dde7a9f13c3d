"""Prompt files and the embedding cache."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from diffusers import DiffusionPipeline

from pdmd_core.families import family
from tests.tiny_families import picture, qwen_image, wan_image_clip
from training import prompts as prompts_module
from training.prompts import Example, PromptBank, PromptError, SampleSize, encode_examples, read_examples, read_prompts
from training.teacher import TeacherSource

WAN = family("wan")


def encode(teacher: Path, cache: Path, texts: list[str], negative: str = "") -> PromptBank:
    size = SampleSize(16, 16, 1, 12)
    return encode_examples([Example(text) for text in texts], negative, TeacherSource(str(teacher)), WAN, size, cache)


def test_prompts_are_lines_without_blanks_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("# head\n a fox \n\n鮭 on ice\n", encoding="utf-8")
    assert read_prompts(path) == ["a fox", "鮭 on ice"]


@pytest.mark.parametrize(
    ("content", "words"), [(None, "no such prompt file"), (b"# only\n\n", "no prompts"), (b"a\xff\n", "not UTF-8")]
)
def test_a_bad_prompt_file_is_one_line(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "p.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PromptError, match=words) as error:
        read_prompts(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_embeddings_are_those_of_the_pipeline(teacher: Path, tmp_path: Path) -> None:
    bank = encode(teacher, tmp_path, ["a fox", "a panda"], "blurry")
    pipeline = DiffusionPipeline.from_pretrained(teacher, dtype=torch.float32)
    positive, negative = pipeline.encode_prompt(
        ["a panda"], "blurry", do_classifier_free_guidance=True, max_sequence_length=12
    )
    found = bank.conditioning(torch.tensor([1]), torch.device("cpu"))["prompt_embeds"]
    torch.testing.assert_close(found, positive, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        bank.negative_conditioning(torch.tensor([0, 1, 1]), torch.device("cpu"))["prompt_embeds"],
        negative.expand(3, -1, -1),
        atol=1e-5,
        rtol=0,
    )


def test_the_text_encoder_is_loaded_once_and_not_again(teacher: Path, tmp_path: Path) -> None:
    first = encode(teacher, tmp_path, ["a fox"])
    with mock.patch.object(prompts_module, "load_text_side", side_effect=AssertionError("loaded again")):
        again = encode(teacher, tmp_path, ["a fox"])
        assert torch.equal(first.embeddings["prompt_embeds"], again.embeddings["prompt_embeds"])
        with pytest.raises(AssertionError, match="loaded again"):
            encode(teacher, tmp_path, ["a fox", "another"])
        with pytest.raises(AssertionError, match="loaded again"):
            encode(teacher, tmp_path, ["a fox"], "other negative prompt")


def test_jsonl_lines_are_prompts_with_images_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "fox.png").write_bytes(b"")
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a fox", "image": "fox.png"}\n\n{"prompt": "a panda"}\n', encoding="utf-8")
    assert read_examples(path) == [Example("a fox", tmp_path / "fox.png"), Example("a panda")]
    assert read_prompts(path) == ["a fox", "a panda"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a fox", "line 2: expected"),
        ('["a fox"]', "line 2: expected"),
        ('{"image": "fox.png"}', "line 2: expected"),
        ('{"prompt": "a fox", "images": "fox.png"}', "line 2: expected"),
        ('{"prompt": "a fox", "image": 3}', "line 2: expected"),
        ('{"prompt": "a fox", "image": "none.png"}', "line 2: there is no image"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(PromptError, match=words) as error:
        read_examples(path)
    assert len(str(error.value).splitlines()) == 1


@pytest.fixture(scope="module")
def image_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("image_teacher")
    wan_image_clip().save_pretrained(folder)
    return folder


def encode_images(teacher: Path, folder: Path, names: list[str]) -> PromptBank:
    examples = [Example(f"a {name}", folder / f"{name}.png") for name in names]
    return encode_examples(
        examples, "bad", TeacherSource(str(teacher)), WAN, SampleSize(16, 32, 5, 12), folder / "cache"
    )


def test_image_conditioning_is_kept_until_an_image_changes(image_teacher: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("fox", "panda")):
        picture(seed, (64, 32)).save(tmp_path / f"{name}.png")
    bank = encode_images(image_teacher, tmp_path, ["fox", "panda"])
    indices, cpu = torch.tensor([1, 0, 1]), torch.device("cpu")
    positive, negative = bank.conditioning(indices, cpu), bank.negative_conditioning(indices, cpu)
    assert set(positive) == set(negative) == {"prompt_embeds", "image_latents", "image_embeds"}
    for name in ("image_latents", "image_embeds"):
        assert torch.equal(positive[name], negative[name]), "guidance keeps the image"
        assert torch.equal(positive[name][0], positive[name][2]) and not torch.equal(
            positive[name][0], positive[name][1]
        )
    assert not torch.equal(positive["prompt_embeds"], negative["prompt_embeds"])
    assert torch.equal(negative["prompt_embeds"][0], negative["prompt_embeds"][1])
    with mock.patch.object(prompts_module, "load_text_side", side_effect=AssertionError("loaded again")):
        again = encode_images(image_teacher, tmp_path, ["fox", "panda"])
        assert torch.equal(again.embeddings["image_latents"], bank.embeddings["image_latents"])
        picture(2, (64, 32)).save(tmp_path / "fox.png")
        with pytest.raises(AssertionError, match="loaded again"):
            encode_images(image_teacher, tmp_path, ["fox", "panda"])


def test_a_file_that_is_no_image_is_one_line(image_teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "fox.png").write_text("no picture", encoding="utf-8")
    with pytest.raises(PromptError, match=r"fox\.png: not a readable image") as error:
        encode_images(image_teacher, tmp_path, ["fox"])
    assert len(str(error.value).splitlines()) == 1


def test_prompts_of_different_lengths_are_padded_over_batches(tmp_path: Path) -> None:
    pipeline = qwen_image()
    pipeline.save_pretrained(tmp_path / "qwen")
    texts = ["a fox", "a panda that eats bamboo", "x"]
    source, size = TeacherSource(str(tmp_path / "qwen")), SampleSize(32, 32, 1, 400)
    bank = encode_examples([Example(t) for t in texts], "bad", source, family("qwen_image"), size, tmp_path, batch=1)
    lengths = bank.embeddings["prompt_mask"].sum(1)
    assert len(set(lengths.tolist())) == 3 and bank.embeddings["prompt_embeds"].shape[1] == lengths.max()
    for i, text in enumerate(texts):
        expected, mask = pipeline.encode_prompt([text])
        assert mask is None, "one prompt alone has no padding"
        found = bank.embeddings["prompt_embeds"][i]
        torch.testing.assert_close(found[: lengths[i]], expected[0], rtol=1e-4, atol=1e-5)
        assert not found[lengths[i] :].any()
