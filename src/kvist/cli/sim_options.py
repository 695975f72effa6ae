"""The options that say what a trace is replayed on: one list for `kvist sim run`, `kvist sim sweep` and `kvist plan`.

Their defaults are those of the configs, which also check the values: an error names the field.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, get_args

import click

from kvist.blocks.policy import POLICIES
from kvist.errors import InvalidInput
from kvist.sim.config import (
    ENGINE_POLICY,
    GBPS,
    ClusterConfig,
    EngineConfig,
    HostOffload,
    Preemption,
    Routing,
    Scheduling,
)
from kvist.sim.report import Sla
from kvist.sim.sweep import Setup, grid
from kvist.sim.timing import Fixed, Polynomial, Timing, load_timing
from kvist.sim.trace import MAX_MS, MAX_TOKENS
from kvist.tiers.config import Mode, TierConfig, TiersConfig

_DEFAULTS: Final = {each.name: each.default for config in (EngineConfig, ClusterConfig) for each in fields(config)}


Command = Callable[..., Any]
Callback = Callable[[click.Context, click.Parameter, Any], Any]


def several(one: click.ParamType[Any]) -> Callback:
    """The callback of an option that takes values of a type with commas between; it gives a tuple."""

    def split(context: click.Context, param: click.Parameter, value: str) -> tuple[Any, ...]:
        return tuple(one.convert(word, param, context) for word in value.split(","))

    return split


def _timing(context: click.Context, param: click.Parameter, value: str) -> Timing:
    """Read ``polynomial``, ``fixed:P,D`` or a file."""
    if value == "polynomial":
        return Polynomial()
    try:
        if not value.startswith("fixed:"):
            return load_timing(Path(value))
        return Fixed(*_two_numbers(value.removeprefix("fixed:")))
    except ValueError:
        raise click.BadParameter(f"expected fixed:P,D, two numbers of ms; got {value!r}", context, param) from None
    except InvalidInput as error:
        raise click.BadParameter(f"expected polynomial, fixed:P,D or a file; {error}", context, param) from None


def _two_numbers(words: str) -> tuple[float, float]:
    first, second = words.split(",")
    return float(first), float(second)


@dataclass(frozen=True, slots=True)
class _Option:
    flag: str
    type: click.ParamType[Any]
    help: str
    default: Any = None
    callback: Callback | None = None

    @property
    def name(self) -> str:
        return self.flag.removeprefix("--").replace("-", "_")

    @property
    def flags(self) -> str:
        return f"{self.flag}/--no-{self.flag[2:]}" if self.type is click.BOOL else self.flag

    def decorate(self, command: Command, default: Any, *, is_axis: bool) -> Command:
        shown = default is not None
        if not is_axis:
            kind: dict[str, Any] = {"type": self.type, "default": default, "callback": self.callback}
        else:
            one = f"[{'|'.join(self.type.choices)}]" if isinstance(self.type, click.Choice) else self.type.name.upper()
            kind = {"type": str, "default": str(default), "callback": several(self.type), "metavar": f"{one},..."}
        return click.option(self.flags, show_default=shown, help=self.help, **kind)(command)


def _of_config(flag: str, type_: click.ParamType[Any], help_: str) -> _Option:
    return _Option(flag, type_, help_, _DEFAULTS[flag.removeprefix("--").replace("-", "_")])


_BLOCKS: Final = click.IntRange(0, MAX_TOKENS)
_OPTIONS: Final = (
    _of_config("--workers", click.INT, "Engines; with prefill workers, those that decode."),
    _of_config("--dp-size", click.INT, "Data-parallel ranks of an engine, each with a pool."),
    _of_config("--router", click.Choice(get_args(Routing)), "Who serves a request."),
    _of_config("--event-lag-ms", click.FLOAT, "After which the router knows what a pool stored."),
    _of_config("--prefill-workers", click.INT, "Engines that only prefill, and hand over."),
    _of_config("--transfer-gbps", click.FLOAT, "From those to the others, 1e9 bytes/s."),
    _of_config("--num-blocks", click.INT, "Slots of an engine's pool."),
    _of_config("--block-size", click.INT, "Tokens a block."),
    _of_config("--policy", click.Choice((ENGINE_POLICY, *POLICIES)), "Order of eviction; vllm: the engine's own."),
    _of_config("--scheduling", click.Choice(get_args(Scheduling)), "Whose rules passes follow."),
    _of_config("--preemption", click.Choice(get_args(Preemption)), "Who gives way: the last admitted, or the first."),
    _of_config("--max-num-seqs", click.INT, "Sequences that run at once."),
    _of_config("--max-num-batched-tokens", click.INT, "Tokens of one pass."),
    _of_config("--max-model-len", click.INT, "Tokens of prompt and answer.  [default: no limit]"),
    _of_config("--reject-oversized", click.BOOL, "Reject requests that can never fit; else the trace is refused."),
    _of_config("--prefix-caching", click.BOOL, "Whether blocks are found again."),
    _of_config("--chunked-prefill", click.BOOL, "Whether prompts may be split over passes."),
    _Option(
        "--timing", click.STRING, "How long passes take: polynomial, fixed:P,D (ms) or a FILE.", "polynomial", _timing
    ),
    _of_config("--speedup", click.FLOAT, "All passes are so much faster."),
    _of_config("--decode-speedup", click.FLOAT, "Decode passes are faster by this, too."),
    _of_config("--startup-ms", click.FLOAT, "From the start to the first pass."),
    _of_config("--kv-bytes-per-token", click.INT, "Of all layers; needed with host memory."),
    _Option("--host-blocks", _BLOCKS, "Slots of host memory below each pool.", 0),
    _Option("--host-gbps", click.FLOAT, "To host memory and back, 1e9 bytes/s.", TierConfig().down_gb_per_s),
    _Option("--disk-blocks", _BLOCKS, "Slots of disk below host memory.", 0),
    _Option("--disk-gbps", click.FLOAT, "To disk and back, 1e9 bytes/s.", 7.0),
    _Option("--disk-latency-ms", click.FLOAT, "Before a transfer's first byte.", 0.0),
    _Option("--tier-policy", click.Choice(tuple(POLICIES)), "Order of eviction below the pool.", TierConfig().policy),
    _Option("--tier-mode", click.Choice(get_args(Mode)), "When blocks go down: early, or at eviction.", "watermark"),
    _Option("--native-host-blocks", _BLOCKS, "Host memory in the manner of Dynamo's mocker.", 0),
    _of_config(
        "--concurrency", click.INT, "Requests under way at once, whenever they come.  [default: as the trace says]"
    ),
    _of_config("--arrival-speedup", click.FLOAT, "Requests come so much faster."),
    _of_config("--seed", click.INT, "Of all that is drawn."),
)


def with_settings(
    *axes: str, without: tuple[str, ...] = (), defaults: Mapping[str, Any] | None = None
) -> Callable[[Command], Command]:
    """Give a command the options of a setup; it gets them as one argument, ``settings``.

    Args:
        axes: names of those that take several values with commas between.
        without: names of those that the command sets itself.
        defaults: those that are not the configs'.
    """

    def decorate(command: Command) -> Command:
        options = [option for option in _OPTIONS if option.name not in without]

        @functools.wraps(command)
        def taking(*args: Any, **words: Any) -> Any:
            settings = {option.name: words.pop(option.name) for option in options}
            return command(*args, settings=settings, **words)

        decorated: Command = taking
        for option in reversed(options):
            default = (defaults or {}).get(option.name, option.default)
            decorated = option.decorate(decorated, default, is_axis=option.name in axes)
        return decorated

    return decorate


def setup_of(settings: Mapping[str, Any]) -> Setup:
    """The setup that one value of each option makes.

    Raises:
        InvalidInput: a value that can not be right; the field is named.
    """
    engine = {each.name: settings[each.name] for each in fields(EngineConfig) if each.name in settings}
    cluster = {each.name: settings[each.name] for each in fields(ClusterConfig) if each.name in settings}
    if settings["host_blocks"] or settings["disk_blocks"]:
        engine["tiers"] = _tiers(settings)
    if settings["native_host_blocks"]:
        engine["host_offload"] = HostOffload(num_blocks=settings["native_host_blocks"])
    return Setup(engine=EngineConfig(**engine), cluster=ClusterConfig(**cluster))


def setups_of(settings: Mapping[str, Any], axes: tuple[str, ...]) -> list[Setup]:
    """A setup for each combination of the values of the axes, the last axis fastest.

    Disks below no host memory are left out.

    Raises:
        InvalidInput: as of `setup_of`.
    """
    points = [{**settings, **point} for point in grid({axis: settings[axis] for axis in axes})]
    kept = [point for point in points if point["host_blocks"] or not point["disk_blocks"]]
    return [setup_of(point) for point in kept or points]


def _tiers(settings: Mapping[str, Any]) -> TiersConfig:
    policy, disk, speed = settings["tier_policy"], settings["disk_blocks"], settings["disk_gbps"]
    if not settings["host_blocks"]:
        raise InvalidInput(f"disk_blocks is below host memory: host_blocks must be 1 or more, too; got {disk} and 0")
    for name in ("host_gbps", "disk_gbps"):
        if not GBPS[0] <= settings[name] <= GBPS[1]:
            raise InvalidInput(f"{name} must be a number, {GBPS[0]:g} to {GBPS[1]:g}; got {settings[name]!r}")
    if not 0 <= (latency := settings["disk_latency_ms"]) <= MAX_MS:
        raise InvalidInput(f"disk_latency_ms must be a number, 0 to {MAX_MS:g}; got {latency!r}")
    return TiersConfig(
        block_bytes=settings["kv_bytes_per_token"] * settings["block_size"],
        host=TierConfig(
            capacity=settings["host_blocks"],
            down_gb_per_s=settings["host_gbps"],
            up_gb_per_s=settings["host_gbps"],
            policy=policy,
        ),
        disk=TierConfig(
            capacity=disk,
            down_gb_per_s=speed,
            up_gb_per_s=speed,
            latency_ms=settings["disk_latency_ms"],
            policy=policy,
        )
        if disk
        else None,
        mode=settings["tier_mode"],
    )


def with_sla(command: Command) -> Command:
    """Give a command the options of an SLA; it gets it as ``sla``: `None` if none is set."""

    @functools.wraps(command)
    def taking(
        *args: Any, sla_ttft_ms: float | None, sla_itl_ms: float | None, sla_e2e_ms: float | None, **words: Any
    ) -> Any:
        sla = Sla(ttft_ms=sla_ttft_ms, itl_ms=sla_itl_ms, e2e_ms=sla_e2e_ms)
        return command(*args, sla=sla if sla.limits else None, **words)

    taking = click.option("--sla-e2e-ms", type=click.FLOAT, help="Most from arrival to the last token.")(taking)
    taking = click.option("--sla-itl-ms", type=click.FLOAT, help="Most between a request's tokens, on the mean.")(
        taking
    )
    return click.option("--sla-ttft-ms", type=click.FLOAT, help="Most from arrival to the first token.")(taking)


TRACE: Final = click.argument("trace", type=click.Path(path_type=Path))
TRACE_BLOCK_SIZE: Final = click.option(
    "--trace-block-size",
    type=click.IntRange(1, MAX_TOKENS),
    help="Tokens of one block of the trace.  [default: as the file says, else 512]",
)
LIMIT: Final = click.option(
    "--limit", type=click.IntRange(1), help="Read so many requests of the trace, and no further."
)


def output_option(
    flag: str, help_: str, *, name: str = "", short: str = "", is_required: bool = False
) -> Callable[[Command], Command]:
    """An option for a file to write, whose directory is there before anything is run."""
    path = click.Path(dir_okay=False, writable=True, path_type=Path)
    names = [each for each in (short, flag, name) if each]
    return click.option(
        *names, type=path, callback=_place, metavar="FILE", help=help_, required=is_required, show_default=False
    )


def require_apart(read: Path, **written: Path | None) -> None:
    """Refuse to write a file over the one that is read, or two over each other; devices take it.

    Raises:
        InvalidInput: the options are named.
    """
    taken = {read.resolve(): "the file that is read"}
    for name, path in written.items():
        if path is None or (path.exists() and not path.is_file()):
            continue
        own = f"that of {name}"
        other = taken.setdefault(path.resolve(), own)
        if other != own:
            raise InvalidInput(f"{name} must be a file of its own, not {other}; got {str(path)!r}")


def _place(context: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    if value is not None and not value.absolute().parent.is_dir():
        raise click.BadParameter(f"there is no directory {value.absolute().parent}", context, param)
    return value
