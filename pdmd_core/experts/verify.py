"""Whether an experts folder is whole, fits its base, and samples the same here and in stock diffusers."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..hashing import sha256_of
from .base_files import BaseFiles
from .errors import ExpertsError
from .folder import PhasedExperts
from .format.files import RELEASED, SCHEDULER_CONFIG, check_scheduler, read_expert_metadata
from .format.fingerprint import base_warning, compare
from .format.header import read_header
from .format.lora_keys import lora_from_file
from .format.manifest import BaseModel, Expert, Manifest
from .format.weights import Weights, is_finite, open_weights, progress

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest difference of two samples' pixels in [0, 1] that counts as the same, by dtype of the networks: in float32 a
quarter of an 8-bit step. In bfloat16 the two ways round otherwise; what is found then are other pictures."""


@dataclass(frozen=True)
class Check:
    """One line of the result."""

    name: str
    """What was checked."""
    passed: bool
    """Whether it is as it should be."""
    detail: str
    """One line for the user."""
    warning: bool = False
    """Whether it passed, but is to be looked at."""


@dataclass(frozen=True)
class SampleRequest:
    """What to sample."""

    prompt: str = "a panda on a blue background"
    """The text."""
    size: tuple[int, int, int] | None = None
    """Width and height in pixels, and frames; None for those of the distillation."""
    max_sequence_length: int | None = None
    """The number of tokens to which the prompt is padded; None for that of the distillation."""
    device: str | None = None
    """Where to sample, as torch names it; a GPU where there is one when None."""
    dtype: torch.dtype = torch.float32
    """The dtype of the pipeline, float32 or bfloat16."""
    offload: bool = False
    """Whether each component of the pipeline waits in host memory while it does not run (needs a GPU)."""


def verify(folder: Path, base: str | None = None, request: SampleRequest | None = None) -> Iterator[Check]:
    """Check an experts folder, one thing after the other.

    Args:
        folder: The experts folder.
        base: A folder or Hub id in place of the base that the manifest names.
        request: What to sample at the end, if anything.

    Yields:
        The result of each check.

    Raises:
        ExpertsError: If the manifest itself cannot be used.
    """
    experts = PhasedExperts.open(folder)
    manifest = experts.manifest
    failed = False

    def run(name: str, check: Callable[[], str]) -> Check:
        nonlocal failed
        try:
            return Check(name, True, check())
        except ExpertsError as error:
            failed = True
            return Check(name, False, str(error))

    yield Check("manifest", True, f"{len(manifest.experts)} expert(s), {len(manifest.plan.sigmas)} step(s)")
    yield run("scheduler", lambda: _same_plan(experts))
    files: list[BaseFiles] = []
    yield run("base", lambda: _find_base(manifest, base, files, whole=request is not None))
    for component in sorted((manifest.base.fingerprints or {}) if files else ()):
        yield _base_weights(manifest.base, component, files[0])
    for expert in manifest.experts:
        path = folder / expert.file
        yield run(f"{expert.name}: sha256", lambda e=expert: _hash(experts, e))  # type: ignore[misc]
        if RELEASED not in manifest.training:
            yield run(f"{expert.name}: metadata", lambda e=expert, p=path: _metadata(manifest, e, p))  # type: ignore[misc]
            if files:
                yield run(f"{expert.name}: fits base", lambda e=expert, p=path: _fits(e, p, files[0]))  # type: ignore[misc]
        elif files:
            yield _released_fits(experts, expert, files[0])
        yield run(f"{expert.name}: values", lambda p=path: _finite(open_weights(p), p))  # type: ignore[misc]
    if request is not None:
        if failed:
            yield Check("sample", False, "not run, because of the failures above")
        else:
            yield run("sample", lambda: _samples_agree(experts, files[0], request))


