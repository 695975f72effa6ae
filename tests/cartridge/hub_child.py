"""A process whose hub is that of ``HF_ENDPOINT``, which is read when huggingface_hub is imported.

Reads one call a line, ``{"call": ..., "kwargs": ...}``, and answers with what came of it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from kvist.cartridge.cartridge import Cartridge
from kvist.errors import KvistError


def call(name: str, kwargs: dict[str, Any]) -> Any:
    if name == "open":
        with Cartridge.from_pretrained(kwargs.pop("name"), **kwargs) as opened:
            return {"identity": opened.identity, "directory": str(opened.directory), "id": opened.manifest.cartridge_id}
    with Cartridge.from_pretrained(kwargs.pop("directory")) as opened:
        if name == "save":
            return str(opened.save_pretrained(**kwargs))
        if name == "push_from_memory":
            return opened.with_metadata(labels={"a": "b"}).push_to_hub(**kwargs)
        return opened.push_to_hub(**kwargs)


def main() -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = {"result": call(asked["call"], asked["kwargs"])}
        except KvistError as error:
            answer = {"kind": error.kind, "message": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
