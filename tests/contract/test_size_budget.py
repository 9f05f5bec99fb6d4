"""No file and no function grows beyond what can be read in one go."""

from __future__ import annotations

import ast
import io
import tokenize

import pytest

from _support import SOURCE

MAX_FILE_LINES = 650
MAX_FUNCTION_LINES = 30

EXCEPTIONS = {
    "_loop.py:TrainingLoop.__init__": "every attribute is assigned there, one a line",
}
"""Functions that may be longer, each with the reason."""

FILES = sorted(SOURCE.rglob("*.py"))
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def code_lines(source: str) -> set[int]:
    """Return the numbers of the lines that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines


def function_lengths(source: str) -> dict[str, int]:
    """Return the code lines in the body of each function, without signature, docstring, blank lines and comments."""
    lines = code_lines(source)
    lengths: dict[str, int] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                visit(child, prefix)
                continue
            name = f"{prefix}{child.name}"
            if not isinstance(child, ast.ClassDef):
                body = child.body[1:] if ast.get_docstring(child) is not None else child.body
                lengths[name] = len(lines & set(range(body[0].lineno, child.end_lineno + 1))) if body else 0
            visit(child, f"{name}.")

    visit(ast.parse(source), "")
    return lengths


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_file_stays_within_its_budget(path):
    assert len(path.read_text().splitlines()) <= MAX_FILE_LINES


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_function_stays_within_its_budget(path):
    name_of_file = path.relative_to(SOURCE).as_posix()
    too_long = {
        name: length
        for name, length in function_lengths(path.read_text()).items()
        if length > MAX_FUNCTION_LINES and f"{name_of_file}:{name}" not in EXCEPTIONS
    }
    assert not too_long


def test_an_exception_from_the_budget_is_still_needed():
    lengths = {
        f"{path.relative_to(SOURCE).as_posix()}:{name}": length
        for path in FILES
        for name, length in function_lengths(path.read_text()).items()
    }
    assert {name for name in EXCEPTIONS if lengths.get(name, 0) <= MAX_FUNCTION_LINES} == set()


def test_only_code_lines_of_the_body_count():
    source = '''
class A:
    def f(
        self,
        x,
    ):
        """Doc.

        String.
        """
        # a comment
        y = (
            x
        )

        def g():
            return y

        return g
    def empty(self):
        """Doc."""
'''
    assert function_lengths(source) == {"A.f": 6, "A.f.g": 1, "A.empty": 0}
