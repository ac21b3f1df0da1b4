"""What all optimizers of the package share: ``torch.optim.Optimizer`` around one operator call a step.

An optimizer is a list of parameters, the :class:`~manifold_kernels.plan.Plan` that says which matrices of theirs lie
where (``planned.py``), a table of hyper-parameters with one row a group, and the states. They are put together when
something changes; a step collects the gradients and calls the operator (``stepping.py``).
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from manifold_kernels.optim import checkpoint, operands, settings
from manifold_kernels.optim.groups import joined, structure_of
from manifold_kernels.optim.stepping import Stepping
from manifold_kernels.plan import Plan


class ManifoldOptimizer(Stepping):
    """Base class of the optimizers. Use :class:`FGSGD`, :class:`PSISGD`, :class:`SGDG` or :class:`AdamG`.

    Every param group may have these settings besides the rule's own:

    * ``manifold``: a :class:`~manifold_kernels.manifolds.Manifold`, its name, or ``None`` (Euclidean: the step of
      ``torch.optim.SGD``).
    * ``view``: how a weight becomes matrices, ``"kernel"``, ``"filter"``, ``"matrix"``, or ``None`` for the default of
      the manifold and the layer (:func:`~manifold_kernels.fit.default_view`).
    * ``retraction``: its name, or ``None`` for the manifold's default.
    * ``transposed``, ``channel_groups``: True and ``groups`` for weights of transposed convolutions.
    * ``rows``: output neurons in one component of the ``"filter"`` view.

    Defaults of the optimizer that make no sense for a group (``weight_decay`` on a manifold of fixed norm, ``view`` for
    Euclidean parameters) are taken back there; given for that very group they raise. A learning rate, a momentum or any
    other number may be a tensor of one element, which may change in place; on a GPU nobody waits for it. Changes of
    numbers in ``param_groups`` take effect at the next step, as in torch; the manifold, the view and the other settings
    in :data:`~manifold_kernels.optim.settings.STRUCTURE` are fixed.

    ``state[p]`` has ``step``, the steps that the parameter's momentum is made of (all of its steps, where momentum is
    not switched on later), and the buffers, allocated when they are first needed; with ``master_weights`` the
    ``master`` of a 16-bit parameter, which lies on the manifold to float32 precision and is what steps. The parameter
    is its rounding: to change such a weight by hand, change its master. Buffers may be replaced by others of their
    shape, as offloading does; parameters may by :meth:`rebind` alone.

    A ``torch.amp.GradScaler`` leaves its scale to the step and skips a step of infinite gradients without waiting.

    Errors: ``ValueError`` or ``TypeError`` before anything is written, for what does not fit: a setting, a parameter's
    dtype (wanted float32, float64, bfloat16 or float16), parameters on more than one device, a view that does not fit a
    shape or would freeze the weight, a weight off its manifold, a sparse gradient.

    Attributes:
        plan: the plan of the step. Its ``scales`` may be written to; weights have to be moved along.
    """

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        master_weights: bool,
        nonfinite: str,
        cut_matrices: str,
        backend: str,
    ) -> None:
        if not isinstance(master_weights, bool):
            raise TypeError(f"master_weights: wanted True or False, got {master_weights!r}.")
        if nonfinite not in ("skip", "raise"):
            raise ValueError(f"nonfinite: wanted 'skip' or 'raise', got {nonfinite!r}.")
        if cut_matrices not in ("raise", "gather"):
            raise ValueError(f"cut_matrices: wanted 'raise' or 'gather', got {cut_matrices!r}.")
        self._raise_nonfinite = nonfinite == "raise"
        self._gather = cut_matrices == "gather"
        self._backend = backend
        self._master_weights = master_weights
        self.plan = Plan.build([], [])
        self._nonfinite = torch.zeros(0, dtype=torch.int64, device="cpu")
        self._structure: list[tuple[Any, ...]] = []
        self._members: list[list[Tensor]] = []  # the parameters that the plan is of, by param group
        self._names = [name for name in defaults if name in settings.KNOWN]
        self._forget()
        super().__init__(params, defaults)
        self._resolve()

    def nonfinite_count(self) -> int:
        """How many component updates were left out so far since their gradient or new momentum was not finite.

        A component (a kernel, a filter, a matrix) counts once for every step that left it as it was. Euclidean
        parameters are not counted: they take NaN and Inf as in torch.
        """
        return int(self._nonfinite.sum())

    def state_dict(self) -> dict[str, Any]:
        """The state as numbers, strings, lists and tensors; ``torch.load(weights_only=True)`` reads it back.

        Besides torch's ``state`` and ``param_groups`` it has ``version``, ``plan`` (which matrices lie where, with
        their scales) and ``nonfinite``. Tensors are the optimizer's own, as in torch: clone them to keep a snapshot.
        """
        if self.state:  # a buffer that a changed setting asks for belongs to the state
            self._init_group(to_step=False)
        saved = super().state_dict()
        saved["param_groups"] = [settings.pack(group) for group in saved["param_groups"]]
        return {**saved, **checkpoint.extras(self.plan, self._nonfinite)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state from :meth:`state_dict`, so that training goes on with the same bits.

        Load the model first: its weights are checked against the manifolds and scales that were saved. Settings and
        scales come from ``state_dict``. Tensors are copied. A dict with torch's own two entries alone, as
        ``torch.distributed.checkpoint`` makes it, is taken with the plan of the param groups; scales that were moved
        are not in it.

        Raises:
            ValueError: naming the first thing that does not fit this optimizer, which stays as it was: a missing entry,
                another number of groups or parameters, another rule, manifold or view, a state of another shape, dtype
                or strides, a plan out of range, a weight off its manifold.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(f"state_dict: wanted a dict, got {type(state_dict).__name__}.")
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        try:
            self._take_over(state_dict)
        except (ValueError, TypeError):
            raise
        except Exception as error:  # what stands there may be anything
            raise ValueError(
                f"state_dict: wanted one of {type(self).__name__}, got something else: {error!r}."
            ) from error
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _take_over(self, state_dict: dict[str, Any]) -> None:
        """Check everything in ``state_dict``, then replace groups, plan and states by it."""
        whole = checkpoint.check_entries(state_dict)
        before = self.param_groups, self._structure
        groups = checkpoint.load_groups(state_dict["param_groups"], self.param_groups, self._names)
        try:
            self.param_groups = groups
            self._structure = [structure_of(group) for group in groups]
            for index, group in enumerate(groups):
                self._check_group(index, group)
                self._check_manifold(group)
            expected = Plan.build([], [])
            first = 0
            for index, group in enumerate(groups):
                expected = joined(expected, self._plan_of(index, first))
                first += len(group["params"])
            parameters = self._all_parameters()
            plan, nonfinite = expected, torch.zeros(len(parameters), dtype=torch.int64, device="cpu")
            if whole:
                plan, nonfinite = checkpoint.load_plan(state_dict, expected, self._described())
            state = checkpoint.load_state(
                state_dict, groups, plan, self._buffers, self._where, self._master_weights, self._gathered().keys()
            )
            self._check_weights(plan, weights=[state.get(p, {}).get("master", p) for p in parameters])
        except BaseException:
            self.param_groups, self._structure = before
            raise
        self.plan, self._nonfinite = plan, nonfinite.to(self._device())
        self._members = [list(group["params"]) for group in groups]
        self.state = defaultdict(dict, state)
        self._forget()

    def rebind(self, model: nn.Module) -> None:
        """Step the parameters of ``model`` in place of those of the same names, keeping settings and states.

        For models whose parameters were replaced, by ``load_state_dict(assign=True)`` for example; others may have put
        new ones into the param groups already. Masters are made anew from the weights at the next step.

        Raises:
            ValueError: parameters without a name (``param_groups`` and ``named_parameters`` give one), a name that the
                model does not have, a weight that does not fit its state or is off its manifold. The optimizer stays as
                it was.

        >>> from manifold_kernels import FGSGD, param_groups
        >>> model = nn.Sequential(nn.Conv2d(2, 4, 3))
        >>> optimizer = FGSGD(param_groups(model, "stiefel"), lr=0.1)
        >>> _ = model.load_state_dict({name: w.clone() for name, w in model.state_dict().items()}, assign=True)
        >>> optimizer.rebind(model)
        >>> optimizer.param_groups[0]["params"][0] is model[0].weight
        True
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: wanted a torch.nn.Module, got {type(model).__name__}.")
        self._check_members(same=False)
        found = dict(model.named_parameters(remove_duplicate=False))
        for position, name in enumerate(self.parameter_names()):
            if name not in found:
                raise ValueError(f"{self._where(position)}: wanted its namesake in the model, got none.")
        before = [(group, group["params"]) for group in self.param_groups]
        try:
            for group, members in zip(self.param_groups, self._members, strict=True):
                group["params"] = members  # states belong to these, whatever stands there by now
            saved = self.state_dict()
            if any(operands.is_sharded(found[name]) for name in self.parameter_names()):
                saved = {entry: saved[entry] for entry in ("state", "param_groups")}  # the plan is of other components
            names = iter(self.parameter_names())
            for group, params in before:
                group["params"] = [found[name] for _, name in zip(params, names, strict=False)]
            saved["state"] = {
                key: {name: value for name, value in state.items() if name != "master"}
                for key, state in saved["state"].items()
            }
            self.load_state_dict(saved)
        except BaseException:
            for group, params in before:
                group["params"] = params
            raise

    def __getstate__(self) -> dict[str, Any]:
        kept = (
            "plan",
            "_names",
            "_nonfinite",
            "_structure",
            "_members",
            "_raise_nonfinite",
            "_gather",
            "_backend",
            "_master_weights",
        )
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
