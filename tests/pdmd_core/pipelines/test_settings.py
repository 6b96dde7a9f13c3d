"""What users set on the network counts for every expert, or is refused; nothing of it is lost at the switch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FirstBlockCacheConfig, GGUFQuantizationConfig, PipelineQuantizationConfig, TorchAoConfig
from torch import nn

from pdmd_core.experts import ExpertsError
from pdmd_core.pipelines import attach_experts, detach_experts, load_phased_pipeline
from tests.helpers.families.cases import CASES
from tests.helpers.tiny_pipelines import KINDS, PLAN, euler, full_experts, lora_experts, networks_of


def counted(network: nn.Module) -> list[int]:
    """How often the last block of a network is computed."""
    seen: list[int] = []
    network.blocks[-1].ffn.register_forward_hook(lambda *_: seen.append(1))
    return seen


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_cache_starts_anew_with_each_expert(before: bool, kind: str, tmp_path: Path) -> None:
    """A threshold without end keeps the first step of whoever computed it."""
    case = CASES["wan"]
    pipe = case.build()
    folder = KINDS[kind](tmp_path, pipe, PLAN)
    if before:
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    attach_experts(pipe, folder)
    if not before:
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    seen = [counted(network) for network in pipe.phased.networks or [pipe.transformer]]
    first = case.sample(pipe)
    assert sum(map(len, seen)) == 2, "the first of the two steps of each expert"
    assert torch.equal(case.sample(pipe), first)
    pipe.transformer.disable_cache()
    assert torch.equal(case.sample(pipe), euler(case, PLAN, networks_of(case, folder)))


def test_an_attention_backend_reaches_every_full_expert(tmp_path: Path) -> None:
    case = CASES["wan"]
    pipe = case.build()
    folder = full_experts(tmp_path, pipe, PLAN)
    pipe.transformer.set_attention_backend("_native_math")
    attach_experts(pipe, folder)

    def backends() -> set[str]:
        networks = pipe.phased.networks
        return {str(n.blocks[0].attn1.processor._attention_backend) for n in networks}

    assert len(backends()) == 1 and "MATH" in backends().pop()
    pipe.transformer.set_attention_backend("native")
    case.sample(pipe)
    assert len(backends()) == 1 and "MATH" not in backends().pop()


def test_processors_of_the_user_s_own_are_those_of_every_full_expert(tmp_path: Path) -> None:
    """As an IP-Adapter puts them on the network."""
    case = CASES["flux"]
    pipe = case.build()
    attach_experts(pipe, full_experts(tmp_path, pipe, PLAN))
    kind = type(pipe.transformer.transformer_blocks[0].attn.processor)

    class Own(kind):
        pass

    own = Own()
    pipe.transformer.transformer_blocks[0].attn.set_processor(own)
    case.sample(pipe)
    assert all(network.transformer_blocks[0].attn.processor is own for network in pipe.phased.networks)


def test_fused_projections_are_refused_with_lora_experts_and_no_matter_with_full_ones(tmp_path: Path) -> None:
    case = CASES["wan"]
    pipe = case.build()
    folder = lora_experts(tmp_path / "lora", pipe, PLAN)
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(ExpertsError, match=r"query, key and value are fused in this pipeline, past any LoRA: unfuse"):
        attach_experts(pipe, folder)
    pipe = attach_experts(case.build(), folder)
    for module in pipe.transformer.modules():
        if hasattr(module, "fuse_projections"):
            module.fused_projections = True
    with pytest.raises(RuntimeError, match=r"fused in the network, past the phased experts: call unfuse"):
        case.sample(pipe)
    pipe = case.build()
    folder = full_experts(tmp_path / "full", pipe, PLAN)
    expected = case.sample(attach_experts(pipe, folder))
    pipe.transformer.fuse_qkv_projections()
    torch.testing.assert_close(case.sample(pipe), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_layerwise_casting_is_on_every_full_expert(before: bool, tmp_path: Path) -> None:
    case = CASES["wan"]
    pipe = case.build()
    folder = full_experts(tmp_path, pipe, PLAN)
    casting = {"storage_dtype": torch.bfloat16, "compute_dtype": torch.float32}
    if before:
        pipe.transformer.enable_layerwise_casting(**casting)
    attach_experts(pipe, folder)
    if not before:
        pipe.transformer.enable_layerwise_casting(**casting)
    sampled = case.sample(pipe)
    networks = networks_of(case, folder)
    for network, stock in zip(pipe.phased.networks, networks, strict=True):
        assert network.blocks[0].ffn.net[2].weight.dtype == torch.bfloat16
        stock.enable_layerwise_casting(**casting)
    torch.testing.assert_close(sampled, euler(case, PLAN, networks), rtol=0, atol=1e-5)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_layerwise_casting_does_not_round_lora_experts(before: bool, tmp_path: Path) -> None:
    case = CASES["wan"]
    pipe = case.build()
    folder = lora_experts(tmp_path, pipe, PLAN)
    casting = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    if before:
        pipe.transformer.enable_layerwise_casting(**casting)
    attach_experts(pipe, folder)
    if not before:
        pipe.transformer.enable_layerwise_casting(**casting)
    networks = networks_of(case, folder)
    for stock in networks:
        stock.enable_layerwise_casting(**casting)
    layer = pipe.transformer.blocks[0].attn1.to_q
    assert layer.base_layer.weight.dtype == torch.float8_e4m3fn and layer.lora_A["phased_low_noise"].weight.dtype == (
        torch.float32
    )
    torch.testing.assert_close(case.sample(pipe), euler(case, PLAN, networks), rtol=0, atol=1e-5)


def test_layerwise_casting_comes_after_lora_experts_of_an_unknown_family(tmp_path: Path) -> None:
    pipe = CASES["aura_flow"].build()
    folder = lora_experts(tmp_path, pipe, PLAN)
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    with pytest.raises(ExpertsError, match="would round the LoRA experts: attach them first"):
        attach_experts(pipe, folder)


def test_a_base_of_a_gguf_file_takes_lora_experts_and_refuses_full_ones(tmp_path: Path) -> None:
    import gguf

    case = CASES["wan"]
    case.build().transformer.save_pretrained(tmp_path / "network")
    writer, q8 = gguf.GGUFWriter(tmp_path / "network.gguf", "wan"), gguf.GGMLQuantizationType.Q8_0
    for name, value in case.build().transformer.state_dict().items():
        packed = value.ndim == 2 and value.shape[1] % 32 == 0
        array = value.float().numpy()
        writer.add_tensor(name, gguf.quants.quantize(array, q8) if packed else array, raw_dtype=q8 if packed else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    def network() -> nn.Module:
        return type(case.build().transformer).from_single_file(
            str(tmp_path / "network.gguf"),
            config=str(tmp_path / "network"),
            quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        )

    folder, networks = lora_experts(tmp_path / "lora", case.build(), PLAN), []
    for phase in PLAN.phases:
        stock = case.build()
        stock.register_modules(transformer=network())
        stock.load_lora_weights(folder, weight_name=f"{phase.name}.safetensors")
        networks.append(stock.transformer)
    pipe = case.build()
    pipe.register_modules(transformer=network())
    assert type(pipe.transformer.blocks[0].ffn.net[2].weight).__name__ == "GGUFParameter"
    attach_experts(pipe, folder)
    torch.testing.assert_close(case.sample(pipe), euler(case, PLAN, networks), rtol=0, atol=1e-5)
    with pytest.raises(ExpertsError, match="full experts cannot be quantised as GGUF"):
        attach_experts(detach_experts(pipe), full_experts(tmp_path / "full", case.build(), PLAN))


def test_quantization_config_quantises_whichever_network_runs(kind: str, tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig

    case = CASES["wan"]
    case.build().save_pretrained(tmp_path / "base")
    folder = KINDS[kind](tmp_path / "experts", case.build(), PLAN, base=str(tmp_path / "base"))
    config = PipelineQuantizationConfig(quant_mapping={"transformer": TorchAoConfig(Int8WeightOnlyConfig(version=2))})
    pipe = load_phased_pipeline(folder, quantization_config=config)
    pipe.set_progress_bar_config(disable=True)
    for network in pipe.phased.networks or [pipe.transformer]:
        assert type(network.blocks[0].ffn.net[2].weight) is not nn.Parameter
    assert 0 < (case.sample(pipe) - euler(case, PLAN, networks_of(case, folder))).abs().max() < 0.1


def test_full_experts_of_a_quantised_base_are_quantised_alike(tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig

    case = CASES["wan"]
    pipe = case.build()
    folder = full_experts(tmp_path / "experts", pipe, PLAN)
    config = TorchAoConfig(Int8WeightOnlyConfig(version=2))
    pipe.transformer.save_pretrained(tmp_path / "network")
    kind = type(pipe.transformer)
    pipe.register_modules(transformer=kind.from_pretrained(tmp_path / "network", quantization_config=config))
    packed = type(pipe.transformer.blocks[0].ffn.net[2].weight)
    assert packed is not nn.Parameter
    attach_experts(pipe, folder)
    assert [type(network.blocks[0].ffn.net[2].weight) for network in pipe.phased.networks] == [packed, packed]
    expected = euler(case, PLAN, networks_of(case, folder))
    assert 0 < (case.sample(pipe) - expected).abs().max() < 0.3
    assert type(detach_experts(pipe).transformer.blocks[0].ffn.net[2].weight) is packed
