"""vLLM's engine client as kvist's calls go through it. Knows what it can do (0.28 to 0.32); must not know the calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from kvist.engines.vllm import names
from kvist.errors import EngineError, InvalidInput
from kvist.server.errors import NoConnector

_CALL: Final = "kvist"
_CONFIG: Final = (
    '--kv-transfer-config \'{"kv_connector": "KvistConnector", "kv_connector_module_path": '
    '"kvist.engines.vllm.connector", "kv_role": "kv_both", "kv_connector_extra_config": '
    '{"store": "file:///srv/kv"}}\''
)


class EngineClient(Protocol):
    """What of vLLM's engine client is used here."""

    @property
    def vllm_config(self) -> Any:
        """vLLM's configuration."""

    async def collective_rpc(self, method: str, timeout: float | None = None, args: tuple[Any, ...] = ()) -> list[Any]:
        """Call ``method``; the answers of all who were called."""

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        """Return when nothing is computed any more; ``mode="keep"``: requests stay as they are."""

    async def resume_generation(self) -> None:
        """Undo it."""

    async def is_paused(self) -> bool:
        """Whether it is paused."""


@dataclass(frozen=True, slots=True)
class VllmEngine:
    """A `kvist.server.live.client.Engine`.

    Attributes:
        client: vLLM's engine client.
    """

    client: EngineClient

    @property
    def name(self) -> str:
        """What people call it."""
        return "vLLM"

    @property
    def store(self) -> str:
        """The url of the store that our connector was given.

        Raises:
            NoConnector: it was given none, or is not there.
        """
        transfer = getattr(self.client.vllm_config, "kv_transfer_config", None)
        store = self.option("store")
        if store is None:
            raise NoConnector(
                f"expected an engine with the connector KvistConnector and its store, got "
                f"{getattr(transfer, 'kv_connector', None) or 'no connector'}",
                hint=f"start vLLM with VLLM_PLUGINS=kvist and {_CONFIG}",
            )
        return store

    def option(self, name: str) -> str | None:
        """What our connector's ``kv_connector_extra_config`` says of an option that is text.

        Raises:
            InvalidInput: something else, which must not count as nothing.
        """
        transfer = getattr(self.client.vllm_config, "kv_transfer_config", None)
        found = _options(getattr(transfer, "kv_connector", None), transfer).get(name)
        if found is not None and (not isinstance(found, str) or not found):
            raise InvalidInput(f"kv_connector_extra_config: {name} is text, got {found!r:.80}")
        return found

    def request_of(self, sequence: str) -> str:
        """See `names.request_of`."""
        return names.request_of(sequence)

    async def call(self, op: str, payload: Mapping[str, Any]) -> Mapping[str, Any]:
        """The engine core's answer to one call.

        Raises:
            NoConnector: it does not know kvist's calls.
            EngineError: it did not answer.
        """
        try:
            answers: Sequence[Any] = await self.client.collective_rpc(_CALL, args=(op, dict(payload)))
        except Exception as error:  # of vLLM's own classes, or a bare Exception with the text of one elsewhere
            if op == "describe" and not getattr(self.client, "errored", False):
                raise NoConnector(
                    f"the engine core does not answer kvist's calls: {error}",
                    hint="VLLM_PLUGINS must name kvist where vLLM is started",
                ) from error
            raise EngineError(f"the engine did not answer {op}: {error or type(error).__name__}") from error
        if len(answers) != 1 or not isinstance(answers[0], dict):
            raise EngineError(f"expected one answer to {op}, got {answers!r:.200}")
        return answers[0]

    async def pause(self) -> None:
        """Let requests stay as they are."""
        await self.client.pause_generation(mode="keep", clear_cache=False)

    async def resume(self) -> None:
        """Undo it."""
        await self.client.resume_generation()

    async def is_paused(self) -> bool:
        """Whether generation is paused, by whomever."""
        return await self.client.is_paused()


def _options(connector: str | None, transfer: Any) -> Mapping[str, Any]:
    """The options of our connector, which may be one of several under vLLM's ``MultiConnector``; none, without it."""
    extra = getattr(transfer, "kv_connector_extra_config", None) or {}
    if connector == "KvistConnector":
        return extra if isinstance(extra, Mapping) else {}
    for child in extra.get("connectors", ()):
        if isinstance(child, Mapping) and child.get("kv_connector") == "KvistConnector":
            return child.get("kv_connector_extra_config") or {}
    return {}
