"""Which weights are scale-invariant, since a normalisation layer follows them, and what one vector ``w`` is there.

A weight is scale-invariant where everything that its layer's output feeds is a normalisation that takes the scale
out again. Between the two there may only be what commutes with a positive scale (dropout, ReLU, pooling). Behind batch
and instance norm one ``w`` is a filter (all weights into one neuron), behind group norm all filters of a group, behind
layer norm all filters of the layer. A bias is part of ``w`` unless the normalisation subtracts it again with the mean
of its own channel; the kernels know no such vectors, and these weights are not reported.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from manifold_kernels.layers import LAYERS, layout, outputs
from manifold_kernels.views import components

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
LAYER_NORMS = (nn.LayerNorm, nn.RMSNorm)
NORMS = (*BATCH_NORMS, *INSTANCE_NORMS, nn.GroupNorm, *LAYER_NORMS)

#: f(a x) = a f(x) for a > 0, channel by channel. A bias does not pass: f(x + b) is not f(x) + constant.
HOMOGENEOUS = (
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.ReLU, nn.LeakyReLU),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
_HOMOGENEOUS_CALLS = {
    *(F.dropout, F.dropout2d, F.dropout3d, F.relu, torch.relu, F.leaky_relu, "relu", "relu_"),
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
}
#: These move elements, so that only a scale common to the whole layer is known to pass.
_LAYOUT_CALLS = {
    *(torch.permute, torch.transpose, torch.movedim, torch.flatten, torch.reshape),
    *("permute", "transpose", "movedim", "flatten", "reshape", "view", "unflatten"),
}
_SHAPE_CALLS = {"size", "dim", "numel"}
_SHAPE_ATTRIBUTES = {"shape", "ndim", "dtype", "device"}


@dataclass(frozen=True)
class Normalization:
    """The normalisation behind a weight.

    Attributes:
        norm: qualified name of the normalisation layer.
        rows: output neurons that share one scale-invariant vector ``w``.
        found_by: ``"graph"`` (the traced data flow) or ``"order"`` (the layer registered next in the same parent).
    """

    norm: str
    rows: int
    found_by: Literal["graph", "order"]

    def __str__(self) -> str:
        return f"behind {self.norm}" + (", by order of registration" if self.found_by == "order" else "")


@dataclass(frozen=True)
class _Path:
    """What lies between a layer and its normalisation."""

    homogeneous: bool = False
    moved: bool = False


def find_scale_invariant(model: nn.Module) -> dict[str, Normalization]:
    """The weights of convolutions and linear layers that are scale-invariant, since a normalisation follows them.

    Rescaling one vector ``w`` of such a weight by any a > 0 leaves the network's output as it is ([PSI] section 3).
    ``w`` is a filter behind batch and instance norm, the filters of a group behind group norm, and all of the layer's
    behind layer and RMS norm. Only normalisation *modules* are seen; a batch norm in eval mode within a model in
    training mode uses fixed statistics and normalises nothing.

    The data flow is read from ``torch.fx``. Where the model cannot be traced, a layer counts as normalised if the next
    layer registered in the same parent is a normalisation of matching size: a guess, which a ``RuntimeWarning`` and
    ``found_by`` tell and :func:`verify_scale_invariant` checks.

    Returns:
        parameter name -> :class:`Normalization`, in the order of the model. Weights shared by several layers are
        there if every use is normalised alike.

    >>> find_scale_invariant(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    {'0.weight': Normalization(norm='1', rows=1, found_by='graph')}
    """
    return {name: found for name, found in explain(model).items() if isinstance(found, Normalization)}


def explain(model: nn.Module) -> dict[str, Normalization | str]:
    """For every weight of a convolution or linear layer its normalisation, or why it has none that counts."""
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        warnings.warn(
            f"find_scale_invariant: torch.fx cannot trace {type(model).__name__} ({_first_line(error)}); normalised "
            "layers are guessed from the order of registration. Check them with verify_scale_invariant(model, input).",
            RuntimeWarning,
            stacklevel=3,
        )
        uses = list(_uses_by_order(model))
    else:
        uses = list(_uses_in_graph(model, graph))
    # By identity of the weight, so that shared layers and tied weights are judged by all their uses.
    seen: dict[int, Normalization | str] = {}
    for weight, found in uses:
        before = seen.setdefault(id(weight), found)
        if isinstance(before, Normalization) and (isinstance(found, str) or found.rows != before.rows):
            seen[id(weight)] = found if isinstance(found, str) else "its uses are normalised differently"
    result: dict[str, Normalization | str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LAYERS):
            result[_join(name, "weight")] = seen.get(id(_key(module)), "its layer is not called in the traced graph")
    return result


def verify_scale_invariant(model: nn.Module, *inputs: Any, tolerance: float = 1e-6) -> dict[str, float]:
    """Check what :func:`find_scale_invariant` found: rescale every ``w`` by a factor of its own and compare outputs.

    A float64 copy of the model is run once for every weight, in training mode, with eps = 1e-30 in its normalisations
    (with the usual 1e-5 no network is exactly scale-invariant) and the same random numbers.

    Args:
        model: the model, left as it is.
        *inputs: what ``model(*inputs)`` takes; floating tensors are converted to float64.
        tolerance: the largest relative change of the outputs that passes.

    Returns:
        weight name -> relative change of the outputs, ``max |out' - out| / max |out|``.

    Raises:
        ValueError: a weight's change exceeds ``tolerance``.

    >>> model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.LayerNorm(8))
    >>> list(verify_scale_invariant(model, torch.randn(5, 4)))
    ['0.weight']
    """
    found = find_scale_invariant(model)
    twin = copy.deepcopy(model).double()
    if not model.training:  # else frozen batch norms stay frozen
        twin.train()
    for module in twin.modules():
        if isinstance(module, NORMS):
            module.eps = 1e-30
    inputs = tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
    state = copy.deepcopy(twin.state_dict())
    want = _outputs(twin, inputs)
    largest = max((float(out.abs().max()) for out in want if out.numel()), default=0.0)
    generator = torch.Generator().manual_seed(0)
    changes: dict[str, float] = {}
    for name, normalization in found.items():
        twin.load_state_dict(state)
        layer = twin.get_submodule(name.rpartition(".")[0])
        vectors = components(layer.weight.detach(), layout(layer, "filter", normalization.rows))  # type: ignore[operator]
        factors = 0.5 + torch.rand(vectors.shape[:2], generator=generator, dtype=torch.float64, device="cpu")
        vectors.mul_(factors.to(vectors.device).reshape(*factors.shape, *(1,) * (vectors.dim() - 2)))
        got = _outputs(twin, inputs)
        change = max((float((a - b).abs().max()) for a, b in zip(got, want, strict=True) if a.numel()), default=0.0)
        changes[name] = change / largest if largest else change
    failed = {name: change for name, change in changes.items() if not change <= tolerance}
    if failed:
        raise ValueError(
            f"model: wanted outputs that stay within {tolerance:g} when a scale-invariant weight is rescaled, got "
            + ", ".join(f"{name} ({found[name]}): {change:.1e}" for name, change in failed.items())
            + ". Give these weights a rule of None in param_groups."
        )
    return changes


def _outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        return list(_floating(model(*inputs)))


def _floating(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _floating(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _floating(item)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # Subclasses defined outside of torch.nn too: what they are matters, not how they compute it.
        return isinstance(m, (*LAYERS, *NORMS)) or super().is_leaf_module(m, module_qualified_name)


def _uses_in_graph(model: nn.Module, graph: fx.Graph) -> Iterator[tuple[object, Normalization | str]]:
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in parameters and node.users:
            yield parameters[node.target], f"the model uses it outside of its layer, in {next(iter(node.users))}"
        layer = modules.get(node.target) if node.op == "call_module" else None
        if isinstance(layer, LAYERS):
            found = [_judge(layer, *end, "graph", model.training) for end in _ends(node, modules, _Path())]
            reasons = [one for one in found if isinstance(one, str)]
            rows = {one.rows for one in found if isinstance(one, Normalization)}
            if reasons or not found:
                yield _key(layer), reasons[0] if reasons else "no normalisation behind it"
            else:
                yield _key(layer), found[0] if len(rows) == 1 else "its uses are normalised differently"


def _ends(
    node: fx.Node, modules: Mapping[str, nn.Module], path: _Path
) -> Iterator[tuple[str, nn.Module | None, _Path]]:
    """What the value of ``node`` flows into: (name, normalisation or None, what lies between)."""
    for user in node.users:
        module = modules.get(str(user.target)) if user.op == "call_module" else None
        call = user.target if user.op in ("call_function", "call_method") else None
        first = bool(user.args) and user.args[0] is node
        if isinstance(module, NORMS):
            yield str(user.target), module, path
        elif call in _SHAPE_CALLS or (call is getattr and user.args[1] in _SHAPE_ATTRIBUTES):
            continue
        elif isinstance(module, nn.Identity) or (first and call == "contiguous"):
            yield from _ends(user, modules, path)
        elif isinstance(module, HOMOGENEOUS) or (first and call in _HOMOGENEOUS_CALLS):
            yield from _ends(user, modules, replace(path, homogeneous=True))
        elif isinstance(module, nn.Flatten) or (first and call in _LAYOUT_CALLS):
            yield from _ends(user, modules, replace(path, moved=True))
        else:
            yield str(user.target if module is not None else user), None, path


def _uses_by_order(model: nn.Module) -> Iterator[tuple[object, Normalization | str]]:
    for parent_name, parent in model.named_modules():
        children = list(parent.named_children())
        for position, (_, layer) in enumerate(children):
            if not isinstance(layer, LAYERS):
                continue
            path = _Path()
            end: tuple[str, nn.Module | None] = ("", None)
            for name, module in children[position + 1 :]:
                if isinstance(module, HOMOGENEOUS):
                    path = replace(path, homogeneous=True)
                elif not isinstance(module, nn.Identity):
                    if isinstance(module, NORMS) and _sizes_match(layer, module):
                        end = (_join(parent_name, name), module)
                    break
            yield _key(layer), _judge(layer, *end, path, "order", model.training)


def _sizes_match(layer: nn.Module, norm: nn.Module) -> bool:
    if isinstance(norm, LAYER_NORMS):
        return norm.normalized_shape[-1 if isinstance(layer, nn.Linear) else 0] == outputs(layer)
    return bool(_channels(norm) == outputs(layer))


def _channels(norm: nn.Module) -> object:
    return norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features


def _judge(
    layer: nn.Module, end: str, norm: nn.Module | None, path: _Path, found_by: Literal["graph", "order"], training: bool
) -> Normalization | str:
    """The normalisation ``norm``, named ``end``, behind ``layer``, or why the weight is not scale-invariant for it."""
    if norm is None:
        return f"it feeds {end}, which is no normalisation" if end else "no normalisation is registered behind it"
    biased = layer.bias is not None
    if isinstance(norm, LAYER_NORMS):
        rows = outputs(layer)
    elif path.moved:
        return f"dimensions are moved between it and {end}"
    elif _channels(norm) != outputs(layer):
        return f"{end} normalises {_channels(norm)} channels, not its {outputs(layer)} outputs"
    elif isinstance(norm, nn.GroupNorm):
        rows = outputs(layer) // norm.num_groups
    elif isinstance(norm, INSTANCE_NORMS) and isinstance(layer, nn.Linear):
        return f"{end} does not normalise the outputs of a linear layer one by one"
    else:
        if not norm.training and norm.running_mean is not None and training:
            return f"{end} is in eval mode: its statistics are fixed"
        rows = 1
        biased = biased and path.homogeneous
    if biased:
        return f"its bias would be part of the vector that {end} normalises"
    of = layout(layer, "filter", rows)
    if outputs(layer) // of.channel_groups % rows:
        return f"the vector that {end} normalises spans groups of the transposed convolution"
    return Normalization(end, rows, found_by)


def _key(layer: nn.Module) -> object:
    """What identifies the weight of ``layer``: the parameter, or the layer where a parametrization computes it."""
    return dict(layer.named_parameters(recurse=False)).get("weight", layer)


def _join(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
