"""Writes the pickles that a checkpoint needs, protocol 2, without importing what they name. The same value gives the same bytes everywhere."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from glmconv.dtypes import DType
from glmconv.formats.pickle_reader import Global, Object

NAMESPACE = Global("argparse", "Namespace")


class Emitter:
    """The opcodes so far. Globals and strings are written once and then fetched from the memo."""

    def __init__(self) -> None:
        self.parts: list[bytes] = [b"\x80\x02"]
        self.memo: dict[object, int] = {}

    def emit(self, value: object) -> None:
        """One value: plain data, a Global (a name), an Object (a call with state), a DType (torch's)."""
        if value is None or value is True or value is False:
            self.parts.append({None: b"N", True: b"\x88", False: b"\x89"}[value])
        elif isinstance(value, int):
            self.integer(value)
        elif isinstance(value, float):
            self.parts.append(b"G" + struct.pack(">d", value))
        elif isinstance(value, str):
            raw = value.encode("utf-8")
            self.once(value, b"X" + struct.pack("<I", len(raw)) + raw)
        elif isinstance(value, DType):
            self.emit(Global("torch", value.name))
        elif isinstance(value, Global):
            self.once(value, f"c{value.module}\n{value.name}\n".encode())
        elif isinstance(value, tuple):
            self.tuple(value)
        elif isinstance(value, list):
            self.parts.append(b"](")
            for item in value:
                self.emit(item)
            self.parts.append(b"e")
        elif isinstance(value, Mapping):
            self.mapping(value)
        elif isinstance(value, Object):
            self.object(value)
        else:
            raise TypeError(f"a {type(value).__name__} is not written")

    def once(self, value: object, written: bytes) -> None:
        key = (type(value), value)
        if key in self.memo:
            slot = self.memo[key]
            self.parts.append(b"h" + bytes([slot]) if slot < 256 else b"j" + struct.pack("<I", slot))
            return
        slot = self.memo[key] = len(self.memo)
        self.parts.append(written + (b"q" + bytes([slot]) if slot < 256 else b"r" + struct.pack("<I", slot)))

    def integer(self, value: int) -> None:
        if 0 <= value < 256:
            self.parts.append(b"K" + bytes([value]))
        elif 0 <= value < 65536:
            self.parts.append(b"M" + struct.pack("<H", value))
        elif -(2**31) <= value < 2**31:
            self.parts.append(b"J" + struct.pack("<i", value))
        else:
            raw = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
            self.parts.append(b"\x8a" + bytes([len(raw)]) + raw)

    def tuple(self, value: tuple[object, ...]) -> None:
        if not 1 <= len(value) <= 3:
            self.parts.append(b"(" if value else b")")
        for item in value:
            self.emit(item)
        if value:
            self.parts.append({1: b"\x85", 2: b"\x86", 3: b"\x87"}.get(len(value), b"t"))

    def mapping(self, value: Mapping[object, object]) -> None:
        self.parts.append(b"}(")
        for key, item in value.items():
            self.emit(key)
            self.emit(item)
        self.parts.append(b"u")

    def object(self, value: Object) -> None:
        """Made by `cls.__new__(cls)` and a state when there are no arguments, else by a call `cls(*args)`."""
        self.emit(value.cls)
        self.tuple(value.args)
        self.parts.append(b"R" if value.args else b"\x81")
        if value.state is not None:
            self.emit(value.state)
            self.parts.append(b"b")


def write_pickle(value: object) -> bytes:
    """A pickle of plain data, `Global`, `Object` and `DType` values."""
    emitter = Emitter()
    emitter.emit(value)
    return b"".join([*emitter.parts, b"."])


def tensor_pickle(dtype: DType, shape: tuple[int, ...], in_list: bool = False) -> bytes:
    """data.pkl of torch.save(tensor), or of torch.save([tensor]): one contiguous tensor over storage "0", with torch's own memo numbers."""
    memo = iter(range(256))

    def put() -> bytes:
        return b"q" + bytes([next(memo)])

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode() + put()

    def numbers(values: tuple[int, ...]) -> bytes:
        emitter = Emitter()
        emitter.tuple(values)
        return b"".join(emitter.parts[1:]) + (put() if values else b"")

    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n if n else 1
    elements = 1
    for n in shape:
        elements *= n
    count = Emitter()
    count.integer(elements)
    parts = [b"\x80\x02", b"]" + put() if in_list else b"", b"ctorch._utils\n_rebuild_tensor_v2\n" + put(), b"((", text("storage")]
    parts += [f"ctorch\n{dtype.storage}\n".encode() + put(), text("0"), text("cpu"), count.parts[1], b"t" + put(), b"QK\x00"]
    parts += [numbers(tuple(shape)), numbers(tuple(reversed(strides))), b"\x89", b"ccollections\nOrderedDict\n" + put(), b")R" + put()]
    return b"".join([*parts, b"t" + put(), b"R" + put(), b"a." if in_list else b"."])
