"""``PhasedDMDScheduler``: a diffusers scheduler that walks exactly the sigmas of a phase plan.

Pass it where the experts are used; a stock flow scheduler does not reproduce a plan in every pipeline::

    pipe = WanPipeline.from_pretrained(base, scheduler=PhasedDMDScheduler.from_plan(plan))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from .flow import euler_step, like
from .phases import PhasePlan

DEFAULT_PLAN = PhasePlan.from_steps([2, 2], shift=5.0)


@dataclass
class PhasedDMDSchedulerOutput(BaseOutput):
    """prev_sample: the sample at the next sigma, of the dtype of the model output."""

    prev_sample: Tensor


class PhasedDMDScheduler(SchedulerMixin, ConfigMixin):
    """Deterministic Euler steps over the sigmas that the experts were distilled for.

    plan: ``PhasePlan.to_dict()``; the 4-step plan of Wan (shift 5) when None. Timesteps are ``sigma * 1000``.
    ``scheduler.phase`` is the index of the expert that owns the current step.
    """

    _compatibles: ClassVar[list[str]] = ["FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"]
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(self, plan: dict[str, Any] | None = None, num_train_timesteps: int = 1000) -> None:
        self.plan = PhasePlan.from_dict(_plain(plan)) if plan is not None else DEFAULT_PLAN
        self.num_inference_steps: int | None = None
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._use(torch.tensor(self.plan.sigmas, dtype=torch.float32), None)

    @classmethod
    def from_plan(cls, plan: PhasePlan) -> PhasedDMDScheduler:
        """A scheduler of this plan."""
        return cls(plan=plan.to_dict())

    def _use(self, sigmas: Tensor, device: str | torch.device | None) -> None:
        self.timesteps = (sigmas * self.config.num_train_timesteps).to(device)
        self.sigmas = torch.cat([sigmas, torch.zeros(1)])

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | np.ndarray | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """Prepare the plan's steps. Raises ValueError for a number of steps that the experts were not distilled for.

        ``sigmas``, ``mu`` and ``timesteps`` are what pipelines pass for stock flow schedulers; the plan takes their
        place, so only their number is looked at.
        """
        given = next((len(values) for values in (timesteps, sigmas) if values is not None), num_inference_steps)
        trained = len(self.plan.sigmas)
        if given is not None and given != trained:
            raise ValueError(f"these experts were distilled for {trained} steps, found {given}: ask for {trained}")
        self.num_inference_steps = trained
        self._use(torch.tensor(self.plan.sigmas, dtype=torch.float32), device)
        self._step_index = self._begin_index = None

    @property
    def step_index(self) -> int | None:
        """Index of the current step, None before the first ``step`` of a run."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Where a run starts, set by the pipeline."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Called by pipelines before the loop."""
        self._begin_index = begin_index

    @property
    def phase(self) -> int:
        """Index of the phase whose expert takes the current step."""
        index = self._step_index if self._step_index is not None else (self._begin_index or 0)
        return self.plan.phase_index(self.plan.sigmas[min(index, len(self.plan.sigmas) - 1)])

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """Flow models take samples as they are."""
        return sample

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """The step at this timestep. Raises ValueError when the plan has none there."""
        value = float(timestep)
        index = int((self.timesteps - value).abs().argmin())
        if abs(float(self.timesteps[index]) - value) > 1e-3 * self.config.num_train_timesteps:
            known = ", ".join(f"{float(t):.2f}" for t in self.timesteps)
            raise ValueError(f"timestep {value:.2f} is not one of the plan's: {known}")
        return index

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> PhasedDMDSchedulerOutput | tuple[Tensor]:
        """One Euler step of a velocity prediction from this timestep to the plan's next sigma."""
        if self._step_index is None:
            begin = self._begin_index
            self._step_index = begin if begin is not None else self.index_for_timestep(timestep)
        i = self._step_index
        moved = euler_step(sample.float(), model_output.float(), float(self.sigmas[i]), float(self.sigmas[i + 1]))
        self._step_index += 1
        moved = moved.to(model_output.dtype)
        return PhasedDMDSchedulerOutput(prev_sample=moved) if return_dict else (moved,)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """``(1 - sigma) * sample + sigma * noise`` at these timesteps, a number or of shape (batch,)."""
        values = torch.as_tensor(timestep).reshape(-1)
        indices = [self.index_for_timestep(value) for value in values]
        sigma = like(self.sigmas[indices].to(sample.device).expand(len(sample)), sample)
        return ((1 - sigma) * sample + sigma * noise).to(sample.dtype)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``scale_noise`` under the name and argument order that some pipelines use."""
        return self.scale_noise(original_samples, timesteps, noise)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)


def _plain(value: Any) -> Any:
    """diffusers freezes the containers of a config; a plan is read from plain ones."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
