"""``PhasedDMDScheduler``: a diffusers scheduler that walks exactly the sigmas of a phase plan.

Pass it where the experts are used; a stock flow scheduler does not reproduce a plan in every pipeline:

    pipe = WanPipeline.from_pretrained(base, scheduler=PhasedDMDScheduler.from_plan(plan))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .flow import euler_step, like
from .phases import PhasePlan


@dataclass
class PhasedDMDSchedulerOutput(BaseOutput):  # type: ignore[misc]
    """What ``PhasedDMDScheduler.step`` returns."""

    prev_sample: Tensor
    """The sample at the next sigma, of the dtype of the model output."""


class PhasedDMDScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """A scheduler that steps over the sigmas that the experts were distilled for.

    Args:
        plan: The plan, as ``PhasePlan.to_dict()`` writes it. A scheduler that was made without one (from the config of
            another scheduler, say) is refused in ``set_timesteps``, because sigmas of its own choice would be the wrong
            ones.
        num_train_timesteps: Timesteps are ``sigma * num_train_timesteps``.
        refine: Whether more steps than the plan has are allowed; they are added inside phases, as in
            ``PhasePlan.refined``.
        sampler: "euler" is deterministic. "renoise" jumps to sigma 0, then adds fresh noise up to the next sigma.
        renoise_seed: The seed of the noise of "renoise", which every ``set_timesteps`` starts again, since pipelines
            give ``step`` no generator.
        base_image_seq_len: Pipelines read it, as the next three, to compute a shift, which the plan has already.
        max_image_seq_len: See there.
        base_shift: See there.
        max_shift: See there.
        needs_switching: In a saved pipeline whose experts do not switch by themselves: the function that loads it. A
            scheduler that says so refuses to sample.

    Raises:
        ValueError: If ``sampler`` has another value.

    Examples:
        >>> import torch
        >>> from pdmd_core.phases import PhasePlan
        >>> scheduler = PhasedDMDScheduler.from_plan(PhasePlan.from_steps([2, 2], shift=3.0))
        >>> scheduler.set_timesteps(4)
        >>> sample = torch.ones(1, 4)
        >>> for timestep in scheduler.timesteps:
        ...     expert, velocity = scheduler.phase, 0.5 * sample  # what expert number `expert` predicts
        ...     sample = scheduler.step(velocity, timestep, sample).prev_sample
        >>> scheduler.timesteps.tolist(), expert
        ([1000.0, 900.0, 750.0, 500.0], 1)
    """

    _compatibles: ClassVar[list[str]] = ["FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"]
    order = 1
    """Network evaluations in a step, as diffusers counts them."""
    init_noise_sigma = 1.0
    """The standard deviation of the noise that sampling starts from."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        plan: dict[str, Any] | None = None,
        num_train_timesteps: int = 1000,
        refine: bool = False,
        sampler: Literal["euler", "renoise"] = "euler",
        renoise_seed: int = 0,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        needs_switching: str | None = None,
    ) -> None:
        if sampler not in ("euler", "renoise"):
            raise ValueError(f"sampler is euler or renoise, found {sampler!r}")
        self.plan = PhasePlan.from_dict(_plain(plan)) if plan is not None else None
        self.num_inference_steps: int | None = None
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._counts_only = False
        self._use(self.plan, None)

    @classmethod
    def from_plan(cls, plan: PhasePlan, **config: Any) -> PhasedDMDScheduler:
        """Make a scheduler of a plan.

        Args:
            plan: The plan that the experts were distilled for.
            **config: Other arguments of the class.

        Returns:
            The scheduler.
        """
        scheduler: PhasedDMDScheduler = cls(plan=plan.to_dict(), **config)
        return scheduler

    def _use(self, walked: PhasePlan | None, device: str | torch.device | None) -> None:
        self._walked = walked
        sigmas = torch.tensor(walked.sigmas if walked else (), dtype=torch.float32)
        self.timesteps = (sigmas * self.config.num_train_timesteps).to(device)
        self.sigmas = torch.cat([sigmas, torch.zeros(1)])
        self._renoise = torch.Generator().manual_seed(self.config.renoise_seed)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | np.ndarray | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | np.ndarray | None = None,
    ) -> None:
        """Prepare the plan's steps, or a refinement of them.

        Many pipelines pass uniform ``sigmas`` (raw times) and ``mu`` for stock flow schedulers to shift; the plan takes
        their place.

        A number of steps that the experts were not distilled for is refused when it comes to ``step``: noise can be
        added to samples with any.

        Args:
            num_inference_steps: The number of steps; None takes the plan's own.
            device: Where ``timesteps`` lie.
            sigmas: Uniform raw times, which are ignored but for their number, or the plan's own sigmas, in (0, 1].
            mu: Ignored: the shift is in the plan already.
            timesteps: The plan's own timesteps, ``sigma * num_train_timesteps``; beside ``sigmas`` uniform ones, too.

        Raises:
            ValueError: If ``sigmas`` or ``timesteps`` are neither uniform nor the plan's, or if the scheduler has no
                plan or ``needs_switching``.
        """
        if self.plan is None:
            raise ValueError(
                "this PhasedDMDScheduler has no phase plan: make it with PhasedDMDScheduler.from_plan(plan) or "
                'PhasedDMDScheduler.from_pretrained(experts, subfolder="scheduler")'
            )
        if self.config.needs_switching is not None:
            raise ValueError(
                "these experts do not switch by themselves in a pipeline of diffusers: load the folder with "
                f"{self.config.needs_switching}"
            )
        given = next((len(values) for values in (timesteps, sigmas) if values is not None), num_inference_steps)
        trained = len(self.plan.sigmas)
        steps = trained if given is None else int(given)
        walked = self.plan.refined(max(steps, trained))
        if self._counts_only:
            _check_start(sigmas)
        elif steps == trained or self.config.refine:
            self._check_given(sigmas, timesteps, walked)
        self.num_inference_steps = steps
        self._use(walked, device)
        self._step_index = self._begin_index = None

    def check_steps(self, steps: int) -> None:
        """Refuse a number of steps that the experts were not distilled for.

        Args:
            steps: The number of steps.

        Raises:
            ValueError: If it is another one than the plan's, or with ``refine`` a lower one.
        """
        trained = steps if self.plan is None else len(self.plan.sigmas)
        if steps < trained or (steps > trained and not self.config.refine):
            more = "that or more" if self.config.refine else f"{trained}, or allow more with refine=True"
            raise ValueError(f"these experts were distilled for {trained} steps, found {steps}: ask for {more}")

    @contextmanager
    def counting_only(self) -> Iterator[None]:
        """Take only the number of whatever sigmas and timesteps a pipeline computes, within a block.

        Yields:
            Nothing.
        """
        before, self._counts_only = self._counts_only, True
        try:
            yield
        finally:
            self._counts_only = before

    def _check_given(
        self,
        sigmas: Sequence[float] | np.ndarray | None,
        timesteps: Sequence[float] | np.ndarray | None,
        walked: PhasePlan,
    ) -> None:
        own = None if sigmas is None else np.asarray(sigmas, dtype=np.float64)
        if timesteps is not None:
            times = np.asarray(timesteps, dtype=np.float64) / self.config.num_train_timesteps
            if own is None or not _uniform(times, atol=1e-3):
                _check_same("timesteps", times, walked)
        if own is not None and not _uniform(own, atol=1e-6 if timesteps is None else 1e-3):
            _check_same("sigmas", own, walked)

    @property
    def step_index(self) -> int | None:
        """The index of the current step; None before the first ``step`` of a run."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The index of the step where a run starts, as set by the pipeline."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Set where the next run starts; pipelines call this before their loop.

        Args:
            begin_index: The index of the first step.
        """
        self._begin_index = begin_index

    @property
    def sigma(self) -> float:
        """The sigma of the current step, in (0, 1]; that of the last step after a run."""
        index = self._step_index if self._step_index is not None else (self._begin_index or 0)
        return self._steps().sigmas[min(index, len(self.timesteps) - 1)]

    @property
    def phase(self) -> int:
        """The index of the phase whose expert takes the current step."""
        return self._steps().phase_index(self.sigma)

    def _steps(self) -> PhasePlan:
        if self._walked is None:
            raise ValueError("this PhasedDMDScheduler has no phase plan")
        return self._walked

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """Return the sample unchanged, as flow models take it.

        Args:
            sample: Samples of shape (batch, ...).
            timestep: Ignored.

        Returns:
            The samples.
        """
        return sample

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """Find the step at a timestep.

        Args:
            timestep: One of the plan's timesteps, ``sigma * num_train_timesteps``.

        Returns:
            The index of the step, from 0.

        Raises:
            ValueError: If the plan has no step there.
        """
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
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        per_token_timesteps: Tensor | None = None,
    ) -> PhasedDMDSchedulerOutput | tuple[Tensor]:
        """Take one step from the current sigma to the plan's next one.

        Args:
            model_output: The predicted velocity, ``noise - x_0``, of shape (batch, ...).
            timestep: The timestep of the samples, which places the first step of a run.
            sample: Samples at the current sigma, of the same shape.
            generator: The source of fresh noise for the sampler "renoise"; None uses the config's ``renoise_seed``.
            return_dict: Whether to return a ``PhasedDMDSchedulerOutput`` rather than a tuple.
            per_token_timesteps: The timestep of each token, of shape (batch, tokens) or (batch, 1), as pipelines give
                it that hold some tokens at another noise level. ``model_output`` is then ``x_0 - noise``, the samples
                are of shape (batch, tokens, features), and each token goes to the plan's next lower sigma.

        Returns:
            The samples at the next sigma, in the dtype of ``model_output``.

        Raises:
            ValueError: If all steps of the run are taken, if the experts were not distilled for this number of steps,
                if the first timestep is not one of the plan's, or if tokens with timesteps of their own are to be
                renoised.
        """
        if self.num_inference_steps is not None:
            self.check_steps(self.num_inference_steps)
        if self._step_index is None:
            begin = self._begin_index
            self._step_index = begin if begin is not None else self.index_for_timestep(timestep)
        i = self._step_index
        if i >= len(self.timesteps):
            raise ValueError(f"all {len(self.timesteps)} steps are taken: call set_timesteps before another run")
        sigma, following = float(self.sigmas[i]), float(self.sigmas[i + 1])
        x, velocity = sample.float(), model_output.float()
        if per_token_timesteps is not None:
            if self.config.sampler == "renoise":
                raise ValueError("tokens with timesteps of their own are not renoised: use sampler='euler'")
            own = per_token_timesteps.float()[..., None] / self.config.num_train_timesteps
            lower = self.sigmas.to(own.device).expand(*own.shape[:-1], -1)
            moved = x + (own - (lower * (lower < own - 1e-6)).amax(-1, keepdim=True)) * velocity
        elif self.config.sampler == "renoise" and following > 0:
            noise = randn_tensor(x.shape, generator or self._renoise, x.device, x.dtype)
            x0 = euler_step(x, velocity, sigma, 0.0)
            moved = (1 - following) * x0 + following * noise
        else:
            moved = euler_step(x, velocity, sigma, following)
        self._step_index += 1
        moved = moved.to(model_output.dtype)
        return PhasedDMDSchedulerOutput(prev_sample=moved) if return_dict else (moved,)

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor) -> Tensor:
        """Add noise to clean samples: ``(1 - sigma) * sample + sigma * noise`` at the sigmas of these timesteps.

        Args:
            sample: Clean samples of shape (batch, ...).
            timestep: A timestep, or one for each sample, of shape (batch,). One that is a rounded timestep of the plan
                stands for the plan's own.
            noise: Standard normal noise of the same shape as the samples.

        Returns:
            Noisy samples of the same shape and dtype.
        """
        values = torch.as_tensor(timestep).reshape(-1).float().cpu() / self.config.num_train_timesteps
        distance, nearest = (values[:, None] - self.sigmas).abs().min(dim=1)
        sigmas = torch.where(distance <= 1e-3, self.sigmas[nearest], values)
        sigma = like(sigmas.to(sample.device).expand(len(sample)), sample)
        return ((1 - sigma) * sample + sigma * noise).to(sample.dtype)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Do as ``scale_noise``, under the name and in the argument order that some pipelines use.

        Args:
            original_samples: Clean samples of shape (batch, ...).
            noise: Standard normal noise of the same shape.
            timesteps: Timesteps of shape (batch,).

        Returns:
            Noisy samples of the same shape and dtype.
        """
        return self.scale_noise(original_samples, timesteps, noise)

    def __len__(self) -> int:
        """Count the timesteps of training, as diffusers asks for it.

        Returns:
            ``num_train_timesteps``.
        """
        return int(self.config.num_train_timesteps)


def _uniform(sigmas: np.ndarray, atol: float = 1e-6) -> bool:
    """Whether these are the raw times that pipelines pass by default: from 1 down in equal steps."""
    return len(sigmas) > 0 and np.allclose(sigmas, np.linspace(1, sigmas[-1], len(sigmas)), atol=atol)


def _check_start(sigmas: Sequence[float] | np.ndarray | None) -> None:
    """Refuse the steps that a pipeline computes for samples that are not noise."""
    if sigmas is not None and float(sigmas[0]) < 0.995:
        raise ValueError(
            f"this call starts midway, at sigma {float(sigmas[0]):.3g}, where the experts' plan starts from noise: set "
            "the argument that asks for it to noise alone, such as init_noise_level=1"
        )


def _check_same(what: str, sigmas: np.ndarray, plan: PhasePlan) -> None:
    if not np.allclose(sigmas, plan.sigmas, atol=1e-3):
        expected = ", ".join(f"{sigma:.4f}" for sigma in plan.sigmas)
        found = ", ".join(f"{sigma:.4f}" for sigma in sigmas)
        raise ValueError(f"the {what} given are not the plan's: expected sigmas {expected}, found {found}; give none")


def _plain(value: Any) -> Any:
    """Copy a config value into plain dictionaries and lists; diffusers freezes the containers of a config."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
