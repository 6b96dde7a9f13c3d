"""Pipelines with experts are copied and pickled as stock ones are."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import torch

from pdmd_core.pipelines import attach_experts, detach_experts
from tests.helpers.families.cases import CASES
from tests.helpers.tiny_pipelines import KINDS, PLAN


def test_a_copy_samples_the_same_with_networks_of_its_own(kind: str, tmp_path: Path) -> None:
    case = CASES["wan"]
    pipe = attach_experts(case.build(), KINDS[kind](tmp_path, case.build(), PLAN))
    expected = case.sample(pipe)
    saved = io.BytesIO()
    torch.save(pipe, saved)
    saved.seek(0)
    for made in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe)), torch.load(saved, weights_only=False)):
        assert type(made) is type(pipe) and made.transformer is not pipe.transformer
        assert made.phased.plan == PLAN and made.phased.experts == pipe.phased.experts
        assert torch.equal(case.sample(made), expected)
        with torch.no_grad():
            for parameter in made.transformer.parameters():
                parameter.zero_()
        assert type(detach_experts(made)) is type(case.build())
    assert torch.equal(case.sample(pipe), expected)
