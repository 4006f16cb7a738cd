"""A checkpoint's way to the hub: what is uploaded, what is checked before, and what the hub's refusals mean."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from typing import cast

from kalm_integrations.core.checkpoint.folders import PLAIN_FILES
from kalm_integrations.core.checkpoint.locate import is_offline
from kalm_integrations.core.checkpoint.opened import Checkpoint
from kalm_integrations.core.checkpoint.tokenization import PromptTokenizer
from kalm_integrations.errors import CheckpointNotFoundError, PublishError, SettingsError
from kalm_integrations.logs import only_errors
from kalm_integrations.training.card import CARD, stated_licence

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
"""Weights of an earlier upload; a loader might take them for those of this one."""


@dataclass(frozen=True)
class Publishable:
    """A checkpoint that was checked, and what is uploaded of its folder."""

    folder: Path
    files: tuple[Path, ...]
    """Files of a checkpoint, sorted by name."""
    others: tuple[str, ...]
    """Names of everything else in the folder."""


def check_publishable(folder: Path) -> Publishable:
    """Open a checkpoint as for use, its weights excepted, and list what is uploaded.

    Raises:
        CheckpointError: there is no such folder, or it holds no reranker.
    """
    if not folder.is_dir():
        msg = f"what is published must be the folder of a checkpoint, but {str(folder)!r} is none; check the path"
        raise CheckpointNotFoundError(msg)
    opened = Checkpoint.open(folder)
    opened.text_names()
    PromptTokenizer(opened.load_tokenizer())
    entries = sorted(folder.iterdir())
    files = [path for path in entries if path.is_file() and any(fnmatchcase(path.name, name) for name in PLAIN_FILES)]
    return Publishable(folder, tuple(files), tuple(path.name for path in entries if path not in files))


def push(
    checkpoint: Publishable,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a checkpoint in one commit; the repository and the branch are made if they are not there.

    Weights of an earlier upload that the commit does not replace are deleted. Other files of the repository stay.

    Args:
        checkpoint: from `check_publishable`.
        repo_id: `owner/name`.
        private: the repository must be private.
        revision: branch; None: main.
        message: of the commit.
        token: with the right to write; None leaves it to huggingface_hub (`HF_TOKEN`, a saved login).

    Returns:
        The address of the repository, or of the branch in it.

    Raises:
        SettingsError: the hub must not be asked, the id is malformed, or others could read a checkpoint without a licence.
        PublishError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    _check_settings(checkpoint, repo_id, private=private)
    api = HfApi(token=token)
    names = [path.name for path in checkpoint.files]
    try:
        with only_errors("huggingface_hub"):
            api.create_repo(repo_id, private=private or None, exist_ok=True)
            is_exposed = private and not api.model_info(repo_id).private
            if not is_exposed:
                if revision is not None:
                    api.create_branch(repo_id, branch=revision, exist_ok=True)
                api.upload_folder(
                    repo_id=repo_id,
                    folder_path=checkpoint.folder,
                    allow_patterns=[escape(name) for name in names],
                    delete_patterns=[pattern for pattern in WEIGHTS if pattern not in names],
                    revision=revision,
                    commit_message=message or "Upload a reranker",
                )
    except HFValidationError as error:
        raise SettingsError(_malformed(repo_id, str(error))) from error
    except Exception as error:  # the client's own classes, and those of what it sends with, differ between its versions
        raise PublishError(_refused(error, repo_id, api.endpoint)) from error
    if is_exposed:
        msg = (
            f"with --private the repository must be private, but {repo_id} is there and public, so nothing was uploaded; make "
            "it private on its page, or choose another name"
        )
        raise PublishError(msg)
    at = f"/tree/{revision}" if revision is not None else ""
    return f"{api.endpoint}/{repo_id}{at}"


def _check_settings(checkpoint: Publishable, repo_id: str, *, private: bool) -> None:
    if is_offline():
        msg = "publishing needs the hub, but HF_HUB_OFFLINE is set; unset it, or see what would be uploaded with --dry-run"
        raise SettingsError(msg)
    if not re.fullmatch(r"[^/]+/[^/]+", repo_id):
        raise SettingsError(_malformed(repo_id, "one slash between the two"))
    if not private and stated_licence(checkpoint.folder) is None:
        msg = (
            f"what everybody can read must state its licence, but {checkpoint.folder / CARD} does not; write `license: ...` "
            "into the metadata at its top, or publish with --private"
        )
        raise SettingsError(msg)


def _malformed(repo_id: str, rule: str) -> str:
    return f"a repository of the hub must be owner/name, but got {repo_id!r}: {rule}"


def _refused(error: Exception, repo_id: str, endpoint: str) -> str:
    """Return what went wrong and what to do about it, in one line."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        # The client wraps what goes wrong with a single file.
        return _refused(cast("Exception", error.__cause__), repo_id, endpoint)
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = " ".join(str(error).split()) or type(error).__name__
    if status == 401:
        return (
            f"{endpoint} must know who publishes {repo_id}, but the token is missing or not valid; log in with `hf auth "
            "login`, or set HF_TOKEN, with a token that may write"
        )
    if status == 403:
        return (
            f"the token must have the right to write to {repo_id}, but {endpoint} refuses it; use a token that may write, and "
            "an owner that you may publish for"
        )
    if status is not None or isinstance(error, ValueError):
        return f"{endpoint} does not take {repo_id}: {said}"
    return (
        f"{endpoint} must be reached to publish {repo_id}, but cannot be ({type(error).__name__}: {said}); check the network"
    )
