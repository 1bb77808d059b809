"""Importance files: both forms, values as llama.cpp uses them, and what is refused."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmconv.engine.inputs import InputFolder
from glmconv.errors import SourceError
from glmconv.formats.gguf_header import padded, write_header
from glmconv.formats.gguf_imatrix import Importance, read_importance
from glmconv.formats.gguf_metadata import quantized
from glmconv.formats.gguf_types import BY_NAME, Array, Entry, Kind

Q, GATE = "blk.0.attn_q.weight", "blk.1.ffn_gate_exps.weight"
KV = (
    Entry("general.type", Kind.STRING, "imatrix"),
    Entry("imatrix.datasets", Kind.ARRAY, Array(Kind.STRING, ["wiki.txt", "code.txt"])),
    Entry("imatrix.chunk_count", Kind.U32, 12),
    Entry("imatrix.chunk_size", Kind.U32, 512),
)
Sums = dict[str, tuple[object, object]]
GOOD: Sums = {Q: ([[2.0, 4.0, 6.0]], [2.0]), GATE: ([[1.0, 2.0], [5.0, 5.0], [3.0, 9.0]], [1.0, 0.0, 3.0])}


def of_gguf(sums: Sums = GOOD, kv: tuple[Entry, ...] = KV, kind: str = "F32") -> bytes:
    """The file of these sums and counts, as llama-imatrix writes it."""
    described, data = [], b""
    for name, (values, counts) in sums.items():
        for suffix, given_ in ((".in_sum2", values), (".counts", counts)):
            if given_ is not None:
                stored = np.array(given_, "<f4")
                stored = stored[:, None] if suffix == ".counts" else stored
                described.append((name + suffix, BY_NAME[kind], tuple(reversed(stored.shape))))
                data += stored.tobytes() + bytes(padded(stored.nbytes) - stored.nbytes)
    return write_header(kv, described) + data


def of_old(entries: dict[str, tuple[int, list[float]]], tail: bytes = b"", count: int | None = None) -> bytes:
    parts = [struct.pack("<i", len(entries) if count is None else count)]
    for name, (calls, values) in entries.items():
        parts.append(struct.pack("<i", len(name)) + name.encode() + struct.pack(f"<ii{len(values)}f", calls, len(values), *values))
    return b"".join(parts) + tail


def dataset(name: bytes = b"wiki.txt", chunks: int = 12) -> bytes:
    return struct.pack("<ii", chunks, len(name)) + name


OLD = {Q: (2, [2.0, 4.0, 6.0]), GATE: (0, [1.0, 2.0, 5.0, 5.0, 3.0, 9.0])}


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[bytes], Importance]:
    def read(content: bytes) -> Importance:
        (tmp_path / "imatrix").write_bytes(content)
        return read_importance(InputFolder(tmp_path).open("imatrix"))

    return read


def test_values_are_sums_by_counts_and_one_where_nothing_was_counted(opened):
    importance = opened(of_gguf())
    assert importance.values(Q, 1, 3).tolist() == [[1.0, 2.0, 3.0]]
    assert importance.values(GATE, 3, 2).tolist() == [[1.0, 2.0], [1.0, 1.0], [1.0, 3.0]]
    assert importance.values(GATE, 3, 2).dtype == np.float32
    assert importance.values("blk.9.attn_q.weight", 1, 3) is None
    importance.check()


def test_flat_values_of_latent_heads_are_dealt_out_to_them(opened):
    importance = opened(of_gguf({"blk.0.attn_k_b.weight": ([[2.0, 4.0, 6.0, 8.0]], [2.0])}))
    assert importance.values("blk.0.attn_k_b.weight", 2, 2).tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_the_old_form_divides_by_its_calls_if_there_are_any(opened):
    importance = opened(of_old(OLD, dataset()))
    assert importance.values(Q, 1, 3).tolist() == [[1.0, 2.0, 3.0]]
    assert importance.values(GATE, 3, 2).tolist() == [[1.0, 2.0], [5.0, 5.0], [3.0, 9.0]]
    assert (importance.dataset, importance.chunks) == ("wiki.txt", 12)
    importance.check()
    bare = opened(of_old(OLD))
    assert (bare.dataset, bare.chunks) == ("", 0)


@pytest.mark.parametrize("content", [of_gguf(), of_old(OLD, dataset())], ids=["gguf", "old"])
def test_it_says_where_it_came_from(opened, content):
    appended = quantized("Q4_K_M", opened(content).origin("dir/imatrix.gguf"))[2:]
    assert [(entry.key.removeprefix("quantize.imatrix."), entry.value) for entry in appended] == [
        ("file", "dir/imatrix.gguf"), ("dataset", "wiki.txt"), ("entries_count", 2), ("chunks_count", 12)]  # fmt: skip


@pytest.mark.parametrize("content", [of_gguf(), of_old(OLD)], ids=["gguf", "old"])
def test_another_size_is_refused_but_for_the_embedding(opened, content):
    importance = opened(content)
    with pytest.raises(SourceError, match=r"imatrix: blk\.0\.attn_q\.weight: has 1 x 3 values for a weight of 1 x 4\. Was it made from this model"):
        importance.values(Q, 1, 4)
    with pytest.raises(SourceError, match=r"for a weight of 2 x 2"):
        importance.values(GATE, 2, 2)


def test_what_is_said_of_the_embedding_counts_only_if_it_fits(opened):
    importance = opened(of_gguf({"token_embd.weight": ([[2.0, 4.0]], [2.0])}))
    assert importance.values("token_embd.weight", 1, 3) is None
    assert importance.values("token_embd.weight", 1, 2).tolist() == [[1.0, 2.0]]


@given(sums=st.lists(st.lists(st.floats(0, 2.0**100, width=32), min_size=3, max_size=3), min_size=1, max_size=4), counts=st.data())
@settings(max_examples=80, deadline=None)
def test_values_are_rounded_once(tmp_path_factory, sums, counts):
    taken = counts.draw(st.lists(st.integers(0, 2**24), min_size=len(sums), max_size=len(sums)))
    folder = tmp_path_factory.getbasetemp()
    (folder / "imatrix").write_bytes(of_gguf({GATE: (sums, taken)}))
    with InputFolder(folder) as opened:
        found = read_importance(opened.open("imatrix")).values(GATE, len(sums), 3)
    for row, given_, count in zip(found, sums, taken, strict=True):
        for value, total in zip(row, given_, strict=True):
            assert value == (np.float32(total) / np.float32(count) if count else 1)


def test_a_file_of_the_gguf_package_is_read(opened, tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "theirs", "llama")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["wiki.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    writer.add_tensor(Q + ".in_sum2", np.array([[2, 4, 6]], np.float32))
    writer.add_tensor(Q + ".counts", np.array([[2]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert opened((tmp_path / "theirs").read_bytes()).values(Q, 1, 3).tolist() == [[1, 2, 3]]


def without(key: str) -> bytes:
    return of_gguf(kv=tuple(entry for entry in KV if entry.key != key))


REFUSED = {
    "an empty file": (b"", "ends early"),
    "three bytes": (b"GGU", "ends early"),
    "a model": (of_gguf(kv=(Entry("general.type", Kind.STRING, "model"), *KV[1:])), "of the type model, not imatrix"),
    "no type": (without("general.type"), "of the type nothing, not imatrix"),
    "no datasets": (without("imatrix.datasets"), "no list of strings imatrix.datasets"),
    "no count of chunks": (without("imatrix.chunk_count"), "no number imatrix.chunk_count"),
    "no size of chunks": (without("imatrix.chunk_size"), "no number imatrix.chunk_size"),
    "chunks in a string": (of_gguf(kv=(*KV[:2], Entry("imatrix.chunk_count", Kind.STRING, "1"), KV[3])), "no number imatrix.chunk_count"),
    "datasets that are numbers": (of_gguf(kv=(KV[0], Entry("imatrix.datasets", Kind.ARRAY, Array(Kind.U8, [1])), *KV[2:])), "no list of strings"),
    "no entries": (of_gguf({}), "has no entries"),
    "sums without counts": (of_gguf({Q: ([[1.0]], None)}), "has .in_sum2 alone"),
    "counts without sums": (of_gguf({Q: (None, [1.0])}), "has .counts alone"),
    "a count too few": (of_gguf({Q: ([[1.0], [2.0]], [1.0])}), "has 1 counts for 2 rows of sums"),
    "integers": (of_gguf(kind="I32"), "is I32, F32 is needed"),
    "a file cut off": (of_gguf()[:-40], "ends early"),
    "no entries in the old form": (of_old({}), "the number of entries is 0"),
    "a negative number of entries": (of_old(OLD, count=-1), "the number of entries is -1"),
    "two billion entries": (of_old(OLD, count=2**31 - 1), "the number of entries is 2,147,483,647"),
    "an entry more than there is": (of_old(OLD, count=3), "ends early"),
    "an entry fewer than there is": (of_old(OLD, count=1), "the length of the dataset's name"),
    "a name of two billion bytes": (struct.pack("<ii", 1, 2**31 - 1) + b"a", "the length of a weight's name"),
    "a name of -1 bytes": (struct.pack("<ii", 1, -1) + b"a", "the length of a weight's name is -1"),
    "a name that is no UTF-8": (struct.pack("<ii", 1, 1) + b"\xff" + bytes(16), "a weight's name that is not UTF-8"),
    "a name with a control character": (of_old({"a\x1b": (1, [1.0])}), "not printable ASCII"),
    "a weight twice": (of_old({Q: (1, [1.0])}, of_old({Q: (1, [1.0])})[4:], count=2), "is there twice"),
    "negative calls": (of_old({Q: (-1, [1.0])}), "the calls of blk.0.attn_q.weight is -1"),
    "no values": (of_old({Q: (1, [])}), "the values of blk.0.attn_q.weight is 0"),
    "more values than there are": (struct.pack("<ii1sii", 1, 1, b"a", 1, 2**31 - 1) + bytes(64), "more than fit into the file"),
    "a long name of a dataset": (of_old(OLD, dataset(b"x" * 5000)), "the length of the dataset's name is 5,000"),
    "a dataset cut off": (of_old(OLD, dataset()[:-1]), "ends early"),
    "bytes behind the end": (of_old(OLD, dataset() + b"\0"), "has 1 bytes behind its end"),
}


@pytest.mark.parametrize(("content", "said"), REFUSED.values(), ids=REFUSED)
def test_a_broken_file_is_refused_at_once(opened, content, said):
    began = time.thread_time()
    with pytest.raises(SourceError, match=said):
        opened(content)
    assert time.thread_time() - began < 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_value_that_is_no_importance_is_refused(opened, bad):
    for content in (of_gguf({Q: ([[1.0, bad]], [1.0])}), of_old({Q: (1, [1.0, bad])})):
        importance = opened(content)
        with pytest.raises(SourceError, match=r"blk\.0\.attn_q\.weight: has a value that is not finite or below 0"):
            importance.values(Q, 1, 2)
        with pytest.raises(SourceError, match=r"has a value"):
            importance.check()
    with pytest.raises(SourceError, match=r"has a count that is not finite or below 0"):
        opened(of_gguf({Q: ([[1.0]], [bad])})).values(Q, 1, 1)
    assert opened(of_gguf({GATE: ([[bad], [1.0]], [0.0, 1.0])})).values(GATE, 2, 1).tolist() == [[1.0], [1.0]]


def test_a_quotient_that_overflows_is_refused(opened):
    with pytest.raises(SourceError, match=r"has a value that is not finite"):
        opened(of_gguf({Q: ([[3e38]], [1e-3])})).values(Q, 1, 1)
