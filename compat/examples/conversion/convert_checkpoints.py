"""Megatron-Bridge's examples/conversion/convert_checkpoints.py: import a Hugging Face release, export a Megatron checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from dropin import Parser, accept, finish, glmconv, option, refuse, run

DTYPES = ("float32", "float16", "bfloat16")


def parser() -> Parser:
    made = Parser("Megatron-Bridge's examples/conversion/convert_checkpoints.py", "Convert between Hugging Face and Megatron.")
    verbs = made.add_subparsers(dest="verb", required=True, parser_class=argparse.ArgumentParser)
    importing = subparser(verbs, "import", "write MEGATRON_PATH/iter_0000000 with run_config.yaml from a release")
    importing.add_argument("--torch-dtype", choices=DTYPES, help="must be the weights' own")
    accept(importing, "--device-map", because="everything is done on the CPU")
    exporting = subparser(verbs, "export", "write a Hugging Face folder from a Megatron checkpoint, with or without run_config.yaml")
    exporting.add_argument("--hf-path", required=True, help="folder to write")
    add_export_options(exporting)
    return made


def subparser(verbs: argparse._SubParsersAction[argparse.ArgumentParser], verb: str, does: str) -> argparse.ArgumentParser:
    """A verb with the options that all of them have."""
    made = verbs.add_parser(verb, help=does, description=does, allow_abbrev=False)
    made.add_argument("--hf-model", required=True, help="folder or Hub id of the release")
    made.add_argument("--megatron-path", required=True, help="the checkpoint: its root, release or iter_N folder, whatever the zero padding")
    accept(made, "--trust-remote-code", nargs=0, because="no code of a model is ever run")
    return made


def add_export_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("--no-progress", action="store_true", help="no progress on stderr")
    made.add_argument("--not-strict", action="store_true", help="leave out tensors that are missing or unknown; each is named, also in the manifest")


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    return import_release(args) if args.verb == "import" else export_checkpoint(args)


def import_release(args: argparse.Namespace, *more: object) -> int:
    if args.torch_dtype:
        with glmconv.open_checkpoint(args.hf_model, strict=False) as checkpoint:
            own = next(tensor.dtype.name for _, tensor in checkpoint)
        if args.torch_dtype != own:
            return refuse(f"--torch-dtype {args.torch_dtype}: the weights are {own}, and are not cast.", "Leave it out.")
    return run("convert", args.hf_model, args.megatron_path, "--to", "torch_dist", "--iteration", 0, "--megatron-dialect", "bridge", *more)


def export_checkpoint(args: argparse.Namespace, *more: object) -> int:
    quiet = option("--progress", "none" if args.no_progress else None)
    more = (*option("--not-strict", args.not_strict), *quiet, *more)
    return run("convert", args.megatron_path, args.hf_path, "--to", "hf", *option("--origin", args.hf_model), *more)


if __name__ == "__main__":
    finish(lambda: main(sys.argv[1:]))
