"""What stands beside the package says the same as the package: versions, pins, targets, figures."""

from __future__ import annotations

import re
import subprocess
import xml.etree.ElementTree as ET
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.soak_figures import BEGIN, END, filled, section

ROOT = Path(__file__).parent.parent


def pins() -> dict[str, str]:
    """What constraints.txt pins for this Python, by normalized name."""
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    wanted = [requirement for requirement in map(Requirement, lines) if requirement.marker is None or requirement.marker.evaluate()]
    return {re.sub(r"[-_.]+", "-", r.name).lower(): str(r.specifier) for r in wanted}


def test_every_dependency_is_pinned_to_a_version_that_the_package_allows():
    pinned = pins()
    for line in metadata.requires("glmconv") or []:
        requirement = Requirement(line)
        version = pinned[re.sub(r"[-_.]+", "-", requirement.name).lower()]
        assert version.startswith("==")
        assert requirement.specifier.contains(version.removeprefix("==")), line


def test_constraints_name_packages_and_versions_only():
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        assert re.fullmatch(r'#.*|[A-Za-z0-9._-]+==[0-9.]+( ; python_version (<|>=) "3\.11")?', line), line


def test_make_alone_lists_the_targets():
    shown = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("setup", "demo", "test", "interop", "lint", "format", "soak", "bench", "clean"):
        assert f"make {target} " in shown


def test_the_document_has_its_place_for_figures():
    assert filled((ROOT / "docs/reliability.md").read_text(encoding="utf-8"), "FIGURES").count("FIGURES") == 1


def test_soak_figures_replace_the_old_ones_and_name_a_failure():
    report = ET.fromstring(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="0" timestamp="2026-01-02T03:04:05">'
        '<testcase name="test_a_crash_anywhere_is_survived" time="61.2">'
        "<system-out>--- Captured Out ---\n20,000 states | 0 bad\n</system-out></testcase>"
        '<testcase name="test_that_fails" time="1.0"><failure/></testcase><testcase name="test_that_counts_nothing" time="1.0"/>'
        "</testsuite></testsuites>"
    )
    text = filled(f"before\n{BEGIN}\nold\n{END}\nafter\n", section(report))
    assert "| a crash anywhere is survived | 20,000 states / 0 bad | 61 s | passed |\n| that fails |  | 1 s | FAILED |\n\n" in text
    assert text.startswith("before\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text


def test_a_document_without_markers_is_refused():
    with pytest.raises(ValueError, match="needs one"):
        filled("no markers", "figures")


@pytest.mark.parametrize("document", [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name)
def test_every_path_that_a_document_names_is_there(document):
    text = document.read_text(encoding="utf-8")
    named = re.findall(r"`((?:tests|docs|bench|tools|changelog|glmconv)/[\w./-]*)`", text)
    linked = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    assert [path for path in named if not (ROOT / path).exists()] == []
    assert [path for path in linked if not (document.parent / path).exists()] == []
