"""The hooks on vLLM's own classes, one by one and without an engine: what each of them does to a request."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvist.cartridge.model import ModelIdentity
from kvist.testing.models import make_tokenizer

torch = pytest.importorskip("torch")

DOCUMENT = list(range(10, 43))
"""33 tokens."""
LONGEST = 256
KEY = "kvist_cartridge"

_SCRIPT = """
from types import SimpleNamespace
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.renderers import renderer_from_config
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.metrics.stats import PrefillStats
import kvist.engines.vllm.plugin as plugin
from kvist.engines.vllm import arriving, bodies, intake

model, cartridges, document, multi = arguments
plugin.register(); plugin.register()

def engine(config):
    config = EngineArgs(model, max_model_len=256, kv_transfer_config=config, dtype="float32").create_engine_config()
    llm = object.__new__(AsyncLLM)
    llm.vllm_config = config
    llm.input_processor = InputProcessor(config, renderer_from_config(config))
    llm.shutdown = lambda *a: None
    return llm

def connector(extra):
    return {"kv_connector": "CartridgeConnector", "kv_connector_module_path": "kvist.engines.vllm.cartridges",
            "kv_role": "kv_both", "kv_connector_extra_config": extra}

extra = {"cartridges": cartridges, "router": {"type": "explicit"}}
if multi:
    llm = engine({"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": {"connectors": [
        {"kv_connector": "ExampleConnector", "kv_role": "kv_both",
         "kv_connector_extra_config": {"shared_storage_path": "/tmp/none"}}, connector(extra)]}})
else:
    llm = engine(connector(extra))
plain = engine(None)

def token(ids, **more):
    return {"type": "token", "prompt_token_ids": list(ids), **more}

def params(name=None, **fields):
    transfer = {"cartridge_id": name} if name else None
    return SamplingParams(**{"max_tokens": 5, **fields}, extra_args={"kv_transfer_params": transfer} if name else None)

def processed(prompt, sampling, engine=llm):
    return engine.input_processor.process_inputs("r", prompt, sampling, ("generate",))

def refused(call):
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None

def shown(request):
    sampling = request.sampling_params
    return {"ids": list(request.prompt_token_ids), "salt": request.cache_salt, "extra": sampling.extra_args,
            "max_tokens": sampling.max_tokens}

out = {}
# The API process.
own = params("text")
out["placed"] = shown(processed(token([1, 2, 3]), own))
out["untouched"] = own.extra_args
out["plain"] = shown(processed(token([1, 2, 3]), params()))
out["none"] = shown(processed(token([1, 2, 3]), params("text"), plain))
out["salted"] = shown(processed(token([1, 2, 3], cache_salt="tenant"), params("text")))
out["repeats"] = shown(processed(token([*document, 5]), params("text")))

def generate(prompt, sampling):
    return llm.generate(prompt, sampling, "r")

# Raised by the call itself, before anybody iterates.
out["unknown"] = refused(lambda: generate(token([1]), params("nobody")))
out["too_long"] = refused(lambda: generate(token([1] * 240), params("text")))
out["logprobs"] = refused(lambda: generate(token([1]), params("text", prompt_logprobs=1)))
out["embeds"] = refused(lambda: generate({"type": "embeds", "prompt_embeds": None}, params("text")))
forged = SamplingParams(extra_args={"kv_transfer_params": {"kvist_cartridge": {}}})
out["forged"] = refused(lambda: generate(token([1]), forged))
out["forged_salt"] = refused(lambda: generate(token([1], cache_salt="kvist:cartridge:x"), params()))
async def pieces():
    yield None
out["streamed_in"] = refused(lambda: generate(pieces(), params("text")))
out["fine"] = refused(lambda: generate(token([1]), params("text")).aclose())
out["offline_unknown"] = refused(lambda: processed(token([1]), params("nobody")))
# What generate decided is what process_inputs does.
decided = intake._decided(InputProcessor.process_inputs.frontends.all()[0], token([1, 2]), params("text"))
out["decided"] = shown(processed(decided, params("text")))

# Bodies.
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
for _ in range(2):
    bodies.watch(InputProcessor.process_inputs.frontends.all)
def body(**fields):
    return CompletionRequest(model="m", prompt=[1], max_tokens=4, **fields)
