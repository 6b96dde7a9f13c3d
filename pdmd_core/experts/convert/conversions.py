"""An experts folder in the other forms that tools read: full experts, LoRA experts, a stock pipeline, ComfyUI files."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...families.guidance import pipeline_named
from ..base_files import WEIGHTS_NAME, BaseFiles, family_of_base
from ..errors import ExpertsError
from ..folder import PhasedExperts
from ..format.files import GUIDANCE, RELEASED, SCHEDULER_ENTRY, expert_metadata
from ..format.fingerprint import base_warning, take_fingerprint
from ..format.lora_keys import lora_to_file
from ..format.manifest import MANIFEST_NAME, BaseModel, Expert, Manifest
from ..format.weights import Weights, dtype_name, open_weights, write_weights
from ..hub.card import card_text
from ..writing import write_experts
from .low_rank import extract, merged
from .native import in_native_layout
from .output import check_output, new_folder
from .released import BESIDE, GIVEN

MAX_SHARD_BYTES = 10 * 10**9
"""Networks of a pipeline that are larger are written in shards, as diffusers does."""


@dataclass(frozen=True)
class Conversion:
    """What to convert and where to. Every target writes a complete folder or nothing."""

    experts: PhasedExperts
    """The experts to convert."""
    output: Path
    """The folder to write."""
    base: str | None = None
    """A folder or Hub id of the base, in place of the one that the manifest names."""
    dtype: torch.dtype | None = None
    """How floating weights are stored; None keeps the dtype of the files they come from."""
    overwrite: bool = False
    """Whether an output that is there may be replaced."""
    warn: Callable[[str], None] = warnings.warn
    """A function that is told, in one line, of a base with other weights than the experts' own."""

    def to_full(self) -> Manifest:
        """Write an experts folder of full experts; LoRA experts are merged into the base in float32.

        Returns:
            The manifest that was written.

        Raises:
            ExpertsError: If experts and base do not fit, or if the output cannot be written.
        """
        base, weights = self._all_weights()
        manifest = self._full_manifest(base, weights)
        with new_folder(self.output) as folder:
            written = []
            for expert in manifest.experts:
                metadata = expert_metadata(manifest, expert)
                digest = write_weights(folder / expert.file, weights[expert.name], metadata)
                written.append(replace(expert, sha256=digest))
            manifest = replace(manifest, experts=tuple(written))
            (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
            self._finish_experts(folder, manifest)
        return manifest

    def to_lora(self, rank: int, relative_to: str | None = None, network: str | None = None) -> Manifest:
        """Write an experts folder of LoRA experts, each the closest of its rank to the difference to the base (SVD).

        Args:
            rank: The rank of the LoRA experts, at least 1.
            relative_to: A folder or Hub id of another base of the same shape, which the LoRA experts are for; None is
                the base of the experts.
            network: The network of the base that all LoRA experts are for, such as ``transformer`` of a base with two;
                None keeps the network of each.

        Returns:
            The manifest that was written; its training summary holds the errors.

        Raises:
            ExpertsError: If experts and base do not fit, a module cannot have the rank, or the output cannot be
                written.
        """
        base, weights = self._all_weights(networks=True, written=False)
        given = self.experts.manifest.base
        if relative_to is not None:
            given = replace(given, model=relative_to, revision=None, fingerprints=None)
            base = BaseFiles.find(given, None, networks=True, option="another --relative-to")
        dtype = self.dtype or torch.float32
        same = relative_to is None and network is None
        # Other networks differ in all layers, not in those alone that training adapted
        targets = base.family.lora_targets if same else tuple(base.family.modules)
        entries, tensors, errors = [], {}, {}
        for expert in self.experts.manifest.experts:
            expert = replace(expert, component=network or expert.component)
            if not same:
                base.check_full(expert.file, expert.component, weights[expert.name].shapes)
            own = base.weights(expert.component)
            found = extract(own, weights[expert.name], targets, rank, dtype, f"SVD of {expert.name}")
            tensors[expert.name] = lora_to_file(found.lora, float(rank), base.family)
            errors[expert.name] = found.summary()
            kind = replace(
                expert, kind="lora", rank=rank, alpha=float(rank), targets=tuple(targets), strength=1.0, sha256=""
            )
            entries.append(replace(kind, file=f"{expert.name}.safetensors"))
        note = {"to": "lora", "rank": rank, "dtype": dtype_name(dtype), "experts": errors}
        if not same:
            note |= {"relative_to": given.model, "networks": sorted({entry.component for entry in entries})}
        origin = self._origin(base, {entry.component for entry in entries}, given)
        manifest = self._noted(replace(self.experts.manifest, base=origin, experts=tuple(entries)), note)
        with new_folder(self.output) as folder:
            manifest = write_experts(folder, manifest, tensors)
            self._finish_experts(folder, manifest)
        return manifest

    def to_comfyui(self) -> Manifest:
        """Write one ComfyUI-native file for each expert, for its ``models/diffusion_models`` folder.

        Returns:
            The manifest that the files carry.

        Raises:
            ExpertsError: If experts and base do not fit, or if the output cannot be written.
        """
        base, weights = self._all_weights()
        manifest = self._full_manifest(base, weights)
        with new_folder(self.output) as folder:
            for expert in manifest.experts:
                metadata = expert_metadata(manifest, expert) | {"format": "pt"}
                config = base.family.comfyui_config(base.config(expert.component))
                if config:
                    metadata["config"] = json.dumps({"transformer": config})
                try:
                    native = in_native_layout(weights[expert.name], base.family)
                except ValueError as error:
                    raise ExpertsError(f"{expert.file}: {error}") from None
                write_weights(folder / expert.file, native, metadata)
        return manifest

    def to_diffusers(self) -> Manifest:
        """Write a stock pipeline folder: the base's, with the experts as ``transformer``, ``transformer_2`` and so on.

        Returns:
            The manifest of these experts; the folder has none.

        Raises:
            ExpertsError: If a stock pipeline cannot route by the plan, experts and base do not fit, or the output
                cannot be written.
        """
        plan = self.experts.manifest.plan
        components = ["transformer", *(f"transformer_{n}" for n in range(2, len(plan) + 1))]
        try:
            routing = family_of_base(self.experts.manifest.base).stock_routing(plan, components)
        except ValueError as error:
            raise ExpertsError(str(error)) from None
        base, weights = self._all_weights(others=True)
        index = base.index()
        with new_folder(self.output) as folder:
            for name, entry in list(index.items()):
                if name.startswith("transformer"):
                    index[name] = [None, None]
                elif isinstance(entry, list) and entry[0] and name != "scheduler":
                    if not (base.folder / name).is_dir():
                        raise ExpertsError(f"base {base.folder}: {name} is missing: download the base again")
                    shutil.copytree(base.folder / name, folder / name)
            for licence in base.folder.glob("LICENSE*"):
                shutil.copy(licence, folder)
            for component, expert in zip(components, self.experts.manifest.experts, strict=True):
                config = base.config(expert.component)
                write_network(folder / component, weights[expert.name], config)
                index[component] = ["diffusers", base.family.architecture]
            index |= {"scheduler": SCHEDULER_ENTRY, GUIDANCE: self.experts.manifest.guidance_scale, **routing}
            (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            _save_scheduler(folder, self.experts.manifest)
            arguments = base.family.guidance_arguments(
                self.experts.manifest.guidance_scale, pipeline_named(index.get("_class_name"))
            )
            guidance = ", ".join(f"{k}={v}" for k, v in arguments.items()) or "as by default"
            for name, guider in base.family.guiders().items():
                shutil.rmtree(folder / name)
                guider.save_pretrained(folder / name)
            output = json.dumps(self.output.as_posix())
            text = _STOCK_CARD.format(output=output, table=plan.describe(), steps=len(plan.sigmas), guidance=guidance)
            (folder / "README.md").write_text(text, encoding="utf-8")
        return self._full_manifest(base, weights)

    def _all_weights(
        self, networks: bool = False, others: bool = False, written: bool = True
    ) -> tuple[BaseFiles, dict[str, Weights]]:
        """The base, and every expert as full weights, after all that can be checked beforehand."""
        networks = networks or any(expert.kind == "lora" for expert in self.experts.manifest.experts)
        base = BaseFiles.find(self.experts.manifest.base, self.base, networks, others)
        sources = [self.experts.folder, base.folder]
        check_output(self.output, self.overwrite, sources)
        weights = {expert.name: self._full_weights(base, expert) for expert in self.experts.manifest.experts}
        size = sum(each.nbytes for each in weights.values()) if written else 0
        check_output(self.output, self.overwrite, sources, size)
        return base, weights

    def _full_weights(self, base: BaseFiles, expert: Expert) -> Weights:
        if expert.kind == "full":
            full = open_weights(self.experts.verify(expert.name))
            base.check_full(expert.file, expert.component, full.shapes)
        else:
            own, kind = base.weights(expert.component), base.family.architecture
            if RELEASED not in self.experts.manifest.training:
                lora = self.experts.lora_state(expert.name)
                shapes = {name: tuple(value.shape) for name, value in lora.items()}
                base.check_lora(expert.file, expert.component, shapes, expert.targets or ())
            base.check_full(WEIGHTS_NAME, expert.component, own.shapes)
            file = self.experts.lora_changes(expert.name).fitted(own.shapes, kind)
            if text := file.warning(kind):
                self.warn(text)
            full = merged(own, file.weights)
        return full if self.dtype is None else full.stored_as(self.dtype, base.float32_modules)

    def _origin(self, base: BaseFiles, components: Set[str], origin: BaseModel) -> BaseModel:
        """A base with fingerprints of the networks that this conversion reads; warns of other weights."""
        prints = dict(origin.fingerprints or {})
        for component in sorted(components):
            names, sampler = base.sampler(component)
            if text := base_warning(origin, component, sampler, str(base.folder / component)):
                self.warn(text)
            if found := take_fingerprint(names, sampler):
                prints[component] = found
        return replace(origin, fingerprints=prints or None)

    def _full_manifest(self, base: BaseFiles, weights: Mapping[str, Weights]) -> Manifest:
        """The manifest with every expert full, without hashes."""
        experts, stored = [], {}
        for expert in self.experts.manifest.experts:
            dtypes = {spec.dtype for spec in weights[expert.name].specs.values()}
            stored[expert.name] = sorted(map(dtype_name, dtypes))
            entry = replace(expert, kind="full", rank=None, alpha=None, targets=None, strength=1.0, sha256="0" * 64)
            experts.append(replace(entry, file=f"{expert.name}.safetensors"))
        note = {"to": "full", "arithmetic": "float32", "stored_as": stored}
        read = {expert.component for expert in self.experts.manifest.experts if expert.kind == "lora"}
        manifest = replace(
            self.experts.manifest, base=self._origin(base, read, self.experts.manifest.base), experts=tuple(experts)
        )
        return self._noted(manifest, note)

    def _noted(self, manifest: Manifest, note: Mapping[str, Any]) -> Manifest:
        """The manifest whose training summary says how these files were made from those of the distillation."""
        earlier = manifest.training.get("conversions")
        files = {"of": manifest.training[RELEASED]} if RELEASED in manifest.training else {}
        notes = [*(earlier if isinstance(earlier, list) else []), {**note, **files}]
        kept = {key: value for key, value in manifest.training.items() if key not in (RELEASED, GIVEN, BESIDE)}
        return replace(manifest, training={**kept, "conversions": notes})

    def _finish_experts(self, folder: Path, manifest: Manifest) -> None:
        _save_scheduler(folder, manifest)
        (folder / "README.md").write_text(card_text(manifest, self.output.as_posix()), encoding="utf-8")


def write_network(folder: Path, weights: Weights, config: Mapping[str, Any], max_bytes: int | None = None) -> None:
    """Write a component as diffusers' ``save_pretrained`` does: config.json and safetensors, in shards when large.

    Args:
        folder: The folder to make.
        weights: The weights of the network.
        config: The content of config.json.
        max_bytes: The most bytes in a file; None is ``MAX_SHARD_BYTES``.
    """
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
    shards: list[list[str]] = [[]]
    size, limit = 0, max_bytes or MAX_SHARD_BYTES
    for name, spec in weights.specs.items():
        if shards[-1] and size + spec.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    files = [WEIGHTS_NAME]
    if len(shards) > 1:
        stem = WEIGHTS_NAME.removesuffix(".safetensors")
        files = [f"{stem}-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
        placed = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": weights.nbytes}, "weight_map": placed}
        (folder / f"{WEIGHTS_NAME}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for file, names in zip(files, shards, strict=True):
        part = Weights({name: weights.specs[name] for name in names}, weights.read)
        write_weights(folder / file, part, {"format": "pt"})


def _save_scheduler(folder: Path, manifest: Manifest) -> None:
    from ...scheduler import PhasedDMDScheduler

    PhasedDMDScheduler.from_plan(manifest.plan).save_pretrained(folder / "scheduler")


_STOCK_CARD = """# A stock pipeline of phased experts

```text
{table}
```

```python
import pdmd_core.scheduler  # where diffusers finds the scheduler
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({output})
```

Sample in {steps} steps; guidance is in the experts (`{guidance}`). Without the first line diffusers refuses to
load the scheduler: a stock one would walk other sigmas than the experts were trained on.
"""