def check_files(experts: PhasedExperts) -> None:
    """Check what can be known before a weight is read: hashes, sigmas of the files, and the scheduler if there is one.

    Args:
        experts: The opened folder.

    Raises:
        ExpertsError: The first thing that is not what was written.
    """
    for expert in experts.manifest.experts:
        path = experts.verify(expert.name)
        if RELEASED in experts.manifest.training:
            continue
        try:
            carried, own = read_expert_metadata(read_header(path).metadata)
        except ValueError:
            raise ExpertsError(f"{path}: carries no manifest: it is a file of other experts") from None
        if own.name != expert.name or carried.plan != experts.manifest.plan:
            raise ExpertsError(
                f"{path}: is expert {own.name!r} of other sigmas than the manifest's: the manifest was edited, or "
                "files were exchanged; download or export the experts again"
            )
    if (experts.folder / SCHEDULER_CONFIG).exists():
        _same_plan(experts)


def _same_plan(experts: PhasedExperts) -> str:
    try:
        check_scheduler(experts.folder, experts.manifest)
    except ExpertsError as error:
        raise ExpertsError(f"{error}: convert or download the experts again") from None
    return "has the manifest's plan"


def _find_base(manifest: Manifest, given: str | None, found: list[BaseFiles], whole: bool) -> str:
    base = BaseFiles.find(manifest.base, given, networks=whole, others=whole)
    for component in {expert.component for expert in manifest.experts}:
        base.config(component)
    found.append(base)
    return f"{given or manifest.base.model}: {base.family.architecture}"


def _base_weights(origin: BaseModel, component: str, base: BaseFiles) -> Check:
    """Whether the base has the weights that its fingerprint tells; only a warning, as experts are put on fine-tunes."""
    name = f"{component}: weights"
    try:
        if not all(path.is_file() for path in base.weight_files(component)):
            return Check(name, True, "not here, not compared with the fingerprint")
        sampler = base.sampler(component)[1]
        if text := base_warning(origin, component, sampler, str(base.folder / component)):
            return Check(name, True, text, warning=True)
        compared = compare((origin.fingerprints or {})[component], sampler).compared
    except ExpertsError as error:
        return Check(name, False, str(error))
    return Check(name, True, f"those of the base, by {compared} samples")


def _hash(experts: PhasedExperts, expert: Expert) -> str:
    found = sha256_of(experts.folder / expert.file)
    if found != expert.sha256:
        says = f"the manifest says {expert.sha256[:12]}..."
        raise ExpertsError(f"is {found[:12]}..., {says}: {expert.file} was changed or cut off, download it again")
    return f"{found[:12]}..."


def _metadata(manifest: Manifest, expert: Expert, path: Path) -> str:
    try:
        carried, own = read_expert_metadata(read_header(path).metadata)
        same = own.name == expert.name and carried.as_trained() == manifest.as_trained()
    except ValueError:
        same = False
    if not same:
        raise ExpertsError(f"{expert.file} does not carry this manifest: it is a file of other experts")
    return "the file carries this manifest" + (
        "" if expert.strength == 1 else f"; used at strength {expert.strength:g}"
    )


def _fits(expert: Expert, path: Path, base: BaseFiles) -> str:
    weights = open_weights(path)
    if expert.kind == "full":
        base.check_full(expert.file, expert.component, weights.shapes)
        return f"{len(weights.specs)} weights of {expert.component}"
    state = lora_from_file({name: weights.read(name) for name in weights.specs}, expert, base.family)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    base.check_lora(expert.file, expert.component, shapes, expert.targets or ())
    return f"{len(state) // 2} modules of {expert.component}, rank {expert.rank}, alpha {expert.alpha:g}"


def _released_fits(experts: PhasedExperts, expert: Expert, base: BaseFiles) -> Check:
    """Whether a file of another project fits; what of it has no place is a warning."""
    name = f"{expert.name}: fits base"
    try:
        file = experts.lora_changes(expert.name).fitted(base.shapes(expert.component), base.family.architecture)
    except ExpertsError as error:
        return Check(name, False, str(error))
    text = file.warning(base.family.architecture)
    return Check(name, True, text or f"changes {len(file.weights)} weights of {expert.component}", warning=bool(text))


