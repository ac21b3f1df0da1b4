"""What all optimizers of the package share: ``torch.optim.Optimizer`` around one operator call a step.

An optimizer is a list of parameters, the :class:`~manifold_kernels.plan.Plan` that says which matrices of theirs lie
where, a table of hyper-parameters with one row a group, and the states. They are put together when something changes;
a step collects the gradients and calls the operator.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from operator import itemgetter
from typing import Any, ClassVar, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from manifold_kernels import fit, ops, views
from manifold_kernels.binding import is_replaced
from manifold_kernels.collection import Collection, retraction_codes
from manifold_kernels.manifolds import Euclidean, Manifold, manifold
from manifold_kernels.optim import checkpoint, constraint, operands, settings, sharding
from manifold_kernels.optim.groups import check_parameter, joined, layout_of, refuse_shared, structure_of
from manifold_kernels.optim.operands import Operands
from manifold_kernels.optim.settings import ParamGroup, on_manifold
from manifold_kernels.optim.sharding import SharedNorms
from manifold_kernels.plan import Group, Plan
from manifold_kernels.views import Layout


class ManifoldOptimizer(torch.optim.Optimizer):
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
    is its rounding: to change such a weight by hand, change its master.

    A ``torch.amp.GradScaler`` leaves its scale to the step and skips a step of infinite gradients without waiting.

    Errors: ``ValueError`` or ``TypeError`` before anything is written, for what does not fit: a setting, a parameter's
    dtype (wanted float32, float64, bfloat16 or float16), parameters on more than one device, a view that does not fit a
    shape or would freeze the weight, a weight off its manifold, a sparse gradient.

    Attributes:
        plan: the plan of the step. Its ``scales`` may be written to; weights have to be moved along.
    """

    #: The update rule, a name in ``plan.RULES``.
    rule: ClassVar[str]
    #: Manifolds that the rule is defined on, besides the Euclidean space.
    accepts: ClassVar[tuple[type[Manifold | Collection], ...]]
    #: Settings without effect on a manifold, and those without effect in the Euclidean space, with neutral values. The
    #: latter are the defaults too.
    euclidean_only: ClassVar[Mapping[str, object]] = {}
    manifold_only: ClassVar[Mapping[str, object]] = {
        "view": None,
        "retraction": None,
        "transposed": False,
        "channel_groups": 1,
        "rows": 1,
    }
    #: Whether a learning rate of 0 leaves weights as they are, to the bit.
    rests: ClassVar[bool] = False
    #: Gradient scalers leave ``grad_scale`` and ``found_inf`` to the step, as with torch's fused optimizers.
    _step_supports_amp_scaling = True
    #: The views offered; the default is that of rules for vectors.
    offered_views: ClassVar[tuple[str, ...]] = ("filter",)

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], *, master_weights: bool, nonfinite: str, backend: str
    ) -> None:
        if not isinstance(master_weights, bool):
            raise TypeError(f"master_weights: wanted True or False, got {master_weights!r}.")
        if nonfinite not in ("skip", "raise"):
            raise ValueError(f"nonfinite: wanted 'skip' or 'raise', got {nonfinite!r}.")
        self._raise_nonfinite = nonfinite == "raise"
        self._backend = backend
        self._master_weights = master_weights
        self.plan = Plan.build([], [])
        self._nonfinite = torch.zeros(0, dtype=torch.int64)
        self._structure: list[tuple[Any, ...]] = []
        self._names = [name for name in defaults if name in settings.KNOWN]
        self._forget()
        super().__init__(params, defaults)
        self._resolve()

    # -- the step -----------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of all parameters that have a gradient. Returns what ``closure``, if given, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        # Everything is looked at before anything is written; buffers are allocated by _init_group.
        self._look_at(grads, found_inf)
        self._init_group()
        hyper, live = self._tables()
        stepped, operator = self._operands, self._operator
        if torch.compiler.is_compiling():
            operator = self._in_graphs
        weights, grads = stepped.weights(self._frozen), stepped.gradients(grads)
        lists = weights, grads, self._momenta, self._variances, self._steps, self._nonfinite
        plan, r = self.plan, None
        with torch.no_grad():
            if self._shared_norms:
                plan = self._shared_norms.plan
                hyper, live, r = self._shared_norms.tables(operator, *lists, hyper, live, (grad_scale, found_inf))
            operator(
                *lists,
                plan.groups,
                plan.components,
                plan.scales,
                hyper,
                self._norms,
                grad_scale,
                found_inf,
                live,
            )
            stepped.store(grads, found_inf)
            if r is not None and self._norms is not None:
                self._shared_norms.write(self._norms, r)
        return loss

    def _look_at(self, grads: list[Tensor | None], found_inf: Tensor | None) -> None:
        """Raise ``ValueError`` for a gradient that a step must not see."""
        idle = False
        for grad in grads:
            idle = idle or grad is None
            if grad is not None and grad.layout is not torch.strided:
                self._refuse_layout(grads)
        if idle and not torch.compiler.is_compiling():
            self._refuse_replaced(grads)
        # A gradient scaler that has found infinities skips the step by itself.
        if self._raise_nonfinite and not (found_inf is not None and bool(found_inf)):
            self._refuse_nonfinite(grads)

    def _refuse_layout(self, grads: list[Tensor | None]) -> None:
        for position, grad in enumerate(grads):
            if grad is not None and grad.layout is not torch.strided:
                raise ValueError(
                    f"gradient of {self._where(position)}: wanted a dense (strided) one, got {grad.layout}. "
                    "Sparse gradients, as of Embedding(sparse=True), need an optimizer of their own."
                )

    def _refuse_replaced(self, grads: list[Tensor | None]) -> None:
        parameters = self._all_parameters()
        for position, grad in enumerate(grads):
            if grad is None and is_replaced(parameters[position]):
                raise ValueError(
                    f"{self._where(position)}: was replaced in its model, by load_state_dict(assign=True) or "
                    "fully_shard for example, and gets no gradient any more. Call optimizer.rebind(model) to step the "
                    "model's own, or make the optimizer afterwards. Nothing was written."
                )

    def _refuse_nonfinite(self, grads: list[Tensor | None]) -> None:
        for position, grad in enumerate(grads):
            if grad is not None and not bool(torch.isfinite(grad).all()):
                raise ValueError(
                    f"gradient of {self._where(position)}: wanted finite numbers, got NaN or Inf. Nothing was written. "
                    "nonfinite='skip' leaves the components concerned as they are and counts them."
                )

    def nonfinite_count(self) -> int:
        """How many component updates were left out so far since their gradient or new momentum was not finite.

        A component (a kernel, a filter, a matrix) counts once for every step that left it as it was. Euclidean
        parameters are not counted: they take NaN and Inf as in torch.
        """
        return int(self._nonfinite.sum())

    def parameter_names(self) -> list[str]:
        """The name of every parameter, or its position in words where none was given."""
        names: list[str] = []
        for index, group in enumerate(self.param_groups):
            known = group.get("param_names") or group.get("names")  # torch's key, or that of param_groups
            names += known or [f"param group {index}, parameter {at}" for at in range(len(group["params"]))]
        return names

    # -- weights on their manifolds -----------------------------------------------------------------------------------

    def violation(self) -> float:
        """The largest violation of a constraint by any component of any weight, relative to its scale (0: none).

        The measure is that of :func:`manifold_kernels.functional.weight_violation`, taken in float64.
        """
        weights = [operands.local(parameter) for parameter in self._all_parameters()]
        found = [each.violation for each in constraint.violations(self.plan, weights)]
        return float(torch.tensor([0.0, *found], dtype=torch.float64).max())  # unlike Python's, NaN if any is

    def check(self) -> None:
        """Raise ``ValueError`` for the first weight that is off its manifold by more than rounding explains.

        The tolerance counts roundings of the storage type (:func:`~manifold_kernels.optim.constraint.tolerance`). The
        same check runs at construction, in :meth:`add_param_group` and in :meth:`load_state_dict`, not at every step.
        """
        self._check_weights(self.plan)

    def _check_weights(self, plan: Plan, first: int = 0, weights: Sequence[Tensor] | None = None) -> None:
        weights = [operands.local(weight) for weight in weights or self._all_parameters()]
        for found in constraint.violations(plan, weights, first):
            if not found.violation <= found.tolerance:
                raise ValueError(
                    f"{self._where(found.parameter)}: is off its manifold. Wanted {found.manifold} up to "
                    f"{found.tolerance:.2g}, got a violation of {found.violation:.2g}. Project the weight with "
                    "manifold_kernels.functional.project_weight_(manifold, weight, layout), or let "
                    "manifold_kernels.param_groups make the groups, which projects by itself."
                )

    # -- groups and the plan ------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as in torch. A group that does not fit raises and leaves the optimizer as it was."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group: wanted a dict, got {type(param_group).__name__}.")
        group = dict(param_group)
        given = frozenset(group)
        if isinstance(group["params"], Tensor):
            group["params"] = [group["params"]]
        elif not isinstance(group["params"], set):  # torch refuses sets: they have no order
            group["params"] = list(group["params"])
            refuse_shared(group["params"], self.param_groups)
        super().add_param_group(group)
        try:
            self._admit(group, given)
        except BaseException:
            self.param_groups.pop()
            raise

    def _admit(self, group: ParamGroup, given: frozenset[str]) -> None:
        """Check the group just added and extend the plan by it."""
        index = len(self.param_groups) - 1
        try:
            if not isinstance(group["manifold"], Collection):
                group["manifold"] = manifold(group["manifold"])
            self._settle(group, given)
            settings.check(group)
            self._check_manifold(group)
        except (ValueError, TypeError) as error:
            raise type(error)(f"param group {index}: {error}") from None
        first = len(self._all_parameters()) - len(group["params"])
        plan = joined(self.plan, self._plan_of(index, first))
        self._check_weights(plan, first)
        self.plan = plan
        counts = torch.zeros(len(group["params"]), dtype=torch.int64, device=self._device())
        self._nonfinite = torch.cat([self._nonfinite.to(counts.device), counts])
        self._structure.append(structure_of(group))
        self._forget()

    def _settle(self, group: ParamGroup, given: Set[str]) -> None:
        """Neutral values for what has no effect in ``group``; raises where such a thing was ``given``."""
        settings.settle(group, given, self._neutral(group))

    def _neutral(self, group: ParamGroup) -> dict[str, object]:
        """The settings without effect in ``group``, with their neutral values."""
        return dict(self.euclidean_only if on_manifold(group) else self.manifold_only)

    def _check_manifold(self, group: ParamGroup) -> None:
        of: Manifold | Collection = group["manifold"]
        if not isinstance(of, (Euclidean, *self.accepts)):
            names = [accepted.name for accepted in self.accepts]
            raise ValueError(f"manifold: {type(self).__name__} wants one of {names} or None, got {str(of)!r}.")
        retraction_codes(of, group["retraction"])
        if group["view"] is not None and group["view"] not in self.offered_views:
            raise ValueError(
                f"view: {type(self).__name__} wants one of {list(self.offered_views)} or None, got {group['view']!r}."
            )

    def _plan_of(self, index: int, first: int) -> Plan:
        """The plan of param group ``index``, whose first parameter has position ``first`` in the optimizer."""
        group = self.param_groups[index]
        groups: list[Group] = []
        for position, parameter in enumerate(group["params"], first):
            try:
                check_parameter(parameter, self._device())
                full = sharding.whole(parameter)
                found = self._groups_of(position, position - first, index, full, layout_of(group, full))
                groups += sharding.localized(found, parameter)
            except (ValueError, TypeError) as error:
                raise type(error)(f"{self._where(position)}: {error}") from None
        return Plan.build(groups, [operands.local(parameter) for parameter in self._all_parameters()])

    def _groups_of(self, position: int, within: int, index: int, parameter: Tensor, layout: Layout) -> list[Group]:
        """The rows of the plan of parameter ``within`` of param group ``index``, at ``position`` in the optimizer."""
        group = self.param_groups[index]
        of: Manifold = group["manifold"]
        (retraction,) = retraction_codes(of, group["retraction"])
        reason = fit.frozen(of, views.shape_of(parameter, layout)) if parameter.numel() else None
        if reason is not None:
            raise ValueError(
                f"view: {layout.view!r} would freeze the weight on the manifold {of.name}: {reason}. "
                "Use another view or manifold, or leave the weight without one."
            )
        return [
            Group(
                parameter=position,
                hyper=index,
                rule=self.rule,
                manifold=of.code,
                retraction=retraction,
                layout=layout,
                scale=fit.scale_of(of, layout, parameter),
            )
        ]

    # -- what a step reads --------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        """Make the next step put together anew what it reads."""
        self._read = itemgetter(*self._names)
        self._seen: list[tuple[Any, ...]] | None = None
        self._entries = -1
        self._ready = False
        self._held: list[tuple[str | None, str | None]] | None = None
        self._norms: Tensor | None = None  # R of every group, where the step is to write it

    def _init_group(self) -> None:
        """Bring tables, lists and states up to the settings and :attr:`state`.

        The name is torch's: ``torch.compile`` runs a method of this name when it traces a step, and leaves it out of
        the graph.
        """
        values = [self._read(group) for group in self.param_groups]
        if not self._ready or values != self._seen or len(self.state) != self._entries:
            self._refresh(values)

    def _refresh(self, values: list[tuple[Any, ...]]) -> None:
        for index, group in enumerate(self.param_groups):
            if self._seen is None or values[index] != self._seen[index]:
                self._check_group(index, group)
        rows = [self._hyper_row(group) for group in self.param_groups]
        held = [self._buffers(group) for group in self.param_groups]
        if held != self._held or len(self.state) != self._entries:
            self._collect(held)
        self._hyper, self._live, self._followed = settings.hyper_table(rows), None, []
        if tensors := settings.in_tensors(rows):
            live = self._live = self._hyper.to(self._device(), copy=True)
            self._followed = [(live[row, column], value) for row, column, value in tensors]
        self._frozen = [position for position, lr in enumerate(self._rates()) if self.rests and lr == 0]
        self._seen, self._ready = values, True

    def _tables(self) -> tuple[Tensor, Tensor | None]:
        """The tables of hyper-parameters for a step, ``hyper`` and ``live`` of the operator."""
        if torch.compiler.is_compiling():
            # As part of the graph, which is valid for the numbers it was made with and while states are in place.
            if not self._ready:
                raise RuntimeError("step: wanted states in place. Call step() once before it is compiled.")
            return settings.traced_tables([self._hyper_row(group) for group in self.param_groups], self._device())
        if self._followed:  # numbers in tensors change in place
            for index, group in enumerate(self.param_groups):
                self._check_group(index, group)
            for place, value in self._followed:
                place.copy_(value)
        return self._hyper, self._live

    def _rates(self) -> list[Any]:
        """The learning rate of every parameter that is a number, else ``None``."""
        rates = [
            (None if isinstance(group["lr"], Tensor) else group["lr"], group["params"]) for group in self.param_groups
        ]
        return [rate for rate, params in rates for _ in params]

    def _check_group(self, index: int, group: ParamGroup) -> None:
        try:
            if structure_of(group) != self._structure[index]:
                was = dict(zip(settings.STRUCTURE, self._structure[index], strict=True))
                name = next(name for name in settings.STRUCTURE if group.get(name) != was[name])
                raise ValueError(
                    f"{name}: is fixed once the group is in an optimizer, wanted {was[name]!r}, got {group[name]!r}. "
                    "Make a new optimizer for another."
                )
            self._settle(group, settings.KNOWN)
            settings.check(group)
        except (ValueError, TypeError) as error:
            raise type(error)(f"param group {index}: {error}") from None

    def _collect(self, held: list[tuple[str | None, str | None]]) -> None:
        """The lists that the operator takes, with buffers allocated where they are missing."""
        self._resolve()
        parameters = self._all_parameters()
        masters: dict[int, Tensor] = {}
        for position, parameter in enumerate(parameters):
            if operands.wants_master(parameter, self._master_weights):
                masters[position] = self._master(position, parameter)
        self._operands = Operands(parameters, masters)
        self._shared_norms = SharedNorms(self.plan, parameters, len(self.param_groups))
        counts = checkpoint.component_counts(self.plan, len(parameters))
        taken = [int(self.state[p].get("step", 0)) for p in parameters]
        steps = torch.tensor(taken, dtype=torch.int64, device=self._device())
        buffers: tuple[list[Tensor], list[Tensor]] = ([], [])
        position = 0
        for group, names in zip(self.param_groups, held, strict=True):
            for parameter in group["params"]:
                state, weight = self.state[parameter], self._operands.held[position]
                for name, tensors in zip(names, buffers, strict=True):
                    if name is not None and name not in state:
                        buffer = checkpoint.new_buffer(name, weight, counts[position])
                        state[name] = sharding.as_sharded(buffer, parameter)
                        # As in torch, the first step with momentum takes the gradient itself, whenever that is.
                        steps[position] = 0
                    tensors.append(operands.local(state[name]) if name is not None else weight.new_empty(0))
                state["step"] = steps[position]
                position += 1
        self._momenta, self._variances = buffers
        self._steps = steps
        self._held = held
        self._entries = len(self.state)

    def _master(self, position: int, parameter: Tensor) -> Tensor:
        """The float32 master of a 16-bit parameter: on the manifold as closely as float32 allows."""
        state = self.state[parameter]
        if "master" not in state:
            weight = operands.local(parameter)
            master = operands.like(weight, torch.float32).copy_(weight)
            constraint.place_(self.plan, position, master)
            state["master"] = sharding.as_sharded(master, parameter)
        return operands.local(state["master"])

    def _buffers(self, group: ParamGroup) -> tuple[str | None, str | None]:
        """Names of the buffers that parameters of ``group`` need now: momentum and variance."""
        return ("momentum_buffer" if settings.has_momentum(group) else None, None)

    def _hyper_row(self, group: ParamGroup) -> list[float | Tensor]:
        return settings.hyper_row(group)

    def _all_parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _device(self) -> torch.device:
        parameters = self._all_parameters()
        return parameters[0].device if parameters else torch.device("cpu")

    def _resolve(self) -> None:
        self._operator = ops.resolve(self._backend, self._device())
        self._in_graphs = ops.in_graphs(self._operator)

    def _where(self, position: int) -> str:
        """The parameter at ``position`` in words."""
        name, within = self.parameter_names()[position], position
        for index, group in enumerate(self.param_groups):
            if within < len(group["params"]):
                where = f"param group {index}, parameter {within}"
                named = "" if name == where else f" ({name})"
                return f"{where}{named} of shape {tuple(group['params'][within].shape)}"
            within -= len(group["params"])
        raise IndexError(position)

    # -- saving and copying -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state as numbers, strings, lists and tensors; ``torch.load(weights_only=True)`` reads it back.

        Besides torch's ``state`` and ``param_groups`` it has ``version``, ``plan`` (which matrices lie where, with
        their scales) and ``nonfinite``. Tensors are the optimizer's own, as in torch: clone them to keep a snapshot.
        """
        if self.state:  # a buffer that a changed setting asks for belongs to the state
            self._init_group()
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
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
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
            plan, nonfinite = expected, torch.zeros(len(parameters), dtype=torch.int64)
            if whole:
                weights = [operands.local(parameter) for parameter in parameters]
                plan, nonfinite = checkpoint.load_plan(state_dict, expected, weights)
            state = checkpoint.load_state(state_dict, groups, plan, self._buffers, self._where, self._master_weights)
            self._check_weights(plan, weights=[state.get(p, {}).get("master", p) for p in parameters])
        except BaseException:
            self.param_groups, self._structure = before
            raise
        self.plan, self._nonfinite = plan, nonfinite.to(self._device())
        self.state = defaultdict(dict, state)
        self._forget()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def rebind(self, model: nn.Module) -> None:
        """Step the parameters of ``model`` in place of those of the same names, keeping settings and states.

        For models whose parameters were replaced, by ``load_state_dict(assign=True)`` for example. Masters are made
        anew from the weights.

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
        found = dict(model.named_parameters(remove_duplicate=False))
        for position, name in enumerate(self.parameter_names()):
            if name not in found:
                raise ValueError(f"{self._where(position)}: wanted its namesake in the model, got none.")
        before = [(group, group["params"]) for group in self.param_groups]
        saved = self.state_dict()
        if any(operands.is_sharded(found[name]) for name in self.parameter_names()):
            saved = {entry: saved[entry] for entry in ("state", "param_groups")}  # the plan is of other components
        try:
            names = iter(self.parameter_names())
            for group, params in before:
                group["params"] = [found[name] for _, name in zip(params, names, strict=False)]
            for key, parameter in enumerate(self._all_parameters()):
                if "master" in saved["state"].get(key, {}):
                    master = operands.like(operands.local(parameter), torch.float32).copy_(parameter.detach())
                    constraint.place_(self.plan, key, master)
                    with torch.no_grad():
                        parameter.copy_(master)
                    saved["state"][key] = {**saved["state"][key], "master": master}
            self.load_state_dict(saved)
        except BaseException:
            for group, params in before:
                group["params"] = params
            raise

    def __getstate__(self) -> dict[str, Any]:
        kept = ("plan", "_names", "_nonfinite", "_structure", "_raise_nonfinite", "_backend", "_master_weights")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
