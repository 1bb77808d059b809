"""Options that several commands share, and the types that parse them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, TypeVar

import click

from glmconv.cli.output import Output

F = TypeVar("F", bound=Callable[..., Any])
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


class Bytes(click.ParamType[int]):
    """A size such as 5GB, 512MiB or 1000000; kB, MB, GB, TB are decimal."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*([kmgt]?i?)b?", str(value).strip().lower())
        if not match or match[2] not in UNITS:
            self.fail(f"{value!r} is no size; write 5GB, 512MiB or a number of bytes.", param, ctx)
        size = int(Fraction(match[1]) * UNITS[match[2]])
        if size < 1:
            self.fail("a size is at least 1 byte.", param, ctx)
        return size


class Ratio(click.ParamType[Fraction]):
    """A ratio such as 1/16 or 0.25, above 0 and at most 1."""

    name = "ratio"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Fraction:
        try:
            if not re.fullmatch(r"\d{1,12}(/\d{1,12}|\.\d{1,12})?", str(value)):  # 1e-99999999 would never end
                raise ValueError
            ratio = Fraction(str(value))
        except (ValueError, ZeroDivisionError):
            self.fail(f"{value!r} is no ratio; write 1/16 or 0.25.", param, ctx)
        if not 0 < ratio <= 1:
            self.fail("a scale is above 0 and at most 1.", param, ctx)
        return ratio


def output_options(command: F) -> F:
    """--json, -q, -v, --progress: collected into one `out: Output`."""

    def gather(ctx: click.Context, param: click.Parameter, value: object) -> object:
        out = ctx.ensure_object(dict)
        out[param.name] = value
        return value

    keep: dict[str, Any] = {"callback": gather, "expose_value": False, "is_eager": True}
    command = click.option("--json", is_flag=True, help="Print the result as JSON on stdout.", **keep)(command)
    command = click.option("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors.", **keep)(command)
    command = click.option("-v", "--verbose", is_flag=True, help="More on stderr.", **keep)(command)
    kinds = click.Choice(["auto", "bar", "plain", "none"])
    return click.option("--progress", type=kinds, default="auto", show_default=True, help="Progress on stderr; auto: a bar on a terminal.", **keep)(
        command
    )


def output_of(ctx: click.Context) -> Output:
    found = ctx.ensure_object(dict)
    return Output(found.get("json", False), found.get("quiet", False), found.get("verbose", False), found.get("progress", "auto"))


RUN_OPTIONS = (
    "to", "file_size", "max_memory", "workers", "resume", "resume_check", "overwrite", "mtp", "origin", "iteration", "keep", "first_layers_bf16",
    "last_layers_bf16", "ragged", "serve_tp", "serve_ep", "nonfinite", "megatron_dialect", "source_dialect", "mtp_from", "mmproj", "lora",
    "not_strict", "imatrix", "tensor_types", "token_embedding_type", "output_tensor_type", "pure", "split_max_size", "split_max_tensors",
    "embed_source", "quantize_from",
)  # fmt: skip


def spelled(ctx: click.Context, names: Sequence[str]) -> list[str]:
    """The options among `names` that the command line gave, as it would give them again."""
    words: list[str] = []
    for param in ctx.command.params:
        given = ctx.get_parameter_source(param.name or "") is click.core.ParameterSource.COMMANDLINE
        if isinstance(param, click.Option) and given and param.name in names:
            value = ctx.params[param.name]
            if param.is_flag:
                words.append((param.opts if value else param.secondary_opts)[0])
            else:
                for one in value if param.multiple else (value,):
                    words += [param.opts[-1], str(one)]
    return words


DIALECTS = ("auto", "slime", "miles", "bridge", "mcore")
reading_options = (
    click.option(
        "--source-dialect", type=click.Choice(DIALECTS), default="auto", show_default=True, help="Of a torch_dist source whose tensors do not tell."
    ),
    click.option("--mtp-from", metavar="DIR|ID", help="Take the MTP layers from this checkpoint: for fine-tunes that lost theirs."),
    click.option("--mmproj", metavar="FILE", help="The vision tower's file (mmproj) of a GGUF source."),
    click.option("--lora", metavar="DIR|ID", help="Merge this LoRA adapter (as PEFT saves it) into the weights."),
)


