"""From a model to the param groups of an optimizer: which parameter lies on which manifold, in which view."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from manifold_kernels import collection, fit, functional, norm_detection
from manifold_kernels.binding import remember
from manifold_kernels.collection import Assignment, Collection, retraction_codes
from manifold_kernels.layers import CONVOLUTIONS, LAYERS, layout
from manifold_kernels.manifolds import BY_NAME, Euclidean, Grassmann, Manifold, ScaleInvariant, _Scaled
from manifold_kernels.norm_detection import Normalization
from manifold_kernels.optim.settings import KNOWN
from manifold_kernels.views import Layout, shape_of

#: What a parameter is to lie on: a manifold or a collection, its name, ``None`` (Euclidean), or options with or without
#: ``"manifold"``.
Target = Manifold | Collection | str | None | Mapping[str, Any]

#: Options that say how a weight lies on its manifold; nothing on a Euclidean parameter.
_CONSTRAINT_OPTIONS = {"view", "grouping", "retraction", "rows", "step_size", "rho", "curvature", "guard", "clip"}


def param_groups(
    model: nn.Module,
    manifold: Target,
    *,
    linear: Target = None,
    rules: Mapping[str, Target] | None = None,
    euclidean: Mapping[str, Any] | None = None,
    init: str = "project",
    generator: torch.Generator | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Route every trainable parameter of ``model`` into one param group and put constrained weights on their manifold.

    ``manifold`` is for the weights of Conv1d/2d/3d and ConvTranspose1d/2d/3d layers, ``linear`` for those of Linear
    layers; biases, norm parameters and all others are Euclidean. A *target* is a :class:`Manifold`, taken as it is; a
    name such as ``"stiefel"``, with the scale ``"fan"`` (a filter keeps the norm sqrt(2) of He initialisation: the
    scale to train with); a :class:`~manifold_kernels.collection.Collection` (see :func:`partition`); ``None``,
    Euclidean; or a mapping of options for the param group, whose ``"manifold"`` is one of these and, left out, what the
    parameter would have had without the rule.

    ``rules`` maps patterns to targets, shell-style (``*``, which crosses dots, ``?``, ``[...]``). A pattern covers a
    parameter if it matches its name, the name of its layer or of a module around it; the last rule that applies to a
    parameter decides alone. With a manifold, a rule applies to the weights of convolutions and linear layers that it
    covers. Others of two and more dimensions (embeddings, the ``in_proj_weight`` of attention), read as
    (outputs, inputs, *kernel), it reaches only by naming the parameter or its layer with a pattern that does not end
    in ``*``. Options without a manifold apply to all that is covered; ``view`` and the like pass Euclidean ones by.

    ``ScaleInvariant`` and ``Grassmann`` take the weights that a normalisation follows, linear ones included
    (:func:`~manifold_kernels.norm_detection.find_scale_invariant`). Where none is found, a rule with
    ``{"manifold": "scale_invariant", "rows": r}`` says that there is one, with ``r`` outputs to a vector.

    A view that a weight does not have, or that would freeze it (``kernel`` on 1x1), gives way to the layer's own and
    that to ``filter``. The notes of :func:`~manifold_kernels.routing_table.routing_table` tell so, and why a weight
    stayed Euclidean.

    Args:
        model: its constrained weights are written.
        manifold: target of convolutions.
        linear: target of linear layers. ``None`` leaves them Euclidean (with ``ScaleInvariant`` and ``Grassmann`` as
            ``manifold``: the same).
        rules: pattern -> target.
        euclidean: options of the Euclidean groups, such as ``{"lr": 0.1, "weight_decay": 5e-4}``.
        init: ``"project"`` moves weights to the nearest point; ``"random"`` draws normal ones first, which makes them
            uniform on the sphere, oblique and Stiefel manifolds, and He-normal on those without a fixed norm.
        generator: for ``init="random"``, the source of random numbers.
        **options: options of all constrained groups: ``view`` (``"kernel"``, ``"filter"`` or ``"matrix"``),
            ``grouping``, ``retraction``, ``lr``, ...

    Returns:
        param groups, ready for an optimizer, Euclidean ones last. Beside the optimizer's own keys each has ``names``,
        the parameters' names, and ``notes``, remarks by name. A parameter shared by several modules is there once.

    Raises:
        ValueError: a rule matches or constrains nothing; an exactly named weight cannot take its manifold; no weight
            can; tied weights have different targets; a constrained weight is computed by a parametrization; a parameter
            is not initialised; a weight to be projected is zero or not finite. The model is then as it was.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
    >>> [(str(group["manifold"]), group["names"]) for group in param_groups(model, "stiefel", rules={"3": "oblique"})]
    [('stiefel', ['0.weight']), ('oblique', ['3.weight']), ('None', ['0.bias', '1.weight', '1.bias', '3.bias'])]
    """
    if init not in ("project", "random"):
        raise ValueError(f"init: wanted 'project' or 'random', got {init!r}.")
    if generator is not None and init != "random":
        raise ValueError(
            "generator: only init='random' draws random numbers, got init='project'. Leave one of them out."
        )
    router = _Router(model, manifold, linear, rules or {}, dict(euclidean or {}), options)
    routes = router.routes()
    constrained = [
        (name, weight, route.manifold, route.layout)
        for name, (weight, route) in routes.items()
        if route.manifold is not None
    ]
    assignments = {
        name: _draw_assignment(onto, name, weight, of)
        for name, weight, onto, of in constrained
        if isinstance(onto, Collection)
    }
    if init == "project":
        for name, weight, onto, _ in constrained:
            _check_projectable(name, weight, onto)
    # Only now that nothing can be refused any more is the model written.
    for name, weight, onto, of in constrained:
        if init == "random":
            _draw(weight, of, generator)
        if isinstance(onto, Collection):
            collection.project_(onto, weight, of, assignments[name])
        else:
            functional.project_weight_(onto, weight, of)
    return _grouped(routes, assignments)


