"""Download an experts folder from the Hugging Face Hub.

Transfers, cache and tokens are those of ``huggingface_hub``. Here are the checks around them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ..errors import ExpertsError
from ..format.files import SCHEDULER_CONFIG, check_folder, check_hash
from ..format.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, read_manifest
from .retries import explain, is_passing, one_line, patience, persistently

MAX_EXPERT_BYTES = {"lora": 16 * 2**30, "full": 128 * 2**30}
"""The most bytes of an expert's file, by its kind; larger files are not downloaded."""

T = TypeVar("T")
logger = logging.getLogger(__name__)


def download_experts(
    repo_id: str,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    subfolder: str = "",
) -> Path:
    """Download manifest, expert files and scheduler of a repository.

    The manifest is downloaded and checked first, then only the files that it names; sizes and hashes are checked before
    and after. Without a connection, a copy in the cache is used.

    Args:
        repo_id: The repository, ``user/name``.
        revision: A branch, tag or commit hash.
        cache_dir: Where downloads are kept; None is the Hub client's own cache.
        token: The token for private repositories; None takes the one of ``hf auth login`` or HF_TOKEN.
        local_files_only: Whether only the cache is used.
        subfolder: The folder of the repository in which the experts lie; empty for its top.

    Returns:
        The folder in the Hub's cache.

    Raises:
        ExpertsError: If there is no such repository or cached copy, or if a file is damaged, too large or missing.
    """
    from huggingface_hub import constants

    experts = _Download(repo_id, revision, cache_dir, token, subfolder)
    with one_line(f"cannot load experts from {repo_id!r}", revision):
        if local_files_only or constants.HF_HUB_OFFLINE:
            return experts.from_cache()
        try:
            with patience(experts.timeout):
                size = experts.sizes([MANIFEST_NAME], revision)
        except Exception as error:
            if not is_passing(error):
                raise
            try:
                folder = experts.from_cache()
            except ExpertsError:
                size = experts.persistently(lambda: experts.sizes([MANIFEST_NAME], revision))
            else:
                logger.warning("%s: %s; using the copy in the cache, %s", repo_id, explain(error, None), folder)
                return folder
        return experts.from_hub(size)


