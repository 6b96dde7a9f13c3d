"""A base with other weights than the one that experts were distilled from is noticed, and only such a one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from pdmd_core.experts import PhasedExperts
from pdmd_core.pipelines import attach_experts, detach_experts, load_phased_pipeline
from tests.helpers.families.cases import CASES
from tests.helpers.tiny_experts import note_fingerprints
from tests.helpers.tiny_pipelines import PLAN, TWO_COMPONENTS, full_experts, lora_experts, lora_file, random_lora


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """What was said since the last call."""
    logger = logging.getLogger("diffusers.pdmd_core.pipelines.attach")
    logger.addHandler(caplog.handler)

    def messages() -> list[str]:
        found = [record.getMessage() for record in caplog.records if "other weights" in record.getMessage()]
        found = [*dict.fromkeys(found)]  # the handler of pytest may be on the way twice
        assert all(len(text.splitlines()) == 1 for text in found)
        caplog.clear()
        return found

    yield messages
    logger.removeHandler(caplog.handler)


def experts_of(name: str, folder: Path, kind: Callable[..., Path] = lora_experts) -> Path:
    pipe = CASES[name].build()
    two = getattr(pipe, "transformer_2", None) is not None
    kind(folder, pipe, PLAN, **({"components": TWO_COMPONENTS} if two else {}))
    return note_fingerprints(
        folder, {part: getattr(pipe, part) for part in (TWO_COMPONENTS if two else TWO_COMPONENTS[:1])}
    )


@torch.no_grad()
def tune(network: Any, change: float = 1.03) -> None:
    for parameter in network.parameters():
        parameter.mul_(change)


def attach(pipe: DiffusionPipeline, folder: Path) -> DiffusionPipeline:
    return attach_experts(pipe, PhasedExperts.open(folder))


@pytest.mark.parametrize("name", ["wan", "wan_two", "qwen_image", "z_image", "stable_diffusion_3"])
def test_its_own_base_is_silent_in_every_dtype_and_a_fine_tune_is_not(
    name: str, tmp_path: Path, warned: Callable[[], list[str]]
) -> None:
    folder = experts_of(name, tmp_path)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        attach(CASES[name].build().to(dtype=dtype), folder)
    casting = CASES[name].build()
    casting.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    attach(casting, folder)
    assert not warned()
    pipe = CASES[name].build()
    tune(pipe.transformer)
    attach(pipe, folder)
    (text,) = warned()
    assert "the transformer of this pipeline has other weights than the transformer of tiny/base" in text
    assert "samples differ" in text and "compare with the base itself" in text


def test_only_what_is_fused_for_good_is_another_base(tmp_path: Path, warned: Callable[[], list[str]]) -> None:
    folder = experts_of("wan", tmp_path)
    pipe = CASES["wan"].build()
    network = pipe.transformer
    style = lora_file(network, random_lora(network, 2, seed=77, targets=("to_q", "to_k")), alpha=2.0)
    pipe.load_lora_weights(dict(style), adapter_name="style")
    detach_experts(attach(pipe, folder))
    assert not warned()
    pipe.fuse_lora()
    pipe.unfuse_lora()
    detach_experts(attach(pipe, folder))
    assert not warned()
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    attach(pipe, folder)
    (text,) = warned()
    assert "4 of " in text


def test_each_network_of_two_has_its_own(tmp_path: Path, warned: Callable[[], list[str]]) -> None:
    folder = experts_of("wan_two", tmp_path)
    pipe = CASES["wan_two"].build()
    tune(pipe.transformer_2, 1.5)
    attach(pipe, folder)
    (text,) = warned()
    assert "the transformer_2 of this pipeline has other weights than the transformer_2 of" in text
    pipe = CASES["wan_two"].build()
    pipe.register_modules(transformer=pipe.transformer_2, transformer_2=pipe.transformer)
    attach(pipe, folder)
    assert [text.rpartition("; ")[2] for text in warned()] == [
        "it is the transformer_2 of that base: exchange the two networks",
        "it is the transformer of that base: exchange the two networks",
    ]


@pytest.mark.parametrize("how", ["memory", "disk"])
def test_what_is_offloaded_in_groups_is_no_false_alarm(
    how: str, tmp_path: Path, warned: Callable[[], list[str]]
) -> None:
    folder, pipe = experts_of("wan", tmp_path / "experts"), CASES["wan"].build()
    disk = {"offload_to_disk_path": str(tmp_path / "disk")} if how == "disk" else {}
    pipe.transformer.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level", **disk)
    if how == "disk":  # as memory is that others have used
        for parameter in pipe.transformer.parameters():
            parameter.data.fill_(7.0)
    attach(pipe, folder)
    assert not warned()


def test_full_experts_take_the_place_of_the_base(tmp_path: Path, warned: Callable[[], list[str]]) -> None:
    folder, pipe = experts_of("wan", tmp_path, full_experts), CASES["wan"].build()
    tune(pipe.transformer)
    attach(pipe, folder)
    assert not warned()


def test_loading_with_another_base_names_it(tmp_path: Path, warned: Callable[[], list[str]]) -> None:
    folder, pipe = experts_of("wan", tmp_path / "experts"), CASES["wan"].build()
    pipe.save_pretrained(tmp_path / "own")
    tune(pipe.transformer)
    pipe.save_pretrained(tmp_path / "tuned")
    load_phased_pipeline(folder, tmp_path / "own")
    assert not warned()
    load_phased_pipeline(folder, tmp_path / "tuned", dtype=torch.bfloat16)
    (text,) = warned()
    assert text.startswith(f"the transformer of '{tmp_path / 'tuned'}'"[:70])
