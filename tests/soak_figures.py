"""Writes the figures of `make soak` between the markers in docs/reliability.md: one line a test, from pytest's junit report.

    python tests/soak_figures.py build/soak.xml docs/reliability.md

A test says what it counted by printing a line; pytest keeps it in the report (`-o junit_logging=system-out`).
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

BEGIN, END = "<!-- soak: begin -->", "<!-- soak: end -->"


def rows(report: ET.Element) -> Iterator[str]:
    """A table row for each test that printed a figure, and for each that failed."""
    for case in report.iter("testcase"):
        printed = "; ".join(line for line in (case.findtext("system-out") or "").splitlines() if line.strip() and not line.startswith("---"))
        failed = case.find("failure") is not None or case.find("error") is not None
        if printed or failed:
            cells = [case.attrib["name"].removeprefix("test_").replace("_", " "), printed, f"{float(case.attrib['time']):,.0f} s"]
            yield f"| {' | '.join(cell.replace('|', '/') for cell in cells)} | {'FAILED' if failed else 'passed'} |"


def section(report: ET.Element) -> str:
    suite = next(report.iter("testsuite")).attrib
    counts = ", ".join(f"{suite[kind]} {kind}" for kind in ("tests", "failures", "errors", "skipped"))
    line = f"Run on {suite['timestamp'][:10]}: {counts}."
    return "\n".join([BEGIN, "", line, "", "| test | figures | time | result |", "|---|---|---|---|", *rows(report), "", END])


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
