"""Records in the order in which they were made, as rows, and those that are new."""

from __future__ import annotations

from pytorch_accelerated._history.records import (
    UNKNOWN,
    Moment,
    Record,
    columns_of,
    num_recorded,
    records_of,
    records_since,
    rows_of,
)
from pytorch_accelerated._history.tables import csv_lines, html_table, text_table
from pytorch_accelerated.tracking import InMemoryRunHistory

FIRST, SECOND = Moment(1, 10, 80, 1.0), Moment(2, 20, 160, 4.5)


def names_and_values(records):
    return [(record.name, record.value) for record in records]


def test_values_without_moments_come_first_those_of_one_index_together():
    series = {"b": [1, 2], "a": [3, 4, 5]}
    assert names_and_values(records_of(series)) == [("a", 3), ("b", 1), ("a", 4), ("b", 2), ("a", 5)]
    assert rows_of(records_of(series)) == [
        {**UNKNOWN._asdict(), "a": 3, "b": 1},
        {**UNKNOWN._asdict(), "a": 4, "b": 2},
        {**UNKNOWN._asdict(), "a": 5},
    ]


def test_values_of_an_earlier_version_are_followed_by_those_with_moments():
    records = list(records_of({"a": [1, 2], "b": [3]}, [("b", FIRST), ("a", SECOND)]))
    assert records == [Record("a", 1), Record("b", 3, FIRST), Record("a", 2, SECOND)]


def test_moments_without_a_value_are_passed_over():
    """A subclass may have removed values of its own accord."""
    records = records_of({"a": [2]}, [("a", FIRST), ("gone", FIRST), ("a", SECOND)])
    assert list(records) == [Record("a", 2, SECOND)]


def test_what_is_recorded_twice_after_one_update_is_in_two_rows():
    rows = rows_of([Record("a", 1, FIRST), Record("a", 2, FIRST), Record("b", 3, FIRST), Record("a", 4, SECOND)])
    assert [{name: row[name] for name in ("a", "b") if name in row} for row in rows] == [
        {"a": 1},
        {"a": 2, "b": 3},
        {"a": 4},
    ]


def test_the_time_of_a_row_is_that_of_its_first_record():
    (row,) = rows_of([Record("a", 1, FIRST), Record("b", 2, FIRST._replace(time=99.0))])
    assert row["time"] == FIRST.time


def test_a_metric_with_the_name_of_a_part_of_the_moment_takes_no_place():
    (row,) = rows_of([Record("time", 3, FIRST)])
    assert (row["time"], row["time (metric)"]) == (1.0, 3)


def test_columns_stay_where_they_are():
    rows = rows_of([Record("b", 1, FIRST), Record("a", 2, SECOND)])
    assert columns_of(rows) == ["epoch", "update", "samples", "time", "b", "a"]
    assert csv_lines(rows) == ["epoch,update,samples,time,b,a", "1,10,80,1.0,1,", "2,20,160,4.5,,2"]


def test_records_are_new_once_even_if_others_were_deleted():
    history = InMemoryRunHistory()
    history.update_metric("a", 1)
    assert names_and_values(records_since(history, {})) == [("a", 1)]
    before = num_recorded(history)
    history.update_metric("b", 2)
    assert names_and_values(records_since(history, before)) == [("b", 2)]
    history.delete_metric("a")
    before = num_recorded(history)
    assert names_and_values(records_since(history, before)) == []
    history.update_metric("a", 3)
    assert names_and_values(records_since(history, before)) == [("a", 3)]


def test_a_table_has_four_digits_and_the_seconds_since_the_first_row():
    rows = rows_of([Record("loss", 0.123456, FIRST), Record("loss", float("nan"), SECOND), Record("n", 12345, SECOND)])
    assert text_table(rows).splitlines() == [
        "epoch  update  samples  time    loss      n",
        "    1      10       80  0.0s  0.1235",
        "    2      20      160  3.5s     nan  12345",
    ]
    page = html_table(rows, "a < b")
    assert "a &lt; b" in page
    assert page.count("<tr>") == 3


def test_of_a_long_table_the_first_and_the_last_rows_are_shown():
    rows = rows_of([Record("loss", i, Moment(i, i, i, float(i))) for i in range(1000)])
    lines = text_table(rows).splitlines()
    assert len(lines) < 40
    assert lines[1].split()[0] == "0"
    assert lines[-1].split()[0] == "999"
