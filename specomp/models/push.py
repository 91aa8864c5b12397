"""specomp push FOLDER ORG/NAME: a model folder to the Hugging Face hub, which checks its card.

Needs a token with write access: `hf auth login`, or HF_TOKEN. HF_ENDPOINT is another hub.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from specomp.checksums import check
from specomp.errors import UserError, first_line
from specomp.models.card import CARD, OURS, PLACE, write_card
from specomp.models.files import model_folder
from specomp.models.save import INFO_FILE, checked_export


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Upload a folder that was saved to a repository of the hub, which is made where there is none.
    The address of the commit.

    repo: "ORG/NAME"; private: for a repository that is made; token, endpoint: None: those of the
    environment. Raises UserError where the folder is damaged or not specomp's, and where the hub
    refuses.
    """
    path = model_folder(str(folder))
    if not (path / INFO_FILE).is_file():
        raise UserError(f"{path} was not written by specomp: it has no {INFO_FILE}.")
    try:
        validate_repo_id(repo)
        if "/" not in repo:
            raise UserError(f"{repo!r} is no name of a repository: write ORG/NAME.")
    except HFValidationError as error:
        raise UserError(f"{repo!r} is no name of a repository: {first_line(error)}") from error
    checked_export(path)
    check(path)
    token = (token or "").strip() or None
    hub = (endpoint or os.environ.get("HF_ENDPOINT") or "").rstrip("/") or None
    api = HfApi(endpoint=hub, token=token)
    added = [CommitOperationAdd(x.relative_to(path).as_posix(), x) for x in _files(path)]
    card = _card(path, repo)
    added.append(CommitOperationAdd(CARD, card.encode()))
    try:
        # as create_commit does, but before there is a repository
        api._validate_yaml(card, repo_type="model", token=token)
        made = api.create_repo(repo, private=private, exist_ok=True)
        done = api.create_commit(made.repo_id, added, commit_message=f"specomp: {path.name}")
    except OfflineModeIsEnabled as error:
        raise UserError("HF_HUB_OFFLINE=1 keeps this process off the hub: unset it.") from error
    except HfHubHTTPError as error:
        status, told = error.response.status_code, f"The hub refuses {repo}"
        if status in (401, 403):
            raise UserError(
                f"{told} ({status}): log in with `hf auth login`, or set HF_TOKEN to a token with"
                " write access there."
            ) from error
        raise UserError(f"{told} ({status}: {first_line(error)}).") from error
    except ValueError as error:
        raise UserError(f"{repo}: {' '.join(str(error).split())}") from error
    except Exception as error:
        if not type(error).__module__.startswith("httpx"):  # the hub's client changed its own once
            raise
        told = first_line(error).replace(token or "\0", "TOKEN")
        raise UserError(f"{api.endpoint} cannot be reached: {told}") from error
    return done.commit_url


def _files(folder: Path) -> list[Path]:
    """What is uploaded beside the card. Raises UserError for a link out of the folder."""
    found = []
    for path in sorted(x for x in folder.rglob("*") if x.is_file()):
        inside = path.relative_to(folder)
        if path == folder / CARD or any(x[:1] == "." or x == "__pycache__" for x in inside.parts):
            continue
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{path} is a link to a file outside the folder: remove it.")
        found.append(path)
    return found


def _card(folder: Path, repo: str) -> str:
    """The card, whose snippet opens the repository. Raises UserError where it cannot be read."""
    path = folder / CARD
    try:
        if not path.is_file():
            info = json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))
            write_card(folder, info, name=folder.name, source=None)
        text = path.read_text(encoding="utf-8")
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read or made: {first_line(error)}") from error
    places = {f'("{PLACE}"': f'("{repo}"', f"vllm serve {PLACE}": f"vllm serve {repo}"}
    for here, there in places.items() if OURS in text else ():
        text = text.replace(here, there)
    return text


def main(typed: Sequence[str] | None = None) -> int:
    """The command. The exit code."""
    parser = argparse.ArgumentParser(prog="specomp push", description=__doc__)
    parser.add_argument("folder", help="that was saved")
    parser.add_argument("repo", help="ORG/NAME")
    parser.add_argument("--private", action="store_true", help="make it so, where there is none")
    asked = parser.parse_args(typed)
    try:
        address = push(asked.folder, asked.repo, private=asked.private)
    except UserError as error:
        sys.stderr.write(f"specomp: {error}\n")
        return 1
    sys.stdout.write(f"{address}\n")
    return 0
