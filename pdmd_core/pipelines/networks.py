"""Full experts in a pipeline: networks of the base's class with the experts' weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from ..experts import ExpertsError, PhasedExperts
from ..experts.format.untrusted import shown
from ..experts.hub.retries import explain, hub_error

COMPONENT = "transformer"
"""The component of a pipeline that denoises. Full experts are this one, ``transformer_2``, ``transformer_3`` and so
on."""


def network_of(pipe: DiffusionPipeline, component: str) -> Any:
    """Look up a network of a pipeline, without the wrapper of ``torch.compile``.

    Args:
        pipe: The pipeline.
        component: The component's name.

    Returns:
        The network, or None where the pipeline has none of this name.
    """
    network = getattr(pipe, component, None)
    return getattr(network, "_orig_mod", network)


def component_names(count: int) -> list[str]:
    """List the components that hold full experts, in the order of their phases.

    Args:
        count: The number of experts.

    Returns:
        ``transformer``, ``transformer_2`` and so on.
    """
    return [COMPONENT, *(f"{COMPONENT}_{k}" for k in range(2, count + 1))]


def full_networks(
    experts: PhasedExperts, empty: Callable[[str], nn.Module], dtype: torch.dtype | None, quantization: Any = None
) -> list[nn.Module]:
    """Build one network for each full expert, with the weights from its file.

    Args:
        experts: Full experts.
        empty: Makes a network without weights for a component of the base.
        dtype: The dtype of the weights, except for parts that diffusers keeps in float32; None is float32.
        quantization: How diffusers is to quantise them; None leaves them as they are.

    Returns:
        The networks in the order of the phases, frozen and in evaluation mode.

    Raises:
        ExpertsError: If a file cannot be read or does not fit the network.
    """
    networks = []
    for expert in experts.manifest.experts:
        network = empty(expert.component)
        if quantization is not None:
            networks.append(_quantised(network, experts.verify(expert.name), quantization, dtype))
            continue
        try:
            network.load_state_dict(experts.tensors(expert.name), assign=True)
        except RuntimeError as error:
            raise ExpertsError(
                f"{experts.folder}: {expert.file} does not fit a {type(network).__name__} of the base "
                f"{experts.manifest.base.model!r}: {' '.join(str(error).split())[:300]}"
            ) from None
        in_float32 = getattr(network, "_keep_in_fp32_modules", None) or []
        for name, parameter in network.named_parameters():
            keep = any(part in in_float32 for part in name.split("."))
            parameter.data = parameter.data.to(torch.float32 if keep or dtype is None else dtype)
        networks.append(network.requires_grad_(False).eval())
    return networks


def _quantised(network: Any, file: Path, quantization: Any, dtype: torch.dtype | None) -> nn.Module:
    """Load weights as diffusers quantises them when it loads a network."""
    method = str(getattr(quantization, "quant_method", ""))
    if "gguf" in method.lower():
        raise ExpertsError("full experts cannot be quantised as GGUF: take another quantisation, or LoRA experts")
    with TemporaryDirectory() as folder:
        network.save_config(folder)
        Path(folder, "diffusion_pytorch_model.safetensors").symlink_to(file.resolve())
        loaded: nn.Module = type(network).from_pretrained(
            folder, quantization_config=copy.deepcopy(quantization), torch_dtype=dtype
        )
    return loaded.requires_grad_(False).eval()


def empty_like(network: Any) -> nn.Module:
    """Make a network of the same class and config, without memory for its parameters.

    Args:
        network: A network of diffusers.

    Returns:
        The empty network.
    """
    return _without_weights(type(network), network.config)


def load_index(source: str, hub: Mapping[str, Any]) -> dict[str, Any]:
    """Read ``model_index.json`` of a pipeline.

    Args:
        source: A pipeline folder or a Hub id.
        hub: Arguments for the Hub, such as ``token`` and ``revision``.

    Returns:
        The content of the file.

    Raises:
        ExpertsError: If there is none to read.
    """
    try:
        index: dict[str, Any] = DiffusionPipeline.load_config(source, **hub)
    except (OSError, ValueError) as error:
        raise no_base(source, error) from None
    return index


def no_base(source: str, error: Exception) -> ExpertsError:
    """Make the error for a base that cannot be loaded, in one line.

    Args:
        source: The folder or Hub id that was tried.
        error: What loading it raised.

    Returns:
        The error, to be raised.
    """
    answer = hub_error(error)
    reason = " ".join(str(error).split())[:300] if answer is None else explain(answer, None)
    return ExpertsError(f"cannot load the base {source!r} of these experts: {reason}; pass another as base=")


def pipeline_class(source: str, index: Mapping[str, Any]) -> Any:
    """Find the pipeline class that a model_index.json names.

    Args:
        source: The folder or Hub id of the pipeline, for errors.
        index: The content of its model_index.json.

    Returns:
        A class of diffusers; ``DiffusionPipeline`` where the class is code of the base.

    Raises:
        ExpertsError: If the installed diffusers has no such pipeline class.
    """
    name = index.get("_class_name")
    if isinstance(name, list):  # which diffusers runs only with trust_remote_code
        return DiffusionPipeline
    return class_of(name, DiffusionPipeline, f"the base {source!r} names its pipeline")


def empty_network(architecture: str, source: str, hub: Mapping[str, Any], component: str) -> nn.Module:
    """Make a network of a class with the config of the base's component, without memory for its parameters.

    Args:
        architecture: The name of the class in diffusers.
        source: The folder or Hub id of the base.
        hub: Arguments for the Hub, such as ``token`` and ``revision``.
        component: The component whose config is read.

    Returns:
        The empty network.

    Raises:
        ExpertsError: If diffusers has no such network class, or if the config cannot be read.
    """
    kind = class_of(architecture, ModelMixin, "the manifest names its network")
    try:
        return _without_weights(kind, kind.load_config(source, subfolder=component, **hub))
    except (OSError, ValueError) as error:
        raise no_base(source, error) from None


def class_of(name: object, of: type, who: str) -> Any:
    """Find the class of diffusers that an untrusted file names; of no other kind than ``of``.

    Args:
        name: What the file says.
        of: What the class has to be derived from.
        who: The file, for errors.

    Returns:
        The class.

    Raises:
        ExpertsError: If the installed diffusers has no such class.
    """
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, of)):
        raise ExpertsError(
            f"{who} {shown(name)}, which is no {of.__name__} of diffusers {diffusers.__version__}: upgrade diffusers, "
            "or ask the author of the file"
        )
    return found


def _without_weights(kind: Any, config: Mapping[str, Any]) -> nn.Module:
    """Make a network with its buffers but without memory for its parameters."""
    from accelerate import init_empty_weights

    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    with init_empty_weights(include_buffers=False):
        network: nn.Module = kind.from_config(plain)
    return network
