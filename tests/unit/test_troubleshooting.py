"""docs/troubleshooting.md: links lead there, and what it quotes is what the program says."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import torch

from data_modules.options import DataOptions
from train.classify import ClassifySettings
from train.engine import cli
from train.engine.checks.finding import judge
from train.engine.checks.report import SECTIONS, Report
from train.engine.errors import GUIDE, see

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / GUIDE).read_text(encoding="utf-8")
FILES = [file for part in ("train", "data_modules", "launch") for file in sorted((ROOT / part).rglob("*.py"))]
SHORTEST = 3  # letters of a piece of text that proves a quotation


def anchors(text):
    """Return the anchors of headings by GitHub's rule: lower case, only letters, digits, _, - and spaces as -."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@cache
def literals():
    """Return the texts in the source, without docstrings; of f-strings what stands between the braces."""
    found = set()
    for file in FILES:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docstrings)
        found |= {node.value.strip(" .,:;()\n") for node in nodes if isinstance(node.value, str)}
    return sorted((text for text in found if len(text) >= SHORTEST), key=len, reverse=True)


def unknown_words(quoted):
    """Return the plain words of a quotation that no text of the source has; names, numbers and paths are not plain."""
    quoted = re.sub(r"see docs/\S+", "", quoted)
    if any(quoted.strip() in text for text in literals()):  # a part of a longer text
        return []
    for text in literals():
        quoted = quoted.replace(text, " | ")
    return [word for word in re.findall(r"[^\s()]+", quoted) if re.fullmatch(r"[A-Za-z]{3,}[,.;:]?", word)]


def quotations():
    """Return what the guide says the program says: lines fenced as text, cut where dots shorten them, and "words"."""
    fenced = re.findall(r"```text\n(.*?)```", TEXT, re.DOTALL)
    lines = [part for block in fenced for line in block.splitlines() for part in line.split("...")]
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", TEXT, flags=re.DOTALL)
    return [part.strip() for part in [*lines, *re.findall(r'"([^"]+)"', prose)] if part.strip()]


def test_every_link_of_the_program_leads_to_a_section():
    used = {
        node.args[0].value
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") == "see"
        and isinstance(node.args[0], ast.Constant)
    }
    assert len(used) >= 5
    assert used | set(SECTIONS.values()) <= set(anchors(TEXT))


def test_links_in_the_guide_lead_somewhere():
    for file, anchor in re.findall(r"\]\(([\w./]*)#?([\w-]*)\)", TEXT):
        target = ROOT / "docs" / file if file else ROOT / GUIDE
        assert target.exists(), file
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), anchor


def test_headings_are_unique():
    assert len(set(anchors(TEXT))) == len(anchors(TEXT))


@pytest.mark.parametrize("name", SECTIONS)
def test_checks_with_a_section_exist(name):
    checks = [file for file in FILES if file.parent.name == "checks" and file.name != "report.py"]
    assert any(f'"{name}"' in file.read_text(encoding="utf-8") for file in checks)


@pytest.mark.parametrize("quoted", dict.fromkeys(quotations()))
def test_quotations_are_what_the_program_says(quoted):
    assert not unknown_words(" ".join(quoted.split()))


def test_flags_in_the_guide_exist():
    known = {*ClassifySettings.__dataclass_fields__, *DataOptions.__dataclass_fields__, "verify", "split", "nnodes"}
    known |= {"pid"}  # of py-spy
    assert set(re.findall(r"--([a-z][\w-]*)", TEXT)) <= known


def test_a_failed_check_points_to_its_section():
    report = Report("full", (judge("step size", False, "1e-9", "1e-6 or more", ("raise it",)),), 0.5)
    assert see("loss-does-not-fall") in report.summary() and see("loss-does-not-fall") in report.markdown()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), MemoryError(), None], ids=["device", "host", "torch"]
)
def test_lack_of_memory_points_to_its_section(error, capsys):
    def work():
        if error is not None:
            raise error
        torch.empty(10**16)

    with pytest.raises(SystemExit) as left:
        cli.leave_with(work)
    said = capsys.readouterr().err
    assert left.value.code == 1 and "Traceback" in said
    assert said.splitlines()[-1] == f"error: there is not enough memory; {see('out-of-memory')}"