def run_options(command: F) -> F:
    """Options of every command that writes a checkpoint."""
    many = click.IntRange(1, 256)
    for option in (
        click.option("-j", "--workers", type=many, help="Threads that write files. Default: the cores of this rank, at most 8."),
        click.option("--max-memory", type=Bytes(), help="Resident memory not to exceed; fewer workers and smaller buffers if need be."),
        click.option(
            "--shard-size", "file_size", type=Bytes(), help="Bytes per file. Default: the release's own files, else 5GB (torch_dist: 1GiB)."
        ),
        click.option("--resume/--no-resume", default=True, show_default=True, help="Keep the files that an earlier run of this command finished."),
        click.option(
            "--resume-check", type=click.Choice(["full", "sampled"]), default="full", show_default=True, help="How finished files are checked."
        ),
        click.option("--overwrite", is_flag=True, help="Move what is at the destination aside (DST.bak-N) and start anew. Deletes nothing."),
        click.option(
            "--mtp", type=click.Choice(["keep", "drop", "only"]), default="keep", show_default=True, help="The MTP layers; only is for GGUF."
        ),
        click.option("--origin", metavar="DIR|ID", help="The Hugging Face release of a torch_dist checkpoint: config, tokenizer, file layout."),
        click.option(
            "--megatron-dialect", type=click.Choice(DIALECTS), default="auto", show_default=True, help="torch_dist: whose names and row orders."
        ),
        *reading_options,
        click.option("--not-strict", is_flag=True, help="hf: leave out tensors that are missing or unknown, and name each."),
        click.option("--keep", multiple=True, metavar="REGEX", help="Quantized targets: leave tensors whose name it is found in as they are."),
        click.option("--first-layers-bf16", type=click.IntRange(0, 1024), default=0, help="Quantized targets: leave the first N layers as they are."),
        click.option("--last-layers-bf16", type=click.IntRange(0, 1024), default=0, help="Quantized targets: leave the last N layers as they are."),
        click.option(
            "--ragged",
            type=click.Choice(["keep", "quantize"]),
            default="keep",
            show_default=True,
            help="Weights whose grid no serving engine loads: leave them as they are, or quantize them all the same.",
        ),
        click.option("--serve-tp", type=click.IntRange(1, 1024), default=1, help="Leave what so many tensor-parallel ranks cannot split as it is."),
        click.option("--serve-ep", type=click.IntRange(1, 1024), default=1, help="Expert-parallel ranks: above 1, experts are not split."),
        click.option(
            "--nonfinite", type=click.Choice(["error", "keep"]), default="error", show_default=True, help="NaN and Inf in a weight to be quantized."
        ),
        click.option("--iteration", type=click.IntRange(0, 9_999_999), help="torch_dist: write iter_N instead of release."),
    ):
        command = option(command)
    return gguf_options(command)


imatrix_option = click.option("--imatrix", metavar="FILE", type=click.Path(), help="GGUF: llama.cpp's importance file, of either form.")


def gguf_options(command: F) -> F:
    """Options of GGUF targets, called as llama-quantize and llama-gguf-split call theirs."""
    for option in (
        imatrix_option,
        click.option("--tensor-type", "tensor_types", multiple=True, metavar="REGEX=TYPE", help="GGUF: the type of the tensors in whose name it is."),
        click.option("--token-embedding-type", default="", metavar="TYPE", help="GGUF: the type of token_embd.weight."),
        click.option("--output-tensor-type", default="", metavar="TYPE", help="GGUF: the type of output.weight."),
        click.option("--pure", is_flag=True, help="GGUF: every tensor gets the file type's base type."),
        click.option("--split-max-size", type=Bytes(), help="GGUF: several files, each with so many bytes of tensors at most."),
        click.option("--split-max-tensors", type=click.IntRange(min=1), help="GGUF: several files, each with so many tensors at most."),
        click.option("--embed-source", is_flag=True, help="GGUF: config.json, tokenizer files and the shards' layout ride along, for the way back."),
        click.option(
            "--quantize-from",
            type=click.Choice(["bf16", "float32"]),
            default="bf16",
            show_default=True,
            help="GGUF of a quantized source: through what.",
        ),
    ):
        command = option(command)
    return command
