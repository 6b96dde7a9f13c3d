"""Every pipeline of the installed diffusers that has a transformer: equal to a loop by hand, or refused by its reason.

The table of docs/pipelines.md says which; ``python -m tests.helpers.diffusers_pipelines.outcome`` writes it.
"""

from __future__ import annotations

import pytest

from tests.helpers.diffusers_pipelines.build import SIZES, classes
from tests.helpers.diffusers_pipelines.outcome import ELSEWHERE, outcome, rows

SECONDS = {
    "BriaFiboPipeline",
    "BriaFiboEditPipeline",
    "HiDreamImagePipeline",
    "HunyuanImagePipeline",
    "HunyuanVideo15Pipeline",
    "Kandinsky5I2VPipeline",
    "Kandinsky5T2IPipeline",
    "MotifVideoPipeline",
    "SanaPipeline",
    "StableDiffusion3ControlNetPipeline",
    "StableDiffusion3ControlNetInpaintingPipeline",
}
"""Classes that take seconds, most for vocabularies of text encoders."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in SECONDS else ()) for name in sorted(SIZES)]
)
def test_a_pipeline_samples_what_a_loop_by_hand_samples_or_says_why_not(name: str, kind: str) -> None:
    assert outcome(name, kind) == rows()[name][kind]


def test_the_table_has_every_class_of_diffusers() -> None:
    table = rows()
    assert set(table) == set(classes())
    tried = {name for name, cells in table.items() if "not tried" not in cells.values()}
    assert tried == set(SIZES) | ELSEWHERE
