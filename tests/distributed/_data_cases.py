"""The part of `test_data.py` that runs on each of two or three processes, as a script.

Each function `case_<name>` returns plain values, which are stored for `test_<name>`.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
)

from _processes import run_cases
from _support import Probe, make_indexed_dataset, make_trainer
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import SaveTrainingStateCallback

IN_ORDER = {"shuffle": False, "num_workers": 0}


class StopError(Exception):
    """Ends a run, as a crash would."""


def num_processes() -> int:
    return int(os.environ["WORLD_SIZE"])


def gathered(value: Any) -> list[Any]:
    """Return the values of all ranks."""
    values = [None] * num_processes()
    distributed.all_gather_object(values, value)
    return values


def rows_of(batch: Any) -> list[float]:
    """Return the first number of each sample in a batch."""
    inputs = batch["x"] if isinstance(batch, dict) else batch[0] if isinstance(batch, (list, tuple)) else batch.x
    return inputs.reshape(len(inputs), -1)[:, 0].tolist()


class Summing(Trainer):
    """Takes batches of any kind; the loss is the mean of the first numbers of the samples."""

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        rows = torch.tensor(rows_of(batch), dtype=torch.float32)
        return {"loss": self.model(rows.reshape(-1, 1)).mean(), "batch_size": len(rows)}

    calculate_eval_batch_loss = calculate_train_batch_loss


def run(
    data: Any,
    *,
    num_epochs: int = 2,
    evaluated: bool = False,
    folder: Path | None = None,
    stop_after: int | None = None,
    resume_from: Any = None,
    see: Callable[[Any], Any] = rows_of,
    **kwargs: Any,
) -> dict[str, Any]:
    """Train on data, or evaluate on them, and return what this rank saw in each step, and the warnings."""
    seen: list[Any] = []

    def record(trainer: Any, batch: Any, batch_output: Any, **_: Any) -> None:
        seen.append(see(batch) if batch_output["batch_size"] else [])
        if len(seen) == stop_after:
            raise StopError

    event = "on_eval_step_end" if evaluated else "on_train_step_end"
    states = [] if folder is None else [SaveTrainingStateCallback(folder, save_every_n_steps=1, save_at_end=False)]
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    trainer = make_trainer(model, cls=Summing, lr=0.0, seed=3, callbacks=[Probe(**{event: record}), *states])
    kwargs = {"per_device_batch_size": 2, **kwargs}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if evaluated:
                trainer.evaluate(data, 2, kwargs.get("eval_dataloader_kwargs"), kwargs.get("collate_fn"))
            else:
                trainer.train(data, num_epochs, resume_from=resume_from, **kwargs)
        except StopError:
            pass
    history = trainer.run_history
    losses = {name: float(history.get_latest_metric(name)) for name in history.get_metric_names()}
    told = [str(warning.message) for warning in caught if "multi-threaded" not in str(warning.message)]
    return {
        "seen": seen,
        "losses": losses,
        "samples": trainer.progress.num_samples,
        "updates": trainer.progress.num_updates,
        "planned": None if evaluated else trainer.run_config.num_update_steps_per_epoch,
        "told": told,
    }


def resumed(make_data: Callable[[], Any], folder: Path, steps: tuple[int, ...] = (1, 3, 4), **kwargs: Any) -> list[Any]:
    """Return what a complete run saw, and for each step what is left of it and what a run resumed after it saw."""
    complete = run(make_data(), folder=folder / "complete", **kwargs)["seen"]
    results = []
    for step in steps:
        if step < len(complete):
            rest = run(make_data(), resume_from=folder / "complete" / f"step_{step}", **kwargs)["seen"]
            results.append((complete[step:], rest))
    return results


# --- data of its own for each process ------------------------------------------------------------------------------


class Own(Dataset):
    """A dataset that knows its samples as a list; the second number of a sample is drawn at random."""

    def __init__(self, numbers: Any, augmented: bool = False) -> None:
        self.items = [f"sample {number}" for number in numbers]
        self.augmented = augmented

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        number = float(self.items[index].split()[1])
        drawn = torch.rand(()) + float(np.random.rand()) if self.augmented else torch.zeros(())
        return torch.stack([torch.tensor(number), drawn]), torch.zeros(1)


def tensors(numbers: Any) -> TensorDataset:
    return TensorDataset(torch.tensor([float(number) for number in numbers]).reshape(-1, 1), torch.zeros(len(numbers)))


KINDS: dict[str, Callable[[Any], Any]] = {
    "list": lambda numbers: [(torch.tensor([float(number)]), torch.zeros(1)) for number in numbers],
    "tensors": tensors,
    "subset": lambda numbers: Subset(make_indexed_dataset(64), list(numbers)),
    "array subset": lambda numbers: Subset(make_indexed_dataset(64), np.array(list(numbers))),
    "dataset": Own,
    "concatenation": lambda numbers: ConcatDataset([Own(list(numbers)[:2]), Own(list(numbers)[2:])]),
    "loader": lambda numbers: DataLoader(Own(numbers), batch_size=2, shuffle=True),
}
"""How a process may hold samples with these numbers."""


def own_numbers(rank: int, sizes: tuple[int, ...]) -> range:
    start = sum(sizes[:rank])
    return range(start, start + sizes[rank])


def case_data_of_its_own_for_each_process_are_all_used(rank: int, folder: Path) -> Any:
    results = {}
    for sizes in ((7, 4, 1), (5, 5, 5), (6, 5, 5)):
        for kind, make in KINDS.items():
            for evaluated in (False, True):
                data = make(own_numbers(rank, sizes))
                result = run(data, evaluated=evaluated, num_epochs=1)
                results[sizes, kind, evaluated] = {**result, "seen": sorted(itertools.chain(*result["seen"]))}
    return results


def case_data_of_its_own_are_resumed_exactly(rank: int, folder: Path) -> Any:
    results = {}
    for num_workers in (0, 1):
        data = {"train_dataloader_kwargs": {"num_workers": num_workers}}
        results[num_workers] = resumed(
            lambda: Own(own_numbers(rank, (7, 4, 2)), augmented=True),
            folder / str(num_workers),
            see=lambda batch: batch[0].tolist(),
            **data,
        )
    return results


def case_no_two_draws_are_alike_although_each_process_has_its_own_data(rank: int, folder: Path) -> Any:
    result = run(Own(own_numbers(rank, (6, 4, 4)), augmented=True), see=lambda batch: batch[0][:, 1].tolist())
    return [value for step in result["seen"] for value in step]


def case_a_process_without_data_is_an_error_on_all(rank: int, folder: Path) -> Any:
    class Empty:
        def __iter__(self) -> Iterator[Any]:
            return iter([(torch.ones(2, 1), torch.zeros(2, 1))] * (2 if rank == 0 else 0))

    try:
        run(Empty(), num_epochs=1)
    except ValueError as error:
        return str(error)
    return None


def case_the_same_data_are_not_taken_for_different_ones(rank: int, folder: Path) -> Any:
    class WithRank(Own):
        """Knows its rank for other reasons than to divide the samples."""

        def __init__(self, numbers: Any) -> None:
            super().__init__(numbers)
            self.rank, self.world_size, self.device = rank, num_processes(), f"cuda:{rank}"

    results = {}
    for kind, make in {**KINDS, "with rank": WithRank}.items():
        result = run(make(range(12)), num_epochs=1)
        results[kind] = {**result, "seen": sorted(itertools.chain(*result["seen"]))}
    return results


# --- divided by a sampler ------------------------------------------------------------------------------------------


class Share:
    """Each process gets every n-th index, without repeating any; it may say that it divides them."""

    def __init__(self, num_samples: int, rank: int, names: tuple[str, str] | None) -> None:
        self.indices = list(range(rank, num_samples, num_processes()))
        if names is not None:
            setattr(self, names[0], num_processes())
            setattr(self, names[1], rank)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


MARKS = (("num_replicas", "rank"), ("world_size", "rank"), ("num_processes", "process_index"))


def samplers_that_divide(dataset: Any, rank: int) -> dict[str, Any]:
    """Return the keyword arguments of loaders, by name."""
    size = len(dataset)
    kwargs: dict[str, Any] = {}
    for marks in MARKS:
        kwargs[f"{marks} in a sampler"] = {"sampler": Share(size, rank, marks)}
        kwargs[f"{marks} in a batch sampler"] = {"batch_sampler": BatchSampler(Share(size, rank, marks), 2, False)}
    kwargs["distributed"] = {"sampler": DistributedSampler(dataset, num_processes(), rank)}
    return kwargs


def case_samples_that_a_sampler_has_divided_are_not_divided_again(rank: int, folder: Path) -> Any:
    results = {}
    for num_samples in (12, 13):
        dataset = Own(range(num_samples))
        for name, kwargs in samplers_that_divide(dataset, rank).items():
            results[num_samples, name, False] = run(dataset, train_dataloader_kwargs={"num_workers": 0, **kwargs})
        for name, kwargs in samplers_that_divide(dataset, rank).items():
            batching = {"batch_size": 2} if "sampler" in kwargs else {}
            results[num_samples, name, True] = run(DataLoader(dataset, **batching, **kwargs))
    return results


def case_a_sampler_that_divides_without_saying_so_is_an_error_on_all(rank: int, folder: Path) -> Any:
    results = []
    for dataset in (Own(range(12)), tensors(range(12))):
        try:
            run(dataset, train_dataloader_kwargs={"sampler": Share(12, rank, None), "num_workers": 0})
        except RuntimeError as error:
            results.append(str(error))
    return results


def case_a_divided_order_is_resumed_exactly(rank: int, folder: Path) -> Any:
    def make() -> Any:
        dataset = Own(range(13), augmented=True)
        sampler = DistributedSampler(dataset, num_replicas=num_processes(), rank=rank)
        return DataLoader(dataset, batch_size=2, sampler=sampler)

    return resumed(make, folder, see=lambda batch: batch[0].tolist())


# --- streams -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Item:
    x: torch.Tensor
    text: str


class Stream(IterableDataset):
    """A stream of numbers in any form. With a state it remembers its place."""

    def __init__(self, num_samples: int, form: Callable[[int], Any]) -> None:
        self.num_samples, self.form = num_samples, form

    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for number in range(first, self.num_samples, step):
            yield self.form(number)


def as_text(number: int) -> Any:
    return {"x": torch.tensor([float(number)]), "id": f"id{number}"}


def check_text(batch: Any) -> list[float]:
    assert [f"id{int(row)}" for row in rows_of(batch)] == list(batch["id"])
    return rows_of(batch)


def collate_dict(samples: Any) -> Any:
    return {"x": torch.stack([sample["x"] for sample in samples]), "id": [sample["id"] for sample in samples]}


def as_ragged(number: int) -> Any:
    return torch.full((1 + number % 5,), float(number)), None


def collate_ragged(samples: Any) -> Any:
    width = max(len(row) for row, _ in samples)
    padded = [nn.functional.pad(row, (0, width - len(row)), value=float(row[0])) for row, _ in samples]
    return torch.stack(padded), None, len(samples), np.array([len(row) for row, _ in samples], dtype=np.int16)


def check_ragged(batch: Any) -> list[float]:
    rows, nothing, size, lengths = batch
    assert nothing is None
    assert (size, type(lengths), lengths.dtype) == (len(rows), np.ndarray, np.int16)
    assert [1 + int(row) % 5 for row in rows_of(batch)] == lengths.tolist()
    return rows_of(batch)


def as_item(number: int) -> Any:
    return Item(torch.tensor([float(number)]), f"id{number}")


def collate_items(samples: Any) -> Any:
    return Item(torch.stack([sample.x for sample in samples]), " ".join(sample.text for sample in samples))


def as_odd_types(number: int) -> Any:
    return torch.tensor([number], dtype=torch.int16), torch.tensor(number > 3), torch.tensor(1j * number)


FORMS: dict[str, Any] = {
    "texts": (as_text, collate_dict, check_text),
    "texts with default collation": (as_text, None, check_text),
    "ragged": (as_ragged, collate_ragged, check_ragged),
    "dataclasses": (as_item, collate_items, rows_of),
    "odd types": (as_odd_types, None, rows_of),
}


def case_a_stream_may_hold_anything(rank: int, folder: Path) -> Any:
    results = {}
    for name, (form, collate, check) in FORMS.items():
        for num_samples in (1, 6, 9, 12):
            for num_workers in (0, 2):
                if num_workers and num_samples != 9:
                    continue
                for evaluated in (False, True):
                    loading = {"num_workers": num_workers}
                    kwargs = {f"{'eval' if evaluated else 'train'}_dataloader_kwargs": loading, "collate_fn": collate}
                    result = run(Stream(num_samples, form), num_epochs=1, evaluated=evaluated, see=check, **kwargs)
                    results[name, num_samples, num_workers, evaluated] = result
    return results


def case_a_stream_leaves_out_what_drop_last_demands(rank: int, folder: Path) -> Any:
    loader = DataLoader(Stream(9, as_text), batch_size=2, drop_last=True)
    return run(loader, num_epochs=1)["seen"]


def case_a_stream_of_ready_batches_is_divided_by_batches(rank: int, folder: Path) -> Any:
    def ready(number: int) -> Any:
        return torch.full((1 + number, 1), float(number)), "text"

    return run(Stream(5, ready), num_epochs=1, train_dataloader_kwargs={"batch_size": None})["seen"]


def case_an_error_of_a_stream_is_raised_on_all(rank: int, folder: Path) -> Any:
    class UnpicklableError(Exception):
        def __init__(self, first: int, second: int) -> None:
            super().__init__("sample 5")

    results = []
    for make in (lambda: KeyError("sample 5"), lambda: UnpicklableError(1, 2)):

        def fail(number: int, make: Any = make) -> Any:
            if number == 5:
                raise make()
            return as_text(number)

        try:
            run(Stream(9, fail))
        except Exception as error:
            results.append((type(error).__name__, str(error)))
    return results


class Remembering(IterableDataset):
    """A stream with a state, whose samples are drawn at random."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples, self.next = num_samples, 0

    def __iter__(self) -> Iterator[Any]:
        for number in range(self.next, self.num_samples):
            self.next = number + 1
            yield torch.stack([torch.tensor(float(number)), torch.rand(())]), torch.zeros(1)
        self.next = 0

    def state_dict(self) -> Any:
        return {"next": self.next}

    def load_state_dict(self, state: Any) -> None:
        self.next = state["next"]


