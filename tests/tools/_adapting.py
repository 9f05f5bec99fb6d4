"""Models that adapt the state of another one when they load it: they rename, resize, ignore or create parameters."""

from __future__ import annotations

import torch
from torch import nn


class Former(nn.Module):
    """What was saved."""

    def __init__(self, num_features=3):
        super().__init__()
        self.old = nn.Linear(num_features, 1)

    def forward(self, x):
        return self.old(x)


class Renaming(nn.Module):
    """Its parameters had another name, which a hook knows."""

    def __init__(self):
        super().__init__()
        self.new = nn.Linear(3, 1)
        self._register_load_state_dict_pre_hook(self.rename)

    def rename(self, state_dict, prefix, *args):
        for key in [key for key in state_dict if key.startswith(f"{prefix}old.")]:
            state_dict[f"{prefix}new." + key[len(prefix) + 4 :]] = state_dict.pop(key)

    def forward(self, x):
        return self.new(x)


class Resizing(nn.Module):
    """Takes the size of what it loads, in place or as a new parameter."""

    def __init__(self, is_in_place=True):
        super().__init__()
        self.old = nn.Linear(5, 1)
        self.is_in_place = is_in_place

    def _load_from_state_dict(self, state_dict, prefix, *args):
        weight = torch.empty_like(state_dict[f"{prefix}old.weight"])
        if self.is_in_place:
            self.old.weight.data = weight
        else:
            self.old.weight = nn.Parameter(weight)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x):
        return self.old(x)


class Lenient(nn.Module):
    """Takes what it finds."""

    def __init__(self):
        super().__init__()
        self.old, self.more = nn.Linear(3, 1), nn.Linear(1, 1)

    def load_state_dict(self, state_dict, strict=True, **kwargs):
        return super().load_state_dict(state_dict, strict=False, **kwargs)

    def forward(self, x):
        return self.more(self.old(x))


class Lazy(nn.Module):
    """Has no shapes yet."""

    def __init__(self):
        super().__init__()
        self.old = nn.LazyLinear(1)

    def forward(self, x):
        return self.old(x)


ADAPTING = {
    "renaming": Renaming,
    "resizing": Resizing,
    "replacing": lambda: Resizing(is_in_place=False),
    "lenient": Lenient,
    "lazy": Lazy,
}
