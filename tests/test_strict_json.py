"""One meaning for every document, and no document that is dear to refuse."""

from __future__ import annotations

import json
import math
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from glmconv import strict_json
from glmconv.errors import SourceError
from glmconv.strict_json import BLOCK, CONTAINERS, DEPTH, LIMIT, STRING_LARGEST, VALUES, parse

texts = st.text(st.characters(exclude_categories=["Cs"])) | st.text('\\"{}[],:\n\U0001f600')
numbers = st.integers(-(10**20) + 1, 10**20 - 1) | st.floats(allow_nan=False, allow_infinity=False)
documents = st.recursive(
    st.none() | st.booleans() | numbers | texts, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(texts, inner, max_size=5), max_leaves=30
)


def refusal(data: bytes, **limits) -> str:
    with pytest.raises(SourceError) as caught:
        parse(data, file="some.json", **limits)
    assert caught.value.line.startswith("some.json: ")
    return caught.value.line


@given(value=documents, ascii_only=st.booleans(), indent=st.none() | st.integers(0, 2))
@settings(deadline=None)
def test_what_json_writes_is_read_as_it_was(value, ascii_only, indent):
    assert parse(json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode(), file="f") == value


@given(data=st.binary(max_size=40) | st.text('{}[]",:\\ud80123eE.+- \nNaIfty', max_size=40).map(str.encode))
@example(data=b'"\\ud83d\\ud83d\\ude00"')
@example(data=b'"\\\\ud83d"')
@example(data=b'"\\\\\\ud83d"')
@settings(max_examples=1000, deadline=None)
def test_anything_else_is_a_source_error_and_what_is_read_json_reads_too(data):
    try:
        value = parse(data, file="f")
    except SourceError:
        return
    assert json.loads(data) == value
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "@0: is not JSON"),
        (b"  ", "is not JSON"),
        (b"{", "@1: is not JSON"),
        (b'{"a":[1,2', "@9: is not JSON"),
        (b'"abc', "is not JSON"),
        (b"]", "is not JSON"),
        (b"[}", "is not JSON"),
        (b"[1] 2", "@4: is not JSON: Extra data"),
        (b"[1,]", "is not JSON"),
        (b"[01]", "is not JSON"),
        (b"[+1]", "is not JSON"),
        (b"[1.]", "is not JSON"),
        (b"['a']", "is not JSON"),
        (b"[1]//", "is not JSON"),
        (b"\xef\xbb\xbf[]", "@0: is not JSON"),
        (b'["\x01"]', "is not JSON"),
        (b'["\\x41"]', "is not JSON"),
        (b'["\xff"]', "@2: is not UTF-8"),
        ("[]".encode("utf-16"), "is not UTF-8"),
        ('["é", x]'.encode(), "@7: is not JSON"),
        (b'["\xed\xa0\xbd"]', "is not UTF-8"),
        (b'["\\ud83d"]', "@2: holds half a surrogate pair"),
        (b'["\\uDE00"]', "half a surrogate pair"),
        (b'["\\ud83d\\\\\\ude00"]', "half a surrogate pair"),
        (b'["\\ud83d\\ud83d\\ude00"]', "@2: holds half a surrogate pair"),
        (b'{"\\udc00":1}', "half a surrogate pair"),
        (b'["\\ud83d\\ude00\\ud83d"]', "@14: holds half a surrogate pair"),
        (b'{"a":1,"a":1}', "the key a is there twice"),
        (b'{"a":1,"\\u0061":1}', "the key a is there twice"),
        (b'[[{"x":{"b\\n":1,"b\\n":2}}]]', r"the key b\n is there twice"),
        (b"[NaN]", "NaN is no JSON number"),
        (b"[Infinity]", "Infinity is no JSON number"),
        (b"-Infinity", "-Infinity is no JSON number"),
        (b"[1e999]", "a number too large"),
        (b"[-1e999]", "a number too large"),
        (b"[1." + b"1" * 100 + b"]", "a number too large or too long"),
        (b"[-0]", "-0"),
        (b"[123456789012345678901]", "an integer of more than 20 digits"),
        (b"-" + b"9" * 100_000, "an integer of more than 20 digits"),
    ],
)  # fmt: skip
def test_what_is_not_strict_json_is_refused_with_its_reason(data, what):
    assert what in refusal(data)


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"[99999999999999999999,-99999999999999999999]", [10**20 - 1, 1 - 10**20]),
        (b"[-0.0, 1e-999]", [0.0, 0.0]),
        (b' \t\r\n{"a" : null} ', {"a": None}),
        (b'["\\ud83d\\ude00","\\\\ud83d","\\/"]', ["\U0001f600", "\\ud83d", "/"]),
        (b'["123456789012345678901", "NaN", "-0"]', ["123456789012345678901", "NaN", "-0"]),
        (b'{"":{"":[]}}', {"": {"": []}}),
    ],
)
def test_what_looks_odd_but_is_strict_is_read(data, value):
    assert parse(data, file="f") == value