def as_random(number: int) -> Any:
    return torch.stack([torch.tensor(float(number)), torch.rand(())]), torch.zeros(1)


def case_streams_are_resumed_exactly(rank: int, folder: Path) -> Any:
    see = {"see": lambda batch: batch[0].tolist()}
    results = {"state": resumed(lambda: Remembering(15), folder / "state", **see)}
    for num_workers, persistent in ((0, False), (2, False), (2, True)):
        loading = {"num_workers": num_workers, **({"persistent_workers": True} if persistent else {})}
        results[num_workers, persistent] = resumed(
            lambda: Stream(15, as_random),
            folder / f"{num_workers}_{persistent}",
            train_dataloader_kwargs=loading,
            **see,
        )
    return results


class OwnStream(IterableDataset):
    """Reads its own part of the samples, as it knows its rank."""

    def __init__(self, num_samples: int, rank: int) -> None:
        self.num_samples, self.rank, self.world_size = num_samples, rank, num_processes()

    def __iter__(self) -> Iterator[Any]:
        return map(as_random, range(self.rank, self.num_samples, self.world_size))


class FileStream(IterableDataset):
    """Reads its own file."""

    def __init__(self, path: str) -> None:
        self.path, self.device = path, f"cpu:{path[-1]}"

    def __iter__(self) -> Iterator[Any]:
        rank = int(self.path.split("_")[1])
        return map(as_random, own_numbers(rank, (6, 4, 3)))


