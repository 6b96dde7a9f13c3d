"""LoRA files in the slots of other phases."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdmd_core.experts.format.header import read_header

EXPERTS = Path(__file__).resolve().parents[2] / "training/embedded/models/experts"


@pytest.fixture(scope="module")
def warned(part):
    """What is warned of these files of a plan of two phases."""
    carried = {
        name: dict(read_header(EXPERTS / f"{name}.safetensors").metadata) for name in ("high_noise", "low_noise")
    }

    def warned(files: list[str | None], shift: float = 5.0) -> list[str]:
        plan = part("timeline").PhasePlan.from_steps([2, 2], shift)
        return part("slots").slot_warnings(plan, files, [carried.get(file or "", {}) for file in files])

    return warned


def test_experts_of_this_project_say_where_they_belong(warned) -> None:
    assert warned(["high_noise", "low_noise"]) == warned([None, "low_noise"]) == []
    exchanged = "exchange lora_1 and lora_2: each was distilled for the phase of the other"
    assert warned(["low_noise", "high_noise"]) == [exchanged]
    moved = "move lora_1 to lora_2: it was distilled for the sigmas 0.8333, 0.625"
    assert warned(["low_noise", None]) == warned(["low_noise", "low_noise"]) == [moved]
    other = "connect the plan of lora_1: it was distilled for the sigmas 1, 0.9375"
    assert warned(["high_noise", None], shift=3.0) == [other]


@pytest.mark.parametrize(
    ("files", "exchanged"),
    [
        (["wan2.2_LOW_noise.safetensors", "wan2.2_high_noise.safetensors"], True),
        (["\u4f4e\u566a.safetensors", "\u9ad8\u566a.safetensors"], True),
        (["wan_high_noise.safetensors", "wan_low_noise.safetensors"], False),
        (["lowres.safetensors", "highlight.safetensors"], False),
        (["low.safetensors", None], False),
        (["high_low.safetensors", "high.safetensors"], False),
    ],
)
def test_other_files_are_known_by_their_names_alone(warned, files: list[str | None], exchanged: bool) -> None:
    assert warned(files) == (["exchange lora_1 and lora_2: high noise comes first, say their names"] * exchanged)
