"""A connector's configuration: what is read, what is refused, and what it opens."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from kvist.cartridge.config import CartridgeConfig, CartridgeSource, open_library
from kvist.cartridge.registry import Registry
from kvist.cartridge.routing import (
    CompositeRouter,
    ExplicitCartridgeRouter,
    LabelCartridgeRouter,
    Selection,
    StaticCartridgeRouter,
)
from kvist.errors import InvalidInput, KvistError, LayoutMismatch, NotFound, UnknownCartridge

from .making import MODEL, make_cartridge, make_layers

A, B = {"cartridge_id": "a", "path": "/c/a"}, {"cartridge_id": "b", "path": "/c/b"}


def opened(extra: dict[str, Any], tmp_path: Path, **model: Any) -> Any:
    extra = {"cache_dir": str(tmp_path / "cache")} | extra
    return open_library(CartridgeConfig.from_extra(extra), dataclasses.replace(MODEL, **model))


def saved(tmp_path: Path, name: str, **said: Any) -> str:
    return str(make_cartridge(seed=len(name), **{"cartridge_id": name} | said).save_pretrained(tmp_path / name))


# -- reading -----------------------------------------------------------------------------------------------------


def test_the_configuration_of_the_first_connector() -> None:
    one = CartridgeConfig.from_extra({"cartridge_path": "canary.pt"})
    assert one.sources == (CartridgeSource(None, {"path": "canary.pt"}),)
    two = CartridgeConfig.from_extra({"cartridge_path": "canary.pt", "manifest_path": "canary.json"})
    assert two.sources[0].source == {"path": "canary.pt", "manifest_path": "canary.json"}
    several = CartridgeConfig.from_extra(
        {"cartridges": [A, B], "router": {"type": "explicit"}, "gpu_capacity_bytes": 10, "preload": ["a"]}
    )
    assert several.sources == (CartridgeSource("a", {"path": "/c/a"}), CartridgeSource("b", {"path": "/c/b"}))
    assert (several.router, several.host_bytes, several.preload) == ({"type": "explicit"}, 10, ("a",))


def test_what_is_not_said() -> None:
    config = CartridgeConfig.from_extra({"registry": "/c/registry.db"})
    assert (config.sources, config.router, config.registry, config.preload) == ((), None, "/c/registry.db", ())
    assert (config.unknown, config.prefix, config.verify) == ("refuse", "auto", True)
    assert (config.model, config.revision, config.host_bytes) == (None, None, None)
    assert config.cache_dir.is_absolute()
    assert CartridgeConfig.from_extra({"registry": "r", "router": None, "preload": None}).preload == ()


def test_all_kinds_of_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    told = [
        {"path": "~/a.pt", "manifest_path": "~/a.json"},
        {"cartridge_id": "s", "store": "file:///kv", "rev": "cartridge/s", "sequence": "x"},
        {"cartridge_id": "h", "hub": "org/h", "revision": "main", "subfolder": None},
    ]
    assert CartridgeConfig.from_extra({"cartridges": told}).sources == (
        CartridgeSource(None, {"path": "/home/me/a.pt", "manifest_path": "/home/me/a.json"}),
        CartridgeSource("s", {"store": "file:///kv", "rev": "cartridge/s", "sequence": "x"}),
        CartridgeSource("h", {"hub": "org/h", "revision": "main"}),
    )


def test_memory() -> None:
    config = CartridgeConfig.from_extra({"registry": "r"})
    assert (config.capacity(1000), config.capacity(1 << 30)) == (1 << 30, 8 << 30)
    assert CartridgeConfig.from_extra({"registry": "r", "host_bytes": 5}).capacity(1000) == 5


def test_the_served_model_by_its_configured_names() -> None:
    assert CartridgeConfig(model="org/real").served(MODEL) == dataclasses.replace(MODEL, model_id="org/real")
    assert CartridgeConfig(revision="r2").served(MODEL) == dataclasses.replace(MODEL, revision="r2")
    assert CartridgeConfig().served(MODEL) == MODEL


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({}, "none of them"),
        ({"cartridges": []}, "empty"),
        ({"cartridge_path": "a", "cartridges": [A]}, "both"),
        ({"registry": "r", "host_bytes": 1, "gpu_capacity_bytes": 1}, "both"),
        ({"cartridges": [A], "manifest_path": "m"}, "manifest_path"),
        ({"cartridge_path": "a", "cartridgepath": "b"}, "'cartridgepath'"),
        ({"cartridge_path": "a", "gpu_residency_device": "cuda"}, "'gpu_residency_device'"),
        ({"cartridge_path": ""}, "cartridge_path|path"),
        ({"cartridge_path": None}, "cartridge_path"),
        ({"cartridge_path": 3}, "3"),
        ({"cartridge_path": ["a"]}, "'a'"),
        ({"cartridges": A}, "list"),
        ({"cartridges": ["a"]}, "object"),
        ({"cartridges": [A, A]}, "a twice"),
        ({"cartridges": [{"cartridge_id": "a"}]}, "path, store, hub"),
        ({"cartridges": [{"path": "a", "hub": "b"}]}, "path, store, hub"),
        ({"cartridges": [{"path": None}]}, "path"),
        ({"cartridges": [{"path": "a", "rev": "b"}]}, "'rev'"),
        ({"cartridges": [{"store": "a"}]}, "rev"),
        ({"cartridges": [{"hub": "a", "manifest_path": "b"}]}, "'manifest_path'"),
        ({"cartridges": [{"cartridge_id": "../a", "path": "a"}]}, r"\.\./a"),
        ({"cartridges": [{"cartridge_id": 3, "path": "a"}]}, "cartridge_id"),
        ({"registry": 3}, "registry"),
        ({"registry": "r", "router": "explicit"}, "router"),
        ({"registry": "r", "host_bytes": 0}, "host_bytes"),
        ({"registry": "r", "host_bytes": True}, "host_bytes"),
        ({"registry": "r", "host_bytes": "1GB"}, "host_bytes"),
        ({"registry": "r", "gpu_capacity_bytes": -1}, "gpu_capacity_bytes"),
        ({"registry": "r", "preload": "a"}, "preload"),
        ({"registry": "r", "preload": [1]}, "preload"),
        ({"registry": "r", "other_params": "a"}, "other_params to be a list of names"),
        ({"registry": "r", "other_params": [""]}, "other_params to be a list of names, got ''"),
        ({"registry": "r", "unknown": "ignore"}, "refuse, compute"),
        ({"registry": "r", "prefix": True}, "auto, virtual, prompt"),
        ({"registry": "r", "prefix": ["auto"]}, "auto, virtual, prompt"),
        ({"registry": "r", "verify": 1}, "verify"),
        ({"registry": "r", "cache_dir": 1}, "cache_dir"),
    ],
)
def test_refused(extra: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        CartridgeConfig.from_extra(extra)


def test_the_guide_names_every_key() -> None:
    page = (Path(__file__).parents[2] / "docs" / "guides" / "cartridges.md").read_text()
    table = page.partition("## Options")[2]
    names = {field.name for field in dataclasses.fields(CartridgeConfig)} - {"sources"}
    for name in names | {"cartridges", "cartridge_path", "manifest_path", "gpu_capacity_bytes"}:
        assert f"`{name}`" in table, name


# -- opening -----------------------------------------------------------------------------------------------------


def test_one_cartridge_is_for_all_who_name_no_other(tmp_path: Path) -> None:
    library, router = opened({"cartridge_path": saved(tmp_path, "law")}, tmp_path)
    assert (library.ids(), library.default_id) == (["law"], "law")
    assert router.resolve(Selection()) == "law"
    assert router.resolve(Selection({"cartridge_id": "tax"})) == "tax"
    with pytest.raises(UnknownCartridge, match="there is no cartridge 'tax'; there are: law"):
        library.get("tax")


def test_several_are_for_those_who_name_them(tmp_path: Path) -> None:
    told = [{"path": saved(tmp_path, "law")}, {"cartridge_id": "t", "path": saved(tmp_path, "tax")}]
    library, router = opened({"cartridges": told}, tmp_path)
    assert (library.ids(), library.default_id) == (["law", "t"], "law")
    assert router == ExplicitCartridgeRouter()
    assert router.resolve(Selection()) is None
    entry = library.get("t")
    assert (entry.cartridge_id, entry.directory, entry.manifest.cartridge_id) == ("t", tmp_path / "tax", "tax")


def test_every_router_can_be_configured(tmp_path: Path) -> None:
    told = [
        {"path": saved(tmp_path, "law", labels={"area": "law"})},
        {"path": saved(tmp_path, "taxes", labels={"area": "tax"})},
    ]
    of = {
        "explicit": ({"type": "explicit", "key": "doc"}, ExplicitCartridgeRouter),
        "static": ({"type": "static"}, StaticCartridgeRouter),
        "label": ({"type": "label", "label_key": "area"}, LabelCartridgeRouter),
        "composite": ({"type": "composite", "routers": [{"type": "label", "label_key": "area"}]}, CompositeRouter),
    }
    for config, kind in of.values():
        _, router = opened({"cartridges": told, "router": config}, tmp_path)
        assert isinstance(router, kind)
        asked = Selection({"doc": "taxes", "cartridge_label": "tax"})
        assert router.resolve(asked) == ("law" if kind is StaticCartridgeRouter else "taxes")
    with pytest.raises(UnknownCartridge, match="area='x'"):
        router.resolve(Selection({"cartridge_label": "x"}))


def test_a_checkpoint_is_converted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    layers = [(k.transpose(0, 1)[None], v.transpose(0, 1)[None]) for k, v in make_layers(37)]
    keys, values = (list(one) for one in zip(*layers, strict=True))
    checkpoint = {"trainable_keys": keys, "trainable_values": values, "frozen_keys": [], "frozen_values": []}
    torch.save(checkpoint, tmp_path / "canary.pt")
    with caplog.at_level(logging.WARNING):
        library, router = opened({"cartridge_path": str(tmp_path / "canary.pt")}, tmp_path)
    assert "does not say which model" in caplog.text
    entry = library.get(router.resolve(Selection()) or "")
    assert (entry.cartridge_id, entry.manifest.num_tokens_raw) == ("canary", 37)
    again = opened({"cartridges": [{"cartridge_id": "canary", "path": str(tmp_path / "canary.pt")}]}, tmp_path)
    assert again.library.get("canary").manifest.identity == entry.manifest.identity


def test_a_sidecar_of_another_cartridge_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "canary.pt"
    torch.save([(k.transpose(0, 1)[None], v.transpose(0, 1)[None]) for k, v in make_layers(32)], path)
    sidecar = {
        "cartridge_id": "tax",
        "model_id": MODEL.model_id,
        "num_layers": 3,
        "num_kv_heads": 2,
        "head_dim": 8,
        "dtype": "bfloat16",
        "num_tokens_raw": 32,
        "num_tokens_aligned": 32,
        "block_size": 16,
        "num_blocks": 2,
        "has_frozen_prefix": False,
    }
    (tmp_path / "m.json").write_text(json.dumps(sidecar))
    told = {"path": str(path), "manifest_path": str(tmp_path / "m.json")}
    assert opened({"cartridges": [told]}, tmp_path).library.ids() == ["tax"]
    with pytest.raises(InvalidInput, match="tax"):
        opened({"cartridges": [{"cartridge_id": "law", **told}]}, tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_layers", 4), ("num_kv_heads", 4), ("head_dim", 16), ("model_id", "org/big"), ("revision", "r2")],
)
def test_one_for_another_model_stops_the_start(tmp_path: Path, field: str, value: object) -> None:
    extra = {"cartridge_path": saved(tmp_path, "law")}
    with pytest.raises(LayoutMismatch, match=field if field != "revision" else "model_revision"):
        opened(extra, tmp_path, **{field: value})
    if field in ("model_id", "revision"):
        told = {"model": MODEL.model_id, "revision": MODEL.revision}
        assert opened(extra | told, tmp_path, **{field: value}).library.ids() == ["law"]


def test_what_is_missing_stops_the_start(tmp_path: Path) -> None:
    law = saved(tmp_path, "law")
    for extra, error in (
        ({"cartridge_path": str(tmp_path / "absent")}, NotFound),
        ({"cartridges": [{"path": law}, {"path": law}]}, InvalidInput),
        ({"cartridge_path": law, "preload": ["absent"]}, UnknownCartridge),
        ({"cartridge_path": law, "router": {"type": "static", "cartridge_id": "absent"}}, UnknownCartridge),
        ({"cartridge_path": law, "router": {"type": "nearest"}}, InvalidInput),
        ({"cartridge_path": law, "registry": str(tmp_path / "law" / "cartridge.json" / "r.db")}, KvistError),
        ({"registry": str(tmp_path / "r.db"), "router": {}, "preload": ["absent"]}, UnknownCartridge),
    ):
        with pytest.raises(error):
            opened(extra, tmp_path)


def test_a_static_router_may_wait_for_the_registry(tmp_path: Path) -> None:
    extra = {"registry": str(tmp_path / "r.db"), "router": {"type": "static", "cartridge_id": "law"}}
    library, router = opened(extra, tmp_path)
    with library, Registry(tmp_path / "r.db") as registry:
        with pytest.raises(UnknownCartridge):
            library.get(router.resolve(Selection()))
        made = make_cartridge(cartridge_id="law")
        made.save_pretrained(tmp_path / "law")
        registry.register(made.manifest, str(tmp_path / "law"))
        assert library.get(router.resolve(Selection())).directory == tmp_path / "law"
