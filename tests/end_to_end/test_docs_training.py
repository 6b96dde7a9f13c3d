"""docs/training.md: its commands run on a tiny teacher, its tables are those of the code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from tests.helpers.configs import changed
from tests.helpers.tiny import save_wan_pipeline
from training import distill, evaluate, sample
from training.config.keys import fields_of
from training.config.schema import DistillConfig, with_values
from training.monitoring import page

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [shlex.split(line) for block in BLOCKS for line in block.splitlines()]
TINY = {"400": "1", "updates=[1000,2000]": "updates=[1,2]"}
"""Numbers of updates in commands, and what they are in a run of one update a phase."""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the root of the repository, with a tiny model behind every recipe."""
    folder = tmp_path_factory.mktemp("clone")
    role = {"kind": "lora", "rank": 2, "alpha": 2, "lr": 1e-3}
    tiny: dict[str, Any] = {
        "model": {"path": str(save_wan_pipeline(folder / "teacher")), "height": 16, "width": 16},
        "data.prompts": str(folder / "words.txt"),
        "plan": {"steps": [1, 1], "shift": 3.0},
        "generator": role,
        "fake": role,
        "updates": 1,
        "batch_size": 2,
        "fake_updates": 1,
        "checkpoints.every": 1,
        "validation.seeds": 1,
        "monitoring.log_every": 1,
    }
    tiny["model"]["max_sequence_length"] = 12
    (folder / "words.txt").write_text("a fox\na panda\n", encoding="utf-8")
    (folder / "words.jsonl").write_text('{"prompt": "a fox"}\n{"prompt": "a panda"}\n', encoding="utf-8")
    (folder / "training" / "configs").mkdir(parents=True)
    for recipe in (ROOT / "training" / "configs").glob("*.yaml"):
        own = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        settings = {**with_values({}, tiny), "output_dir": own["output_dir"]}
        if own["objective"].get("expert_loss") == "denoising":  # its bank needs one phase
            settings |= {"objective": own["objective"], "rollouts": {"bank": 3}, "plan": {"steps": [2], "shift": 3.0}}
        (folder / "training" / "configs" / recipe.name).write_text(yaml.safe_dump(settings), encoding="utf-8")
    return folder


def test_every_command_does_what_the_text_says(
    clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(clone)
    dry, encoded, ran = 0, [], 0
    for command in COMMANDS:
        for word in command:
            if word.endswith(".yaml"):
                assert (ROOT / word).exists(), word
        if command[0] == "tensorboard":
            assert command[1:] == ["--logdir", "runs/qwen/logs"] and list(Path("runs/qwen/logs").rglob("events*"))
            continue
        if command[0] == "torchrun":
            options = get_args_parser().parse_args(command[1:])
            command = ["python", options.training_script, *options.training_script_args]
        assert command[0] == "python"
        if command[1] == "-m":
            assert command[2] == "training.monitoring.page" and page.main(command[3:]) == 0
            continue
        program, arguments = command[1], command[2:]
        if "--push_to_hub" in arguments:  # what it does: docs/hub.md and its test
            assert distill.make_parser().parse_args(arguments).output_dir == Path("runs/qwen")
        elif program == "training/sample.py":
            assert sample.main(arguments) == 0 and Path("fox.png").exists()
        elif program == "training/evaluate.py":  # what it does: docs/evaluation.md and its test
            assert evaluate.make_parser().parse_args(arguments).seeds == 8
        else:
            assert program == "training/distill.py"
            gpus = [arguments.index("--gpus")] if "--gpus" in arguments else []
            for place in gpus:
                arguments[place + 1] = "2"
            arguments = [TINY.get(word, word) for word in arguments]
            capsys.readouterr()
            assert distill.main(arguments) == 0, capsys.readouterr().err
            said = capsys.readouterr().out
            dry += "static memory" in said
            encoded += re.findall(r"2 examples are encoded in (\S+)", said)
            ran += "experts: " in said
    assert dry == 2 and ran == 10 and len(encoded) == 2 and encoded[0] == encoded[1]
    assert Path("runs/qwen/report.html").stat().st_size > 5000


def test_the_data_sections_are_configurations(clone: Path) -> None:
    text, *_ = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    settings = yaml.safe_load((clone / "training/configs/embedded_demo.yaml").read_text(encoding="utf-8"))
    data = changed(settings, **yaml.safe_load(text)).data
    assert data.prompt_column == "caption" and isinstance(data.buckets, list) and len(data.buckets) == 3
    shared = [{"width": 16, "height": 16, "share": 0.5}]
    assert changed(settings, **{"data.buckets": shared}).data.buckets[0].share == 0.5
    assert changed(settings, **{"data.buckets": "columns"}).data.buckets == "columns"


def test_the_keys_and_signs_of_the_tables_exist() -> None:
    known = {name for name, _, _ in fields_of(DistillConfig)}
    tables = "".join(line for line in TEXT.splitlines() if line.startswith("|") and "recipe" not in line)
    for key in re.findall(r"`([a-z]+(?:\.[a-z_]+)+)(?:: \w+)?`", tables):
        assert key in known or key.startswith("words"), key
    for key in re.findall(r"`([a-z_]+): \w+`", tables):
        assert key in known, key
    files = (ROOT / "training" / "monitoring").glob("*alerts.py")
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    names = "fake_lags|lost_steps|small_steps|diversity|saturation|contrast|motion|clipped|broken|frechet"
    kinds = set(re.findall(rf'"({names}|teacher_distance|score_distance)"', source))
    assert len(kinds) == 12
    kinds |= {"generator_gradient", "fake_gradient"}
    section = TEXT.partition("## When it goes wrong")[2]
    assert kinds == {kind for kind in re.findall(r"`([a-z_]+)`", section) if kind in kinds}
