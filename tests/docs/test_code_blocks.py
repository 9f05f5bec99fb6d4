"""Every Python block of the README and the documentation runs, in order, as if a reader pasted it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BROKEN_PAGE = """\
# A page

```python
x = 1
```

text

```python
assert x == 1
assert x == 2
```
"""
pytestmark = pytest.mark.usefixtures("_fresh_accelerate_state")  # a page may set a precision
FENCED_PYTHON = re.compile(r"^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)

FENCED_TEXT = re.compile(r"^```text\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
FENCED_LINES = re.compile(r"^```py(?:thon)?\n(?:# (\w+)[^\n]*\n)?(.*?)^```$", re.MULTILINE | re.DOTALL)
"""A block of another library begins with its name; one of ours does not."""

NUMBER = re.compile(r"\d[\d.]*(e-\d+)?")


class Block(NamedTuple):
    """A fenced block and the line of the page on which its code starts."""

    code: str
    first_line: int


def python_blocks(text: str) -> list[Block]:
    """Return the fenced Python blocks of a page, in order."""
    return [
        Block(match["code"], text.count("\n", 0, match.start("code")) + 1) for match in FENCED_PYTHON.finditer(text)
    ]


def run_page(page: Path) -> None:
    """Run the blocks of a page in one namespace; a failure names the page and the line."""
    namespace: dict[str, object] = {"__name__": "__docs__"}
    for block in python_blocks(page.read_text(encoding="utf-8")):
        padded = "\n" * (block.first_line - 1) + block.code  # keeps the line numbers of the page
        try:
            exec(compile(padded, str(page), "exec"), namespace)
        except Exception as error:
            pytest.fail(f"{page.name}:{failing_line(error, page, block)}: {error!r}")


def failing_line(error: BaseException, page: Path, block: Block) -> int:
    """Return the line of the page that raised, or that is not valid Python."""
    if isinstance(error, SyntaxError) and error.filename == str(page):
        return error.lineno or block.first_line
    traceback, line = error.__traceback__, block.first_line
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == str(page):
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(page)


def test_a_failing_block_is_reported_with_page_and_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(BROKEN_PAGE)
    with pytest.raises(pytest.fail.Exception, match=r"page\.md:11: AssertionError"):
        run_page(page)


def test_a_block_that_is_not_valid_python_is_reported_with_page_and_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\ny = = 2\n```\n")
    with pytest.raises(pytest.fail.Exception, match=r"page\.md:3: SyntaxError"):
        run_page(page)


def test_the_readme_shows_what_its_first_program_prints(tmp_path, monkeypatch, capsys):
    """All but the digits: durations differ, and so may the last digits of a loss with another version of PyTorch."""
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    program = next(block for block in python_blocks(readme) if "Trainer(" in block.code)
    exec(compile(program.code, "README.md", "exec"), {"__name__": "__docs__"})
    printed = capsys.readouterr().out.strip()
    shown = next(match["text"] for match in FENCED_TEXT.finditer(readme) if "train loss" in match["text"]).strip()
    assert [NUMBER.sub("0", line).split() for line in printed.splitlines()] == [
        NUMBER.sub("0", line).split() for line in shown.splitlines()
    ]
    losses = [[float(number) for number in re.findall(r"0\.\d{3,}", text)] for text in (printed, shown)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_the_readme_names_make_demo_and_make_test_which_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test"):
        assert f"make {target}" in readme
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_lines_of_each_task_are_counted_right_and_no_library_needs_fewer():
    page = (ROOT / "docs" / "lines.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| \[(.+?)\]\(.*?\) \| (\d.*) \|$", page, re.MULTILINE))
    counted = {}
    for section in page.split("\n## ")[2:]:
        lines = dict.fromkeys(("", "Lightning", "Keras", "fastai"), 0)
        for library, code in FENCED_LINES.findall(section):
            lines[library] += code.count("  # +\n")
        assert lines[""] == min(lines.values())
        counted[section.partition("\n")[0].lower()] = list(lines.values())
    assert counted == {task.lower(): [int(number) for number in numbers.split("|")] for task, numbers in table.items()}
