"""What programs written for 0.1.61 observe of loaders and of `run_config`: section 6 of the table."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

from _support import (
    Batches,
    Probe,
    Samples,
    assert_same_weights,
    make_dataset,
    make_model,
    make_trainer,
    train,
    weights_of,
)
from pytorch_accelerated import Trainer
from pytorch_accelerated import trainer as trainer_module
from pytorch_accelerated.callbacks import TrainerCallback
from pytorch_accelerated.utils import LIMIT_BATCHES_ENV_VAR, worker_init_fn

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

KEYS = {"shuffle", "pin_memory", "batch_size", "num_workers", "worker_init_fn"}


class Numbers(Dataset):
    """Samples that show the settings of the dataset at the time they are loaded."""

    def __init__(self, length=8):
        self.length = length
        self.scale = 1.0

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return torch.full((3,), self.scale), torch.zeros(1)


@pytest.fixture
def three_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)


def collate(samples):
    return default_collate(samples)


# --- arguments of the loaders ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("three_cores")
@pytest.mark.parametrize("dataset", [None, Numbers(), make_dataset(4)], ids=["none", "samples", "in memory"])
def test_the_default_arguments_of_the_loaders_have_the_keys_of_0_1_61(dataset):
    """Row 6.1: exactly these, and the function of `utils`; overrides pop or replace them."""
    trainer = make_trainer()
    trainer.train_dataset = trainer.eval_dataset = dataset
    for kwargs, shuffles in (
        (trainer.get_default_train_dl_kwargs(8), True),
        (trainer.get_default_eval_dl_kwargs(8), False),
    ):
        assert set(kwargs) == KEYS
        assert kwargs["worker_init_fn"] is worker_init_fn
        assert (kwargs["shuffle"], kwargs["batch_size"]) == (shuffles, 8)


@pytest.mark.usefixtures("three_cores")
def test_the_merged_arguments_have_these_keys_too():
    """Row 6.1: in `_train_dl_kwargs` and the run configuration."""
    trainer = make_trainer()
    train(trainer, Numbers(), eval_dataset=Numbers(), train_dataloader_kwargs={"batch_size": 2, "drop_last": True})
    assert set(trainer._train_dl_kwargs) == set(trainer.run_config.train_dl_kwargs) == {*KEYS, "drop_last"}
    assert set(trainer._eval_dl_kwargs) == set(trainer.run_config.eval_dl_kwargs) == KEYS
    assert trainer._train_dl_kwargs["batch_size"] == 2


class Popping(Trainer):
    def get_default_train_dl_kwargs(self, batch_size):
        kwargs = super().get_default_train_dl_kwargs(batch_size)
        kwargs.pop("worker_init_fn")
        kwargs["num_workers"] = 0
        return kwargs


def test_an_override_may_pop_and_replace_the_default_arguments():
    """Row 6.1."""
    trainer = make_trainer(cls=Popping)
    train(trainer, Numbers())
    assert set(trainer._train_dl_kwargs) == KEYS - {"worker_init_fn"}


GIVEN = {"batch_size": 100, "pin_memory": False, "num_workers": 0}


@pytest.mark.parametrize("stage", ["train", "eval"])
@pytest.mark.parametrize("dataset", [object(), None, Numbers(), make_dataset(4)], ids=lambda data: type(data).__name__)
def test_the_module_level_name_gets_dataset_collate_fn_and_the_merged_arguments(stage, dataset):
    """Rows 6.1 and 6.2: any object is handed on, all by keyword, and nothing else."""
    trainer = make_trainer()
    trainer.train_dataset = trainer.eval_dataset = dataset
    trainer.collate_fn = collate
    with mock.patch.object(trainer_module, "DataLoader") as loader:
        created = getattr(trainer, f"create_{stage}_dataloader")(100, GIVEN)
    assert created is loader.return_value
    loader.assert_called_once_with(
        dataset=dataset, collate_fn=collate, shuffle=stage == "train", worker_init_fn=worker_init_fn, **GIVEN
    )


@pytest.mark.parametrize("stage", ["train", "eval"])
@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (None, ValueError, "is None"),
        (object(), TypeError, "is of type object"),
        ([], ValueError, "is empty"),
        (make_dataset(0), ValueError, "is empty"),
        (Numbers(0), ValueError, "is empty"),
    ],
    ids=["none", "object", "list", "in memory", "samples"],
)
@pytest.mark.parametrize("kwargs", [{}, {"shuffle": True}, {"shuffle": False}], ids=str)
def test_kind_and_emptiness_are_checked_when_a_run_starts(stage, dataset, error, message, kwargs):
    """Row 6.2: for every way in which the loader is created."""
    trainer = make_trainer()
    start = {
        "train": lambda: trainer.train(dataset, 1, train_dataloader_kwargs=kwargs),
        "eval": lambda: trainer.evaluate(dataset, dataloader_kwargs=kwargs),
    }[stage]
    with pytest.raises(error, match=rf"`{stage}_dataset` {message}"):
        start()


def test_an_override_may_create_its_loader_from_anything():
    """Row 6.2: the dataset may be `None` then, or a name."""

    class Named(Trainer):
        def create_train_dataloader(self, batch_size, train_dl_kwargs=None):
            return DataLoader(Numbers(), batch_size=batch_size)

        def create_eval_dataloader(self, batch_size, eval_dl_kwargs=None):
            return DataLoader(Numbers(), batch_size=batch_size)

    for dataset in (None, "the name of a dataset"):
        trainer = make_trainer(cls=Named)
        trainer.train(dataset, 1, eval_dataset="another")
        assert trainer.progress.num_updates == 1


def test_an_override_that_calls_the_method_of_the_trainer_gets_the_same_error():
    """Row 6.2."""

    class Calling(Trainer):
        def create_train_dataloader(self, batch_size, train_dl_kwargs=None):
            return super().create_train_dataloader(batch_size, train_dl_kwargs)

    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        make_trainer(cls=Calling).train(Numbers(0), 1)


@pytest.mark.parametrize(
    "given", [{"persistent_workers": True}, {"prefetch_factor": 4}, {"multiprocessing_context": "fork"}], ids=str
)
def test_arguments_for_workers_do_no_harm_where_the_default_is_no_workers(given):
    """Row 6.1: 0.1.61 always has workers, so a program may pass these alone."""
    trainer = train(make_trainer(), make_dataset(8), train_dataloader_kwargs=given)
    assert trainer.run_config.train_dl_kwargs["num_workers"] == 0
    assert trainer.progress.num_updates == 2


# --- what the prepared loader shows ------------------------------------------------------------------------------


class WithState(IterableDataset):
    def __iter__(self):
        return iter(make_dataset(8))

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def own_init(worker_id):
    worker_init_fn(worker_id)


DATASETS = {
    "samples": Numbers(),
    "in memory": make_dataset(8),
    "part": Subset(make_dataset(12), range(8)),
    "list": list(make_dataset(8)),
    "stream": WithState(),
}
MODES = {
    "one process": {},
    "split_batches": {"accelerator": {"dataloader_config": DataLoaderConfiguration(split_batches=True)}},
    "dispatch_batches": {"accelerator": {"dataloader_config": DataLoaderConfiguration(dispatch_batches=True)}},
}


def shown_by(loader):
    return loader.dataset, loader.collate_fn, loader.worker_init_fn


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("collate_fn", [None, collate], ids=["default", "own"])
@pytest.mark.parametrize("name", DATASETS)
def test_the_prepared_loaders_show_the_users_dataset_and_functions(name, collate_fn, mode):
    """Row 6.3: from the start of a run to after its end, in training and evaluation."""
    dataset, seen = DATASETS[name], []

    def look(trainer, **_):
        seen.append((shown_by(trainer._train_dataloader), shown_by(trainer._eval_dataloader)))

    trainer = make_trainer(callbacks=[Probe(on_training_run_start=look, on_train_epoch_end=look)], **MODES[mode])
    kwargs = {"num_workers": 0, "worker_init_fn": own_init}
    loaders = {"train_dataloader_kwargs": kwargs, "eval_dataloader_kwargs": kwargs}
    train(trainer, dataset, eval_dataset=make_dataset(4), num_epochs=2, collate_fn=collate_fn, **loaders)
    look(trainer)
    assert len(seen) == 4
    for training, evaluation in seen:
        assert training[0] is dataset
        assert training[1:] == evaluation[1:] == (collate_fn or default_collate, own_init)
        assert evaluation[0] is trainer.eval_dataset


@pytest.mark.parametrize("size", [4, None])
def test_the_loader_of_an_override_shows_what_it_was_created_with(size):
    """Row 6.3: also if the override returns a loader of samples."""

    class Own(Trainer):
        def create_train_dataloader(self, batch_size, train_dl_kwargs=None):
            return DataLoader(self.train_dataset, batch_size=size, collate_fn=own_collate)

    def own_collate(samples):
        return samples if size is None else default_collate(samples)

    trainer = train(make_trainer(cls=Own), dataset := Numbers())
    assert trainer._train_dataloader.dataset is dataset
    assert trainer._train_dataloader.collate_fn is own_collate
    assert isinstance(trainer._train_dataloader, DataLoader)


def test_a_loader_that_a_subclass_puts_in_the_place_of_the_prepared_one_stays_as_it_is():
    """Row 6.3."""

    class Replacing(Trainer):
        def _prepare_model_optimizer_and_dataloaders(self):
            super()._prepare_model_optimizer_and_dataloaders()
            self._train_dataloader = self._accelerator.prepare(DataLoader(other, batch_size=2, collate_fn=collate))

    other = Numbers(4)
    trainer = train(make_trainer(cls=Replacing), Numbers())
    assert trainer._train_dataloader.dataset is other
    assert trainer._train_dataloader.collate_fn is collate
    assert trainer.progress.num_updates == 2


@pytest.mark.parametrize("prepares", [True, False], ids=["itself", "nothing"])
def test_a_subclass_may_prepare_its_objects_itself(prepares):
    """Row 6.3: as subclasses written for 0.1.61 do; random numbers while loading are still seeded then."""

    class Preparing(Trainer):
        def _prepare_model_optimizer_and_dataloaders(self):
            if prepares:
                self.model, self.optimizer, self._train_dataloader = self._accelerator.prepare(
                    self.model, self.optimizer, self._train_dataloader
                )

    def batches_of(cls, num_workers):
        batches = []
        probe = Probe(on_train_step_start=lambda trainer, batch, **_: batches.append(batch[0]))
        trainer = make_trainer(cls=cls, callbacks=[probe], seed=5)
        train(trainer, noisy, train_dataloader_kwargs={"num_workers": num_workers})
        assert trainer._train_dataloader.dataset is noisy
        assert trainer._train_dataloader.collate_fn is default_collate
        return torch.stack(batches)

    noisy = Noisy()
    expected = batches_of(Trainer, 0)
    assert torch.equal(batches_of(Preparing, 0), expected)
    assert torch.equal(batches_of(Preparing, 1), expected)


class Noisy(Numbers):
    def __getitem__(self, index):
        return torch.rand(3), torch.zeros(1)


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_draws_the_same_random_numbers_while_loading(tmp_path, mode):
    """Row 6.3: a loader that skips batches is built from what the prepared one reads, not from what it shows."""

    def save(trainer, step, **_):
        if step == 1 and not (tmp_path / "state").exists():
            trainer.save_training_state(tmp_path / "state")

    kwargs = {"train_dataloader_kwargs": {"num_workers": 0}, "num_epochs": 2}
    whole = train(make_trainer(callbacks=[Probe(on_train_step_end=save)], seed=3, **MODES[mode]), Noisy(16), **kwargs)
    resumed = train(make_trainer(seed=3, **MODES[mode]), Noisy(16), resume_from=tmp_path / "state", **kwargs)
    assert_same_weights(weights_of(resumed.model), weights_of(whole.model))
    assert resumed._train_dataloader.dataset is resumed.train_dataset


def test_the_workers_find_the_users_dataset():
    """Row 6.3: also if its tensors are sliced by whole batches."""
    seen = []
    trainer = make_trainer(callbacks=[Probe(on_train_step_start=lambda trainer, batch, **_: seen.append(batch[0]))])
    kwargs = {"num_workers": 1, "worker_init_fn": fill_with_sevens}
    train(trainer, TensorDataset(torch.zeros(8, 3), torch.zeros(8, 1)), train_dataloader_kwargs=kwargs)
    assert torch.equal(torch.cat(seen), torch.full((8, 3), 7.0))


def fill_with_sevens(worker_id):
    torch.utils.data.get_worker_info().dataset.tensors[0].fill_(7)


# --- changes of the dataset between epochs -----------------------------------------------------------------------


def set_scale(trainer):
    trainer.train_dataset.scale = 5.0


def set_scale_through_the_loader(trainer):
    trainer._train_dataloader.dataset.scale = 5.0


CHANGES = {
    "attribute of `train_dataset`": (Numbers, set_scale),
    "attribute of the loader's dataset": (Numbers, set_scale_through_the_loader),
    "deep inside of wrappers": (
        lambda: Subset(Subset(Numbers(), range(8)), range(8)),
        lambda trainer: setattr(trainer.train_dataset.dataset.dataset, "scale", 5.0),
    ),
    "element of a list": (
        lambda: [[torch.ones(3), torch.zeros(1)] for _ in range(8)],
        lambda trainer: [sample[0].fill_(5) for sample in trainer.train_dataset],
    ),
    "tensors in memory": (
        lambda: TensorDataset(torch.ones(8, 3), torch.zeros(8, 1)),
        lambda trainer: setattr(trainer.train_dataset, "tensors", (torch.full((8, 3), 5.0), torch.zeros(8, 1))),
    ),
    "its method": (
        Numbers,
        lambda trainer: setattr(
            trainer.train_dataset, "__class__", type("Other", (Numbers,), {"__getitem__": lambda self, index: FIVES})
        ),
    ),
}
FIVES = (torch.full((3,), 5.0), torch.zeros(1))
WORKERS = {"default": {}, "none": {"num_workers": 0}, "two": {"num_workers": 2}}


@pytest.mark.usefixtures("three_cores")
@pytest.mark.parametrize("kwargs", WORKERS.values(), ids=WORKERS)
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_callback_changes_in_the_dataset_reaches_the_next_epoch(change, kwargs):
    """Rows 6.3 and 6.10: whatever it changes, with any number of workers."""
    make, apply = CHANGES[change]
    epochs = []

    def start(trainer, **_):
        epochs.append([])
        if trainer.run_history.current_epoch == 2:
            apply(trainer)

    record = Probe(
        on_train_epoch_start=start,
        on_train_step_start=lambda trainer, batch, **_: epochs[-1].extend(batch[0][:, 0].tolist()),
    )
    train(make_trainer(callbacks=[record]), make(), num_epochs=3, train_dataloader_kwargs=kwargs)
    assert epochs == [[1.0] * 8, [5.0] * 8, [5.0] * 8]


class SwitchOff(TrainerCallback):
    """Trains the last two epochs without augmentation."""

    def __init__(self):
        self.num_augmented = self.num_plain = 0

    def on_train_epoch_start(self, trainer, **kwargs):
        if trainer.run_history.current_epoch > trainer.run_config.num_epochs - 2:
            trainer.train_dataset.scale = 0.0

    def on_train_step_end(self, trainer, batch, **kwargs):
        augmented = batch[0][:, 0] == 1
        self.num_augmented += int(augmented.sum())
        self.num_plain += int((~augmented).sum())


@pytest.mark.usefixtures("three_cores")
@pytest.mark.parametrize("kwargs", WORKERS.values(), ids=WORKERS)
def test_augmentation_that_is_switched_off_for_the_last_epochs_is_off(kwargs):
    """Row 6.10: 104 samples with it, 208 without."""
    switch = SwitchOff()
    train(make_trainer(callbacks=[switch]), Numbers(104), num_epochs=3, train_dataloader_kwargs=kwargs)
    assert (switch.num_augmented, switch.num_plain) == (104, 208)


class EpochAware(Numbers):
    def set_epoch(self, epoch):
        self.scale = float(epoch)


@pytest.mark.usefixtures("three_cores")
@pytest.mark.parametrize("kwargs", WORKERS.values(), ids=WORKERS)
def test_the_epoch_that_a_dataset_is_told_reaches_its_workers(kwargs):
    """Row 6.10: `set_epoch` of the dataset is called before each epoch, from 0."""
    seen = []
    probe = Probe(on_train_step_start=lambda trainer, batch, **_: seen.append(batch[0][0, 0].item()))
    train(
        make_trainer(callbacks=[probe]),
        EpochAware(),
        num_epochs=3,
        per_device_batch_size=8,
        train_dataloader_kwargs=kwargs,
    )
    assert seen == [0.0, 1.0, 2.0]


@pytest.mark.usefixtures("three_cores")
@pytest.mark.parametrize("kwargs", WORKERS.values(), ids=WORKERS)
def test_changes_reach_the_next_evaluation(kwargs):
    """Row 6.10: the same for the evaluation loader."""
    seen = []

    def change(trainer, **_):
        trainer.eval_dataset.scale += 1

    probe = Probe(
        on_eval_epoch_start=change,
        on_eval_step_start=lambda trainer, batch, **_: seen.append(batch[0][0, 0].item()),
    )
    trainer = make_trainer(callbacks=[probe])
    train(trainer, num_epochs=2, eval_dataset=Numbers(4), eval_dataloader_kwargs=kwargs)
    trainer.evaluate(Numbers(4), per_device_batch_size=4, dataloader_kwargs=kwargs)
    assert seen == [2.0, 3.0, 2.0]


def test_workers_live_on_if_that_is_asked_for():
    """Row 6.10: then they keep the dataset that they were started with, as in PyTorch."""
    seen = []

    def start(trainer, **_):
        trainer.train_dataset.scale = float(trainer.run_history.current_epoch)

    probe = Probe(
        on_train_epoch_start=start,
        on_train_step_start=lambda trainer, batch, **_: seen.append(batch[0][0, 0].item()),
    )
    kwargs = {"num_workers": 1, "persistent_workers": True}
    train(
        make_trainer(callbacks=[probe]),
        Numbers(),
        num_epochs=3,
        per_device_batch_size=8,
        train_dataloader_kwargs=kwargs,
    )
    assert seen == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_epoch_has_the_length_that_the_dataset_has_at_its_start(num_workers):
    """Row 6.10: an update is that of the mean over all samples of its batches, as if the length had never changed."""
    gradients = []

    def start(trainer, **_):
        if trainer.run_history.current_epoch == 2:
            trainer.train_dataset.length = 6

    class Ascending(Numbers):
        def __getitem__(self, index):
            return torch.full((1,), float(index)), torch.zeros(1)

    probe = Probe(
        on_train_epoch_start=start,
        on_optimizer_step_start=lambda trainer, **_: gradients.append(trainer.model.weight.grad.item()),
    )
    trainer = make_trainer(make_model(1), callbacks=[probe], lr=0.0, loss_func=lambda outputs, targets: outputs.mean())
    kwargs = {"num_workers": num_workers, "shuffle": False}
    train(trainer, Ascending(16), num_epochs=2, gradient_accumulation_steps=3, train_dataloader_kwargs=kwargs)
    assert gradients == pytest.approx([sum(range(12)) / 12, sum(range(12, 16)) / 4, sum(range(6)) / 6])


# --- run configuration -------------------------------------------------------------------------------------------


def test_without_a_limit_the_number_of_updates_is_that_of_the_epochs():
    """Row 6.4: ours (N4); 0.1.61 adds 1."""
    assert train(make_trainer(), num_epochs=3).run_config.max_num_train_steps == 12


@pytest.mark.parametrize("trains_before", [True, False])
def test_in_evaluate_an_epoch_has_no_updates(trains_before):
    """Row 6.5: 0, which can be logged and compared, and no limit."""
    trainer = train(make_trainer()) if trains_before else make_trainer()
    trainer.evaluate(make_dataset(8))
    config = trainer.run_config
    assert (config.num_update_steps_per_epoch, config.num_local_update_steps_per_epoch) == (0, 0)
    assert config.max_num_train_steps is None


def test_an_evaluation_in_a_callback_leaves_the_configuration_of_training_as_it_was():
    """Row 6.5."""
    seen = []

    def evaluate(trainer, **_):
        before = trainer.run_config
        trainer.evaluate(make_dataset(4))
        seen.append(trainer.run_config == before)

    trainer = train(make_trainer(callbacks=[Probe(on_train_epoch_end=evaluate)]))
    assert seen == [True]
    assert trainer.run_config.num_update_steps_per_epoch == 4


def test_the_evaluation_batch_size_is_the_argument():
    """Row 6.6: ours; in 0.1.61 it is that of `train_dataloader_kwargs`."""
    trainer = train(make_trainer(), eval_dataset=make_dataset(8), train_dataloader_kwargs={"batch_size": 2})
    assert trainer.run_config.eval_per_device_batch_size == 4


def test_to_dict_copies_containers_and_not_their_values():
    """Row 6.7: who adds to the dictionaries changes no configuration; objects in them stay the same."""
    sampler = torch.utils.data.SequentialSampler(make_dataset(8))
    given = {"sampler": sampler, "num_workers": 0, "extra": 0}
    trainer = make_trainer()
    trainer.create_train_dataloader = lambda batch_size, train_dl_kwargs: (
        setattr(trainer, "_train_dl_kwargs", {**given, "nested": {"list": [1], "pair": ([2], 3), "set": {4}}})
        or DataLoader(make_dataset(8), batch_size=4)
    )
    config = train(trainer).run_config
    copied = config.to_dict()["train_dl_kwargs"]
    assert copied == config.train_dl_kwargs
    assert copied["sampler"] is sampler
    copied["x"] = 1
    copied["nested"]["list"].append(1)
    copied["nested"]["pair"][0].append(1)
    copied["nested"]["set"].add(1)
    assert config.train_dl_kwargs == {**given, "nested": {"list": [1], "pair": ([2], 3), "set": {4}}}


def test_the_updates_of_an_epoch_are_counted_once_for_all_processes():
    """Row 6.8: ours (N4). `tests/distributed` has it for two processes."""
    config = train(make_trainer(), 16, gradient_accumulation_steps=2).run_config
    assert config.num_update_steps_per_epoch == config.num_local_update_steps_per_epoch == 2


@pytest.mark.parametrize("text", ["None", "none", "NONE", " None "])
def test_the_variable_for_limited_batches_may_be_none(monkeypatch, text):
    """Row 6.9: in any case, it means no limit."""
    monkeypatch.setenv(LIMIT_BATCHES_ENV_VAR, text)
    assert train(make_trainer()).progress.num_updates == 4


def test_the_arguments_of_the_training_loader_are_known_after_an_evaluation():
    """Row 6.11: in the configuration and on the trainer; also what follows from them."""
    trainer = make_trainer()
    train(trainer, per_device_batch_size=8)
    trainer.evaluate(make_dataset(8), per_device_batch_size=2)
    for kwargs in (trainer.run_config.train_dl_kwargs, trainer._train_dl_kwargs):
        assert kwargs["batch_size"] == 8
    assert trainer.run_config.train_per_device_batch_size == 8
    assert trainer.run_config.eval_dl_kwargs["batch_size"] == 2
    trainer.predict(make_dataset(8))
    assert trainer.run_config.train_dl_kwargs["batch_size"] == 8


def test_the_arguments_of_an_earlier_run_are_not_those_of_the_next_one():
    """Row 6.11: a run whose loader is not created from arguments has none (N7)."""
    trainer = make_trainer()
    train(trainer, per_device_batch_size=8)
    train(trainer, Batches(make_dataset(8), 4))
    assert trainer.run_config.train_dl_kwargs is None
    fresh = make_trainer()
    fresh.evaluate(make_dataset(8))
    assert fresh.run_config.train_dl_kwargs is None


def test_the_configuration_has_further_fields():
    """Row 6.12: ours, an addition."""
    config = train(make_trainer(seed=3), gradient_clip_norm=1.0).run_config
    assert config.to_dict().items() >= {"seed": 3, "gradient_clip_norm": 1.0, "is_limited_by_steps": False}.items()


def test_samples_are_the_same_with_and_without_default_workers(three_cores):
    """Row 6.10 changes no number: workers that begin in each epoch draw what persistent ones draw."""

    def weights(kwargs):
        trainer = make_trainer(seed=3)
        train(trainer, Noisy(16), num_epochs=3, train_dataloader_kwargs=kwargs)
        return weights_of(trainer.model)

    expected = weights({"num_workers": 0})
    for kwargs in ({}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}):
        assert_same_weights(weights(kwargs), expected)


def test_a_duck_typed_dataset_shows_too():
    """Row 6.3: an object with a length and indices is a dataset."""

    class Duck:
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return torch.ones(3), torch.zeros(1)

    trainer = train(make_trainer(), duck := Duck())
    assert trainer._train_dataloader.dataset is duck
    assert len(Samples(duck)) == len(trainer._train_dataloader.dataset) == 8


def test_the_batch_size_may_be_none_if_the_arguments_of_the_loader_have_one():
    """As programs write that keep all settings of their loaders in one dictionary."""
    trainer = make_trainer()
    given = {"batch_size": 6, "num_workers": 0}
    trainer.train(
        make_dataset(24), num_epochs=1, eval_dataset=make_dataset(8), per_device_batch_size=None,
        train_dataloader_kwargs=given,
    )  # fmt: skip
    config = trainer.run_config
    assert (config.train_per_device_batch_size, config.eval_per_device_batch_size) == (6, 6)
    trainer.evaluate(make_dataset(8), per_device_batch_size=None, dataloader_kwargs={"batch_size": 4})
    assert trainer.run_config.eval_per_device_batch_size == 4
    assert len(trainer.predict(make_dataset(5), per_device_batch_size=None, dataloader_kwargs={"batch_size": 4})) == 5
    for settings in ({}, {"train_dataloader_kwargs": {"num_workers": 0}}):
        with pytest.raises(TypeError, match="`per_device_batch_size` is None"):
            trainer.train(make_dataset(24), num_epochs=1, per_device_batch_size=None, **settings)
