"""Writes the stored zips that torch.save writes, byte for byte.

Source: the bytes of torch.save of torch 2.13 (caffe2/serialize/inline_container.cc over its own miniz), and APPNOTE.TXT for zip.
Contents begin at multiples of 64; CRC-32 and sizes stand behind each record and in the directory, never in the local header.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field

ALIGNMENT = 64
WIDE = 0xFFFFFFFF  # from here on a size or an offset needs zip64
LOCAL, DESCRIPTOR, CENTRAL, END = b"PK\x03\x04", b"PK\x07\x08", b"PK\x01\x02", b"PK\x05\x06"
END_64, LOCATOR_64 = b"PK\x06\x06", b"PK\x06\x07"
UTF8 = 0x0800  # names in UTF-8; an empty record has no other flag
FLAGS = 0x0808  # and sizes in a data descriptor


@dataclass(frozen=True, slots=True)
class Record:
    """One line of the directory: `offset` is that of the local header."""

    name: str
    crc32: int
    size: int
    offset: int

    def zip64(self, packed: int | None = None) -> bytes:
        """The extra field with what does not fit into 32 bits. `packed` is the stored size: the local header does not know it yet and says 0."""
        values = [self.size, self.size if packed is None else packed] if self.size >= WIDE else []
        values += [self.offset] if self.offset >= WIDE else []
        return struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values) if values else b""


@dataclass
class ZipWriter:
    """A zip being written. `at` is the offset of the next byte; `out` holds what was written here, which need not be all."""

    at: int = 0
    out: bytearray = field(default_factory=bytearray)
    records: list[Record] = field(default_factory=list)

    def put(self, data: bytes) -> None:
        self.out += data
        self.at += len(data)

    def header(self, name: str, size: int) -> int:
        """A record's local header, padded so that its content is aligned; returns the header's offset."""
        offset = self.at
        wide = Record(name, 0, size, offset).zip64(packed=0)
        padding = -(offset + 30 + len(name) + len(wide) + 4) % ALIGNMENT
        extra = wide + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        self.put(struct.pack("<4s5H3I2H", LOCAL, 0, FLAGS if size else UTF8, 0, 0, 0, 0, 0, 0, len(name), len(extra)) + name.encode("ascii") + extra)
        return offset

    def footer(self, record: Record) -> None:
        """What stands behind a record's content; an empty one has nothing."""
        if record.size:
            form = "<4sI2Q" if record.zip64() else "<4s3I"
            self.put(struct.pack(form, DESCRIPTOR, record.crc32, record.size, record.size))
        self.records.append(record)

    def record(self, name: str, content: bytes) -> None:
        offset = self.header(name, len(content))
        self.put(content)
        self.footer(Record(name, zlib.crc32(content), len(content), offset))

    def skip(self, size: int) -> None:
        """Content that somebody else writes."""
        self.at += size

    def combined_crc32(self) -> int:
        """The records' CRC-32s folded as PyTorchStreamWriter folds them (boost's hash_combine); empty records do not count."""
        combined = 0
        for record in self.records:
            if record.size:
                combined = (combined ^ (record.crc32 + 0x9E3779B9 + (combined << 6) + (combined >> 2))) & 0xFFFFFFFFFFFFFFFF
        return combined

    def finish(self) -> None:
        """The directory, and its zip64 twin, which torch always writes."""
        start = self.at
        for r in self.records:
            extra = r.zip64()
            size, offset = min(r.size, WIDE), min(r.offset, WIDE)
            fixed = (0, 0, FLAGS if r.size else UTF8, 0, 0, 0, r.crc32, size, size, len(r.name), len(extra), 0, 0, 0, 0, offset)
            self.put(struct.pack("<4s6H3I5H2I", CENTRAL, *fixed) + r.name.encode("ascii") + extra)
        end, count = self.at, len(self.records)
        self.put(struct.pack("<4sQ2H2I4Q", END_64, 44, 0x031E, 45, 0, 0, count, count, end - start, start))
        self.put(struct.pack("<4sIQI", LOCATOR_64, 0, end, 1))
        self.put(struct.pack("<4s4H2IH", END, 0, 0, count, count, end - start, min(start, WIDE), 0))
