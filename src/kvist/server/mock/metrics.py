"""One engine's metrics under the names, labels and buckets of vLLM 0.32. Times are the wall's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kvist.engines.mock import MockEngine, Ticket

_LATENCY: Final = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
_FIRST: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip
_BETWEEN: Final = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_PASS: Final = tuple(2.0**power for power in (0, *range(3, 15)))
_PREEMPTIONS: Final = (1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0)
_REASONS: Final = ("stop", "length", "abort", "error", "repetition")
_SOURCES: Final = ("local_compute", "local_cache_hit", "external_kv_transfer")

_GAUGES: Final = {
    "num_requests_running": "Number of requests in model execution batches.",
    "num_requests_waiting": "Number of requests waiting to be processed.",
    "kv_cache_usage_perc": "KV-cache usage. 1 means 100 percent usage.",
}
_COUNTERS: Final = {
    "prefix_cache_queries": "Prefix cache queries, in terms of number of queried tokens.",
    "prefix_cache_hits": "Prefix cache hits, in terms of number of cached tokens.",
    "num_preemptions": "Cumulative number of preemption from the engine.",
    "prompt_tokens": "Number of prefill tokens processed.",
    "prompt_tokens_cached": "Number of cached prompt tokens (local + external).",
    "generation_tokens": "Number of generation tokens processed.",
}
_TIMES: Final[dict[str, tuple[str, Sequence[float]]]] = {
    "time_to_first_token_seconds": ("Histogram of time to first token in seconds.", _FIRST),
    "inter_token_latency_seconds": ("Histogram of inter-token latency in seconds.", _BETWEEN),
    "request_time_per_output_token_seconds": ("Histogram of time_per_output_token_seconds per request.", _BETWEEN),
    "e2e_request_latency_seconds": ("Histogram of e2e request latency in seconds.", _LATENCY),
    "request_queue_time_seconds": ("Histogram of time spent in WAITING phase for request.", _LATENCY),
    "request_inference_time_seconds": ("Histogram of time spent in RUNNING phase for request.", _LATENCY),
    "request_prefill_time_seconds": ("Histogram of time spent in PREFILL phase for request.", _LATENCY),
    "request_decode_time_seconds": ("Histogram of time spent in DECODE phase for request.", _LATENCY),
}


class Metrics:
    """Observes one engine; see `kvist.engines.mock.Observer`. Bind it to the engine before the first scrape."""

    def __init__(self, model: str, *, engine_index: int = 0) -> None:
        """
        Args:
            model: what clients call it.
            engine_index: the label ``engine``; vLLM counts the engines of one server.
        """
        self._registry = CollectorRegistry()
        self._labels = {"model_name": model, "engine": str(engine_index)}
        names = tuple(self._labels)
        registry = self._registry
        self._gauges = {
            name: Gauge(f"vllm:{name}", text, names, registry=registry).labels(**self._labels)
            for name, text in _GAUGES.items()
        }
        self._counters = {
            name: Counter(f"vllm:{name}", text, names, registry=registry).labels(**self._labels)
            for name, text in _COUNTERS.items()
        }
        self._times = {
            name: Histogram(f"vllm:{name}", text, names, registry=registry, buckets=buckets).labels(**self._labels)
            for name, (text, buckets) in _TIMES.items()
        }
        by_reason = Counter(
            "vllm:request_success", "Count of successfully processed requests.", (*names, "finished_reason"),
            registry=registry,
        )  # fmt: skip
        self._ended = {reason: by_reason.labels(**self._labels, finished_reason=reason) for reason in _REASONS}
        by_source = Counter(
            "vllm:prompt_tokens_by_source", "Number of prompt tokens by source.", (*names, "source"), registry=registry
        )
        self._sources = {source: by_source.labels(**self._labels, source=source) for source in _SOURCES}
        self._sizes: dict[str, Histogram] = {}
        self._engine: MockEngine | None = None
        self._preemptions = 0

    def bind(self, engine: MockEngine) -> None:
        """Say whose metrics these are."""
        self._engine = engine
        config, names, registry = engine.config, tuple(self._labels), self._registry
        sizes = {
            "iteration_tokens_total": ("Histogram of number of tokens per engine_step.", _PASS),
            "request_prompt_tokens": ("Number of prefill tokens processed.", _one_two_five(engine.max_model_len)),
            "request_generation_tokens": (
                "Number of generation tokens processed.", _one_two_five(engine.max_model_len)
            ),
            "request_prefill_kv_computed_tokens": (
                "Histogram of new KV tokens computed during prefill (excluding cached tokens).",
                _one_two_five(engine.max_model_len),
            ),
            "request_num_preemptions": ("Histogram of the number of times a request was preempted.", _PREEMPTIONS),
        }  # fmt: skip
        self._sizes = {
            name: Histogram(f"vllm:{name}", text, names, registry=registry, buckets=buckets).labels(**self._labels)
            for name, (text, buckets) in sizes.items()
        }
        about = {
            "engine": self._labels["engine"],
            "block_size": config.block_size,
            "num_gpu_blocks": config.num_blocks,
            "kv_cache_size_tokens": config.capacity_tokens,
            "enable_prefix_caching": config.prefix_caching,
            "prefix_caching_hash_algo": "sha256",
            "cache_dtype": "auto",
        }
        told = {name: str(value) for name, value in about.items()}
        info = Gauge(
            "vllm:cache_config_info", "Information of the LLMEngine CacheConfig", tuple(told), registry=registry
        )
        info.labels(**told).set(1)

    def on_token(self, ticket: Ticket, seconds: float) -> None:
        """Count a token."""
        self._counters["generation_tokens"].inc()
        if ticket.generated > 1:
            self._times["inter_token_latency_seconds"].observe(seconds)
            return
        prompt, cached = ticket.answer.prompt_tokens, ticket.cached_tokens
        self._times["time_to_first_token_seconds"].observe(seconds)
        for name in ("prompt_tokens", "prefix_cache_queries"):
            self._counters[name].inc(prompt)
        for name in ("prompt_tokens_cached", "prefix_cache_hits"):
            self._counters[name].inc(cached)
        self._sources["local_compute"].inc(prompt - cached)
        self._sources["local_cache_hit"].inc(cached)

    def on_pass(self, tokens: int) -> None:
        """Count a pass."""
        self._sizes["iteration_tokens_total"].observe(tokens)

    def on_end(self, ticket: Ticket) -> None:
        """Count a request."""
        reason = "error" if ticket.error is not None else ticket.answer.finish_reason if ticket.is_done else "abort"
        self._ended[reason].inc()
        if not ticket.generated:
            return
        end = (ticket.last - ticket.came) / 1e9
        queued = ticket.queued / 1e9
        decode = (ticket.last - ticket.first) / 1e9
        times = {
            "e2e_request_latency_seconds": end,
            "request_queue_time_seconds": queued,
            "request_inference_time_seconds": max(0.0, end - queued),
            "request_prefill_time_seconds": max(0.0, end - queued - decode),
            "request_decode_time_seconds": decode,
            "request_time_per_output_token_seconds": decode / max(1, ticket.generated - 1),
        }
        for name, seconds in times.items():
            self._times[name].observe(seconds)
        sizes = {
            "request_prompt_tokens": ticket.answer.prompt_tokens,
            "request_generation_tokens": ticket.generated,
            "request_prefill_kv_computed_tokens": ticket.answer.prompt_tokens - ticket.cached_tokens,
            "request_num_preemptions": max(0, ticket.admissions - 1),
        }
        for name, count in sizes.items():
            self._sizes[name].observe(count)

    def text(self) -> bytes:
        """All metrics in Prometheus' text form."""
        engine = self._engine
        if engine is not None:
            self._gauges["num_requests_running"].set(engine.num_running)
            self._gauges["num_requests_waiting"].set(engine.num_waiting)
            self._gauges["kv_cache_usage_perc"].set(engine.usage)
            self._counters["num_preemptions"].inc(engine.preemptions - self._preemptions)
            self._preemptions = engine.preemptions
        return generate_latest(self._registry)


def _one_two_five(most: int) -> list[float]:
    """1, 2, 5, 10, ... up to ``most``."""
    return [base * 10.0**power for power in range(len(str(most))) for base in (1, 2, 5) if base * 10**power <= most]
