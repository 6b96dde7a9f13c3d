"""What a model family says of its LoRA files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from .lora_keys import LoraKeys
from .module_names import ModuleNames

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class LoraFiles:
    """Names of modules in LoRA files, and how stock diffusers loads these files."""

    title: str
    """What the model is called in messages."""
    blocks: tuple[str, ...]
    """Names of the network's lists of blocks, whose linear layers LoRA experts adapt."""
    modules: Mapping[str, str]
    """Linear layers of a block that LoRA files may adapt: their names in diffusers to those in the native layout, which
    is the one of the original code, of ComfyUI and of LoRA files."""
    lora_targets: tuple[str, ...]
    """Those of ``modules`` that LoRA experts adapt unless a configuration says otherwise: all but the modulation."""
    lora_keys: LoraKeys = LoraKeys()
    """How LoRA files name their tensors."""
    default_base: str | None = None
    """Hub id of the base that most LoRA files of other projects belong to; None where there is none to assume."""
    lora_loader: str = "load_lora_weights"
    """What loads LoRA files, as an attribute of the pipeline: that of a network where the pipeline itself has none."""

    @property
    def lora_names(self) -> ModuleNames:
        """All that LoRA files of other projects change, with every name that they give it; ``modules`` by default."""
        return ModuleNames(self.blocks, self.modules)

    def lora_arguments(self, component: str) -> dict[str, Any]:
        """Say in the words of ``load_lora_weights`` into which network a file goes.

        Args:
            component: A network of the pipeline.

        Returns:
            Keyword arguments of the call.

        Raises:
            ValueError: If the pipeline's loader does not reach this network.
        """
        if component == "transformer":
            return {}
        raise ValueError(f"the LoRA loader of {self.title} pipelines reaches transformer alone, found {component}")

    def load_lora(
        self, pipeline: DiffusionPipeline, source: Any, component: str = "transformer", **options: Any
    ) -> None:
        """Load a LoRA file as stock diffusers does.

        Args:
            pipeline: The pipeline.
            source: A folder, a Hub id or tensors by their keys.
            component: The network of the pipeline that the file is for.
            **options: ``adapter_name`` and the like.

        Raises:
            ValueError: If the pipeline's loader does not reach this network.
        """
        attrgetter(self.lora_loader)(pipeline)(source, **options, **self.lora_arguments(component))

    def owns_lora(self, modules: Sequence[str]) -> bool:
        """Tell a LoRA file of this family from those of all other models.

        Args:
            modules: Names of all modules that the file adapts, in any layout and with any prefix.

        Returns:
            Whether the names can only be of this family: false where other models have them too.
        """
        return False

    def released_components(self, files: int) -> tuple[str, ...]:
        """Tell which networks LoRA files are for that another project released together.

        Args:
            files: How many there are.

        Returns:
            The network for each of them, high noise first.
        """
        return ("transformer",) * files

    def native_module_name(self, diffusers_name: str) -> str:
        """Find a module's name in the native layout.

        Args:
            diffusers_name: Its name in diffusers.

        Returns:
            The name without the prefix of LoRA files.

        Raises:
            ValueError: If it is none that a LoRA file may adapt.
        """
        return self._renamed(diffusers_name, self.modules)

    def diffusers_module_name(self, native_name: str) -> str:
        """Find a module's name in diffusers, the inverse of ``native_module_name``.

        Args:
            native_name: Its name in the native layout, without the prefix of LoRA files.

        Returns:
            The name in diffusers.

        Raises:
            ValueError: If it is none that a LoRA file may adapt.
        """
        return self._renamed(native_name, {native: own for own, native in self.modules.items()})

    def _renamed(self, name: str, names: Mapping[str, str]) -> str:
        blocks = "|".join(self.blocks)
        match = re.fullmatch(rf"((?:{blocks})\.\d+)\.(.+)", name)
        if not match or match[2] not in names:
            raise ValueError(
                f"a {self.title} module to adapt is {blocks}.<n>.<one of {', '.join(names)}>, found {name!r}"
            )
        return f"{match[1]}.{names[match[2]]}"
