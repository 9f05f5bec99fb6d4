"""Log files: whole lines whatever happens, continued by a resumed run, and set aside by another one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pytorch_accelerated._history.log_file import LogFile, first_record, from_json_line, to_json_line
from pytorch_accelerated._history.records import Moment, Record


@pytest.fixture
def log(tmp_path):
    return LogFile(tmp_path / "new folder" / "log.txt", identity=first_record)


def contents(folder):
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


def test_a_file_that_is_not_there_has_no_lines(log):
    assert log.read() == []


@pytest.mark.parametrize("torn", ["", "c", 'c "half', "\0\0"])
def test_a_torn_last_line_is_skipped_and_removed_by_the_run_that_continues(log, torn):
    log.replace(["a", "b"])
    log.path.write_text(log.path.read_text() + torn)
    assert log.read() == ["a", "b"]
    log.start(["a", "b"], is_new=False)
    log.append(["d"])
    assert contents(log.path.parent) == {"log.txt": "a\nb\nd\n"}


@pytest.mark.parametrize("present", [["a"], ["a", "b"], ["a", "b", "c", "d"], ["a", "x"]])
def test_a_resumed_run_makes_the_file_what_it_had_logged(log, present):
    """Shorter after a loss of power, longer after a kill; another second line if the run took another course."""
    log.replace(present)
    log.start(["a", "b"], is_new=False)
    assert contents(log.path.parent) == {"log.txt": "a\nb\n"}


def test_a_file_is_set_aside_if_nothing_tells_whose_it_is(log):
    """The state that a run is resumed from may be older than its first line."""
    log.replace(["a"])
    log.start([], is_new=False)
    log.start([], is_new=True)
    assert contents(log.path.parent) == {"log.txt": "", "log.1.txt": "a\n"}


def test_the_file_of_another_run_is_set_aside(log):
    for lines, is_new in [(["a"], True), (["a"], True), (["b"], False), (["b"], False)]:
        log.start(lines, is_new=is_new)
    assert contents(log.path.parent) == {"log.txt": "b\n", "log.1.txt": "a\n", "log.2.txt": "a\n"}


def test_a_failure_to_replace_the_file_leaves_it_and_nothing_else(log, monkeypatch):
    log.replace(["a"])
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        log.replace(["b"])
    assert contents(log.path.parent) == {"log.txt": "a\n"}


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (1, 1),
        (0.1, 0.1),
        (math.inf, math.inf),
        (-math.inf, -math.inf),
        (torch.tensor(0.5), 0.5),
        (np.float64(0.1), 0.1),
        ("text\nof two lines", "text of two lines"),
        (True, 1.0),
    ],
)
def test_a_record_is_read_as_it_was_written(value, read):
    moment = Moment(1, 10, 80, 1234.0625)
    line = to_json_line(Record("a metric", value, moment))
    assert "\n" not in line
    assert from_json_line(line) == Record("a metric", read, moment)


def test_what_is_not_a_number_is_not_one_after_reading_either():
    assert math.isnan(from_json_line(to_json_line(Record("a", float("nan")))).value)


@pytest.mark.parametrize("line", ["", "{", "[]", "1", '{"metric": "a"}', '{"value": 1}'])
def test_another_line_is_no_record(line):
    with pytest.raises(ValueError, match=r"."):
        from_json_line(line)
