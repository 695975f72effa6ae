"""A cartridge: keys and values of every layer, and the manifest that says whose; made, saved, opened, checked.

Knows the format (docs/spec/cartridge.md). Must not know engines, registries or other projects' formats.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Self

from torch import Tensor

from kvist.cartridge import hub
from kvist.cartridge.directory import write_directory
from kvist.cartridge.manifest import CartridgeManifest, LayerShape, align_to_block_size
from kvist.cartridge.model import ModelIdentity
from kvist.cartridge.reading import checked_ids, read_directory, verify_content
from kvist.cartridge.shards import (
    TOKEN_IDS,
    content_checksum,
    keys_name,
    named_tensors,
    not_finite,
    parse_size,
    values_name,
)
from kvist.errors import InvalidCartridge, InvalidInput

_BLOCK_SIZE: Final = 16
_MAX_SHARD: Final = "5GB"


class Cartridge:
    """Keys and values of a prefix for one model.

    Immutable: neither its tensors nor those that it was made of may be written to. Usable from several threads.

    Attributes:
        manifest: what it is. One that was not saved yet names no files.
        directory: where it was opened or saved, or ``None``.
    """

    def __init__(self, manifest: CartridgeManifest, tensors: Mapping[str, Tensor], directory: Path | None) -> None:
        """For `create` and `from_pretrained`; ``tensors`` by name in canonical order."""
        self.manifest = manifest
        self.directory = directory
        self._tensors = dict(tensors)

    @classmethod
    def create(
        cls,
        layers: Sequence[tuple[Tensor, Tensor]],
        model: ModelIdentity,
        *,
        cartridge_id: str,
        token_ids: Sequence[int] | None = None,
        num_frozen_tokens: int = 0,
        first_position: int = 0,
        training_steps: int = 0,
        source_document: str = "",
        source_format: str = "kvist",
        resource_kind: str = "cartridge",
        block_size: int = _BLOCK_SIZE,
        labels: Mapping[str, str] | None = None,
        provenance: Mapping[str, Any] | None = None,
        license: str = "",
        chat_template_hash: str | None = None,
    ) -> Self:
        """A cartridge of tensors in memory.

        Args:
            layers: keys, rotated to their positions, and values of each layer, each ``[tokens, kv_heads, head_dim]``.
                Not copied where they are contiguous and on the CPU; then they must stay as they are.
            model: whose they are.
            cartridge_id: a name by `kvist.ids.check_name`.
            token_ids: of the document, if this is the lossless prefill of exactly these; ``None``: trained or unknown.
            num_frozen_tokens: first tokens that training did not change.
            first_position: of its first token.
            training_steps: 0 for a prefill.
            source_document: where the text came from.
            source_format: what it was made from.
            resource_kind: ``cartridge``, ``reasoncache`` or ``kv_prefix``.
            block_size: for the aligned counts in its manifest; no token is dropped.
            labels: by which routers find it.
            provenance: how it was made; JSON.
            license: of its content.
            chat_template_hash: ``sha256:`` of the template that framed the text.

        Raises:
            InvalidCartridge: no layers, a wrong number of them, shapes or data types that are not the model's, or
                differ; values that are not finite; token ids that are not one a token, or of what was trained or is at
                other positions.
        """
        checked = _checked_layers(layers, model)
        tokens = checked[0][0].shape[0]
        if token_ids is not None:
            _check_ids(token_ids, tokens)
        tensors = named_tensors(checked, token_ids)
        name = not_finite(tensors)
        if name is not None:
            raise InvalidCartridge(f"{name} holds a NaN or an infinity")
        aligned = align_to_block_size(tokens, block_size)
        manifest = CartridgeManifest(
            cartridge_id=cartridge_id,
            model_id=model.model_id,
            model_revision=model.revision,
            num_layers=model.num_layers,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            dtype=model.dtype,
            rope=dict(model.rope),
            tokenizer_hash=model.tokenizer_hash,
            chat_template_hash=chat_template_hash,
            num_tokens_raw=tokens,
            num_tokens_aligned=aligned,
            block_size=block_size,
            num_blocks=aligned // block_size,
            has_frozen_prefix=num_frozen_tokens > 0,
            num_frozen_tokens=num_frozen_tokens,
            resource_kind=resource_kind,
            source_format=source_format,
            checksum=content_checksum(tensors),
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            training_steps=training_steps,
            source_document=source_document,
            labels=dict(labels or {}),
            first_position=first_position,
            layers=(LayerShape(num_kv_heads=model.num_kv_heads, head_dim=model.head_dim),) * model.num_layers,
            has_token_ids=token_ids is not None,
            provenance=dict(provenance or {}),
            license=license,
        )
        return cls(manifest, tensors, None)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        subfolder: str | None = None,
        verify: bool = True,
    ) -> Self:
        """Open a directory, or download a repository of the Hugging Face hub and open that.

        Args:
            pretrained_model_name_or_path: a directory, or ``"org/name"``.
            revision, cache_dir, token, local_files_only, force_download: as `huggingface_hub.snapshot_download` has
                them; only for a repository.
            subfolder: below it, where the cartridge is.
            verify: read every byte and compare all digests, and refuse numbers that are none. Without it, tensors are
                mapped and only headers are checked; `verify` can be called later.

        Raises:
            NotFound: no such directory, repository, revision or subfolder.
            InvalidCartridge, DamagedCartridge: it is no cartridge, or not the one that its manifest says.
            StoreError: the hub cannot be reached, or refuses.
        """
        directory = hub.resolve(
            pretrained_model_name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
            subfolder=subfolder,
        )
        opened = read_directory(directory, verify=verify)
        return cls(opened.manifest, opened.tensors, directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Cartridge({self.manifest.cartridge_id!r}, {self.num_tokens} tokens, {self.identity[:12]})"

    @property
    def num_tokens(self) -> int:
        """Tokens that it holds, each of which is used."""
        return self.manifest.num_tokens_raw

    @property
    def num_layers(self) -> int:
        """Layers that it holds."""
        return self.manifest.num_layers

    @property
    def nbytes(self) -> int:
        """Bytes of its keys and values."""
        return sum(tensor.nbytes for name, tensor in self._open_tensors().items() if name != TOKEN_IDS)

    @property
    def identity(self) -> str:
        """See `CartridgeManifest.identity`."""
        return self.manifest.identity

    @functools.cached_property
    def token_ids(self) -> tuple[int, ...] | None:
        """The document's token ids, where it is the lossless prefill of them; else ``None``.

        Raises:
            InvalidCartridge: numbers that are no token ids.
        """
        if not self.manifest.has_token_ids:
            return None
        return checked_ids(self.manifest, self._open_tensors()[TOKEN_IDS])

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, each ``[tokens, kv_heads, head_dim]``, contiguous, on the CPU.

        Those of an opened cartridge are views of the mapped file: not read before they are looked at, and not to be
        written to. They stay valid after `close`. The file must not change meanwhile: what is overwritten in it changes
        in them, and if it is cut short, looking ends the process (SIGBUS). To load a cartridge into a server, use
        `kvist.cartridge.reading.open_layers`.

        Raises:
            InvalidInput: no such layer.
        """
        if not 0 <= index < self.num_layers:
            raise InvalidInput(f"expected a layer in [0, {self.num_layers}), got {index}")
        tensors = self._open_tensors()
        return tensors[keys_name(index)], tensors[values_name(index)]

    def verify(self) -> None:
        """Read every byte again: of its files, if it has any, as they are now.

        Raises:
            DamagedCartridge: a digest differs, a file is gone, or a number is none.
            InvalidCartridge: files that do not hold what the manifest says.
        """
        if self.directory is None:
            verify_content(self.manifest, self._open_tensors())
            return
        there = read_directory(self.directory, verify=True).manifest
        if there.identity != self.identity:
            raise InvalidCartridge(f"{self.directory} holds another cartridge now: {there.cartridge_id!r}")

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        max_shard_size: int | str = _MAX_SHARD,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **push: Any,
    ) -> Path:
        """Write it as a directory: whole, or not at all.

        Where the same cartridge is there already, it is read, and only its manifest is written anew. A cartridge made
        in memory takes `directory` and the files in its `manifest` from the first time that it is saved.

        Args:
            save_directory: not there, empty, or this cartridge's.
            max_shard_size: bytes of data a file, or like ``"5GB"``.
            push_to_hub: then upload it, see `push_to_hub`.
            repo_id: default the directory's name.
            push: for `push_to_hub`.

        Returns:
            The directory.

        Raises:
            AlreadyExists: something else is there.
            DamagedCartridge: its tensors were written to since it was made; or this cartridge is there already, and
                that copy is damaged.
            InvalidInput: it is the working directory.
            StoreError: the disk, or the hub, refused.
        """
        target = Path(save_directory)
        tensors = self._open_tensors()
        verify_content(self.manifest, tensors)
        written = write_directory(target, self.manifest, tensors, parse_size(max_shard_size))
        if self.directory is None:
            self.manifest, self.directory = written, target
        if push_to_hub:
            _upload(target, repo_id or target.resolve().name, **push)
        return target

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload it to a repository of the Hugging Face hub, in one commit; the repository is made if it is not there.

        Args:
            repo_id: ``"org/name"``, or a name of the token's owner.
            commit_message, private, token, revision, create_pr: as `huggingface_hub` has them.

        Returns:
            The commit's address.

        Raises:
            DamagedCartridge: its files are not those that its manifest names; nothing is uploaded.
            StoreError: the hub cannot be reached, or refuses.
        """
        push: dict[str, Any] = {"commit_message": commit_message, "private": private, "token": token}
        push |= {"revision": revision, "create_pr": create_pr}
        if self.directory is not None:
            return _upload(self.directory, repo_id, **push)
        with tempfile.TemporaryDirectory(prefix="kvist-") as scratch:
            target = Path(scratch) / "cartridge"
            write_directory(target, self.manifest, self._open_tensors(), parse_size(_MAX_SHARD))
            return _upload(target, repo_id, **push)

    def with_metadata(
        self,
        *,
        cartridge_id: str | None = None,
        labels: Mapping[str, str] | None = None,
        provenance: Mapping[str, Any] | None = None,
        license: str | None = None,
        source_document: str | None = None,
    ) -> Self:
        """The same content with something else said of it; what is ``None`` stays.

        To change what a directory says, save the result there: the identity is the same, so only the manifest is
        written.

        Returns:
            A cartridge in memory that shares the tensors, which stay open while one of the two is.
        """
        said = {"cartridge_id": cartridge_id, "labels": labels, "provenance": provenance}
        said |= {"license": license, "source_document": source_document}
        changes: dict[str, Any] = {name: value for name, value in said.items() if value is not None}
        manifest = dataclasses.replace(self.manifest, **changes, files=(), file_size_bytes=0)
        return type(self)(manifest, self._open_tensors(), None)

    def _open_tensors(self) -> dict[str, Tensor]:
        if not self._tensors:
            raise InvalidInput(f"cartridge {self.manifest.cartridge_id!r} is closed")
        return self._tensors

    def close(self) -> None:
        """Let go of its tensors; maps stay while a view of them does."""
        self._tensors = {}


def _upload(directory: Path, repo_id: str, **push: Any) -> str:
    read_directory(directory, verify=True)
    return hub.upload(directory, repo_id, **push)


def _checked_layers(layers: Sequence[tuple[Tensor, Tensor]], model: ModelIdentity) -> list[tuple[Tensor, Tensor]]:
    """The layers, contiguous on the CPU."""
    if len(layers) != model.num_layers:
        raise InvalidCartridge(f"expected {model.num_layers} layers, as the model has, got {len(layers)}")
    tokens: int | None = None
    checked: list[tuple[Tensor, Tensor]] = []
    for number, pair in enumerate(layers):
        if len(pair) != 2 or not all(isinstance(tensor, Tensor) for tensor in pair):
            raise InvalidCartridge(f"layer {number}: expected a tensor of keys and one of values, got {pair!r:.80}")
        if tokens is None and pair[0].dim():
            tokens = pair[0].shape[0]
        for name, tensor in zip((keys_name(number), values_name(number)), pair, strict=True):
            _check_tensor(name, tensor, tokens, model)
        keys, values = (tensor.detach().cpu().contiguous() for tensor in pair)
        checked.append((keys, values))
    return checked


def _check_tensor(name: str, tensor: Tensor, tokens: int | None, model: ModelIdentity) -> None:
    expected = (tokens, model.num_kv_heads, model.head_dim)
    if not tokens or tuple(tensor.shape) != expected:
        raise InvalidCartridge(f"{name}: expected [tokens, heads, head_dim] {list(expected)}, got {list(tensor.shape)}")
    if str(tensor.dtype) != f"torch.{model.dtype}":
        raise InvalidCartridge(f"{name}: expected {model.dtype}, as the model has, got {tensor.dtype}")


def _check_ids(token_ids: Sequence[int], tokens: int) -> None:
    if len(token_ids) != tokens:
        raise InvalidCartridge(f"expected one token id for each of {tokens} tokens, got {len(token_ids)}")
    for token in token_ids:
        if type(token) is not int or not 0 <= token < 2**32:
            raise InvalidCartridge(f"token ids must be integers in [0, 2^32), got {token!r:.80}")