def partition(
    model: nn.Module,
    scheme: str,
    manifolds: Sequence[Manifold | str | None],
    *,
    seed: int = 0,
    subsets: int | None = None,
    shared: bool = False,
    **routing: Any,
) -> list[dict[str, Any]]:
    """Deal the kernels of every convolution of ``model`` to products of manifolds: the param groups for ``FGSGD``.

    [FG] section II: PO, PI and PIO, with weight-set splitting over any list of manifolds, and its other two methods,
    one product (``single``) and individual manifolds. A group of kernels lies on one manifold and takes one step size;
    the schemes, ``subsets`` and ``shared`` are those of :class:`~manifold_kernels.collection.Collection`. Kernels of a
    layer stay in one tensor, wherever they lie. 1x1 convolutions have filters in place of kernels, which ``pi`` deals
    (``po`` and ``pio``, which split inputs, become ``pi`` there, with a note); a weight with fewer components than
    there are manifolds stays Euclidean, with a note. Both are errors where ``model`` is a single layer or a rule names
    it.

    Args:
        model: a model or a layer; its constrained weights are moved onto their manifolds.
        scheme: ``"po"``, ``"pi"``, ``"pio"``, ``"single"`` or ``"individual"``.
        manifolds: manifolds, their names (with the scale ``"fan"``) or ``None``, Euclidean, whose kernels take the
            step of the others with ``W + V`` for a retraction.
        seed: of the draw; the same seed and names of weights give the same assignment everywhere.
        subsets: the subsets of a channel, by default as many as manifolds.
        shared: split every channel alike.
        **routing: everything else that :func:`param_groups` takes: ``linear``, ``rules``, ``euclidean``, ``view``, ...
            ``linear="same"`` deals the filters of linear layers, too.

    Returns:
        param groups as of :func:`param_groups`; those on a collection have ``assignments``, an
        :class:`~manifold_kernels.collection.Assignment` for each parameter. They are saved in the optimizer's state.

    Raises:
        ValueError: as :func:`param_groups`; more manifolds than kernels or a scheme that cannot split the layer.

    >>> layer = nn.Conv2d(4, 6, 3, bias=False)
    >>> (group,) = partition(layer, "pio", ["sphere", "stiefel"])
    >>> group["assignments"][0]  # [FG] Example 1
    Assignment(6x4 in 10 groups)
    """
    of = Collection(scheme, tuple(_at_fan_scale("manifolds", spec) for spec in manifolds), seed, subsets, shared)
    if routing.get("linear") == "same":
        routing["linear"] = of
    return param_groups(model, of, **routing)