def named(name):
    return {"kv_transfer_params": {"cartridge_id": name}}
out["nested"] = body(extra_body=named("text")).to_sampling_params(4).extra_args
out["nested_chat"] = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "x"}],
    extra_body=named("text")).to_sampling_params(4, {}).extra_args
out["top_wins"] = body(extra_body=named("text"), **named("other")).kv_transfer_params
out["body_unknown"] = refused(lambda: body(**named("nobody")).to_sampling_params(4))
response = ResponsesRequest(model="m", input="x", **named("nobody"))
out["responses_unknown"] = refused(lambda: response.to_sampling_params(4, {}))
out["beam"] = refused(lambda: body(use_beam_search=True, **named("text")).to_beam_search_params(4))
out["beam_plain"] = refused(lambda: body(use_beam_search=True).to_beam_search_params(4))

# The engine core.
hash_fn = get_hash_fn_by_name("sha256")
init_none_hash(hash_fn)
core = object.__new__(EngineCore)
core.vllm_config, core.mm_receiver_cache = llm.vllm_config, None
from kvist.engines.vllm.cartridges.connector import CartridgeConnector
from kvist.engines.vllm.cartridges.documents import Documents, Prefixes
side = object.__new__(CartridgeConnector)
side.prefixes = Prefixes(InputProcessor.process_inputs.frontends.of(llm.input_processor).library,
    Documents(vocabulary=512, verify=False), max_model_len=256, placeholder=arriving.placeholder_of(llm.vllm_config))
core.scheduler = SimpleNamespace(connector=SimpleNamespace(_connectors=[None, side]) if multi else side)
core.request_block_hasher = get_request_block_hasher(16, hash_fn)

def to_core(prompt, sampling):
    request = processed(prompt, sampling)
    request.external_req_id = "r"
    before = list(request.prompt_token_ids)
    sent = dict(request.sampling_params.extra_args or {})
    made, _ = core.preprocess_add_request(request)
    assert list(request.prompt_token_ids) == before, "the API's request is another one"
    assert (request.sampling_params.extra_args or {}) == sent
    assert "kvist_cartridge" not in str(made.sampling_params.extra_args), "workers are told"
    return made

def core_view(made):
    stats = made.prefill_stats
    stats.set(made.num_prompt_tokens, 32, made.num_prompt_tokens - 33)
    own = {name: getattr(stats, name) for name in PrefillStats.__dataclass_fields__}
    return {"ids": list(made.prompt_token_ids), "prompt": made.num_prompt_tokens, "salt": made.cache_salt,
            "hashes": [h.hex() for h in made.block_hashes], "stats": own}

out["core"] = {
    "text": core_view(to_core(token([1, 2, 3]), params("text"))),
    "trained": core_view(to_core(token([1, 2, 3]), params("trained"))),
    "plain": core_view(to_core(token([*document, 1, 2, 3]), params())),
    "repeats": core_view(to_core(token([*document, 1, 2, 3]), params("text"))),
    "salted": core_view(to_core(token([1, 2, 3], cache_salt="tenant"), params("text"))),
}
(frontend,) = InputProcessor.process_inputs.frontends.all()
begun = intake._decided(frontend, token([1, 2, 3], prompt="a text"), params("text"))
out["begun"] = list(to_core(begun, params("text")).prompt_token_ids)
# What gets to the core past the front end. A client cannot make an object, and its words are only compared.
def arrive(engine, transfer, **fields):
    request = processed(token([1, 2, 3]), params(), engine)
    request.external_req_id = "r"
    for name, value in fields.items():
        setattr(request, name, value)
    request.sampling_params.extra_args = {"kv_transfer_params": transfer}
    core.vllm_config = engine.vllm_config
    try:
        made = core.preprocess_add_request(request)[0]
    except Exception as error:
        return [type(error).__name__, str(error)]
    finally:
        core.vllm_config = llm.vllm_config
    return [made.num_prompt_tokens, made.kv_transfer_params, made.sampling_params.extra_args]
