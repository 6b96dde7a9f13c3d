"""A watched run: what lies there afterwards, what resumes, and that watching never ends it."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.configs import changed
from tests.helpers.interrupted import run_and_stop
from training.config.schema import DistillConfig
from training.loop.build import build_run
from training.loop.resumption import Resume
from training.loop.trainer import Trainer
from training.monitoring import observer as observer_module
from training.monitoring.jsonl import JsonLines, monitoring_log
from training.monitoring.page import main as page_main
from training.monitoring.page import write_page

SEEN = ("performance", "validations", "warnings")


class Page(HTMLParser):
    """Headings, texts and sources of a page; every tag that is opened is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "line", "rect", "circle", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def run(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with two warnings, validations and TensorBoard."""
    folder = tmp_path_factory.mktemp("watched")
    prompts = folder / "prompts.txt"
    prompts.write_text("a panda\na fox\n", encoding="utf-8")
    role = {"kind": "lora", "rank": 4, "alpha": 4, "lr": 1e-2}
    settings: dict[str, Any] = {
        "model": {"path": str(teacher), "height": 16, "width": 16, "frames": 5, "max_sequence_length": 12},
        "data.prompts": str(prompts),
        "plan": {"steps": [2, 2], "shift": 3.0},
        "generator": role,
        "fake": role,
        "updates": 4,
        "batch_size": 2,
        "fake_updates": 1,
        "monitoring.log_every": 2,
        "checkpoints.every": 4,
        "validation.every": 2,
        "validation.seeds": 2,
        "monitoring.window": 3,
        "monitoring.smallest_drift": 1e6,
        "monitoring.share_of_time": 1,
        "monitoring.diversity_fall": 0.01,
        "monitoring.teacher_distance_rise": 100.0,
        "output_dir": str(folder / "run"),
    }
    Trainer(build_run(changed({}, **settings))).run()
    return folder / "run"


def test_a_watched_run_leaves_speed_looks_warnings_and_small_samples(run: Path) -> None:
    performance, validations, warnings = (monitoring_log(run, name).read() for name in SEEN)
    assert [line["update"] for line in performance] == [2, 4, 6, 8]
    assert performance[-1]["seconds_left"] == 0 < performance[0]["seconds_left"]
    names = ["update-000000", "update-000002", "update-000004", "high_noise-final"]
    names += ["update-000006", "update-000008", "low_noise-final"]
    assert [line["name"] for line in validations] == names
    assert [line["expert"] for line in validations] == ["high_noise"] * 4 + ["low_noise"] * 3
    assert all(line["diversity"] > 0 for line in validations)
    assert [(line["kind"], line["expert"]) for line in warnings] == [
        ("small_steps", "high_noise"),
        ("small_steps", "low_noise"),
    ]
    for name in names:
        with Image.open(run / "watch/samples" / f"{name}.webp") as picture:
            assert picture.size == (34, 34), "two prompts, two seeds"
        with Image.open(run / "watch/samples" / f"{name}.gif") as clip:
            assert clip.n_frames == 5


def test_tensorboard_has_numbers_histograms_samples_clips_and_the_configuration(run: Path) -> None:
    board = EventAccumulator(str(run / "logs" / "phased_dmd"), {"histograms": 0, "images": 0}).Reload()
    tags = board.Tags()
    losses = {"generator_loss", "fake_loss", "generator_grad_norm", "fake_grad_norm", "score_distance"}
    assert losses | {"performance/samples_per_second", "performance/peak_memory_gib"} <= set(tags["scalars"])
    assert {"samples", "clips"} <= set(tags["images"]) and "config/text_summary" in tags["tensors"]
    drawn = {name: board.Histograms(f"score_sigmas/{name}") for name in ("generator", "fake")}
    assert [event.step for event in drawn["fake"]] == [2, 4, 6, 8]
    assert drawn["fake"][0].histogram_value.num == 4, "two updates of two samples"
    assert drawn["fake"][0].histogram_value.min > 0.7 > drawn["fake"][-1].histogram_value.min, "the phase's range"
    first = board.Images("clips")[0].encoded_image_string
    assert Image.open(io.BytesIO(first)).n_frames == 5


def test_the_page_holds_everything_and_needs_nothing(run: Path) -> None:
    page = Page(run / "report.html")
    assert page.tags.count("img") == 9 and page.tags.count("svg") > 6
    assert all(source.startswith("data:image/") for source in page.sources)
    for source in page.sources:
        Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2]))).load()
    for words in ("Finished: 8 updates", "raise generator.lr", "fake/teacher distance", "high_noise", "Checkpoints"):
        assert words in page.text
    assert "smallest_drift: 1000000.0" in page.text, "the configuration"
    assert "low_noise.safetensors" in page.text and "update-00000008" in page.text


def test_the_page_is_written_again_by_its_own_command(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "report.html").read_text(encoding="utf-8")
    (run / "report.html").unlink()
    assert page_main([str(run)]) == 0 and (run / "report.html").read_text(encoding="utf-8") == before
    capsys.readouterr()
    assert page_main([str(run / "nothing")]) == 2
    assert "no config.yaml" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("", encoding="utf-8")
    assert page_main([str(tmp_path)]) == 2
    assert "a config is a mapping of keys to values, found NoneType" in capsys.readouterr().err


def test_a_page_of_hostile_names_stays_a_page(config: DistillConfig, tmp_path: Path) -> None:
    run = tmp_path / "<script>alert(1)<script>"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    monitoring_log(run, "warnings").add({"update": 1, "expert": "<b>&", "text": "</p><script>"})
    page = Page(write_page(run))
    assert "script" not in page.tags and "<b>&: </p><script>" in page.text and "0 of 6 updates." in page.text


def test_a_resumed_run_keeps_what_was_seen_and_does_not_repeat_itself(config: DistillConfig) -> None:
    limits = {"monitoring.window": 3, "monitoring.smallest_drift": 1e6, "monitoring.share_of_time": 1}
    watched = changed(config, **limits, **{"validation.every": 1, "checkpoints.every": 2})
    run_and_stop(Trainer(build_run(watched)), after=5)
    run = config.output_dir
    assert [line["update"] for line in monitoring_log(run, "performance").read()] == [1, 2, 3, 4, 5]
    Trainer(build_run(watched, Resume())).run()
    assert [line["update"] for line in monitoring_log(run, "performance").read()] == [1, 2, 3, 4, 5, 6]
    assert [line["update"] for line in monitoring_log(run, "validations").read()] == [0, 1, 2, 3, 3, 4, 5, 6, 6]
    assert len(monitoring_log(run, "warnings").read()) == 1, "the second phase is too short after its resumption"


@pytest.mark.parametrize(
    "broken",
    [
        "save_small",
        "write_page",
        "WeightDrift",
        "as_values",
        "Alerts.after_update",
        "Speed.after_update",
    ],
)
def test_nothing_that_fails_in_watching_ends_a_run(
    broken: str, config: DistillConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(build_run(changed(config, updates=2, **{"validation.every": 1})))
    failing: Callable[..., Any] = mock.Mock(side_effect=OSError("no space\nleft on device"))
    with mock.patch(f"{observer_module.__name__}.{broken}", failing):
        assert (trainer.run() / "phased_experts.json").exists()
    said = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(said) == 1, "each failure is said once"
    assert "Observer failed, the run goes on: OSError: no space left on device" in said[0]


def test_the_page_waits_for_the_end_when_watching_takes_too_long(config: DistillConfig) -> None:
    pages = mock.Mock(return_value=None)
    trainer = Trainer(build_run(changed(config, **{"validation.every": 1, "monitoring.share_of_time": 0})))
    with mock.patch(f"{observer_module.__name__}.write_page", pages):
        trainer.run()
    assert pages.call_count == 2, "before the first update nothing is known of its time"
    trainer = Trainer(build_run(changed(config, **{"validation.every": 1, "monitoring.page": False})))
    with mock.patch(f"{observer_module.__name__}.write_page", pages):
        trainer.run()
    assert pages.call_count == 2


def test_large_samples_are_shown_small(tmp_path: Path) -> None:
    pixels = torch.rand(4, 33, 3, 48, 320)
    picture, clip = observer_module.save_small(tmp_path / "large", pixels, columns=2)
    with Image.open(picture) as image:
        assert image.size == (322, 50)
    with Image.open(clip) as image:
        assert image.n_frames == 16


def test_lines_of_updates_that_are_done_again_are_dropped(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "deep" / "lines.jsonl")
    lines.start(0)
    for update in (1, 2, 3):
        lines.add({"update": update})
    with lines.path.open("a", encoding="utf-8") as file:
        file.write('{"update": 2, "cut')
    lines.start(2)
    lines.add({"update": 3, "again": True})
    assert lines.read() == [{"update": 1}, {"update": 2}, {"update": 3, "again": True}]
    assert re.fullmatch(r"(\{.*\}\n){3}", lines.path.read_text(encoding="utf-8"))
    assert json.loads(lines.path.read_text(encoding="utf-8").splitlines()[0]) == {"update": 1}
