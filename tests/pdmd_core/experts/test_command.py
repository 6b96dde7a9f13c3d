from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline

from pdmd_core.experts import MANIFEST_NAME, Manifest, PhasedExperts, lora_to_file, read_manifest
from pdmd_core.experts.__main__ import main
from pdmd_core.experts.convert import conversions as convert_module
from pdmd_core.experts.hub.card import write_card
from pdmd_core.families import family
from pdmd_core.phases import PhasePlan
from pdmd_core.scheduler import PhasedDMDScheduler
from tests.helpers.tiny import CALL, lora_roles, save_wan_pipeline, write_lora_experts

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "expert-files.md").read_text(encoding="utf-8")
PLAN = PhasePlan.from_steps([2, 2], shift=5.0)
SIZE = [CALL["width"], CALL["height"], CALL["num_frames"]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``base`` and ``experts``; not to be changed."""
    root = tmp_path_factory.mktemp("made")
    save_wan_pipeline(root / "base")
    training = {"size": SIZE, "max_sequence_length": CALL["max_sequence_length"]}
    write_lora_experts(root / "experts", PLAN, lora_roles(PLAN, 16, 6.0), "base", training)
    PhasedDMDScheduler.from_plan(PLAN).save_pretrained(root / "experts" / "scheduler")
    return root


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of its own with ``base`` and ``experts``."""
    shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def run(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


def failure(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Exit status 2, one line on standard error."""
    capsys.readouterr()
    assert run(*arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("phased-dmd: "), lines
    return lines[0]


# --- the program ------------------------------------------------------------


def test_help_teaches_every_command(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for arguments, words in (
        ([], ("inspect", "verify", "convert", "examples:", "exit status")),
        (["inspect"], ("--json",)),
        (["verify"], ("--base", "--sample", "--size")),
        (["convert"], ("--output", "--overwrite", "--rank", "--dtype", "comfyui", "diffusers", "full", "lora", "SVD")),
        (["convert"], ("--layout", "native", "kohya", "peft", "--family")),
        (["plan"], ("--list", "wan2.2-lightx2v-4step")),
        (["strength"], ("NAME=", "--strengths", "weights stay as they are")),
    ):
        command = [sys.executable, "-m", "pdmd_core.experts", *arguments, "--help"]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        assert "usage: phased-dmd" in result.stdout and all(word in result.stdout for word in words)


def test_the_console_command_is_this_program() -> None:
    script = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]["phased-dmd"]
    module, _, name = script.partition(":")
    assert getattr(import_module(module), name) is main


def test_inspecting_needs_neither_diffusers_nor_the_hub(folder: Path) -> None:
    block = "import sys; sys.modules.update(dict.fromkeys(['diffusers', 'huggingface_hub', 'peft', 'tqdm'], None)); "
    call = "from pdmd_core.experts.__main__ import main; "
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def python(arguments: list[str]) -> subprocess.CompletedProcess[str]:
        code = f"{block}{call}sys.exit(main({arguments!r}))"
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    result = python(["inspect", "experts"])
    assert result.returncode == 0 and "high_noise" in result.stdout
    result = python(["convert", "experts", "--to", "full", "--output", "out"])
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        'phased-dmd: diffusers is needed for this: pip install "phased-dmd[diffusers]"'
    ]
    assert not (folder / "out").exists()


def test_a_reader_that_leaves_early_is_no_traceback(folder: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-u", "-m", "pdmd_core.experts", "inspect", "experts"]
    result = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    os.close(write)
    assert result.returncode == 1 and result.stderr == ""


# --- the documentation ------------------------------------------------------


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_every_command_of_the_page_runs_as_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(commands) == 13
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "phased-dmd" and run(*arguments) == 0, command
    assert capsys.readouterr().err == ""
    assert [e.strength for e in read_manifest(folder / "experts").experts] == [1.0, 0.9]
    assert [e.kind for e in read_manifest(folder / "full_experts").experts] == ["full", "full"]
    assert [e.rank for e in read_manifest(folder / "lora_experts").experts] == [8, 8]
    assert {e.component for e in read_manifest(folder / "one_network").experts} == {"transformer"}
    assert len(list((folder / "comfyui_files").glob("*.safetensors"))) == 2
    (code,) = blocks("python")
    variables: dict[str, Any] = {}
    exec(code, variables)  # noqa: S102 - the code that users are told to run
    assert type(variables["pipe"]) is WanPipeline and isinstance(variables["pipe"].scheduler, PhasedDMDScheduler)
    assert isinstance(DiffusionPipeline.from_pretrained("pipeline"), WanPipeline)


def test_the_page_s_manifest_is_a_manifest_with_all_fields() -> None:
    (text,) = blocks("json")
    manifest = Manifest.from_json(text)
    assert json.loads(text) == manifest.to_dict()
    for key in [*json.loads(text), *(f"experts[].{name}" for name in ("file", "kind", "sha256", "component"))]:
        assert f"`{key}`" in PAGE or f"`{key}." in PAGE, key


def test_the_page_s_key_names_are_those_of_a_written_file() -> None:
    state = {"blocks.0.attn1.to_q.lora_A": torch.ones(2, 3), "blocks.0.attn1.to_q.lora_B": torch.ones(3, 2)}
    keys = [key.replace("blocks.0.self_attn.q", "<module>") for key in lora_to_file(state, 1.0, family("wan"))]
    assert all(f"`{key}`" in PAGE for key in keys) and "`blocks.0.self_attn.q`" in PAGE


def test_every_target_is_in_the_page() -> None:
    with pytest.raises(SystemExit):
        main(["convert", "x", "--to", "gguf", "--output", "y"])
    rows = re.findall(r"^\| `(\w+)` \|", PAGE.split("| `--to` |")[1].split("\n\n")[0], re.MULTILINE)
    assert set(rows) == {"full", "lora", "diffusers", "comfyui"}


# --- what is printed --------------------------------------------------------


def test_inspect_prints_text_or_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", "experts") == 0
    assert "lora, rank 16, alpha 6" in capsys.readouterr().out
    assert run("inspect", "experts", "--json") == 0
    assert json.loads(capsys.readouterr().out)["experts"][1]["rank"] == 16


def test_verify_prints_a_table_and_its_status(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", "experts") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12 and lines[-1] == "all 11 checks passed"
    assert all(line.startswith("pass  ") for line in lines[:-1])
    path = folder / "experts" / "low_noise.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert run("verify", "experts", "--sample") == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("FAIL  low_noise: sha256 ")]
    assert lines[-1] == "2 of 12 checks failed"


def test_convert_states_dtypes_and_errors(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("convert", "experts", "--to", "full", "--dtype", "bfloat16", "--output", "full") == 0
    lines = ["high_noise: stored as bfloat16, float32", "low_noise: stored as bfloat16, float32", "full"]
    assert capsys.readouterr().out.splitlines() == lines
    assert run("convert", "experts", "--to", "lora", "--rank", "4", "--output", "lora") == 0
    lines = capsys.readouterr().out.splitlines()
    noted = read_manifest(folder / "lora").training["conversions"][0]["experts"]
    for line, (name, found) in zip(lines[:4:2], noted.items(), strict=True):
        assert line.startswith(f"{name}: relative error {found['relative_error_mean']:.2%} on average")
        assert f"{found['relative_error_worst']:.2%} at worst ({found['worst_module']})" in line
    assert re.fullmatch(r"  on average at rank 1: \d+\.\d\d%, 2: \d+\.\d\d%", lines[1])
    for target in ("comfyui", "diffusers"):
        assert run("convert", "experts", "--to", target, "--output", target) == 0
        assert capsys.readouterr().out.splitlines()[0] == "high_noise: stored as float32"


# --- what a user can get wrong ----------------------------------------------


def edit_manifest(folder: Path, change: Callable[[Manifest], Manifest]) -> None:
    path = folder / "experts" / MANIFEST_NAME
    path.write_text(change(read_manifest(folder / "experts")).to_json())


def test_user_mistakes_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = ("--to", "full", "--output", "out")
    for command in (("inspect", "none"), ("verify", "none"), ("convert", "none", *full)):
        assert "none: no such f" in failure(capsys, *command)
    assert "phased_experts.json" in failure(capsys, "convert", "base", *full)
    assert "give --base" in failure(capsys, "convert", "experts", *full, "--base", "nowhere/at/all")
    (folder / "out").mkdir()
    assert "--overwrite" in failure(capsys, "convert", "experts", *full)
    (folder / "out").rmdir()
    assert "at most 24" in failure(capsys, "convert", "experts", "--to", "lora", "--rank", "99", "--output", "out")
    path = folder / "experts" / "low_noise.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\x01")
    assert "sha256" in failure(capsys, "convert", "experts", *full)
    path.unlink()
    for command in (("inspect", "experts"), ("verify", "experts"), ("convert", "experts", *full)):
        assert "low_noise.safetensors of expert 'low_noise' is missing" in failure(capsys, *command)
    path.write_bytes(content)
    edit_manifest(folder, lambda m: replace(m, base=replace(m.base, family="sora")))
    assert "unknown model family 'sora'" in failure(capsys, "convert", "experts", *full)
    assert run("inspect", "experts") == 0, "a family is not needed to look"
    assert {path.name for path in folder.iterdir()} == {"base", "experts"}


def test_a_full_disk_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*arguments: Any) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(convert_module, "write_weights", no_space)
    line = failure(capsys, "convert", "experts", "--to", "full", "--output", "out")
    assert "No space left" in line and "make room" in line and not (folder / "out").exists()


def test_an_interrupt_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_module, "write_weights", interrupt)
    assert run("convert", "experts", "--to", "full", "--output", "out") == 130
    assert capsys.readouterr().err == "phased-dmd: stopped, nothing was changed\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["inspct", "x"], "invalid choice: 'inspct'"),
        (["inspect", ""], "path: expected a path, found ''"),
        (["inspect", "x", "y"], "unexpected argument 'y'"),
        (["inspect", "x", "--jsn"], "unknown option --jsn, did you mean --json?"),
        (["convert", "experts", "--to", "lora", "--output", "x"], "--to lora needs --rank"),
        (["convert", "experts", "--to", "full", "--rank", "4", "--output", "x"], "--rank is for --to lora"),
        (["convert", "experts", "--to", "lora", "--rank", "0", "--output", "x"], "--rank: expected a whole number"),
        (["convert", "experts", "--to", "lora", "--rank", "four", "--output", "x"], "of at least 1, found 'four'"),
        (["convert", "experts", "--to", "full"], "required: --output"),
        (["convert", "experts", "--to", "full", "--output", ""], "--output: expected a path, found ''"),
        (["convert", "experts", "--to", "full", "--output", "x", "--base", ""], "--base: expected some text"),
        (["verify", "experts", "--prompt", "x"], "--prompt is for --sample"),
        (["verify", "experts", "--max_sequence_length", "3"], "--max_sequence_length is for --sample"),
        (["verify", "experts", "--sample", "--prompt", ""], "--prompt: expected some text, found ''"),
        (["verify", "experts", "--sample", "--max_sequence_length", "0"], "--max_sequence_length: expected a whole"),
        (["verify", "experts", "--sample", "--size", "16"], "--size: expected WIDTHxHEIGHT or WIDTHxHEIGHTxFRAMES"),
        (["verify", "experts", "--sample", "--size", "16x16x1x1"], "found '16x16x1x1'"),
        (["verify", "experts", "--sample", "--size", "axb"], "found 'axb'"),
        (["verify", "experts", "--sample", "--size", "16x0"], "found '16x0'"),
        (["strength", "experts"], "required: [NAME=]S"),
        (["strength", "experts", "a lot"], "expected a number, or NAME= and a number, found 'a lot'"),
        (["verify", "experts", "--sampel"], "unknown option --sampel, did you mean --sample?"),
        (["verify", "experts", "--siz", "16x16"], "unknown option --siz, did you mean --size?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_are_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and line.startswith("phased-dmd") and says in line and "_size" not in line


def test_a_folder_cannot_be_written_where_a_file_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "file").write_text("", encoding="utf-8")
    for output in ("file", "file/below"):
        with pytest.raises(SystemExit):
            run("convert", "experts", "--to", "full", "--output", output)
        assert "and file is a file" in capsys.readouterr().err


def test_what_the_system_refuses_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "File name too long" in failure(capsys, "inspect", "x" * 5000)


def test_a_strength_is_set_in_the_manifest_and_the_card_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experts = folder / "experts"
    weights = {path: path.read_bytes() for path in experts.rglob("*.safetensors")}
    assert run("strength", "experts", "0.8") == 0 and not (experts / "README.md").exists()
    assert capsys.readouterr().out == "high_noise: strength 0.8\nlow_noise: strength 0.8\n"
    write_card(experts, read_manifest(experts))
    assert run("strength", "experts", "low_noise=-1.5") == 0
    assert [e.strength for e in read_manifest(experts).experts] == [0.8, -1.5], "what is not named stays"
    assert run("inspect", "experts") == 0 and "alpha 6, strength -1.5, " in capsys.readouterr().out
    assert "strengths = [0.8, -1.5]" in (experts / "README.md").read_text(encoding="utf-8")
    capsys.readouterr()
    assert run("verify", "experts", "--sample") == 0 and "used at strength -1.5" in capsys.readouterr().out
    assert run("strength", "experts", "1") == 0
    before = (experts / MANIFEST_NAME).read_bytes()
    assert "strength" not in before.decode() and run("verify", "experts") == 0
    (experts / "README.md").write_text("my own words", encoding="utf-8")
    assert "low_noise" in failure(capsys, "strength", "experts", "lo=0.5")
    assert "from -10 to 10" in failure(capsys, "strength", "experts", "nan")
    assert "from -10 to 10" in failure(capsys, "strength", "experts", "high_noise=11")
    for arguments in (["0.5", "low_noise=0.4"], ["low_noise=0.5", "low_noise=0.4"]):
        with pytest.raises(SystemExit):
            run("strength", "experts", *arguments)
    assert (experts / MANIFEST_NAME).read_bytes() == before
    capsys.readouterr()
    assert run("strength", "experts", "0.5") == 0
    assert "of your own words" in capsys.readouterr().err and (experts / "README.md").read_text() == "my own words"
    assert {path: path.read_bytes() for path in experts.rglob("*.safetensors")} == weights
    assert run("convert", "experts", "--to", "full", "--output", "full") == 0
    assert "are full networks" in failure(capsys, "strength", "full", "0.5")


def test_sizes_reach_the_sample(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", "experts", "--sample", "--size", "32x16x5", "--max_sequence_length", "9") == 0
    assert "32x16, 5 frame(s): largest difference of a pixel" in capsys.readouterr().out
    assert run("verify", "experts", "--sample", "--size", "16X16") == 0
    assert "16x16, 1 frame(s)" in capsys.readouterr().out


def test_experts_of_a_conversion_open_like_any_other(folder: Path) -> None:
    assert run("convert", "experts", "--to", "lora", "--rank", "3", "--output", "out") == 0
    assert PhasedExperts.open("out").lora_state("high_noise")
    assert run("verify", "out", "--sample") == 0


# --- plan -------------------------------------------------------------------


def test_plans_of_released_files_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "steps", "shift", "guidance", "base"] and len(lines) > 20
    assert run("plan", "wan2.2-lightx2v-4step") == 0
    text = capsys.readouterr().out
    for part in ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "v1.1_high_noise.safetensors", "1 (none)", "0.83333", "LightX2V"):
        assert part in text
    assert "did you mean" in failure(capsys, "plan", "wan2.2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan"], "give the name of a preset, or --list"),
        (["plan", "--list", "z-image-turbo"], "give the name of a preset, or --list"),
        (["convert", "x", "--output", "y"], "one of the arguments --to --layout is required"),
        (["convert", "x", "--to", "full", "--layout", "peft", "--output", "y"], "not allowed with"),
        (["convert", "x", "--layout", "peft", "--network", "a", "--output", "y"], "--network is not for --layout"),
        (["convert", "x", "--to", "full", "--relative-to", "a", "--output", "y"], "--relative-to is for --to lora"),
        (["convert", "x", "--layout", "peft", "--rank", "3", "--output", "y"], "--rank is not for --layout"),
        (["convert", "x", "--to", "full", "--family", "wan", "--output", "y"], "--family is for --layout"),
    ],
)
def test_arguments_that_do_not_go_together(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