def _draw_assignment(of: Collection, name: str, weight: Tensor, layout: Layout) -> Assignment:
    shape = shape_of(weight, layout)
    return of.draw(name, *((shape.outputs, shape.inputs) if layout.view == "kernel" else (shape.count, 1)))


def _grouped(
    routes: Mapping[str, tuple[Tensor, _Route]], assignments: Mapping[str, Assignment]
) -> list[dict[str, Any]]:
    """One param group for every combination of settings, Euclidean ones last."""
    groups: list[dict[str, Any]] = []
    settings: list[dict[str, Any]] = []
    for name, (parameter, route) in sorted(routes.items(), key=lambda item: item[1][1].manifold is None):
        wanted = route.settings()
        if wanted not in settings:
            settings.append(wanted)
            groups.append({"params": [], "names": [], "notes": {}, **wanted})
        group = groups[settings.index(wanted)]
        group["params"].append(parameter)
        group["names"].append(name)
        if name in assignments:
            group["assignments"] = (*group.get("assignments", ()), assignments[name])
        if route.note:
            group["notes"][name] = route.note
    return groups


@dataclass(frozen=True)
class _Use:
    """One name of a parameter in the model; ``parameter`` is ``None`` where a parametrization computes it."""

    name: str
    owner_name: str
    owner: nn.Module
    parameter: Tensor | None

    @property
    def kind(self) -> str:
        if isinstance(self.owner, LAYERS) and self.name.rpartition(".")[2] == "weight":
            return "conv" if isinstance(self.owner, CONVOLUTIONS) else "linear"
        return "other"

    def covered(self, pattern: str) -> bool:
        around = self.owner_name.split(".")
        names = {".".join(around[:end]) for end in range(1, len(around) + 1)} - {""}
        return any(fnmatchcase(name, pattern) for name in (self.name, *names))

    def named(self, pattern: str) -> bool:
        return not pattern.endswith("*") and any(fnmatchcase(name, pattern) for name in (self.name, self.owner_name))


@dataclass(frozen=True)
class _Rule:
    """A target in parts. ``pattern`` is ``None`` for the defaults by layer type."""

    pattern: str | None
    manifold: Manifold | Collection | None
    inherits: bool
    options: dict[str, Any]

    @property
    def where(self) -> str:
        return f"rules[{self.pattern!r}]"

    def insists(self, use: _Use) -> bool:
        """Whether the rule names this very weight or layer, without wildcards: then it must not be left off."""
        pattern = self.pattern
        return pattern is not None and not any(sign in pattern for sign in "*?[") and use.named(pattern)

    @property
    def constrains(self) -> bool:
        return self.manifold is not None or bool(_CONSTRAINT_OPTIONS & self.options.keys())

    def applies(self, use: _Use) -> bool:
        assert self.pattern is not None
        if self.manifold is None or use.kind != "other":
            return use.covered(self.pattern)
        return use.parameter is not None and use.parameter.dim() >= 2 and use.named(self.pattern)


@dataclass(frozen=True)
class _Route:
    """Where a parameter goes. The note takes no part in comparisons."""

    manifold: Manifold | Collection | None
    layout: Layout
    options: dict[str, Any]
    note: str = field(default="", compare=False)

    def settings(self) -> dict[str, Any]:
        """The param group without its parameters."""
        if self.manifold is None:
            return {"manifold": None, **self.options}
        return {
            "manifold": self.manifold,
            "view": self.layout.view,
            "transposed": self.layout.out_dim == 1,
            "channel_groups": self.layout.channel_groups,
            "rows": self.layout.rows,
            **self.options,
        }


