"""What a run is made of, as numbers and texts that two processes have in common."""

from __future__ import annotations

import torch

from _support import Probe, make_dataset, make_trainer, train
from pytorch_accelerated import Trainer
from pytorch_accelerated._recording.run_info import flattened, run_info_of


def info_of(trainer):
    return run_info_of(trainer.run_config, trainer.get_model(), trainer.optimizer, trainer.scheduler)


class Unnamed:
    pass


def test_texts_have_no_addresses_in_memory():
    found = flattened({"function": make_trainer, "object": [Unnamed()], "nothing": None, "flag": True})
    assert found["function"] == "<function make_trainer>"
    assert found["object"] == f"[<{__name__}.Unnamed object>]"
    assert (found["nothing"], found["flag"]) == ("None", True)


def test_classes_are_those_of_the_program():
    infos = []
    look = Probe(on_train_epoch_start=lambda trainer, **_: infos.append(info_of(trainer)))
    train(make_trainer(callbacks=[look]), make_dataset(8), gradient_clip_norm=0.5)
    settings = infos[0]["settings"]
    assert (settings["model"], settings["optimizer"]) == ("Linear", "SGD")
    assert settings["gradient_clip_norm"] == 0.5
    assert infos[0]["versions"]["torch"] == torch.__version__


def test_several_optimizers_are_described():
    model = torch.nn.Linear(3, 1)
    optimizers = [torch.optim.SGD([model.weight], lr=0.1), torch.optim.Adam([model.bias], lr=0.2)]
    infos = []
    look = Probe(on_train_epoch_start=lambda trainer, **_: infos.append(info_of(trainer)))
    train(Trainer(model, torch.nn.MSELoss(), optimizers, callbacks=[look]), make_dataset(8))
    groups = {name: value for name, value in infos[0]["settings"].items() if name.endswith("/lr")}
    assert groups == {"optimizer_groups/0/lr": 0.1, "optimizer_groups/1/lr": 0.2}
