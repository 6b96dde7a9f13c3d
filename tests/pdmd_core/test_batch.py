"""What a part of a batch is given."""

from __future__ import annotations

import torch

from pdmd_core.batch import as_rows, without_padding


def test_prompts_are_as_long_as_the_longest_of_them() -> None:
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    embeds, image = torch.randn(2, 5, 4), torch.randn(2, 9, 4)
    one = {"prompt_embeds": embeds, "prompt_mask": mask, "image_latents": image}
    (found,) = without_padding(one)
    assert torch.equal(found["prompt_embeds"], embeds[:, :3]) and torch.equal(found["prompt_mask"], mask[:, :3])
    assert found["image_latents"] is image
    other = {**one, "prompt_mask": torch.tensor([[1, 1, 1, 1, 0]] * 2)}
    assert [side["prompt_embeds"].shape[1] for side in without_padding(one, other)] == [4, 4]


def test_prompts_without_a_mask_stay_as_they_are() -> None:
    embeds = torch.zeros(2, 5, 4)
    assert without_padding({"prompt_embeds": embeds}, {}) == [{"prompt_embeds": embeds}, {}]


def test_neighbours_are_a_slice() -> None:
    assert as_rows(torch.tensor([3, 4, 5])) == slice(3, 6)
    apart = torch.tensor([3, 5])
    assert as_rows(apart) is apart
