"""Mistakes that people make, and what they are told; as a script, write the table of both to `contract/messages.md`.

Each function makes one mistake; its name, or its argument, says which. Run it with `outcome_of`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset, random_split

from pytorch_accelerated import Trainer, TrainerPlaceholderValues, _messages
from pytorch_accelerated.callbacks import (
    EarlyStoppingCallback,
    SaveBestModelCallback,
    SaveTrainingStateCallback,
    TrainerCallback,
)

TABLE = Path(__file__).parents[1] / "contract" / "messages.md"

MISTAKES: dict[str, Callable[[], object]] = {}
"""A program for each mistake, by its description."""

KNOWN_LATER = {
    "watching a metric that becomes NaN",
    "watching a misspelt metric in a program that records some itself",
}
"""The mistakes that cannot be known before the first update."""


class Outcome(NamedTuple):
    """What a mistake is answered with."""

    kind: str
    """The type of the error or warning; ``"log"`` for a line in the log."""

    text: str
    num_updates: int
    """Updates of the optimizer until then."""


_updates: list[None] = []


def prepared() -> None:
    """Count updates from here on: what was done before was right."""
    _updates.clear()


def outcome_of(mistake: Callable[[], object]) -> Outcome | None:
    """Make a mistake in a new folder, and return the first answer; ``None`` if there is none."""
    prepared()
    counting, records = register_optimizer_step_post_hook(lambda *_: _updates.append(None)), _Records()
    with contextlib.ExitStack() as stack:
        stack.callback(counting.remove)
        stack.enter_context(_in_new_folder())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.manual_seed(0)
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(records.recording())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("error")
        try:
            mistake()
        except (Exception, Warning) as answer:
            notes = [] if isinstance(answer, Warning) else getattr(answer, "__notes__", ())
            return Outcome(type(answer).__name__, _tidy("\n".join([str(answer), *notes])), len(_updates))
        return Outcome("log", _tidy(records.texts[0]), 0) if records.texts else None


def as_table(outcomes: dict[str, Outcome]) -> str:
    """Return the table of mistakes and answers in Markdown."""
    rows = [f"| {name} | {outcome.kind} | {outcome.text} |" for name, outcome in outcomes.items()]
    return "\n".join(["| mistake | kind | text |", "| --- | --- | --- |", *rows, ""])


class _Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record what the library logs, also what it has logged before in this process."""
        logger = logging.getLogger("pytorch_accelerated")
        logged_before, _messages._logged = _messages._logged, set()
        logger.addHandler(self)
        try:
            yield
        finally:
            logger.removeHandler(self)
            _messages._logged = logged_before


@contextlib.contextmanager
def _in_new_folder() -> Iterator[None]:
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def _tidy(text: str) -> str:
    text = text.replace(f"{Path.cwd()}/", "")
    text = re.sub(r" at 0x[0-9a-f]+", "", text)
    text = re.sub(r"[\w.]*<locals>\.|__main__\.|_mistakes\.", "", text)
    return " ".join(text.split())


# --- a program without a mistake ---------------------------------------------------------------------------------


def data(num_samples: int = 8) -> TensorDataset:
    inputs = torch.linspace(-1, 1, 3 * num_samples).reshape(-1, 3)
    return TensorDataset(inputs, inputs.sum(1, keepdim=True))


def make(cls: type[Trainer] = Trainer, *, model: Any = None, optimizer: Any = None, **kwargs: Any) -> Trainer:
    """Create a trainer; by default its parts are right."""
    model = nn.Linear(3, 1) if model is None else model
    if optimizer is None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return cls(model, **{"loss_func": nn.MSELoss(), "optimizer": optimizer, "callbacks": (), **kwargs})


def train(trainer: Trainer, **kwargs: Any) -> None:
    """Train for two epochs of two updates each."""
    trainer.train(**{"train_dataset": data(), "num_epochs": 2, "per_device_batch_size": 4, **kwargs})


def mistake(description: str) -> Callable[[Callable[[], object]], Callable[[], object]]:
    """Add a program to the table."""

    def add(program: Callable[[], object]) -> Callable[[], object]:
        assert description not in MISTAKES
        MISTAKES[description] = program
        return program

    return add


# --- model, loss function, optimizer -----------------------------------------------------------------------------


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, inputs):
        return self.layer(inputs)