class OtherStream(IterableDataset):
    """Reads its own files."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __iter__(self) -> Iterator[Any]:
        return (as_random(int(path.split("_")[1])) for path in self.paths)


def case_a_stream_that_divides_itself_is_read_by_each_process(rank: int, folder: Path) -> Any:
    paths = [f"shard_{number}" for number in range(rank, 13, num_processes())]
    return {
        "attributes": [run(OwnStream(num, rank), num_epochs=1) for num in (12, 13)],
        "files": [run(OtherStream(paths), num_epochs=1)],
        "file": [run(FileStream(f"shard_{rank}"), num_epochs=1)],
        "resumed": resumed(lambda: OwnStream(13, rank), folder, see=lambda batch: batch[0].tolist()),
    }


# --- iterables of batches, and subclasses of DataLoader -------------------------------------------------------------


class Batches:
    def __init__(self, numbers: Any) -> None:
        self.numbers = list(numbers)

    def __iter__(self) -> Iterator[Any]:
        return ((torch.full((2, 1), float(number)), torch.zeros(2, 1)) for number in self.numbers)


class SizedBatches(Batches):
    def __len__(self) -> int:
        return len(self.numbers)


def case_iterables_of_batches_may_have_other_lengths_on_each_process(rank: int, folder: Path) -> Any:
    results = {}
    for sizes in ((3, 1, 2), (2, 2, 2), (1, 4, 4)):
        for cls in (Batches, SizedBatches):
            for evaluated in (False, True):
                result = run(cls(own_numbers(rank, sizes)), evaluated=evaluated, gradient_accumulation_steps=1)
                results[sizes, cls.__name__, evaluated] = result
    return results


class Short(DataLoader):
    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(super().__iter__(), 5)

    def __len__(self) -> int:
        return 5


class Negating(DataLoader):
    def __iter__(self) -> Iterator[Any]:
        for inputs, targets in super().__iter__():
            yield -inputs, targets


class WithState(Short):
    """Remembers how many batches it has yielded."""

    num_done = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in itertools.islice(super().__iter__(), self.num_done, None):
            self.num_done += 1
            yield batch
        self.num_done = 0

    def state_dict(self) -> Any:
        return {"num_done": self.num_done}

    def load_state_dict(self, state: Any) -> None:
        self.num_done = state["num_done"]


def case_a_loader_with_its_own_iteration_is_divided_by_batches(rank: int, folder: Path) -> Any:
    results: dict[Any, Any] = {}
    for cls in (Short, Negating, WithState):
        for num_workers in (0, 1):
            loader = cls(Own(range(12)), batch_size=2, shuffle=cls is Negating, num_workers=num_workers)
            results[cls.__name__, num_workers] = run(loader)
        sampler = DistributedSampler(Own(range(13)), num_processes(), rank, shuffle=False)
        if cls is Negating:
            results["divided"] = run(cls(Own(range(13)), batch_size=2, sampler=sampler), num_epochs=1)

        def make(cls: Any = cls) -> Any:
            return cls(Own(range(12)), batch_size=2, shuffle=cls is Negating)

        results[cls.__name__, "resumed"] = resumed(make, folder / cls.__name__, steps=(1, 2, 3, 4))
    return results


# --- orders and draws of map-style data ----------------------------------------------------------------------------


class Estimating:
    """A batch sampler of seven batches whose length is an estimate."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[Any]:
        return (iter([2 * number, 2 * number + 1]) for number in range(7))

    def __len__(self) -> int:
        return self.length


