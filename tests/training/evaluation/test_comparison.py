"""Metrics by name give the library's numbers of the right rows; reports show them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image
from torch import Tensor

from pdmd_core.metrics import (
    Estimate,
    cosine_distance,
    frechet_distance,
    frechet_estimate,
    manifold,
    pairwise_distance,
    polynomial_discrepancy,
    seed_diversity,
    standardised,
)
from tests.helpers.families.parts import picture
from tests.helpers.tiny import randn
from training.config.command_line import UserError
from training.data.buckets import SampleSize
from training.evaluation.comparison import METRICS, compare
from training.evaluation.quantities import Measurement, Quantity, Setting, inapplicable, shortage
from training.evaluation.real_data import data_files, read_sample
from training.evaluation.report import Report, Row, write_pictures

PROMPTS, SEEDS = 4, 3
GROUPS = torch.arange(PROMPTS).repeat_interleave(SEEDS)


class Space:
    identity = "1"

    def __init__(self, name: str, cosine: bool) -> None:
        self.name, self.label, self.cosine = name, name.title(), cosine

    def __call__(self, pixels: Any) -> dict[str, Tensor]:
        raise AssertionError("rows are given")


def setting(**changes: Any) -> Setting:
    spaces = [Space("plain", False), Space("other", True)]
    fields: dict[str, Any] = {
        "prompts": PROMPTS,
        "seeds": SEEDS,
        "frames": 5,
        "spaces": spaces,
        "wanted": None,
        "lpips": None,
    }
    return Setting(**fields | {"data": None} | changes)


def rows(seed: int) -> dict[str, dict[str, Tensor]]:
    """Two spaces, the first with a layout of its own and classes; motion; previews."""
    count = PROMPTS * SEEDS
    return {
        "plain": {
            "features": randn(count, 3, seed=seed),
            "layout": randn(count, 2, seed=seed + 1),
            "clip": randn(count, 6, seed=seed + 2),
            "seen": torch.arange(count)[:, None].expand(count, 2) % 3,
        },
        "other": {"features": randn(count, 4, seed=seed + 3), "clip": randn(count, 8, seed=seed + 4)},
        "image_reward": {"reward": randn(count, seed=seed + 5).double()},
        "motion": {
            "flow": torch.arange(count).double(),
            "dynamic": torch.arange(count) < 3,
            "smoothness": torch.full((count,), 0.5).double(),
            "statistics": randn(count, 24, seed=seed + 5),
        },
        "preview": {"frames": (randn(count, 5, 3, 8, 8, seed=seed + 6).sigmoid() * 255).byte()},
    }


def numbers(name: str, own: Any, reference: Any, **changes: Any) -> dict[str, Estimate]:
    found = compare(setting(**changes), [name], [("m", own)], reference)["m"]
    assert all(measurement.quantity.source == METRICS[name].source for measurement in found)
    return {measurement.quantity.key: measurement.estimate for measurement in found}


def test_distances_are_those_of_the_features_in_every_space() -> None:
    own, reference = rows(0), rows(100)
    found = numbers("frechet", own, reference) | numbers("kernel", own, reference)
    both = ["frechet", "frechet_corrected", "frechet_other", "frechet_corrected_other"]
    assert list(found) == [*both, "kernel", "kernel_other"]
    for suffix, space in (("", "plain"), ("_other", "other")):
        pair = own[space]["features"], reference[space]["features"]
        assert found[f"frechet{suffix}"].value == pytest.approx(frechet_distance(*pair))
        assert math.isnan(found[f"frechet{suffix}"].low), "the interval is of the corrected distance"
        assert found[f"frechet_corrected{suffix}"] == frechet_estimate(*pair, (SEEDS, SEEDS)).corrected
        assert found[f"kernel{suffix}"].value == pytest.approx(polynomial_discrepancy(*pair))
    assert numbers("frechet", own, own)["frechet"].value == pytest.approx(0, abs=1e-8)
    data = {name: {"features": value["features"][:7]} for name, value in reference.items() if "features" in value}
    found = numbers("data_frechet", own, {}, data=data)
    expected = frechet_distance(own["other"]["features"], reference["other"]["features"][:7])
    assert found["data_frechet_other"].value == pytest.approx(expected)


@pytest.mark.parametrize("name", METRICS)
def test_every_interval_of_a_report_contains_its_estimate(name: str) -> None:
    """Also as they are rounded in report.json, for samples that are like the reference and for others."""
    wanted = torch.tensor([[0, 0], [1, 1], [2, -1], [0, 1]])

    def distance(first: Tensor, second: Tensor) -> Tensor:
        return (first - second).abs().flatten(1).mean(1)

    for seed in range(3):
        reference = rows(100 + seed)
        data = {space: {"features": reference[space]["features"][:7]} for space in ("plain", "other")}
        many = setting(wanted=wanted, lpips=distance, data=data)
        methods = [("far", rows(seed)), ("same", reference), ("broken", scaled(rows(seed), 0.0))]
        measured = compare(many, [name], methods, reference)
        report = made(rows=[Row(method, 4, 1.0, own) for method, own in measured.items()])
        for metric in report.to_dict()["metrics"]:
            intervals = [value for value in metric["values"] if value["low"] is not None]
            assert all(value["low"] <= value["value"] <= value["high"] for value in intervals), metric
            if "corrected" in metric["key"]:
                assert len(intervals) == len(methods)
            elif "frechet" not in metric["key"]:
                assert intervals


def scaled(own: dict[str, dict[str, Tensor]], factor: float) -> dict[str, dict[str, Tensor]]:
    """Rows whose features are this many times as large."""
    return {
        name: {key: value * factor if value.is_floating_point() else value for key, value in tensors.items()}
        for name, tensors in own.items()
    }


def test_diversity_and_coverage_are_of_the_layout_where_there_is_one() -> None:
    own, reference = rows(0), rows(100)
    found = numbers("diversity", own, reference)
    assert found["diversity"].value == pytest.approx(pairwise_distance(own["plain"]["layout"], GROUPS))
    expected = seed_diversity(own["other"]["features"], GROUPS, cosine_distance)
    assert found["diversity_other"] == expected and found["diversity_other"].samples == PROMPTS
    own["plain"]["layout"] = 0.3 * own["plain"]["layout"]  # reaches less than the reference
    found = numbers("coverage", own, reference)
    expected = manifold(own["plain"]["layout"], reference["plain"]["layout"])
    assert expected.recall.value < expected.precision.value
    assert (found["recall"], found["coverage"], found["precision"]) == (
        expected.recall,
        expected.coverage,
        expected.precision,
    )
    assert numbers("coverage", own, own)["recall"].value == 1


def test_motion_is_of_all_clips_and_joins_the_features_of_clips() -> None:
    own, reference = rows(0), rows(100)
    found = numbers("motion", own, reference)
    assert found["flow"].value == 5.5 and found["dynamic_degree"].value == 0.25 and found["smoothness"].value == 0.5
    assert set(numbers("motion", own, reference, frames=2)) == {"flow", "dynamic_degree"}
    joined = [torch.cat([r["plain"]["clip"], r["motion"]["statistics"]], 1) for r in (reference, own)]
    expected = frechet_distance(*standardised(*joined))
    assert numbers("clip_frechet", own, reference)["clip_frechet"].value == pytest.approx(expected)


def test_agreement_is_of_what_each_prompt_names() -> None:
    wanted = torch.tensor([[0, 0], [1, 1], [2, -1], [0, 1]])  # the samples of a prompt show 0, 1 and 2
    found = numbers("agreement", rows(0), {}, wanted=wanted)["agreement"]
    assert (found.value, found.samples) == (3 / 12, 12)


def test_lpips_is_of_middle_frames_of_seeds_of_one_prompt() -> None:
    own, asked = rows(0), []

    def distance(first: Tensor, second: Tensor) -> Tensor:
        asked.append(torch.stack([first, second], 1))
        return torch.full((len(first),), 0.25)

    found = numbers("lpips", own, {}, lpips=distance)["lpips"]
    assert (found.value, found.samples) == (0.25, PROMPTS)
    pairs = torch.cat(asked)
    middle = own["preview"]["frames"][:, 2] / 255
    assert len(pairs) == PROMPTS * 3
    torch.testing.assert_close(pairs[0], middle[[0, 1]])
    torch.testing.assert_close(pairs[3], middle[[3, 4]])


def test_what_a_metric_needs() -> None:
    assert inapplicable(METRICS["motion"], 1, {"data"}) and not inapplicable(METRICS["motion"], 2, set())
    assert inapplicable(METRICS["lpips"], 1, {"data"}) and not inapplicable(METRICS["lpips"], 1, {"lpips"})
    assert shortage(METRICS["coverage"], 5, 1) and not shortage(METRICS["coverage"], 3, 2)
    assert shortage(METRICS["diversity"], 50, 1) and not shortage(METRICS["diversity"], 1, 2)


# --- reports ------------------------------------------------------------


def made(**changes: Any) -> Report:
    columns = [
        Quantity("frechet", "FD-X to the teacher", "what it is", "lower", "samples", ".4g", "a source"),
        Quantity("recall", "recall (X)", "what it is", "higher", "samples", ".1%"),
    ]
    estimates = [Estimate(1.23456789, 1.0, 1.5, 12), Estimate(0.5, math.nan, math.nan, 12)]
    measured = [Measurement(c, e) for c, e in zip(columns, estimates, strict=True)]
    fields: dict[str, Any] = {
        "prompts": ["a | b"] * 4,
        "seeds": 3,
        "features": "FD-X",
        "rows": [Row("m", 4, 2.349, measured)],
    }
    return Report(**fields | {"settings": {"guidance": 3.0}} | changes)


def test_rows_are_bare_numbers_and_metrics_have_intervals() -> None:
    data = json.loads(json.dumps(made().to_dict(), allow_nan=False))
    (row,) = data["rows"]
    assert row == {"method": "m", "network_evaluations": 4, "frechet": 1.2346, "recall": 0.5, "seconds": 2.35}
    first, second = (metric["values"][0] for metric in data["metrics"])
    assert first == {"method": "m", "value": 1.2346, "low": 1.0, "high": 1.5, "count": 12}
    assert second["low"] is None


def test_the_text_has_the_headline_the_intervals_and_the_reasons() -> None:
    text = made(not_measured={"diversity": "needs more"}, plans={"m": "step 0"}, floor="m").to_markdown(
        [("a | b", "p.png")]
    )
    assert "| method | network evaluations | FD-X to the teacher | seconds |" in text
    assert "| m | 4 | 1.235 | 2.3 |" in text
    assert "| FD-X to the teacher | lower | 1.235 [1, 1.5] | 12 samples |" in text
    assert "| recall (X) | higher | 50.0% | 12 samples |" in text
    for words in ("what it is (a source).", "Not measured: diversity needs more.", "[a \\| b](p.png)", "step 0"):
        assert words in text
    assert "row of m is the noise floor" in text and "guidance: 3.0" in text


def test_a_picture_shows_every_method_s_sample_in_its_place(tmp_path: Path) -> None:
    colours = torch.randint(
        256, (2, 3, 2, 3), generator=torch.Generator().manual_seed(0)
    ).byte()  # method, prompt, seed
    methods = [(f"m{i}", c[:, :, None, :, None, None].expand(3, 2, 1, 3, 64, 64)) for i, c in enumerate(colours)]
    written = write_pictures(tmp_path, ["one", "two", "three"], [0, 2], methods)
    assert written == [("one", "report/prompt-000.png"), ("three", "report/prompt-002.png")]
    overview = Image.open(tmp_path / "report.png").convert("RGB")
    found = [colour for _, colour in overview.getcolors(10**6)]
    for method in range(2):
        for prompt in range(3):
            for seed in range(2):
                assert (tuple(colours[method, prompt, seed].tolist()) in found) == (prompt in (0, 2))
    sheet = Image.open(tmp_path / "report" / "prompt-002.png").convert("RGB")
    line = sheet.height - 2 - 64  # through the last seed
    across = [sheet.getpixel((x, line)) for x in range(sheet.width)]
    first, second = (tuple(colours[method, 2, 1].tolist()) for method in range(2))
    assert across.count(first) == across.count(second) == 128 and across.index(first) < across.index(second)


# --- real data ------------------------------------------------------------


def test_pictures_are_cut_to_the_size_of_samples(tmp_path: Path) -> None:
    wide = Image.new("RGB", (64, 32), "red")
    wide.paste("blue", (16, 0, 48, 32))
    for name in ("a.png", "b.PNG", "c.txt"):
        wide.save(tmp_path / name, format="PNG")
    size = SampleSize(16, 16, 1, 12)
    files = data_files(tmp_path, size)
    assert [path.name for path in files] == ["a.png", "b.PNG"]
    pixels = read_sample(files[0], size)
    assert pixels.shape == (1, 3, 16, 16)
    assert pixels[0, :, 8, 8].tolist() == [0, 0, 1] and pixels[0, 0].max() < 0.2, "the middle, all of it blue"


def test_clips_are_read_from_their_first_frame_and_may_not_be_short(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (32, 32), (40 * t, 0, 0)) for t in range(6)]
    for name in ("a.gif", "b.gif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    size = SampleSize(16, 16, 5, 12)
    pixels = read_sample(data_files(tmp_path, size)[0], size)
    assert (pixels[:, 0, 8, 8] * 255).round().tolist() == [0, 40, 80, 120, 160]
    with pytest.raises(UserError, match=r"a\.gif has 6 frames, expected at least 9"):
        read_sample(tmp_path / "a.gif", SampleSize(16, 16, 9, 12))


def test_clips_of_a_video_file_are_in_the_right_colours(tmp_path: Path) -> None:
    import cv2

    path = tmp_path / "a.avi"
    video = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 8, (32, 32))
    for _ in range(5):
        video.write(cv2.cvtColor(torch.tensor([200, 40, 0]).byte().expand(32, 32, 3).numpy(), cv2.COLOR_RGB2BGR))
    video.release()
    pixels = read_sample(path, SampleSize(16, 16, 5, 12))
    assert pixels.shape == (5, 3, 16, 16)
    torch.testing.assert_close(pixels[0, :, 8, 8] * 255, torch.tensor([200.0, 40, 0]), atol=20, rtol=0)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"hello")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "c.png").write_bytes(whole[: len(whole) // 2])
    for name in ("b.png", "c.png"):
        with pytest.raises(UserError, match=rf"cannot read .*{name} .*take it out") as caught:
            read_sample(tmp_path / name, SampleSize(16, 16, 1, 12))
        assert len(str(caught.value).splitlines()) == 1
    too_large = mock.patch("PIL.Image.open", side_effect=Image.DecompressionBombError("a bomb"))
    with too_large, pytest.raises(UserError, match=r"a bomb"):
        read_sample(tmp_path / "a.png", SampleSize(16, 16, 1, 12))