def parts(**kwargs: Any) -> None:
    train(make(**kwargs))


mistake("a model class in place of an instance")(lambda: parts(model=Network, optimizer=object()))
mistake("a function that makes the model in place of the model")(lambda: parts(model=lambda: Network(), optimizer=1))
mistake("a loss function in place of the model")(lambda: Trainer(nn.MSELoss(), Network(), SGD()).train(data(), 1))
mistake("a loss class in place of an instance")(lambda: parts(loss_func=nn.MSELoss))
mistake("the name of a loss")(lambda: parts(loss_func="mse"))
mistake("an optimizer class in place of an instance")(lambda: parts(optimizer=torch.optim.AdamW))
mistake("a partial of an optimizer class")(lambda: parts(optimizer=functools.partial(torch.optim.AdamW, lr=0.1)))
mistake("the name of an optimizer")(lambda: parts(optimizer="adamw"))
mistake("the parameters in place of an optimizer")(lambda: parts(optimizer=nn.Linear(3, 1).parameters()))


def SGD(model: nn.Module | None = None) -> torch.optim.SGD:  # noqa: N802
    return torch.optim.SGD((model or nn.Linear(3, 1)).parameters(), lr=0.1)


@mistake("loss function and optimizer swapped")
def _() -> None:
    model = Network()
    Trainer(model, SGD(model), nn.MSELoss(), callbacks=()).train(data(), 1)


mistake("the optimizer of another model")(lambda: parts(optimizer=SGD(nn.Linear(3, 1))))
mistake("no optimizer")(lambda: Trainer(Network(), nn.MSELoss(), None, callbacks=()).train(data(), 1))


@mistake("everything frozen")
def _() -> None:
    train(make(model=Network().requires_grad_(False)))


@mistake("the class of a run history")
def _() -> None:
    from pytorch_accelerated.tracking import InMemoryRunHistory

    parts(run_history=InMemoryRunHistory)


mistake("a seed as text")(lambda: parts(seed="42"))
mistake("the name of a device as accelerator")(lambda: parts(accelerator="cuda"))

# --- subclasses of the trainer -----------------------------------------------------------------------------------


class WithoutInit(Trainer):
    def __init__(self, model, optimizer):
        self.teacher = model


mistake("a trainer without `super().__init__`, trained")(lambda: WithoutInit(Network(), None).train(data(), 1))
mistake("a trainer without `super().__init__`, evaluated")(lambda: WithoutInit(Network(), None).evaluate(data()))
mistake("a trainer without `super().__init__`, predicting")(lambda: WithoutInit(Network(), None).predict(data()))


def trainer_with(name: str) -> Callable[[], object]:
    def program() -> None:
        train(make(type("MyTrainer", (Trainer,), {name: lambda self, *args, **kwargs: None})))

    return program


for _name in (
    "training_step",
    "validation_step",
    "configure_optimizers",
    "compute_loss",
    "compute_metrics",
    "get_train_dataloader",
    "create_optimizer",
    "train_epoch_begin",
    "calculate_train_loss",
    "on_train_epoch_end",
    "on_fit_start",
    "train_step",
):
    mistake(f"a trainer with `{_name}`")(trainer_with(_name))

# --- callbacks ---------------------------------------------------------------------------------------------------


def callback_with(name: str) -> Callable[[], object]:
    def program() -> None:
        train(make(callbacks=[type("MyCallback", (TrainerCallback,), {name: lambda self, trainer, **kwargs: None})]))

    return program


for _name in (
    "on_train_epoch_begin",
    "on_train_epochs_end",
    "on_epoch_begin",
    "on_epoch_end",
    "on_train_begin",
    "on_train_end",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_validation_epoch_end",
    "on_fit_end",
    "on_step_end",
    "on_evaluate",
    "on_save",
    "on_log",
    "on_predict_start",
    "before_fit",
    "after_batch",
    "after_epoch",
):
    mistake(f"a callback with `{_name}`")(callback_with(_name))


@mistake("an event with the arguments of Lightning")
def _() -> None:
    class MyCallback(TrainerCallback):
        def on_train_epoch_end(self, trainer, pl_module):
            pass

    train(make(callbacks=[MyCallback()]))


