"""What CI, hooks and documents call are targets of the Makefile, and what a target names is there."""

from __future__ import annotations

import re
import subprocess

import yaml

from tests.helpers.source import ROOT

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def targets() -> set[str]:
    """Those that ``make help`` lists."""
    done = subprocess.run(["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {line.split()[1] for line in done.stdout.splitlines()}


def test_every_target_is_listed_with_what_it_does() -> None:
    phony = re.search(r"^\.PHONY:((?:.*\\\n)*.*)$", MAKEFILE, re.MULTILINE)
    assert phony
    assert targets() == set(phony.group(1).replace("\\\n", " ").split())


def test_ci_and_the_hook_call_make_alone() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    called = []
    for job in workflow["jobs"].values():
        (command,) = (step["run"] for step in job["steps"] if "run" in step)
        assert command == "make ${{ matrix.target }}"
        called += job["strategy"]["matrix"]["target"]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    called += [hook["entry"].removeprefix("make ") for repo in hooks["repos"] for hook in repo["hooks"]]
    script = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    called += [line.removeprefix("make ") for line in script if line.startswith("make ")]
    assert {"check", "test", "audit"} <= set(called) <= targets()


def test_documents_call_targets_that_exist() -> None:
    known = targets()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = path.read_text(encoding="utf-8")
        found = re.findall(r"`make ([a-z-]+)|^make ([a-z-]+)(?: +#.*)?$", text, re.MULTILINE)
        assert {first or second for first, second in found} <= known, path


def test_what_the_fast_tests_name_is_there() -> None:
    done = subprocess.run(
        ["make", "--no-print-directory", "--eval=show: ; @echo $(FAST)", "show"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    named = done.stdout.split()
    assert len(named) > 10
    assert not [name for name in named if not list((ROOT / "tests").glob(name))]
