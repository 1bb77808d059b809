"""The stack, the memo and the accounts of one run over one pickle; `pickle_reader` has the opcodes.

A container may be filled only while it is being made: once it stands in another one or is asked for again it is finished. So there are no
cycles, and its measure is exact: how deep it is nested (the low 7 bits) and how many items a walk over it would meet, shared ones each time
(the rest). Nothing that was made dies before the end (no slot, key or state is overwritten), so ids stay their own.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from glmconv.errors import SourceError
from glmconv.formats.pickle_values import PLAIN, Budget, Global, Object, PersistentId

DEEPEST = 64
MEMO_LARGEST = 1 << 24
STACK_LARGEST = 1 << 18  # Python's pickler sets and appends in batches of 1,000
NUMBER_KEYS = 1 << 14  # the hash of a number is no secret: keys can be made to collide
SMALL = 16  # containers up to here are measured again rather than remembered
BURST = 4096  # opcodes between two looks at the budget
NESTING = frozenset({tuple, list, dict, Object, PersistentId})
# The call torch.Size((1, 2, 3)) behind its name: the numbers, two tuples, each perhaps put into the memo. Half of a `.metadata` is that.
SIZE_CALL = re.compile(rb"((?:K.|M..|J....|\x8a\x05.{5}|\x8a\x06.{6}){1,3}[\x85-\x87])(\x94|q.|r....)?\x85(\x94|q.|r....)?R", re.DOTALL)
WIDTHS = {0x4B: 1, 0x4D: 2, 0x4A: 4}

Step = Callable[["Machine"], None]


class Machine:
    """One run over one pickle."""

    def __init__(self, data: bytes, file: object, budget: Budget, opcodes: Mapping[int, Step]) -> None:
        self.data, self.file, self.at, self.opcodes = data, file, 0, opcodes
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: list[object] = []  # slots in the order of their numbers, as picklers give them
        self.far: dict[int, object] = {}  # all others
        self.open: set[int] = set()  # ids of the containers that are still being filled
        self.measures: dict[int, int] = {}  # by ids of containers that are deep or large
        self.kept: list[object] = []  # what would die and leave its id to another
        self.kinds: dict[int, str] = {}  # ids of the names whose calls are plain data
        self.sizes: dict[bytes, tuple[int, ...]] = {}  # opcodes of shapes that came before
        self.latest, self.latest_measure = 0, 0  # id and measure of the container that was just filled
        self.steps, self.memory, self.walk = budget.steps, budget.memory, budget.steps
        self.number_keys = NUMBER_KEYS

    def fail(self, what: str, at: int | None = None) -> NoReturn:
        raise SourceError(f"is no pickle that a checkpoint needs: {what}.", file=self.file, offset=self.at if at is None else at)

    def run(self) -> object:
        """Interpret up to STOP. The opcodes inlined here are nine of ten in a real `.metadata`."""
        try:
            while True:
                if self._burst():
                    return self._result()
                self.steps -= BURST
                if self.steps < 0 or max(len(self.stack), len(self.marks)) > STACK_LARGEST or len(self.memo) > MEMO_LARGEST:
                    self.fail("it has too many opcodes or values")
        except IndexError:
            self.fail("it ends early, or takes more than there is")

    def _burst(self) -> bool:
        """The next opcodes; True after STOP. IndexError past the end of the data, the stack or the memo."""
        data, stack, memo, at, filling = self.data, self.stack, self.memo, self.at, self.open
        for _ in range(BURST):
            code = data[at]
            if code == 0x68 or code == 0x6A:  # BINGET, LONG_BINGET
                slot = data[at + 1] if code == 0x68 else int.from_bytes(data[at + 1 : at + 5], "little")
                at += 2 if code == 0x68 else 5
                value = memo[slot] if slot < len(memo) else self._get_far(slot, at)
                filling.discard(id(value))  # two may share it; whoever fills it from here on might put it into itself
                stack.append(value)
                if type(value) is Global and id(value) in self.kinds:
                    at = self._size_call(value, at)
            elif code == 0x94 and not self.far:  # MEMOIZE, which numbers the slots itself: other numbers beside it have no use
                memo.append(stack[-1])
                at += 1
            elif code == 0x71 or code == 0x72:  # BINPUT, LONG_BINPUT
                slot = data[at + 1] if code == 0x71 else int.from_bytes(data[at + 1 : at + 5], "little")
                at += 2 if code == 0x71 else 5
                self._put(slot, at)
            elif code == 0x4B:  # BININT1
                stack.append(data[at + 1])
                at += 2
            elif code == 0x2E:  # STOP
                self.at = at + 1
                return True
            else:
                self.at = at + 1
                step = self.opcodes.get(code)
                if step is None:
                    self.fail(f"opcode {code:#04x} is not used by checkpoints")
                step(self)
                at = self.at
        self.at = at
        return False

    def _result(self) -> object:
        if self.at != len(self.data) or self.marks or len(self.stack) != 1:
            self.fail("something is left when it ends")
        value = self.stack.pop()
        if type(value) in NESTING and self._measure(value) >> 7 > self.walk:
            self.fail("its values are doubled again and again")
        return value

    def _put(self, slot: int, at: int) -> None:
        if slot == len(self.memo) and not self.far:
            self.memo.append(self.stack[-1])
            return
        if slot > MEMO_LARGEST or slot < len(self.memo) or slot in self.far:
            self.fail("a memo slot is too high or set twice", at)
        self.charge(100)
        self.far[slot] = self.stack[-1]

    def _get_far(self, slot: int, at: int) -> object:
        if slot not in self.far:
            self.fail("an unset memo slot is read", at)
        return self.far[slot]

    def _size_call(self, name: Global, at: int) -> int:
        """If `name`, now on top, is called at `at` to make a torch.Size, do that at once; returns where to go on."""
        if self.kinds.get(id(name)) != "size" or self.far:
            return at
        call = SIZE_CALL.match(self.data, at)
        if call is None:
            return at
        numbers, *puts = call.groups()
        value = self.sizes.get(numbers) or _tuple_of(numbers)
        slot = len(self.memo)
        for put in puts:
            if put and put != b"\x94" and int.from_bytes(put[1:], "little") != slot:
                return at
            slot += bool(put)
        if value is None:
            return at
        self.sizes[numbers] = value
        self.charge(100)
        self.memo += [item for item, put in zip((value, (value,)), puts, strict=True) if put]
        self.stack[-1] = value
        return call.end()

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

    def push_name(self, name: Global) -> None:
        """A name, and a note if its calls are plain data."""
        self.charge(48)
        self.stack.append(name)
        kind = PLAIN.get(name)
        if kind is not None:
            self.kept.append(name)
            self.kinds[id(name)] = kind

    def push_open(self, value: object) -> None:
        self.charge(120)
        self.open.add(id(value))
        self.stack.append(value)

    def close(self, items: Sequence[object]) -> int:
        """The measure of `items` together, which are finished from now on. One more is that of a container of them."""
        weight = len(items)
        if NESTING.isdisjoint(map(type, items)):
            return weight << 7
        deepest = 0
        for item in items:
            if type(item) in NESTING:
                self.open.discard(id(item))
                measure = self._measure(item)
                weight += measure >> 7
                if measure & 127 > deepest:
                    deepest = measure & 127
        if deepest >= DEEPEST or weight > self.walk:
            self.fail(f"values are nested more than {DEEPEST} deep, or doubled again and again")
        return weight << 7 | deepest

    def _measure(self, value: object) -> int:
        if type(value) is Object or type(value) is PersistentId:
            return value.measure
        number = id(value)
        if number == self.latest:
            return self.latest_measure
        known = self.measures.get(number)
        if known is None:  # small, so this is cheap; finished, so it does not change
            assert isinstance(value, (list, tuple, dict))
            known = self.close([*value, *value.values()] if isinstance(value, dict) else value) + 1
            self._remember(value, known)
        return known

    def _remember(self, value: tuple[object, ...] | list[object] | dict[object, object], measure: int) -> None:
        if measure & 127 > 1 or len(value) > SMALL:
            self.measures[id(value)] = measure
        self.latest, self.latest_measure = id(value), measure

    def _added(self, value: list[object] | dict[object, object], before: int, added: int) -> None:
        """Note the measure of a container that had `before` items and was given some of the measure `added`."""
        known = self.measures.get(id(value), before << 7 | 1)
        self._remember(value, (known >> 7) + (added >> 7) << 7 | max(known & 127, (added & 127) + 1))

    def forget(self, value: object) -> None:
        """Free the note on a small container that a record has swallowed: asked for again, it would be measured again."""
        if isinstance(value, (tuple, dict)) and len(value) <= SMALL:
            self.measures.pop(id(value), None)

    def push_tuple(self, items: Sequence[object]) -> None:
        self.charge(48 + 40 * len(items))
        value = tuple(items)
        self._remember(value, self.close(value) + 1)
        self.stack.append(value)

    def extend(self, target: object, items: list[object]) -> None:
        self.charge(40 * len(items))
        added = self.close(items)
        if isinstance(target, list):
            target.extend(items)
            self._added(target, len(target) - len(items), added)
        elif isinstance(target, Object):
            target.elements = target.elements or []
            target.elements.extend(items)
            target.add(added)
        else:
            self.fail("items are appended to no list")

    def set_items(self, target: object, items: list[object]) -> None:
        if len(items) % 2:
            self.fail("a key without a value")
        self.charge(80 * len(items))
        added = self.close(items)
        if isinstance(target, Object):
            target.items = target.items or {}
            target.add(added)
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
            self._added(into, 2 * before, added)

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
        if type(cls) is not Global or type(args) is not tuple:
            self.fail("something that is no name is called")
        kind = self.kinds.get(id(cls))
        if kind is not None and self._call_plain(kind, args):
            return
        if not args:
            self.push_open(Object(cls))
            return
        self.push_open(Object(cls, args, None, None, None, self.close([args]) + 1))
        self.forget(args)

    def _call_plain(self, kind: str, args: tuple[object, ...]) -> bool:
        """Push the value itself, if these are arguments that make one."""
        first = args[0] if args else None
        if not args and kind in ("dict", "list", "bytes"):
            if kind == "bytes":
                self.stack.append(b"")
            else:
                self.push_open({} if kind == "dict" else [])
        elif len(args) == 1 and ((kind == "list" and isinstance(first, list)) or (kind in ("tuple", "size") and isinstance(first, tuple))):
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
        added = self.close([state])
        if not isinstance(target, Object):
            self.kept.append(state)
            return
        if target.state is not None:
            self.fail("a state is set twice")
        target.state = state
        target.add(added)
        self.forget(state)


def _tuple_of(opcodes: bytes) -> tuple[int, ...] | None:
    """The numbers pushed by some integer opcodes, if the tuple opcode at their end takes just them."""
    values, at = [], 0
    while opcodes[at] in (0x4B, 0x4D, 0x4A, 0x8A):
        code = opcodes[at]
        width, begin = (opcodes[at + 1], at + 2) if code == 0x8A else (WIDTHS[code], at + 1)
        values.append(int.from_bytes(opcodes[begin : begin + width], "little", signed=code in (0x4A, 0x8A)))
        at = begin + width
    return tuple(values) if at == len(opcodes) - 1 and len(values) == opcodes[at] - 0x84 else None
