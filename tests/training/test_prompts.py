"""Prompt files and the embedding cache."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from diffusers import DiffusionPipeline

from pdmd_core.families import family
from training import prompts as prompts_module
from training.prompts import PromptBank, PromptError, encode_prompts, read_prompts


def encode(teacher: Path, cache: Path, texts: list[str], negative: str = "") -> PromptBank:
    return encode_prompts(texts, negative, str(teacher), None, family("wan"), 12, cache)


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
        bank.negative_conditioning(3, torch.device("cpu"))["prompt_embeds"],
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
