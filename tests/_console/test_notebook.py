"""What a notebook shows, and keeps when it is saved."""

from __future__ import annotations

import re

import pytest
from matplotlib.figure import Figure

from _notebooks import use_notebook
from _support import Probe, make_dataset, make_trainer, raiser, train
from pytorch_accelerated._console.screen import LiveHtml
from pytorch_accelerated._recording import loss_monitor
from pytorch_accelerated.callbacks import get_default_callbacks
from pytorch_accelerated.diagnosis import diagnose
from pytorch_accelerated.plotting import plot_step_losses
from pytorch_accelerated.summary import summarize


@pytest.fixture(autouse=True)
def _each_step_is_a_log_point(monkeypatch):
    monkeypatch.setattr(loss_monitor, "SECONDS_BETWEEN_LOG_POINTS", 0.0)


def test_a_run_has_one_table_and_one_bar(monkeypatch, capsys):
    notebook = use_notebook(monkeypatch)
    train(make_trainer(callbacks=get_default_callbacks()), num_epochs=3, eval_dataset=make_dataset(8))
    table, bar = sorted(notebook.outputs, key=lambda html: "<table>" not in html)
    assert re.findall(r"<th>(.*?)</th>", table) == ["epoch", "time", "eta", "lr", "train loss", "eval loss"]
    assert re.findall(r"<tr><td>(.*?)</td>", table) == ["1/3", "2/3", "3/3"]
    found = re.search(r'<progress value="2" max="2"></progress> <code>epoch 3/3 evaluation 100%  2/2  loss (\S+)', bar)
    assert found[1] in table, "the mean over all batches, not that of the last log point"
    output = capsys.readouterr()
    assert output.err == ""
    assert output.out.split("\n") == ["", "Starting training run", "Finishing training run", ""]


def test_another_run_has_another_table_and_bar(monkeypatch):
    notebook = use_notebook(monkeypatch)
    trainer = train(make_trainer(callbacks=get_default_callbacks()))
    first = list(notebook.outputs)
    train(trainer)
    trainer.evaluate(make_dataset(8))
    assert notebook.outputs[:2] == first
    assert len(notebook.outputs) == 6


def test_predictions_have_a_bar(monkeypatch):
    notebook = use_notebook(monkeypatch)
    make_trainer(callbacks=get_default_callbacks()).predict(make_dataset(8), per_device_batch_size=4)
    (bar,) = notebook.outputs
    assert re.search(r'<progress value="2" max="2"></progress> <code>predictions 100%  2/2', bar)


def test_after_an_error_the_bar_shows_how_far_the_epoch_came(monkeypatch):
    notebook = use_notebook(monkeypatch)
    fail = Probe(on_train_step_start=lambda trainer, step, **_: step == 2 and raiser(ValueError("mine"))(trainer))
    with pytest.raises(ValueError, match="mine"):
        train(make_trainer(callbacks=[*get_default_callbacks(), fail]))
    assert '<progress value="2" max="4">' in notebook.outputs[0]


def test_names_are_shown_as_they_are(monkeypatch):
    notebook = use_notebook(monkeypatch)
    record = Probe(on_train_epoch_end=lambda trainer, **_: trainer.run_history.update_metric("train_<b>", "a & b"))
    train(make_trainer(callbacks=[*get_default_callbacks(), record]))
    (table,) = [html for html in notebook.outputs if "<table>" in html]
    assert "<th>train &lt;b&gt;</th>" in table
    assert "<td>a &amp; b</td>" in table


def test_nothing_is_shown_without_verbose(monkeypatch):
    notebook = use_notebook(monkeypatch)
    trainer = make_trainer(callbacks=get_default_callbacks(), verbose=False)
    train(trainer, eval_dataset=make_dataset(8))
    trainer.predict(make_dataset(8))
    assert notebook.outputs == []


def test_the_browser_gets_a_message_twice_a_second(monkeypatch):
    notebook, times = use_notebook(monkeypatch), iter([0.0, 0.1, 0.4, 0.5, 0.6, 0.7])
    live = LiveHtml(clock=lambda: next(times))
    for text in ("a", "b", "c", "d"):
        live.show(lambda text=text: text)
    assert notebook.outputs == ["c"]
    live.show(lambda: "last", is_last=True)
    assert (notebook.outputs, notebook.num_updates) == (["last"], 2)


def test_a_long_table_is_complete_in_the_end(monkeypatch):
    notebook = use_notebook(monkeypatch)
    monkeypatch.setattr("pytorch_accelerated.callbacks._epoch_table._MANY_ROWS", 2)
    train(make_trainer(callbacks=get_default_callbacks(progress_bar=False)), 4, num_epochs=9)
    assert len(re.findall(r"<tr><td>", notebook.outputs[0])) == 9
    assert notebook.num_updates < 9


@pytest.mark.parametrize("draw", [lambda history: history.plot(), lambda history: plot_step_losses([2.0, 1.0])])
def test_a_figure_is_shown_as_a_picture(monkeypatch, draw):
    history = train(make_trainer()).run_history
    notebook = use_notebook(monkeypatch)
    figure = draw(history)
    assert notebook.pictures[Figure](figure).startswith(b"\x89PNG")


def test_pictures_are_left_to_who_draws_them_already(monkeypatch):
    notebook = use_notebook(monkeypatch)
    notebook.for_type(Figure, bytes)
    plot_step_losses([2.0, 1.0])
    assert notebook.pictures == {Figure: bytes}


def test_what_is_looked_at_is_shown_as_text():
    trainer = train(make_trainer())
    shown = [trainer.time_ledger, summarize(trainer.model), diagnose({"train_loss": [4, 3, 2, 1, 0.5]})]
    assert [repr(each) for each in shown] == [str(each) for each in shown]
    assert [repr(each).split()[0] for each in shown] == ["start", "group", "still"]
