"""Expert weights on disk: writing a folder, and reading one back.

Each file carries the manifest (without hashes) in its safetensors metadata. Only safetensors are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..families import FAMILIES, family
from ..phases import PhasePlan
from .convert.released import manifest_of_lora_files
from .errors import ExpertsError
from .format.files import RELEASED, SCHEDULER_CONFIG, check_folder, check_hash, expert_metadata
from .format.lora_keys import check_lora, lora_from_file
from .format.manifest import MANIFEST_NAME, Manifest, read_manifest
from .format.untrusted import check_inside, read_json, shown
from .hub.download import download_experts
from .hub.ids import is_hub_id

if TYPE_CHECKING:
    from torch import Tensor


def write_experts(folder: Path, manifest: Manifest, weights: Mapping[str, Mapping[str, Tensor]]) -> Manifest:
    """Write the files of all experts, then the manifest. All is written before any of it takes its place.

    manifest: complete but for the hashes, which are filled in. weights: expert name to the tensors of its file
    (``lora_to_file`` for LoRA experts). Returns the manifest that was written. Raises ExpertsError for what could not
    be read back: an expert without weights, values that are not finite, a manifest that is none.
    """
    from .format.weights import weights_of, write_weights

    if lacking := [expert.name for expert in manifest.experts if expert.name not in weights]:
        given = ", ".join(weights) or "none"
        raise ExpertsError(f"cannot write {folder}: no weights of {', '.join(lacking)}, found those of {given}")
    Manifest.from_dict(manifest.without_hashes().to_dict())
    folder.mkdir(parents=True, exist_ok=True)
    part = {name: folder / f".{name}.part" for name in [*(e.file for e in manifest.experts), MANIFEST_NAME]}
    try:
        experts = []
        for expert in manifest.experts:
            metadata, own = expert_metadata(manifest, expert), weights_of(weights[expert.name])
            try:
                experts.append(replace(expert, sha256=write_weights(part[expert.file], own, metadata)))
            except ExpertsError as error:
                raise ExpertsError(f"cannot write {folder}: {expert.name}: {error}") from None
        written = replace(manifest, experts=tuple(experts))
        part[MANIFEST_NAME].write_text(written.to_json(), encoding="utf-8")
        for name, path in part.items():
            path.replace(folder / name)
    finally:
        for path in part.values():
            path.unlink(missing_ok=True)
    return written


@dataclass(frozen=True)
class PhasedExperts:
    """An experts folder whose manifest is checked; weights are read, and their hashes verified, when asked for."""

    folder: Path
    manifest: Manifest
    paths: Mapping[str, Path] = field(default_factory=dict)
    """Expert name to file, where the files do not lie in the folder under the manifest's names."""

    @classmethod
    def open(cls, folder: str | Path) -> PhasedExperts:
        """Check the manifest and that every file is there, inside the folder. Raises ExpertsError."""
        folder = Path(folder)
        manifest = read_manifest(folder)
        check_folder(folder, manifest)
        return cls(folder, manifest)

    @classmethod
    def from_pretrained(
        cls,
        experts: str | Path,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | None = None,
        local_files_only: bool = False,
    ) -> PhasedExperts:
        """Open an experts folder, or download one from the Hub. Raises ExpertsError.

        experts: a folder, or a Hub id ``user/name``. A folder of that name goes before a Hub id of the same text.
        revision: branch, tag or commit hash on the Hub. cache_dir: the Hub client's own when None.
        token: for private repositories; the one of ``hf auth login`` or HF_TOKEN when None.
        local_files_only: use the cache alone, as HF_HUB_OFFLINE=1 does.
        """
        if str(experts) and Path(experts).is_dir():
            if revision is not None:
                raise ExpertsError(f"{experts} is a folder here, which has no revision {revision!r}: leave it out")
            return cls.open(experts)
        if isinstance(experts, Path) or not is_hub_id(experts):
            raise ExpertsError(
                f"{shown(str(experts))} is neither a folder nor a Hub id user/name; give one that holds {MANIFEST_NAME}"
            )
        return cls.open(download_experts(experts, revision, cache_dir, token, local_files_only))

    @classmethod
    def from_lora_files(
        cls,
        plan: PhasePlan,
        high: str | Path | None = None,
        low: str | Path | None = None,
        base: str | None = None,
        components: Sequence[str] | None = None,
        **files: str | Path,
    ) -> PhasedExperts:
        """Few-step LoRA files that other projects released, as the experts of a plan. Raises ExpertsError.

        plan:  the sigmas that the files were distilled for: their authors' card says steps and shift.
        high, low: the files of the first and of the last phase; ``files``: by phase name, for any plan.
        base, components: see ``convert.released.manifest_of_lora_files``.
        """
        ends = ((plan.phases[0].name, high), (plan.phases[-1].name, low))
        given = {name: path for name, path in ends if path is not None}
        paths = {name: Path(path) for name, path in (given | files).items()}
        manifest = manifest_of_lora_files(paths, plan, base, components)
        return cls(paths[plan.phases[0].name].parent, manifest, paths)

    def path(self, name: str) -> Path:
        """Where an expert's file lies."""
        return self.paths.get(name, self.folder / self.manifest.expert(name).file)

    def verify(self, name: str) -> Path:
        """The path of an expert's file, which has the manifest's hash. Raises ExpertsError when it has not."""
        path = self.path(name)
        check_hash(path, self.manifest.expert(name))
        return path

    def check_scheduler(self) -> None:
        """Raises ExpertsError unless the folder's scheduler is there and has the manifest's plan."""
        path = self.folder / SCHEDULER_CONFIG
        check_inside(path, self.folder)
        config = read_json(path)
        if not isinstance(config, dict) or config.get("plan") != self.manifest.plan.to_dict():
            raise ExpertsError(f"{path}: its plan is not the manifest's")

    def tensors(self, name: str) -> dict[str, Tensor]:
        """All tensors of an expert's file, by its keys.

        Raises ExpertsError for another file than the manifest's, and for a LoRA of another rank or alpha.
        """
        from .format.weights import open_weights

        expert, weights = self.manifest.expert(name), open_weights(self.verify(name))
        tensors = {key: weights.read(key) for key in weights.specs}
        # released files, and those of other families, have whatever keys their pipeline's own loader reads
        ours = RELEASED not in self.manifest.training and self.manifest.base.family in FAMILIES
        if expert.kind == "lora" and ours:
            check_lora(tensors, expert)
        return tensors

    def lora_state(self, name: str) -> dict[str, Tensor]:
        """A LoRA expert's weights as ``<diffusers module>.lora_A`` / ``.lora_B``. Raises ExpertsError."""
        expert = self.manifest.expert(name)
        if expert.kind != "lora":
            raise ExpertsError(f"expert {name!r} is a {expert.kind} expert, it has no LoRA weights")
        try:
            names = family(self.manifest.base.family)
        except ValueError as error:
            raise ExpertsError(f"{self.folder}: {error}") from None
        return lora_from_file(self.tensors(name), expert, names)