def _finite(weights: Weights, path: Path) -> str:
    for name in progress(list(weights.specs), path.name):
        if not is_finite(weights.read(name)):
            raise ExpertsError(f"{name} has values that are not finite: these experts are damaged")
    return f"{sum(spec.numel for spec in weights.specs.values()):,} finite values"


def _samples_agree(experts: PhasedExperts, base: BaseFiles, request: SampleRequest) -> str:
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    training = experts.manifest.training
    try:
        dtype: Any = {"default": request.dtype, "vae": torch.float32}  # by component, as diffusers takes it
        named = DiffusionPipeline.load_config(base.folder).get("_class_name")
        kind = base.family.pipeline_of_images(training.get("pipeline"), named) or DiffusionPipeline
        pipeline = kind.from_pretrained(base.folder, dtype=dtype)
        pipeline.set_progress_bar_config(disable=True)
        device = torch.device(request.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if request.offload and device.type == "cpu":
            raise ExpertsError("cannot sample: --offload is for a GPU, this samples on the CPU: leave it out")
        if request.offload:
            pipeline.enable_model_cpu_offload(device=device)
        else:
            pipeline.to(device)
        width, height, frames = request.size or training.get("size") or (256, 256, 1)
        base.family.latent_shape(pipeline, height, width, frames)
        length = int(request.max_sequence_length or training.get("max_sequence_length") or 512)
    except (OSError, ValueError, TypeError, RuntimeError, AssertionError) as error:  # the last: torch without CUDA
        raise ExpertsError(f"cannot sample: {_in_a_line(error)}") from None
    try:
        return _compared(experts, base, request, pipeline, device, (width, height, frames), length)
    except torch.OutOfMemoryError as error:
        raise ExpertsError(
            f"out of memory ({_in_a_line(error)[:100]}): use --dtype bfloat16, --offload, --device cpu, or a smaller "
            "--size"
        ) from None


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _compared(
    experts: PhasedExperts,
    base: BaseFiles,
    request: SampleRequest,
    pipeline: DiffusionPipeline,
    device: torch.device,
    of_size: tuple[int, int, int],
    length: int,
) -> str:
    """Sample both ways and compare the pixels."""
    from PIL import ImageOps

    (width, height, frames), shape = of_size, base.family.latent_shape(pipeline, of_size[1], of_size[0], of_size[2])
    edits = str(experts.manifest.training.get("pipeline_tag")).startswith("image-")
    takes = base.family.needs_image(pipeline) or (edits and base.family.takes_image(pipeline))
    picture = _picture(width, height) if takes else None
    both = bool(experts.manifest.training.get("last_image")) or base.family.needs_last_image(
        pipeline.transformer.config
    )
    last = ImageOps.mirror(picture) if picture and both else None
    seen = [picture] if picture and base.family.prompts_see_images(pipeline) else None
    conditioning = base.family.encode_prompts(pipeline, [request.prompt], length, seen)
    if picture and last:
        conditioning |= base.family.encode_first_and_last(pipeline, [picture], [last], height, width, frames)
    elif picture:
        conditioning |= base.family.encode_images(pipeline, [picture], height, width, frames)
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    size = {"height": height, "width": width, "num_frames": frames}
    unguided = base.family.guidance_arguments(1.0, type(pipeline))
    call = {"image": picture, "last_image": last, **size, "max_sequence_length": length, **unguided}
    accepted = inspect.signature(pipeline.__call__).parameters
    call = {name: value for name, value in call.items() if name in accepted}
    for name, guider in base.family.guiders().items():
        setattr(pipeline, name, guider)
    stock = _stock_sample(experts, base, pipeline, device, prompt=request.prompt, **call)
    own = base.family.decode(pipeline, _own_sample(experts, base, pipeline, conditioning, noise))
    difference = float((stock.reshape(own.shape).to(own.device) - own).abs().max())
    text = f"{width}x{height}, {frames} frame(s): largest difference of a pixel {difference:.2g} (white is 1)"
    if not difference <= TOLERANCE[request.dtype]:
        raise ExpertsError(f"{text}: stock diffusers does not sample what these experts do here")
    return text


def _picture(width: int, height: int) -> Image:
    """A picture for pipelines that take one: red grows from left to right, green from top to bottom."""
    from PIL import Image

    ramps = [Image.linear_gradient("L").rotate(90), Image.linear_gradient("L"), Image.new("L", (256, 256), 128)]
    return Image.merge("RGB", ramps).resize((width, height))


@torch.no_grad()
def _stock_sample(
    experts: PhasedExperts, base: BaseFiles, pipeline: DiffusionPipeline, device: torch.device, **call: Any
) -> Tensor:
    """Pixels by diffusers' own loading and loop; the pipeline is left without adapters."""
    from ..scheduler import PhasedDMDScheduler

    manifest = experts.manifest
    own = {component: getattr(pipeline, component) for component in {e.component for e in manifest.experts}}
    try:
        pipeline.register_to_config(**base.family.stock_routing(manifest.plan, [e.component for e in manifest.experts]))
        for component in own:
            base.family.lora_arguments(component)
    except ValueError as error:
        raise ExpertsError(str(error)) from None
    pipeline.scheduler = PhasedDMDScheduler.from_plan(manifest.plan)
    full: dict[str, torch.nn.Module] = {}
    for expert in manifest.experts:
        if expert.kind == "full":
            full[expert.name] = type(own[expert.component]).from_config(own[expert.component].config).eval()
            full[expert.name].load_state_dict(experts.tensors(expert.name))
            full[expert.name].to(device, own[expert.component].dtype)
        else:
            names = {"weight_name": expert.file, "adapter_name": expert.name}
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are the point
                base.family.load_lora(pipeline, experts.folder, expert.component, **names)

    def use(expert: Expert) -> None:
        if expert.kind == "full":
            setattr(pipeline, expert.component, full[expert.name])
        else:
            setattr(pipeline, expert.component, own[expert.component])
            own[expert.component].set_adapters(expert.name, expert.strength)

    def use_expert_of_next_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        use(manifest.experts[pipe.scheduler.phase])
        return tensors

    if "callback_on_step_end" not in base.family.call_lacks:
        call["callback_on_step_end"] = use_expert_of_next_step
    else:
        step = pipeline.scheduler.step

        def step_and_switch(*args: Any, **kwargs: Any) -> Any:
            taken = step(*args, **kwargs)
            use(manifest.experts[pipeline.scheduler.phase])
            return taken

        pipeline.scheduler.step = step_and_switch
    use(manifest.experts[0])
    output: Tensor = pipeline(
        **call,
        num_inference_steps=len(manifest.plan.sigmas),
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        return_dict=False,
    )[0]
    for component, network in own.items():
        setattr(pipeline, component, network)
        network.unload_lora()
    return output


@torch.no_grad()
def _own_sample(
    experts: PhasedExperts, base: BaseFiles, pipeline: DiffusionPipeline, conditioning: Any, noise: Tensor
) -> Tensor:
    """Latents by roles on the pipeline's networks and this package's rollout; the networks are taken over."""
    from ..roles import Roles, RoleSpec
    from ..rollout import Velocity, route, sample

    manifest, velocities = experts.manifest, {}
    for component in {expert.component for expert in manifest.experts}:
        mine = [expert for expert in manifest.experts if expert.component == component]
        specs = {e.name: RoleSpec(e.kind, e.rank or 1, e.alpha or 1.0, e.targets) for e in mine}
        roles = Roles(getattr(pipeline, component), base.family, specs)
        for expert in mine:
            lora = expert.kind == "lora"
            roles.load_state_dict(expert.name, (experts.lora_state if lora else experts.tensors)(expert.name))
            velocities[expert.name] = _velocity(roles, expert.name, conditioning)
    ordered: list[Velocity] = [velocities[expert.name] for expert in manifest.experts]
    return sample(route(ordered, manifest.plan), manifest.plan.sigmas, noise)


def _velocity(roles: Any, name: str, conditioning: Any) -> Callable[[Tensor, float], Tensor]:
    return lambda x, sigma: roles.velocity(name, x, sigma, conditioning)
