"""The README: its commands and code run, its table is the one that a script wrote."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder that looks like the root of the repository; what commands write stays in it."""
    for name in ("training", "pdmd_core", "docs", "Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def run(clone: Path, *command: str) -> None:
    result = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def test_every_shell_line_is_of_a_kind_that_is_tested() -> None:
    kinds = ("make ", "python training/", "pip install ", "phased-dmd convert ")
    assert len(SHELL) >= 6
    assert not [line for line in SHELL if not line.startswith(kinds)]


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("python training/")])
def test_a_command_of_the_readme_runs(line: str, clone: Path) -> None:
    run(clone, sys.executable, *shlex.split(line, comments=True)[1:])


def test_the_make_targets_exist(clone: Path) -> None:
    targets = [shlex.split(line, comments=True)[1] for line in SHELL if line.startswith("make ")]
    assert targets == ["demo", "test"]
    for target in targets:
        run(clone, "make", "--dry-run", target)


def test_the_package_and_its_extras_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [shlex.split(line)[-1] for line in SHELL if line.startswith("pip install ")]
    assert asked == [f"{project['name']}[diffusers]", ".[training]"], "the wheel has no trainer: install the clone"
    assert {name.partition("[")[2].rstrip("]") for name in asked} <= set(project["optional-dependencies"])
    assert project["dependencies"] == [], "ComfyUI users install nothing"


def test_the_code_for_diffusers_runs_as_written(clone: Path) -> None:
    *codes, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)  # the last one: test_readme_lora_files.py
    assert len(codes) == 2
    (convert,) = (line for line in SHELL if line.startswith("phased-dmd"))
    first = f"from pdmd_core.experts.__main__ import main\nmain({shlex.split(convert)[1:]!r})"
    run(clone, sys.executable, "-c", "\nimport os\nos.remove('panda.png')\n".join([f"{first}\n{codes[0]}", codes[1]]))
    assert (clone / "panda.png").stat().st_size > 500


def test_the_table_is_the_one_that_the_demo_wrote() -> None:
    report = json.loads((ROOT / "docs" / "demo" / "report.json").read_text(encoding="utf-8"))
    table = (ROOT / "docs" / "demo" / "report.md").read_text(encoding="utf-8")
    rows = table[table.index("\n|") :].strip().partition("\n\n")[0].splitlines()  # the first table of the report
    assert len(rows) == 2 + len(report["rows"])
    for line in rows:
        assert line in README


def test_the_comparison_of_methods_is_the_one_that_the_benchmark_wrote() -> None:
    table = (ROOT / "docs" / "evidence" / "summary.md").read_text(encoding="utf-8")
    assert len(table.splitlines()) >= 6
    assert table in README


def test_every_link_is_absolute_and_its_file_exists() -> None:
    """The package page shows the README, too, where relative links lead nowhere."""
    repository = "phased-dmd/phased-dmd"
    homes = (f"https://github.com/{repository}/blob/main/", f"https://raw.githubusercontent.com/{repository}/main/")
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert len(links) > 20
    for link in links:
        if link.startswith("#"):
            heading = [title for title in re.findall(r"^#+ (.+)$", README, re.MULTILINE) if anchor(title) == link[1:]]
            assert heading, link
            continue
        assert link.startswith(("https://arxiv.org/", *homes)), link
        for home in homes:
            if link.startswith(home):
                assert (ROOT / link.removeprefix(home).partition("#")[0]).exists(), link


def anchor(title: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def test_every_file_that_contributing_links_to_exists() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        assert link.startswith("http") or (ROOT / link).exists(), link