true = out["placed"]["extra"]["kv_transfer_params"]["kvist_cartridge"]
salt = out["placed"]["salt"]
KEY = "kvist_cartridge"
out["past"] = {
    "of a refused request": arrive(
        llm, {"do_remote_prefill": True, KEY: true}, cache_salt=salt, abort_immediately=True),
    "no cartridges": arrive(plain, {KEY: true}, cache_salt=salt),
    "no salt": arrive(llm, {KEY: true}),
    "far too long": arrive(llm, {KEY: {**true, "tokens": 10**12}}, cache_salt=salt),
    "from the hub": arrive(llm, {KEY: {**true, "id": "evil/repo"}}, cache_salt=salt),
    "with a directory": arrive(llm, {KEY: {**true, "directory": "evil/repo"}}, cache_salt=salt),
    "nothing": arrive(llm, {KEY: []}),
    "decided for none": arrive(llm, {"cartridge_id": "nobody", KEY: None}),
}
forging = SamplingParams(extra_args={"kv_transfer_params": {KEY: true}})
out["no front end"] = refused(lambda: processed(token([1]), forging, plain))
out["no front end, generate"] = refused(lambda: plain.generate(token([1]), forging, "r"))
import msgspec
stats = to_core(token([1, 2, 3]), params("text")).prefill_stats
stats.set(36, 32, 1)
stats.finalize(36)
out["on_the_wire"] = msgspec.msgpack.decode(msgspec.msgpack.encode(stats))
stats = to_core(token([1, 2, 3]), params("text")).prefill_stats
stats.set(36, 0, 0)
stats.finalize(0)
out["nothing_cached"] = {name: getattr(stats, name) for name in PrefillStats.__dataclass_fields__}
out["identities"] = len(InputProcessor.process_inputs.frontends.all())
emit(out)
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, model: Callable[..., Path]) -> tuple[Path, list[dict[str, Any]]]:
    """A model, and two cartridges for it of 33 tokens: one knows its document, the other does not."""
    from kvist.cartridge.cartridge import Cartridge

    path = model(dtype="float32")
    make_tokenizer(path)
    identity = ModelIdentity.of_directory(path)
    layers = []
    for at in range(identity.num_layers):
        generator = torch.Generator().manual_seed(at)
        shape = len(DOCUMENT), identity.num_kv_heads, identity.head_dim
        layers.append((torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)))
    root = tmp_path_factory.mktemp("cartridges")
    listed = []
    for name, ids in (("text", DOCUMENT), ("trained", None)):
        made = Cartridge.create(layers, identity, cartridge_id=name, token_ids=ids)
        listed.append({"cartridge_id": name, "path": str(made.save_pretrained(root / name))})
    return path, listed


@pytest.fixture(scope="module", params=[False, True], ids=["alone", "one of several"])
def seen(
    request: pytest.FixtureRequest, served: tuple[Path, list[dict[str, Any]]], run_offline: Callable[..., Any]
) -> dict[str, Any]:
    """What all the hooks did."""
    result: dict[str, Any] = run_offline(_SCRIPT, str(served[0]), served[1], DOCUMENT, request.param)
    return result


def test_a_request_is_marked_and_salted(seen: dict[str, Any]) -> None:
    placed = seen["placed"]
    marker = placed["extra"]["kv_transfer_params"]["kvist_cartridge"]
    assert placed["ids"] == [1, 2, 3]
    assert (marker["id"], marker["tokens"], marker["placed"]) == ("text", 33, True)
    assert placed["salt"] == f"kvist:cartridge:{marker['identity']}"
    assert placed["max_tokens"] == 5
    assert seen["untouched"] == {"kv_transfer_params": {"cartridge_id": "text"}}
    assert seen["decided"]["salt"] == placed["salt"]


def test_all_others_are_as_they_were(seen: dict[str, Any]) -> None:
    assert seen["plain"] == {"ids": [1, 2, 3], "salt": None, "extra": None, "max_tokens": 5}
    assert seen["none"]["salt"] is None
    assert seen["none"]["extra"] == seen["untouched"]


def test_a_client_s_salt_stays_part_of_it(seen: dict[str, Any]) -> None:
    salted, placed = seen["salted"]["salt"], seen["placed"]["salt"]
    assert salted.startswith(f"{placed}:")
    assert "tenant" not in salted


