"""A budgeted interpreter for the pickles that checkpoints hold. It looks up no class and runs no code: what comes out is plain data.

A global is a name (`Global`), a call of one an inert record (`Object`); whoever reads the result knows the few names it expects. Every
opcode costs a bounded amount, nothing is copied, hashed or compared deeply, and what a header word claims is held against what is left.
Source: Python's pickletools for the opcodes of protocols 2 to 5.
"""

from __future__ import annotations

import gc
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from glmconv.errors import SourceError

LARGEST = 256 << 20
DEEPEST = 64
MEMO_LARGEST = 1 << 24
OPCODES = 40_000_000
CONTAINERS = ("collections.OrderedDict", "builtins.set", "builtins.frozenset", "builtins.dict", "builtins.list")


@dataclass(frozen=True, slots=True)
class Global:
    """The name of something importable; never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False, repr=False)
class Object:
    """A call of a global that was not made: its name, its arguments, the state set on it afterwards."""

    cls: object
    args: tuple[object, ...]
    state: object = None
    items: dict[object, object] | None = None
    elements: list[object] | None = None

    def field(self, name: str) -> object:
        """A member of the state, if the state is a dict."""
        return self.state.get(name) if isinstance(self.state, dict) else None

    def named(self, *names: str) -> bool:
        return isinstance(self.cls, Global) and str(self.cls) in names


@dataclass(frozen=True, slots=True, eq=False)
class PersistentId:
    """A reference to something beside the pickle, such as a tensor's storage."""

    value: object


class Mark:
    pass


MARK = Mark()
NESTING = {list, tuple, dict, Object, PersistentId}


