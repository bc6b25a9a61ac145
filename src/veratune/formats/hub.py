"""Adapters on the Hugging Face Hub: `hf://user/repo@revision`, through huggingface_hub.

A repository holds `adapter.safetensors`, a model card, and on request the PEFT LoRA folder
`peft-lora/`. The endpoint and the token are huggingface_hub's own: HF_ENDPOINT and HF_TOKEN, or the
stored login.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path

from veratune.errors import ConfigError, DataError

SCHEME = "hf://"
FILE_NAME = "adapter.safetensors"
MAX_DOWNLOAD_BYTES = 2**32  # a trained head may be large; nobody's adapter is larger
_ADDRESS = re.compile(
    r"(?P<repo>[\w.-]{1,96}/[\w.-]{1,96})(?:@(?P<revision>[\w./-]{1,255}?))?(?:#(?P<file>[\w./-]+))?"
)


@dataclasses.dataclass(frozen=True)
class HubAddress:
    """A file on the hub.

    Attributes:
        repo: "user/repo".
        revision: Branch, tag or commit; None is the main branch.
        file: The adapter file's name in the repository.
    """

    repo: str
    revision: str | None = None
    file: str = FILE_NAME


def is_address(path: str | Path) -> bool:
    """Whether a path is a hub address."""
    return str(path).startswith(SCHEME)


def parse_address(text: str) -> HubAddress:
    """Parse `hf://user/repo@revision#file`. Raises ConfigError.

    >>> parse_address("hf://ann/style@v2")
    HubAddress(repo='ann/style', revision='v2', file='adapter.safetensors')
    """
    match = _ADDRESS.fullmatch(text.removeprefix(SCHEME))
    if match is None or ".." in text:
        raise ConfigError(f"{text!r} is not a hub address; hf://user/repo@revision is wanted")
    return HubAddress(match["repo"], match["revision"], match["file"] or FILE_NAME)


def download(address: str | HubAddress) -> Path:
    """Download an adapter's file into huggingface_hub's cache.

    Args:
        address: "hf://user/repo@revision" or its parts.

    Returns:
        The file in the cache.

    Raises:
        DataError: The repository, revision or file is missing, private or too large, or the hub is
            unreachable.
    """
    from huggingface_hub import hf_hub_download

    place = parse_address(address) if isinstance(address, str) else address
    endpoint = os.environ.get("HF_ENDPOINT")
    with hub_errors(place.repo):
        found = hf_hub_download(
            place.repo, place.file, revision=place.revision, endpoint=endpoint, dry_run=True
        )
        if found.file_size is not None and found.file_size > MAX_DOWNLOAD_BYTES:
            raise DataError(
                f"{SCHEME}{place.repo}: {place.file} has {found.file_size:,} bytes; an adapter of "
                f"at most {MAX_DOWNLOAD_BYTES:,} is downloaded"
            )
        return Path(
            hf_hub_download(place.repo, place.file, revision=place.revision, endpoint=endpoint)
        )


def upload(folder: Path, repo: str, *, private: bool = False, message: str = "") -> str:
    """Create a repository if it is missing, and commit a folder to it.

    Args:
        folder: The files.
        repo: "user/repo".
        private: Make a new repository private.
        message: The commit's message.

    Returns:
        The commit's page.

    Raises:
        ConfigError: `repo` is not "user/repo".
        DataError: No permission, or the hub is unreachable.
    """
    from huggingface_hub import HfApi

    repo = parse_address(repo).repo
    with hub_errors(repo):
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=message or "Add a VeRA adapter"
        )
        return str(commit)


@contextlib.contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn the hub's errors into one-line DataErrors."""
    import httpx2
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise DataError(
            f"{SCHEME}{repo}: the hub cannot be reached and the file is not in the cache; check "
            "the network, HF_ENDPOINT and HF_HUB_OFFLINE"
        ) from None
    except GatedRepoError:
        raise DataError(f"{SCHEME}{repo}: the repository is gated; ask for access") from None
    except RepositoryNotFoundError:
        raise DataError(
            f"{SCHEME}{repo}: no such repository, or it is private; check the name and HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise DataError(f"{SCHEME}{repo}: the repository has no such revision") from None
    except EntryNotFoundError:
        raise DataError(f"{SCHEME}{repo}: the repository has no such file") from None
    except HfHubHTTPError as error:
        raise DataError(f"{SCHEME}{repo}: {' '.join(str(error).split())[:200]}") from None
    except httpx2.HTTPError as error:
        raise DataError(f"{SCHEME}{repo}: the hub cannot be reached ({error})") from None
