"""Plans a Hugging Face folder: shards as the release had them or numbered from 00001, plain or quantized; index and config.json last."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence

from glmconv.archs import field_of, preset_of
from glmconv.codecs.codec import Codec, Grid
from glmconv.dtypes import BY_NAME
from glmconv.engine.plan import OutputFile, Piece, Plan, Run, SmallFile
from glmconv.errors import printable
from glmconv.formats.coded import QUANTIZATION, RAW, WIDE, CodedRows, label_of
from glmconv.formats.format import FileLayout, LayoutOptions, Opened, RowReader, row_size
from glmconv.formats.graft import with_field
from glmconv.formats.safetensors_header import write_header
from glmconv.formats.selection import Selection, select
from glmconv.formats.serving import SIZES, described, serving
from glmconv.formats.side_files import CONFIG, INDEX, as_json, output_files

SHARD_SIZE = 5_000_000_000
Pieces = Mapping[str, Sequence[Piece]]  # canonical name -> what is stored of it


def plan(opened: Opened, options: LayoutOptions) -> Plan:
    """Shards as the release has them, or of `file_size` bytes; side files as they are; index and config.json last."""
    chosen: dict[str, object] = {"mtp": options.mtp, "file_size": options.file_size}
    if options.codec is None:
        pieces: Pieces = {name: (plain(name, reader),) for name, reader in opened.tensors.items()}
        return _folder("hf", opened, options, pieces, chosen | left_out(opened), {}, (*opened.notes, *_incomplete(opened)))
    selection = select(opened.model, opened.tensors, options.codec, options.quant)
    pieces = {name: tuple(stored(name, reader, selection, options.quant.strict)) for name, reader in opened.tensors.items()}
    quantization = {QUANTIZATION: selection.codec.config(selection.kept)}
    notes = (*opened.notes, *selection.notes, *_requantized(opened, selection), _serving_note(opened, selection, pieces, options))
    return _folder(options.codec.name, opened, options, pieces, chosen | options.quant.document, quantization, notes)


def _folder(
    to: str, opened: Opened, options: LayoutOptions, pieces: Pieces, chosen: Mapping[str, object], more: Mapping[str, object], notes: tuple[str, ...]
) -> Plan:
    layout = file_layout(opened, options, pieces)
    files = [_shard(name, metadata, [piece for tensor in order for piece in pieces[tensor]]) for name, metadata, order in layout.files]
    files += output_files(opened.side_files)
    marks = []
    if layout.index is not None:
        weight_map = {piece.name: name for name, _, order in layout.files for tensor in order for piece in pieces[tensor]}
        total = sum(piece.payload for file in files for piece in file.pieces if piece.digested)
        index = {"metadata": {**layout.index, "total_size": total}, "weight_map": weight_map}
        marks.append(SmallFile(INDEX, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()))
    marks.append(SmallFile(CONFIG, config_for(opened, more)))
    return Plan(to, chosen, opened.fingerprint, tuple(files), tuple(marks), notes)


def left_out(opened: Opened) -> dict[str, object]:
    """What a source that was not opened strictly lacks, or has beyond the model: the manifest names all of it. Empty for a whole source."""
    found = {"missing": sorted(set(opened.missing)), "unexpected": sorted(opened.unexpected)}
    return {name: tensors for name, tensors in found.items() if tensors}


def _incomplete(opened: Opened) -> Iterator[str]:
    missing, unexpected, model = sorted(set(opened.missing)), sorted(opened.unexpected), opened.model.spec.model_type
    if missing or unexpected:
        yield f"not strict: {len(missing):,} tensors are missing and {len(unexpected):,} unknown to {model}; what is written is no whole model"
    yield from (f"{tensor}: is missing, and left out" for tensor in missing)
    yield from (f"{printable(tensor)}: is unknown to {model}, and left out" for tensor in unexpected)


def config_for(opened: Opened, more: Mapping[str, object] | None = None) -> bytes:
    """config.json as written: the source's own bytes, unless it is wrong about MTP layers, or what it says of quantization changes."""
    field, layers = opened.model.spec.mtp_field, opened.model.sizes.get("mtp", 0)
    changed: Mapping[str, object] = {name: value for name, value in opened.config.items() if name != QUANTIZATION} | dict(more or {})
    if (field_of(opened.config, field) or 0) != layers:
        changed = with_field(changed, field, layers)
    if changed == opened.config:
        return opened.config_bytes
    return as_json(changed)


def plain(name: str, reader: RowReader) -> Piece:
    """A tensor as it is."""
    rows = reader.shape[0]
    return Piece(name, reader.dtype.name, reader.shape, row_size(reader.shape, reader.dtype) * rows, (Run(name, 0, rows),))


