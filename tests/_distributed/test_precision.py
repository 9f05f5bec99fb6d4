"""Each trainer of a process computes in the precision that it asks for, and says no other."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, PartialState
from torch import nn

from _support import assert_same_weights, make_dataset, run_python, weights_of
from pytorch_accelerated import Trainer
from pytorch_accelerated._distributed.accelerator import create_accelerator
from pytorch_accelerated._distributed.precision import IndependentAccelerator
from pytorch_accelerated.callbacks import ModelEmaCallback, TrainerCallback

pytestmark = pytest.mark.usefixtures("_fresh_accelerate_state")

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}
DUPLICATES = {"pickle": lambda item: pickle.loads(pickle.dumps(item)), "deepcopy": copy.deepcopy}


class Seeing(nn.Module):
    """Remembers the data types that its layers computed in."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 1)
        self.seen = set()

    def forward(self, inputs):
        hidden = self.encode(inputs)
        self.seen.add(hidden.dtype)
        return self.second(hidden)

    def encode(self, inputs):
        return self.first(inputs)


def make_trainer(mixed_precision=None, callbacks=(), compiles=False, trainer_class=Trainer, **kwargs):
    torch.manual_seed(1)
    model = Seeing()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model = torch.compile(model, backend="eager") if compiles else model
    return trainer_class(model, nn.MSELoss(), optimizer, callbacks, mixed_precision=mixed_precision, seed=0, **kwargs)


def assert_trains_in(trainer, precision):
    model = trainer.get_model(keep_torch_compile=False)
    model.seen.clear()
    data = make_dataset()
    trainer.train(data, 1, eval_dataset=data)
    trainer.evaluate(data)
    trainer.predict(data)
    assert trainer.run_config.mixed_precision == trainer._accelerator.mixed_precision == precision
    assert model.seen == {DTYPES[precision]}


# --- several precisions in one process ---------------------------------------------------------------------------


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("order", [("no", "bf16"), ("bf16", "no"), ("bf16", None), (None, "bf16")])
def test_each_trainer_of_a_process_computes_in_its_own_precision(order, compiles):
    trainers = [make_trainer(precision, compiles=compiles) for precision in order]
    for _ in range(2):
        for trainer, precision in zip(trainers, order, strict=True):
            assert_trains_in(trainer, precision or "no")


def test_a_later_trainer_trains_bit_for_bit_as_the_first_of_a_process_would():
    data = make_dataset()
    make_trainer("bf16")
    later = make_trainer("no")
    later.train(data, 2)
    AcceleratorState._reset_state()
    first = make_trainer()
    first.train(data, 2)
    assert_same_weights(weights_of(later.model), weights_of(first.model))


def test_a_precision_in_the_arguments_of_the_accelerator_counts_alike():
    assert_trains_in(make_trainer(accelerator={"mixed_precision": "bf16"}), "bf16")
    assert_trains_in(make_trainer(accelerator={"mixed_precision": "no"}), "no")
    assert_trains_in(make_trainer(accelerator={}), "no")


def test_the_choice_of_an_earlier_trainer_is_no_configuration(monkeypatch):
    make_trainer("no")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert_trains_in(make_trainer(), "bf16")


def test_the_accelerator_that_the_program_has_created_is_its_configuration():
    Accelerator(mixed_precision="bf16")
    assert_trains_in(make_trainer(), "bf16")
    assert_trains_in(make_trainer("no"), "no")
    assert_trains_in(make_trainer(), "bf16")
    assert Accelerator(mixed_precision="bf16").mixed_precision == "bf16"


def test_an_evaluation_within_a_run_of_another_trainer_has_its_own_precision():
    inner = make_trainer("no")

    class Evaluating(TrainerCallback):
        def on_train_step_end(self, trainer, **kwargs):
            inner.evaluate(make_dataset())
            self.created = make_trainer()

    callback = Evaluating()
    assert_trains_in(make_trainer("bf16", [callback]), "bf16")
    assert inner.model.seen == {torch.float32}
    assert inner.run_config.mixed_precision == "no"
    assert_trains_in(callback.created, "no")


