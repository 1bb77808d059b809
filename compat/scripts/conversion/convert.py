"""Megatron-Bridge's scripts/conversion/convert.sh: import, export, and a round trip that is compared bit by bit."""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples/conversion"))

from convert_checkpoints import DTYPES, add_export_options, export_checkpoint, import_release, subparser
from dropin import Parser, accept, finish, note, option, refuse, run

SHARDS = "each shard is a job of its own"
SBATCH = """#!/bin/bash
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={tasks}
#SBATCH --mem={mem}
#SBATCH --time={time}
{more}export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun {srun}python {script} {words}
"""


def parser() -> Parser:
    made = Parser("Megatron-Bridge's scripts/conversion/convert.sh", "Convert between Hugging Face and Megatron, here or by a Slurm job of your own.",
                  epilog="--executor slurm submits nothing: it prints the job script to submit. No conversion needs a GPU.")  # fmt: skip
    verbs = made.add_subparsers(dest="verb", required=True, parser_class=argparse.ArgumentParser)
    importing = subparser(verbs, "import", "write MEGATRON_PATH/iter_0000000 with run_config.yaml from a release")
    exporting = subparser(verbs, "export", "write a Hugging Face folder from a Megatron checkpoint")
    exporting.add_argument("--hf-path", required=True, help="folder to write")
    add_export_options(exporting)
    accept(exporting, "--distributed-save", "--no-distributed-save", nargs=0, because=SHARDS)
    accept(exporting, "--save-every-n-ranks", because=SHARDS)
    exporting.add_argument("--export-weight-dtype", choices=DTYPES, dest="torch_dtype", help="must be the weights' own")
    for one in (importing, exporting):
        one.add_argument("--torch-dtype", choices=DTYPES, help="must be the weights' own")
        one.add_argument("--overwrite", action="store_true", help="move what is at the destination aside (nothing is deleted)")
        one.add_argument("--hf-revision", help="refused: download it with `hf download --revision` and give the folder")
        accept(one, "--low-memory-save", nargs=0, because="memory is bounded anyway")
    add_round_trip(verbs)
    for one in (importing, exporting, verbs.choices["roundtrip"]):
        add_execution(one)
    return made


def add_round_trip(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    does = "there and back, compared bit by bit"
    made = verbs.add_parser("roundtrip", help=does, description=does, allow_abbrev=False)
    made.add_argument("--hf-model", "--hf-model-id", required=True, dest="hf_model", help="folder or Hub id of the release")
    made.add_argument("--megatron-path", "--megatron-load-path", dest="megatron_path", help="compare this checkpoint instead of making one")
    made.add_argument("--megatron-save-path", help="folder for the Megatron checkpoint; without it a temporary one")
    made.add_argument("--output-dir", help="folder in which to write the round-tripped release")
    accept(made, "--trust-remote-code", "--not-strict", nargs=0, because="no code of a model is run, and every tensor is compared")
    made.add_argument("--skip-save", action="store_true", help="keep nothing that was written")


def add_execution(made: argparse.ArgumentParser) -> None:
    made.add_argument("--executor", choices=["local", "slurm"], default="local", help="slurm: print a job script")
    made.add_argument("--submission-dry-run", "--dry-run", action="store_true", dest="dry_run", help="say what would be done")
    made.add_argument("--emit-sbatch", action="store_true", help="print a job script and end")
    accept(made, "--device", because="everything is done on the CPU")
    for name, default in (("--nodes", "1"), ("--mem", "0"), ("--time", "04:00:00")):
        made.add_argument(name, default=default, help="of the job script")
    made.add_argument("--gpus-per-node", "--gpus_per_node", dest="gpus_per_node", default="1", help="of the job script: tasks a node")
    for name in ("--account", "--partition", "--gres", "--cpus-per-task"):
        made.add_argument(name, help="of the job script")
    made.add_argument("--exclusive", action="store_true", help="of the job script")
    made.add_argument("--srun-arg", action="append", default=[], help="of the job script")
    accept(made, "--container-image", "--mount", "--env", "--experiment-name", "--distributed-timeout-minutes", because="no container is started")
    accept(made, "--no-gpu-resource-request", "--detach", nargs=0, because="no GPU is asked for, and nothing is submitted")
    parallel = ("-tp --tp --tensor-parallel-size", "-pp --pp --pipeline-parallel-size", "-ep --ep --expert-parallel-size",
                "-etp --etp --expert-tensor-parallel-size")  # fmt: skip
    accept(made, *parallel, because="a torch_dist checkpoint has no parallel layout")


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    if getattr(args, "hf_revision", None):
        return refuse(
            f"--hf-revision {args.hf_revision}: a revision is not looked up.", "Download it with `hf download --revision` and give the folder."
        )
    if args.emit_sbatch or args.executor == "slurm":
        print(job_script(args, argv))
        if not (args.emit_sbatch or args.dry_run):
            note("error: --executor slurm: nothing was submitted. Save the script above and give it to sbatch, or add --emit-sbatch.")
        return 0 if args.emit_sbatch or args.dry_run else 6
    if args.verb == "roundtrip":
        return round_trip(args)
    more = (*option("--overwrite", args.overwrite), *option("--dry-run", args.dry_run))
    if args.verb == "export":
        return export_checkpoint(args, *more)
    return import_release(args, *more)


def round_trip(args: argparse.Namespace) -> int:
    """To Megatron, perhaps back, and a comparison of every bit with the release."""
    if args.megatron_path:
        return run("verify", args.hf_model, args.megatron_path, "--origin", args.hf_model)
    with tempfile.TemporaryDirectory(prefix="glmconv-roundtrip-") as temporary:
        keep = args.megatron_save_path if not args.skip_save else None
        there = keep or str(Path(temporary, "megatron"))
        args.torch_dtype, args.megatron_path = None, there
        code = import_release(args, "--verify", "none", *option("--dry-run", args.dry_run))
        if code or args.dry_run:
            return code
        if args.output_dir and not args.skip_save:
            back = str(Path(args.output_dir, Path(args.hf_model).name))
            return run("convert", there, back, "--to", "hf", "--verify", "none") or run("verify", args.hf_model, back)
        return run("verify", args.hf_model, there)


def job_script(args: argparse.Namespace, argv: list[str]) -> str:
    """A job of as many tasks as there would have been GPUs: srun's ranks share the files."""
    more = [
        f"#SBATCH --{name.replace('_', '-')}={value}\n" for name in ("account", "partition", "gres", "cpus_per_task") if (value := vars(args)[name])
    ]
    if args.exclusive:
        more.append("#SBATCH --exclusive\n")
    words = [word for word in argv if word not in ("--emit-sbatch", "--dry-run", "--submission-dry-run", "--executor=slurm")]
    if "--executor" in words:
        del words[words.index("--executor") : words.index("--executor") + 2]
    srun = "".join(f"{shlex.quote(word)} " for word in args.srun_arg)
    return SBATCH.format(nodes=args.nodes, tasks=args.gpus_per_node, mem=args.mem, time=args.time, more="".join(more), srun=srun,
                         script=shlex.quote(str(Path(__file__).resolve())), words=shlex.join(words))  # fmt: skip


if __name__ == "__main__":
    finish(lambda: main(sys.argv[1:]))