@mistake("an event with the arguments of Hugging Face")
def _() -> None:
    class MyCallback(TrainerCallback):
        def on_train_step_end(self, args, state, control, **kwargs):
            pass

    train(make(callbacks=[MyCallback()]))


@mistake("an event without the trainer")
def _() -> None:
    class MyCallback(TrainerCallback):
        def on_train_epoch_end(self):
            pass

    train(make(callbacks=[MyCallback()]))


@mistake("a callback whose `__init__` leaves out that of its base class")
def _() -> None:
    class MyStopping(EarlyStoppingCallback):
        def __init__(self, patience):
            self.my_patience = patience

    train(make(callbacks=[MyStopping(3)]), eval_dataset=data())


@mistake("a callback of another library")
def _() -> None:
    class ModelCheckpoint:
        def on_train_epoch_end(self, trainer, module):
            pass

    ModelCheckpoint.__module__ = "lightning.pytorch.callbacks"
    train(make(callbacks=[ModelCheckpoint()]))


mistake("an object without events as callback")(lambda: make(callbacks=[object()]))
mistake("the name of a callback")(lambda: make(callbacks="early_stopping"))
mistake("a dictionary of callbacks")(lambda: make(callbacks={"stop": EarlyStoppingCallback()}))
mistake("None in the list of callbacks")(lambda: make(callbacks=[None]))


@mistake("a callback class that needs arguments")
def _() -> None:
    class Recorder(TrainerCallback):
        def __init__(self, folder):
            self.folder = folder

    make(callbacks=[Recorder])


@mistake("the same callback twice")
def _() -> None:
    stopping = EarlyStoppingCallback()
    make(callbacks=[stopping, stopping])


@mistake("callbacks without the default ones")
def _() -> None:
    train(make(callbacks=[EarlyStoppingCallback()]), eval_dataset=data())


@mistake("a callback that cannot load its state")
def _() -> None:
    class Counter(TrainerCallback):
        def __init__(self, key):
            self.key = key

        def state_dict(self):
            return {self.key: 1}

        def load_state_dict(self, state_dict):
            self.count = state_dict[self.key]

    trainer = make(callbacks=[Counter("count")])
    train(trainer)
    trainer.save_training_state("states/one")
    prepared()
    train(make(callbacks=[Counter("number")]), resume_from="states/one", num_epochs=3)


# --- arguments of other libraries --------------------------------------------------------------------------------

for _name, _value in {
    "max_epochs": 3,
    "lr": 0.1,
    "fp16": True,
    "criterion": nn.MSELoss(),
    "device": "cuda",
    "devices": 2,
    "train_dataset": data(),
    "args": None,
    "compute_metrics": None,
    "logger": None,
    "callback": None,
    "optimisers": None,
    "frobnicate": 1,
}.items():
    mistake(f"`Trainer({_name}=...)`")(functools.partial(make, **{_name: _value}))
for _name, _value in {
    "batch_size": 4,
    "epochs": 3,
    "max_epochs": 3,
    "max_steps": 3,
    "max_grad_norm": 1.0,
    "gradient_clip_val": 1.0,
    "accumulate_grad_batches": 2,
    "val_dataset": data(),
    "val_dataloaders": data(),
    "validation_data": data(),
    "num_workers": 2,
    "shuffle": True,
    "lr_scheduler": None,
    "learning_rate": 0.1,
    "ckpt_path": "last.ckpt",
    "resume_from_checkpoint": True,
    "callbacks": [],
    "seed": 1,
    "fp16": True,
    "verbose": 1,
    "eval_steps": 100,
    "early_stopping": True,
    "gradient_accumulation_step": 2,
    "patience": 3,
}.items():
    mistake(f"`train({_name}=...)`")(lambda name=_name, value=_value: train(make(), **{name: value}))

