"""Freeze and unfreeze a model by layer groups, and train its groups at different learning rates.

A *layer* is a module without submodules. A *layer group* is a direct child of the model with everything
inside it; a model without children is one group. Groups are numbered from 0 in the order in which the model
registers them, usually from input to output. Wrappers, as of ``torch.compile`` or DDP, are looked through.

The parameters of a group are those of its modules. Parameters that hang on the model itself, such as the
class token of a vision transformer, belong to group 0. A parameter that several groups share counts once, in
the last of them: a head tied to the embedding stays trainable when everything before the head is frozen.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any, NamedTuple

from torch import nn

BN_MODULES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""What counts as a batch norm: these classes and their subclasses."""


class Layer(NamedTuple):
    """A module without submodules, the index of its group, and whether it has no trainable parameter."""

    layer_group_idx: int
    module: nn.Module
    is_frozen: bool


class LayerGroup(NamedTuple):
    """A direct child of the model, its index, and whether it has no trainable parameter."""

    layer_group_idx: int
    module: nn.Module
    is_frozen: bool


class ModelFreezer:
    """Freezes layer groups of a model, and unfreezes them again.

    What a group is, and which parameters belong to it, is said at the top of this module. Groups are looked
    up at each call, so a head may be replaced in between. Making a freezer changes nothing in the model.
    Modules that `freeze` puts into evaluation mode stay there through later calls of ``model.train()``, as
    the trainer makes them in each epoch, until `unfreeze` releases them.

    Batch norms learn in two ways: by gradients (scale and shift), and by running statistics, which follow the
    data whenever the module is in training mode. In frozen groups they do

    * both, by default: they are left out of the freezing, so that they adapt to the new data;
    * only the first, with ``freeze(set_modules_as_eval=True)``;
    * neither, with ``freeze_batch_norms=True``: they are put into evaluation mode in any case.

    Freeze before a model is wrapped for distributed training: ``DistributedDataParallel`` synchronises only
    what was trainable when it was made. To unfreeze during a run, on one or many processes, use
    :class:`~pytorch_accelerated.callbacks.finetuning.GradualUnfreezingCallback`.

    Args:
        model: The model.
        freeze_batch_norms: Whether `freeze` freezes batch norms too, statistics included.

    Example:
        >>> from torch import nn, optim
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        >>> freezer = ModelFreezer(model)
        >>> freezer.freeze()
        >>> optimizer = optim.SGD(freezer.get_trainable_parameters(), lr=0.1)
        >>> for param_group in freezer.unfreeze(to_index=1):
        ...     optimizer.add_param_group({**param_group, "lr": 0.01})
        >>> [group.is_frozen for group in freezer.get_layer_groups()]
        [True, False, False]
    """

    def __init__(self, model: nn.Module, freeze_batch_norms: bool = False) -> None:
        self.model = model
        self.freeze_batch_norms = freeze_batch_norms

    def get_layer_groups(self) -> list[LayerGroup]:
        """Return all layer groups, in order; one without parameters counts as frozen."""
        groups = _group_modules(self.model)
        return [LayerGroup(idx, group, _is_frozen(group)) for idx, group in enumerate(groups)]

    def get_layers(self) -> list[Layer]:
        """Return all layers, in order; one without parameters counts as frozen.

        Modules with submodules are no layers, even if they have parameters of their own, as
        ``nn.MultiheadAttention`` does; those are frozen and unfrozen with their group.
        """
        return [
            Layer(idx, module, _is_frozen(module))
            for idx, group in enumerate(_group_modules(self.model))
            for module in group.modules()
            if not list(module.children())
        ]

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that require a gradient, each once, ready for an optimizer."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def freeze(self, from_index: int = 0, to_index: int = -2, set_modules_as_eval: bool = False) -> None:
        """Freeze a range of layer groups; by default all but the last.

        Frozen parameters need no gradient and lose the one they may still hold, so that an optimizer which
        knows them leaves them alone. With the default range a model of one group stays as it is.

        Args:
            from_index: Index of the first group; negative ones count from the end.
            to_index: Index of the last group, which is frozen too. The two may come in either order.
            set_modules_as_eval: Whether all their modules are put into evaluation mode, and kept there.

        Raises:
            IndexError: There is no group of such an index.
        """
        groups = _group_modules(self.model)
        if to_index == -2 and len(groups) == 1:
            return
        positions = _positions(from_index, to_index, groups)
        batch_norms = {module for module in self.model.modules() if self._module_is_batch_norm(module)}
        spared = set() if self.freeze_batch_norms else {p for norm in batch_norms for p in norm.parameters()}
        parameters_of = group_parameters(self.model)
        for position in positions:
            for parameter in parameters_of[position]:
                if parameter not in spared:
                    parameter.requires_grad = False
                    parameter.grad = None
            for module in groups[position].modules():
                if set_modules_as_eval or (self.freeze_batch_norms and module in batch_norms):
                    _keep_in_eval_mode(module)
        if to_index == -2 and not self.get_trainable_parameters():
            warnings.warn(
                f"`freeze()` left nothing to train, because the last of the {len(groups)} layer groups, "
                f"{type(groups[-1]).__name__}, has no parameters. Name the last one to freeze as `to_index`.",
                stacklevel=2,
            )

    def unfreeze(
        self, from_index: int = -1, to_index: int = 0, set_modules_as_training: bool = True
    ) -> list[dict[str, Any]]:
        """Make a range of layer groups trainable; by default all.

        Their parameters become trainable whoever froze them, except those that cannot, such as integer ones.

        Args:
            from_index: Index of the first group; negative ones count from the end.
            to_index: Index of the last group, which is unfrozen too. The two may come in either order.
            set_modules_as_training: Whether their modules are put into training mode, and no longer kept in
                evaluation mode.

        Returns:
            For each group that had something frozen, from ``from_index`` to ``to_index``, a parameter group
            ``{"params": [...]}`` with what has become trainable just now, for ``optimizer.add_param_group``.

        Raises:
            IndexError: There is no group of such an index.
        """
        groups = _group_modules(self.model)
        parameters_of = group_parameters(self.model)
        unfrozen = []
        for position in _positions(from_index, to_index, groups):
            frozen = [parameter for parameter in parameters_of[position] if not parameter.requires_grad]
            for parameter in frozen:
                parameter.requires_grad = True
            if frozen:
                unfrozen.append({"params": frozen})
            if set_modules_as_training:
                for module in groups[position].modules():
                    _release(module)
                groups[position].train()
        return unfrozen

    def _module_is_batch_norm(self, module: nn.Module) -> bool:
        return isinstance(module, BN_MODULES)


