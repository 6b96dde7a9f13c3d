"""A frozen base in 8 bits or 4: near the teacher, trained on with adapters, half its size or less."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

from pdmd_core.experts import PhasedExperts
from pdmd_core.experts.format.fingerprint import fingerprint_of
from pdmd_core.families import FAMILIES, family
from pdmd_core.roles import FAKE, TEACHER, Roles, RoleSpec
from tests.helpers.configs import changed
from tests.helpers.families.cases import BY_FAMILY
from tests.helpers.tiny import LATENT_SHAPE, TEXT_FEATURES, randn, transformer
from training.config.command_line import UserError
from training.config.schema import ConfigError
from training.loop.build import build_run
from training.loop.trainer import Trainer
from training.memory.quantization import BYTES, quantize, quantized_numbers

WAN = family("wan")
X, SIGMA = randn(2, *LATENT_SHAPE), torch.tensor([0.9, 0.4])
CONDITIONING = {"prompt_embeds": randn(2, 5, TEXT_FEATURES, seed=1)}
KINDS = pytest.mark.parametrize("kind", ["int8", "float8", "nf4"])


def network(kind: str) -> nn.Module:
    built = transformer(num_attention_heads=4, attention_head_dim=16, ffn_dim=64)
    quantize([built], WAN, kind)  # type: ignore[arg-type]
    return built


def bytes_of(module: nn.Module) -> int:
    taken = 0
    for parameter in module.parameters():
        inner = getattr(parameter, "__tensor_flatten__", None)
        parts = [getattr(parameter, name) for name in inner()[0]] if inner else [parameter]
        taken += sum(part.numel() * part.element_size() for part in parts)
    return taken


@KINDS
def test_the_teacher_is_near_what_it_was(kind: str) -> None:
    with torch.no_grad():
        wanted, found = (WAN.velocity(network(k), X, SIGMA, CONDITIONING) for k in ("none", kind))
    difference = (found - wanted).norm() / wanted.norm()
    assert 1e-5 < difference < (0.05 if kind == "nf4" else 0.02)


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_of_every_family_are_found(name: str) -> None:
    """Also where diffusers' class does not say which they are: they are quantised, sharded and compiled one by one."""
    network, found = next(iter(BY_FAMILY[name].values())).build().transformer, family(name)
    assert len(found.blocks_of(network)) == sum(len(getattr(network, name)) for name in found.blocks) > 0
    linear = {n: m.weight.numel() for n, m in network.named_modules() if isinstance(m, nn.Linear)}
    expected = sum(size for n, size in linear.items() if n.startswith(tuple(f"{block}." for block in found.blocks)))
    assert quantized_numbers(network, found) == expected > 0
    Roles(network, found, {"expert": RoleSpec("lora", rank=2)})
    assert quantized_numbers(network, found) == expected, "adapters stay as they are"


@pytest.mark.parametrize("kind", ["nf4"])
def test_the_numbers_counted_are_the_ones_in_4_bits(kind: str) -> None:
    plain, small = network("none"), network(kind)
    counted = quantized_numbers(plain, WAN)
    assert bytes_of(plain) - bytes_of(small) == 3.5 * counted, "beside the scales"
    scales = [m.weight.quant_state for b in small.blocks for m in b.modules() if type(m).__name__ == "Linear4bit"]
    assert {state.quant_type for state in scales} == {kind}
    assert sum(state.absmax.nbytes for state in scales) == counted // 64, "a scale of a byte for 64 numbers"
    assert BYTES[kind] * counted == counted / 2 + counted / 64


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_the_numbers_counted_are_the_ones_in_8_bits(kind: str) -> None:
    plain, small = network("none"), network(kind)
    rows = sum(m.weight.shape[0] for b in plain.blocks for m in b.modules() if isinstance(m, nn.Linear))
    beside = 3 * quantized_numbers(plain, WAN) - (bytes_of(plain) - bytes_of(small))
    assert rows <= beside <= 8 * rows, "a scale for each row"
    assert type(small.proj_out.weight) is nn.Parameter, "what is outside of blocks is as it was"


@KINDS
def test_adapters_on_it_get_gradient_and_pass_it_on(kind: str) -> None:
    spec = RoleSpec("lora", 4, 4.0)
    roles = Roles(network(kind), WAN, {"high": spec, FAKE: spec})
    roles.set_trainable(["high"])
    with torch.no_grad():
        teacher = roles.velocity(TEACHER, X, SIGMA, CONDITIONING)
        assert torch.equal(roles.velocity("high", X, SIGMA, CONDITIONING), teacher)
    x = X.clone().requires_grad_()
    roles.velocity("high", x, SIGMA, CONDITIONING).square().sum().backward()
    assert x.grad is not None and bool(x.grad.any())
    assert all(bool(p.grad.any()) for name, p in roles.named_parameters("high").items() if name.endswith("lora_B"))
    assert all(p.dtype == torch.float32 for p in roles.parameters("high"))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_run_on_it_ends_in_experts_for_the_base(kind: str, settings_of_run: dict[str, Any]) -> None:
    settings_of_run["model"] |= {"quantization": kind}
    trainer = Trainer(build_run(changed(settings_of_run, updates=2)))
    experts = PhasedExperts.open(trainer.run())
    assert trainer.progress.bad == 0
    assert experts.manifest.base.fingerprints == {"transformer": fingerprint_of(transformer())}  # of the whole weights
    for expert in experts.manifest.experts:
        assert any(bool(v.any()) for key, v in experts.lora_state(expert.name).items() if key.endswith("lora_B"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fake": {"kind": "full"}}, "set fake.kind to lora"),
        ({"generator": {"kind": "full"}}, "set generator.kind to lora"),
        ({"parallel.sharding": "fsdp"}, "set parallel.sharding to none"),
    ],
)
def test_what_does_not_go_with_it_is_one_line(
    settings_of_run: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    settings_of_run["model"] |= {"quantization": "int8"}
    with pytest.raises(ConfigError, match=words) as error:
        changed(settings_of_run, **changes)
    assert "\n" not in str(error.value)


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match=r"int8 takes the package torchao .* pip install") as error:
        network("int8")
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"nf4 takes the package bitsandbytes .* pip install") as error:
        network("nf4")
    assert "\n" not in str(error.value)