class Machine:
    """One run over one pickle."""

    def __init__(self, data: bytes, file: object) -> None:
        self.data, self.file, self.at = data, file, 0
        self.stack: list[object] = []
        self.memo: dict[int, object] = {}
        self.depths: dict[int, int] = {}
        self.kept: list[object] = []

    def fail(self, what: str) -> SourceError:
        return SourceError(f"is no pickle that a checkpoint needs: {what}.", file=self.file, offset=self.at)

    def run(self) -> object:
        """Step through the opcodes. The dozen that make up nearly all of a large .metadata stand here in line; the others are in STEPS."""
        data, stack, memo, end = self.data, self.stack, self.memo, len(self.data)
        budget = OPCODES
        at = 0
        while at < end:
            code = data[at]
            at += 1
            budget -= 1
            if code == 0x94:
                memo[len(memo)] = stack[-1] if stack else self.top()
            elif code == 0x68 and at < end:
                stack.append(memo[data[at]] if data[at] in memo else self.unset(at))
                at += 1
            elif code == 0x6A and at + 4 <= end:
                slot = int.from_bytes(data[at : at + 4], "little")
                stack.append(memo[slot] if slot in memo else self.unset(at))
                at += 4
            elif code == 0x4B and at < end:
                stack.append(data[at])
                at += 1
            elif code == 0x4D and at + 2 <= end:
                stack.append(data[at] | data[at + 1] << 8)
                at += 2
            elif code == 0x28:
                stack.append(MARK)
            elif code == 0x2E:
                self.at = at
                value = self.pop()
                if stack:
                    raise self.fail("more than one value is on the stack")
                return value
            else:
                self.at = at
                step = STEPS.get(code)
                if step is None or budget < 0:
                    raise self.fail(f"opcode {code:#04x} is not used by checkpoints" if step is None else f"it has more than {OPCODES:,} opcodes")
                step(self)
                at = self.at
        self.at = at
        raise self.fail("it has no end")

    def unset(self, at: int) -> object:
        self.at = at
        raise self.fail("an unset memo slot is read")

    def take(self, size: int) -> bytes:
        if size < 0 or size > len(self.data) - self.at:
            raise self.fail(f"{size:,} bytes are claimed, {len(self.data) - self.at:,} are left")
        part = self.data[self.at : self.at + size]
        self.at += size
        return part

    def word(self, form: str) -> int:
        value = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        assert isinstance(value, int)
        return value

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + 1025)
        if end < 0:
            raise self.fail("a line without end")
        part = self.data[self.at : end]
        self.at = end + 1
        return self.text(part)

    def text(self, part: bytes) -> str:
        try:
            return part.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail("a string that is not UTF-8") from None

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self) -> object:
        if not self.stack or self.stack[-1] is MARK:
            raise self.fail("the stack is empty")
        return self.stack.pop()

    def top(self) -> object:
        if not self.stack or self.stack[-1] is MARK:
            raise self.fail("the stack is empty")
        return self.stack[-1]

    def to_mark(self) -> list[object]:
        for n in range(len(self.stack) - 1, -1, -1):
            if self.stack[n] is MARK:
                items = self.stack[n + 1 :]
                del self.stack[n:]
                return items
        raise self.fail("no mark is on the stack")

    def made(self, value: object, inside: Iterable[object] = ()) -> object:
        """Note how deep a new container is nested. Plain contents need no note, and a noted container is kept alive so that its id stays its own."""
        self.contain(value, inside)
        return value

    def contain(self, value: object, inside: Iterable[object]) -> None:
        depths, deepest = self.depths, 0
        for item in inside:
            if type(item) in NESTING:
                found = depths.get(id(item), 1)
                if found > deepest:
                    deepest = found
        if deepest:
            if deepest >= DEEPEST:
                raise self.fail(f"values are nested more than {DEEPEST} deep")
            if deepest + 1 > depths.get(id(value), 1):
                depths[id(value)] = deepest + 1
                self.kept.append(value)

    def extend(self, target: object, items: list[object]) -> None:
        if isinstance(target, Object):
            target.elements = target.elements if target.elements is not None else []
            target.elements.extend(items)
        elif isinstance(target, list):
            target.extend(items)
        else:
            raise self.fail("items are appended to no list")
        self.contain(target, items)

    def set_items(self, target: object, items: list[object]) -> None:
        if len(items) % 2:
            raise self.fail("a key without a value")
        if isinstance(target, Object):
            target.items = target.items if target.items is not None else {}
            into = target.items
        elif isinstance(target, dict):
            into = target
        else:
            raise self.fail("items are set on no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            into[self.key(key)] = value
        self.contain(target, items)

    def key(self, key: object) -> object:
        """A string, an integer, or a record standing for itself: hashing a tuple of tuples can take for ever."""
        if key is None or isinstance(key, (str, int, bytes, float, Global)):
            return key
        if isinstance(key, (Object, PersistentId)):
            return key
        if isinstance(key, tuple) and len(key) <= 16 and all(isinstance(item, (str, int)) for item in key):
            return key
        raise self.fail("a dict key is neither a string nor a number nor a record")

    def put(self, slot: int) -> None:
        if slot > MEMO_LARGEST:
            raise self.fail("a memo slot is too high")
        self.memo[slot] = self.top()

    def get(self, slot: int) -> None:
        if slot not in self.memo:
            raise self.fail("an unset memo slot is read")
        self.push(self.memo[slot])

    def call(self, cls: object, args: object) -> object:
        if not isinstance(cls, Global) or not isinstance(args, tuple):
            raise self.fail("something that is no name is called")
        if str(cls) in CONTAINERS and not args:
            return self.made({} if "dict" in cls.name.lower() else [])
        return self.made(Object(cls, args), (args,))

    def build(self, target: object, state: object) -> None:
        if isinstance(target, Object) and target.state is None:
            target.state = state
            self.contain(target, (state,))
        elif not isinstance(target, (dict, list)):
            raise self.fail("a state is set on something that has none")


Step = Callable[[Machine], None]


def _number(form: str) -> Step:
    return lambda m: m.push(m.word(form))


def _text(form: str) -> Step:
    return lambda m: m.push(m.text(m.take(m.word(form))))


def _bytes(form: str) -> Step:
    return lambda m: m.push(m.take(m.word(form)))


def _constant(value: object) -> Step:
    return lambda m: m.push(value)


def _long(m: Machine) -> None:
    size = m.take(1)[0]
    if size > 16:
        raise m.fail("an integer of more than 16 bytes")
    m.push(int.from_bytes(m.take(size), "little", signed=True))


def _tuple(count: int) -> Step:
    def step(m: Machine) -> None:
        items = [m.pop() for _ in range(count)][::-1]
        m.push(m.made(tuple(items), items))

    return step


def _tuple_mark(m: Machine) -> None:
    items = m.to_mark()
    m.push(m.made(tuple(items), items))


def _list_mark(m: Machine) -> None:
    items = m.to_mark()
    m.push(m.made(items, items))


def _dict_mark(m: Machine) -> None:
    items = m.to_mark()
    target: dict[object, object] = {}
    m.made(target)
    m.set_items(target, items)
    m.push(target)


def _empty(kind: Callable[[], object]) -> Step:
    return lambda m: m.push(m.made(kind()))


def _append(m: Machine) -> None:
    item = m.pop()
    m.extend(m.top(), [item])


def _appends(m: Machine) -> None:
    items = m.to_mark()
    m.extend(m.top(), items)


def _set_item(m: Machine) -> None:
    value, key = m.pop(), m.pop()
    m.set_items(m.top(), [key, value])


def _set_items(m: Machine) -> None:
    items = m.to_mark()
    m.set_items(m.top(), items)


def _global(m: Machine) -> None:
    module = m.line()
    m.push(Global(module, m.line()))


def _stack_global(m: Machine) -> None:
    name, module = m.pop(), m.pop()
    if not isinstance(name, str) or not isinstance(module, str) or len(name) + len(module) > 1024:
        raise m.fail("a global's name is no string")
    m.push(Global(module, name))


def _call(m: Machine) -> None:
    args, cls = m.pop(), m.pop()
    m.push(m.call(cls, args))


def _new_object_ex(m: Machine) -> None:
    keywords, args, cls = m.pop(), m.pop(), m.pop()
    if keywords != {}:
        raise m.fail("an object is made with keywords")
    m.push(m.call(cls, args))


def _build(m: Machine) -> None:
    state = m.pop()
    m.build(m.top(), state)


def _persistent(m: Machine) -> None:
    value = m.pop()
    m.push(m.made(PersistentId(value), (value,)))


def _pop(m: Machine) -> None:
    if not m.stack:
        raise m.fail("the stack is empty")
    m.stack.pop()


def _protocol(m: Machine) -> None:
    if m.take(1)[0] > 5:
        raise m.fail("its protocol is newer than 5")


def _frozen_set(m: Machine) -> None:
    items = m.to_mark()
    m.push(m.made(items, items))


def _frame(m: Machine) -> None:
    if m.word("<Q") > len(m.data) - m.at:
        raise m.fail("a frame is longer than the file")


STEPS: dict[int, Step] = {
    0x80: _protocol, 0x95: _frame,
    ord("("): lambda m: m.stack.append(MARK), ord("0"): _pop, ord("1"): lambda m: (m.to_mark(), None)[1], ord("2"): lambda m: m.push(m.top()),
    ord("N"): _constant(None), 0x88: _constant(True), 0x89: _constant(False),
    ord("K"): _number("<B"), ord("M"): _number("<H"), ord("J"): _number("<i"), 0x8A: _long,
    ord("G"): lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    ord("X"): _text("<I"), 0x8C: _text("<B"), 0x8D: _text("<Q"),
    ord("U"): _bytes("<B"), ord("T"): _bytes("<I"), ord("B"): _bytes("<I"), ord("C"): _bytes("<B"), 0x8E: _bytes("<Q"), 0x96: _bytes("<Q"),
    ord(")"): _empty(tuple), 0x85: _tuple(1), 0x86: _tuple(2), 0x87: _tuple(3), ord("t"): _tuple_mark,
    ord("]"): _empty(list), ord("l"): _list_mark, ord("a"): _append, ord("e"): _appends,
    ord("}"): _empty(dict), ord("d"): _dict_mark, ord("s"): _set_item, ord("u"): _set_items,
    0x8F: _empty(list), 0x90: _appends, 0x91: _frozen_set,
    ord("q"): lambda m: m.put(m.word("<B")), ord("r"): lambda m: m.put(m.word("<I")), 0x94: lambda m: m.put(len(m.memo)),
    ord("h"): lambda m: m.get(m.word("<B")), ord("j"): lambda m: m.get(m.word("<I")),
    ord("c"): _global, 0x93: _stack_global, ord("R"): _call, 0x81: _call, 0x92: _new_object_ex, ord("b"): _build, ord("Q"): _persistent,
}  # fmt: skip


def read_pickle(data: bytes, *, file: object, limit: int = LARGEST) -> object:
    """The plain data that a pickle describes; SourceError for any opcode, length, depth or key that a checkpoint has no use for."""
    if len(data) > limit:
        raise SourceError(f"is a pickle of {len(data):,} bytes; at most {limit:,} are read.", file=file)
    if not data:
        raise SourceError("is an empty pickle.", file=file)
    collecting = gc.isenabled()
    gc.disable()  # a million small containers, none of them garbage yet: the collector would walk them all again and again
    try:
        return Machine(data, file).run()
    finally:
        if collecting:
            gc.enable()
