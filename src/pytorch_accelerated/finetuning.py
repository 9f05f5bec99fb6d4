"""Freeze and unfreeze a model by layer groups, and train layer groups at different learning rates.

A *layer* is a module without submodules. A *layer group* is a direct child of the model, including everything inside
it; a model without children is a single group. Groups are numbered from 0 in the order in which the model registers
them, usually from input to output. Wrappers such as those of ``torch.compile`` and DDP are looked through.

The parameters of a group are those of its modules. Parameters of the model itself, such as the class token of a vision
transformer, belong to group 0. A parameter shared by several groups counts once, in the last of them: a head tied to
the embedding stays trainable when everything before the head is frozen.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import nn

from pytorch_accelerated._messages import warn
from pytorch_accelerated._models.wrappers import without_wrappers
from pytorch_accelerated._types import ParameterGroup

BN_MODULES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""The classes that count as batch norms, including their subclasses."""


class Layer(NamedTuple):
    """A module without submodules, the indices of its layer group, and whether it is frozen.

    The index of a group is a pair: counted from the start, and from the end as a negative number.
    """

    layer_group_idx: tuple[int, int]
    module: nn.Module
    is_frozen: bool


class LayerGroup(NamedTuple):
    """A direct child of the model, its indices as in `Layer`, and whether it is frozen."""

    layer_group_idx: tuple[int, int]
    module: nn.Module
    is_frozen: bool