mistake("`evaluate(batch_size=...)`")(lambda: make().evaluate(data(), batch_size=4))
mistake("`predict(dataloaders=...)`")(lambda: make().predict(dataloaders=data()))
mistake("`EarlyStoppingCallback(monitor=...)`")(lambda: EarlyStoppingCallback(monitor="val_loss"))
mistake("`EarlyStoppingCallback(patience=...)`")(lambda: EarlyStoppingCallback(patience=3))
mistake("`EarlyStoppingCallback(mode=...)`")(lambda: EarlyStoppingCallback(mode="max"))
mistake("`SaveBestModelCallback(filepath=...)`")(lambda: SaveBestModelCallback(filepath="best.pt"))
mistake("`SaveTrainingStateCallback(dirpath=...)`")(lambda: SaveTrainingStateCallback(dirpath="states"))
mistake("`SaveTrainingStateCallback(save_total_limit=...)`")(lambda: SaveTrainingStateCallback(save_total_limit=3))
mistake("`SaveTrainingStateCallback(save_steps=...)`")(lambda: SaveTrainingStateCallback(save_steps=100))

# --- settings of a run -------------------------------------------------------------------------------------------

mistake("epochs as text")(lambda: train(make(), num_epochs="3"))
mistake("no epochs")(lambda: train(make(), num_epochs=0))
mistake("dataset and epochs swapped")(lambda: make().train(3, data()))
mistake("a batch size of zero")(lambda: train(make(), per_device_batch_size=0))
mistake("a negative clip norm")(lambda: train(make(), gradient_clip_norm=-1.0))
mistake("a clip norm as text")(lambda: train(make(), gradient_clip_norm="1.0"))
mistake("a clip norm of True")(lambda: train(make(), gradient_clip_norm=True))
mistake("accumulation over more batches than an epoch has")(lambda: train(make(), gradient_accumulation_steps=3))
mistake("arguments of the loader as a list")(lambda: train(make(), train_dataloader_kwargs=["shuffle"]))
mistake("a misspelt argument of the loader")(lambda: train(make(), train_dataloader_kwargs={"num_worker": 2}))
mistake("the dataset in the arguments of the loader")(
    lambda: train(make(), train_dataloader_kwargs={"dataset": data()})
)
mistake("a collate function that is none")(lambda: train(make(), collate_fn="pad"))

# --- data --------------------------------------------------------------------------------------------------------

X, Y = data().tensors

mistake("a pair of tensors as dataset")(lambda: train(make(), train_dataset=(X, Y)))
mistake("a list of tensors as dataset")(lambda: train(make(), train_dataset=[X, Y]))
mistake("a pair of arrays as dataset")(lambda: train(make(), train_dataset=(X.numpy(), Y.numpy())))
mistake("a pair of tensors as evaluation dataset")(lambda: train(make(), eval_dataset=(X, Y)))
mistake("a pair of tensors to evaluate")(lambda: make().evaluate((X, Y)))
mistake("a dictionary of tensors as dataset")(lambda: train(make(), train_dataset={"x": X, "y": Y}))
mistake("a tensor as dataset")(lambda: train(make(), train_dataset=X))
mistake("a list of evaluation datasets")(lambda: train(make(), eval_dataset=[data(), data()]))
mistake("a list of training datasets")(lambda: train(make(), train_dataset=random_split(data(), [4, 4])))
mistake("a dictionary of training datasets")(lambda: train(make(), train_dataset={"a": data(), "b": data()}))
mistake("a dataset class")(lambda: train(make(), train_dataset=TensorDataset))
mistake("the path of the data")(lambda: train(make(), train_dataset="data/train"))
mistake("an empty dataset")(lambda: train(make(), train_dataset=data(0)))
mistake("no dataset")(lambda: train(make(), train_dataset=None))
mistake("a generator for two epochs")(lambda: train(make(), train_dataset=(batch for batch in [data()[:4]])))
mistake("a batch size beside a ready loader")(
    lambda: train(make(), train_dataset=DataLoader(data(), 2), per_device_batch_size=4)
)
mistake("arguments for a loader beside a ready loader")(
    lambda: train(make(), train_dataset=DataLoader(data(), 4), train_dataloader_kwargs={"num_workers": 2})
)
mistake("a collate function beside a ready loader")(
    lambda: train(make(), train_dataset=DataLoader(data(), 4), collate_fn=lambda samples: samples)
)
mistake("a batch of three parts")(lambda: train(make(), train_dataset=TensorDataset(X, X, Y)))
mistake("ready batches in a list")(lambda: train(make(), train_dataset=[(X, Y)]))
mistake("nothing to evaluate")(lambda: make().evaluate())

# --- schedulers --------------------------------------------------------------------------------------------------


