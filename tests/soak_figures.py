"""Writes the figures of `make soak` between the markers in docs/reliability.md: one line a test, from pytest's junit report.

    python tests/soak_figures.py build/soak.xml docs/reliability.md

A test says what it counted with pytest's own `record_property("states", 20_000)`.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

BEGIN, END = "<!-- soak: begin -->", "<!-- soak: end -->"


def rows(report: ET.Element) -> Iterator[str]:
    """A table row for each test that counted something, and for each that failed."""
    for case in report.iter("testcase"):
        counted = ", ".join(f"{int(p.attrib['value']):,} {p.attrib['name']}" for p in case.iter("property") if p.attrib["value"].isdigit())
        failed = case.find("failure") is not None or case.find("error") is not None
        if counted or failed:
            name = case.attrib["name"].removeprefix("test_").replace("_", " ").replace("|", "/")
            yield f"| {name} | {counted} | {float(case.attrib['time']):,.0f} s | {'FAILED' if failed else 'passed'} |"


def section(report: ET.Element) -> str:
    suite = next(report.iter("testsuite")).attrib
    line = f"Run on {suite['timestamp'][:10]}: {suite['tests']} tests, {suite['failures']} failures, {suite['errors']} errors, {suite['skipped']} skipped."
    return "\n".join([BEGIN, "", line, "", "| test | counted | time | result |", "|---|---|---|---|", *rows(report), "", END])


def filled(text: str, new: str) -> str:
    """`text` with `new` in place of what stands between the markers. ValueError if they are not there once each."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after:
        raise ValueError(f"needs one {BEGIN} and one {END}")
    return before + new + after


def main() -> None:
    report, document = map(Path, sys.argv[1:])
    document.write_text(filled(document.read_text(encoding="utf-8"), section(ET.parse(report).getroot())), encoding="utf-8")


if __name__ == "__main__":
    main()
