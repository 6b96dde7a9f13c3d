"""Names of FLUX.2's layers, and guidance, which its two pipelines have in different ways."""

from __future__ import annotations

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from torch import Tensor, nn

from pdmd_core.experts import BaseModel, Expert, Manifest
from pdmd_core.experts.hub.card_code import stock_code
from pdmd_core.families.flux2 import Flux2Family
from pdmd_core.phases import PhasePlan
from pdmd_core.pipelines.guidance import Guidance, guidances_of
from pdmd_core.roles import Roles, RoleSpec
from tests.helpers.families.flux2 import flux2, flux2_klein
from tests.helpers.tiny import randn

FLUX2 = Flux2Family()


def test_targets_are_all_linear_layers_of_the_blocks() -> None:
    network = flux2().transformer
    linear = {n for n, m in network.named_modules() if isinstance(m, nn.Linear) and n.startswith(FLUX2.blocks)}
    roles = Roles(network, FLUX2, {"expert": RoleSpec("lora", 2, 1.0)})
    assert {key.rpartition(".")[0] for key in roles.state_dict("expert")} == linear
    assert {FLUX2.native_module_name(name) for name in linear} == linear
    with pytest.raises(ValueError, match="'x' has no weight of its own"):
        FLUX2.native_weight_name("x")


def test_a_target_that_no_block_has_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"no linear layer of the blocks .* ends in proj_out") as caught:
        Roles(flux2().transformer, FLUX2, {"expert": RoleSpec("lora", 2, 1.0, ("proj_out",))})
    assert len(str(caught.value).splitlines()) == 1


def test_guidance_of_dev_is_an_input_and_of_klein_a_second_evaluation() -> None:
    assert FLUX2.guidance_arguments(1.0, Flux2Pipeline) == {} and guidances_of(flux2()) == []
    assert FLUX2.guidance_arguments(3.0, Flux2KleinPipeline) == {"guidance_scale": 3.0}
    assert guidances_of(flux2_klein()) == [Guidance("guidance_scale", 1.0)]
    seen: list[Tensor | None] = []
    for network in (flux2().transformer, flux2_klein().transformer):
        network.register_forward_pre_hook(lambda n, a, k: seen.append(k["guidance"]), with_kwargs=True)
        with torch.no_grad():
            FLUX2.velocity(network, randn(2, 16, 2, 3), 0.5, {"prompt_embeds": randn(2, 5, 48)})
    assert torch.equal(seen[0], torch.tensor([4.0, 4.0])) and seen[1] is None


@pytest.mark.parametrize(
    ("pipeline", "words"), [("Flux2Pipeline", "num_inference_steps=2,\n    callback"), ("Flux2KleinPipeline", "e=1,\n")]
)
def test_the_code_of_a_card_leaves_the_guidance_of_dev_as_it_is(pipeline: str, words: str) -> None:
    plan = PhasePlan.from_steps([1, 1])
    experts = tuple(Expert(p.name, f"{p.name}.safetensors", "lora", "", rank=2, alpha=2.0) for p in plan.phases)
    base = BaseModel("black-forest-labs/FLUX.2-dev", FLUX2.architecture, FLUX2.name)
    code = stock_code(Manifest(base, plan, experts, 1.0, {"pipeline": pipeline}), "experts", "a fox", False)
    assert words in code and ("guidance_scale" in code) == (pipeline == "Flux2KleinPipeline")
