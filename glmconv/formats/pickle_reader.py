"""A budgeted interpreter for the pickles that checkpoints hold. It looks up no class and runs no code: what comes out is plain data.

A global is a name (`Global`), a call of one an inert record (`Object`); whoever reads the result knows the few names it expects. Every
opcode costs a bounded amount, nothing is hashed or compared deeply, and what a header word claims is held against what is left.
A container may be filled only while it is being made: once it stands in another one it is finished, so there are no cycles, and depths are exact.
Source: Python's pickletools for the opcodes of protocols 2 to 5; what Python's own pickler never emits for such data is refused.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from glmconv.errors import SourceError

LARGEST = 256 << 20
DEEPEST = 64
MEMO_LARGEST = 1 << 24
STACK_LARGEST = 1 << 18  # Python's pickler sets and appends in batches of 1,000
NUMBER_KEYS = 1 << 14  # the hash of a number is no secret: keys can be made to collide
TEXT_LARGEST = 1 << 20
SMALL = 16  # containers up to here are measured again rather than remembered
BURST = 4096  # opcodes between two looks at the budget


@dataclass(frozen=True, slots=True)
class Budget:
    """What one pickle may cost: opcodes, and roughly the bytes of memory that its values take."""

    steps: int
    memory: int


PLAIN_BUDGET = Budget(2_000_000, 64 << 20)


@dataclass(frozen=True, slots=True)
class Global:
    """The name of something importable; never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False, repr=False)
class Object:
    """A call of a global that was not made: its name, its arguments, the state set on it and what was put into it afterwards."""

    cls: object
    args: tuple[object, ...] = ()
    state: object = None
    items: dict[object, object] | None = None
    elements: list[object] | None = None
    depth: int = 1

    def field(self, name: str) -> object:
        """A member of the state, if the state is a dict."""
        return self.state.get(name) if isinstance(self.state, dict) else None

    def named(self, *names: str) -> bool:
        return isinstance(self.cls, Global) and str(self.cls) in names


@dataclass(slots=True, eq=False, repr=False)
class PersistentId:
    """A reference to something beside the pickle, such as a tensor's storage."""

    value: object
    depth: int = 1


NESTING = frozenset({tuple, list, dict, Object, PersistentId})
# Calls whose result is plain data. Sets become lists; protocol 2 spells bytes as text that is to be encoded.
PLAIN = {
    Global(module, name): kind
    for module in ("builtins", "__builtin__")
    for name, kind in (("dict", "dict"), ("list", "list"), ("set", "list"), ("frozenset", "list"), ("tuple", "tuple"), ("bytes", "bytes"))
} | {Global("collections", "OrderedDict"): "dict", Global("torch", "Size"): "tuple", Global("_codecs", "encode"): "encode"}


