"""LoRA files of other projects on the Hub: found by a pasted address, downloaded within limits."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from ..errors import ExpertsError
from ..format.untrusted import shown
from .ids import HubAddress, hub_address
from .retries import one_line

MAX_LORA_BYTES = 16 * 2**30
"""The most bytes of a LoRA file; larger files are not downloaded."""
_SUFFIXES = (".safetensors", ".sft")


def local_lora_file(given: str | Path, token: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """Find a LoRA file on this machine, or download it.

    Args:
        given: A file or folder here, or a file on the Hub as ``hub_address`` reads it.
        token: The token for private repositories; None takes the one of ``hf auth login`` or HF_TOKEN.
        cache_dir: Where downloads are kept; None is the Hub client's own cache.

    Returns:
        The path of the file; one that is not here is returned as it is, for whoever opens it to say so.

    Raises:
        ExpertsError: If it is on the Hub and cannot be downloaded.
    """
    address = None if isinstance(given, Path) or Path(given).exists() else hub_address(given)
    is_url = isinstance(given, str) and given.startswith(("http://", "https://", "hf://"))
    if address is None or not address.path.endswith(_SUFFIXES):
        if is_url:
            raise ExpertsError(
                f"{shown(given)}: the address of a .safetensors file on the Hub is expected here, such as "
                "https://huggingface.co/user/name/blob/main/file.safetensors"
            )
        return Path(given)
    return _download(address, token, cache_dir)


def _download(address: HubAddress, token: str | None, cache_dir: str | Path | None) -> Path:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.hf_api import RepoFile

    api, file = HfApi(token=token), address.path
    with one_line(f"cannot load {file} from {address.repo_id!r}", address.revision):
        if not constants.HF_HUB_OFFLINE:
            found = api.get_paths_info(address.repo_id, [file], revision=address.revision)
            sizes = [entry.size for entry in found if isinstance(entry, RepoFile)]
            if not sizes:
                raise ExpertsError(f"{address.repo_id!r} has no file {shown(PurePosixPath(file).as_posix())}")
            if sizes[0] > MAX_LORA_BYTES:
                raise ExpertsError(f"{file} has {sizes[0]} bytes, a LoRA file has at most {MAX_LORA_BYTES}")
        path = api.hf_hub_download(address.repo_id, file, revision=address.revision, cache_dir=cache_dir)
    return Path(path)
