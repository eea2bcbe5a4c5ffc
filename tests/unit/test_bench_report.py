"""The document of all benchmarks: a part replaces its own section and no other."""

import sys

import pytest

from bench import report
from bench.report import MNIST, Part

OLD = "# Benchmarks\n\nold machine\n\n## By hand\nkept\n\n| a |\n|---|\n\n## Second\nold figures\n"


@pytest.fixture
def document(tmp_path, monkeypatch):
    """Three parts that print a line, need MNIST, and fail, and a document with older sections."""
    (tmp_path / "good.py").write_text("import sys; print('figures', *sys.argv[1:])")
    (tmp_path / "bad.py").write_text("print('half a table'); raise SystemExit(4)")
    parts = (
        Part("First", "bad.py", "Text."),
        Part("Second", "good.py", "Text."),
        Part("Third", f"good.py {MNIST}", ""),
    )
    monkeypatch.setattr(report, "PARTS", parts)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "DOCUMENT", tmp_path / "benchmarks.md")
    report.DOCUMENT.write_text(OLD)
    return report.DOCUMENT


def test_a_part_that_fails_loses_no_other(document, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report.py"])
    with pytest.raises(SystemExit, match="not measured: First"):
        report.main()
    sections = report.read_sections(document.read_text())
    assert list(sections)[:4] == ["First", "Second", "Third", "By hand"]
    assert sections["First"].endswith("Not measured: the command ended with code 4.")
    assert "half a table" not in document.read_text() and "old" not in document.read_text()
    assert sections["Second"].endswith("Text.\n\nfigures")
    assert "Not measured: it needs MNIST" in sections["Third"]
    assert sections["By hand"] == "kept\n\n| a |\n|---|"


def test_only_one_part_and_no_folder_of_this_machine(document, monkeypatch, tmp_path):
    mnist = tmp_path / "my mnist"
    mnist.mkdir()
    (mnist / "train.parquet").touch()
    monkeypatch.setattr(sys, "argv", ["report.py", "--only", "Third", "--mnist", str(mnist)])
    report.main()
    sections = report.read_sections(document.read_text())
    assert sections["Second"] == "old figures" and "First" not in sections
    assert sections["Third"].endswith(f"figures {MNIST}")


def test_a_folder_without_the_data_is_said_before_anything_runs(document, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report.py", "--mnist", "nowhere"])
    with pytest.raises(SystemExit) as ended:
        report.main()
    assert ended.value.code == 2 and "no Parquet files in nowhere" in capsys.readouterr().err
    assert document.read_text() == OLD
