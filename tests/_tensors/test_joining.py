"""Outputs of consecutive batches are put together: each sample's part once, in order, or an error says why not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from _memory import LiveTensors
from _predicting import (
    FORMS,
    PAD,
    SIZES,
    LanguageOutput,
    Memory,
    Predicting,
    Prediction,
    Scores,
    expected_parts,
    indices_of,
    parts_of,
    predict_form,
)
from pytorch_accelerated import Trainer


class DynamicCache:
    """Named like the caches of transformers."""


def predict(function, data, *arguments, **settings):
    return Trainer(Predicting(function), None, None, callbacks=()).predict(data, *arguments, **settings)


@pytest.mark.parametrize(("num_samples", "batch_size"), SIZES)
@pytest.mark.parametrize("name", FORMS)
def test_each_sample_has_the_part_that_the_model_returns_for_it_alone(name, num_samples, batch_size):
    assert parts_of(predict_form(name, num_samples, batch_size)) == expected_parts(name, num_samples)


def test_what_was_joined_has_the_types_of_the_outputs_of_a_batch():
    records = predict_form("records", 5, 2)
    assert (type(records), type(records.values), type(records.names)) == (Prediction, torch.Tensor, list)
    assert (records.unused, records.kind, records.computed) == (None, "prediction", 0)
    assert type(predict_form("language", 5, 2)) is LanguageOutput
    assert type(predict_form("named_pairs", 5, 2)) is Scores
    arrays = predict_form("arrays", 5, 2)
    assert arrays["values"].dtype == np.float32
    assert arrays["names"].dtype.kind == "U"
    assert predict_form("objects", 5, 2)["found"].dtype == object
    assert type(predict(lambda x: tuple(str(value.item()) for value in x), indices_of(3), 2)) is tuple


def test_a_number_of_each_batch_becomes_its_mean_over_the_samples():
    predicted = predict(lambda x: {"rows": x, "loss": x.mean(), "same": 3, "time": float(len(x))}, indices_of(5), 4)
    assert predicted["loss"] == 3
    assert predicted["same"] == 3
    assert predicted["time"] == (4 * 4 + 1 * 1) / 5


def test_caches_are_left_out_and_other_outputs_without_parts_are_named():
    with pytest.warns(UserWarning, match=r"leave out .*: `outputs.weights`, a tensor of the shape \(7, 2\)") as warned:
        predicted = predict(FORMS["hooks"], indices_of(5), 2)
    assert len(warned) == 1
    assert "past_key_values" not in str(warned[0].message)
    assert list(predicted) == ["rows", "loss", "mode"]
    assert predict_form("language", 5, 2).past_key_values is None
    assert list(predict(lambda x: {"rows": x, "state": DynamicCache()}, indices_of(3))) == ["rows"]


def test_models_tell_in_their_configuration_which_outputs_are_of_no_use_afterwards(recwarn):
    model = Predicting(lambda x: {"rows": x, "memory": Memory(len(x))})
    model.config = type("Config", (), {"keys_to_ignore_at_inference": ["memory"]})()
    assert list(Trainer(model, None, None, callbacks=()).predict(indices_of(3))) == ["rows"]
    assert not recwarn


def test_a_list_with_an_entry_for_each_sample_is_told_from_parts_by_any_batch():
    """Two samples and two tensors of two rows fit to both; the batch of one sample decides."""
    as_samples = predict(lambda x: [value.expand(2) for value in x], indices_of(5), 2)
    assert [part.tolist() for part in as_samples] == [[1, 1], [2, 2], [3, 3], [4, 4], [5, 5]]
    as_parts = predict(lambda x: [x, 2 * x], indices_of(5), 2)
    assert [part.flatten().tolist() for part in as_parts] == [[1, 2, 3, 4, 5], [2, 4, 6, 8, 10]]


def test_the_size_of_a_batch_is_not_mistaken_where_time_comes_first():
    data = TensorDataset(torch.arange(10.0)[:, None].expand(-1, 4).clone())
    predicted = predict(
        lambda x: x.sum(0)[:, None], data, 4, collate_fn=lambda samples: torch.stack([x for (x,) in samples], dim=1)
    )
    assert predicted.flatten().tolist() == [4 * value for value in range(10)]


# --- outputs that cannot be joined -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (
            lambda x: x.expand(-1, int(x[0])),
            r"`outputs` .*batch 1 has the shape \(2, 3\).*have .*\(2, 1\).*`padding_value`",
        ),
        (lambda x: {"a": [x, {"b": x.expand(-1, int(x[0]))}]}, r"`outputs.a\[1\].b` cannot be joined"),
        (lambda x: x if x[0] < 3 else x[:, :, None], r"batch 1 has the shape \(2, 1, 1\)"),
        (lambda x: {"a": x} if x[0] < 3 else {"b": x}, r"the parts \['b'\], those before have \['a'\]"),
        (lambda x: x if x[0] < 3 else {"b": x}, r"batch 1 has several parts by name, those before have a tensor"),
        (lambda x: x if x[0] < 3 else x.sum(), "batch 1 has a single number, those before have a tensor"),
    ],
)
def test_outputs_that_differ_are_refused_at_the_first_batch_that_does(form, message):
    batches = []

    def model(x):
        batches.append(x)
        return form(x)

    with pytest.raises(ValueError, match=message):
        predict(model, indices_of(8), 2)
    assert len(batches) == 2


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (
            lambda x: torch.ones(7),
            r"do not have a part for each of its 2 samples: `outputs` is a tensor of the shape \(7,\)",
        ),
        (lambda x: {"memory": Memory(2)}, "`outputs.memory` is an object of type Memory"),
        (lambda x: object(), "`outputs` is an object of type object"),
    ],
)
def test_outputs_without_parts_are_refused_at_the_first_batch(form, message):
    with pytest.raises(ValueError, match=message):
        predict(form, indices_of(8), 2)


def test_rows_are_padded_at_their_end_in_all_dimensions():
    predicted = predict(lambda x: torch.ones(len(x), int(x[0]), 4 - int(x[0])), indices_of(3), 1, padding_value=PAD)
    assert predicted.shape == (3, 3, 3)
    for index, rows in enumerate(predicted):
        expected = torch.full((3, 3), PAD)
        expected[: index + 1, : 3 - index] = 1
        assert torch.equal(rows, expected)


@pytest.mark.parametrize("padding_value", [0.5, float("nan"), 300])
def test_a_padding_value_that_the_type_cannot_hold_is_refused(padding_value):
    with pytest.raises(ValueError, match=rf"`padding_value` is {padding_value}, which `outputs`, of type torch.uint8"):
        predict(
            lambda x: torch.ones(len(x), int(x[0]), dtype=torch.uint8), indices_of(3), 1, padding_value=padding_value
        )


# --- memory ------------------------------------------------------------------------------------------------------

WIDTH = 10_000

LARGE_OUTPUTS = {
    "rows": (lambda x: x.expand(-1, WIDTH) * 2, {}, 1.1),
    "rows of two parts": (lambda x: (x.expand(-1, WIDTH) * 2, x.expand(-1, WIDTH) * 3), {}, 1.1),
    "an entry for each sample": (lambda x: [value.expand(WIDTH) * 2 for value in x], {}, 1.1),
    "views of larger tensors": (lambda x: [{"a": row} for row in (x.expand(-1, 3 * WIDTH) * 2)[:, :WIDTH]], {}, 1.25),
    "rows beside caches": (lambda x: {"a": x.expand(-1, WIDTH) * 2, "past_key_values": Memory(9 * len(x))}, {}, 1.3),
    "one of several outputs": (
        lambda x: {"a": x.expand(-1, WIDTH) * 2, "b": x.expand(-1, 3 * WIDTH) * 2},
        {"outputs": "a"},
        1.35,
    ),
    "what a function makes of them": (lambda x: x.expand(-1, 5 * WIDTH) * 2, {"outputs": lambda x: x[:, ::5]}, 1.4),
    "rows that are padded": (lambda x: x.expand(-1, WIDTH - int(x[0])) * 2, {"padding_value": PAD}, 2.1),
}


def bytes_of(outputs):
    if isinstance(outputs, torch.Tensor):
        return outputs.untyped_storage().nbytes()
    return sum(map(bytes_of, outputs.values() if isinstance(outputs, dict) else outputs))


@pytest.mark.parametrize("name", LARGE_OUTPUTS)
def test_memory_is_that_of_what_is_returned(name):
    """Printed with ``pytest -s``. Beside the result there are one batch, and what is padded, once more."""
    form, settings, limit = LARGE_OUTPUTS[name]
    with LiveTensors() as live:
        outputs = predict(form, indices_of(64), 4, **settings)
    num_bytes = bytes_of(outputs)
    print(
        f"{name:30} outputs {num_bytes / 1e6:.2f} MB, peak {live.peak / 1e6:.2f} MB, {live.peak / num_bytes:.2f} times"
    )
    assert num_bytes <= live.peak <= limit * num_bytes
