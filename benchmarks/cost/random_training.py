"""A phase in training on random weights: what time and memory depend on, without what pictures need."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import torch
from accelerate import Accelerator, init_empty_weights
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from pdmd_core.families import ModelFamily, TeacherRouting, family
from pdmd_core.roles import Roles
from training.config.schema import DistillConfig, parse_config
from training.data.order import ExampleOrder
from training.data.teacher import TeacherSource, family_of_pipeline, pipeline_on_meta
from training.loop.batches import DataBatches
from training.loop.build import build_roles
from training.loop.phase import PhaseTraining, Update
from training.loop.rng import RunRNG
from training.memory.activations import example_shapes
from training.memory.offload import keep_idle_experts_away


@dataclass(frozen=True)
class SmallModel:
    """A released architecture in sizes that a CPU trains.

    Attributes:
        family: Its name in ``FAMILIES``.
        settings: Of its network, in all sizes.
        sizes: Further settings by size.
        latent: Shape of a latent, without its two sides.
        index: Entries of its ``model_index.json``, which say how many networks it has.
    """

    family: str
    settings: Mapping[str, Any]
    sizes: Mapping[str, Mapping[str, Any]]
    latent: tuple[int, ...]
    index: Mapping[str, Any] = field(default_factory=dict)


_WAN = SmallModel(
    "wan",
    {"freq_dim": 256, "qk_norm": "rms_norm_across_heads", "cross_attn_norm": True, "in_channels": 16}
    | {"out_channels": 16},
    {
        "tiny": {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 2, "text_dim": 32},
        "10M": {"num_attention_heads": 4, "attention_head_dim": 64, "ffn_dim": 1024, "num_layers": 10}
        | {"text_dim": 128},
        "100M": {"num_attention_heads": 12, "attention_head_dim": 64, "ffn_dim": 3072, "num_layers": 10}
        | {"text_dim": 512},
    },
    (16, 1),
)
_TWO_NETWORKS = {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.875}
SMALL_MODELS = {
    "wan": _WAN,
    "wan_two_networks": replace(_WAN, index=_TWO_NETWORKS),
    "wan_image": replace(_WAN, settings={**_WAN.settings, "in_channels": 36}),
    "qwen_image": SmallModel(
        "qwen_image",
        {"in_channels": 64, "out_channels": 16},
        {
            "tiny": {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "joint_attention_dim": 32}
            | {"axes_dims_rope": (8, 4, 4)},
            "100M": {"num_attention_heads": 12, "attention_head_dim": 64, "num_layers": 5, "joint_attention_dim": 512}
            | {"axes_dims_rope": (16, 24, 24)},
        },
        (16, 1),
    ),
    "z_image": SmallModel(
        "z_image",
        {"in_channels": 16, "n_refiner_layers": 1, "axes_lens": [512, 64, 64]},
        {
            "tiny": {"dim": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 32}
            | {"axes_dims": [8, 4, 4]},
            "100M": {"dim": 768, "n_layers": 12, "n_heads": 12, "n_kv_heads": 12, "cap_feat_dim": 512}
            | {"axes_dims": [16, 24, 24]},
        },
        (16,),
    ),
}
TEXT_TOKENS = 64


@dataclass(frozen=True)
class RandomTeacher:
    """Networks with random weights, and what they are asked with."""

    family: ModelFamily
    networks: dict[str, nn.Module]
    routing: TeacherRouting
    shape: tuple[int, ...]
    """Of a latent."""
    conditioning: Mapping[str, tuple[int, ...]]
    """Shapes of the conditioning of one example."""

    @property
    def parameters(self) -> int:
        """Of all networks."""
        return sum(p.numel() for network in self.networks.values() for p in network.parameters())


def small_teacher(name: str, size: str, side: int, device: str = "cpu") -> RandomTeacher:
    """Returns a teacher with random weights whose latents have this side.

    Args:
        name: A key of ``SMALL_MODELS``.
        size: Of each network: tiny, 100M, or for Wan 10M.
        side: Of a latent.
        device: Where the networks are.
    """
    model = SMALL_MODELS[name]
    found = family(model.family)
    routing, shape = found.teacher_routing(model.index), (*model.latent, side, side)
    settings = {**model.settings, **model.sizes[size]}
    networks = {
        component: random_network(found.architecture, settings, torch.float32, device, seed)
        for seed, component in enumerate(routing.components)
    }
    first: Any = networks["transformer"]
    conditioning = found.conditioning_shapes(first.config, TEXT_TOKENS, shape)
    return RandomTeacher(found, networks, routing, shape, conditioning)


def released_teacher(config: DistillConfig, layers: int | None, device: str) -> RandomTeacher:
    """The teacher that a recipe names, in its architecture and dtype; ``layers`` of its blocks where given."""
    model = config.model
    pipeline = pipeline_on_meta(TeacherSource(str(model.architecture), None, model.pipeline))
    found = family_of_pipeline(pipeline)
    routing = found.teacher_routing(pipeline.config)
    shape = found.latent_shape(pipeline, model.height, model.width, model.frames)
    networks, dtype = {}, getattr(torch, model.dtype)
    for seed, component in enumerate(routing.components):
        settings = dict(getattr(pipeline, component).config)
        settings |= {"num_layers": layers} if layers else {}
        networks[component] = random_network(found.architecture, settings, dtype, device, seed)
        if config.memory.offload_idle_network:  # both at once may be too much for the device
            networks[component].cpu()
    return RandomTeacher(found, networks, routing, shape, example_shapes(config, found, pipeline, shape))


def random_network(
    architecture: str, settings: Mapping[str, Any], dtype: torch.dtype, device: str, seed: int
) -> nn.Module:
    """A diffusers network whose weights come into being on the device, in float32 where diffusers keeps them so."""
    kind = getattr(diffusers, architecture)
    with init_empty_weights(include_buffers=False):
        network = kind.from_config(dict(settings))
    kept = network._keep_in_fp32_modules or []
    generator = torch.Generator("cpu" if device == "meta" else device).manual_seed(seed)
    for path, module in network.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            in_float32 = any(part in kept for part in [*path.split("."), name])
            values = torch.ones(parameter.shape, device=device)
            if parameter.ndim > 1:
                values.normal_(0, 0.02, generator=generator)
            elif name != "weight":
                values.zero_()
            values = values.to(torch.float32 if in_float32 else dtype)
            setattr(module, name, nn.Parameter(values, requires_grad=False))
    return network.to(device).eval()


class RandomPrompts:
    """Two examples in the place of a ``PromptCache``."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            size = (3, *shape)
            values = torch.randn(size, generator=generator)
            if name == "prompt_mask":  # the negative prompt has a quarter of the tokens of the others
                values = torch.ones(size)
                values[2, shape[0] // 4 :] = 0
            self.rows[name] = values.to(device)

    def conditioning(self, indices: Tensor, device: torch.device) -> dict[str, Tensor]:
        return {name: rows[indices.to(device)] for name, rows in self.rows.items()}

    def conditioning_pair(self, indices: Tensor, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Another prompt with the same image beside it."""
        positive = self.conditioning(indices, device)
        other = self.rows["prompt_embeds"][torch.full_like(indices, 2).to(device)]
        return positive, positive | {"prompt_embeds": other}


class RandomTraining:
    """One phase of ``config`` in training on a random teacher."""

    def __init__(
        self,
        config: DistillConfig,
        teacher: RandomTeacher,
        accelerator: Accelerator,
        phase: int = 0,
        kind: type[Roles] = Roles,
        mesh: DeviceMesh | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.said: list[str] = []
        """What building said of the run, such as what computes attention."""
        self.roles = build_roles(
            config,
            teacher.family,
            teacher.networks,
            teacher.routing,
            accelerator.device,
            mesh,
            kind=kind,
            say=self.said.append,
        )
        plan = config.plan.build()
        if config.memory.offload_idle_experts:
            keep_idle_experts_away(self.roles, plan, phase, accelerator.device)
        self.training = PhaseTraining(config, plan, phase, self.roles, accelerator)
        order = ExampleOrder([torch.arange(2)], [1.0], config.seed)
        groups, device = config.groups(accelerator.num_processes), accelerator.device
        group = accelerator.process_index // config.parallel.context_parallel
        rng = RunRNG(config.seed, config.batch_size, order, group, groups, device)
        prompts = RandomPrompts(teacher.conditioning, accelerator.device)
        boundary = teacher.routing.boundary
        self.batches = DataBatches(rng, prompts, [teacher.shape], boundary, config.score_groups)

    def update(self) -> Update:
        """One update. Raises RuntimeError when something in it was not finite."""
        update = self.training.update(self.batches, 1.0)
        if not update.good or not all(math.isfinite(value) for value in update.values.values()):
            raise RuntimeError(f"an update on random weights was not finite: {update.values}")
        return update


def small_config(**changes: Any) -> DistillConfig:
    """Two phases of two steps, every role LoRA, the paper's ratio of updates; ``changes`` are keys of the config."""
    role = {"kind": "lora", "rank": 16, "alpha": 16, "lr": 1e-5}
    settings = {
        "model": {"path": "random"},
        "data": {"prompts": "random"},
        "plan": {"steps": [2, 2], "shift": 5.0},
        "generator": role,
        "fake": role,
        "batch_size": 1,
        "monitoring": {"tracker": None},
    }
    return parse_config({**settings, **changes}, "benchmark")