def test_a_moving_average_is_evaluated_in_the_precision_of_the_run(tmp_path):
    make_trainer("no")
    assert_trains_in(make_trainer("bf16", [ModelEmaCallback(save_path=tmp_path / "ema.pt")]), "bf16")


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES)
def test_a_copy_computes_in_the_precision_of_the_original(duplicate, precision):
    others = [make_trainer("bf16"), make_trainer("no")]
    for trainer in (*others, make_trainer(precision)):
        precision = trainer._accelerator.mixed_precision
        assert_trains_in(duplicate(trainer), precision)
        assert_trains_in(duplicate(duplicate(trainer)), precision)


def test_a_trainer_unpickled_in_a_process_of_another_precision_keeps_its_own():
    pickled = pickle.dumps(make_trainer("bf16"))
    AcceleratorState._reset_state()
    make_trainer("no")
    trainer = pickle.loads(pickled)
    assert_trains_in(trainer, "bf16")
    assert_trains_in(make_trainer(), "no")


class OtherAccelerator(Accelerator):
    """A class of the user's."""


def test_a_users_accelerator_cannot_have_another_precision_than_the_process_it_is_copied_into():
    pickled = pickle.dumps(make_trainer(accelerator=OtherAccelerator(mixed_precision="bf16")))
    AcceleratorState._reset_state()
    make_trainer("no")
    with pytest.raises(ValueError, match=r"`OtherAccelerator`, computes in 'bf16', but this process already uses 'no'"):
        pickle.loads(pickled)


def test_an_accelerator_that_cannot_be_created_changes_nothing_for_the_process():
    make_trainer("no")
    with pytest.raises(ValueError, match=r"bfloat16.*'fp16', 'bf16'"):
        create_accelerator(None, "bfloat16")
    assert AcceleratorState().mixed_precision == "no"


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_sharded_trainers_of_a_process_share_a_precision(kind, monkeypatch):
    Accelerator()
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", kind)
    configuration = SimpleNamespace(deepspeed_config={"bf16": {"enabled": False}})
    monkeypatch.setitem(AcceleratorState._shared_state, "deepspeed_plugins", configuration)
    with pytest.raises(ValueError, match=r"`mixed_precision` is 'bf16', but this process already uses 'no'.*kernel"):
        create_accelerator(None, "bf16")


# --- a precision that the device does not have -------------------------------------------------------------------


NOT_ON_CPU = """
import os, sys, warnings
from accelerate import Accelerator
from _support import make_trainer, make_dataset
from pytorch_accelerated import Trainer

second = sys.argv[1]

def run(*args, **kwargs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(*args, **kwargs)
    trainer.train(make_dataset(4), num_epochs=1)
    trainer.evaluate(make_dataset(4))
    return trainer.run_config.mixed_precision, [str(warning.message) for warning in caught]

for precision in ("fp16", "fp8"):
    for kwargs in ({"mixed_precision": precision}, {"accelerator": {"mixed_precision": precision, "cpu": True}}):
        try:
            make_trainer(**kwargs)
        except ValueError as error:
            assert f"`mixed_precision` is '{precision}', but this run uses a CPU" in str(error), error
        else:
            raise AssertionError(f"{kwargs} was not refused")
if second == "environment":
    os.environ["ACCELERATE_MIXED_PRECISION"] = "fp16"
    precision, (said,) = run()
    assert precision == "no", precision
    assert "Accelerate is configured with mixed_precision='fp16', but it uses a CPU" in said, said
    assert run(mixed_precision="no") == ("no", [])
elif second in ("accelerator", "method"):
    accelerator = Accelerator(mixed_precision="fp16")
    if second == "method":
        Trainer._create_accelerator = lambda trainer: accelerator
    for kwargs in ({"accelerator": accelerator}, {}):
        precision, (said,) = run(**kwargs)
        assert precision == "no", precision
        assert "Accelerate is configured with mixed_precision='fp16', but it uses a CPU" in said, said
else:
    assert run(mixed_precision=second) == (second, [])
"""


