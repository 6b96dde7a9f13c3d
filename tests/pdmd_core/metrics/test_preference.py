"""ImageReward: the numbers of its own package, and files that are not its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pdmd_core.metrics import ImageReward
from tests.helpers.image_reward import save_image_reward, weights

PROMPTS = ["A panda", "a fox on red ice"]
GOLDEN = [-1.2463194131851196, -0.8147726058959961]


def pictures() -> Tensor:
    return torch.rand(2, 3, 60, 96, generator=torch.Generator().manual_seed(1))


def test_rewards_are_those_of_the_published_package(tmp_path: Path) -> None:
    """Computed by ImageReward 1.5 with these weights: its image network, its text network and its head."""
    network = ImageReward.from_folder(save_image_reward(tmp_path))
    assert network(pictures(), PROMPTS).tolist() == pytest.approx(GOLDEN, rel=1e-3)
    assert network(pictures(), PROMPTS[::-1]).tolist() != pytest.approx(GOLDEN, rel=1e-2)


def test_pictures_are_cut_in_the_middle_and_normalised(tmp_path: Path) -> None:
    network = ImageReward.from_folder(save_image_reward(tmp_path))
    striped = torch.zeros(1, 3, 48, 144)
    striped[..., 48:96] = 1
    seen = network._prepared(striped)
    assert seen.shape == (1, 3, 48, 48)
    mean, scale = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    torch.testing.assert_close(seen[0, :, 24, 24], (1 - mean) / scale)


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def saved(state: object) -> Callable[[Path], object]:
    return lambda folder: torch.save(state, folder / "ImageReward.pt")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without("vocab.txt"), "found no vocab.txt"),
        (without("ImageReward.pt"), "found no ImageReward.pt"),
        (saved({"weight": torch.zeros(2)}), "found others"),
        (saved({name: w for name, w in weights().items() if "blocks.1.mlp.fc1" not in name}), "found others"),
        (saved([1, 2]), "tensors by name"),
        (lambda folder: (folder / "vocab.txt").write_text("\n".join(map(str, range(200)))), "vocabulary"),
    ],
)
def test_other_files_are_refused(damage: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    folder = save_image_reward(tmp_path)
    damage(folder)
    with pytest.raises(ValueError, match=said):
        ImageReward.from_folder(folder)
