"""Experts as they are opened: a checked manifest, and weights that are read when asked for, from safetensors alone."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ..families import FAMILIES, ModelFamily, family
from ..phases import PhasePlan
from ..presets import find_preset
from .convert.released import BESIDE, manifest_of_lora_files, on_network, open_source, strengths_by_name
from .errors import ExpertsError
from .format.files import RELEASED, SCHEDULER_CONFIG, check_folder, check_hash
from .format.header import read_header
from .format.lora_keys import check_lora, lora_from_file
from .format.manifest import MANIFEST_NAME, Manifest, read_manifest
from .format.untrusted import shown
from .hub.download import download_experts
from .hub.ids import hub_address, is_hub_id
from .hub.lora_files import local_lora_file
from .hub.push import push_experts
from .lora.alpha import Alphas, alphas_in
from .lora.file import LoraFile, read_lora

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PhasedExperts:
    """An experts folder whose manifest is checked; weights are read, and their hashes verified, when asked for.

    Examples:
        >>> experts = PhasedExperts.open("training/embedded/models/experts")
        >>> [(expert.name, expert.kind, expert.rank) for expert in experts.manifest.experts]
        [('high_noise', 'lora', 16), ('low_noise', 'lora', 16)]
        >>> experts.manifest.plan.boundaries
        (0.8333333333333334,)
        >>> experts.lora_state("low_noise")["blocks.0.attn1.to_q.lora_A"].shape[0]
        16
    """

    folder: Path
    """The folder of the manifest."""
    manifest: Manifest
    """The checked manifest."""
    paths: Mapping[str, Path] = field(default_factory=dict)
    """Expert name to file, where the files do not lie in the folder under the manifest's names."""

    @classmethod
    def open(cls, folder: str | Path) -> PhasedExperts:
        """Open a folder: check its manifest, and that every file is there and inside the folder.

        Args:
            folder: The experts folder.

        Returns:
            The opened experts.

        Raises:
            ExpertsError: If the manifest is missing or invalid, or if a file is missing.
        """
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
        subfolder: str = "",
    ) -> PhasedExperts:
        """Open an experts folder, or download one from the Hub.

        Args:
            experts: A folder, a Hub id ``user/name``, or the pasted address of a repository or of a folder in it. A
                folder of that name here goes before the Hub.
            revision: A branch, tag or commit hash on the Hub.
            cache_dir: Where downloads are kept; None is the Hub client's own cache.
            token: The token for private repositories; None takes the one of ``hf auth login`` or HF_TOKEN.
            local_files_only: Whether only the cache is used, as with HF_HUB_OFFLINE=1.
            subfolder: The folder in which the experts lie, below the one or the repository that is given.

        Returns:
            The opened experts.

        Raises:
            ExpertsError: If there are no such experts, or if they are damaged.
        """
        if str(experts) and Path(experts).is_dir():
            if revision is not None:
                raise ExpertsError(f"{experts} is a folder here, which has no revision {revision!r}: leave it out")
            return cls.open(Path(experts, subfolder))
        address = None if isinstance(experts, Path) else hub_address(experts)
        if address is None or not (is_hub_id(str(experts)) or "://" in str(experts)):
            raise ExpertsError(
                f"{shown(str(experts))} is neither a folder nor a Hub id user/name; give one that holds "
                f"{MANIFEST_NAME}, and a folder inside a repository as subfolder="
            )
        if revision is not None and address.revision not in (None, revision):
            raise ExpertsError(f"{shown(experts)} says revision {address.revision}, revision= {revision}: give one")
        inside = "/".join(filter(None, (address.path.removesuffix(MANIFEST_NAME).strip("/"), subfolder.strip("/"))))
        at = revision or address.revision
        return cls.open(download_experts(address.repo_id, at, cache_dir, token, local_files_only, inside))

    @classmethod
    def from_lora_files(
        cls,
        plan: PhasePlan,
        high: str | Path | None = None,
        low: str | Path | None = None,
        base: str | None = None,
        components: Sequence[str] | None = None,
        family: str | None = None,
        strength: float | Mapping[str, float] = 1.0,
        **files: str | Path,
    ) -> PhasedExperts:
        """Take few-step LoRA files that other projects released as the experts of a plan.

        A file is one in any of the layouts that LoRA files have, a folder of PEFT, or a file on the Hub, as a pasted
        address or as ``user/name/path/to/file.safetensors``.

        Args:
            plan: The sigmas that the files were distilled for: their authors' card says steps and shift, and
                ``PhasePlan.preset`` has those of well-known ones.
            high: The file of the first phase.
            low: The file of the last phase.
            base: The base model; see ``convert.released.manifest_of_lora_files``.
            components: The base's component of each expert; see there.
            family: The model family of the files; None takes the pipeline's, or what the keys tell.
            strength: The factor of what the files change, for all or by phase name.
            **files: More files by the name of their phase, for any plan.

        Returns:
            The experts.

        Raises:
            ExpertsError: If a file is unreadable, or if the files do not fit the plan.
        """
        ends = ((plan.phases[0].name, high), (plan.phases[-1].name, low))
        given = {name: path for name, path in ends if path is not None}
        paths = {name: local_lora_file(path) for name, path in (given | files).items()}
        manifest = manifest_of_lora_files(paths, plan, base, components, family, strength)
        paths = {name: open_source(path).path for name, path in paths.items()}
        return cls(paths[plan.phases[0].name].parent, manifest, paths)

    @classmethod
    def from_preset(cls, name: str, strength: float | Mapping[str, float] = 1.0) -> PhasedExperts:
        """Take well-known few-step LoRA files that others released, from the Hub, with all that is known of them.

        Args:
            name: A preset that has files, as ``phased-dmd plan --list`` lists them.
            strength: The factor of what the files change, for all or by phase name.

        Returns:
            The experts on their own base.

        Raises:
            ExpertsError: If there is no such preset, it has no files, or they cannot be downloaded.
        """
        try:
            known = find_preset(name)
        except ValueError as error:
            raise ExpertsError(str(error)) from None
        plan = PhasePlan.preset(name)
        if not known.files:
            raise ExpertsError(
                f"no LoRA files of {name} are known here: give yours to from_lora_files with this preset's plan, "
                f"PhasePlan.preset({name!r}), or a model that is distilled as a whole that plan's scheduler"
            )
        files = {phase.name: file for phase, file in zip(plan.phases, known.files, strict=True)}
        experts = cls.from_lora_files(plan, base=known.base, strength=strength, **files)
        return replace(experts, manifest=replace(experts.manifest, guidance_scale=known.guidance))

    def on_network(self, architecture: str) -> PhasedExperts:
        """Take released LoRA files as those of the network that a pipeline has; other experts are as they are.

        Args:
            architecture: The class name of the network.

        Returns:
            The experts, whose manifest names the network.
        """
        return replace(self, manifest=on_network(self.manifest, architecture))

    def at_strength(self, strength: float | Mapping[str, float]) -> PhasedExperts:
        """Take LoRA experts at another strength; files and folder stay as they are.

        Args:
            strength: The factor of what the files change, for all or by expert name; 1 is what was trained.

        Returns:
            The experts; ``save_pretrained`` writes their strength into a manifest.

        Raises:
            ExpertsError: If an expert is a full one, or a strength is not of an expert or out of range.
        """
        experts = self.manifest.experts
        if full := [expert.name for expert in experts if expert.kind != "lora"]:
            raise ExpertsError(f"strength is of LoRA experts, {', '.join(full)} of {self.folder} are full networks")
        names, present = [expert.name for expert in experts], {expert.name: expert.strength for expert in experts}
        wanted = strengths_by_name(strength, names, present)
        changed = tuple(replace(expert, strength=wanted[expert.name]) for expert in experts)
        return replace(self, manifest=replace(self.manifest, experts=changed))

    def path(self, name: str) -> Path:
        """Look up where an expert's file lies.

        Args:
            name: The expert's name.

        Returns:
            The path.

        Raises:
            ExpertsError: If there is no expert of this name.
        """
        return self.paths.get(name, self.folder / self.manifest.expert(name).file)

    def verify(self, name: str) -> Path:
        """Check that an expert's file has the manifest's hash.

        Args:
            name: The expert's name.

        Returns:
            The path of the file.

        Raises:
            ExpertsError: If the hash is another, or if there is no expert of this name.
        """
        path = self.path(name)
        check_hash(path, self.manifest.expert(name))
        return path

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the experts as a folder that ``from_pretrained`` opens.

        Args:
            save_directory: The folder; it is made where it does not exist.

        Raises:
            ExpertsError: If a file is not the manifest's.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        for expert in self.manifest.experts:
            if (path := self.verify(expert.name)).resolve() != (folder / expert.file).resolve():
                shutil.copyfile(path, folder / expert.file)
        if self.paths or not (self.folder / SCHEDULER_CONFIG).is_file():
            from ..scheduler import PhasedDMDScheduler

            PhasedDMDScheduler.from_plan(self.manifest.plan).save_pretrained((folder / SCHEDULER_CONFIG).parent)
        elif folder.resolve() != self.folder.resolve():
            (folder / SCHEDULER_CONFIG).parent.mkdir(exist_ok=True)
            shutil.copyfile(self.folder / SCHEDULER_CONFIG, folder / SCHEDULER_CONFIG)
        part = folder / f".{MANIFEST_NAME}.part"  # a manifest is whole, or the one that was there
        part.write_text(self.manifest.to_json(), encoding="utf-8")
        part.replace(folder / MANIFEST_NAME)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str = "Phased experts",
        private: bool = False,
        token: str | None = None,
        revision: str | None = None,
    ) -> str:
        """Put the experts on the Hub as one commit, with a model card that loads them from there.

        Args:
            repo_id: The repository, ``user/name``; it is created when it does not exist.
            commit_message: The message of the commit.
            private: Whether the repository is made private; refused for one that exists and is public.
            token: A token with write access; None takes the one of ``hf auth login`` or HF_TOKEN.
            revision: A branch for the commit, created when it does not exist; None is the main branch.

        Returns:
            The URL of the repository.

        Raises:
            ExpertsError: If a file is not the manifest's, or if the push fails; see ``hub.push_experts``.
        """
        as_they_are = not self.paths and (self.folder / SCHEDULER_CONFIG).is_file()
        if as_they_are and read_manifest(self.folder) == self.manifest:
            return push_experts(self.folder, repo_id, private, token, revision, commit_message)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_experts(folder, repo_id, private, token, revision, commit_message)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Read all tensors of an expert's file, on the CPU.

        Those of a LoRA are copies. Those of a full network are mapped (``MappedFile``), as diffusers and ComfyUI do it:
        they take no memory of their own where they are copied to a GPU.

        Args:
            name: The expert's name.

        Returns:
            The tensors by the keys of the file.

        Raises:
            ExpertsError: If the file is not the manifest's, or if it holds a LoRA of another rank or alpha.
        """
        from .format.weights import open_weights

        expert, weights = self.manifest.expert(name), open_weights(self.verify(name))
        if expert.kind == "full":
            return {key: weights.read(key) for key in weights.specs}
        tensors = {key: weights.read(key).clone() for key in weights.specs}
        # released files, and those of other families, have whatever keys their pipeline's own loader reads
        if RELEASED not in self.manifest.training and self.manifest.base.family in FAMILIES:
            check_lora(tensors, expert, family(self.manifest.base.family).lora_keys)
        return tensors

    def lora_state(self, name: str) -> dict[str, Tensor]:
        """Read the weights of a LoRA expert, at its strength, under diffusers' module names.

        Args:
            name: The expert's name.

        Returns:
            ``<module>.lora_A``, of shape (rank, in), and ``<module>.lora_B``, of shape (out, rank).

        Raises:
            ExpertsError: If the expert is a full one, or if its file is not the manifest's.
        """
        expert = self.manifest.expert(name)
        if expert.kind != "lora":
            raise ExpertsError(f"expert {name!r} is a {expert.kind} expert, it has no LoRA weights")
        state = lora_from_file(self.tensors(name), expert, self._family())
        if expert.strength != 1.0:
            state |= {key: expert.strength * value for key, value in state.items() if key.endswith(".lora_B")}
        return state

    def alphas(self, name: str) -> Alphas:
        """Read what the metadata of a LoRA expert's file, or what lay beside it, say of alpha.

        Args:
            name: The expert's name.

        Returns:
            The alpha of modules that have no tensor for it.

        Raises:
            ExpertsError: If they say different ones.
        """
        beside = self.manifest.training.get(BESIDE)
        config = beside.get(name) if isinstance(beside, dict) else None
        try:
            return alphas_in(read_header(self.path(name)).metadata, config if isinstance(config, dict) else None)
        except ExpertsError as error:
            raise ExpertsError(f"{self.path(name)}: {error}") from None

    def lora_changes(self, name: str) -> LoraFile:
        """Read all that a LoRA expert changes, at its strength.

        Args:
            name: The expert's name.

        Returns:
            The changes by diffusers' names of weights.

        Raises:
            ExpertsError: If the file is not the manifest's, is of no known family, or holds what is not applied.
        """
        expert, names = self.manifest.expert(name), self._family().lora_names
        what = self.path(name).name
        file = read_lora(self.tensors(name), self.alphas(name), names, what, expert.component)
        return file.scaled(expert.strength)

    def _family(self) -> ModelFamily:
        try:
            return family(self.manifest.base.family)
        except ValueError as error:
            raise ExpertsError(f"{self.folder}: {error}") from None
