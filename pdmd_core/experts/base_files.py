"""The diffusers pipeline that experts belong to, as files: its configs, the shapes of its networks, their weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..families import ModelFamily, family
from .errors import ExpertsError
from .format.fingerprint import Sampler, sampler_of_files
from .format.lora_keys import matching
from .format.manifest import BaseModel
from .format.untrusted import read_json, shown
from .format.weights import Weights, open_weights
from .hub.retries import explain, hub_error

Shapes = Mapping[str, tuple[int, ...]]
"""Name to shape of each weight of a network."""
MAX_LAYERS = 1000
"""The most layers that a config may ask for, since networks are built from configs of strangers."""
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
"""The file name under which diffusers saves the weights of a network."""

_CONFIGS = ["model_index.json", "*/config.json"]
_NETWORKS = ["transformer*/*.safetensors", "transformer*/*.index.json"]
_NEVER = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.onnx", "*.msgpack", "*.h5"]


@dataclass(frozen=True)
class BaseFiles:
    """A pipeline folder whose networks are of the family that the experts name."""

    folder: Path
    """The folder, which may lie in the Hub's cache."""
    family: ModelFamily
    """The family of the experts' base."""

    @classmethod
    def find(
        cls, base: BaseModel, given: str | None, networks: bool, others: bool = False, option: str = "--base"
    ) -> BaseFiles:
        """Find the base that the manifest names, or the one that the user gave, and download what is needed of it.

        Args:
            base: The base that the manifest names.
            given: A folder or Hub id to use instead; None takes the manifest's.
            networks: Whether the weights of its networks are needed, beside the configs.
            others: Whether all other components are needed.
            option: What the user sets it with, for errors.

        Returns:
            The files of the base.

        Raises:
            ExpertsError: If there is no such folder or Hub model, or if its networks are of another family.
        """
        model = base.model if given is None else given
        if Path(model).is_dir():
            folder = Path(model)
        else:
            allowed = None if others else _CONFIGS + (_NETWORKS if networks else [])
            refused = _NEVER + ([] if networks else _NETWORKS)
            folder = _download(model, base.revision if given is None else None, allowed, refused, option)
        found = cls(folder, family_of_base(base))
        found.index()
        return found

    def index(self) -> dict[str, Any]:
        """Read the pipeline's model_index.json.

        Returns:
            Its content.

        Raises:
            ExpertsError: If the folder is not that of a pipeline.
        """
        try:
            index = read_json(self.folder / "model_index.json")
        except ExpertsError:
            index = None
        if not isinstance(index, dict):
            raise ExpertsError(
                f"base {self.folder}: no readable model_index.json: give --base a folder or Hub id of a pipeline"
            )
        return index

    def config(self, component: str) -> dict[str, Any]:
        """Read a network's config.json.

        Args:
            component: The component's name, such as ``transformer``.

        Returns:
            Its content.

        Raises:
            ExpertsError: If there is none, or if the network is not one of the family's.
        """
        path = self.folder / component / "config.json"
        try:
            config: dict[str, Any] = read_json(path)
        except ExpertsError as error:
            raise ExpertsError(f"base {self.folder}: {component} has no readable config.json ({error})") from None
        found = config.get("_class_name") if isinstance(config, dict) else None
        if found != self.family.architecture:
            raise ExpertsError(
                f"base {self.folder}: {component} is a {shown(found)}, the experts are of a "
                f"{self.family.architecture}: give their own base with --base"
            )
        if any(isinstance(value, int) and value > MAX_LAYERS for key, value in config.items() if "layers" in key):
            raise ExpertsError(f"base {self.folder}: {component} has more than {MAX_LAYERS} layers: download it again")
        return config

    def shapes(self, component: str) -> Shapes:
        """Compute the shapes of a network's weights from its config; no weight is read.

        Args:
            component: The component's name, such as ``transformer``.

        Returns:
            Name to shape of every weight.

        Raises:
            ExpertsError: If the config makes no network.
            ImportError: If diffusers is not installed.
        """
        config = json.dumps(self.config(component))
        try:
            return _shapes(self.family.architecture, config)
        except ImportError:
            raise
        except Exception as error:  # whatever a network's constructor makes of a stranger's values
            reason = shown(" ".join(str(error).split()))
            raise ExpertsError(
                f"base {self.folder}: the config.json of {component} makes no network ({reason})"
            ) from None

    def weights(self, component: str) -> Weights:
        """Open a network's weights, in one file or in shards.

        Args:
            component: The component's name, such as ``transformer``.

        Returns:
            The weights, which are read when they are asked for.

        Raises:
            ExpertsError: If the files are missing or unreadable.
        """
        return open_weights(*self.weight_files(component))

    def sampler(self, component: str) -> tuple[list[str], Sampler]:
        """Prepare samples of a network's weights, by which fingerprints are taken and compared.

        Args:
            component: The component's name, such as ``transformer``.

        Returns:
            The names of the weights, and a function from a name to its sample.

        Raises:
            ExpertsError: If the files are missing or unreadable.
        """
        return sampler_of_files(self.weight_files(component))

    def weight_files(self, component: str) -> list[Path]:
        """List the file of a network's weights, or its shards.

        Args:
            component: The component's name, such as ``transformer``.

        Returns:
            Paths of safetensors files, which may be missing.

        Raises:
            ExpertsError: If the config or the list of shards is unreadable.
        """
        self.config(component)
        folder = self.folder / component
        index = folder / f"{WEIGHTS_NAME}.index.json"
        if not index.is_file():
            return [folder / WEIGHTS_NAME]
        try:
            names = set(read_json(index)["weight_map"].values())
        except (ExpertsError, KeyError, AttributeError, TypeError):
            raise ExpertsError(f"{index}: not a list of weight files: download the base again") from None
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ExpertsError(f"{index}: names a file of another folder: download the base again")
        return [folder / name for name in sorted(names)]

    @property
    def float32_modules(self) -> Sequence[str]:
        """Parts of weight names that diffusers keeps in float32 whatever the dtype of the network."""
        import diffusers

        return getattr(diffusers, self.family.architecture)._keep_in_fp32_modules or ()

    def check_full(self, file: str, component: str, found: Shapes) -> None:
        """Check that these are exactly the weights of a network.

        Args:
            file: The name of the file that holds them, for errors.
            component: The component that they belong to.
            found: Name to shape of the weights.

        Raises:
            ExpertsError: If a weight is missing, unknown or of another shape.
        """
        expected = self.shapes(component)
        for name in sorted(set(expected) ^ set(found)):
            what = "lacks" if name in expected else "has the unknown weight"
            raise ExpertsError(f"{file} {what} {name}, it does not fit {component} of {self.folder}: give its own base")
        for name, shape in found.items():
            self._check_shape(file, component, name, shape, expected[name])

    def check_lora(self, file: str, component: str, found: Shapes, targets: Sequence[str] = ()) -> None:
        """Check that a network has the modules that a LoRA adapts, and no other module that it targets.

        Args:
            file: The name of the LoRA's file, for errors.
            component: The component that it belongs to.
            found: Shapes of ``<module>.lora_A``, (rank, in), and ``<module>.lora_B``, (out, rank).
            targets: Module names; each module that ends in one of them must be adapted.

        Raises:
            ExpertsError: If a module is missing in the network or left out by the LoRA, or if a shape does not fit.
        """
        expected = self.shapes(component)
        for name, shape in found.items():
            module, _, part = name.rpartition(".")
            weight = expected.get(f"{module}.weight")
            if weight is None or len(weight) != 2:
                raise ExpertsError(f"{file} adapts {module}, which {component} of {self.folder} does not have")
            wanted = (shape[0], weight[1]) if part == "lora_A" else (weight[0], shape[1])
            self._check_shape(file, component, name, shape, wanted)
        blocks = tuple(f"{name}." for name in self.family.blocks)
        adaptable = {
            name.removesuffix(".weight")
            for name, shape in expected.items()
            if len(shape) == 2 and name.startswith(blocks)
        }
        left_out = sorted(m for m in adaptable if matching(m, targets) and f"{m}.lora_A" not in found)
        if left_out:
            raise ExpertsError(
                f"{file} leaves out {len(left_out)} of the modules that it targets, {left_out[0]} for one: "
                "a part of it is missing, or it belongs to a smaller base"
            )

    def _check_shape(
        self, file: str, component: str, name: str, found: tuple[int, ...], expected: tuple[int, ...]
    ) -> None:
        if found != expected:
            raise ExpertsError(
                f"{file}: {name} has shape {found}, {component} of {self.folder} takes {expected}: give its own base"
            )


def family_of_base(base: BaseModel) -> ModelFamily:
    """Look up the family that a manifest names.

    Args:
        base: The base of the experts.

    Returns:
        The family.

    Raises:
        ExpertsError: If there is no such family, or if it has another architecture.
    """
    try:
        found = family(base.family)
    except ValueError as error:
        raise ExpertsError(str(error)) from None
    if found.architecture != base.architecture:
        raise ExpertsError(f"networks of the family {found.name} are {found.architecture}, found {base.architecture}")
    return found


@cache
def _shapes(architecture: str, config: str) -> Shapes:
    import diffusers

    with torch.device("meta"):
        network = getattr(diffusers, architecture).from_config(json.loads(config))
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def _download(model: str, revision: str | None, allowed: list[str] | None, refused: list[str], option: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=allowed, ignore_patterns=refused))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        answer = hub_error(error)
        text = " ".join(str(error).split())[:200] if answer is None else explain(answer, revision)
        raise ExpertsError(
            f"base {model!r} is neither a folder nor a Hub model that can be read ({text}): give {option}"
        ) from None
