"""Whether LoRA would adapt what a configuration names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from training.config.schema import ConfigError, DistillConfig


def check_targets(config: DistillConfig, networks: Mapping[str, nn.Module]) -> None:
    """Refuse a target that no module of the teacher's networks has; PEFT would leave it out in silence.

    Args:
        config: The configuration of the run.
        networks: The teacher's networks, on any device.

    Raises:
        ConfigError: The target, and what modules are called.
    """
    names = [name for network in networks.values() for name, module in network.named_modules() if _is_linear(module)]
    for section, role in (("generator", config.generator), ("fake", config.fake)):
        for target in role.targets or () if role.kind == "lora" else ():
            if not any(f".{name}".endswith(f".{target}") for name in names):
                ends = ", ".join(
                    dict.fromkeys(name.rpartition("blocks.")[2].partition(".")[2] or name for name in names)
                )
                raise ConfigError(
                    f"{section}.targets: no module of the teacher ends in {target!r}; its modules end in {ends:.300}"
                )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d)
