"""The command line: parse, call, print. Nothing here that the Python API could not do; each command is imported when it is called."""

from __future__ import annotations

import contextlib
import errno
import importlib
import sys

import click

from glmconv.errors import ExitCode

COMMANDS = {
    "convert": "Convert a checkpoint into one or several formats.",
    "doctor": "Look at this installation, its machines and shared folders.",
    "inspect": "Say what a checkpoint is and whether it is complete.",
    "models": "List the presets, or show an architecture's table.",
    "plan": "Say what a conversion would read, write and need.",
    "run": "Carry out a pipeline: download, convert into several formats, verify.",
    "sync": "Copy a finished output to other machines, checked there.",
    "toy": "Make a small checkpoint of a preset.",
    "verify": "Compare two checkpoints bit by bit, or one with its manifest.",
}
EPILOG = "Exit codes: 0 done, 1 different, 2 usage, 3 no room, 4 destination, 5 source, 6 unsupported, 7 output failed, 8 verification failed."


class Commands(click.Group):
    """Loads a command's module when it is used, so that `--help` needs neither torch nor numpy."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"glmconv.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        from importlib.metadata import version

        click.echo(f"glmconv {version('glmconv')}")
        ctx.exit()


@click.group(cls=Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
@click.pass_context
def group(ctx: click.Context, debug: bool) -> None:
    """Convert GLM checkpoints between Hugging Face, Megatron torch_dist, FP8, 4 bits and GGUF: on CPUs, streaming, resumable, exact."""
    ctx.ensure_object(dict)


def main(args: list[str] | None = None) -> None:
    """Run a command line and exit with its code (docs/cli.md)."""
    sys.exit(execute(sys.argv[1:] if args is None else args))


def execute(args: list[str]) -> int:
    """A command line's exit code; errors are one line on stderr."""
    from glmconv.cli.sessions import exit_code

    plain = [arg for arg in args if arg != "--debug"]  # accepted anywhere on the line
    try:
        result = group.main(plain, prog_name="glmconv", standalone_mode=False)
        return int(result) if isinstance(result, int) else int(ExitCode.OK)
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except click.Abort:  # what click makes of a KeyboardInterrupt
        return exit_code(KeyboardInterrupt(), debug=False)
    except click.ClickException as problem:
        with contextlib.suppress(OSError):  # on a full disk
            problem.show()
        return int(ExitCode.USAGE)
    except BrokenPipeError:
        return int(ExitCode.OK)
    except OSError as problem:
        full = problem.errno == errno.ENOSPC and problem.filename is None  # a help text or version that there is no room for
        return int(ExitCode.OUTPUT) if full else exit_code(problem, debug="--debug" in args)
    except BaseException as problem:
        if isinstance(problem, (SystemExit, GeneratorExit)):
            raise
        return exit_code(problem, debug="--debug" in args)
