"""Experts folders on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from .card import card_text
from .files import PhasedExperts
from .manifest import ExpertsError


def push_experts(folder: str | Path, repo_id: str, private: bool = False, token: str | None = None) -> str:
    """Check an experts folder, create the repository when needed, upload; returns its URL. Raises ExpertsError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    experts = PhasedExperts.open(folder)
    api = HfApi(token=token)
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id, folder_path=folder, commit_message="Phased experts", ignore_patterns="README.md"
        )
        card = card_text(experts.manifest, url.repo_id).encode()
        api.upload_file(
            path_or_fileobj=card, path_in_repo="README.md", repo_id=url.repo_id, commit_message="Model card"
        )
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        raise ExpertsError(
            f"cannot push {folder} to {repo_id!r}: {' '.join(str(error).split())[:300]}; the folder is complete, push "
            "it again when this is solved"
        ) from None
    return str(url)
