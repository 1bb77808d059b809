"""The documents are held against the command line: each command in them runs, each option, default, field and exit code is the real one."""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from glmconv.cli import COMMANDS, group
from glmconv.cli.pipelines import load_pipeline
from glmconv.errors import ExitCode
from tests.conftest import Glmconv

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CLI = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
OUTPUT, RUN = "Output options", "Run options"
SECTIONS = {
    (): ("glmconv",),
    ("convert",): ("glmconv convert", RUN, OUTPUT),
    ("plan",): ("glmconv plan", RUN, OUTPUT),
    ("run",): ("glmconv run", OUTPUT),
    ("sync",): ("glmconv sync", OUTPUT),
    ("doctor",): ("glmconv doctor", OUTPUT),
    ("verify",): ("glmconv verify", OUTPUT),
    ("inspect",): ("glmconv inspect", OUTPUT),
    ("toy",): ("glmconv toy", OUTPUT),
    ("models", "list"): (OUTPUT,),
    ("models", "show"): (OUTPUT,),
}


def blocks(text: str, kind: str = "") -> Iterator[str]:
    """The fenced code blocks of one language."""
    yield from (code for language, code in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) if language == kind)


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Each `$ glmconv ...` line of the document, and the lines of output that the document shows below it."""
    found: list[tuple[str, list[str]]] = []
    for block in blocks(text):
        if block.startswith("$ "):
            for line in block.splitlines():
                if line.startswith("$ "):
                    found.append((line.removeprefix("$ "), []))
                else:
                    found[-1][1].append(line)
    return found


def section(title: str) -> str:
    """What stands below a heading of docs/cli.md, up to the next of its level."""
    return next(part.partition("\n")[2] for part in CLI.split("\n## ") if part.startswith(title + "\n"))


def table(text: str, head: str) -> list[list[str]]:
    """The cells of every table below this head."""
    rows: list[list[str]] = []
    within = False
    for line in text.splitlines():
        within = line.startswith(head) or (within and line.startswith("|"))
        if within and not line.startswith((head, "|---")):
            rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


def options(title: str) -> dict[frozenset[str], str]:
    """Spellings of each option in a section's table -> its default."""
    return {frozenset(re.findall(r"`(-[^`]+)`", spellings)): default for spellings, default, *_ in table(section(title), "| option |")}


def fields(title: str) -> list[set[str]]:
    """The JSON fields of a section, one set for each of its tables."""
    parts = section(title).split("| field |")[1:]
    return [{name for cells in table("| field |" + part, "| field |") for name in re.findall(r"`(\w+)`", cells[0])} for part in parts]


def command_of(path: tuple[str, ...]) -> click.Command:
    if not path:
        return group
    found: click.Command = importlib.import_module(f"glmconv.cli.{path[0]}").command
    return found.commands[path[1]] if isinstance(found, click.Group) else found


def here_are(names: set[str]) -> set[str]:
    """Those of the commands that can be run here: copying needs rsync."""
    return names - (set() if shutil.which("rsync") else {"sync"})


def run_all(text: str, glmconv: Glmconv) -> Iterator[tuple[str, str, list[str]]]:
    """Run a document's commands one after another here: (command, stdout without this folder's path, what the document shows)."""
    for line, shown in commands(text):
        name, *arguments = shlex.split(line.replace("$PWD", os.getcwd()))
        assert name == "glmconv", line
        if arguments[0] not in here_are(set(COMMANDS)):
            continue
        answer = glmconv(*arguments)
        assert answer.code == 0, f"{line}: {answer.err}"
        yield line, answer.out.replace(f"{os.getcwd()}/", ""), shown


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_of_the_readme_runs_and_says_what_the_readme_shows(here, glmconv):
    ran = list(run_all(README, glmconv))
    assert len(ran) >= 4
    for line, said, shown in ran:
        assert said.splitlines() == [row for row in shown if row], line


PIPELINE = "source: toy\ntargets: {torch_dist: '${BASE_DIR}/mcore', fp8: '${BASE_DIR}/fp8'}\n"


