"""Where parameters live in their models, so that one that was replaced there is noticed.

``load_state_dict(assign=True)``, ``fully_shard`` and some conversions put new parameters into modules. An optimizer
made before holds the old ones, which get no gradient any more: it would step nothing, in silence.
"""

from __future__ import annotations

import weakref

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

_HOMES: WeakIdKeyDictionary = WeakIdKeyDictionary()


def remember(parameter: Tensor, module: nn.Module, name: str) -> None:
    """``parameter`` is ``module``'s own, by ``name``."""
    _HOMES[parameter] = weakref.ref(module), name


def home(parameter: Tensor) -> tuple[dict[str, nn.Parameter | None], str] | None:
    """The parameters of the module that ``parameter`` was put into, and its name there; None where that is not known or
    the module is gone."""
    if parameter not in _HOMES:
        return None
    module, name = _HOMES[parameter]
    found = module()
    return None if found is None else (found._parameters, name)


def is_replaced(parameter: Tensor) -> bool:
    """Whether another parameter has taken the place of ``parameter``; False where its module is not known or gone.

    >>> layer = nn.Linear(2, 3)
    >>> weight = layer.weight
    >>> remember(weight, layer, "weight")
    >>> is_replaced(weight)
    False
    >>> layer.weight = nn.Parameter(weight.detach().clone())
    >>> is_replaced(weight)
    True
    """
    found = home(parameter)
    if found is None:
        return False
    parameters, name = found
    # A parametrization moves its parameter to a module of its own and leaves nothing behind.
    now = parameters.get(name)
    return now is not None and now is not parameter