class _Download:
    """The download of one repository at one revision.

    Args:
        repo_id: The repository, ``user/name``.
        revision: A branch, tag or commit hash.
        cache_dir: Where downloads are kept.
        token: The token for private repositories.
        subfolder: The folder of the repository in which the experts lie.
    """

    def __init__(
        self, repo_id: str, revision: str | None, cache_dir: str | Path | None, token: str | None, subfolder: str
    ) -> None:
        from huggingface_hub import HfApi, constants

        self.repo_id, self.revision, self.cache_dir = repo_id, revision, cache_dir
        self.parts = [part for part in subfolder.split("/") if part]
        self.api, self.timeout = HfApi(token=token), float(constants.HF_HUB_DOWNLOAD_TIMEOUT)

    def from_hub(self, manifest_size: dict[str, tuple[int, str | None]]) -> Path:
        """Download the files and check them against the manifest.

        Args:
            manifest_size: Size and SHA-256 of the manifest, as ``sizes`` returns them.

        Returns:
            The folder in the cache.

        Raises:
            ExpertsError: If a file is missing, damaged or too large.
        """
        if MANIFEST_NAME not in manifest_size:
            where = f" in {'/'.join(self.parts)}" if self.parts else ""
            raise ExpertsError(f"{self.repo_id!r} holds no {MANIFEST_NAME}{where}: there are no phased experts there")
        self.check_size(MANIFEST_NAME, manifest_size[MANIFEST_NAME][0], MAX_MANIFEST_BYTES)
        folder = self.fetch(MANIFEST_NAME, self.revision).parent
        manifest = read_manifest(folder)
        commit, expected = self.commit(folder), {expert.file: expert for expert in manifest.experts}
        found = self.persistently(lambda: self.sizes([*expected, SCHEDULER_CONFIG], commit))
        for file, expert in expected.items():
            if file not in found:
                raise ExpertsError(f"{self.repo_id!r} lacks {file}, which its manifest names: ask its author")
            size, sha256 = found[file]
            self.check_size(file, size, MAX_EXPERT_BYTES[expert.kind])
            if sha256 not in (None, expert.sha256):
                raise ExpertsError(
                    f"{self.repo_id!r}: {file} has sha256 {str(sha256)[:12]}..., its manifest says "
                    f"{expert.sha256[:12]}...: the repository is broken, ask its author"
                )
        if SCHEDULER_CONFIG in found:
            self.check_size(SCHEDULER_CONFIG, found[SCHEDULER_CONFIG][0], MAX_MANIFEST_BYTES)
        for file in found:
            self.fetch(file, commit)
        check_folder(folder, manifest)
        for expert in manifest.experts:
            path = folder / expert.file
            try:
                check_hash(path, expert)
            except ExpertsError as error:
                logger.warning("%s", error)
                self.fetch(expert.file, commit, force_download=True)
                check_hash(path, expert)
        return folder

    def from_cache(self) -> Path:
        """Find the files in the cache and check them against the manifest.

        Returns:
            The folder in the cache.

        Raises:
            ExpertsError: If a file is missing or damaged.
        """
        from huggingface_hub.errors import EntryNotFoundError

        def cached(file: str, revision: str | None) -> Path:
            path = self.api.hf_hub_download(
                self.repo_id, self.place(file), revision=revision, cache_dir=self.cache_dir, local_files_only=True
            )
            return Path(path)

        try:
            folder = cached(MANIFEST_NAME, self.revision).parent
            manifest = read_manifest(folder)
            for expert in manifest.experts:
                cached(expert.file, self.commit(folder))
        except EntryNotFoundError:
            wanted = self.repo_id + (f" at {self.revision}" if self.revision else "")
            raise ExpertsError(
                f"{wanted} is not, or not wholly, in the cache: load it once with a connection"
            ) from None
        check_folder(folder, manifest)
        for expert in manifest.experts:
            check_hash(folder / expert.file, expert)
        return folder

    def sizes(self, paths: list[str], revision: str | None) -> dict[str, tuple[int, str | None]]:
        """Ask the Hub for sizes and hashes.

        Args:
            paths: Files of the experts' folder.
            revision: A branch, tag or commit hash.

        Returns:
            Path to size in bytes and, where the Hub knows it, SHA-256; without files that are not there.
        """
        from huggingface_hub.hf_api import RepoFile

        names = {self.place(path): path for path in paths}
        found = self.api.get_paths_info(self.repo_id, list(names), revision=revision)
        return {
            names[entry.path]: (entry.size, entry.lfs.sha256 if entry.lfs else None)
            for entry in found
            if isinstance(entry, RepoFile)
        }

    def check_size(self, file: str, size: int, most: int) -> None:
        """Refuse a file that is too large.

        Args:
            file: Its path in the repository.
            size: Its size in bytes.
            most: The most bytes that such a file has.

        Raises:
            ExpertsError: If it is larger.
        """
        if size > most:
            raise ExpertsError(f"{self.repo_id!r}: {file} has {size} bytes, such a file has at most {most}")

    def fetch(self, file: str, revision: str | None, force_download: bool = False) -> Path:
        """Download one file.

        Args:
            file: Its path in the experts' folder.
            revision: A branch, tag or commit hash.
            force_download: Whether a copy in the cache is replaced.

        Returns:
            The path in the cache.
        """
        path = self.persistently(
            lambda: self.api.hf_hub_download(
                self.repo_id,
                self.place(file),
                revision=revision,
                cache_dir=self.cache_dir,
                force_download=force_download,
            )
        )
        return Path(path)

    def place(self, file: str) -> str:
        """Name a file of the experts' folder in the repository.

        Args:
            file: Its path in the experts' folder.

        Returns:
            Its path in the repository.
        """
        return "/".join([*self.parts, file])

    def commit(self, folder: Path) -> str:
        """Tell the commit of what lies in the cache.

        Args:
            folder: The experts' folder in the cache.

        Returns:
            The commit's hash.
        """
        return (folder, *folder.parents)[len(self.parts)].name

    def persistently(self, call: Callable[[], T]) -> T:
        """Call with retries; see ``retries.persistently``.

        Args:
            call: What to do.

        Returns:
            What the call returns.
        """
        return persistently("downloading", self.timeout, call)
