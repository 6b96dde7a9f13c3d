"""Forward hooks of a pipeline's networks: the expert of the scheduler's current step runs, or an error is raised.

Routing goes by the scheduler's step. The timestep that a network is called with is only compared with it: rounded to
bfloat16 it may lie on the other side of a boundary, and its units differ from model to model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from threading import RLock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..scheduler import PhasedDMDScheduler
from .differences import Differences

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


_CALL: ContextVar[tuple[Route, PhasedDMDScheduler] | None] = ContextVar("phased_call", default=None)
"""The call of a phased pipeline in which the current thread is."""


class Route:
    """The source of the current phase: the scheduler that the hooks of one set of experts look at.

    Pipelines that share experts share their route. Each call has the scheduler of its own pipeline, in whatever thread
    it runs.

    Args:
        scheduler: The scheduler of the pipeline to which the experts were attached, which counts outside of calls.
    """

    def __init__(self, scheduler: PhasedDMDScheduler) -> None:
        self._latest = scheduler
        self._calls = 0
        self._counting = RLock()
        self.lock = RLock()
        """Held by a call that changes the networks, as LoRA experts do."""
        self.switched = False
        """A phased pipeline is running; it switches experts whenever it takes its network."""
        self.attached = True

    @property
    def scheduler(self) -> PhasedDMDScheduler:
        """The scheduler of the call in which the current thread is, of the latest call outside of any."""
        call = _CALL.get()
        return call[1] if call is not None and call[0] is self else self._latest

    @contextmanager
    def call(self, scheduler: PhasedDMDScheduler) -> Iterator[None]:
        """Route by a scheduler within a block, in the current thread.

        Args:
            scheduler: The scheduler of the pipeline that runs.

        Yields:
            Nothing.
        """
        with self._counting:
            self._latest = scheduler
            self._calls += 1
            self.switched = True
        token = _CALL.set((self, scheduler))
        try:
            yield
        finally:
            _CALL.reset(token)
            with self._counting:
                self._calls -= 1
                self.switched = self._calls > 0

    def __getstate__(self) -> dict[str, Any]:
        """Copy what a route is without its locks and calls.

        Returns:
            The state for ``pickle`` and ``copy``.
        """
        return {"scheduler": self._latest, "attached": self.attached}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make a route of a copied state.

        Args:
            state: What ``__getstate__`` gave.
        """
        Route.__init__(self, state["scheduler"])
        self.attached = state["attached"]


