"""Experts folders to convert, and what to compare the results with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pdmd_core.experts import (
    MANIFEST_NAME,
    ExpertsError,
    PhasedExperts,
)
from pdmd_core.experts.convert.conversions import Conversion
from pdmd_core.experts.format.header import TensorSpec, read_header
from pdmd_core.experts.format.weights import Weights, write_weights
from pdmd_core.families import family
from pdmd_core.phases import PhasePlan
from pdmd_core.roles import Roles, RoleSpec
from pdmd_core.scheduler import PhasedDMDScheduler
from tests.helpers.tiny import CALL, LATENT_SHAPE, lora_roles, randn, transformer, wan_pipeline, write_lora_experts

PLAN = PhasePlan.from_steps([2, 2], shift=5.0)
WAN = family("wan")
RANK, ALPHA = 4, 6.0
HIGH, LOW = "high_noise", "low_noise"


def write_lora_folder(folder: Path, base: Path, plan: PhasePlan = PLAN) -> Path:
    write_lora_experts(folder, plan, lora_roles(plan, RANK, ALPHA), str(base), {"updates": 3})
    PhasedDMDScheduler.from_plan(plan).save_pretrained(folder / "scheduler")
    return folder


def conversion(folder: Path, output: Path, **options: Any) -> Conversion:
    return Conversion(PhasedExperts.open(folder), output, **options)


@contextlib.contextmanager
def refused(*fragments: str) -> Iterator[None]:
    """The block raises ExpertsError with one line that holds all fragments."""
    with pytest.raises(ExpertsError) as caught:
        yield
    text = str(caught.value)
    assert len(text.splitlines()) == 1, text
    assert all(fragment in text for fragment in fragments), text


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@torch.no_grad()
def sampled(folder: Path) -> Tensor:
    """Latents by an Euler loop over roles of this experts folder on the tiny transformer."""
    experts = PhasedExperts.open(folder)
    plan, entries = experts.manifest.plan, experts.manifest.experts
    specs = {e.name: RoleSpec(e.kind, e.rank or 1, e.alpha or 1.0, e.targets) for e in entries}
    roles = Roles(transformer(), WAN, specs)
    for entry in entries:
        read = experts.lora_state if entry.kind == "lora" else experts.tensors
        roles.load_state_dict(entry.name, read(entry.name))
    conditioning = WAN.encode_prompts(wan_pipeline(), [CALL["prompt"]], CALL["max_sequence_length"])
    x = randn(1, *LATENT_SHAPE, seed=7)
    for phase in plan.phases:
        for sigma in phase.sigmas:
            following = [*plan.sigmas, 0.0][plan.sigmas.index(sigma) + 1]
            x = x + (following - sigma) * roles.velocity(phase.name, x, sigma, conditioning)
    return x


def rewrite(folder: Path, name: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change an expert's tensors and give the manifest the new hash."""
    experts = PhasedExperts.open(folder)
    tensors = {key: value.clone() for key, value in experts.tensors(name).items()}
    change(tensors)
    entries = {e.name: e for e in experts.manifest.experts}
    path = folder / entries[name].file
    weights = Weights({k: TensorSpec(v.dtype, tuple(v.shape)) for k, v in tensors.items()}, tensors.__getitem__)
    metadata = read_header(path).metadata
    entries[name] = replace(entries[name], sha256=write_weights(path, weights, metadata))
    manifest = replace(experts.manifest, experts=tuple(entries.values()))
    (folder / MANIFEST_NAME).write_text(manifest.to_json())


TARGETS: dict[str, Callable[[Conversion], object]] = {
    "full": lambda c: c.to_full(),
    "lora": lambda c: c.to_lora(2),
    "comfyui": lambda c: c.to_comfyui(),
    "diffusers": lambda c: c.to_diffusers(),
}
