"""``kvist mock serve``: engines without a GPU behind vLLM's API, with real events."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from kvist.cli.invocation import Invocation, common
from kvist.cli.listening import Listening, listening_options
from kvist.cli.logs import Logs, log_options
from kvist.cli.output import Table
from kvist.cli.sim_options import with_settings
from kvist.errors import InvalidInput

_UNUSED = (
    "dp_size", "router", "event_lag_ms", "prefill_workers", "transfer_gbps", "kv_bytes_per_token", "host_blocks",
    "host_gbps", "disk_blocks", "disk_gbps", "disk_latency_ms", "tier_policy", "tier_mode", "native_host_blocks",
    "concurrency", "arrival_speedup", "workers",
)  # fmt: skip
_PORT = click.IntRange(0, 65535)


@click.group(short_help="Run an engine without a GPU, for tests of routers and clients.")
def mock() -> None:
    """Run engines that compute nothing, for tests of routers, gateways and clients."""


@mock.command(short_help="Serve vLLM's API over engines that compute nothing.")
@listening_options(port=8000, port_help="Of the first worker; 0: free ones.")
@click.option("--kv-events-port", default=0, show_default=True, type=_PORT, help="Of its events.")
@click.option("--kv-replay-port", default=0, show_default=True, type=_PORT, help="Of their replay.")
@click.option("--served-model-name", default="mock", show_default=True, help="What clients call the model.")
@click.option(
    "--tokenizer",
    type=click.Path(exists=True, path_type=Path),
    help="A tokenizer.json, or its directory.  [default: a token for each byte]",
)
@click.option(
    "--mean-output-tokens", default=256.0, show_default=True, type=click.FloatRange(0),
    help="Of answers that end by themselves; 0: none does.",
)  # fmt: skip
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1), help="Engines, each at its ports.")
@with_settings(without=_UNUSED)
@log_options
@common
def serve(
    run: Invocation,
    listening: Listening,
    kv_events_port: int,
    kv_replay_port: int,
    served_model_name: str,
    tokenizer: Path | None,
    mean_output_tokens: float,
    workers: int,
    settings: dict[str, Any],
    logs: Logs,
) -> None:
    """Serve vLLM's OpenAI-compatible API over engines that schedule, cache and evict, and compute nothing.

    With --workers N the workers listen at N ports in a row. When all are ready, prints one line for each (with --json
    one document, with --quiet the urls alone). SIGTERM or Ctrl-C ends it.
    """
    from kvist.server.mock import Cluster, Ports, letter_tokenizer
    from kvist.server.mock.letters import sayable
    from kvist.server.mock.speech import Voice
    from kvist.server.tokenizer import Tokenizer
    from kvist.sim.config import EngineConfig
    from kvist.sim.trace import MAX_TOKENS

    logs.start()
    words = letter_tokenizer()
    if tokenizer is not None:
        found = Tokenizer.load(tokenizer if tokenizer.is_dir() else tokenizer.parent)
        if found is None:
            raise InvalidInput(f"expected a tokenizer.json or a directory with one, got {str(tokenizer)!r}")
        words = found
    if not (mean_output_tokens == 0 or 1 <= mean_output_tokens <= MAX_TOKENS):
        raise InvalidInput(f"mean_output_tokens must be 0, or a number, 1 to {MAX_TOKENS}; got {mean_output_tokens}")
    if not served_model_name:
        raise InvalidInput("served_model_name must be a name; got ''")
    if not 0 <= settings["seed"] < 2**63:
        raise InvalidInput(f"seed must be a whole number, 0 to {2**63 - 1}; got {settings['seed']}")
    config = EngineConfig(**{each.name: settings[each.name] for each in fields(EngineConfig) if each.name in settings})
    voice = Voice(
        name=served_model_name,
        tokenizer=words,
        vocabulary=sayable(words),
        seed=settings["seed"],
        mean_tokens=mean_output_tokens or None,
    )
    ports = Ports(host=listening.host, http=listening.port, events=kv_events_port, replay=kv_replay_port)
    with Cluster(config, voice, workers=workers, ports=ports, access=listening.access) as cluster:

        def ready() -> None:
            told = [worker.about() for worker in cluster.workers]
            rows = [(number, *each.values()) for number, each in enumerate(told)]
            run.out.result(
                {"model": served_model_name, "block_size": config.block_size, "workers": told},
                ids=[each["url"] for each in told],
                text=[Table(("worker", "url", "kv events", "replay"), rows)],
            )

        cluster.serve(log_level=logs.level, ready=ready)
