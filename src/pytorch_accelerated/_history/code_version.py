"""The version of the program that trains: the commit of its Git repository."""

from __future__ import annotations

import sys
from pathlib import Path


def code_version() -> str | None:
    """Return the commit that is checked out in the repository of the program; ``None`` if there is none.

    The program is the script that was started, or else what is in the current folder. Git need not be installed.
    """
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    try:
        folder = Path.cwd() if script is None else Path(script).absolute().parent
        git_folder = next((found for each in (folder, *folder.parents) if (found := _git_folder(each))), None)
        return None if git_folder is None else _commit_in(git_folder)
    except (OSError, UnicodeDecodeError):
        return None


def _git_folder(folder: Path) -> Path | None:
    entry = folder / ".git"
    if entry.is_file():  # of a worktree or a submodule
        return folder / entry.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
    return entry if entry.is_dir() else None


def _commit_in(git_folder: Path) -> str | None:
    head = (git_folder / "HEAD").read_text(encoding="utf-8").strip()
    if not head.startswith("ref:"):
        return head or None
    reference, common = head.removeprefix("ref:").strip(), git_folder / "commondir"
    folders = [git_folder]
    if common.is_file():  # the branches of a worktree are in the main repository
        folders.append(git_folder / common.read_text(encoding="utf-8").strip())
    for folder in folders:
        if (folder / reference).is_file():
            return (folder / reference).read_text(encoding="utf-8").strip()
        packed = folder / "packed-refs"
        for line in packed.read_text(encoding="utf-8").splitlines() if packed.is_file() else ():
            if line.endswith(f" {reference}"):
                return line.partition(" ")[0]
    return None  # nothing has been committed yet
