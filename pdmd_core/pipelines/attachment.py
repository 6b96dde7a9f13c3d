"""What a phased pipeline carries: its experts, what routes them, and what it was before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import RLock
from typing import TYPE_CHECKING, Any

from diffusers import DiffusionPipeline
from torch import nn

from ..experts import ExpertsError, PhasedExperts
from ..phases import PhasePlan
from ..scheduler import PhasedDMDScheduler
from .merging import Merge
from .networks import COMPONENT, component_names, network_of
from .offload import check_disk_files
from .routing import AdapterSwitch, Route
from .settings import give_settings, settings_of

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

MISSING = object()
"""Marks a component that the pipeline did not have."""


@dataclass
class Original:
    """A pipeline as it was before experts were attached."""

    kind: type[DiffusionPipeline]
    """Its class."""
    config: Any
    """Its configuration."""
    components: dict[str, Any]
    """The components that experts replaced; None where one was not loaded, ``MISSING`` where there was none."""


@dataclass
class Attachment:
    """What a phased pipeline carries as ``pipe.phased``."""

    plan: PhasePlan
    """The plan that the experts were distilled for."""
    guidance_scale: float
    """The guidance at which the experts sample; 1 is none."""
    route: Route
    """Says which phase is current."""
    experts: PhasedExperts | None
    """The opened experts; None for a pipeline that was loaded from a stock folder of full experts."""
    networks: tuple[nn.Module, ...] = ()
    """Full experts in the order of the phases; empty for LoRA experts."""
    switches: Mapping[str, AdapterSwitch] = field(default_factory=dict)
    """The switches of LoRA experts, by component; empty for full experts."""
    handles: list[RemovableHandle] = field(default_factory=list)
    """Handles of the hooks on the networks; empty where the experts are shared from another pipeline."""
    original: Original | None = None
    """The pipeline before the experts; None for one that was loaded from a stock folder of full experts."""
    merge: Merge = False
    """Whether LoRA experts are merged into the weights as they take their turns."""
    running: bool = False
    """Whether the pipeline is inside a call, when ``pipe.transformer`` is the expert of the current phase."""
    settings: tuple[object, ...] | None = None
    """What was set on the first full expert at the last call; the others follow it."""
    own_lock: RLock = field(default_factory=RLock)
    """Held by a call of this pipeline, which has one scheduler."""

    @property
    def lock(self) -> RLock:
        """What a call holds: LoRA experts take turns on their network, also among pipelines that share it."""
        return self.route.lock if self.switches else self.own_lock

    def __getstate__(self) -> dict[str, Any]:
        """Copy what an attachment is without its lock.

        Returns:
            The state for ``pickle`` and ``copy``.
        """
        return self.__dict__ | {"own_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make an attachment of a copied state.

        Args:
            state: What ``__getstate__`` gave.
        """
        self.__dict__.update(state, own_lock=RLock())

    def on_turn(self, component: str, components: Mapping[str, Any]) -> Any:
        """Look up what a component of a running pipeline is in the current phase; LoRA experts are switched.

        Args:
            component: The component's name.
            components: The pipeline's components by name.

        Returns:
            The network that runs now, or the component as it is where it holds no experts.
        """
        phase = self.route.scheduler.phase
        if component in self.switches:
            self.switches[component].switch(phase)
        elif component == COMPONENT and self.networks:
            return components[component_names(len(self.networks))[phase]]
        return components.get(component)

    def check(self, pipe: DiffusionPipeline, given: Mapping[str, Any]) -> None:
        """Check that a call of the pipeline would sample with the experts.

        Args:
            pipe: The pipeline.
            given: The arguments of the call by name.

        Raises:
            ExpertsError: If the experts were detached, the scheduler or a network was replaced, the arguments scale the
                experts, or networks are offloaded to the same files.
        """
        if not self.route.attached:
            raise ExpertsError("the experts were detached from the pipeline that loaded them: attach_experts again")
        scheduler = pipe.scheduler
        if not isinstance(scheduler, PhasedDMDScheduler) or scheduler.plan != self.plan:
            raise ExpertsError(
                "phased experts walk the sigmas of their own plan, the pipeline's scheduler is a "
                f"{type(scheduler).__name__}: set pipe.scheduler = PhasedDMDScheduler.from_plan(pipe.phased.plan)"
            )
        expected = {name: switch.network for name, switch in self.switches.items()}
        expected |= dict(zip(component_names(len(self.networks)), self.networks, strict=True)) if self.networks else {}
        for name, network in expected.items():
            if network_of(pipe, name) is not network:
                raise ExpertsError(f"pipe.{name} was replaced and is no phased expert: detach, replace, attach again")
        for name in ("attention_kwargs", "joint_attention_kwargs"):
            if self.switches and not self.merge and (given.get(name) or {}).get("scale", 1.0) != 1.0:
                raise ExpertsError(f"{name}={given[name]} scales the experts too: weigh your LoRA with set_adapters")
        check_disk_files(expected)
        if len(self.networks) > 1 and (now := settings_of(self.networks[0])) != self.settings:
            give_settings(self.networks[0], self.networks[1:])
            self.settings = now
