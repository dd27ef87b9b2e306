"""Traffic with the Hugging Face Hub: folders of circuits and configurations go up and come down.

Built on huggingface_hub's `HfApi` rather than its `ModelHubMixin`: that one knows no subfolders, wants a
config.json in every repository, and overwrites a model card that somebody edited on the Hub.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from huggingface_hub import CommitOperationAdd, HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pahq_hf.errors import ConfigError, HubError, first_line

CARD_NAME = "README.md"
_MAX_BYTES = 1 << 30  # of a file that is worth downloading
_MARK = re.compile(r"<!-- pahq_hf card ([0-9a-f]{16}) -->\n")


@dataclass(frozen=True)
class HubPlace:
    """Where something is on the Hub.

    Attributes:
        repo_id: `owner/name`.
        revision: Branch, tag or commit; the default branch if None.
        subfolder: Folder inside the repository.
        token: A token; True takes the stored one, False none, None the stored one where there is one.
        cache_dir: Where downloads go.
        force_download: Download again what is in the cache.
        local_files_only: Do not reach the Hub.
    """

    repo_id: str
    revision: str | None = None
    subfolder: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    force_download: bool = False
    local_files_only: bool = False


def pull(place: HubPlace, names: Sequence[str], optional: Sequence[str] = ()) -> Path:
    """Download files of a repository.

    Args:
        place: Where they are.
        names: Files that must be there.
        optional: Files that may be.

    Returns:
        The folder that holds them, in the cache.

    Raises:
        HubError: If the repository, the revision or a file is missing, access is refused, a file is
            larger than any circuit, or the connection breaks.
    """
    folder: Path | None = None
    for name in (*names, *optional):
        try:
            with _explained(f"{place.repo_id} ({name})"):
                _check_size(place, name)
                path = _download(place, name)
        except _MissingFile:
            if name in names:
                raise
            continue
        folder = folder or path.parent
    if folder is None:
        raise HubError(f"{place.repo_id} holds none of {', '.join(optional)}")
    return folder


def _download(place: HubPlace, name: str) -> Path:
    """A file in the cache, downloaded if it is not there."""
    path = hf_hub_download(
        place.repo_id,
        name,
        subfolder=place.subfolder,
        revision=place.revision,
        token=place.token,
        cache_dir=place.cache_dir,
        force_download=place.force_download,
        local_files_only=place.local_files_only,
    )
    return Path(path)


def _check_size(place: HubPlace, name: str) -> None:
    """Refuse a file that is larger than any circuit, before it is downloaded."""
    if place.local_files_only:
        return
    url = hf_hub_url(place.repo_id, name, subfolder=place.subfolder, revision=place.revision)
    size = get_hf_file_metadata(url, token=place.token).size
    if size is not None and size > _MAX_BYTES:
        raise HubError(f"{name} of {place.repo_id} has {size:,} bytes, more than any circuit: not downloaded")


class PushOptions(TypedDict, total=False):
    """What `push_to_hub` takes beside the repository; `push` says what each is."""

    private: bool | None
    token: str | bool | None
    revision: str | None
    create_pr: bool
    commit_message: str
    subfolder: str | None
    overwrite_card: bool


def push(
    write: Callable[[Path], None],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str,
    subfolder: str | None = None,
    overwrite_card: bool = False,
) -> str:
    """Upload a folder as one commit, creating the repository if need be.

    Args:
        write: Fills a folder.
        repo_id: `owner/name`, or a name for the token's owner.
        private: Whether a new repository is private; the owner's default if None.
        token: A token; the stored one by default.
        revision: Branch to commit to; created if missing.
        create_pr: Open a pull request instead of committing.
        commit_message: Title of the commit.
        subfolder: Folder inside the repository.
        overwrite_card: Replace a card that somebody edited, too.

    Returns:
        Where the commit can be seen.

    Raises:
        HubError: If the Hub refuses.
        ConfigError: If both a branch and a pull request are asked for.
    """
    if create_pr and revision is not None:
        raise ConfigError("a pull request goes to the main branch: give either revision or create_pr")
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory(prefix="pahq-push-") as temporary, _explained(repo_id):
        folder = Path(temporary)
        write(folder)
        full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(full_id, branch=revision, exist_ok=True)
        place = HubPlace(full_id, revision, subfolder, token)
        keep = not overwrite_card and _is_edited(_card_of(place))
        paths = [path for path in sorted(folder.iterdir()) if not (keep and path.name == CARD_NAME)]
        above = f"{subfolder}/" if subfolder else ""
        # Not `upload_folder`: where Xet is installed that one commits in several steps.
        commit = api.create_commit(
            full_id,
            [CommitOperationAdd(f"{above}{path.name}", path) for path in paths],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
        return str(commit.pr_url or commit.commit_url)


# -- cards ------------------------------------------------------------------------------------------


def signed(card: str) -> str:
    """A card with a mark that says it is as it was generated."""
    digest = hashlib.sha256(_MARK.sub("", card).encode()).hexdigest()[:16]
    return f"{_MARK.sub('', card)}<!-- pahq_hf card {digest} -->\n"


def _is_edited(card: str | None) -> bool:
    """Whether somebody wrote or changed a card by hand."""
    if card is None or not card.strip():
        return False
    mark = _MARK.search(card)
    digest = hashlib.sha256(_MARK.sub("", card).encode()).hexdigest()[:16]
    return mark is None or mark[1] != digest


def is_edited(path: Path) -> bool:
    """Whether a card on disk was written or changed by hand."""
    try:
        return _is_edited(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return path.exists()


def _card_of(place: HubPlace) -> str | None:
    """The card that is on the Hub now, if any."""
    try:
        path = _download(place, CARD_NAME)
    except EntryNotFoundError:
        return None
    return path.read_text(encoding="utf-8", errors="replace")


# -- errors -----------------------------------------------------------------------------------------


class _MissingFile(HubError):
    """A repository lacks a file."""


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line that says what to do."""
    try:
        yield
    except GatedRepoError as error:
        raise HubError(f"{what} is gated: ask for access on its page, then log in (hf auth login)") from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{what}: no such repository, or it is private and the token does not open it "
            "(hf auth login, or --token)"
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"{what}: no such revision") from error
    except LocalEntryNotFoundError as error:
        raise HubError(f"{what} is not in the cache, and the Hub cannot be reached") from error
    except EntryNotFoundError as error:
        raise _MissingFile(f"{what}: no such file in the repository") from error
    except HFValidationError as error:
        raise HubError(f"{what!r} cannot be a repository id: {first_line(error)}") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "?")
        hint = ": the token does not allow it (hf auth login, or --token)" if status in (401, 403) else ""
        raise HubError(f"{what}: the Hub answered {status}{hint}: {first_line(error)}") from error
    except (OSError, ValueError, HTTPError) as error:
        raise HubError(f"{what}: {first_line(error)}") from error
