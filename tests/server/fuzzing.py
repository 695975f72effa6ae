"""Requests made of the API's own description, and of the page's forms: mostly so, some changed, some of it noise.

Drawn from one seeded generator, and not by hypothesis: twenty thousand requests take a minute so, and the number of
one that fails makes it again.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlencode

KNOWN = "KNOWN"
"""With a digit after it: to be replaced by a name or cid that an answer brought, whole or cut short."""

_NAMES = ("main", "fuzz", "fuzz/0", "seq/x", "a", "cmpl-x", "tenants/acme/a", "..", "../..", "kvist.json", "", "é\n\0/")
_METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "X")
_HEADERS = (
    "X-Request-Id", "Content-Type", "Accept", "Origin", "Cookie", "Sec-Fetch-Site", "Host", "Authorization",
    "X-Kvist-Token", "traceparent",
)  # fmt: skip
_ODD = string.ascii_letters + "/-*;=, []:@%"
_FORMS = {
    "/ui/fork": ("cid", "n", "name"),
    "/ui/tag": ("cid", "name"),
    "/ui/checkout": ("cid",),
    "/ui/login": ("token", "next"),
    "/ui/logout": (),
    "/ui/theme": ("theme", "next"),
}
_PAGES = ("/", "/ui/lineage?at=", "/ui/snapshots/", "/ui/static/", "/ui/login?next=", "/metrics")
_MOSTLY = ("prompt", "messages")
"""Fields that a request rarely comes without."""
_NUMBERS = (0, 1, -1, 2**31 - 1, 2**31, 2**63, 2**64, -(2**70), 0.0, -0.5, 1e308, 1e-300)


@dataclass
class Request:
    """One request; its ``route`` is the path as the description writes it."""

    method: str
    path: str
    query: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    caller: str = ""

    def __post_init__(self) -> None:
        self.route = self.path


class Requests:
    """Draws requests to what an OpenAPI document describes."""

    def __init__(
        self, document: Mapping[str, Any], callers: list[str], seed: int, usual: Mapping[str, list[str]]
    ) -> None:
        """``usual``: what is mostly said in fields of text, by their names."""
        self._schemas = document["components"]["schemas"]
        self._callers, self._usual, self._random = callers, usual, random.Random(seed)
        self._operations = [
            (method.upper(), path, operation)
            for path, methods in document["paths"].items()
            for method, operation in methods.items()
            for _ in range(4 if "requestBody" in operation else 1)
        ]

    def draw(self) -> Request:
        """One request."""
        request = self._page() if self._once_in(6) else self._call()
        if self._once_in(20):
            request.method = self._random.choice(_METHODS)
        if self._once_in(6):
            text = "".join(self._random.choices(_ODD, k=self._random.randrange(20)))
            request.headers[self._random.choice(_HEADERS)] = text.strip()
        return request

    def _page(self) -> Request:
        """A request of the page's."""
        draw, caller = self._random, self._random.choice(self._callers)
        if self._once_in(2):
            path, _, query = draw.choice(_PAGES).partition("?")
            path += quote(self._word()) if path.endswith(("snapshots/", "static/")) else ""
            return Request("GET", path, {query.rstrip("="): self._word()} if query else {}, caller=caller)
        path, fields = draw.choice(list(_FORMS.items()))
        form = {name: draw.choice(["1", "3", "0"]) if name == "n" else self._word() for name in fields}
        data = draw.randbytes(30) if self._once_in(8) else urlencode(form).encode()
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        return Request("POST", path, headers=headers, body=data, caller=caller)

    def _call(self) -> Request:
        """A request of what is described."""
        draw = self._random
        method, path, operation = draw.choice(self._operations)
        request = Request(method, path, caller=draw.choice(self._callers))
        for parameter in operation["parameters"]:
            if parameter["in"] == "path":
                request.path = request.path.replace("{" + parameter["name"] + "}", self._word())
            elif self._once_in(2):
                request.query[parameter["name"]] = draw.choice([self._word(), str(draw.randint(-3, 2_000))])
        if "requestBody" in operation:
            request.body = self._body(operation["requestBody"]["content"]["application/json"]["schema"])
        elif self._once_in(10):
            request.body = draw.randbytes(draw.randrange(20))
        return request

    def _once_in(self, many: int) -> bool:
        return self._random.randrange(many) == 0

    def _word(self) -> str:
        draw = self._random
        match draw.randrange(8):
            case 0:
                return "".join(chr(draw.choice([*range(32, 127), 0x7F, 0xE9, 0x20AC, 0x1F600])) for _ in range(9))
            case 1:
                return "".join(draw.choices("0123456789abcdef", k=draw.choice([6, 12, 63, 64])))
            case 2 | 3:
                return draw.choice(_NAMES)
            case _:
                return f"{KNOWN}{draw.randrange(10)}"

    def _body(self, schema: Mapping[str, Any]) -> bytes:
        value = self._value(schema, "")
        match self._random.randrange(12):
            case 0 | 1 | 2:
                value = self._change(value)
            case 3:
                value = self._noise(3)
            case 4:
                return self._random.randbytes(self._random.randrange(40))
            case 5:
                return json.dumps(value).encode()[:-1]
            case _:
                pass
        return json.dumps(value, ensure_ascii=self._once_in(2)).encode()

    def _change(self, value: Any) -> Any:
        """``value`` with something else somewhere in it."""
        if isinstance(value, dict) and value and not self._once_in(4):
            name = self._random.choice(sorted(value))
            return value | {name: self._change(value[name])}
        if isinstance(value, list) and value and not self._once_in(4):
            return [*value[:-1], self._change(value[-1])]
        if isinstance(value, dict) and self._once_in(2):
            return value | {self._word(): self._noise(2)}
        return self._noise(3)

    def _noise(self, depth: int) -> Any:
        """Any JSON."""
        draw = self._random
        makers: list[Callable[[], Any]] = [
            lambda: None,
            lambda: draw.choice([True, False]),
            lambda: draw.choice(_NUMBERS),
            self._word,
            lambda: [self._noise(depth - 1) for _ in range(draw.randrange(4))] if depth else [],
            lambda: {self._word(): self._noise(depth - 1) for _ in range(draw.randrange(4))} if depth else {},
        ]
        return draw.choice(makers)()

    def _value(self, schema: Mapping[str, Any], name: str) -> Any:
        """A value of a JSON schema; numbers are mostly small, since a large one is only more work."""
        draw = self._random
        if "$ref" in schema:
            return self._value(self._schemas[schema["$ref"].rpartition("/")[2]], name)
        if "anyOf" in schema:
            return self._value(draw.choice(schema["anyOf"]), name)
        if "enum" in schema:
            return draw.choice(schema["enum"])
        match schema.get("type"):
            case "object" if "properties" in schema:
                required = set(schema.get("required", ()))
                optional = sorted(schema["properties"].keys() - required)
                chosen = required | set(draw.sample(optional, min(len(optional), draw.randrange(4))))
                chosen |= {key for key in optional if key in _MOSTLY and not self._once_in(8)}
                return {key: self._value(schema["properties"][key], key) for key in sorted(chosen)}
            case "object":
                return {self._word(): self._value(schema.get("additionalProperties") or {}, name)}
            case "array":
                return [self._value(schema.get("items") or {}, name) for _ in range(draw.randrange(1, 5))]
            case "integer":
                low = schema.get("minimum", schema.get("exclusiveMinimum", -5))
                high = schema.get("maximum", schema.get("exclusiveMaximum", 2**31) - 1)
                return (
                    draw.choice([low, high, 2**31 - 1]) if self._once_in(8) else draw.randint(low, min(high, low + 8))
                )
            case "number":
                return draw.choice([0.0, 1.0, 0.5, 1e-9, 9999.0])
            case "string":
                usual = self._usual.get(name)
                return draw.choice(usual) if usual and not self._once_in(8) else self._word()
            case "boolean":
                return draw.choice([True, False])
            case "null":
                return None
            case _:
                return self._noise(2)
