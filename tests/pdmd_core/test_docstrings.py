"""The examples in docstrings run as they stand, in a clone of the repository, and the central names have one."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDS_A_HUB = {"pdmd_core.experts.hub.push"}
"""Run by tests/pdmd_core/experts/hub/test_push.py."""
CENTRAL = (
    "experts.folder.PhasedExperts",
    "experts.hub.push.push_experts",
    "metrics.agreement.prompt_agreement",
    "metrics.diversity.seed_diversity",
    "metrics.frechet.frechet_distance",
    "metrics.kernel.kernel_distance",
    "metrics.manifold.manifold",
    "metrics.motion.motion",
    "flow.transition",
    "noise_level.shift_sigma",
    "phases.PhasePlan",
    "pipelines.attach.attach_experts",
    "pipelines.load.load_phased_pipeline",
    "sampling.sampling_sigmas",
    "scheduler.PhasedDMDScheduler",
)
"""What users call first."""


def modules_with_examples() -> list[str]:
    files = (path for path in (ROOT / "pdmd_core").rglob("*.py") if ">>> " in path.read_text(encoding="utf-8"))
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files}
    return sorted(names - NEEDS_A_HUB)


@pytest.mark.parametrize("module", modules_with_examples())
def test_the_examples_of_a_module_run(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted and not result.failed


@pytest.mark.parametrize("name", CENTRAL)
def test_a_central_name_has_an_example(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    documented = getattr(importlib.import_module(f"pdmd_core.{module}"), attribute)
    assert doctest.DocTestParser().get_examples(documented.__doc__)
