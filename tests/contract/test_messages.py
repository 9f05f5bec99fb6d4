"""Each mistake is answered before training, with the text that `messages.md` has for it."""

from __future__ import annotations

import re

import pytest

from _mistakes import KNOWN_LATER, MISTAKES, TABLE, as_table, outcome_of

ROW = re.compile(r"^\| (?P<name>.*?) \| (?P<kind>\w+) \| (?P<text>.*) \|$", flags=re.MULTILINE)
ROWS = {row["name"]: (row["kind"], row["text"]) for row in ROW.finditer(TABLE.read_text(encoding="utf-8"))}
del ROWS["mistake"]  # the head of the table


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered_with_the_text_of_the_table(name):
    outcome = outcome_of(MISTAKES[name])
    assert outcome is not None
    assert (outcome.kind, outcome.text) == ROWS[name]
    assert outcome.num_updates == 0 or name in KNOWN_LATER


def test_the_table_has_a_row_for_each_mistake_and_no_other():
    assert list(ROWS) == list(MISTAKES)
    assert len(ROWS) >= 60
    assert ROWS.keys() >= KNOWN_LATER


STARTS_WITH_PYTHONS_WORDS = {
    "a callback whose `__init__` leaves out that of its base class",
    "a model called with too much",
}
"""The errors to which the library adds a note."""


@pytest.mark.parametrize("name", sorted(ROWS.keys() - STARTS_WITH_PYTHONS_WORDS))
def test_a_text_consists_of_sentences(name):
    """What is wrong comes first, and the last sentence, before the note on its origin, says what to do."""
    _, text = ROWS[name]
    assert re.match(r"[A-Z`'<]", text)  # a name or a value may be first
    assert text.partition(" raised by the callback")[0].endswith((".", "?"))
    assert ".." not in text.replace("(...)", "").replace("...", "")


def test_the_table_is_written_in_markdown():
    assert TABLE.read_text(encoding="utf-8").startswith(as_table({}).rstrip())
