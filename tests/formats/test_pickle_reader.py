"""The pickle interpreter: plain data out, whatever goes in, and nothing of it runs."""

from __future__ import annotations

import collections
import contextlib
import os
import pickle
import random
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmconv.errors import SourceError
from glmconv.formats.pickle_reader import Global, Object, read_pickle
from glmconv.formats.pickle_writer import write_pickle

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4) | st.tuples(inner, inner),
    max_leaves=30,
)


@settings(max_examples=200, deadline=None)
@given(plain, st.integers(2, 5))
def test_plain_data_comes_back(value: object, protocol: int) -> None:
    assert read_pickle(pickle.dumps(value, protocol), file="p") == value


@settings(max_examples=200, deadline=None)
@given(plain)
def test_what_we_write_python_reads(value: object) -> None:
    assert pickle.loads(write_pickle(value)) == value


def test_an_ordered_dict_is_a_dict_and_a_class_is_a_name() -> None:
    found = read_pickle(pickle.dumps({"o": collections.OrderedDict(a=1), "c": Path("/tmp")}), file="p")
    assert isinstance(found, dict)
    assert found["o"] == {"a": 1}
    assert isinstance(found["c"], Object)
    assert isinstance(found["c"].cls, Global)


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch /tmp/glmconv-canary",)


def test_a_reduce_is_an_inert_record_and_does_not_run() -> None:
    canary = Path("/tmp/glmconv-canary")
    canary.unlink(missing_ok=True)
    found = read_pickle(pickle.dumps({"x": Evil()}), file="p")
    assert isinstance(found, dict)
    assert isinstance(found["x"], Object)
    assert not canary.exists()


HOSTILE = {
    "empty": b"",
    "no end": b"\x80\x02N",
    "nothing on the stack": b"\x80\x02.",
    "two values": b"\x80\x02NN.",
    "newer protocol": b"\x80\x09N.",
    "unknown opcode": b"\x80\x02\xff.",
    "inst": b"\x80\x02(ios\nsystem\n.",
    "obj": b"\x80\x02(cos\nsystem\no.",
    "extension": b"\x80\x02\x82\x01.",
    "text persistent id": b"\x80\x02Pabc\n.",
    "out of band buffer": b"\x80\x05\x97.",
    "huge string": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "huge string, 8 bytes": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
    "huge bytes": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\xffabc.",
    "huge bytearray": b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
    "huge frame": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xffN.",
    "long integer": b"\x80\x02\x8a\xff" + b"\x01" * 255 + b".",
    "long4 integer": b"\x80\x02\x8b\xff\xff\xff\x7f\x01.",
    "memo too high": b"\x80\x02Nr\xff\xff\xff\xff.",
    "unset memo": b"\x80\x02h\x05.",
    "unset long memo": b"\x80\x02j\x05\x00\x00\x00.",
    "no mark": b"\x80\x02Nt.",
    "append to a string": b"\x80\x02X\x01\x00\x00\x00aNa.",
    "set on a list": b"\x80\x02]NNs.",
    "odd items": b"\x80\x02}(Nu.",
    "a list as a key": b"\x80\x02}]Ns.",
    "a dict as a key": b"\x80\x02}}Ns.",
    "call of a string": b"\x80\x02X\x01\x00\x00\x00a)R.",
    "call with a list": b"\x80\x02cos\nsystem\n]R.",
    "keywords": b"\x80\x04cos\nsystem\n)}X\x01\x00\x00\x00aNs\x92.",
    "build on a number": b"\x80\x02K\x01}b.",
    "not utf-8": b"\x80\x02X\x01\x00\x00\x00\xff.",
    "global without end": b"\x80\x02c" + b"a" * 5000,
    "stack global of numbers": b"\x80\x04K\x01K\x02\x93.",
    "deep lists": b"\x80\x02" + b"]" * 1000 + b"a" * 999 + b".",
    "deep tuples": b"\x80\x02)" + b"\x85" * 1000 + b".",
    "doubled tuple as a key": b"\x80\x02}K\x01" + b"2\x86" * 40 + b"Ns.",
    "doubled tuple": b"\x80\x02K\x01" + b"2\x86" * 100_000 + b".",
    "marks": b"\x80\x02" + b"(" * 1_000_000 + b".",
    "pops": b"\x80\x02" + b"0" * 100 + b".",
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "a list in its own item": b"\x80\x02]q\x00]h\x00aa.",
    "a list that grows once it is shared": b"\x80\x02]q\x00]q\x01(h\x00h\x00e0h\x00Na.",
    "a record in its own state": b"\x80\x02cargparse\nNamespace\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb.",
    "wrapped upwards": b"\x80\x02]q\x00" + b"]h\x00aq\x00" * 1000 + b".",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_refused_at_once(name: str) -> None:
    began = time.monotonic()
    with pytest.raises(SourceError) as caught:
        read_pickle(HOSTILE[name], file="evil")
    assert time.monotonic() - began < 10
    assert len(caught.value.line) < 500


SHARED = [1, 2]
BENIGN = {
    "protocol 5": b"\x80\x05N.",
    "a list under two keys": pickle.dumps({"a": SHARED, "b": SHARED}, 2),
    "a list twice in a list": pickle.dumps([SHARED, SHARED], 4),
    "60 deep": b"\x80\x02" + b"]" * 60 + b"a" * 59 + b".",
    "a tuple of numbers as a key": b"\x80\x02}K\x01K\x02\x86Ns.",
    "16 byte integer": b"\x80\x02\x8a\x10" + b"\x01" * 16 + b".",
}


@pytest.mark.parametrize("name", BENIGN)
def test_the_benign_twin_is_read(name: str) -> None:
    read_pickle(BENIGN[name], file="fine")


def test_random_opcodes_end_in_data_or_in_our_error() -> None:
    rng = random.Random(20261121)
    seeds = [pickle.dumps({"a": [1, (2, "x")], "p": Path("/x")}, p) for p in (2, 4, 5)] + list(BENIGN.values())
    for _ in range(20_000):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with contextlib.suppress(SourceError):
            read_pickle(bytes(data), file="fuzz")


def test_a_long_line_of_empty_containers_is_bounded() -> None:
    with pytest.raises(SourceError):
        read_pickle(b"\x80\x02(" + b"]" * 60_000_000, file="evil", limit=32 << 20)


def test_integers_of_every_width_come_back() -> None:
    for value in (0, 255, 256, 65535, 65536, 2**31 - 1, 2**31, -1, -(2**31), -(2**31) - 1, 2**62):
        assert pickle.loads(write_pickle(value)) == value == read_pickle(write_pickle(value), file="p")
