"""LPIPS and the feature networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pdmd_core.metrics import AlexLpips, DinoV3, EffLite0, extract, perceptual_distance, seed_diversity
from tests.helpers.tiny import randn

PLACES = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
"""AlexNet's convolutions in torchvision's state dict: outputs, inputs, kernel."""


def backbone() -> dict[str, Tensor]:
    state = {}
    for place, (after, before, kernel) in PLACES.items():
        state[f"features.{place}.weight"] = (
            randn(after, before, kernel, kernel, seed=place) / (before * kernel**2) ** 0.5
        )
        state[f"features.{place}.bias"] = 0.1 * randn(after, seed=100 + place)
    return state | {"classifier.6.bias": torch.zeros(1000)}


def heads() -> dict[str, Tensor]:
    return {
        f"lin{i}.model.1.weight": randn(1, after, 1, 1, seed=i).abs() for i, (after, _, _) in enumerate(PLACES.values())
    }


def pictures(count: int, side: int = 64, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def lpips_by_hand(first: Tensor, second: Tensor) -> float:
    """One pair, layer by layer, straight from the paper's equation 1."""
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    total, state, weights = 0.0, backbone(), heads()
    maps = [((2 * p - 1) - shift.view(3, 1, 1)) / scale.view(3, 1, 1) for p in (first, second)]
    for layer, place in enumerate(PLACES):
        stride, padding = (4, 2) if layer == 0 else (1, 2 if layer == 1 else 1)
        if layer in (1, 2):
            maps = [F.max_pool2d(x[None], 3, 2)[0] for x in maps]
        kernel, bias = state[f"features.{place}.weight"], state[f"features.{place}.bias"]
        maps = [F.conv2d(x[None], kernel, bias, stride, padding)[0].clamp(min=0) for x in maps]
        x, y = (m / m.square().sum(0).sqrt() for m in maps)
        head = weights[f"lin{layer}.model.1.weight"][0, :, 0, 0]
        places = x.shape[1] * x.shape[2]
        total += float(((x - y).square().sum((1, 2)) / places * head).sum())
    return total


def test_lpips_is_the_papers_sum_over_layers() -> None:
    network = AlexLpips(backbone(), heads())
    first, second = pictures(2), pictures(2, seed=1)
    found = network(first, second)
    assert found.shape == (2,)
    assert found.tolist() == pytest.approx([lpips_by_hand(*pair) for pair in zip(first, second, strict=True)], rel=1e-3)
    assert network(first, first).tolist() == [0, 0]
    assert found.tolist() == pytest.approx(network(second, first).tolist())


def test_perceptual_distance_of_maps_by_hand() -> None:
    """One layer, two places: equal directions at the first, orthogonal ones at the second, weights 2 and 3."""
    first = torch.tensor([[[[5.0, 1.0]], [[0.0, 0.0]]]])
    second = torch.tensor([[[[0.1, 0.0]], [[0.0, 9.0]]]])
    assert perceptual_distance([first], [second], [torch.tensor([2.0, 3.0])]).tolist() == pytest.approx([(2 + 3) / 2])


def test_lpips_reads_the_users_files_and_measures_diversity(tmp_path: Path) -> None:
    torch.save(backbone(), tmp_path / "alexnet.pth")
    torch.save(heads(), tmp_path / "alex.pth")
    network = AlexLpips.from_files(tmp_path / "alexnet.pth", tmp_path / "alex.pth")
    same = pictures(2).repeat_interleave(2, 0)
    groups = torch.tensor([0, 0, 1, 1])
    assert seed_diversity(same, groups, network).value == 0
    assert seed_diversity(pictures(4), groups, network).value > 0
    assert not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b, h: b.pop("features.6.weight"), "AlexNet and the alex heads of lpips 0.1: 'features.6.weight'"),
        (lambda b, h: b.update({"features.0.weight": torch.zeros(64, 3, 3, 3)}), "size mismatch for weight"),
        (lambda b, h: h.pop("lin4.model.1.weight"), "lin4.model.1.weight"),
        (lambda b, h: h.update({"lin0.model.1.weight": torch.zeros(1, 128, 1, 1)}), r"\[64, 192, .*found \[128, 192,"),
    ],
    ids=["no-layer", "other-network", "no-head", "heads-of-another-network"],
)
def test_lpips_refuses_other_weights_in_one_line(change, message: str) -> None:
    state, weights = backbone(), heads()
    change(state, weights)
    with pytest.raises(ValueError, match=message) as caught:
        AlexLpips(state, weights)
    assert "\n" not in str(caught.value)


