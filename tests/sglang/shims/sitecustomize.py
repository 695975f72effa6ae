"""Makes SGLang's wheel run on a CPU without its CUDA packages; README.md beside it says what each part is for.

Python imports this module at its start, in every process, where this directory is on PYTHONPATH.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any


class _Absent:
    """What a stub module seems to hold. It can be named; to use it is an error."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> _Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self._name}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{self._name} belongs to a stub: no CPU test should reach it")


class _Stub(ModuleType):
    __version__ = "0.0"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> _Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.__name__}.{name}")


class _Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds torchvision and sgl_kernel, and whatever is asked for inside them."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.partition(".")[0] not in ("sgl_kernel", "torchvision"):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == "sgl_kernel":
            import murmur  # noqa: F401  the one kernel that has to be there


def _choices(module: Any) -> None:
    module.add_deterministic_attention_backend_choices(["torch_native"])
    module.add_radix_supported_deterministic_attention_backend_choices(["torch_native"])


def _invariant(module: Any) -> None:
    import batch_invariant

    module.enable_batch_invariant_mode = batch_invariant.enable


def _attending(module: Any) -> None:
    import batch_invariant

    module.scaled_dot_product_attention = batch_invariant.attend


_AFTER = {
    "sglang.srt.arg_groups.choices": _choices,
    "sglang.srt.batch_invariant_ops": _invariant,
    "sglang.srt.layers.attention.torch_native_backend": _attending,
}
"""What to do to a module once it is imported."""


class _Completed(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname not in _AFTER:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        assert spec is not None and spec.loader is not None
        inner = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            inner(module)
            _AFTER[fullname](module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Completed())
sys.meta_path.append(_Stubs())
