"""A complete directory to the hub, in one commit."""

import fnmatch
import sys
from pathlib import Path
from typing import Any

from minorca.errors import UserError
from minorca.files.hub import is_repository

# of weights that a repository has in another form or in other shards, which would be read beside those that are pushed
_WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin*", "consolidated*.safetensors*", "adapter_model.*")


def check_push(repository: str) -> None:
    """Raises UserError, before anything is written: no name of a repository, no network, or nobody is logged in."""
    from huggingface_hub import constants, get_token

    if not is_repository(repository):
        raise UserError(f"is {repository}; expected ORG/NAME, as on the hub", field="--push")
    if constants.HF_HUB_OFFLINE:
        raise UserError("needs a network, and HF_HUB_OFFLINE is set; leave --push out, or unset it", field="--push")
    if get_token() is None:
        raise UserError("needs a token that may write: log in with hf auth login, or set HF_TOKEN", field="--push")


def push(directory: Path, repository: str, private: bool) -> str:
    """Uploads all files of a directory, in one commit; the repository is made where there is none.

    Weights that the repository has and the directory has not are removed in the same commit.

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
    try:
        api = HfApi()
        # not private: as the organization has chosen
        api.create_repo(repository, private=private or None, exist_ok=True)
        present = set(api.list_repo_files(repository)) - files.keys()
        replaced = [pattern for pattern in _WEIGHTS if any(fnmatch.fnmatch(name, pattern) for name in files)]
        stale = sorted(name for name in present if any(fnmatch.fnmatch(name, pattern) for pattern in replaced))
        operations: list[Any] = [CommitOperationAdd(name, path) for name, path in files.items()]
        operations += [CommitOperationDelete(name) for name in stale]
        return api.create_commit(repository, operations, commit_message="Export of minorca").commit_url
    except Exception as error:
        again = f"hf upload {repository} {directory} .{' --private' if private else ''}"
        message = f"the push to {repository} failed: {_reason(error)}; it is complete here, to push again: {again}"
        raise UserError(message, path=directory) from None


def _reason(error: Exception) -> str:
    from huggingface_hub import errors

    if not isinstance(error, errors.HfHubHTTPError):
        return f"{type(error).__name__}: {error}".splitlines()[0]
    answer = f"the hub answered {error.response.status_code} {error.response.reason_phrase}"
    denied = error.response.status_code in (401, 403, 404)
    return f"{answer}; log in with hf auth login as one who may write there" if denied else answer
