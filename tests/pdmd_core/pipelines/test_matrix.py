"""Every pipeline of the installed diffusers that has a transformer: equal to a loop by hand, or refused by its reason.

The table of docs/pipelines.md says which; ``python -m tests.helpers.diffusers_pipelines.outcome`` writes it.
"""

from __future__ import annotations

import re
from pathlib import Path

import diffusers
import pytest

from tests.helpers.diffusers_pipelines.build import SIZES, classes
from tests.helpers.diffusers_pipelines.outcome import ELSEWHERE, PAGE, counts, of_this_version, outcome, rows

SECONDS = {
    "BriaFiboPipeline",
    "BriaFiboEditPipeline",
    "HiDreamImagePipeline",
    "HunyuanImagePipeline",
    "HunyuanVideo15Pipeline",
    "HunyuanVideo15ImageToVideoPipeline",
    "JoyImageEditPipeline",
    "JoyImageEditPlusPipeline",
    "Kandinsky5I2IPipeline",
    "Kandinsky5T2IPipeline",
    "Kandinsky6SRPipeline",
    "LTX2DFRPipeline",
    "MotifVideoPipeline",
    "QwenImageEditInpaintPipeline",
    "QwenImageLayeredPipeline",
    "SanaPipeline",
    "StableDiffusion3ControlNetPipeline",
    "StableDiffusion3ControlNetInpaintingPipeline",
}
"""Classes that take seconds, most for sizes that are not the caller's choice."""


KNOWN = sorted(set(SIZES) & set(dir(diffusers)))
"""Older versions of diffusers have fewer."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in SECONDS else ()) for name in KNOWN]
)
def test_a_pipeline_samples_what_a_loop_by_hand_samples_or_says_why_not(name: str, kind: str) -> None:
    assert outcome(name, kind) == rows()[name][kind]


def test_the_page_is_of_the_pinned_version() -> None:
    """So that in an environment of the pins nothing here or in test_refusals.py is skipped."""
    pins = (Path(__file__).parents[3] / "constraints.txt").read_text(encoding="utf-8")
    (pinned,) = re.findall(r"^diffusers==(\d+\.\d+)\.", pins, re.MULTILINE)
    assert f"diffusers {pinned} with" in PAGE.read_text(encoding="utf-8")


@pytest.mark.skipif(not of_this_version(), reason="the table is of another version of diffusers")
def test_the_table_has_every_class_of_diffusers() -> None:
    assert set(rows()) == set(classes()) == set(SIZES) | ELSEWHERE
    assert counts(rows()) in PAGE.read_text(encoding="utf-8")