def test_lpips_refuses_pictures_that_are_too_small() -> None:
    with pytest.raises(ValueError, match=r"height >= 64, width >= 64\), found \(1, 3, 32, 32\)"):
        AlexLpips(backbone(), heads())(pictures(1, 32), pictures(1, 32))


# --- EfficientNet-Lite0 ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def efflite0() -> EffLite0:
    return EffLite0.load()


def test_efflite0_is_the_published_network(efflite0: EffLite0) -> None:
    """4.65 million parameters with its classifier (the model's table), which is left out here: 1281 x 1000."""
    assert sum(p.numel() for p in efflite0.parameters()) == 4_652_008 - 1281 * 1000
    assert not any(p.requires_grad for p in efflite0.parameters())
    # what the publisher's own implementation gives for this picture
    y, x = torch.meshgrid(torch.arange(224), torch.arange(224), indexing="ij")
    disc = ((x - 100) ** 2 + (y - 120) ** 2 < 60**2).float()
    features = efflite0(torch.stack([x / 223, y / 223, disc])[None])
    assert features.shape == (1, EffLite0.dimensions)
    strongest = features[0].topk(6)
    assert strongest.indices.tolist() == [897, 113, 245, 115, 930, 778]
    assert strongest.values.tolist() == pytest.approx([4.0263, 3.9221, 2.9320, 2.9017, 2.6666, 2.5419], abs=1e-3)
    assert float(features.norm()) == pytest.approx(16.5617, abs=5e-3)


def test_efflite0_tells_shapes_from_noise_and_not_a_shifted_shape_from_itself(efflite0: EffLite0) -> None:
    """A disc, the same disc 6 pixels aside, stripes: its features are those of a trained network."""
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    disc = lambda cx: (((x - cx) ** 2 + (y - 32) ** 2) < 250).float().expand(3, 64, 64)  # noqa: E731
    stripes = ((x // 4) % 2).float().expand(3, 64, 64)
    features = F.normalize(efflite0(torch.stack([disc(29), disc(35), stripes, pictures(1)[0]])), dim=1)
    similarity = features @ features.T
    assert similarity[0, 1] > 0.8
    assert similarity[0, 1] > similarity[0, 2] + 0.2
    assert similarity[0, 1] > similarity[0, 3] + 0.2


def test_frames_of_clips_are_seen_one_by_one(efflite0: EffLite0) -> None:
    clips = pictures(6, 32).reshape(2, 3, 3, 32, 32)
    found = extract(efflite0, clips, batch=4)
    assert found.shape == (2, 3, EffLite0.dimensions)
    torch.testing.assert_close(found[1, 2], efflite0(clips[1, 2][None])[0], rtol=1e-3, atol=1e-4)


def test_weights_with_another_hash_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="is not the published EfficientNet-Lite0: sha256"):
        EffLite0.load(path)


def test_pixels_of_other_shapes_are_refused(efflite0: EffLite0) -> None:
    with pytest.raises(ValueError, match=r"expected pixels of shape .* found \(1, 1, 64, 64\)"):
        efflite0(torch.zeros(1, 1, 64, 64))


# --- DINOv3 ----------------------------------------------------------------------------------------------------------


def test_dinov3_from_a_folder_gives_the_class_token(tmp_path: Path) -> None:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    torch.manual_seed(0)
    config = DINOv3ViTConfig(
        image_size=224, patch_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    stock = DINOv3ViTModel(config).eval()
    stock.save_pretrained(tmp_path)
    network = DinoV3(tmp_path)
    x = pictures(2, 224)
    found = extract(network, x)
    assert found.shape == (2, network.dimensions) == (2, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        expected = stock((x - mean) / std).last_hidden_state[:, 0]
    torch.testing.assert_close(found, expected)
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_dinov3_refuses_a_folder_without_a_model_and_another_model(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    with pytest.raises(ValueError, match=r"expected a folder with config.json .* found none in"):
        DinoV3(tmp_path)
    BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=20)
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected a DINOv3 model in .* found BertModel"):
        DinoV3(tmp_path)