@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}"), (b'[{"a":', b"}]")])
def test_the_depth_limit_is_exact(opening, closing):
    levels = opening.count(b"[") + opening.count(b"{")
    fits = DEPTH // levels
    parse(opening * fits + b"1" + closing * fits, file="f")
    assert f"more than {DEPTH} deep" in refusal(opening * (fits + 1) + b"1" + closing * (fits + 1))


def test_brackets_that_never_close_are_refused_without_recursion():
    assert f"more than {DEPTH} deep" in refusal(b"[" * 100_000)
    assert f"more than {DEPTH} deep" in refusal(b"[" * 100_000 + b"]" * 99_999 + b"\\")


@given(text=st.text('[]{}",\\a', min_size=1, max_size=200))
@settings(deadline=None)
def test_brackets_and_commas_in_strings_count_for_nothing(text):
    quotes = text.count('"') + 2  # of which there may be six for each value, escaped or not
    assert parse(json.dumps([text]).encode(), file="f", depth=1, values=max(2, -(-quotes // 6)), containers=1) == [text]


@pytest.mark.parametrize("shift", [-2, -1, 0, 1, 2])
@pytest.mark.parametrize("middle", [b'"[[["', b'"\\"[[["', b'"\\\\","[["', b'"[\\\\\\"[["'])
def test_a_string_across_a_blocks_border_is_still_a_string(shift, middle):
    for inner in range(len(middle)):
        data = b"[" + b" " * (BLOCK - inner + shift) + middle + b"]"
        assert parse(data, file="f", depth=1) == json.loads(data)


def test_the_values_of_each_level_are_counted_where_the_shape_is_known():
    data = b'{"a":[1,2,3],"b":[4]}'
    assert parse(data, file="f", levels=(2, 4)) == {"a": [1, 2, 3], "b": [4]}
    assert "more than 1 values at depth 1" in refusal(data, levels=(1, 4))
    assert "more than 3 values at depth 2" in refusal(data, levels=(2, 3))
    assert "more than 1 deep" in refusal(data, levels=(2,))


def test_what_build_returns_takes_the_objects_place():
    assert parse(b'[{"a":1},{"a":{"a":2}}]', file="f", build=lambda members: members["a"]) == [1, 2]


def test_offsets_are_those_of_the_file():
    assert "@108: is not JSON" in refusal(b'{"a":1,,', begin=101)
    assert "@103: is not UTF-8" in refusal(b'["\xff"]', begin=101)
    assert "@103: holds half" in refusal(b'["\\ud83d"]', begin=101)


def test_build_sees_no_duplicate_keys():
    assert "twice" in refusal(b'{"a":1,"a":2}', build=len)


HEAVY = {
    "arrays": (lambda: b"[" * 60_000_000, "objects and arrays"),
    "arrays, closed": (lambda: b"[" * 30_000_000 + b"]" * 30_000_000, "objects and arrays"),
    "closings": (lambda: b"[" + b"]" * 60_000_000, "values"),
    "objects": (lambda: b"[" + b"{}," * 20_000_000 + b"{}]", "objects and arrays"),
    "numbers": (lambda: b"[" + b"1," * 30_000_000 + b"1]", "values"),
    "quotes": (lambda: b'"' * 60_000_000, "values"),
    "escaped quotes": (lambda: b'"' + b'\\"' * 30_000_000 + b'"', "values"),
    "backslashes": (lambda: b'["' + b"\\" * 60_000_000 + b'"]', "a string of more than"),
    "a string": (lambda: b'["' + b"a" * 60_000_000 + b'"]', "a string of more than"),
    "digits": (lambda: b"1" * 60_000_000, "20 digits"),
    "decimals": (lambda: b"0." + b"1" * 60_000_000, "too long"),
    "half pairs": (lambda: b"[" + b",".join([b'"' + b"\\ud83d" * 150_000 + b'"'] * 18) + b"]", "half a surrogate pair"),
    "a late emoji": (lambda: b"[" + b" " * 20_000_000 + '"\U0001f600"]'.encode(), "beyond ASCII"),
    "a late escaped emoji": (lambda: b"[" + b" " * 20_000_000 + b'"\\ud83d\\ude00"]', "beyond ASCII"),
    "too many bytes": (lambda: b" " * (LIMIT + 1), "bytes of JSON"),
}


@pytest.mark.parametrize("name", HEAVY)
def test_sixty_megabytes_of_anything_are_refused_at_once(name):
    make, what = HEAVY[name]
    data = make()
    began = time.thread_time()
    assert what in refusal(data)
    assert time.thread_time() - began < 10


def test_the_limits_themselves_are_read():
    assert len(parse(b"[" + b",".join([b"[]"] * (CONTAINERS - 1)) + b"]", file="f")) == CONTAINERS - 1
    assert len(parse(b"[" + b",".join([b"1"] * (VALUES - 1)) + b"]", file="f")) == VALUES - 1
    assert parse(b'"' + b"a" * STRING_LARGEST + b'"', file="f") == "a" * STRING_LARGEST
    assert parse(b"[" + b" " * (LIMIT - 2) + b"]", file="f") == []


def test_long_stretches_between_strings_are_no_strings():
    data = b'["a"' + b",1" * (STRING_LARGEST // 2 + 10) + b',"b"]'
    assert parse(data, file="f", values=VALUES * 2)[-1] == "b"


def test_an_index_of_ten_megabytes_is_read_in_a_second():
    weight_map = {f"model.layers.{n}.mlp.experts.{n % 160}.gate_proj.weight": f"model-{n % 93:05d}-of-00093.safetensors" for n in range(100_000)}
    data = json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2).encode()
    began = time.thread_time()
    assert parse(data, file="f") == {"metadata": {}, "weight_map": weight_map}
    assert time.thread_time() - began < 10


@pytest.mark.parametrize("value", [True, False, 1.0, "1", None, -1, 8, math.inf, [1]])
def test_only_whole_numbers_within_bounds_are_integers(value):
    with pytest.raises(SourceError, match=r"^f: layers is "):
        strict_json.integer(value, "layers", "f", 0, 7)


def test_the_bounds_of_an_integer_belong_to_it():
    assert [strict_json.integer(n, "layers", "f", 0, 7) for n in (0, 7)] == [0, 7]


@pytest.mark.parametrize(("read", "good", "bad"), [
    (strict_json.mapping, {"a": 1}, [("a", 1)]),
    (strict_json.array, [1], {"a": 1}),
    (strict_json.string, "a", b"a"),
    (strict_json.strings, {"a": "b"}, {"a": 1}),
    (strict_json.strings, {}, None),
])  # fmt: skip
def test_a_value_of_another_type_is_a_source_error(read, good, bad):
    assert read(good, "it", "f") == good
    with pytest.raises(SourceError, match=r"^f: it"):
        read(bad, "it", "f")