def _parse(where: str, target: Target, pattern: str | None = None) -> _Rule:
    options = dict(target) if isinstance(target, Mapping) else {"manifold": target}
    inherits = "manifold" not in options
    spec = options.pop("manifold", None)
    if not isinstance(spec, Collection):
        spec = _at_fan_scale(where, spec)
    _check_options(where, options, constrained=inherits or spec != Euclidean(), rows=pattern is not None)
    return _Rule(pattern, None if isinstance(spec, Euclidean) else spec, inherits, options)


def _at_fan_scale(where: str, spec: Any) -> Manifold:
    """The manifold that ``spec`` means; one by name has the scale ``"fan"``."""
    if spec is None:
        return Euclidean()
    if isinstance(spec, str) and spec in BY_NAME:
        kind = BY_NAME[spec]
        return kind(scale="fan") if issubclass(kind, _Scaled) else kind()
    if not isinstance(spec, Manifold):
        raise ValueError(f"{where}: wanted a Manifold, None or one of {sorted(BY_NAME)}, got {spec!r}.")
    return spec


def _check_options(where: str, options: Mapping[str, Any], constrained: bool, rows: bool = False) -> None:
    """Refuse what an optimizer would not know or could not use; ``rows`` is one weight's and only for rules."""
    known = KNOWN - {"manifold", "assignments", "transposed", "channel_groups"} - (set() if rows else {"rows"})
    known -= set() if constrained else _CONSTRAINT_OPTIONS
    refused = sorted(options.keys() - known)
    if refused:
        raise ValueError(f"{where}: wanted options out of {sorted(known)}, got {refused}.")


