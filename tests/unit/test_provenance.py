"""The commit that a start ran from, as git has it."""

import subprocess

from train.engine.provenance import find_commit


def git(folder, *arguments):
    names = ["-c", "user.name=tester", "-c", "user.email=tester@example.org"]
    command = ["git", "-C", str(folder), *names, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_commit_and_changes(tmp_path):
    assert find_commit(tmp_path) is None
    git(tmp_path, "init", "--quiet")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert find_commit(tmp_path) == commit
    (tmp_path / "untracked").write_text("no part of the code")
    assert find_commit(tmp_path) == commit
    (tmp_path / "file").write_text("two")
    assert find_commit(tmp_path) == f"{commit}+changes"
