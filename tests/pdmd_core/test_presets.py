from __future__ import annotations

import pytest

from pdmd_core.phases import PhasePlan, PhasePlanError
from pdmd_core.presets import PRESETS, list_presets


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_plan_with_a_source(name: str) -> None:
    preset, plan = PRESETS[name], PhasePlan.preset(name)
    assert [len(phase.sigmas) for phase in plan.phases] == list(preset.steps)
    assert len(preset.files) in (0, len(plan))
    assert preset.source and "/" in preset.base and preset.guidance >= 0
    if preset.shift is not None:
        assert plan.shift == pytest.approx(preset.shift)
    assert all(file.count("/") >= 2 and file.endswith(".safetensors") for file in preset.files)
    assert name in list_presets()


def test_the_plan_of_wan_2_2() -> None:
    plan = PhasePlan.preset("wan2.2-lightx2v-4step")
    assert plan == PhasePlan.from_steps([2, 2], shift=5.0)


def test_the_shift_of_flux_2_is_that_of_its_pipeline() -> None:
    import math

    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    mu = compute_empirical_mu(image_seq_len=1024 * 1024 // 256, num_steps=4)
    assert PRESETS["flux2-klein-4b"].shift == pytest.approx(math.exp(mu))


def test_the_sigmas_of_ltx_2_are_those_of_diffusers() -> None:
    from diffusers.pipelines.ltx2.utils import DISTILLED_SIGMA_VALUES

    assert list(PhasePlan.preset("ltx2-distilled").sigmas) == DISTILLED_SIGMA_VALUES


def test_an_unknown_name_is_one_line_with_near_ones() -> None:
    with pytest.raises(
        PhasePlanError, match=r"no preset 'wan2.2-lightx2v', did you mean wan2.2-.*plan --list"
    ) as caught:
        PhasePlan.preset("wan2.2-lightx2v")
    assert "\n" not in str(caught.value)
    with pytest.raises(PhasePlanError, match=r"^no preset 'xyz'\. All are listed by phased-dmd plan --list$"):
        PhasePlan.preset("xyz")