class _Router:
    """Decides for one model; touches nothing."""

    def __init__(
        self,
        model: nn.Module,
        manifold: Target,
        linear: Target,
        rules: Mapping[str, Target],
        euclidean: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        conv = _parse("manifold", manifold)
        follows = linear is None and isinstance(conv.manifold, (ScaleInvariant, Grassmann))
        self.defaults = {
            "conv": conv,
            "linear": conv if follows else _parse("linear", linear),
            "other": _Rule(None, None, False, {}),
        }
        self.rules = [_parse(f"rules[{pattern!r}]", target, pattern) for pattern, target in rules.items()]
        _check_options("euclidean", euclidean, constrained=False)
        _check_options("options", options, constrained=True)
        self.model, self.euclidean, self.options = model, euclidean, options
        self.uses = _uses(model)
        self.explained: dict[str, Normalization | str] | None = None

    def routes(self) -> dict[str, tuple[Tensor, _Route]]:
        """Name -> parameter and route, for every trainable parameter, once."""
        names: dict[int, str] = {}
        wanted: dict[int, list[tuple[_Rule, _Use, _Route]]] = {}
        for use in self.uses:
            rule = next((rule for rule in reversed(self.rules) if rule.applies(use)), self.defaults[use.kind])
            route = self._route(use, rule)
            if use.parameter is None:
                if route.manifold is not None:
                    raise ValueError(
                        f"{use.name}: wanted a parameter to keep on {route.manifold}, got a tensor that a "
                        "parametrization (weight_norm, spectral_norm, pruning) computes from others. Remove it, or "
                        f"leave the layer without a manifold: rules={{{use.owner_name!r}: None}}."
                    )
            elif use.parameter.requires_grad:
                names.setdefault(id(use.parameter), use.name)
                wanted.setdefault(id(use.parameter), []).append((rule, use, route))
        routes: dict[str, tuple[Tensor, _Route]] = {}
        constraining: set[str | None] = set()
        for key, name in names.items():
            choices = self._opinions(wanted[key])
            route = choices[0][2]
            for _, use, other in choices:
                if other != route:
                    raise ValueError(
                        f"{use.name}: shares its weight with {choices[0][1].name}, wanted the same target, got "
                        f"{_describe(route)} and {_describe(other)}. Give a rule to one of the names only, or the same."
                    )
            if route.manifold is not None:
                constraining.update(rule.pattern for rule, _, _ in choices)
            parameter = choices[0][1].parameter
            assert parameter is not None
            routes[name] = (parameter, route)
        self._check(routes, constraining)
        return routes

    @staticmethod
    def _opinions(wanted: list[tuple[_Rule, _Use, _Route]]) -> list[tuple[_Rule, _Use, _Route]]:
        """What counts among the uses of a shared parameter: rules before constraints by default before nothing."""
        by_rule = [one for one in wanted if one[0].pattern is not None]
        constrained = [one for one in wanted if one[2].manifold is not None]
        return by_rule or constrained or wanted[:1]

    def _route(self, use: _Use, rule: _Rule) -> _Route:
        options = {**(self.defaults[use.kind].options if rule.inherits else {}), **rule.options}
        manifold = self.defaults[use.kind].manifold if rule.inherits else rule.manifold
        plain = {key: value for key, value in options.items() if key not in _CONSTRAINT_OPTIONS}
        unconstrained = _Route(None, Layout("flat"), {**self.euclidean, **plain})
        if manifold is None:
            return unconstrained
        options = {**self.options, **options}
        view, rows = options.pop("view", None), options.pop("rows", None)
        # A single layer is meant itself, where a model may have layers that cannot be dealt.
        insists = rule.insists(use) or (use.owner is self.model and isinstance(manifold, Collection))
        fitted = self._fit(use, manifold, view, rows)
        if isinstance(fitted, str) and not insists and isinstance(manifold, Collection):
            dealt = replace(manifold, scheme="pi") if manifold.scheme in ("po", "pio") else manifold
            again = self._fit(use, dealt, view, rows)
            if not isinstance(again, str):
                manifold, fitted = dealt, (again[0], fitted)
        if isinstance(fitted, str):
            if insists:
                where = rule.where if rule.pattern is not None else "model"
                raise ValueError(f"{where}: {use.name} cannot lie on {manifold}: {fitted}.")
            return replace(unconstrained, options=self.euclidean, note=f"{fitted}; stays Euclidean")
        if "retraction" in options:
            retraction_codes(manifold, options["retraction"])
        of, note = fitted
        return _Route(manifold, of, options, note)

    def _fit(
        self, use: _Use, manifold: Manifold | Collection, view: str | None, rows: int | None
    ) -> tuple[Layout, str] | str:
        """The layout in which the weight can lie on ``manifold`` with a remark, or why there is none."""
        weight = use.owner.weight if use.parameter is None else use.parameter
        assert isinstance(weight, Tensor)
        if weight.numel() == 0 or not weight.is_floating_point():
            return f"it has {weight.numel()} elements of {weight.dtype}"
        if isinstance(manifold, (ScaleInvariant, Grassmann)):
            return self._fit_vectors(use, manifold, weight, view, rows)
        if rows is not None:
            raise ValueError(f"{use.name}: rows is for scale_invariant and grassmann, got rows={rows} for {manifold}.")
        if view is not None and view not in ("kernel", "filter", "matrix"):
            raise ValueError(f"view: wanted 'kernel', 'filter' or 'matrix', got {view!r}.")
        reasons: list[str] = []
        default = (
            manifold.default_view(weight) if isinstance(manifold, Collection) else fit.default_view(manifold, weight)
        )
        for candidate in dict.fromkeys((view or default, default, "filter")):
            of = layout(use.owner, candidate)
            reason = _unfit(manifold, weight, of)
            if reason is None:
                return of, "; ".join(reasons)
            reasons.append(f"not {candidate}: {reason}")
        return "; ".join(reasons)

    def _fit_vectors(
        self, use: _Use, manifold: Manifold, weight: Tensor, view: str | None, rows: int | None
    ) -> tuple[Layout, str] | str:
        if view not in (None, "filter"):
            raise ValueError(f"view: wanted 'filter' for {manifold} ({use.name}), got {view!r}. Leave it out.")
        note = "as the rule says"
        if rows is None:
            if self.explained is None:
                self.explained = norm_detection.explain(self.model)
            found = self.explained.get(use.name, "it is not the weight of a convolution or linear layer")
            if isinstance(found, str):
                return found
            rows, note = found.rows, str(found)
        of = layout(use.owner, "filter", rows)
        return _unfit(manifold, weight, of) or (of, note)

    def _check(self, routes: Mapping[str, tuple[Tensor, _Route]], constraining: set[str | None]) -> None:
        """Refuse rules that do nothing, and a model without a weight to constrain."""
        notes = [
            f"{name}: {route.note}" for name, (_, route) in routes.items() if route.manifold is None and route.note
        ]
        for rule in self.rules:
            covered = [use for use in self.uses if rule.pattern is not None and use.covered(rule.pattern)]
            if not covered:
                raise ValueError(
                    f"{rule.where}: wanted a pattern that matches a parameter or a module, got one that matches "
                    f"nothing. The parameters are {_some([use.name for use in self.uses])}."
                )
            reached = [use for use in covered if rule.applies(use)]
            if not rule.constrains or rule.pattern in constraining:
                continue
            if not reached:
                raise ValueError(
                    f"{rule.where}: wanted a weight of two or more dimensions for {rule.manifold}, got "
                    f"{_some([use.name for use in covered])}. Any pattern reaches convolutions and linear layers; "
                    "others need one that names them and does not end in '*'."
                )
            raise ValueError(
                f"{rule.where}: wanted a rule that constrains a weight, got one that reaches "
                f"{_some([use.name for use in reached])} only: not trained, without a manifold, decided by a "
                f"later rule, or unfit. Notes: {_some(notes)}."
            )
        if not constraining and any(rule.manifold is not None for rule in (*self.defaults.values(), *self.rules)):
            raise ValueError(
                "model: wanted a trainable weight to constrain, got none. Linear layers, embeddings and others stay "
                f"Euclidean unless linear= or rules= names a manifold for them. Notes: {_some(notes)}."
            )


def _uses(model: nn.Module) -> list[_Use]:
    """Every name of every parameter, and the weights that parametrizations compute."""
    uses: list[_Use] = []
    for owner_name, owner in model.named_modules(remove_duplicate=False):
        prefix = f"{owner_name}." if owner_name else ""
        own = dict(owner.named_parameters(recurse=False, remove_duplicate=False))
        for name, parameter in own.items():
            if nn.parameter.is_lazy(parameter) or parameter.is_meta:
                raise ValueError(
                    f"{prefix}{name}: wanted an initialised parameter, got {type(parameter).__name__} on "
                    f"{parameter.device}. Run one forward pass or load the weights first."
                )
            remember(parameter, owner, name)
            uses.append(_Use(prefix + name, owner_name, owner, parameter))
        if isinstance(owner, LAYERS) and "weight" not in own:
            uses.append(_Use(f"{prefix}weight", owner_name, owner, None))
    return uses


def _unfit(manifold: Manifold | Collection, weight: Tensor, of: Layout) -> str | None:
    try:
        shape = shape_of(weight, of)
        return manifold.unfit(of, shape) if isinstance(manifold, Collection) else fit.frozen(manifold, shape)
    except ValueError as error:
        return str(error).split(". ")[0]  # the advice after it is for those who asked for this view


def _check_projectable(name: str, weight: Tensor, onto: Manifold | Collection) -> None:
    # All points are equally near to zero: the components would become equal and stay so.
    if not bool(weight.isfinite().all()) or not bool(weight.any()):
        raise ValueError(
            f"{name}: wanted a weight with a nearest point on {onto}, got one that is zero or not finite. "
            "Initialise it, or use init='random'."
        )


def _draw(weight: Tensor, of: Layout, generator: torch.Generator | None) -> None:
    """Fill ``weight`` with He-normal numbers."""
    device = "cpu" if generator is None else generator.device
    # In float64 on the generator's device, so that the numbers do not depend on the weight's type and device.
    normal = torch.randn(weight.shape, generator=generator, dtype=torch.float64, device=device)
    with torch.no_grad():
        weight.copy_(normal * (2 * shape_of(weight, of).outputs / weight.numel()) ** 0.5)


def _describe(route: _Route) -> str:
    return "no manifold" if route.manifold is None else f"{route.manifold!r} in the {route.layout.view} view"


def _some(names: list[str]) -> str:
    return (", ".join(names[:8]) + (", …" if len(names) > 8 else "")) or "none"
