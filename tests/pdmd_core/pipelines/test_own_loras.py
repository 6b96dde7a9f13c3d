"""LoRAs of the user's own beside the experts, and what diffusers lets a user do with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from pdmd_core.experts import ExpertsError, PhasedExperts
from pdmd_core.pipelines import attach_experts, detach_experts
from tests.helpers.families.cases import CASES
from tests.helpers.tiny_pipelines import PLAN, euler, full_experts, lora_experts, lora_file, networks_of, random_lora

STYLE_TARGETS = ("to_q", "to_k", "ffn.net.0.proj", "img_mlp.net.0.proj")
"""Partly modules that experts adapt, partly others."""


@pytest.fixture(params=["wan", "qwen_image"])
def case(request: pytest.FixtureRequest) -> Any:
    return CASES[request.param]


@pytest.fixture
def folder(case: Any, tmp_path: Path) -> Path:
    return lora_experts(tmp_path / "experts", case.build(), PLAN)


@pytest.fixture
def style(case: Any) -> dict[str, Tensor]:
    network = case.build().transformer
    return lora_file(network, random_lora(network, 2, seed=77, targets=STYLE_TARGETS), alpha=2.0)


def experts_with_style(case: Any, folder: Path, style: dict[str, Tensor], weight: float) -> list[nn.Module]:
    """Stock networks, each with the LoRAs of one expert and of the style, as diffusers weighs them."""
    networks = []
    for phase in PLAN.phases:
        pipe = case.build()
        pipe.load_lora_weights(dict(style), adapter_name="style")
        pipe.load_lora_weights(folder, weight_name=f"{phase.name}.safetensors", adapter_name="expert")
        pipe.set_adapters(["style", "expert"], [weight, 1.0])
        networks.append(pipe.transformer)
    return networks


def attach(pipe: DiffusionPipeline, folder: Path) -> DiffusionPipeline:
    return attach_experts(pipe, PhasedExperts.open(folder))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_a_style_stays_on_in_all_phases_with_its_weight(
    case: Any, folder: Path, style: dict[str, Tensor], weight: float, when: str
) -> None:
    pipe = case.build()
    if when == "before":
        pipe.load_lora_weights(dict(style), adapter_name="style")
        pipe.set_adapters(["style"], [weight])
        attach(pipe, folder)
    else:
        attach(pipe, folder)
        pipe.load_lora_weights(dict(style), adapter_name="style")
        pipe.set_adapters(["style"], [weight])
    expected = euler(case, PLAN, experts_with_style(case, folder, style, weight))
    for _ in range(2):
        assert torch.equal(case.sample(pipe), expected)
    assert (euler(case, PLAN, networks_of(case, folder)) - expected).abs().max() > 0.05
    pipe.set_adapters(["style"], [0.2])
    assert torch.equal(case.sample(pipe), euler(case, PLAN, experts_with_style(case, folder, style, 0.2)))
    pipe.delete_adapters("style")
    assert torch.equal(case.sample(pipe), euler(case, PLAN, networks_of(case, folder)))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_style_is_on_as_soon_as_it_is_loaded(case: Any, folder: Path, style: dict[str, Tensor], when: str) -> None:
    pipe = case.build()
    if when == "before":
        pipe.load_lora_weights(dict(style), adapter_name="style")
    attach(pipe, folder)
    if when == "after":
        pipe.load_lora_weights(dict(style), adapter_name="style")
    assert torch.equal(case.sample(pipe), euler(case, PLAN, experts_with_style(case, folder, style, 1.0)))


def test_experts_named_in_set_adapters_keep_switching(case: Any, folder: Path, style: dict[str, Tensor]) -> None:
    pipe = attach(case.build(), folder)
    pipe.load_lora_weights(dict(style), adapter_name="style")
    pipe.set_adapters(["style", "phased_low_noise", "phased_high_noise"], [0.4, 1.0, 1.0])
    assert torch.equal(case.sample(pipe), euler(case, PLAN, experts_with_style(case, folder, style, 0.4)))


def test_a_style_on_both_networks_of_wan_2_2(tmp_path: Path) -> None:
    case, components = CASES["wan_two"], ["transformer", "transformer_2"]
    folder = lora_experts(tmp_path, case.build(), PLAN, components)
    style = lora_file(case.build().transformer, random_lora(case.build().transformer, 2, seed=7), alpha=2.0)

    def styled(pipe: DiffusionPipeline) -> DiffusionPipeline:
        pipe.load_lora_weights(dict(style), adapter_name="style")
        pipe.load_lora_weights(dict(style), adapter_name="style", load_into_transformer_2=True)
        return pipe

    networks = []
    for phase, component in zip(PLAN.phases, components, strict=True):
        stock, second = styled(case.build()), component == "transformer_2"
        more = {"load_into_transformer_2": True} if second else {}
        stock.load_lora_weights(folder, weight_name=f"{phase.name}.safetensors", adapter_name="expert", **more)
        getattr(stock, component).set_adapters(["style", "expert"], [0.4, 1.0])
        networks.append(getattr(stock, component))
    expected = euler(case, PLAN, networks)
    for pipe in (styled(attach(case.build(), folder)), attach(styled(case.build()), folder)):
        pipe.set_adapters(["style"], [0.4])
        assert torch.equal(case.sample(pipe), expected)


def test_full_experts_take_a_style_as_networks_of_their_own(tmp_path: Path) -> None:
    """The stock loader knows pipe.transformer; each further expert is told on its own."""
    case = CASES["wan"]
    folder = full_experts(tmp_path, case.build(), PLAN)
    state = {f"{k}.weight": v for k, v in random_lora(case.build().transformer, 2, seed=7).items()}
    pipe, networks = attach(case.build(), folder), networks_of(case, folder)
    for network in (*pipe.phased.networks, *networks):
        network.load_lora_adapter(dict(state), prefix=None, adapter_name="style")
    assert torch.equal(case.sample(pipe), euler(case, PLAN, networks))


# --- what would switch the experts off ---------------------------------------


def test_fusing_is_an_error_that_says_what_to_do(case: Any, folder: Path, style: dict[str, Tensor]) -> None:
    pipe = attach(case.build(), folder)
    pipe.load_lora_weights(dict(style), adapter_name="style")
    expected = case.sample(pipe)
    for names in (None, ["style"], ["phased_low_noise"]):
        pipe.fuse_lora(adapter_names=names)
        with pytest.raises(RuntimeError, match=r"is fused into the network.*call unfuse_lora\(\)"):
            case.sample(pipe)
        pipe.unfuse_lora()
        torch.testing.assert_close(case.sample(pipe), expected, rtol=0, atol=1e-4)


def test_a_style_fused_before_experts_are_attached(case: Any, folder: Path, style: dict[str, Tensor]) -> None:
    pipe = case.build()
    pipe.load_lora_weights(dict(style), adapter_name="style")
    pipe.fuse_lora()
    with pytest.raises(ExpertsError, match=r"fused into this pipeline.*unload_lora_weights"):
        attach(pipe, folder)
    pipe.unload_lora_weights()
    expected = euler(case, PLAN, experts_with_style(case, folder, style, 1.0))
    torch.testing.assert_close(case.sample(attach(pipe, folder)), expected, rtol=0, atol=5e-4)


def test_unloading_all_loras_is_an_error_until_experts_are_attached_again(case: Any, folder: Path) -> None:
    pipe = attach(case.build(), folder)
    expected = case.sample(pipe)
    pipe.unload_lora_weights()
    with pytest.raises(RuntimeError, match=r"'phased_\w+' of the phased experts was unloaded: call detach"):
        case.sample(pipe)
    assert torch.equal(case.sample(attach(detach_experts(pipe), folder)), expected)


def test_deleting_one_expert_is_an_error(case: Any, folder: Path) -> None:
    pipe = attach(case.build(), folder)
    pipe.delete_adapters("phased_low_noise")
    with pytest.raises(RuntimeError, match=r"'phased_low_noise' of the phased experts was unloaded"):
        case.sample(pipe)


def test_disabling_lora_is_an_error_until_it_is_enabled(case: Any, folder: Path) -> None:
    pipe = attach(case.build(), folder)
    expected = case.sample(pipe)
    pipe.disable_lora()
    with pytest.raises(RuntimeError, match=r"LoRA is disabled, and with it the phased experts: call enable_lora\(\)"):
        case.sample(pipe)
    pipe.enable_lora()
    assert torch.equal(case.sample(pipe), expected)
    detach_experts(pipe)
    pipe.load_lora_weights(folder, weight_name="low_noise.safetensors", adapter_name="mine")
    pipe.disable_lora()
    with pytest.raises(ExpertsError, match=r"LoRA is disabled in this pipeline: call enable_lora\(\) first"):
        attach(pipe, folder)


def test_a_scale_for_all_loras_would_weaken_the_experts(case: Any, folder: Path) -> None:
    pipe = attach(case.build(), folder)
    with pytest.raises(ExpertsError, match=r"scales the experts too: weigh your LoRA with set_adapters"):
        case.sample(pipe, attention_kwargs={"scale": 0.5})
    assert torch.equal(case.sample(pipe, attention_kwargs={"scale": 1.0}), case.sample(pipe))


# --- taking experts out again --------------------------------------------------


@pytest.mark.parametrize("when", ["none", "before", "after"])
def test_detaching_leaves_the_users_loras(case: Any, folder: Path, style: dict[str, Tensor], when: str) -> None:
    stock = case.build()
    if when != "none":
        stock.load_lora_weights(dict(style), adapter_name="style")
        stock.set_adapters(["style"], [0.3])
    call = {"num_inference_steps": 4, **case.unguided}
    expected, pipe = case.sample(stock, **call), case.build()
    if when == "before":
        pipe.load_lora_weights(dict(style), adapter_name="style")
        pipe.set_adapters(["style"], [0.3])
    attach(pipe, folder)
    if when == "after":
        pipe.load_lora_weights(dict(style), adapter_name="style")
        pipe.set_adapters(["style"], [0.3])
    case.sample(pipe)
    detach_experts(pipe)
    assert torch.equal(case.sample(pipe, **call), expected)
    assert [name for name, _ in pipe.transformer.named_modules()] == [n for n, _ in stock.transformer.named_modules()]
    assert pipe.get_list_adapters() == stock.get_list_adapters()
    assert not pipe.transformer._forward_pre_hooks
