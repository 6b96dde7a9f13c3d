"""Experts of any checkpoint, made without the teacher's weights and without a GPU."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pdmd_core.roles import Roles
from training.config.changes import changes_since
from training.config.schema import DistillConfig, parse_config, with_defaults
from training.data.teacher import TeacherSource, family_of_pipeline, networks_of, pipeline_on_meta
from training.loop.checkpoints import (
    CheckpointError,
    list_checkpoints,
    load_tensors,
    load_values,
    update_of,
    whole_checkpoint,
)
from training.loop.export import export_experts, trained_part, training_summary
from training.loop.progress import Progress
from training.loop.start import specs_of_run


def export_checkpoint(run: Path, update: int | None = None, config: DistillConfig | None = None) -> Path:
    """Write the experts of a checkpoint into a folder of the run, those of the phases that it has.

    A run that goes on meanwhile is not disturbed. The expert in training is its average, as at the end of a run.

    Args:
        run: The output folder of the run.
        update: Whose checkpoint; the newest when None.
        config: The run's configuration, where its teacher lies elsewhere now; the checkpoint's when None.

    Returns:
        The folder, ``experts-update-<n>``.

    Raises:
        CheckpointError: There is no such checkpoint, or it is damaged.
        ConfigError: The configuration is not that of the checkpoint.
    """
    checkpoints = run / "checkpoints"
    if update is None:
        if not (there := list_checkpoints(checkpoints)):
            raise CheckpointError(f"{run}: no checkpoint to export; give the output_dir of a run")
        update = update_of(there[-1])
    checkpoint = whole_checkpoint(checkpoints, update)
    values = load_values(checkpoint)
    if config is None:
        config = parse_config(with_defaults(values["config"]), str(checkpoint))
    changes_since(values["config"], config)
    progress, plan = Progress(**values["progress"]), config.plan.build()
    source = TeacherSource(
        str(config.model.architecture or config.model.path), config.model.revision, config.model.pipeline
    )
    pipeline = pipeline_on_meta(source)
    family = family_of_pipeline(pipeline)
    routing = family.teacher_routing(pipeline.config)
    with torch.device("meta"):
        specs = specs_of_run(config, routing, values.get("start", {}))
        roles = Roles(networks_of(pipeline, family), family, specs, routing)
    part = trained_part(plan, progress.phase)
    tensors: dict[str, Tensor] = {}
    for phase in part.phases:
        tensors |= {f"roles/{phase.name}/{name}": _empty(value) for name, value in roles.state_dict(phase.name).items()}
    current = part.phases[-1].name
    if config.ema_decay is not None:
        tensors |= {f"average/{name}": _empty(value) for name, value in roles.named_parameters(current).items()}
    load_tensors(checkpoint, tensors)
    states = {phase.name: _under(f"roles/{phase.name}/", tensors) for phase in part.phases}
    states[current] |= _under("average/", tensors)
    summary = training_summary(config, plan, progress, values.get("start", {}), pipeline, values.get("history", []))
    folder = run / f"experts-{checkpoint.name}"
    export_experts(folder, config, part, roles, summary, values.get("fingerprints", {}), states=states)
    return folder


def _empty(value: Tensor) -> Tensor:
    return torch.empty_like(value, device="cpu", requires_grad=False)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