def test_a_repeated_document_is_not_placed(seen: dict[str, Any]) -> None:
    marker = seen["repeats"]["extra"]["kv_transfer_params"]["kvist_cartridge"]
    assert marker["placed"] is False
    assert seen["repeats"]["salt"] == seen["placed"]["salt"]


@pytest.mark.parametrize(
    ("case", "kind", "text"),
    [
        ("unknown", "VLLMNotFoundError", "there is no cartridge 'nobody'; there are: text, trained"),
        ("offline_unknown", "VLLMNotFoundError", "nobody"),
        ("body_unknown", "VLLMNotFoundError", "nobody"),
        ("responses_unknown", "VLLMNotFoundError", "nobody"),
        ("too_long", "VLLMValidationError", "33 tokens, the prompt 240"),
        ("logprobs", "VLLMValidationError", "prompt_logprobs"),
        ("embeds", "VLLMValidationError", "embeds"),
        ("streamed_in", "VLLMValidationError", "streamed in"),
        ("forged", "VLLMValidationError", "only kvist itself may set it"),
        ("forged_salt", "VLLMValidationError", "cache_salt"),
        ("beam", "VLLMValidationError", "beam search"),
    ],
)
def test_refused_before_anything_is_answered(seen: dict[str, Any], case: str, kind: str, text: str) -> None:
    assert seen[case] is not None, "nothing was raised"
    assert seen[case][0] == kind
    assert text in seen[case][1]


def test_what_is_right_is_not_refused(seen: dict[str, Any]) -> None:
    assert seen["fine"] is None
    assert seen["beam_plain"] is None


def test_params_in_an_extra_body_are_found(seen: dict[str, Any]) -> None:
    """As raw HTTP that was copied from a Python client has them."""
    for case in ("nested", "nested_chat"):
        assert seen[case]["kv_transfer_params"] == {"cartridge_id": "text"}
    assert seen["top_wins"] == {"cartridge_id": "other"}


def test_the_core_puts_the_cartridge_before_the_prompt(seen: dict[str, Any]) -> None:
    core = seen["core"]
    assert core["text"]["ids"] == [*DOCUMENT, 1, 2, 3]
    assert core["trained"]["ids"] == [1] * len(DOCUMENT) + [1, 2, 3], "bos stands for tokens without an id"
    assert core["plain"]["ids"] == core["repeats"]["ids"] == core["text"]["ids"]
    assert all(view["prompt"] == 36 for view in core.values())


def test_what_comes_past_the_front_end_is_not_believed(seen: dict[str, Any]) -> None:
    past = seen["past"]
    remote = {"do_remote_prefill": True}
    assert past["of a refused request"] == [3, {**remote, KEY: None}, {"kv_transfer_params": remote}]
    assert past["no cartridges"] == [3, {KEY: None}, {"kv_transfer_params": {}}]
    named = {"cartridge_id": "nobody"}
    assert past["decided for none"] == [3, {**named, KEY: None}, {"kv_transfer_params": named}]
    kinds = {case: past[case][0] for case in ("no salt", "far too long", "from the hub", "with a directory", "nothing")}
    assert kinds == {**dict.fromkeys(kinds, "InvalidInput"), "from the hub": "UnknownCartridge"}


def test_a_marker_is_refused_where_there_are_no_cartridges_too(seen: dict[str, Any]) -> None:
    for case in ("no front end", "no front end, generate"):
        assert seen[case][0] == "VLLMValidationError"
        assert "only kvist itself may set it" in seen[case][1]


def test_a_text_goes_on_without_its_beginning(seen: dict[str, Any]) -> None:
    assert seen["begun"] == [*DOCUMENT, 2, 3]


def test_no_block_is_shared_with_another_cartridge_or_none(seen: dict[str, Any]) -> None:
    core = seen["core"]
    hashes = {name: view["hashes"] for name, view in core.items()}
    assert all(len(found) == 2 for found in hashes.values())
    assert hashes["repeats"] == hashes["text"]
    apart = [found[block] for name, found in hashes.items() if name != "repeats" for block in range(2)]
    assert len(set(apart)) == len(apart)


