"""Reads what `torch.save` says of a checkpoint without running it: a pickle in, plain data and described tensors out.

Knows the opcodes of pickles and the few names with which torch describes tensors and lists of parameters. Must not know
files or families.

A pickle is a program. `pickle` runs all of it, and `torch.load(weights_only=True)` runs what it lists as safe, which
includes constructors that take their sizes from the file, and leaves out the ``nn.ParameterList`` that published
cartridges are saved as. Here nothing is imported and nothing is called: each known name has a rule that builds data
from data, and an unknown one ends the reading with `UnsafeCheckpoint`.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NoReturn, TypeGuard, cast

from kvist.cartridge.formats.stored import StoredTensor
from kvist.errors import InvalidCartridge, KvistError, UnsafeCheckpoint

_STORAGES: Final = {
    "BFloat16Storage": "bfloat16",
    "HalfStorage": "float16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_DTYPES: Final = (*_STORAGES.values(), "float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64")
_PARAMETERS: Final = ("ParameterList", "ParameterDict")
_KNOWN: Final = {
    "collections.OrderedDict",
    "torch.Size",
    "torch.device",
    "builtins.set",
    "__builtin__.set",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch.storage.UntypedStorage",
    *(f"torch.{name}" for name in (*_STORAGES, *_DTYPES)),
    *(f"torch.nn.modules.container.{name}" for name in _PARAMETERS),
}
_LITTLE: Final = {1: "<B", 2: "<H", 4: "<I", 8: "<Q"}
_RANK_MAX: Final = 8
_HINT: Final = (
    "where you trust the file, load it and save its tensors alone: "
    "torch.save([(layer.keys, layer.values) for layer in cache.layers], path)"
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor is said to be. Each number is in [0, 2^62), and nothing is said of whether they fit.

    Attributes:
        dtype: by torch's name.
        key: of its storage.
        count: elements of the storage, or bytes.
        is_in_bytes: whether ``count`` is bytes.
        offset: of the first element.
        shape: of at most eight axes.
        strides: in elements.
    """

    dtype: str
    key: str
    count: int
    is_in_bytes: bool
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Opaque:
    """A value of no use here: a device, a data type, a set of names."""


class _Global(str):
    """A name that the pickle would import."""

    __slots__ = ()


class _Storage:
    """Where a tensor's numbers are. Of an untyped storage the size is in bytes."""

    def __init__(self, dtype: str, key: str, count: int) -> None:
        self.dtype, self.key, self.count = dtype, key, count


class _ParameterList(list[Any]):
    """An ``nn.ParameterList``; filled when its state comes."""


class _ParameterDict(dict[Any, Any]):
    """An ``nn.ParameterDict``; filled when its state comes."""


def read(data: bytes, make_tensor: Callable[[Place], StoredTensor], where: str) -> Any:
    """The value that a pickle describes: dicts, lists, tuples, text, numbers, ``None``, `StoredTensor` and `Opaque`.

    A value may occur in itself; whoever goes down into it must say how deep.

    Args:
        data: of protocol 2 to 5.
        make_tensor: refuses, by `InvalidCartridge`, what does not fit the storages.
        where: the file, for messages.

    Raises:
        UnsafeCheckpoint: it names a class or function that no checkpoint of tensors needs; nothing was run.
        InvalidCartridge: it is no pickle, or does what no pickle of tensors does.
    """
    machine = _Machine(data, make_tensor, where)
    try:
        return machine.run()
    except KvistError:
        raise
    except (IndexError, KeyError, ValueError, TypeError, struct.error) as error:
        # its own stack, memo and arguments: the pickle takes what it did not put there, or ends too early
        raise InvalidCartridge(f"{where}: its pickle breaks at byte {machine.at}: {error!r:.120}") from None


