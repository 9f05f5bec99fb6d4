"""Every optimizer of PyTorch, several at once, and schedule-free ones: by hand, in a run of the trainer, and resumed.

``PYTHONPATH=src python tests/tools/_optimizing.py`` prints a table. The real schedule-free optimizers are in it if the
package `schedulefree` is installed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn, optim

from _support import IN_ORDER, make_dataset, mse, weights_of
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import TrainerCallback

NUM_EPOCHS, NUM_STEPS_PER_EPOCH, BATCH_SIZE = 2, 5, 4
DATASET = make_dataset(NUM_STEPS_PER_EPOCH * BATCH_SIZE, num_features=4)


class Averaging(optim.Optimizer):
    """A stand-in with the interface of schedule-free optimizers: it steps in training mode only.

    In evaluation mode the model holds an average of the weights, from which those to train with are computed again.
    """

    def __init__(self, params: Any, lr: float = 0.1, is_mode_saved: bool = True) -> None:
        super().__init__(params, {"lr": lr, **({"train_mode": False} if is_mode_saved else {})})
        self.is_training = False
        self.is_mode_saved = is_mode_saved

    def _switch(self, to_training: bool) -> None:
        is_training = self.param_groups[0]["train_mode"] if self.is_mode_saved else self.is_training
        for group in self.param_groups if is_training != to_training else ():
            for parameter in group["params"]:
                if "z" in self.state[parameter]:
                    weight = 0.3 if to_training else 1 - 1 / 0.7
                    parameter.data.lerp_(self.state[parameter]["z"], weight)
        self.is_training = to_training
        for group in self.param_groups if self.is_mode_saved else ():
            group["train_mode"] = to_training

    def train(self) -> None:
        self._switch(True)

    def eval(self) -> None:
        self._switch(False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if not (self.param_groups[0]["train_mode"] if self.is_mode_saved else self.is_training):
            raise RuntimeError("stepped in evaluation mode")
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if "z" not in state:
                    state["z"] = parameter.clone()
                state["z"].sub_(parameter.grad, alpha=group["lr"])
                parameter.lerp_(state["z"], 0.2).sub_(parameter.grad, alpha=0.1 * group["lr"])


class SharpnessAware(optim.Optimizer):
    """The recipe for sharpness-aware minimization (Foret et al., 2020, arXiv:2010.01412) around another optimizer."""

    def __init__(self, base: optim.Optimizer, radius: float = 0.05) -> None:
        self.base, self.radius = base, radius
        super().__init__(base.param_groups, {})
        self.param_groups, self.state = base.param_groups, base.state

    @torch.no_grad()
    def step(self, closure: Any) -> Any:
        loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm() + 1e-12
        ascents = [self.radius * p.grad / norm for p in parameters]
        weights = [p.clone() for p in parameters]
        for parameter, ascent in zip(parameters, ascents, strict=True):
            parameter.add_(ascent)
        closure()
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)
        self.base.step()
        return loss

    def load_state_dict(self, state_dict: Any) -> None:
        self.base.load_state_dict(state_dict)
        self.param_groups, self.state = self.base.param_groups, self.base.state


class PublishedSharpnessAware(optim.Optimizer):
    """The same as it is commonly published: the closure has a default, and the state of the base is not saved."""

    def __init__(self, params: Any, base: Any, radius: float = 0.05, **kwargs: Any) -> None:
        super().__init__(params, {"radius": radius, **kwargs})
        self.base_optimizer = base(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert closure is not None, "it requires a closure"
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm() + 1e-12
        for parameter in parameters:
            self.state[parameter]["old"] = parameter.clone()
            parameter.add_(self.param_groups[0]["radius"] * parameter.grad / norm)
        self.zero_grad()
        torch.enable_grad()(closure)()
        for parameter in parameters:
            parameter.copy_(self.state[parameter]["old"])
        self.base_optimizer.step()

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self.base_optimizer.param_groups = self.param_groups


class Net(nn.Module):
    """A network with dropout, whose first layer may be an embedding with sparse gradients."""

    def __init__(self, *, is_sparse: bool = False, has_bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(2, 2, sparse=True) if is_sparse else None
        self.body = nn.Linear(8 if is_sparse else 4, 6, bias=has_bias)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(6, 1, bias=has_bias)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.embedding is not None:
            inputs = self.embedding((inputs > 0).long()).flatten(1)
        return self.head(self.dropout(self.body(inputs).tanh()))

    def matrices(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.ndim == 2]

    def others(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.ndim != 2]


@dataclass(frozen=True)
class Case:
    """One optimizer, or several.

    Args:
        create: Creates them for a network.
        kwargs: The arguments of the network.
    """

    create: Callable[[Net], Any]
    kwargs: dict[str, bool] = field(default_factory=dict)

    def make(self) -> tuple[Net, Any]:
        """Return a network and its optimizer."""
        net = Net(**self.kwargs)
        return net, self.create(net)


def _of_pytorch(name: str) -> Case:
    kind = getattr(optim, name)
    if name == "SparseAdam":
        return Case(
            lambda net: {
                "sparse": kind(net.embedding.parameters(), lr=0.01),
                "dense": optim.Adam([*net.body.parameters(), *net.head.parameters()], lr=0.01),
            },
            {"is_sparse": True},
        )
    if name == "LBFGS":
        return Case(lambda net: kind(net.parameters(), lr=0.5, max_iter=3, line_search_fn="strong_wolfe"))
    return Case(lambda net: kind(net.parameters(), lr=0.01), {"has_bias": name != "Muon"})


def optimizers_of_pytorch() -> list[str]:
    """Return the names of all optimizers that PyTorch has."""
    return sorted(
        name
        for name, value in vars(optim).items()
        if inspect.isclass(value) and issubclass(value, optim.Optimizer) and value is not optim.Optimizer
    )


def _pair(net: Net, first: Any = optim.SGD) -> dict[str, Any]:
    return {
        "matrices": first(net.matrices(), lr=0.01),
        "others": optim.AdamW(net.others(), lr=0.01),
    }


def _schedule_free() -> dict[str, Case]:
    if importlib.util.find_spec("schedulefree") is None:
        return {}
    import schedulefree

    kinds = ("AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree")
    made = {name: getattr(schedulefree, name) for name in kinds}
    return {f"schedulefree.{name}": Case(partial(_of_parameters, kind)) for name, kind in made.items()}


def _of_parameters(kind: Any, net: Net, **kwargs: Any) -> Any:
    return kind(net.parameters(), lr=0.05, **kwargs)


CASES: dict[str, Case] = {
    **{name: _of_pytorch(name) for name in optimizers_of_pytorch()},
    "SGD with momentum": Case(lambda net: optim.SGD(net.parameters(), lr=0.05, momentum=0.9)),
    "Adam (AMSGrad)": Case(lambda net: optim.Adam(net.parameters(), lr=0.01, amsgrad=True)),
    "LBFGS (no line search)": Case(lambda net: optim.LBFGS(net.parameters(), lr=0.1, max_iter=3)),
    "sharpness-aware": Case(lambda net: SharpnessAware(optim.SGD(net.parameters(), lr=0.1, momentum=0.9))),
    "sharpness-aware, published": Case(
        lambda net: PublishedSharpnessAware(net.parameters(), optim.SGD, lr=0.1, momentum=0.9)
    ),
    "SGD with AdamW": Case(_pair),
    "SGD with AdamW, a list": Case(lambda net: list(_pair(net).values())),
    "LBFGS with AdamW": Case(partial(_pair, first=optim.LBFGS)),
    "stand-in with modes": Case(partial(_of_parameters, Averaging)),
    "modes that are not saved": Case(partial(_of_parameters, Averaging, is_mode_saved=False)),
    "modes with AdamW": Case(partial(_pair, first=Averaging)),
    **({"Muon with AdamW": Case(partial(_pair, first=optim.Muon))} if hasattr(optim, "Muon") else {}),
    **_schedule_free(),
}


# --- by hand -----------------------------------------------------------------------------------------------------


def members_of(optimizer: Any) -> list[Any]:
    """Return the optimizers in what a case creates."""
    if isinstance(optimizer, dict):
        return list(optimizer.values())
    return optimizer if isinstance(optimizer, list) else [optimizer]


def _windows(num_batches: int) -> Iterator[list[int]]:
    for start in range(0, NUM_STEPS_PER_EPOCH, num_batches):
        yield list(range(start, min(start + num_batches, NUM_STEPS_PER_EPOCH)))


def train_by_hand(case: Case, num_batches: int) -> dict[str, torch.Tensor]:
    """Train in a plain loop, and return the weights.

    Args:
        case: The optimizer.
        num_batches: Batches that make one update.
    """
    net, optimizer = case.make()
    members = members_of(optimizer)
    switching = [member for member in members if hasattr(member, "train")]
    torch.manual_seed(11)
    for _ in range(NUM_EPOCHS):
        net.train()
        for member in switching:
            member.train()
        for window in _windows(num_batches):

            def closure(window: list[int] = window) -> torch.Tensor:
                net.zero_grad()
                total = torch.zeros(())
                for index in window:
                    inputs, targets = DATASET[index * BATCH_SIZE : (index + 1) * BATCH_SIZE]
                    loss = mse(net(inputs), targets)
                    loss = loss if len(window) == 1 else loss * (1 / len(window))
                    loss.backward()
                    total = total + loss.detach()
                return total

            _step_by_hand(members, closure)
        for member in switching:
            member.eval()
    return weights_of(net)


def _step_by_hand(members: list[Any], closure: Callable[[], torch.Tensor]) -> None:
    needing = [isinstance(member, (optim.LBFGS, SharpnessAware, PublishedSharpnessAware)) for member in members]
    if not needing[0]:
        with torch.enable_grad():
            closure()
    if isinstance(members[0], PublishedSharpnessAware):  # it starts from gradients that are there
        closure()
    for member, needs_closure in zip(members, needing, strict=True):
        member.step(torch.enable_grad()(closure)) if needs_closure else member.step()


# --- runs --------------------------------------------------------------------------------------------------------


class Stop(TrainerCallback):
    """Kills the run after a number of steps, as a crash would."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def on_train_step_end(self, trainer: Any, **kwargs: Any) -> None:
        self.num_steps -= 1
        if self.num_steps == 0:
            trainer.save_training_state(trainer.folder)
            raise KeyboardInterrupt