def test_statistics_are_the_client_s(seen: dict[str, Any]) -> None:
    """A placed prefix counts nowhere, and nothing goes below zero."""
    own = seen["core"]["text"]["stats"]
    assert (own["num_prompt_tokens"], own["num_computed_tokens"], own["num_cached_tokens"]) == (3, 1, 2)
    assert own["num_local_cached_tokens"] == 0
    repeated = seen["core"]["repeats"]["stats"]
    assert (repeated["num_prompt_tokens"], repeated["num_cached_tokens"]) == (36, 35)
    assert seen["on_the_wire"] == {
        "num_prompt_tokens": 3,
        "num_computed_tokens": 3,
        "num_cached_tokens": 0,
        "num_local_cached_tokens": 0,
        "num_external_cached_tokens": 0,
        "num_cache_creation_tokens": 3,
    }
    assert all(value >= 0 for value in seen["nothing_cached"].values())


def test_one_front_end_an_engine(seen: dict[str, Any]) -> None:
    assert seen["identities"] == 1


_ASIDE = """
import prometheus_client
from pathlib import Path
from types import SimpleNamespace
from kvist.engines.vllm import intake
from kvist.engines.vllm.cartridges.metrics import CATALOGUE, GAUGES
from kvist.engines.vllm.metrics import ConnectorMetrics
model, cache = arguments
made = []
class Metric(SimpleNamespace):
    def __init__(self, **settings):
        made.append(settings)
    def labels(self, *values):
        return self
types = {kind: Metric for kind in (prometheus_client.Gauge, prometheus_client.Counter, prometheus_client.Histogram)}
config = SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_connector="x"))
ConnectorMetrics(CATALOGUE, config, types, ["engine"], {0: ["0"]})
out = {"modes": {one["name"]: one.get("multiprocess_mode") for one in made if "kvist" in one["name"]}}
out["gauges"] = [f"vllm:kvist_cartridge_{name}" for name in GAUGES]

def identity(name, download_dir):
    config = SimpleNamespace(
        model_config=SimpleNamespace(dtype="torch.float32", model=name, revision=None),
        cache_config=SimpleNamespace(cache_dtype="auto"), load_config=SimpleNamespace(download_dir=download_dir))
    try:
        return intake.model_identity(config, {"revision": "r"}).model_id
    except Exception as error:
        return [type(error).__name__, str(error)]
snapshot = Path(cache) / "models--org--tiny" / "snapshots" / ("0" * 40)
snapshot.parent.mkdir(parents=True)
snapshot.symlink_to(model)
(Path(cache) / "models--org--tiny" / "refs").mkdir()
(Path(cache) / "models--org--tiny" / "refs" / "main").write_text("0" * 40)
out["fetched"] = identity("org/tiny", cache)
out["not fetched"] = identity("org/other", cache)
emit(out)
"""


@pytest.fixture(scope="module")
def aside(
    served: tuple[Path, list[dict[str, Any]]], run_offline: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    result: dict[str, Any] = run_offline(_ASIDE, str(served[0]), str(tmp_path_factory.mktemp("cache")))
    return result


def test_of_several_api_processes_one_tells_the_gauges(aside: dict[str, Any]) -> None:
    modes = aside["modes"]
    assert {name for name, mode in modes.items() if mode == "mostrecent"} == set(aside["gauges"])
    assert len(modes) > len(aside["gauges"])


def test_a_model_that_vllm_fetched_is_found_where_it_was_put(aside: dict[str, Any]) -> None:
    assert aside["fetched"] == "org/tiny"
    kind, text = aside["not fetched"]
    assert kind == "UnsupportedModel"
    assert "org/other" in text


_READ_BY_VLLM = """
import importlib.util, re
from pathlib import Path
from kvist.engines.vllm.cartridges.fields import check_fields
found = set()
for path in Path(importlib.util.find_spec("vllm").origin).parent.glob("distributed/kv_transfer/**/*.py"):
    found |= set(re.findall(r"params(?:[.]get[(]|\\[)\\W+(\\w+)\\W", path.read_text()))
for name in found:
    check_fields({"kv_transfer_params": {name: 1}}, (), ())
emit(sorted(found))
"""


def test_fields_that_vllm_s_own_connectors_read_are_not_refused(run_offline: Callable[..., Any]) -> None:
    """By its sources; what is new there must be added."""
    found = run_offline(_READ_BY_VLLM)
    assert {"do_remote_prefill", "remote_block_ids", "transfer_id", "tp_size"} <= set(found)