def group_parameters(model: nn.Module) -> list[list[nn.Parameter]]:
    """Return for each layer group the parameters that can be trained, frozen or not, each once."""
    groups = _group_modules(model)
    group_of = dict.fromkeys(_unwrap(model).parameters(recurse=False), 0)
    for idx, group in enumerate(groups):
        group_of.update(dict.fromkeys(group.parameters(), idx))
    parameters_of: list[list[nn.Parameter]] = [[] for _ in groups]
    for parameter, idx in group_of.items():
        if parameter.is_floating_point() or parameter.is_complex():
            parameters_of[idx].append(parameter)
    return parameters_of


def discriminative_parameter_groups(
    model: nn.Module, lr: float, decay_factor: float = 1 / 2.6, should_decay_1d_weights: bool = True
) -> list[dict[str, Any]]:
    r"""Return the parameters of a model, with lower learning rates towards the input.

    Group :math:`g` of :math:`G`, numbered from 0 among the groups that have parameters, gets

    .. math:: \eta_g = \eta \, d^{\,G - 1 - g}

    with :math:`\eta` = ``lr`` and :math:`d` = ``decay_factor``. Source: Howard and Ruder, 2018, "Universal
    Language Model Fine-tuning for Text Classification", arXiv:1801.06146, section 3.2, which proposes
    :math:`d = 1 / 2.6`.

    Frozen parameters are included: an optimizer passes over what has no gradient, and a scheduler made now
    will cover them when they are unfrozen.

    Args:
        model: The model.
        lr: Learning rate of the last group.
        decay_factor: Ratio of the learning rates of neighbouring groups; 1 gives all the same.
        should_decay_1d_weights: Whether the optimizer's weight decay applies to parameters with fewer than
            two dimensions (biases, scales of norms) too; if not, they get groups with ``weight_decay=0``.

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
    result: list[dict[str, Any]] = []
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
    """Replaces `train` of one module: it stays in evaluation mode, its children decide for themselves.

    As an attribute of the module it follows it into copies, pickles and wrappers, which a list kept elsewhere
    would not, and costs nothing in the forward pass, which a hook would. The reference to the module is weak,
    because a cycle would hold the memory of a deleted model until the next garbage collection.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    def __call__(self, mode: bool = True) -> nn.Module:
        module = self._module()
        assert module is not None, "whoever calls this got it from the module"
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


def _release(module: nn.Module) -> None:
    if isinstance(vars(module).get("train"), _StayInEvalMode):
        del vars(module)["train"]


def _unwrap(model: nn.Module) -> nn.Module:
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return _unwrap(model.module)
    compiled = model._modules.get("_orig_mod")
    return model if compiled is None else _unwrap(compiled)


def _group_modules(model: nn.Module) -> list[nn.Module]:
    root = _unwrap(model)
    return list(root.children()) or [root]


def _is_frozen(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in module.parameters())


def _positions(from_index: int, to_index: int, groups: list[nn.Module]) -> range:
    first = _position("from_index", from_index, groups)
    last = _position("to_index", to_index, groups)
    return range(first, last + 1) if first <= last else range(first, last - 1, -1)


def _position(name: str, index: int, groups: list[nn.Module]) -> int:
    count = len(groups)
    if -count <= index < count:
        return index % count
    known = ", ".join(f"{idx} {type(group).__name__}" for idx, group in enumerate(groups))
    raise IndexError(
        f"`{name}={index!r}` names no layer group: the model has {count} ({known}), so that indices go from "
        f"{-count} to {count - 1}. `ModelFreezer(model).get_layer_groups()` lists them."
    )
