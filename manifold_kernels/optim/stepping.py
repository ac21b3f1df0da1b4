"""A step: what it looks at, what it reads and keeps between calls, and the one call of the operator."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from operator import is_, itemgetter
from typing import Any, ClassVar, overload

import torch
from torch import Tensor

from manifold_kernels import ops
from manifold_kernels.binding import home, is_replaced
from manifold_kernels.optim import checkpoint, constraint, gathering, operands, settings, sharding
from manifold_kernels.optim.gathering import Gathering
from manifold_kernels.optim.groups import structure_of
from manifold_kernels.optim.operands import Operands
from manifold_kernels.optim.planned import Planned
from manifold_kernels.optim.settings import ParamGroup
from manifold_kernels.optim.sharding import SharedNorms


class Stepping(Planned):
    """An optimizer that steps everything it has by one call of one operator."""

    #: Whether a learning rate of 0 leaves weights as they are, to the bit.
    rests: ClassVar[bool] = False
    #: Gradient scalers leave ``grad_scale`` and ``found_inf`` to the step, as with torch's fused optimizers.
    _step_supports_amp_scaling = True

    _raise_nonfinite: bool
    _master_weights: bool
    _backend: str

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
        plan, r = self.plan, None
        with torch.no_grad():
            weights, grads = stepped.weights(self._frozen), stepped.gradients(grads)
            whole = weights, grads, self._momenta
            if self._gathering:
                whole = self._gathering.whole(*whole)
            lists = *whole, self._variances, self._steps, self._nonfinite
            try:
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
            except ValueError as error:
                raise self._named(error) from None
            if self._gathering:
                self._gathering.keep(whole, weights, self._momenta)
            stepped.store(grads, found_inf)
            if r is not None and self._norms is not None:
                self._shared_norms.write(self._norms, r)
        return loss

    def _named(self, error: ValueError) -> ValueError:
        """``error`` of the operator, which counts in its lists, with the parameter's name."""
        place = re.match(r"(?:params|grads|momenta|variances)\[(\d+)\]: ", str(error))
        if place is None:
            return error
        return ValueError(
            f"{error} It is that of {self._where(int(place[1]))}. Nothing was written. Convert models, by "
            "model.to(...), before their optimizers are made."
        )

    def _look_at(self, grads: list[Tensor | None], found_inf: Tensor | None) -> None:
        """Raise ``ValueError`` for a gradient that a step must not see."""
        strided = torch.strided
        for grad in grads:
            if grad is None or grad.layout is not strided:
                self._refuse_layout(grads)
                break
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

    def _refuse_replaced(self) -> None:
        for position, parameter in enumerate(self._all_parameters()):
            if is_replaced(parameter):
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

    def _forget(self) -> None:
        """Make the next step put together anew what it reads."""
        self._read = itemgetter(*self._names)
        self._seen: list[tuple[Any, ...]] | None = None
        self._states = -1
        self._homes: list[list[Any]] = [[], [], []]  # dicts of modules, names in them, and the parameters of these
        self._entries: set[str] = set()  # names of buffers
        self._found: list[Any] = []  # parameters and buffers, those that the next lists have
        self._ready = False
        self._held: list[tuple[str | None, str | None]] | None = None
        self._norms: Tensor | None = None  # R of every group, where the step is to write it

    def _init_group(self, to_step: bool = True) -> None:
        """Bring tables, lists and states up to the settings and :attr:`state`.

        The name is torch's: ``torch.compile`` runs a method of this name when it traces a step, and leaves it out of
        the graph.
        """
        values = [self._read(group) for group in self.param_groups]
        if not self._ready or values != self._seen or not self._in_place():
            self._refresh(values, to_step)

    def _in_place(self) -> bool:
        """Whether parameters, in the groups and in their modules, and buffers are those that were collected.

        Other code may put others in their places.
        """
        return len(self.state) == self._states and all(map(is_, self._holds(), self._found))

    def _holds(self) -> Iterator[Any]:
        """All that :meth:`_in_place` compares. Every step asks: there is no loop in Python."""
        params = map(itemgetter("params"), self.param_groups)
        at_home = map(dict.get, *self._homes)
        buffers = (map(dict.get, self.state.values(), repeat(name)) for name in self._entries)
        return chain(*params, at_home, *buffers)

    def _refresh(self, values: list[tuple[Any, ...]], to_step: bool) -> None:
        in_place = self._in_place()
        if not in_place:
            self._check_members()
            if to_step:
                self._refuse_replaced()
        for index, group in enumerate(self.param_groups):
            if self._seen is None or values[index] != self._seen[index]:
                self._check_group(index, group)
        rows = [self._hyper_row(group) for group in self.param_groups]
        held = [self._buffers(group) for group in self.param_groups]
        if held != self._held or not in_place:
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
            return settings.tables([self._hyper_row(group) for group in self.param_groups], self._device())
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
        parameters, gathered = self._all_parameters(), self._gathered()
        masters: dict[int, Tensor] = {}
        for position, parameter in enumerate(parameters):
            if operands.wants_master(parameter, self._master_weights):
                masters[position] = self._master(position, parameter, position in gathered)
        self._operands = Operands(parameters, masters)
        self._gathering = Gathering(gathered)
        self._shared_norms = SharedNorms(self.plan, parameters, len(self.param_groups), gathered.keys())
        counts = checkpoint.component_counts(self.plan, len(parameters))
        taken = [int(self.state[p].get("step", 0)) for p in parameters]
        steps = torch.tensor(taken, dtype=torch.int64, device=self._device())
        buffers: tuple[list[Tensor], list[Tensor]] = ([], [])
        weights = self._operands.weights()
        position = 0
        for group, names in zip(self.param_groups, held, strict=True):
            for parameter in group["params"]:
                state, weight = self.state[parameter], weights[position]
                for name, tensors in zip(names, buffers, strict=True):
                    if name is not None and name not in state:
                        buffer = checkpoint.new_buffer(name, weight, counts[position])
                        state[name] = sharding.as_sharded(buffer, parameter, position in gathered)
                        # As in torch, the first step with momentum takes the gradient itself, whenever that is.
                        steps[position] = 0
                    tensors.append(operands.local(state[name]) if name is not None else weight.new_empty(0))
                state["step"] = steps[position]
                position += 1
        self._momenta, self._variances = buffers
        self._steps = steps
        self._held = held
        homes = [(*found, parameter) for parameter in parameters if (found := home(parameter)) is not None]
        self._homes = [[each[column] for each in homes] for column in range(3)]
        self._states = len(self.state)
        self._entries = {name for state in self.state.values() for name in state} - {"step"} or {"step"}
        kept = [state.get(name) for name in self._entries for state in self.state.values()]
        self._found = [*parameters, *self._homes[2], *kept]

    def _master(self, position: int, parameter: Tensor, gathered: bool) -> Tensor:
        """The float32 master of a 16-bit parameter: on the manifold as closely as float32 allows."""
        state = self.state[parameter]
        if "master" not in state:
            weight = operands.local(parameter).detach()
            master = operands.like(weight, torch.float32).copy_(weight)
            state["master"] = sharding.as_sharded(master, parameter)
            with gathering.opened(state["master"], gathered) as matrices:
                constraint.place_(self.plan, position, matrices)
        return operands.local(state["master"])

    def _buffers(self, group: ParamGroup) -> tuple[str | None, str | None]:
        """Names of the buffers that parameters of ``group`` need now: momentum and variance."""
        return ("momentum_buffer" if settings.has_momentum(group) else None, None)

    def _hyper_row(self, group: ParamGroup) -> list[float | Tensor]:
        return settings.hyper_row(group)

    def _resolve(self) -> None:
        self._operator = ops.resolve(self._backend, self._device())
        self._in_graphs = ops.in_graphs(self._operator)
