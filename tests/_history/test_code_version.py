"""The commit of the program is found in whatever way Git keeps it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pytorch_accelerated._history.code_version import code_version


@pytest.fixture
def program(monkeypatch, tmp_path):
    """Start a program in a folder, as far as `code_version` can tell."""

    def start(folder):
        folder.mkdir(parents=True, exist_ok=True)
        monkeypatch.setattr(sys.modules["__main__"], "__file__", str(folder / "train.py"), raising=False)

    start(tmp_path / "project" / "scripts")
    return start


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def write(folder, **files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"HEAD": "ref: refs/heads/main\n", "refs/heads/main": "abc\n"}, "abc"),
        (
            {"HEAD": "ref: refs/heads/main\n", "packed-refs": "# pack\n123 refs/heads/other\nabc refs/heads/main\n"},
            "abc",
        ),
        ({"HEAD": "abc\n"}, "abc"),
        ({"HEAD": "ref: refs/heads/main\n"}, None),
        ({"HEAD": ""}, None),
        ({"config": ""}, None),
    ],
    ids=["branch", "packed branch", "detached", "no commit", "empty", "damaged"],
)
def test_the_commit_is_that_of_the_repository_around_the_program(program, tmp_path, files, expected):
    write(tmp_path / "project" / ".git", **files)
    assert code_version() == expected


def test_a_repository_of_git_and_a_worktree_of_it(program, tmp_path):
    project, worktree = tmp_path / "project", tmp_path / "worktree"
    git(project, "init", "-q")
    assert code_version() is None
    git(project, "commit", "-q", "--allow-empty", "-m", "a")
    assert code_version() == git(project, "rev-parse", "HEAD")
    git(project, "worktree", "add", "-q", "-b", "other", worktree)
    git(worktree, "commit", "-q", "--allow-empty", "-m", "b")
    program(worktree)
    assert code_version() == git(worktree, "rev-parse", "HEAD") != git(project, "rev-parse", "HEAD")


def test_without_a_repository_or_a_script_there_is_none(program, monkeypatch, tmp_path):
    assert code_version() is None
    monkeypatch.delattr(sys.modules["__main__"], "__file__")
    monkeypatch.chdir(tmp_path)
    assert code_version() is None
