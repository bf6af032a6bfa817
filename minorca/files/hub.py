"""Models, adapters and data sets of the Hugging Face hub, in the cache of `huggingface_hub`.

An id is org/name, or org/name@REVISION with a branch, a tag or a commit. It is resolved to a commit once in a process:
whatever is read later is of the same commit, also where the branch moves meanwhile. Files are downloaded when they are
needed: weights after all that can be refused without them.
"""

import contextlib
import functools
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from minorca.errors import MACHINE_ERRORS, UserError
from minorca.files.safe_io import check_hub_cache, read_json, user_path
from minorca.progress import bar_settings

log = logging.getLogger(__name__)

_ID = re.compile(
    r"(?!\S*\.\.)([a-z0-9_][a-z0-9_.-]*/[a-z0-9_][a-z0-9_.-]*)(?:@([a-z0-9_.][a-z0-9_./-]*))?", re.I | re.A
)
_COMMIT = re.compile("[0-9a-f]{40}")
# what is read of a model or an adapter, beside weights
MODEL_SETTINGS = (
    "config.json",
    "params.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "tekken.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "adapter_config.json",
    "minorca.json",
)
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


class HubId(NamedTuple):
    """org/name, and a branch, a tag or a commit; None: the branch main."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}" if self.revision else self.repository


def parse_id(path: str | Path) -> HubId | None:
    """The hub id that a path is; None where something of that name is here, or it has not the form of an id."""
    match = _ID.fullmatch(str(path))
    return HubId(*match.groups()) if match and not user_path(path).exists() else None


def is_repository(name: str) -> bool:
    """Whether a name is one that a repository of the hub can have, org/name without a revision."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    match = _ID.fullmatch(name)
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(match and match[2] is None)


def pinned(path: str | Path) -> HubId | None:
    """The hub id that a path is, with the commit as its revision; None where it is none.

    Raises:
        UserError: as `resolve`.
    """
    found = parse_id(path)
    return found and HubId(found.repository, resolve(found))


def name_of(path: str | Path) -> str:
    """What to call a model or an adapter: by the last part of its hub id, or of its directory."""
    found = parse_id(path)
    return found.repository.rpartition("/")[2] if found else Path(path).resolve().name


def local_directory(path: str | Path, weights: bool = False) -> Path:
    """Where the files of a model or an adapter are: `path` itself, or of a hub id a directory of the cache.

    Args:
        weights: a model's too; else what is beside them, and an adapter's.

    Raises:
        UserError: a hub id whose files cannot be had, with what to do.
    """
    found = parse_id(path)
    return user_path(path) if found is None else _download(found, weights)


# ---------------------------------------------------------------------------------------------------------- resolving


@functools.cache
def resolve(hub_id: HubId, kind: str = "model") -> str:
    """The commit that an id names: the hub's, or without a network that which it named last.

    Args:
        kind: model or dataset.

    Raises:
        UserError: what is wrong with the id or the network, and what to do.
    """
    if hub_id.revision and _COMMIT.fullmatch(hub_id.revision):
        return hub_id.revision
    check_hub_cache()
    from huggingface_hub import HfApi, constants

    class Api(HfApi):
        """Waits for an answer as long as for others of the hub, not for ever."""

        def repo_info(self, *arguments, **options):
            return super().repo_info(*arguments, **options, timeout=constants.HF_HUB_ETAG_TIMEOUT)

    with _hub_errors(hub_id, kind):
        offline = constants.HF_HUB_OFFLINE
        found = Api().resolve_revision(
            hub_id.repository, revision=hub_id.revision, repo_type=kind, local_files_only=offline
        )
    if offline:
        log.info("%s: commit %s of the cache, as HF_HUB_OFFLINE is set", hub_id, found.resolved)
    return found.resolved


@contextlib.contextmanager
def _hub_errors(hub_id: HubId, kind: str = "model") -> Iterator[None]:
    """Turns whatever the hub, the network or the disk makes `huggingface_hub` raise into a UserError."""
    from huggingface_hub import errors

    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = error.__cause__
        refusal = cause if isinstance(cause, errors.HfHubHTTPError) and cause.response.status_code < 500 else None
        if isinstance(error, errors.RevisionResolutionError | errors.LocalEntryNotFoundError) and refusal is None:
            raise UserError(_not_cached(hub_id, kind, error), path=str(hub_id)) from None
        missing = "directory" if kind == "model" else "file"
        reason = _reason(hub_id, kind, refusal or error)
        raise UserError(f"no such {missing}, and {reason}", path=str(hub_id)) from None


