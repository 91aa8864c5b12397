"""Failures of the Hugging Face hub, told in one line with what to do."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from specomp.errors import UserError

# First match wins: GatedRepoError is a RepositoryNotFoundError, LocalEntryNotFoundError an
# EntryNotFoundError.
ADVICE: tuple[tuple[tuple[type[Exception], ...], str], ...] = (
    (
        (GatedRepoError,),
        (
            "is gated and this account has no access: accept its licence on its hub page, then log"
            " in with `hf auth login`"
        ),
    ),
    ((RevisionNotFoundError,), "does not have this revision: check model.revision"),
    (
        (RepositoryNotFoundError,),
        "is not on the hub, or is private: check model.repo, or log in with `hf auth login`",
    ),
    (
        (OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError, TimeoutError),
        (
            "is not in the local hub cache and the hub cannot be reached: connect once to download"
            " it, or use model=local model.path=FOLDER, or the embedded model=smollm2_135m"
        ),
    ),
    (
        (EntryNotFoundError,),
        (
            "lacks a file that is needed: if it has no safetensors, set model.weights=bin; else"
            " check model.revision"
        ),
    ),
)


@contextlib.contextmanager
def hub_errors(repo: str, revision: str) -> Iterator[None]:
    """Turn what transformers and huggingface_hub raise about `repo` into a UserError; other
    exceptions pass.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, HfHubHTTPError) as error:
        chain = list(_causes(error))
        advice = next(
            (text for kinds, text in ADVICE if any(isinstance(cause, kinds) for cause in chain)),
            None,
        )
        if advice is None:
            advice = (
                _by_text(str(error)) or f"cannot be loaded: {' '.join(str(error).split())[:300]}"
            )
        raise UserError(f"{repo} (revision {revision}) {advice}.") from error


def downloaded(repo: str, revision: str) -> Path:
    """The folder of a repository in the hub's cache, with its config and safetensors, downloaded if
    need be. Raises UserError.
    """
    with hub_errors(repo, revision):
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=["*.json", "*.py", "model*.safetensors"]
            )
        )


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _by_text(message: str) -> str | None:
    """For the failures that transformers reports as a plain OSError."""
    if "couldn't connect" in message or "offline mode" in message:
        return ADVICE[3][1]
    if "does not appear to have a file" in message:
        return ADVICE[4][1]
    return None
