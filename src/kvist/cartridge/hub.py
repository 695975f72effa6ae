"""Cartridges on the Hugging Face hub. The one door to huggingface_hub; must not know tensors.

Of a repository only the manifest and the files that it names are fetched, from one commit, into the hub's own cache.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvist.cartridge.manifest_file import MANIFEST, read_manifest
from kvist.errors import InvalidCartridge, InvalidInput, NotFound, StoreError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from kvist.cartridge.manifest import CartridgeManifest

_REPO_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_CARD: Final = "README.md"


def resolve(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    subfolder: str | None = None,
) -> Path:
    """The directory that a path or a repository's id means; see `Cartridge.from_pretrained`."""
    path, below = Path(name_or_path), _below(subfolder)
    try:
        is_directory, is_there = path.is_dir(), path.exists()
    except OSError:  # a name that no file can have, or below what we may not see
        is_directory = is_there = False
    if is_directory:
        return path / below
    if is_there:
        raise InvalidInput(f"{path} is a file; a cartridge is a directory", hint=f"kvist cartridge import {path}")
    if not (isinstance(name_or_path, str) and _REPO_ID.fullmatch(name_or_path)):
        raise NotFound(f"there is no directory {path}, and that is no repository's id")
    options: dict[str, Any] = {"cache_dir": cache_dir, "token": token}
    options |= {"local_files_only": local_files_only, "force_download": force_download}
    prefix = f"{below}/" if below else ""
    snapshot = _download(name_or_path, revision, [prefix + MANIFEST], options)
    if not (snapshot / below / MANIFEST).is_file():
        where = f"{name_or_path}/{below}" if below else name_or_path
        raise NotFound(f"{where} on the hub holds no {MANIFEST}, so it is no cartridge")
    names = [prefix + entry.name for entry in read_manifest(snapshot / below).files]
    # Its name is the commit, so that the files are those of this manifest, whatever the branch is moved to meanwhile.
    return _download(name_or_path, snapshot.name, names, options) / below


def upload(
    directory: Path,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a cartridge's directory in one commit, and return its address; see `Cartridge.push_to_hub`.

    Files that the repository's manifest names and this cartridge does not have are deleted. A README is written where
    the directory and the repository have none.
    """
    import huggingface_hub as hf

    manifest = read_manifest(directory)
    with _translated(repo_id):
        api = hf.HfApi(token=token)
        made = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(made, branch=revision, exist_ok=True)
        there = set(api.list_repo_files(made, revision=revision))
        files = [directory / MANIFEST, *(directory / entry.name for entry in manifest.files)]
        additions = [hf.CommitOperationAdd(path.name, path) for path in files]
        if _CARD not in there:
            card = directory / _CARD
            text = card.read_bytes() if card.is_file() else _card(manifest).encode()
            additions.append(hf.CommitOperationAdd(_CARD, text))
        stale = _named_there(api, made, revision) & there if MANIFEST in there else set()
        stale -= {path.name for path in files}
        info = api.create_commit(
            made,
            [*additions, *(hf.CommitOperationDelete(name) for name in sorted(stale))],
            commit_message=commit_message or f"Cartridge {manifest.cartridge_id}",
            revision=revision,
            create_pr=create_pr,
        )
        return str(info.pr_url if create_pr else info.commit_url)


def _named_there(api: HfApi, repo_id: str, revision: str | None) -> set[str]:
    """The files that a repository's manifest names. One that cannot be understood names none of ours."""
    path = Path(api.hf_hub_download(repo_id, MANIFEST, revision=revision))
    try:
        return {entry.name for entry in read_manifest(path.parent).files}
    except InvalidCartridge:
        return set()


def _download(repo_id: str, revision: str | None, names: list[str], options: dict[str, Any]) -> Path:
    from huggingface_hub import snapshot_download

    with _translated(repo_id):
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=names, **options))


@contextlib.contextmanager
def _translated(repo_id: str) -> Iterator[None]:
    """Raise the hub's errors as ours."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise InvalidInput(f"{repo_id!r} is no repository's id: {error}") from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise NotFound(
            f"the hub shows no such repository or revision of {repo_id!r}: {_short(error)}",
            hint="is it private or gated? log in: hf auth login",
        ) from None
    except errors.LocalEntryNotFoundError as error:
        if error.__cause__ is None:
            raise NotFound(f"{repo_id!r} is not in the local cache: {_short(error)}") from None
        raise StoreError(f"{repo_id!r} is not in the local cache; the hub is out of reach: {_short(error)}") from None
    # HTTPError is that of httpx or of httpx2, whichever this huggingface_hub is built on
    except (errors.HTTPError, OSError, ValueError) as error:  # type: ignore[attr-defined]
        raise StoreError(f"the hub did not do it for {repo_id!r}: {_short(error)}") from None


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]


def _below(subfolder: str | None) -> str:
    """A relative path that stays below, in one spelling."""
    path = Path(subfolder or "")
    if path.is_absolute() or ".." in path.parts:
        raise InvalidInput(f"subfolder must be a path below the repository, got {subfolder!r:.80}")
    return "/".join(path.parts)


def _card(manifest: CartridgeManifest) -> str:
    lines = ["---", "library_name: kvist", "tags:", "- cartridge", "- kv-cache"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", manifest.model_id):
        lines.append(f"base_model: {manifest.model_id}")
    if re.fullmatch(r"[a-z0-9.+-]+", manifest.license):
        lines.append(f"license: {manifest.license}")
    lines += [
        "---",
        "",
        f"# {manifest.cartridge_id}",
        "",
        f"Keys and values of {manifest.num_tokens_raw:,} tokens for `{manifest.model_id}`, {manifest.origin}.",
        "",
        "```bash",
        "kvist cartridge show .",
        "```",
        "",
    ]
    return "\n".join(lines)
