"""Expert weights on disk: writing a folder, reading one back, and the LoRA key format that every tool reads.

LoRA files hold ``diffusion_model.<native module>.lora_down.weight`` / ``.lora_up.weight`` and ``.alpha``, so that
strength 1.0 is right in diffusers' ``load_lora_weights`` and in ComfyUI's LoRA loaders. Each file carries the manifest
(without hashes) in its safetensors metadata. Only safetensors are read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..families import ModelFamily, family
from ..phases import PhasePlan
from .manifest import MANIFEST_NAME, Expert, ExpertsError, Manifest, read_manifest

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "diffusion_model."

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SHARED_BLOB = re.compile(r"[0-9a-f]{64}")


def lora_to_file(state: Mapping[str, Tensor], alpha: float, names: ModelFamily) -> dict[str, Tensor]:
    """A LoRA role's weights (``<module>.lora_A`` / ``.lora_B``, diffusers module names) under the file's keys."""
    import torch

    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        module, _, part = key.rpartition(".")
        native = PREFIX + names.native_module_name(module)
        tensors[f"{native}.lora_{'down' if part == 'lora_A' else 'up'}.weight"] = value.contiguous().cpu()
        tensors[f"{native}.alpha"] = torch.tensor(float(alpha))
    return tensors


def lora_from_file(tensors: Mapping[str, Tensor], expert: Expert, names: ModelFamily) -> dict[str, Tensor]:
    """Inverse of ``lora_to_file``, checked against the manifest's rank and alpha. Raises ExpertsError."""
    state: dict[str, Tensor] = {}
    scaled = set()
    for key, value in tensors.items():
        module, found, part = _split(key)
        if not found:
            raise ExpertsError(f"{expert.file}: key {key!r} is not {PREFIX}<module>.lora_down|lora_up.weight or .alpha")
        if part == "alpha":
            alpha = float(expert.alpha or 0)
            if value.numel() != 1 or not abs(float(value) - alpha) <= 1e-3 * abs(alpha):
                raise ExpertsError(f"{expert.file}: {key} is not the manifest's alpha {expert.alpha}")
            scaled.add(module)
            continue
        try:
            name = names.diffusers_module_name(module)
        except ValueError as error:
            raise ExpertsError(f"{expert.file}: {error}") from None
        if value.ndim != 2 or value.shape[0 if part == "lora_A" else 1] != expert.rank:
            raise ExpertsError(f"{expert.file}: {key} has shape {tuple(value.shape)}, expected rank {expert.rank}")
        state[f"{name}.{part}"] = value
    adapted = {name.rpartition(".")[0] for name in state}
    if len(state) != 2 * len(adapted) or not state or {names.native_module_name(name) for name in adapted} != scaled:
        raise ExpertsError(
            f"{expert.file}: every adapted module needs lora_down, lora_up and alpha, found {len(state)} weights and "
            f"{len(scaled)} alphas"
        )
    return state


def _split(key: str) -> tuple[str, bool, str]:
    parts = {".lora_down.weight": "lora_A", ".lora_up.weight": "lora_B", ".alpha": "alpha"}
    for suffix, part in parts.items():
        if key.startswith(PREFIX) and key.endswith(suffix):
            return key[len(PREFIX) : -len(suffix)], True, part
    return key, False, ""


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_experts(folder: Path, manifest: Manifest, weights: Mapping[str, Mapping[str, Tensor]]) -> Manifest:
    """Write the files of all experts, then the manifest. All is written before any of it takes its place.

    manifest: complete but for the hashes, which are filled in. weights: expert name to the tensors of its file
    (``lora_to_file`` for LoRA experts). Returns the manifest that was written.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    unhashed = replace(manifest, experts=tuple(replace(e, sha256="0" * 64) for e in manifest.experts))
    part = {name: folder / f".{name}.part" for name in [*(e.file for e in manifest.experts), MANIFEST_NAME]}
    try:
        experts = []
        for expert in manifest.experts:
            # one key: safetensors writes several in random order, and equal experts should be equal files
            metadata = {"phased_experts": json.dumps({"expert": expert.name, "manifest": unhashed.to_dict()})}
            save_file(dict(weights[expert.name]), part[expert.file], metadata=metadata)
            experts.append(replace(expert, sha256=sha256_of(part[expert.file])))
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
        for expert in manifest.experts:
            path = folder / expert.file
            if not path.is_file():
                raise ExpertsError(f"{folder}: {expert.file} of expert {expert.name!r} is missing; download it again")
            if path.is_symlink() and folder.resolve() not in path.resolve().parents and not _is_hub_blob(path):
                raise ExpertsError(f"{path}: a link that leaves the folder is not followed")
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
        from .hub import download_experts

        if str(experts) and Path(experts).is_dir():
            if revision is not None:
                raise ExpertsError(f"{experts} is a folder here, which has no revision {revision!r}: leave it out")
            return cls.open(experts)
        if isinstance(experts, Path) or not _HUB_ID.fullmatch(experts):
            raise ExpertsError(
                f"{str(experts)!r} is neither a folder nor a Hub id user/name; give one that holds {MANIFEST_NAME}"
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
        base, components: see ``experts.released``.
        """
        from .released import experts_from_lora_files

        ends = ((plan.phases[0].name, high), (plan.phases[-1].name, low))
        given = {name: path for name, path in ends if path is not None}
        return experts_from_lora_files(given | files, plan, base, components)

    def path(self, name: str) -> Path:
        """Where an expert's file lies."""
        return self.paths.get(name, self.folder / self.manifest.expert(name).file)

    def verify(self, name: str) -> Path:
        """The path of an expert's file, which has the manifest's hash. Raises ExpertsError when it has not."""
        expert = self.manifest.expert(name)
        path = self.path(name)
        found = sha256_of(path)
        if found != expert.sha256:
            raise ExpertsError(
                f"{path}: sha256 is {found[:12]}..., the manifest says {expert.sha256[:12]}...: the file was "
                "changed or cut off, download it again"
            )
        return path

    def tensors(self, name: str) -> dict[str, Tensor]:
        """All tensors of an expert's file, by its keys. Raises ExpertsError for another file than the manifest's."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.verify(name)
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ExpertsError(f"{path}: not a readable safetensors file ({error})") from None

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


def _is_hub_blob(path: Path) -> bool:
    """The Hub's download cache links snapshots/<revision>/<file> to blobs/<hash> of the same repository.

    That may be a link itself, to blobs/<two digits>/<hash>, which all repositories of the cache share.
    """
    target = (path.parent / path.readlink()).absolute()
    blob = target.parent.resolve() / target.name
    repository = blob.parent.parent
    if blob.parent.name != "blobs" or repository / "snapshots" not in path.parent.resolve().parents:
        return False
    stored = blob.resolve()
    shared = stored.parent.parent == repository.parent / "blobs" and bool(_SHARED_BLOB.fullmatch(stored.name))
    return stored == blob or shared