class Decay(LambdaLR):
    """A scheduler that needs a length."""

    def __init__(self, optimizer, num_updates):
        super().__init__(optimizer, lambda update: 1 - update / num_updates)


mistake("a scheduler in place of a function")(lambda: train(make(), create_scheduler_fn=StepLR(SGD(), step_size=1)))
mistake("a scheduler class that needs more arguments")(lambda: train(make(), create_scheduler_fn=Decay))
mistake("the name of a scheduler")(lambda: train(make(), create_scheduler_fn="cosine"))


def schedule(create: Callable[[Any], object], **kwargs: Any) -> None:
    train(make(), create_scheduler_fn=create, **kwargs)


UPDATES = TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH
mistake("a placeholder in a lambda")(lambda: schedule(lambda optimizer: StepLR(optimizer, UPDATES)))
mistake("a function for a scheduler that returns nothing")(lambda: schedule(lambda optimizer: None))
mistake("a scheduler of another optimizer")(lambda: schedule(lambda optimizer: StepLR(SGD(), 1)))
mistake("a misspelt interval of a scheduler")(lambda: schedule(lambda opt: StepLR(opt, 1), step_scheduler="epochs"))
mistake("a metric for a scheduler that takes none")(
    lambda: schedule(lambda opt: StepLR(opt, 1), scheduler_metric="eval_loss_epoch")
)
mistake("`ReduceLROnPlateau` without evaluation data")(
    lambda: schedule(ReduceLROnPlateau, scheduler_metric="eval_loss_epoch")
)
mistake("`ReduceLROnPlateau` with the metric of another library")(
    lambda: schedule(ReduceLROnPlateau, scheduler_metric="val_loss", eval_dataset=data())
)
mistake("a schedule in epochs that is stepped after each update")(
    lambda: schedule(lambda opt: StepLR(opt, 1, gamma=0.1), num_epochs=4)
)

# --- several optimizers, precision, predictions ------------------------------------------------------------------


@mistake("a head that is missing in the optimizer")
def _() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = SGD(model)
    model[1] = nn.Linear(3, 1)
    train(make(model=model, optimizer=optimizer))


mistake("a list with a single optimizer")(lambda: parts(optimizer=[SGD()]))
mistake("a class among several optimizers")(lambda: parts(optimizer={"a": SGD(), "b": torch.optim.SGD}))
mistake("fp16 on a CPU")(lambda: make(mixed_precision="fp16"))
mistake("a misspelt precision")(lambda: make(mixed_precision="bfloat16"))


