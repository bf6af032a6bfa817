"""A complete directory to the hub, in one commit."""

import fnmatch
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minorca.errors import UserError
from minorca.files.hub import MODEL_SETTINGS, is_repository

_ADAPTER_WEIGHTS = ("adapter_model.*",)
_MODEL = (*MODEL_SETTINGS, *_ADAPTER_WEIGHTS, "model*.safetensors*", "pytorch_model*.bin*", "consolidated*")


def check_push(repository: str, private: bool) -> None:
    """Raises UserError, before anything is written: no name of a repository, no network, nobody is logged in, or what
    is to be private would be public.
    """
    from huggingface_hub import constants, get_token

    if not is_repository(repository):
        raise UserError(f"is {repository}; expected ORG/NAME, as on the hub", field="--push")
    if constants.HF_HUB_OFFLINE:
        raise UserError("needs a network, and HF_HUB_OFFLINE is set; leave --push out, or unset it", field="--push")
    if get_token() is None:
        raise UserError("needs a token that may write: log in with hf auth login, or set HF_TOKEN", field="--push")
    if private and _is_public(repository):
        message = f"makes a private repository, and {repository} is a public one that exists already"
        raise UserError(f"{message}; make it private in its settings, or leave --private out", field="--private")


def _is_public(repository: str) -> bool:
    """Whether there is a repository of that name that everybody can read."""
    from huggingface_hub import HfApi, errors

    try:
        return not HfApi().repo_info(repository).private
    except errors.RepositoryNotFoundError:
        return False
    except Exception as error:
        raise UserError(f"is {repository}, which cannot be looked up: {_reason(error)}", field="--push") from None


def push(directory: Path, repository: str, private: bool) -> str:
    """Uploads all files of a directory, in one commit; the repository is made where there is none.

    What would be read beside or instead of the directory's files, as shards of an earlier push, is removed in the same
    commit.

    Args:
        private: a repository that is made is; one that is there stays as it is.

    Returns:
        The URL of the commit.

    Raises:
        UserError: the hub did not take it; the directory is as it was, and the message has the command that uploads it.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    files = {str(path.relative_to(directory)): path for path in sorted(directory.rglob("*")) if path.is_file()}
    stale: list[str] = []
    try:
        api = HfApi()
        # not private: as the organization has chosen
        api.create_repo(repository, private=private or None, exist_ok=True)
        stale = _stale(api.list_repo_files(repository), files)
        operations: list[Any] = [CommitOperationAdd(name, path) for name, path in files.items()]
        operations += [CommitOperationDelete(name) for name in stale]
        return api.create_commit(repository, operations, commit_message="Export of minorca").commit_url
    except Exception as error:
        options = ["--private"] * private + [f"--delete={name}" for name in stale]
        again = shlex.join(["hf", "upload", repository, str(directory), ".", *options])
        message = f"the push to {repository} failed: {_reason(error)}; it is complete here, to push again: {again}"
        raise UserError(message, path=directory) from None


def _stale(present: Iterable[str], files: Iterable[str]) -> list[str]:
    """What a repository has that readers would take beside or instead of the files that are pushed.

    Weights in another form or in other shards, a tokenizer or a template that comes before the new one; and beside a
    whole model an adapter, whose base transformers loads in the model's place.
    """
    pushed = set(files)
    is_model = bool({"config.json", "params.json"} & pushed)
    patterns = _MODEL if is_model else _ADAPTER_WEIGHTS if "adapter_config.json" in pushed else ()
    others = sorted(set(present) - pushed)
    return [name for name in others if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def _reason(error: Exception) -> str:
    from huggingface_hub import errors

    if not isinstance(error, errors.HfHubHTTPError):
        return f"{type(error).__name__}: {error}".splitlines()[0]
    answer = f"the hub answered {error.response.status_code} {error.response.reason_phrase}"
    denied = error.response.status_code in (401, 403, 404)
    return f"{answer}; log in with hf auth login as one who may write there" if denied else answer
