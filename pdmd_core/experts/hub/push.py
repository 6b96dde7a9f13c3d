"""Push an experts folder to the Hugging Face Hub as one commit.

Transfers and tokens are those of ``huggingface_hub``. Here are the checks around them.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ExpertsError
from ..format.files import SCHEDULER_CONFIG, check_folder, check_hash, check_scheduler
from ..format.manifest import MANIFEST_NAME, Manifest, read_manifest
from .card import card_text, is_generated
from .retries import explain, is_passing, one_line, patience, persistently

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_SHOWN = ("samples/*.png", "samples/*.gif", "samples/*.mp4", "samples/*.txt", "report.json", "LICENSE*", "NOTICE*")

logger = logging.getLogger(__name__)


def push_experts(
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Phased experts",
    timeout: float = 120.0,
) -> str:
    """Check an experts folder and put it on the Hub as one commit.

    Manifest, expert files, scheduler, samples/, report.json and licence files are pushed with a model card that loads
    the experts from there (a README.md of your own is kept). Files that the Hub already has are not sent again, so that
    a push that failed continues where it was.

    Args:
        folder: The experts folder.
        repo_id: The repository, ``user/name``; it is created when it does not exist.
        private: Whether the repository is made private; refused for one that exists and is public.
        token: A token with write access; None takes the one of ``hf auth login`` or HF_TOKEN.
        revision: A branch for the commit, created when it does not exist; None is the main branch.
        commit_message: The message of the commit.
        timeout: Seconds without any answer after which an attempt is given up.

    Returns:
        The URL of the repository.

    Raises:
        ExpertsError: If the folder is not valid, the Hub refuses the token or the id, or the push fails after retries.

    Examples:
        >>> url = push_experts("training/embedded/models/experts", "user/my-experts")
        >>> url.endswith("/user/my-experts")
        True
    """
    from huggingface_hub import HfApi

    folder = Path(folder)
    manifest = read_manifest(folder)
    check_folder(folder, manifest)
    for expert in manifest.experts:
        check_hash(folder / expert.file, expert)
    _check_scheduler(folder, manifest)
    _check_access(repo_id, token)
    card_text(manifest, repo_id, folder)  # a report that is none is found before anything is sent
    files = _files(folder, manifest)
    api = HfApi(token=token)
    with one_line(f"cannot push {folder} to {repo_id!r}", revision):
        repo = persistently("creating the repository", timeout, lambda: _create(api, repo_id, private))
        if revision:
            persistently(
                "creating the branch", timeout, lambda: api.create_branch(repo, branch=revision, exist_ok=True)
            )
        card = _card(folder, manifest, repo, api)
        # new operations for each attempt: they ask the Hub what it has, also after an answer that was lost
        persistently(
            "uploading",
            timeout,
            lambda: api.create_commit(
                repo, _operations(folder, files, card), commit_message=commit_message, revision=revision
            ),
        )
        return f"{api.endpoint}/{repo}" + (f"/tree/{revision}" if revision else "")


def check_push(repo_id: str, token: str | None = None) -> None:
    """Check what can be known before there is anything to push: the id, and that the Hub accepts the token.

    A Hub that does not answer is only logged.

    Args:
        repo_id: The repository, ``user/name``.
        token: A token with write access; None takes the one of ``hf auth login`` or HF_TOKEN.

    Raises:
        ExpertsError: If the id is not valid, or if there is no token that the Hub accepts.
    """
    from huggingface_hub import HfApi

    _check_access(repo_id, token)
    with one_line(f"cannot push to {repo_id!r}", None), patience(10.0):
        try:
            HfApi(token=token).whoami()
        except Exception as error:
            if not is_passing(error):
                raise
            logger.warning("%s; the push will be tried all the same", explain(error, None))


def _check_access(repo_id: str, token: str | None) -> None:
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise ExpertsError(
            f"a Hub repository is named user/name (letters, digits, '-', '_', '.'), found {repo_id!r}"
        ) from None
    if not (token or get_token()):
        raise ExpertsError(
            f"no token to push to {repo_id!r}: run `hf auth login`, set HF_TOKEN or give token=, with write access"
        )


def _check_scheduler(folder: Path, manifest: Manifest) -> None:
    try:
        check_scheduler(folder, manifest)
    except ExpertsError as error:
        target = str((folder / SCHEDULER_CONFIG).parent)
        raise ExpertsError(
            f"{error}: write it with PhasedDMDScheduler.from_plan(manifest.plan).save_pretrained({target!r})"
        ) from None


def _create(api: HfApi, repo_id: str, private: bool) -> str:
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.model_info(repo).private:
        raise ExpertsError(f"{repo!r} exists and is public: make it private in its settings, or choose another id")
    return repo


def _card(folder: Path, manifest: Manifest, repo: str, api: HfApi) -> bytes:
    path = folder / "README.md"
    if path.is_file() and not is_generated(path.read_text(encoding="utf-8")):
        return path.read_bytes()
    return card_text(manifest, repo, folder, licence=_licence_of_base(manifest, api)).encode()


def _licence_of_base(manifest: Manifest, api: HfApi) -> dict[str, str]:
    """The licence fields of the base's own card, in its folder or on the Hub; empty where there is none to read."""
    from huggingface_hub import ModelCard

    base, own = manifest.base, Path(manifest.base.model) / "README.md"
    try:
        with one_line("base", base.revision), patience(10.0):
            card: Any = (
                ModelCard.load(own).data
                if own.is_file()
                else api.model_info(base.model, revision=base.revision).card_data
            )
    except ExpertsError:
        return {}
    fields = {key: getattr(card, key, None) for key in ("license", "license_name", "license_link")}
    found = {key: value for key, value in fields.items() if isinstance(value, str)}
    link = found.get("license_link", "")
    if link and "://" not in link:
        found["license_link"] = f"{api.endpoint}/{base.model}/blob/{base.revision or 'main'}/{link}"
    return found


def _files(folder: Path, manifest: Manifest) -> list[Path]:
    named = [MANIFEST_NAME, SCHEDULER_CONFIG, *(expert.file for expert in manifest.experts)]
    files = [folder / name for name in named]
    files += [path for pattern in _SHOWN for path in sorted(folder.glob(pattern)) if path.is_file()]
    present = (path for path in folder.rglob("[!.]*") if path.is_file() and path != folder / "README.md")
    if others := sorted(path.relative_to(folder).as_posix() for path in set(present) - set(files)):
        logger.warning("not pushed: %s", ", ".join(others[:10]) + (" ..." if len(others) > 10 else ""))
    return files


def _operations(folder: Path, files: list[Path], card: bytes) -> list[Any]:
    from huggingface_hub import CommitOperationAdd

    operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
    return [*operations, CommitOperationAdd("README.md", card)]