class PhaseGuard:
    """A hook that refuses a forward of a network in another phase or at another sigma than the scheduler's current one.

    It is a forward pre-hook (``register_forward_pre_hook(guard, with_kwargs=True)``): such hooks run outside whatever
    replaces ``forward``, as offloading does, and stay when that goes.

    Args:
        route: Says which phase is current.
        network: The network that the hook is on.
        phases: The indices of the phases in which this network may run.
    """

    def __init__(self, route: Route, network: nn.Module, phases: frozenset[int]) -> None:
        self.route = route
        self.network = network
        self.phases = phases

    def __call__(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check a call of the network.

        Args:
            network: The network that is called.
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        Raises:
            RuntimeError: As ``check`` does.
        """
        if torch.compiler.is_compiling() and self.route.switched:
            return  # nothing to do inside the graph: the pipeline, which is outside, has switched
        self.check(args, kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compare a call's timestep with the scheduler's sigma and switch to the current phase.

        Args:
            args: The positional arguments of the network's forward.
            kwargs: Its keyword arguments.

        Raises:
            RuntimeError: If the timestep is not at the scheduler's current sigma, or if the network has no turn in the
                current phase.
        """
        scheduler = self.route.scheduler
        timestep = _timestep(self.network, args, kwargs)
        if not _at_sigma(timestep, scheduler.sigma):
            raise RuntimeError(
                f"the network is called at timestep {float(timestep.max()):.4g}, the phased scheduler is at sigma "
                f"{scheduler.sigma:.4g}: another scheduler walks this pipeline; call attach_experts(this_pipeline, "
                "phased_pipeline)"
            )
        if scheduler.phase not in self.phases:
            name = scheduler.plan.phases[scheduler.phase].name if scheduler.plan else scheduler.phase
            raise RuntimeError(
                f"sigma {scheduler.sigma:.4g} belongs to the expert {name!r}, another expert was called: this pipeline "
                "does not switch experts; call attach_experts(this_pipeline, phased_pipeline)"
            )
        self.switch(scheduler.phase)

    def switch(self, phase: int) -> None:
        """Make the network that of a phase, where it can run in several.

        Args:
            phase: The index of the phase.
        """


class AdapterSwitch(PhaseGuard):
    """A hook that also activates the LoRA adapter of the current phase; other adapters stay active beside it.

    Args:
        route: Says which phase is current.
        network: The network that carries the adapters.
        adapters: Phase index to the name of its adapter on this network; None for a phase that has none.
        differences: What phases change beside their adapters.
    """

    def __init__(
        self,
        route: Route,
        network: nn.Module,
        adapters: Mapping[int, str | None],
        differences: Differences | None = None,
    ) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        super().__init__(route, network, frozenset(adapters))
        self.network: Any = network
        self.adapters = adapters
        self.differences = differences or Differences(network)
        self.own = frozenset(name for name in adapters.values() if name is not None)
        self.fusable = [module for module in network.modules() if hasattr(module, "fuse_projections")]
        self.current: int | None = None
        """The phase whose adapter is active."""
        self.layers = [
            module
            for module in network.modules()
            if isinstance(module, BaseTunerLayer) and self.own & set(module._all_available_adapter_names())
        ]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def switch(self, phase: int) -> None:
        """Activate the adapter of a phase.

        Args:
            phase: The index of the phase; one without an adapter on this network is passed over.

        Raises:
            RuntimeError: If the adapter was unloaded, or if a LoRA, or query, key and value are fused on the network,
                or LoRA is disabled.
        """
        if phase not in self.phases:
            return
        if any(getattr(module, "fused_projections", False) for module in self.fusable):
            raise RuntimeError(
                "query, key and value are fused in the network, past the phased experts: call unfuse_qkv_projections()"
            )
        if phase != self.current and getattr(self.network, "is_cache_enabled", False):
            self.network._reset_stateful_cache()  # what it kept is another expert's
        self.current = phase
        self.differences.switch(phase)
        adapter = self.adapters[phase]
        if adapter is not None and adapter not in getattr(self.network, "peft_config", {}):
            raise RuntimeError(
                f"the adapter {adapter!r} of the phased experts was unloaded: call detach_experts, then "
                "attach_experts; to unload a LoRA of your own, call delete_adapters with its name"
            )
        for layer in self.layers:
            if layer.merged_adapters:
                raise RuntimeError(
                    f"the LoRA {', '.join(layer.merged_adapters)} is fused into the network, which switches phased "
                    "experts off: call unfuse_lora() on the pipeline; to fuse a LoRA of your own, do it before "
                    "attach_experts and call unload_lora_weights() after it"
                )
            if layer.disable_adapters:
                raise RuntimeError(
                    "LoRA is disabled, and with it the phased experts: call enable_lora() on the pipeline; to do "
                    "without a LoRA of your own, give it weight 0 in set_adapters"
                )
            active = layer.active_adapters
            wanted = [] if adapter is None else [adapter]
            if self.own.intersection(active) == set(wanted):
                continue
            # as layer.set_adapter does, which also walks all parameters to freeze them: they are frozen since loading
            layer._active_adapter = [*(name for name in active if name not in self.own), *wanted]


def guard_networks(networks: Sequence[nn.Module], route: Route) -> list[RemovableHandle]:
    """Put a hook on each full expert, which may run in its own phase only.

    Args:
        networks: Full experts in the order of the phases.
        route: Says which phase is current.

    Returns:
        Handles by which the hooks are removed.
    """
    return [
        network.register_forward_pre_hook(PhaseGuard(route, network, frozenset({k})), with_kwargs=True)
        for k, network in enumerate(networks)
    ]


TIMESTEPS = ("timestep", "t", "timesteps")
"""What networks call the argument."""


def _timestep(network: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """The timestep argument of a call, whatever it is called."""
    for name in TIMESTEPS:
        if name in kwargs:
            return torch.as_tensor(kwargs[name])
    names = list(inspect.signature(type(network).forward).parameters)[1:]
    for name in TIMESTEPS:
        if name in names and names.index(name) < len(args):
            return torch.as_tensor(args[names.index(name)])
    raise RuntimeError(f"a {type(network).__name__} was called without a timestep: phased experts are routed by it")


def _at_sigma(timestep: Tensor, sigma: float) -> bool:
    """Whether a timestep is sigma * 1000, that less 1 (GLM-Image), sigma or 1 - sigma, as far as its dtype can tell.

    The largest entry counts: image-to-video models give the tokens of the known frame timestep 0.
    """
    value = float(timestep.max())
    tolerance = 1e-4 if timestep.dtype in (torch.float32, torch.float64) else 8e-3
    candidates = ((sigma * 1000, 1000.0), (sigma * 1000 - 1, 1000.0), (sigma, 1.0), (1 - sigma, 1.0))
    return any(abs(value - candidate) <= tolerance * unit for candidate, unit in candidates)
