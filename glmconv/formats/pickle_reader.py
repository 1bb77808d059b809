"""A budgeted interpreter for the pickles that checkpoints hold. It looks up no class and runs no code: what comes out is plain data.

A global is a name (`Global`), a call of one an inert record (`Object`); whoever reads the result knows the few names it expects. Every
opcode costs a bounded amount, nothing is hashed or compared deeply, and what a header word claims is held against what is left.
Source: Python's pickletools for the opcodes of protocols 2 to 5; what Python's own pickler never emits for such data is refused.
"""

from __future__ import annotations

import struct

from glmconv.errors import SourceError
from glmconv.formats.pickle_machine import Machine, Step
from glmconv.formats.pickle_values import Budget, Global, Object, PersistentId

__all__ = ["LARGEST", "PLAIN_BUDGET", "Budget", "Global", "Object", "PersistentId", "read_pickle"]

LARGEST = 256 << 20
TEXT_LARGEST = 1 << 20
PLAIN_BUDGET = Budget(1_000_000, 48 << 20)  # a run's arguments take some 10,000 opcodes


def _number(size: int, signed: bool = False) -> Step:
    return lambda m: m.stack.append(int.from_bytes(m.take(size), "little", signed=signed))


def _constant(value: object) -> Step:
    return lambda m: m.stack.append(value)


def _text(size: int) -> Step:
    def step(m: Machine) -> None:
        length = m.word(size)
        if length > TEXT_LARGEST:
            m.fail(f"a string of {length:,} bytes")
        m.stack.append(m.text(m.take(length)))

    return step


def _bytes(size: int) -> Step:
    def step(m: Machine) -> None:
        part = m.take(m.word(size))
        m.charge(len(part) + 33)
        m.stack.append(part)

    return step


def _long(m: Machine) -> None:
    size = m.word(1)
    if size > 16:
        m.fail("an integer of more than 16 bytes")
    m.stack.append(int.from_bytes(m.take(size), "little", signed=True))


def _tuple(count: int) -> Step:
    return lambda m: m.push_tuple([m.pop() for _ in range(count)][::-1])


def _append(m: Machine) -> None:
    item = m.pop()
    m.extend(m.target(), [item])


def _appends(m: Machine) -> None:
    items = m.to_mark()
    m.extend(m.target(), items)


def _set_item(m: Machine) -> None:
    value, key = m.pop(), m.pop()
    m.set_items(m.target(), [key, value])


def _set_items(m: Machine) -> None:
    items = m.to_mark()
    m.set_items(m.target(), items)


def _frozen_set(m: Machine) -> None:
    items = m.to_mark()
    m.push_open([])
    m.extend(m.target(), items)


def _global(m: Machine) -> None:
    module = m.line()
    m.push_name(Global(module, m.line()))


def _stack_global(m: Machine) -> None:
    name, module = m.pop(), m.pop()
    if not isinstance(name, str) or not isinstance(module, str) or len(name) + len(module) > 1024:
        m.fail("a global's name is no string")
    m.push_name(Global(module, name))


def _call(m: Machine) -> None:
    args, cls = m.pop(), m.pop()
    m.call(cls, args)


def _new_object_ex(m: Machine) -> None:
    keywords, args, cls = m.pop(), m.pop(), m.pop()
    if not isinstance(keywords, dict) or keywords:
        m.fail("an object is made with keywords")
    m.kept.append(keywords)
    m.call(cls, args)


def _persistent(m: Machine) -> None:
    value = m.pop()
    m.charge(56)
    m.stack.append(PersistentId(value, m.close([value]) + 1))
    m.forget(value)


def _protocol(m: Machine) -> None:
    if m.at != 1 or not 2 <= m.word(1) <= 5:
        m.fail("its protocol is none of 2 to 5")


def _frame(m: Machine) -> None:
    length = m.word(8)
    if length > len(m.data) - m.at:
        m.fail("a frame is longer than the file")


OPCODES: dict[int, Step] = {
    0x80: _protocol, 0x95: _frame, ord("("): lambda m: m.marks.append(len(m.stack)),
    ord("N"): _constant(None), 0x88: _constant(True), 0x89: _constant(False), ord(")"): _constant(()),
    ord("M"): _number(2), ord("J"): _number(4, signed=True), 0x8A: _long,
    ord("G"): lambda m: m.stack.append(struct.unpack(">d", m.take(8))[0]),
    ord("X"): _text(4), 0x8C: _text(1), 0x8D: _text(8),
    ord("B"): _bytes(4), ord("C"): _bytes(1), 0x8E: _bytes(8), 0x96: _bytes(8),
    0x85: _tuple(1), 0x86: _tuple(2), 0x87: _tuple(3), ord("t"): lambda m: m.push_tuple(m.to_mark()),
    ord("]"): lambda m: m.push_open([]), 0x8F: lambda m: m.push_open([]), ord("}"): lambda m: m.push_open({}),
    ord("a"): _append, ord("e"): _appends, 0x90: _appends, 0x91: _frozen_set, ord("s"): _set_item, ord("u"): _set_items,
    ord("c"): _global, 0x93: _stack_global, ord("R"): _call, 0x81: _call, 0x92: _new_object_ex, ord("b"): Machine.build, ord("Q"): _persistent,
}  # fmt: skip


def read_pickle(data: bytes, *, file: object, limit: int = LARGEST, budget: Budget = PLAIN_BUDGET) -> object:
    """The plain data that a pickle describes; SourceError for any opcode, length, depth, key or cost that a checkpoint has no use for."""
    if len(data) > limit:
        raise SourceError(f"is a pickle of {len(data):,} bytes; at most {limit:,} are read.", file=file)
    return Machine(data, file, budget, OPCODES).run()