@pytest.mark.parametrize("second", ["no", "bf16", "environment", "accelerator", "method"])
def test_a_precision_that_a_cpu_does_not_have_is_refused_or_not_used_and_never_claimed(second):
    """A refused one leaves nothing behind: the next trainer of the process gets the precision that it asks for."""
    run_python(NOT_ON_CPU, second, CUDA_VISIBLE_DEVICES="")


# --- autocast ----------------------------------------------------------------------------------------------------


class Contrastive(Trainer):
    """Calls another method of the model than its forward pass."""

    def calculate_train_batch_loss(self, batch):
        with self.autocast():
            codes = self.get_model().encode(batch[0])
        self.codes = codes
        return {"loss": codes.float().pow(2).mean(), "batch_size": len(batch[0])}

    def calculate_eval_batch_loss(self, batch):
        return self.calculate_train_batch_loss(batch)

    def calculate_predictions(self, batch):
        with self.autocast():
            return self.get_model().encode(batch[0])


@pytest.mark.parametrize("first", ["no", "bf16"], ids=["after-no", "after-bf16"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_what_a_step_calls_beside_the_forward_pass_has_the_numbers_of_torch_autocast(precision, first):
    make_trainer(first)
    trainer, data = make_trainer(precision, trainer_class=Contrastive), make_dataset()
    by_hand = copy.deepcopy(trainer.model)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        codes = by_hand.encode(data.tensors[0])
    codes.float().pow(2).mean().backward()
    optimizer.step()
    trainer.train(data, 1, per_device_batch_size=len(data), train_dataloader_kwargs={"shuffle": False})
    assert trainer.codes.dtype == DTYPES[precision]
    assert torch.equal(trainer.codes, codes)
    assert_same_weights(weights_of(trainer.model), weights_of(by_hand))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        expected = by_hand.encode(data.tensors[0])
    predicted = trainer.predict(data, per_device_batch_size=len(data))
    assert predicted.dtype == expected.dtype
    assert torch.equal(predicted, expected)


def test_autocast_works_outside_of_runs_and_ends_with_its_body():
    trainer, inputs = make_trainer("bf16"), torch.ones(2, 3)
    make_trainer("no")
    with trainer.autocast():
        assert trainer.model.encode(inputs).dtype == torch.bfloat16
    assert trainer.model.encode(inputs).dtype == torch.float32
    with make_trainer("no").autocast():
        assert trainer.model.encode(inputs).dtype == torch.float32


def test_autocast_within_a_forward_pass_that_is_autocast_changes_nothing():
    class Nested(Seeing):
        def encode(self, inputs):
            with trainer.autocast():
                return super().encode(inputs)

    trainer = make_trainer("bf16")
    trainer.model = Nested()
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    assert_trains_in(trainer, "bf16")


def test_the_settings_of_the_accelerator_for_autocast_are_kept():
    from accelerate import AutocastKwargs

    for precision in ("no", "bf16"):
        make_trainer(precision)
        handler = AutocastKwargs(enabled=False)
        trainer = make_trainer(accelerator={"mixed_precision": "bf16", "kwargs_handlers": [handler]})
        with trainer.autocast():
            assert trainer.model.encode(torch.ones(2, 3)).dtype == torch.float32


def test_an_independent_accelerator_is_used_only_where_it_is_needed():
    kinds = [type(make_trainer(precision)._accelerator) for precision in ("bf16", "bf16", "no", None)]
    assert kinds == [Accelerator, Accelerator, IndependentAccelerator, IndependentAccelerator]
