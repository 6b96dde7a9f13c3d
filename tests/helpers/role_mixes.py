"""Roles of all kinds on one tiny network, and what they compute on one batch."""

from __future__ import annotations

import torch
from torch import Tensor

from pdmd_core.families import family
from pdmd_core.roles import FAKE, Roles, RoleSpec
from tests.helpers.tiny import LATENT_SHAPE, TEXT_FEATURES, randn, transformer

LORA, FULL = RoleSpec("lora", rank=4, alpha=6.0), RoleSpec("full")
MIXES = {
    "lora": {"high": LORA, "low": LORA, FAKE: LORA},
    "full": {"high": FULL, "low": FULL, FAKE: FULL},
    "mixed": {"high": LORA, "low": LORA, FAKE: FULL},
}
X = randn(2, *LATENT_SHAPE)
SIGMA = torch.tensor([0.9, 0.4])
CONDITIONING = {"prompt_embeds": randn(2, 5, TEXT_FEATURES, seed=1)}


def velocity(roles: Roles, role: str) -> Tensor:
    return roles.velocity(role, X, SIGMA, CONDITIONING)


def teacher_output() -> Tensor:
    with torch.no_grad():
        return family("wan").velocity(transformer(), X, SIGMA, CONDITIONING)


def gradients(roles: Roles, role: str) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in roles.named_parameters(role).items()}


def one_line(error: BaseException) -> str:
    text = str(error.args[0])
    assert len(text.splitlines()) == 1
    return text
