"""Writes the pickles that a checkpoint needs, protocol 2, without importing what they name: the bytes that Python's own pickler gives.

Source: CPython's Modules/_pickle.c: containers, names and calls are memoized when made, lists and dicts are filled in batches of 1,000.
Python memoizes strings by identity, this writer by value: the same data gives the same bytes, wherever its strings came from.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from glmconv.dtypes import DType
from glmconv.formats.pickle_reader import Global, Object, PersistentId

NAMESPACE = Global("argparse", "Namespace")
BATCH = 1000
PYTHON_2 = {"builtins": "__builtin__"}  # protocol 2 spells modules as Python 2 did


def integer(value: int) -> bytes:
    """An integer as the shortest opcode holds it."""
    if 0 <= value < 256:
        return b"K" + value.to_bytes(1, "little")
    if 0 <= value < 65536:
        return b"M" + value.to_bytes(2, "little")
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    size = (value.bit_length() + 8) // 8
    if value < 0 and -value == 1 << (8 * size - 9):
        size -= 1  # Python drops the byte that a power of two does not need
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


class Emitter:
    """The opcodes so far, and the memo: by value for names and strings, by identity for containers, which the caller keeps alive."""

    def __init__(self) -> None:
        self.out = bytearray(b"\x80\x02")
        self.memo: dict[object, int] = {}
        self.slots = 0

    def finished(self) -> bytes:
        return bytes(self.out + b".")

    def emit(self, value: object) -> None:
        """One value: plain data, a Global (a name), an Object (a call with state), a DType (torch's), a PersistentId. TypeError for others."""
        if value is None or value is True or value is False:
            self.out += b"N" if value is None else b"\x88" if value else b"\x89"
        elif isinstance(value, int):
            self.out += integer(value)
        elif isinstance(value, float):
            self.out += b"G" + struct.pack(">d", value)
        elif isinstance(value, str):
            self.text(value)
        elif isinstance(value, bytes):
            self.bytes(value)
        elif isinstance(value, DType):
            self.name(Global("torch", value.name))
        elif isinstance(value, Global):
            self.name(value)
        elif isinstance(value, PersistentId):
            self.emit(value.value)
            self.out += b"Q"
        elif isinstance(value, tuple) and not value:
            self.out += b")"
        elif not self.fetch(id(value)):
            self.container(value)

    def container(self, value: object) -> None:
        if isinstance(value, tuple):
            self.tuple(value)
        elif isinstance(value, list):
            self.list(value)
        elif isinstance(value, Mapping):
            self.mapping(value)
        elif isinstance(value, Object):
            self.object(value)
        else:
            raise TypeError(f"a {type(value).__name__} is not written")

    def fetch(self, key: object) -> bool:
        """Write the memo's slot for `key`, if it has one."""
        slot = self.memo.get(key)
        if slot is not None:
            self.out += self.got(slot)
        return slot is not None

    @staticmethod
    def got(slot: int) -> bytes:
        return b"h" + slot.to_bytes(1, "little") if slot < 256 else b"j" + slot.to_bytes(4, "little")

    def put(self, key: object) -> None:
        slot = self.memo[key] = self.slots
        self.slots += 1
        self.out += b"q" + slot.to_bytes(1, "little") if slot < 256 else b"r" + slot.to_bytes(4, "little")

    def text(self, value: str) -> None:
        if not self.fetch(value):
            raw = value.encode("utf-8", "surrogatepass")
            self.out += b"X" + len(raw).to_bytes(4, "little") + raw
            self.put(value)

    def name(self, value: Global) -> None:
        if not self.fetch(value):
            self.out += f"c{PYTHON_2.get(value.module, value.module)}\n{value.name}\n".encode("ascii")
            self.put(value)

    def bytes(self, value: bytes) -> None:
        """Protocol 2 has no bytes: a call that encodes text."""
        call = Object(Global("_codecs", "encode"), (value.decode("latin1"), "latin1")) if value else None
        if call is None:
            self.name(Global("builtins", "bytes"))
            self.out += b")R"
            self.put((self.slots, "bytes"))
        else:
            self.name(Global("_codecs", "encode"))
            self.text(value.decode("latin1"))
            self.text("latin1")
            self.out += b"\x86"
            self.put((self.slots, "arguments"))
            self.out += b"R"
            self.put((self.slots, "bytes"))

    def tuple(self, value: tuple[object, ...]) -> None:
        self.out += b"(" if len(value) > 3 else b""
        for item in value:
            self.emit(item)
        self.out += {1: b"\x85", 2: b"\x86", 3: b"\x87"}.get(len(value), b"t")
        self.put(id(value))

    def list(self, value: Sequence[object]) -> None:
        self.out += b"]"
        self.put(id(value))
        for begin in range(0, len(value), BATCH):
            self.out += b"(" if len(value) > 1 else b""
            for item in value[begin : begin + BATCH]:
                self.emit(item)
            self.out += b"e" if len(value) > 1 else b"a"

    def mapping(self, value: Mapping[object, object]) -> None:
        if isinstance(value, OrderedDict):
            self.name(Global("collections", "OrderedDict"))
            self.out += b")R"
        else:
            self.out += b"}"
        self.put(id(value))
        items = list(value.items())
        for begin in range(0, len(items), BATCH):
            part = items[begin : begin + BATCH]
            alone = len(items) == 1 or (isinstance(value, OrderedDict) and len(part) == 1)
            self.out += b"" if alone else b"("
            for key, item in part:
                self.emit(key)
                self.emit(item)
            self.out += b"s" if alone else b"u"
        if items and len(items) % BATCH == 0 and not isinstance(value, OrderedDict):
            self.out += b"(u"  # Python looks once more whether something is left

    def object(self, value: Object) -> None:
        """Made by `cls.__new__(cls)` and a state when there are no arguments, else by a call `cls(*args)`."""
        self.emit(value.cls)
        self.emit(value.args)
        self.out += b"R" if value.args else b"\x81"
        self.put(id(value))
        if value.state is not None:
            self.emit(value.state)
            self.out += b"b"


def write_pickle(value: object) -> bytes:
    """A pickle of plain data, `Global`, `Object`, `PersistentId` and `DType` values; protocol 2, as torch.save asks for."""
    emitter = Emitter()
    emitter.emit(value)
    return emitter.finished()


def rebuilt_tensor(dtype: DType, shape: tuple[int, ...]) -> Object:
    """A contiguous tensor over the whole storage "0", as torch.Tensor reduces itself (torch._tensor.Tensor._reduce_ex_internal).

    Types that have no storage class of their own lie in an untyped storage counted in bytes, and are named at the end.
    """
    strides: list[int] = []
    step = 1
    for n in reversed(shape):
        strides.insert(0, step)
        step *= max(n, 1)
    elements = step if all(shape) else 0
    kind = Global("torch", dtype.storage) if dtype.storage else Global("torch.storage", "UntypedStorage")
    storage = PersistentId(("storage", kind, "0", "cpu", elements if dtype.storage else elements * dtype.itemsize))
    args = (storage, 0, tuple(shape), tuple(strides), False, OrderedDict[object, object]())
    if dtype.storage:
        return Object(Global("torch._utils", "_rebuild_tensor_v2"), args)
    return Object(Global("torch._utils", "_rebuild_tensor_v3"), (*args, dtype))