class Kept(Trainer):
    """Knows the folder for its state."""

    folder: Path


def run(case: Case, folder: Path, num_batches: int = 1, **kwargs: Any) -> Any:
    """Train, and return the trainer."""
    net, optimizer = case.make()
    callbacks = kwargs.pop("callbacks", ())
    torch.manual_seed(11)
    trainer = Kept(net, mse, optimizer, callbacks=callbacks)
    trainer.folder = folder / "state"
    trainer.left_out_of_states = ["folder"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(KeyboardInterrupt):
        trainer.train(
            DATASET,
            num_epochs=NUM_EPOCHS,
            per_device_batch_size=BATCH_SIZE,
            gradient_accumulation_steps=num_batches,
            train_dataloader_kwargs=IN_ORDER,
            **kwargs,
        )
    return trainer


def outcome_of(trainer: Any) -> dict[str, Any]:
    """Return what must be bit-identical after a resume."""
    history = trainer.run_history
    return {
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": None if trainer.scheduler is None else trainer.scheduler.state_dict(),
        "history": {name: list(history.get_metric_values(name)) for name in sorted(history.get_metric_names())},
    }


def resume(case: Case, folder: Path, num_steps: int, num_batches: int = 1, **kwargs: Any) -> Any:
    """Train, stop after a number of steps, resume with everything new, and return the trainer."""
    run(case, folder, num_batches, callbacks=[Stop(num_steps)], **kwargs)
    return run(case, folder, num_batches, resume_from=folder / "state", **kwargs)


def table() -> Iterator[str]:
    """Yield the lines of the table."""
    from _runs import differences

    widths = "{:28} {:>12} {:>12} {:>10} {:>10} {:>12}"
    yield widths.format("optimizer", "as by hand", "accumulated", "resumed", "at epoch", "in a window")
    for name, case in CASES.items():
        cells = []
        with tempfile.TemporaryDirectory() as directory:
            folder = Path(directory)
            for num_batches in (1, 2):
                trained = run(case, folder, num_batches).model.state_dict()
                by_hand = train_by_hand(case, num_batches)
                error = max((trained[key] - by_hand[key]).abs().max().item() for key in by_hand)
                cells.append("identical" if error == 0 else f"{error:.0e}")
            for num_steps, num_batches in ((3, 1), (5, 1), (8, 2)):
                whole = outcome_of(run(case, folder, num_batches, eval_dataset=DATASET))
                resumed = outcome_of(resume(case, folder, num_steps, num_batches, eval_dataset=DATASET))
                cells.append("different" if differences(whole, resumed) else "identical")
        yield widths.format(name, *cells)


if __name__ == "__main__":
    lines = []
    for line in table():
        print(line, flush=True)
        lines.append(line)
    sys.exit("Not all are identical." if any(line.count("identical") < 5 for line in lines[1:]) else 0)
