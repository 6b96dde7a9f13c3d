"""Samples and evaluations with experts on another teacher than theirs say so."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from pdmd_core.experts import PhasedExperts
from pdmd_core.families import TeacherRouting, family
from tests.helpers.families.wan import wan_two_networks
from tests.helpers.tiny_experts import note_fingerprints, save_experts
from training.loop.export import roles_from_experts

BOTH = ("transformer", "transformer_2")


def test_each_network_of_a_teacher_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = wan_two_networks()
    pipeline.save_pretrained(tmp_path / "teacher")
    experts = save_experts(tmp_path / "experts", tmp_path / "teacher", (16, 16, 1), BOTH)
    networks: dict[str, nn.Module] = {name: getattr(pipeline, name) for name in BOTH}
    note_fingerprints(experts, networks)

    def said() -> list[str]:
        capsys.readouterr()
        own = {name: copy.deepcopy(network).to(torch.bfloat16) for name, network in networks.items()}
        roles_from_experts(PhasedExperts.open(experts), own, family("wan"), TeacherRouting(BOTH, 0.875))
        return capsys.readouterr().err.splitlines()

    assert said() == []
    with torch.no_grad():
        for parameter in networks["transformer_2"].parameters():
            parameter.mul_(1.05)
    (line,) = said()
    assert line.startswith("warning: the transformer_2 here has other weights than the transformer_2 of ")