def _reason(hub_id: HubId, kind: str, error: Exception) -> str:
    """Why the hub did not give what was asked for, and what to do."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.HFValidationError):
        return f"it is not an id that the hub can have ({error})"
    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{hub_id.repository}"
        return f"on the hub it is gated: accept its terms at {page}, then log in with hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has none of that name, or it is private: check the name, or log in with hf auth login"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"on the hub it has no revision {hub_id.revision}; expected a branch, a tag, or a commit of 40 digits"
    # errors of the hub are errors of the system too
    if isinstance(error, errors.HfHubHTTPError):
        answer = f"the hub answered {error.response.status_code} {error.response.reason_phrase}"
        if error.response.status_code in (401, 403):
            advice = "the token is not valid, or may not read it: log in again with hf auth login, or set HF_TOKEN"
            return f"{answer}; {advice}"
        return f"{answer}; try again later"
    if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
        return f"the hub's cache cannot be written ({error}); make room, or set HF_HOME to another directory"
    what = f"{type(error).__name__}: {error}".rstrip(": ").splitlines()[0]
    return f"it could not be downloaded ({what}); try again: what is complete is kept"


def _not_cached(hub_id: HubId, kind: str, error: Exception) -> str:
    from huggingface_hub import constants

    found = _cached_revisions(hub_id.repository, kind)
    cause = error.__cause__
    network = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        answer = getattr(cause, "response", None)
        network = f"the hub cannot be reached ({answer.status_code if answer else type(cause or error).__name__})"
    option = " --repo-type dataset" if kind == "dataset" else ""
    revision = f" --revision {hub_id.revision}" if hub_id.revision else ""
    ways = f"where there is a network: hf download {hub_id.repository}{option}{revision}"
    if not found:
        return (
            f"no such directory, not in the hub's cache {constants.HF_HUB_CACHE}, and {network}; {ways}; "
            f"or set HF_HOME to the directory of a cache that has it"
        )
    wanted = hub_id.revision or "main"
    what = f"has not all files of {wanted}" if wanted in found or wanted in found.values() else f"lacks {wanted}"
    listed = ", ".join(f"{commit}" if name == commit else f"{name} ({commit})" for name, commit in found.items())
    return f"the hub's cache {what}, and {network}; it has {listed}; {ways}"


def _cached_revisions(repository: str, kind: str) -> dict[str, str]:
    """Branch or tag -> commit, of those that the cache has files of, and commits that no branch or tag names."""
    from huggingface_hub import constants

    directory = Path(constants.HF_HUB_CACHE, f"{kind}s--{repository.replace('/', '--')}")
    commits = {path.name for path in directory.glob("snapshots/*")}
    refs = directory / "refs"
    named = {str(file.relative_to(refs)): file.read_text().strip() for file in refs.rglob("*") if file.is_file()}
    named = {name: commit for name, commit in sorted(named.items()) if commit in commits}
    return named | {commit: commit for commit in sorted(commits - set(named.values()))}


# -------------------------------------------------------------------------------------------------------- downloading


@functools.cache
def _download(hub_id: HubId, weights: bool) -> Path:
    commit = resolve(hub_id)
    check_hub_cache()
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        """As those of `progress`."""

        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **bar_settings() | options)

    def fetch(names: list[str] | tuple[str, ...]) -> Path:
        # of two processes that want the same file, one waits for the other
        return Path(
            snapshot_download(
                hub_id.repository,
                revision=commit,
                allow_patterns=list(names),
                local_files_only=constants.HF_HUB_OFFLINE,
                tqdm_class=Bar,
            )
        )

    with _hub_errors(hub_id):
        directory = fetch(MODEL_SETTINGS)
        names = _listed(hub_id.repository, commit, directory)
        if adapter := next((name for name in _ADAPTER_FILES if name in names), None):
            fetch([adapter])
        chosen = _weight_files(names) if weights else []
        if (weights and not chosen) or not directory.is_dir():
            raise UserError(_nothing_to_read(hub_id, names, weights), path=str(hub_id))
        if chosen:
            fetch(chosen)
        if chosen and chosen[0].endswith(".index.json"):
            fetch(_indexed(directory / chosen[0], names))
    return directory


def _nothing_to_read(hub_id: HubId, names: set[str], weights: bool) -> str:
    what = f"on the hub it has no {'weights' if weights else 'files of a model or an adapter'} that can be read"
    if found := sorted(name for name in names if name.endswith(".gguf")):
        revision = f" --revision {hub_id.revision}" if hub_id.revision else ""
        command = f"hf download {hub_id.repository}{revision} {found[0]} --local-dir ."
        return f"{what}; of GGUF files give the path of one that is here: {command}"
    return f"{what}; it has {', '.join(sorted(names)[:5]) or 'none at all'}"


def _listed(repository: str, commit: str, directory: Path) -> set[str]:
    """The names of a commit's files; of those that are here, where the cache has no list of them."""
    from huggingface_hub import errors, get_cached_repo_tree

    try:
        return {file.path for file in get_cached_repo_tree(repository, revision=commit)}
    except errors.CachedRepoTreeNotFoundError:
        return {os.path.relpath(path, directory) for path in directory.rglob("*")}


def _weight_files(names: set[str]) -> list[str]:
    """The files, or the index, of the first form of weights that there is; pickles only where there is no other."""
    from minorca.files.tensor_files import WEIGHT_FILES

    for name in sorted(WEIGHT_FILES, key=lambda name: not name.endswith(".safetensors")):
        if name in names:
            # a part of tensors that were split has another beside it, by which it is refused
            return [name, *({"consolidated.01.pth"} & names if name.endswith(".pth") else ())]
        if f"{name}.index.json" in names:
            return [f"{name}.index.json"]
        stem, suffix = name.rsplit(".", 1)
        numbered = re.compile(rf"{re.escape(stem)}-\d{{5}}-of-\d{{5}}\.{suffix}")
        if found := sorted(filter(numbered.fullmatch, names)):
            return found
    return []


def _indexed(index: Path, names: set[str]) -> list[str]:
    """The shards that an index names. What else it names, its reader refuses."""
    shards = read_json(index).get("weight_map")
    found = {shard for shard in shards.values() if isinstance(shard, str)} if isinstance(shards, dict) else set()
    return sorted(name for name in found & names if re.fullmatch(r"[\w.-]+", name))
