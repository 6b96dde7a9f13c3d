"""Experts on bases that are not in full precision: ComfyUI's own fp8 files, and packed weights as GGUF loaders have."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.comfyui.phased_models import TWO, sample, sigmas_of, with_lora
from tests.helpers.comfyui.tiny_models import lora


def fp8_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the ``..._fp8_scaled.safetensors`` files: a scale beside each matrix of the blocks."""
    scaled: dict[str, Tensor] = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}
    for name, value in state.items():
        if name.startswith("blocks.") and name.endswith(".weight") and value.ndim == 2:
            scale = value.abs().max() / 448
            scaled[name] = (value / scale).to(torch.float8_e4m3fn)
            scaled[name.replace(".weight", ".scale_weight")] = scale
        else:
            scaled[name] = value
    return scaled


class Packed(nn.Module):
    """A linear layer with 8-bit weights in one row; what LoRAs add is computed when it runs."""

    def __init__(self, linear: nn.Linear, key: str) -> None:
        super().__init__()
        self.shape, self.key, self.bias = linear.weight.shape, key, linear.bias
        self.scale = linear.weight.abs().max() / 127
        packed = (linear.weight / self.scale).round().to(torch.int8).view(torch.uint8).flatten()
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.added: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        import comfy.lora

        weight = self.weight.view(torch.int8).view(self.shape) * self.scale
        return nn.functional.linear(x, comfy.lora.calculate_weight(self.added, weight, self.key), self.bias)


def packed(model: Any, names: tuple[str, ...] = ("self_attn.q", "cross_attn.v")) -> Any:
    """The MODEL with these layers packed, in a patcher class of its own, as GGUF loaders have."""
    import comfy.model_patcher

    class Patcher(comfy.model_patcher.ModelPatcher):
        def patch_weight_to_device(self, key: str, *args: Any, **options: Any) -> Any:
            module = self.model.get_submodule(key.rpartition(".")[0])
            if not isinstance(module, Packed):
                return super().patch_weight_to_device(key, *args, **options)
            if key.endswith(".weight"):
                module.added = list(self.patches.get(key, ()))
            return None

        def unpatch_model(self, *args: Any, **options: Any) -> Any:
            for module in self.model.modules():
                if isinstance(module, Packed):
                    module.added = []
            return super().unpatch_model(*args, **options)

    for name, module in list(model.model.named_modules()):
        if name.endswith(names):
            model.model.set_submodule(name, Packed(module, f"{name}.weight"))
    return Patcher(model.model, model.load_device, model.offload_device)


@pytest.fixture(params=["fp8 of ComfyUI's loader", "fp8 file with scales", "packed"])
def network(request: pytest.FixtureRequest, models) -> Any:
    import comfy.sd

    full = models.wan()
    if request.param == "packed":
        return packed(full)
    state = {name: value.clone() for name, value in full.model.diffusion_model.state_dict().items()}
    config = full.model.model_config.unet_config
    sizes = {key: value for key, value in config.items() if isinstance(value, str | int | float | bool | list | tuple)}
    metadata = {"config": json.dumps({"transformer": sizes})}
    if request.param.endswith("scales"):
        return comfy.sd.load_diffusion_model_state_dict(fp8_file(state), metadata=metadata)
    options = {"dtype": torch.float8_e4m3fn}
    return comfy.sd.load_diffusion_model_state_dict(state, model_options=options, metadata=metadata)


def test_lora_experts_of_a_quantised_base_equal_core_lora_loaders(pack, models, network) -> None:
    import comfy.sd

    composite = pack.module("comfy_nodes.composite")
    plan = pack.module("pdmd_core.phases").PhasePlan.from_json(TWO.to_json())
    files = [lora("wan", seed) for seed in (1, 2)]
    ours = [with_lora(pack, network, file, 0.8) for file in files]
    core = [comfy.sd.load_lora_for_models(network, None, file, 0.8, 0.0)[0] for file in files]
    outputs = []
    for experts in (ours, core, [network, network]):
        model = composite.compose(plan, [composite.Expert(expert) for expert in experts])
        outputs.append(sample(pack, models, model, "wan", sigmas_of(TWO)))
        assert torch.isfinite(outputs[-1]).all()
    assert torch.equal(outputs[0], outputs[1])
    assert (outputs[0] - outputs[2]).abs().max() > 1e-2
    full = [comfy.sd.load_lora_for_models(models.wan(), None, file, 0.8, 0.0)[0] for file in files]
    exact = sample(
        pack, models, composite.compose(plan, [composite.Expert(each) for each in full]), "wan", sigmas_of(TWO)
    )
    assert (outputs[0] - exact).norm() < 0.3 * exact.norm()  # the base's own loss of precision


def test_loras_that_do_not_fit_a_quantised_base_are_refused(pack, models, network) -> None:
    errors = pack.module("comfy_nodes.errors")
    with pytest.raises(errors.NodeError, match="no key of this LoRA belongs to a WAN21"):
        with_lora(pack, network, lora("qwen", 1))


def test_lora_experts_beside_a_quantised_base_are_close_to_those_in_it(pack, models, network) -> None:
    composite = pack.module("comfy_nodes.composite")
    plan = pack.module("pdmd_core.phases").PhasePlan.from_json(TWO.to_json())
    files, outputs = [lora("wan", seed) for seed in (1, 2)], []
    for beside in (True, False):
        experts = [composite.Expert(with_lora(pack, network, file, 0.8, beside=beside)) for file in files]
        packed_layers = any(isinstance(module, Packed) for module in network.model.modules())
        assert bool(experts[0].model.patches) == (packed_layers or not beside)  # of unknown layers: merged
        outputs.append(sample(pack, models, composite.compose(plan, experts), "wan", sigmas_of(TWO)))
    assert (outputs[0] - outputs[1]).norm() < 0.02 * outputs[1].norm()  # into fp8 it is rounded