class Ragged(nn.Module):
    """Returns as many columns as the largest value in the batch says."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, inputs):
        return self.layer(inputs).expand(-1, 1 + int(inputs.max() > 0))


mistake("outputs of different lengths")(lambda: make(model=Ragged()).predict(data(), per_device_batch_size=4))
mistake("an output that the model does not have")(lambda: make(model=Ragged()).predict(data(), outputs="logits"))

# --- metrics -----------------------------------------------------------------------------------------------------


def watch(metric: str, **kwargs: Any) -> None:
    train(make(callbacks=[EarlyStoppingCallback(watch_metric=metric)]), **kwargs)


mistake("watching the loss of an evaluation without one")(lambda: watch("eval_loss_epoch"))
mistake("watching `val_loss`")(lambda: watch("val_loss", eval_dataset=data()))
mistake("watching `loss`")(lambda: watch("loss"))
mistake("watching a misspelt metric")(lambda: watch("eval_los_epoch", eval_dataset=data()))
mistake("watching an accuracy that nothing records")(lambda: watch("eval_accuracy", eval_dataset=data()))
mistake("watching one loss of several evaluation datasets")(
    lambda: watch("eval_loss_epoch", eval_dataset={"a": data(), "b": data()})
)
mistake("the smallest accuracy for the best")(
    lambda: watch_accuracy(EarlyStoppingCallback(watch_metric="eval_accuracy"))
)


class WithAccuracy(Trainer):
    """Records an accuracy in its evaluations."""

    value = 0.5

    def eval_epoch_end(self):
        self.run_history.update_metric("eval_accuracy", self.value)


def watch_accuracy(callback: TrainerCallback, value: float = 0.5) -> None:
    trainer = make(WithAccuracy, callbacks=[callback])
    trainer.value = value
    train(trainer, eval_dataset=data())


@mistake("watching a metric that becomes NaN")
def _() -> None:
    watch_accuracy(EarlyStoppingCallback(watch_metric="eval_accuracy", greater_is_better=True), float("nan"))


@mistake("watching a misspelt metric in a program that records some itself")
def _() -> None:
    watch_accuracy(SaveBestModelCallback(watch_metric="eval_acuracy", greater_is_better=True))


@mistake("watching `val_loss` in a program that records metrics itself")
def _() -> None:
    watching = EarlyStoppingCallback(watch_metric="_".join(["val", "loss"]))
    train(make(WithAccuracy, callbacks=[watching]), eval_dataset=data())


mistake("reading a metric that was not recorded")(lambda: make().run_history.get_latest_metric("train_loss"))


@mistake("a step without a loss")
def _() -> None:
    class MyTrainer(Trainer):
        def calculate_train_batch_loss(self, batch):
            return {"batch_size": 4}

    train(make(MyTrainer))


@mistake("a step that returns its loss alone")
def _() -> None:
    class MyTrainer(Trainer):
        def calculate_train_batch_loss(self, batch):
            return 0 * self.model(batch[0]).sum() + 2.5

    train(make(MyTrainer))


@mistake("a step that returns the number of its loss")
def _() -> None:
    class MyTrainer(Trainer):
        def calculate_train_batch_loss(self, batch):
            return {"loss": 2.5, "batch_size": 4}

    train(make(MyTrainer))


mistake("a loss for each sample")(lambda: parts(loss_func=nn.MSELoss(reduction="none")))


@mistake("a model without a loss")
def _() -> None:
    class WithTargets(Network):
        def forward(self, inputs, targets):
            return super().forward(inputs)

    parts(model=WithTargets(), loss_func=None)


mistake("a model called with too much")(lambda: parts(loss_func=None))

# --- files -------------------------------------------------------------------------------------------------------

mistake('`resume_from="latest"` without a folder')(lambda: train(make(), resume_from="latest"))
mistake("resuming from a folder that does not exist")(lambda: train(make(), resume_from="states/one"))
mistake("resuming from a URL")(lambda: train(make(), resume_from="s3://bucket/states/one"))
mistake("loading a checkpoint from a URL")(lambda: make().load_checkpoint("https://example.org/model.pt"))
mistake("loading a checkpoint that does not exist")(lambda: make().load_checkpoint("model.pt"))
mistake("saving a checkpoint to a URL")(lambda: make().save_checkpoint("s3://bucket/model.pt"))
mistake("saving states to a URL")(lambda: train(make(callbacks=[SaveTrainingStateCallback("s3://bucket/states")])))
mistake("loading a training state from a URL")(lambda: make().load_training_state("gs://bucket/states/one"))


@mistake("resuming from a checkpoint file")
def _() -> None:
    make().save_checkpoint("model.pt")
    train(make(), resume_from="model.pt")


@mistake("loading a training state as a checkpoint")
def _() -> None:
    trainer = make()
    train(trainer)
    trainer.save_training_state("states/one")
    prepared()
    make().load_checkpoint("states/one")


@mistake("a checkpoint of another model")
def _() -> None:
    make().save_checkpoint("model.pt")
    make(model=Network()).load_checkpoint("model.pt")


@mistake("weights of which nothing fits")
def _() -> None:
    torch.save({"encoder.weight": torch.zeros(2, 2)}, "weights.pt")
    make().load_checkpoint("weights.pt", strict=False)


@mistake("a checkpoint in which a bit has changed")
def _() -> None:
    make().save_checkpoint("model.pt")
    contents = bytearray(Path("model.pt").read_bytes())
    contents[len(contents) // 2] ^= 1
    Path("model.pt").write_bytes(contents)
    make().load_checkpoint("model.pt")


mistake("`train` within a run")(lambda: train(make(callbacks=[Nested()])))


class Nested(TrainerCallback):
    """Trains during training."""

    def on_training_run_start(self, trainer, **kwargs):
        train(trainer)


if __name__ == "__main__":
    TABLE.write_text(as_table({name: outcome_of(program) for name, program in MISTAKES.items()}))
    print(TABLE.read_text())
