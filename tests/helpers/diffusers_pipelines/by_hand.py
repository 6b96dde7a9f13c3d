"""Sampling by hand in any stock pipeline: Euler steps over a plan, with the expert's weights put in by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from pdmd_core.phases import PhasePlan


class ByHand(FlowMatchEulerDiscreteScheduler):
    """diffusers' own Euler steps over the sigmas of a plan; before each step the network is given its expert."""

    def walk(self, plan: PhasePlan, take: Callable[[int], None]) -> ByHand:
        """take: makes the network the expert of a phase."""
        self.plan, self.take = plan, take
        return self

    def set_timesteps(
        self,
        num_inference_steps: Any = None,
        device: Any = None,
        sigmas: Any = None,
        mu: Any = None,
        timesteps: Any = None,
    ) -> None:
        sigmas = torch.tensor(self.plan.sigmas, dtype=torch.float32)
        self.timesteps, self.sigmas = sigmas * 1000, torch.cat([sigmas, torch.zeros(1)])
        self.num_inference_steps, self._step_index, self._begin_index = len(sigmas), None, None
        self.turn(0)

    def scale_model_input(self, sample: Tensor, *_: Any) -> Tensor:
        return sample

    def set_begin_index(self, begin_index: int = 0) -> None:
        super().set_begin_index(begin_index)
        self.turn(begin_index)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        moved = super().step(*args, **kwargs)
        self.turn(self._step_index)
        return moved

    def turn(self, step: int) -> None:
        """The expert of a step takes its turn."""
        if step < len(self.plan.sigmas):
            self.take(self.plan.phase_index(self.plan.sigmas[step]))


def with_weights(network: nn.Module, states: list[dict[str, Tensor]]) -> Callable[[int], None]:
    """Puts the weights of full experts into a network."""

    def take(phase: int) -> None:
        network.load_state_dict(states[phase], assign=True)

    return take


def with_adapters(pipe: DiffusionPipeline, folder: Any, files: list[str]) -> Callable[[int], None]:
    """Loads LoRA files by the stock loader, and makes one of them active."""
    for number, file in enumerate(files):
        # a few pipelines have no loader, their networks have
        load = getattr(pipe, "load_lora_weights", None) or pipe.transformer.load_lora_adapter
        load(folder, weight_name=file, adapter_name=f"by_hand_{number}")

    def take(phase: int) -> None:
        pipe.transformer.set_adapter(f"by_hand_{phase}")

    return take