class Machine:
    """One run over one pickle."""

    def __init__(self, data: bytes, file: object, budget: Budget) -> None:
        self.data, self.file, self.at = data, file, 0
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: list[object] = []  # slots in the order of their numbers, as picklers give them
        self.far: dict[int, object] = {}  # all others
        self.open: set[int] = set()  # ids of the containers that are still being filled
        self.depths: dict[int, int] = {}  # ids of containers that are deep or large
        self.kept: list[object] = []  # what would die and leave its id to another
        self.steps, self.memory = budget.steps, budget.memory
        self.number_keys = NUMBER_KEYS

    def fail(self, what: str) -> NoReturn:
        raise SourceError(f"is no pickle that a checkpoint needs: {what}.", file=self.file, offset=self.at)

    def run(self) -> object:
        """Interpret up to STOP. The opcodes inlined here are nine of ten in a real `.metadata`."""
        try:
            while True:
                if self._burst():
                    return self._result()
                self.steps -= BURST
                if self.steps < 0 or len(self.stack) > STACK_LARGEST or len(self.marks) > STACK_LARGEST:
                    self.fail("it has too many opcodes or values")
        except IndexError:
            self.fail("it ends early, or takes more than there is")

    def _burst(self) -> bool:
        """The next opcodes; True after STOP. IndexError past the end of the data, the stack or the memo."""
        data, stack, memo, marks, at = self.data, self.stack, self.memo, self.marks, self.at
        for _ in range(BURST):
            code = data[at]
            if code == 0x71 or code == 0x72 or code == 0x94:  # BINPUT, LONG_BINPUT, MEMOIZE
                slot = data[at + 1] if code == 0x71 else len(memo) if code == 0x94 else int.from_bytes(data[at + 1 : at + 5], "little")
                self.at = at
                at += 2 if code == 0x71 else 1 if code == 0x94 else 5
                if slot == len(memo) and not self.far:
                    memo.append(stack[-1])
                else:
                    self._put_far(slot)
            elif code == 0x68 or code == 0x6A:  # BINGET, LONG_BINGET
                slot = data[at + 1] if code == 0x68 else int.from_bytes(data[at + 1 : at + 5], "little")
                self.at = at
                at += 2 if code == 0x68 else 5
                value = memo[slot] if slot < len(memo) else self._get_far(slot)
                if id(value) in self.open:
                    self.fail("a container is put into itself")
                stack.append(value)
            elif code == 0x4B:  # BININT1
                stack.append(data[at + 1])
                at += 2
            elif code == 0x28:  # MARK
                marks.append(len(stack))
                at += 1
            elif code == 0x2E:  # STOP
                self.at = at + 1
                return True
            else:
                self.at = at + 1
                step = STEPS.get(code)
                if step is None:
                    self.fail(f"opcode {code:#04x} is not used by checkpoints")
                step(self)
                at = self.at
        self.at = at
        return False

    def _result(self) -> object:
        if self.at != len(self.data) or self.marks or len(self.stack) != 1:
            self.fail("something is left when it ends")
        return self.stack.pop()

    def _put_far(self, slot: int) -> None:
        if slot > MEMO_LARGEST or slot < len(self.memo) or slot in self.far:
            self.fail("a memo slot is too high or set twice")
        self.charge(100)
        self.far[slot] = self.stack[-1]

    def _get_far(self, slot: int) -> object:
        if slot not in self.far:
            self.fail("an unset memo slot is read")
        return self.far[slot]

    def charge(self, size: int) -> None:
        """Count `size` bytes of memory."""
        self.memory -= size
        if self.memory < 0:
            self.fail("its values would take too much memory")

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            self.fail(f"{size:,} bytes are claimed, {len(self.data) - self.at:,} are left")
        part = self.data[self.at : self.at + size]
        self.at += size
        return part

    def word(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def text(self, part: bytes) -> str:
        try:
            text = part.decode("utf-8")
        except UnicodeDecodeError:
            self.fail("a string that is not UTF-8")
        self.charge(sys.getsizeof(text))
        return text

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + 1025)
        if end < 0:
            self.fail("a line without end")
        part = self.data[self.at : end]
        self.at = end + 1
        return self.text(part)

    def pop(self) -> object:
        """The topmost value above the last mark."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            self.fail("a value is missing")
        return self.stack.pop()

    def to_mark(self) -> list[object]:
        if not self.marks:
            self.fail("no mark is on the stack")
        begin = self.marks.pop()
        items = self.stack[begin:]
        del self.stack[begin:]
        return items

    def target(self) -> object:
        """The container on top, which must still be open."""
        value = self.stack[-1]
        if id(value) not in self.open:
            self.fail("something is changed that is finished, or is no container")
        return value

    def push_open(self, value: object) -> None:
        self.charge(120)
        self.open.add(id(value))
        self.stack.append(value)

    def close(self, items: Sequence[object]) -> int:
        """The depth of the deepest of `items`, which are finished from now on."""
        if NESTING.isdisjoint(map(type, items)):
            return 0
        deepest = 0
        for item in items:
            if type(item) in NESTING:
                self.open.discard(id(item))
                deepest = max(deepest, self._depth(item))
        if deepest >= DEEPEST:
            self.fail(f"values are nested more than {DEEPEST} deep")
        return deepest

    def _depth(self, value: object) -> int:
        if isinstance(value, (Object, PersistentId)):
            return value.depth
        known = self.depths.get(id(value))
        if known is None:  # small, so this is cheap; finished, so it does not change
            assert isinstance(value, (list, tuple, dict))
            known = 1 + self.close([*value, *value.values()] if isinstance(value, dict) else value)
            self._remember(value, known)
        return known

    def _remember(self, value: tuple[object, ...] | list[object] | dict[object, object], depth: int) -> None:
        if depth > 1 or len(value) > SMALL:
            self.depths[id(value)] = max(depth, self.depths.get(id(value), 0))

    def forget(self, value: object) -> None:
        """Free the note on a small container that a record has swallowed; nobody asks for it again but to be refused or measured."""
        if isinstance(value, (tuple, dict)) and len(value) <= SMALL:
            self.depths.pop(id(value), None)

    def push_tuple(self, items: Sequence[object]) -> None:
        self.charge(48 + 40 * len(items))
        value = tuple(items)
        self._remember(value, self.close(value) + 1)
        self.stack.append(value)

    def extend(self, target: object, items: list[object]) -> None:
        self.charge(40 * len(items))
        depth = self.close(items) + 1
        if isinstance(target, list):
            target.extend(items)
            self._remember(target, depth)
        elif isinstance(target, Object):
            target.elements = target.elements or []
            target.elements.extend(items)
            target.depth = max(target.depth, depth)
        else:
            self.fail("items are appended to no list")

    def set_items(self, target: object, items: list[object]) -> None:
        if len(items) % 2:
            self.fail("a key without a value")
        self.charge(80 * len(items))
        depth = self.close(items) + 1
        if isinstance(target, Object):
            target.items = target.items or {}
            target.depth = max(target.depth, depth)
        into = target.items if isinstance(target, Object) else target
        if not isinstance(into, dict):
            self.fail("items are set on no dict")
        before = len(into)
        for n in range(0, len(items), 2):
            key = items[n]
            into[key if type(key) in (str, Object) else self.key(key)] = items[n + 1]
        if len(into) != before + len(items) // 2:
            self.fail("a dict has a key twice")
        if into is target:
            self._remember(into, depth)

    def key(self, key: object) -> object:
        """A string, a number, or a record standing for itself: hashing a tuple of tuples can take for ever."""
        if key is None or isinstance(key, (str, bytes, Global, Object)):
            return key
        small = isinstance(key, float) or (isinstance(key, int) and key.bit_length() <= 64)
        pair = isinstance(key, tuple) and len(key) <= 8 and all(isinstance(item, (str, bool)) or type(item) is int for item in key)
        if not small and not pair:
            self.fail("a dict key is neither a string nor a number nor a record")
        self.number_keys -= 1
        if self.number_keys < 0:
            self.fail("it has too many numbers as dict keys")
        return key

    def call(self, cls: object, args: object) -> None:
        """Push what a call of `cls` stands for. Only what is plain data anyway is made."""
        if not isinstance(cls, Global) or not isinstance(args, tuple):
            self.fail("something that is no name is called")
        kind = PLAIN.get(cls)
        if kind is None or not self._call_plain(kind, args):
            depth = self._depth(args) + 1
            if depth > DEEPEST:
                self.fail(f"values are nested more than {DEEPEST} deep")
            self.push_open(Object(cls, args, None, None, None, depth))
        self.forget(args)

    def _call_plain(self, kind: str, args: tuple[object, ...]) -> bool:
        """Push the value itself, if these are arguments that make one."""
        first = args[0] if args else None
        if not args and kind in ("dict", "list", "bytes"):
            if kind == "bytes":
                self.stack.append(b"")
            else:
                self.push_open({} if kind == "dict" else [])
        elif len(args) == 1 and ((kind == "list" and isinstance(first, list)) or (kind == "tuple" and isinstance(first, tuple))):
            self.stack.append(first)
        elif kind == "encode" and len(args) == 2 and isinstance(first, str) and args[1] == "latin1":
            self.stack.append(self.latin1(first))
        else:
            return False
        self.kept.append(args)
        return True

    def latin1(self, text: str) -> bytes:
        self.charge(len(text))
        try:
            return text.encode("latin1")
        except UnicodeEncodeError:
            self.fail("bytes that are none")

    def build(self) -> None:
        """Set a state. What is plain data by now has no place for one; it is only kept alive."""
        state = self.pop()
        target = self.target()
        depth = self.close([state]) + 1
        if depth > DEEPEST:
            self.fail(f"values are nested more than {DEEPEST} deep")
        if isinstance(target, Object):
            if target.state is not None:
                self.fail("a state is set twice")
            target.state = state
            target.depth = max(target.depth, depth)
            self.forget(state)
        else:
            self.kept.append(state)


Step = Callable[[Machine], None]


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
    m.stack.append(Global(module, m.line()))


def _stack_global(m: Machine) -> None:
    name, module = m.pop(), m.pop()
    if not isinstance(name, str) or not isinstance(module, str) or len(name) + len(module) > 1024:
        m.fail("a global's name is no string")
    m.charge(48)
    m.stack.append(Global(module, name))


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


STEPS: dict[int, Step] = {
    0x80: _protocol, 0x95: _frame,
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
    return Machine(data, file, budget).run()