def stored(name: str, reader: RowReader, selection: Selection, strict: bool) -> Iterator[Piece]:
    """What a quantized target stores of a tensor: itself, or its parts; the source's own parts where they are the target's already."""
    codec = selection.codec
    if name not in selection.encoded:
        yield plain(name, reader)
        return
    shape, base = (reader.shape[0], reader.shape[1]), name.removesuffix(".weight")
    if isinstance(reader, CodedRows) and is_already(reader, codec):
        for suffix, rows in reader.parts.items():
            run = Run(f"{RAW}{suffix}:{name}", 0, rows.shape[0])
            yield Piece(f"{base}.{suffix}", rows.dtype.name, rows.shape, rows.row_size * rows.shape[0], (run,))
        return
    wide = bool(label_of(reader))
    encoder = codec.encoder(shape, reader.dtype, wide=wide, strict=strict)
    for number, part in enumerate(codec.parts(shape, reader.dtype)):
        runs = () if number else (Run(WIDE + name if wide else name, 0, shape[0]),)
        yield Piece(f"{base}.{part.suffix}", part.dtype.name, part.shape, part.size, runs, encoder=encoder, part=number)


def is_already(reader: CodedRows, codec: Codec) -> bool:
    """Whether the stored parts are what the codec would store: then they pass unchanged."""
    wanted = {part.suffix: (part.dtype, part.shape) for part in codec.parts((reader.shape[0], reader.shape[1]), reader.dtype)}
    return reader.decoder.label == codec.label(reader.dtype) and wanted == {suffix: (r.dtype, r.shape) for suffix, r in reader.parts.items()}


def _requantized(opened: Opened, selection: Selection) -> Iterator[str]:
    coded = [reader for name, reader in opened.tensors.items() if name in selection.encoded and label_of(reader)]
    anew = [reader for reader in coded if not (isinstance(reader, CodedRows) and is_already(reader, selection.codec))]
    others = sorted({reader.decoder.label if isinstance(reader, CodedRows) else label_of(reader) for reader in anew})
    if others:
        yield f"quantized anew from {', '.join(others)}: the two errors add up (about 1.4 times that of one)"
    elif coded:
        yield f"{len(coded):,} tensors are in this form already: their codes and scales pass unchanged"


def _serving_note(opened: Opened, selection: Selection, pieces: Pieces, options: LayoutOptions) -> str:
    sizes = {name: sum(piece.payload for piece in made) for name, made in pieces.items()}
    at = sorted({*SIZES, options.quant.serve_tp})

    def grid_of(name: str) -> Grid | None:
        return selection.codec.grid if name in selection.encoded else None

    return described(serving(opened.model, sizes, grid_of, options.quant.serve_ep, at))


def _shard(name: str, metadata: Mapping[str, str], pieces: Sequence[Piece]) -> OutputFile:
    header = write_header([(piece.name, BY_NAME[piece.dtype], piece.shape) for piece in pieces], metadata)
    return OutputFile(name, header, tuple(pieces))


def file_layout(opened: Opened, options: LayoutOptions, pieces: Pieces) -> FileLayout:
    """The release's own files where they are known and still fit what is written, else shards numbered from 00001."""
    if opened.layout is not None and options.file_size is None and options.codec is None:
        kept = [(name, metadata, tuple(t for t in order if t in pieces)) for name, metadata, order in opened.layout.files]
        numbered = any(not order and "-of-" in name for name, _, order in kept)
        if not numbered and {t for _, _, order in kept for t in order} == set(pieces):
            index, whole = opened.layout.index, sum(len(order) for _, _, order in opened.layout.files) == len(pieces)
            if index is not None and not whole:  # counts of what is not all there any more
                index = {name: value for name, value in index.items() if name != "total_parameters"}
            return FileLayout(tuple(file for file in kept if file[2]), index)
    preset = preset_of(opened.config)
    apart = options.apart or (preset.mtp_file if preset else "")
    mtp = {name for name in pieces if opened.model.tensors[name].mtp} if apart else set()
    return sharded(pieces, options.file_size or SHARD_SIZE, apart, mtp)


def sharded(pieces: Pieces, file_size: int, mtp_file: str, mtp: Iterable[str]) -> FileLayout:
    """Tensors in their order, a new shard when the next tensor would make it larger than `file_size` bytes; those of `mtp` in a file of their own."""
    shards: list[list[str]] = [[]]
    set_apart = set(mtp)
    apart = [name for name in pieces if name in set_apart]
    filled = 0
    for name in (name for name in pieces if name not in set_apart):
        size = sum(piece.payload for piece in pieces[name])
        if filled and filled + size > file_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    metadata = {"format": "pt"}
    count = len(shards)
    names = ["model.safetensors"] if count == 1 and not apart else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    files = [(name, metadata, tuple(order)) for name, order in zip(names, shards, strict=True)]
    files += [(mtp_file, metadata, tuple(apart))] if apart else []
    return FileLayout(tuple(files), {} if len(files) > 1 else None)