def case_a_batch_sampler_may_estimate_its_length_and_yield_iterators(rank: int, folder: Path) -> Any:
    results = {}
    for length, accumulation in itertools.product((1, 3, 7, 20), (1, 2)):
        kwargs = {"batch_sampler": Estimating(length), "num_workers": 0}
        for evaluated in (False, True):
            name = "eval_dataloader_kwargs" if evaluated else "train_dataloader_kwargs"
            more = {} if evaluated else {"gradient_accumulation_steps": accumulation}
            results[length, accumulation, evaluated] = run(
                Own(range(14)), evaluated=evaluated, **{name: kwargs}, **more
            )
    return results


def case_an_index_drawn_again_gets_new_numbers(rank: int, folder: Path) -> Any:
    results: dict[Any, Any] = {}
    for num_workers, batch_size in ((0, 1), (0, 4), (1, 4)):
        dataset = Own(range(3), augmented=True)
        sampler = RandomSampler(dataset, replacement=True, num_samples=26)
        loading = {"sampler": sampler, "num_workers": num_workers, "batch_size": batch_size}
        seen = run(dataset, train_dataloader_kwargs=loading, see=lambda batch: batch[0][:, 1].tolist())["seen"]
        results[num_workers, batch_size] = seen
    return results


def case_ready_batches_of_a_map_style_dataset_are_divided(rank: int, folder: Path) -> Any:
    results = {}
    for num_workers in (0, 1):
        for num_batches in (1, 4, 7):
            ready = [(torch.full((2, 1), float(number)), torch.zeros(2, 1)) for number in range(num_batches)]
            loading = {"batch_size": None, "num_workers": num_workers}
            for evaluated in (False, True):
                name = "eval_dataloader_kwargs" if evaluated else "train_dataloader_kwargs"
                results[num_workers, num_batches, evaluated] = run(ready, evaluated=evaluated, **{name: loading})
    loading = {"train_dataloader_kwargs": {"batch_size": None, "num_workers": 0}}
    results["resumed"] = resumed(lambda: list(Batches(range(7))), folder, **loading)
    return results


CASES = {name.removeprefix("case_"): value for name, value in list(globals().items()) if name.startswith("case_")}

if __name__ == "__main__":
    run_cases(CASES)