class ModelFreezer:
    """Freezes layer groups of a model, and unfreezes them again.

    :mod:`pytorch_accelerated.finetuning` defines layer groups and their parameters. Groups are determined at each call,
    so you may replace the head in between. Creating a freezer makes all parameters trainable that can be, which integer
    parameters, for example, cannot. Modules that `freeze` puts into evaluation mode stay there when ``model.train()``
    is called, as the trainer does in each epoch, until `unfreeze` releases them.

    Batch norms learn in two ways: their scale and shift by gradients, and their running statistics from the data,
    whenever the module is in training mode. In frozen groups they learn

    * both, by default: batch norms are not frozen, so they adapt to the new data;
    * only scale and shift, with ``freeze(set_modules_as_eval=True)``;
    * neither, with ``freeze_batch_norms=True``, which always puts them into evaluation mode.

    Freeze before the model is wrapped for distributed training: ``DistributedDataParallel`` synchronizes only
    parameters that were trainable when it was created. To unfreeze during a run, with one or several processes, use
    :class:`~pytorch_accelerated.callbacks.finetuning.GradualUnfreezingCallback`.

    Args:
        model: The model.
        freeze_batch_norms: Whether `freeze` also freezes batch norms, including their statistics.
        should_keep_frozen: Whether parameters that are frozen already stay so.

    Example:
        >>> from torch import nn, optim
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        >>> freezer = ModelFreezer(model)
        >>> freezer.freeze()
        >>> optimizer = optim.SGD(freezer.get_trainable_parameters(), lr=0.1)
        >>> for idx, param_group in freezer.unfreeze(to_index=1).items():
        ...     optimizer.add_param_group({**param_group, "lr": 0.01})
        >>> [group.is_frozen for group in freezer.get_layer_groups()]
        [True, False, False]
    """

    def __init__(self, model: nn.Module, freeze_batch_norms: bool = False, *, should_keep_frozen: bool = False) -> None:
        self.model = model
        self.freeze_batch_norms = freeze_batch_norms
        if not should_keep_frozen:
            for parameter in model.parameters():
                if _can_be_trained(parameter):
                    parameter.requires_grad = True

    @property
    def freeze_bn(self) -> bool:
        """The name of ``freeze_batch_norms`` in 0.1.61."""
        return self.freeze_batch_norms

    @freeze_bn.setter
    def freeze_bn(self, freeze_bn: bool) -> None:
        self.freeze_batch_norms = freeze_bn

    @property
    def num_groups(self) -> int:
        """The number of layer groups."""
        return len(_group_modules(self.model))

    def get_layer_groups(self) -> list[LayerGroup]:
        """Return all layer groups, in order.

        A group is frozen if any of its parameters is, even if its batch norms are not. One without parameters is not.
        """
        return [LayerGroup(indices, group, _is_frozen(group)) for indices, group in _indexed_groups(self.model)]

    def get_layers(self) -> list[Layer]:
        """Return all layers, in order.

        A layer is frozen if any of its parameters is. One without parameters is frozen if it is in evaluation mode.
        Modules with submodules are not layers, even if they have parameters of their own, as ``nn.MultiheadAttention``
        does. Such parameters are frozen and unfrozen with their group.
        """
        return [
            Layer(indices, module, _is_frozen(module) if list(module.parameters()) else not module.training)
            for indices, group in _indexed_groups(self.model)
            for module in group.modules()
            if not list(module.children())
        ]

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that require gradients, each once. The list can be passed to an optimizer."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def freeze(self, from_index: int = 0, to_index: int = -2, set_modules_as_eval: bool = False) -> None:
        """Freeze a range of layer groups; by default all but the last.

        Frozen parameters require no gradient, and their current gradient is dropped, so that an optimizer that holds
        them does not change them. With the default range, a model with a single group is not changed.

        Args:
            from_index: Index of the first group to freeze; negative indices count from the end.
            to_index: Index of the last group to freeze (inclusive). It may be smaller than ``from_index``.
            set_modules_as_eval: Whether to put all modules of these groups into evaluation mode, and keep them there.

        Raises:
            IndexError: There is no group with one of these indices.
        """
        groups = _group_modules(self.model)
        if to_index == -2 and len(groups) == 1:
            return
        first, last = self._convert_idxs(from_index, to_index)
        batch_norms = {module for module in self.model.modules() if self._module_is_batch_norm(module)}
        spared = set() if self.freeze_batch_norms else {p for norm in batch_norms for p in norm.parameters()}
        parameters_of = group_parameters(self.model)
        for position in range(first, last + 1):
            for parameter in parameters_of[position]:
                if parameter not in spared:
                    parameter.requires_grad = False
                    parameter.grad = None
            for module in groups[position].modules():
                if set_modules_as_eval or (self.freeze_batch_norms and module in batch_norms):
                    _keep_in_eval_mode(module)
        if to_index == -2 and not self.get_trainable_parameters():
            warn(
                f"`freeze()` left nothing to train, because the last of the {len(groups)} layer groups, "
                f"{type(groups[-1]).__name__}, has no parameters. Pass the index of the last group to freeze as "
                "`to_index`.",
            )

    def unfreeze(
        self, from_index: int = -1, to_index: int = 0, set_modules_as_training: bool = True
    ) -> dict[int, ParameterGroup]:
        """Unfreeze a range of layer groups; by default all.

        All parameters that can be trained become trainable, whatever froze them. Integer parameters, for example,
        cannot.

        Args:
            from_index: Index of the first group to unfreeze; negative indices count from the end.
            to_index: Index of the last group to unfreeze (inclusive). It may be smaller than ``from_index``.
            set_modules_as_training: Whether to put the modules of these groups into training mode, and no longer keep
                them in evaluation mode.

        Returns:
            For the index of each group with frozen parameters, in ascending order, a parameter group
            ``{"params": [...]}`` of those that this call has made trainable. Pass it to ``optimizer.add_param_group``.

        Raises:
            IndexError: There is no group with one of these indices.
        """
        groups = _group_modules(self.model)
        first, last = self._convert_idxs(from_index, to_index)
        parameters_of = group_parameters(self.model)
        unfrozen: dict[int, ParameterGroup] = {}
        for position in range(first, last + 1):
            frozen = [parameter for parameter in parameters_of[position] if not parameter.requires_grad]
            for parameter in frozen:
                parameter.requires_grad = True
            if frozen:
                unfrozen[position] = {"params": frozen}
            if set_modules_as_training:
                for module in groups[position].modules():
                    _release(module)
                groups[position].train()
        return unfrozen

    def _convert_idxs(self, from_index: int, to_index: int) -> tuple[int, int]:
        """Return two indices counted from the start, the smaller one first; a seam of 0.1.61."""
        groups = _group_modules(self.model)
        first, last = _position("from_index", from_index, groups), _position("to_index", to_index, groups)
        return min(first, last), max(first, last)

    def _module_is_batch_norm(self, module: nn.Module) -> bool:
        return _module_is_batch_norm(module)


def _module_is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, BN_MODULES)


def group_parameters(model: nn.Module) -> list[list[nn.Parameter]]:
    """Return the parameters of each layer group that can be trained, frozen or not. Each parameter occurs once."""
    groups = _group_modules(model)
    group_of = dict.fromkeys(without_wrappers(model).parameters(recurse=False), 0)
    for idx, group in enumerate(groups):
        group_of.update(dict.fromkeys(group.parameters(), idx))
    parameters_of: list[list[nn.Parameter]] = [[] for _ in groups]
    for parameter, idx in group_of.items():
        if _can_be_trained(parameter):
            parameters_of[idx].append(parameter)
    return parameters_of