class _Machine:
    def __init__(self, data: bytes, make_tensor: Callable[[Place], StoredTensor], where: str) -> None:
        self.at = 0
        self._data = data
        self._make_tensor = make_tensor
        self._where = where
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    # -- the program ---------------------------------------------------------------------------------------------

    def run(self) -> Any:
        while True:
            match self._take(1):
                case pickle.STOP:
                    return self._stack.pop()
                case pickle.PROTO:
                    self._take(1)
                case pickle.FRAME:
                    self._take(8)
                case pickle.MARK:
                    self._marked.append(self._stack)
                    self._stack = []
                case pickle.BINPUT:
                    self._memo[self._number(1)] = self._stack[-1]
                case pickle.LONG_BINPUT:
                    self._memo[self._number(4)] = self._stack[-1]
                case pickle.MEMOIZE:
                    self._memo[len(self._memo)] = self._stack[-1]
                case pickle.BINGET:
                    self._stack.append(self._memo[self._number(1)])
                case pickle.LONG_BINGET:
                    self._stack.append(self._memo[self._number(4)])
                case pickle.GLOBAL | pickle.STACK_GLOBAL as opcode:
                    self._stack.append(self._name(opcode))
                case pickle.REDUCE | pickle.NEWOBJ as opcode:
                    arguments, function = self._stack.pop(), self._stack.pop()
                    self._stack.append(self._call(function, arguments, opcode))
                case pickle.BUILD:
                    state = self._stack.pop()
                    self._build(self._stack[-1], state)
                case pickle.BINPERSID:
                    self._stack.append(self._storage(self._stack.pop()))
                case opcode:
                    self._collect(opcode)

    def _collect(self, opcode: bytes) -> None:
        """Opcodes that put values into collections."""
        match opcode:
            case pickle.APPEND:
                item = self._stack.pop()
                self._target(list).append(item)
            case pickle.APPENDS:
                items = self._pop_mark()
                self._target(list).extend(items)
            case pickle.SETITEM:
                value, key = self._stack.pop(), self._stack.pop()
                self._set([key, value])
            case pickle.SETITEMS:
                self._set(self._pop_mark())
            case pickle.ADDITEMS:
                self._pop_mark()
                self._target(Opaque)
            case pickle.TUPLE:
                items = self._pop_mark()
                self._stack.append(tuple(items))
            case pickle.TUPLE1 | pickle.TUPLE2 | pickle.TUPLE3:
                count = (pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3).index(opcode) + 1
                items = [self._stack.pop() for _ in range(count)]
                self._stack.append(tuple(reversed(items)))
            case _:
                self._stack.append(self._literal(opcode))

    def _literal(self, opcode: bytes) -> Any:
        match opcode:
            case pickle.NONE:
                return None
            case pickle.NEWTRUE:
                return True
            case pickle.NEWFALSE:
                return False
            case pickle.EMPTY_DICT:
                return {}
            case pickle.EMPTY_LIST:
                return []
            case pickle.EMPTY_TUPLE:
                return ()
            case pickle.EMPTY_SET:
                return Opaque()
            case pickle.BININT:
                return int.from_bytes(self._take(4), "little", signed=True)
            case pickle.BININT1:
                return self._number(1)
            case pickle.BININT2:
                return self._number(2)
            case pickle.LONG1:
                return int.from_bytes(self._take(self._number(1)), "little", signed=True)
            case pickle.BINFLOAT:
                return struct.unpack(">d", self._take(8))[0]
            case pickle.SHORT_BINUNICODE:
                return self._take(self._number(1)).decode()
            case pickle.BINUNICODE:
                return self._take(self._number(4)).decode()
            case pickle.BINUNICODE8:
                return self._take(self._number(8)).decode()
        return self._refuse(f"opcode {opcode!r} is of no checkpoint of tensors")

    # -- its parts -----------------------------------------------------------------------------------------------

    def _take(self, count: int) -> bytes:
        start, self.at = self.at, self.at + count
        if self.at > len(self._data):
            raise ValueError(f"it ends {self.at - len(self._data)} bytes too early")
        return self._data[start : self.at]

    def _number(self, width: int) -> int:
        number: int = struct.unpack(_LITTLE[width], self._take(width))[0]
        return number

    def _pop_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _target(self, kind: type[Any]) -> Any:
        if type(self._stack[-1]) is not kind:
            self._refuse(f"items are put into a {type(self._stack[-1]).__name__}, expected a {kind.__name__}")
        return self._stack[-1]

    def _set(self, items: list[Any]) -> None:
        target = self._target(dict)
        if len(items) % 2:
            self._refuse("a key without a value is put into a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # The hash of nested tuples can take for ever, or all of the stack; and any number of large integers have
            # one hash, so that each has to be compared with all before it.
            if type(key) is not str and not (type(key) is int and 0 <= key < 1 << 31):
                found = f"{key:#x}" if type(key) is int else type(key).__name__
                self._refuse(f"a key of a dict must be text or an integer in [0, 2^31), got {found:.80}")
            target[key] = value

    def _refuse(self, why: str) -> NoReturn:
        raise InvalidCartridge(f"{self._where}: its pickle breaks at byte {self.at}: {why}")

    def _name(self, opcode: bytes) -> _Global:
        if opcode == pickle.STACK_GLOBAL:
            name, module = self._stack.pop(), self._stack.pop()
            if not (type(name) is str and type(module) is str):
                self._refuse("a name that is no text")
        else:
            module, name = self._line(), self._line()
        full = f"{module}.{name}"
        if full not in _KNOWN:
            raise UnsafeCheckpoint(
                f"{self._where}: to read it would import {full!r:.200}, which is not of the tensors, lists and dicts "
                "that are read; nothing was run",
                hint=_HINT,
            )
        return _Global(full)

    def _line(self) -> str:
        end = self._data.index(b"\n", self.at)
        start, self.at = self.at, end + 1
        return self._data[start:end].decode()

    # -- what the known names stand for --------------------------------------------------------------------------

    def _call(self, function: object, arguments: object, opcode: bytes) -> Any:
        if type(function) is not _Global or type(arguments) is not tuple:
            self._refuse(f"a {type(function).__name__} is called, expected a name that it knows")
        match function.rpartition(".")[2], arguments:
            case "ParameterList", () if opcode == pickle.NEWOBJ:
                return _ParameterList()
            case "ParameterDict", () if opcode == pickle.NEWOBJ:
                return _ParameterDict()
            case "OrderedDict", ():
                return {}
            case "Size", (tuple() as shape,):
                return shape
            case ("device", _) | ("set", (list(),)):
                return Opaque()
            case "_rebuild_parameter" | "_rebuild_parameter_with_state", (StoredTensor() as tensor, *_):
                return tensor
            case "_rebuild_tensor" | "_rebuild_tensor_v2", (_Storage() as storage, offset, shape, strides, *_):
                return self._tensor(storage, storage.dtype, offset, shape, strides)
            case "_rebuild_tensor_v3", (_Storage() as storage, offset, shape, strides, _, _, _Global() as dtype, *_):
                return self._tensor(storage, dtype.removeprefix("torch."), offset, shape, strides)
        return self._refuse(f"{function!s} is called with other arguments than torch calls it with")

    def _build(self, target: object, state: object) -> None:
        if type(target) is dict:  # what torch notes beside a state dict
            return
        if type(target) not in (_ParameterList, _ParameterDict) or type(state) is not dict:
            self._refuse(f"a {type(target).__name__} is given a state, which only lists and dicts of parameters have")
        items = state.get("_parameters")
        if type(items) is not dict or not all(type(item) is StoredTensor for item in items.values()):
            self._refuse("a list of parameters that holds something else")
        if isinstance(target, _ParameterDict):
            target.update(items)
            return
        names = [str(number) for number in range(len(items))]
        if set(items) != set(names) or state.get("_size", len(items)) != len(items):
            self._refuse(f"a list of {len(items)} parameters that are not numbered from 0 on")
        if isinstance(target, _ParameterList):
            target[:] = [items[name] for name in names]

    def _storage(self, identity: object) -> _Storage:
        match identity:
            case ("storage", _Global() as kind, str() as key, str(), int() as count, *_):
                name = kind.rpartition(".")[2]
                if name in _STORAGES or name == "UntypedStorage":
                    return _Storage(_STORAGES.get(name, ""), key, count)
        return self._refuse("it refers to something that is no storage of a tensor")

    def _tensor(self, storage: _Storage, dtype: str, offset: object, shape: object, strides: object) -> StoredTensor:
        if not (_are_counts((offset, storage.count)) and _are_counts(shape) and _are_counts(strides)):
            self._refuse(f"a tensor's offset, shape and strides must be counts, of at most {_RANK_MAX} axes")
        if dtype not in _DTYPES or storage.dtype not in ("", dtype):
            self._refuse(f"a tensor of the data type {dtype!r:.80} in a storage of {storage.dtype!r}")
        place = Place(dtype, storage.key, storage.count, not storage.dtype, cast(int, offset), shape, strides)
        return self._make_tensor(place)


def _are_counts(value: object) -> TypeGuard[tuple[int, ...]]:
    if type(value) is not tuple or len(value) > _RANK_MAX:
        return False
    return all(type(item) is int and 0 <= item < 1 << 62 for item in value)
