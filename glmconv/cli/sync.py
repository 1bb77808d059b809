"""`glmconv sync`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from glmconv.cli.options import output_of, output_options
from glmconv.cli.output import human, say, table
from glmconv.errors import UsageError

EPILOG = """\b
Examples:
  glmconv sync /models/glm45-fp8 /local/models/glm45-fp8 --hostfile hostfile
  glmconv sync /models/glm45-fp8 /local/models/glm45-fp8 --host node-1 --host node-2 --rsh 'ssh -p 2222'
"""


@click.command("sync", epilog=EPILOG)
@click.argument("src")
@click.argument("dst")
@click.option("--hostfile", type=click.Path(path_type=Path), help="A machine a line; slots= and comments are passed over.")
@click.option("--host", "hosts", multiple=True, metavar="NAME", help="A machine; several may be given.")
@click.option("--rsh", "remote_shell", help="How to get there. Default: ssh -o BatchMode=yes -o ConnectTimeout=20.")
@click.option("--at-once", type=click.IntRange(1, 256), default=4, show_default=True, help="Machines that are copied to at a time.")
@output_options
@click.pass_context
def command(ctx: click.Context, src: str, dst: str, hostfile: Path | None, hosts: tuple[str, ...], remote_shell: str | None, at_once: int) -> int:
    """Copy SRC, a finished output, into the folder DST of other machines by rsync; each file is checked there by its sha256.

    The manifest comes last, so a copy that was interrupted cannot pass for whole; the same command again goes on. localhost is copied to without ssh.
    """
    from glmconv.cli.sessions import stoppable
    from glmconv.fleet.hosts import machine, read_hostfile
    from glmconv.fleet.programs import REMOTE_SHELL
    from glmconv.fleet.sync import failure, sync

    out = output_of(ctx)
    machines = list(dict.fromkeys([*(read_hostfile(hostfile) if hostfile else []), *(machine(name, "--host") for name in hosts)]))
    if not machines:
        raise UsageError("no machine is named.", hint="Pass --hostfile FILE or --host NAME.")
    with stoppable() as stop:
        copies = sync(src, dst, machines, remote_shell=remote_shell or REMOTE_SHELL, at_once=at_once, stop=stop, log=out.detail)
    wrong = list(failure(copies))
    if wrong:
        for _, line in wrong:
            say(f"error: {line}")
        return int(max(code for code, _ in wrong))
    if out.json:
        out.json_data({"hosts": [asdict(copy) for copy in copies]})
    else:
        out.data(table([(copy.host, copy.state, human(copy.bytes)) for copy in copies], ("host", "state", "bytes copied")))
    return 0