def discriminative_parameter_groups(
    model: nn.Module, lr: float, decay_factor: float = 1 / 2.6, should_decay_1d_weights: bool = True
) -> list[ParameterGroup]:
    r"""Return parameter groups for an optimizer, with learning rates that decrease towards the input.

    Layer group :math:`g` of :math:`G`, numbered from 0 among the groups that have parameters, gets the learning rate

    .. math:: \eta_g = \eta \, d^{\,G - 1 - g}

    with :math:`\eta` = ``lr`` and :math:`d` = ``decay_factor``. Source: Howard and Ruder, 2018, "Universal Language
    Model Fine-tuning for Text Classification", arXiv:1801.06146, section 3.2, which proposes :math:`d = 1 / 2.6`.

    Frozen parameters are included: an optimizer skips parameters without a gradient, and a scheduler created now covers
    them when they are unfrozen.

    Args:
        model: The model.
        lr: Learning rate of the last layer group.
        decay_factor: Ratio of the learning rates of neighboring layer groups; with 1 they are all equal.
        should_decay_1d_weights: Whether the optimizer's weight decay also applies to parameters with fewer than two
            dimensions, such as biases and the scales of norms. If not, they get parameter groups with
            ``weight_decay=0``.

    Returns:
        Parameter groups for an optimizer, from input to output.

    Example:
        >>> from torch import nn, optim
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> optimizer = optim.AdamW(discriminative_parameter_groups(model, lr=0.1, decay_factor=0.5))
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.05, 0.1]
    """
    groups = [parameters for parameters in group_parameters(model) if parameters]
    result: list[ParameterGroup] = []
    for idx, parameters in enumerate(groups):
        group_lr = lr * decay_factor ** (len(groups) - 1 - idx)
        decayed = [p for p in parameters if should_decay_1d_weights or p.ndim > 1]
        undecayed = [p for p in parameters if not should_decay_1d_weights and p.ndim <= 1]
        if decayed:
            result.append({"params": decayed, "lr": group_lr})
        if undecayed:
            result.append({"params": undecayed, "lr": group_lr, "weight_decay": 0.0})
    return result


class _StayInEvalMode:
    """Replaces the method `train` of one module, which then stays in evaluation mode. Its children are not affected.

    It is an attribute of the module, so it is part of copies, pickles and wrapped models, unlike a list kept elsewhere,
    and costs nothing in the forward pass, unlike a hook. The reference to the module is weak, because a reference cycle
    would keep the memory of a deleted model until the next garbage collection.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    def __call__(self, mode: bool = True) -> nn.Module:
        module = self._module()
        assert module is not None, "the caller got this object from the module"
        type(module).train(module, mode)
        module.training = False
        return module

    def __getstate__(self) -> tuple[nn.Module | None]:
        return (self._module(),)

    def __setstate__(self, state: tuple[nn.Module]) -> None:
        self._module = weakref.ref(state[0])


def _keep_in_eval_mode(module: nn.Module) -> None:
    vars(module)["train"] = _StayInEvalMode(module)
    module.training = False


def is_kept_in_eval_mode(module: nn.Module) -> bool:
    """Tell whether `ModelFreezer.freeze` keeps a module in evaluation mode."""
    return isinstance(vars(module).get("train"), _StayInEvalMode)


def _release(module: nn.Module) -> None:
    if is_kept_in_eval_mode(module):
        del vars(module)["train"]


def _group_modules(model: nn.Module) -> list[nn.Module]:
    root = without_wrappers(model)
    return list(root.children()) or [root]


def _indexed_groups(model: nn.Module) -> list[tuple[tuple[int, int], nn.Module]]:
    groups = _group_modules(model)
    return [((idx, idx - len(groups)), group) for idx, group in enumerate(groups)]


def _is_frozen(module: nn.Module) -> bool:
    return any(_can_be_trained(parameter) and not parameter.requires_grad for parameter in module.parameters())


def _can_be_trained(parameter: torch.Tensor) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()


def _position(name: str, index: int, groups: list[nn.Module]) -> int:
    count = len(groups)
    if -count <= index < count:
        return index % count
    known = ", ".join(f"{idx} {type(group).__name__}" for idx, group in enumerate(groups))
    raise IndexError(
        f"`{name}` is {index!r}, but the model has {count} layer groups ({known}), with indices from {-count} to "
        f"{count - 1}. `ModelFreezer(model).get_layer_groups()` lists them."
    )