def test_every_command_of_the_command_lines_document_runs(here, glmconv):
    (here / "pipeline.yaml").write_text(PIPELINE)
    ran = [line for line, *_ in run_all(CLI, glmconv)]
    assert {shlex.split(line)[1] for line in ran} == here_are(set(COMMANDS))


def test_the_readmes_python_runs(here, glmconv, capfd):
    assert glmconv("toy", "glm4.5-355B-A32B", "-o", "toy").code == 0
    capfd.readouterr()
    for block in blocks(README, "python"):
        exec(compile(block, "README.md", "exec"), {})
    said = capfd.readouterr().out.splitlines()
    assert said == re.findall(r"# prints (.+)$", README, re.MULTILINE)
    assert said


@pytest.mark.parametrize("path", SECTIONS, ids=" ".join)
def test_the_options_of_a_command_are_those_in_the_document(path):
    documented = {spellings for title in SECTIONS[path] for spellings in options(title)}
    command = command_of(path)
    real = {frozenset((*p.opts, *p.secondary_opts)) for p in command.params if isinstance(p, click.Option)}
    helps = {frozenset(("-h", "--help"))} if not path else set()
    assert documented - helps == real


@pytest.mark.parametrize("path", SECTIONS, ids=" ".join)
def test_the_defaults_of_a_command_are_those_in_the_document(path):
    documented = {spellings: default for title in SECTIONS[path] for spellings, default in options(title).items()}
    for option in command_of(path).params:
        if isinstance(option, click.Option) and option.show_default:
            shown = "resume" if option.name == "resume" and option.default else str(option.default)
            assert documented[frozenset((*option.opts, *option.secondary_opts))] == shown, option.name


def test_the_page_of_models_is_what_the_tables_say():
    written = runpy.run_path(str(ROOT / "docs/models.py"))["page"]()
    assert (ROOT / "docs/models.md").read_text(encoding="utf-8") == written, "run `make docs`"


def test_every_command_has_its_section():
    assert {title.removeprefix("glmconv ") for title in re.findall(r"^## (glmconv \w+)$", CLI, re.MULTILINE)} == set(COMMANDS)


def test_the_exit_codes_are_those_in_the_document():
    documented = [int(code) for code, *_ in table(section("Exit codes"), "| code |")]
    assert documented == sorted(ExitCode)


def test_json_has_the_fields_that_the_document_names(here, glmconv):
    def keys(*arguments: str) -> set[str]:
        value = json.loads(glmconv(*arguments, "--json").out)
        return set(value[0] if isinstance(value, list) else value)

    small = ("--layers", "4", "--experts", "8", "--scale", "1/32")
    assert [keys("toy", "glm4.5-355B-A32B", "-o", "toy", *small)] == fields("glmconv toy")
    assert [keys("inspect", "toy", "--tensors")] == fields("glmconv inspect")
    assert [keys("plan", "toy", "--to", "torch_dist")] == fields("glmconv plan")
    assert [keys("convert", "toy", "mcore", "--to", "torch_dist")] == fields("glmconv convert")
    assert [keys("verify", "toy", "mcore"), keys("verify", "mcore")] == fields("glmconv verify")
    assert [keys("models", "list")] == fields("glmconv models")
    (here / "pipeline.yaml").write_text("source: toy\ntargets: {torch_dist: mcore}\n")
    assert [keys("run", "pipeline.yaml", "--dry-run")] == fields("glmconv run")
    assert [keys("doctor", ".")] == fields("glmconv doctor")
    if "sync" in here_are(set(COMMANDS)):
        assert [keys("sync", "mcore", f"{here}/copy", "--host", "localhost")] == fields("glmconv sync")


def test_the_pipeline_in_the_document_is_in_order(here):
    (text,) = blocks(CLI, "yaml")
    (here / "pipeline.yaml").write_text(text)
    pipeline = load_pipeline("pipeline.yaml", {"BASE_DIR": "/data"})
    assert [target.spec.to for target in pipeline.targets] == ["torch_dist", "fp8", "gguf:Q4_K_M"]
