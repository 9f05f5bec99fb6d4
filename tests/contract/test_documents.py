"""What the documents say about files is true: the tour lists every module, and every file that a page names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from _support import SOURCE

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/page.md")),
    *(ROOT / "docs").rglob("*.md"),
    *SOURCE.rglob("README.md"),
]
PLACES = (ROOT, SOURCE, ROOT / "tests")
"""Where a path on a page may start."""

FILES_OF_USERS = {"finetune.py", "my_script.py", "script.py", "train.py"}
"""Names that stand for a program of the reader's."""

PATH = re.compile(r"(?<![\w./<-])([\w.-]+/)*[\w-]+\.(py|md|toml)\b(?!\()")
"""A path of a file, as it is written in a sentence or a command; not the end of an address."""


def test_the_tour_of_the_code_lists_every_module():
    tour = (ROOT / "CONTRIBUTING.md").read_text().partition("## A tour of the code")[2].partition("\n## ")[0]
    missing = []
    for path in SOURCE.rglob("*.py"):
        module = path.relative_to(SOURCE)
        if module.name == "__init__.py":
            continue
        row = (
            tour
            if module.parent == Path()
            else next((line for line in tour.splitlines() if line.startswith(f"| `{module.parent.as_posix()}/`")), "")
        )
        if f"`{module.name}`" not in row:
            missing.append(module.as_posix())
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: "/".join(page.parts[-2:]))
def test_a_page_names_only_files_that_exist(page):
    text = re.sub(r"https?://\S+", "", page.read_text())
    named = {match[0].removeprefix("./") for match in PATH.finditer(text)} - FILES_OF_USERS
    places = (page.parent, *PLACES)
    unknown = {name for name in named if not any((place / name).is_file() for place in places)}
    assert {name for name in unknown if not any(SOURCE.rglob(name)) and not any((ROOT / "tests").rglob(name))} == set()


def test_each_private_name_of_a_dependency_has_a_test_that_exists():
    decisions = (ROOT / "docs" / "design-decisions.md").read_text()
    rows = [line.split("|") for line in decisions.splitlines() if line.startswith(("| `_", "| |"))]
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(rows) > 10
    for _, _, name, _, noticed_by, _ in rows:
        names = re.findall(r"`(test_\w+)`", noticed_by)
        assert names, name
        assert [test for test in names if f"def {test}(" not in tests] == []


def test_a_path_is_found_in_a_sentence_and_in_a_command():
    text = "See `tests/tools/_golden.py`, or run\n    python examples/resume.py --help; call `a.py()`? https://x.y/z.py"
    found = [match[0] for match in PATH.finditer(re.sub(r"https?://\S+", "", text))]
    assert found == ["tests/tools/_golden.py", "examples/resume.py"]
