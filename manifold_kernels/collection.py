"""Collections of products of manifolds (POMs): which component of a weight lies on which manifold, in which group.

[FG] section II and Appendices C-D: the ``D x C`` components of a layer (outputs x inputs) are dealt at random to
groups, each of which lies on one manifold and takes one step size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from manifold_kernels import fit, functional, views
from manifold_kernels.manifolds import Euclidean, Grassmann, Manifold, ScaleInvariant, Sphere, retraction_code
from manifold_kernels.views import Layout, Shape

if TYPE_CHECKING:
    from numpy.random import RandomState

SCHEMES = ("po", "pi", "pio", "single", "individual")


@dataclass(frozen=True)
class Collection:
    """How a layer's components are dealt to manifolds and groups ([FG] section II, Appendices C-D).

    ============== ================================================================================================
    ``po``         for every output, its C components are split into ``subsets`` groups
    ``pi``         for every input, its D components are split into ``subsets`` groups
    ``pio``        half of the outputs, drawn at random, as ``po``; over the others, the components of each input are
                   one group, and these C groups are dealt to the manifolds
    ``single``     the components are dealt to the manifolds, those of a manifold split into ``subsets`` groups
    ``individual`` the components are dealt to the manifolds, each is a group of its own
    ============== ================================================================================================

    All splits are random, without replacement and near-equal: sizes differ by one at most, and who gets the remainder
    is drawn, too. Where an output has fewer components than there are subsets, some subsets stay empty.

    Args:
        scheme: one of the above.
        manifolds: the component manifolds; ``Euclidean`` is one.
        seed: of the draw. The name of the weight is mixed in, so that layers differ and none depends on another.
        subsets: [FG]'s numbers A (``po``, ``pio``) and B (``pi``) of subsets of a channel, dealt to the manifolds, by
            default one for each; for ``single`` the number of groups on each manifold, by default 1.
        shared: every channel is split alike (``po`` and ``pi``) instead of by a draw of its own.

    >>> from manifold_kernels.manifolds import Sphere, Stiefel
    >>> example = Collection("pio", (Sphere(), Stiefel())).draw("conv.weight", outputs=6, inputs=4)
    >>> len(example.manifolds), example.sizes().tolist()  # [FG] Example 1
    (10, [2, 2, 2, 2, 2, 2, 3, 3, 3, 3])
    """

    name: ClassVar[str] = "collection"

    scheme: str
    manifolds: tuple[Manifold, ...]
    seed: int = 0
    subsets: int | None = None
    shared: bool = False

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ValueError(f"scheme: wanted one of {list(SCHEMES)}, got {self.scheme!r}.")
        object.__setattr__(self, "manifolds", tuple(self.manifolds))
        if not self.manifolds:
            raise ValueError("manifolds: wanted one or more, got none.")
        for of in self.manifolds:
            if not isinstance(of, Manifold) or isinstance(of, (ScaleInvariant, Grassmann)):
                raise ValueError(
                    f"manifolds: wanted Euclidean, Sphere, Oblique and Stiefel ones, which FGSGD steps, got {of!r}."
                )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed: wanted a whole number >= 0, got {self.seed!r}.")
        if self.subsets is not None:
            if isinstance(self.subsets, bool) or not isinstance(self.subsets, int) or self.subsets < 1:
                raise ValueError(f"subsets: wanted a whole number >= 1 or None, got {self.subsets!r}.")
            if self.scheme == "individual":
                raise ValueError(f"subsets: 'individual' has one component a group, got {self.subsets}. Leave it out.")
        if self.shared and self.scheme not in ("po", "pi"):
            raise ValueError(f"shared: is for the schemes 'po' and 'pi', got {self.scheme!r}. Leave it out.")

    def __str__(self) -> str:
        return f"{self.scheme}({'+'.join(str(of) for of in self.manifolds)})"

    def default_view(self, weight: Tensor) -> str:
        """``kernel`` where a kernel is a matrix, else ``filter``: a collection deals many components."""
        return "kernel" if fit.default_view(Sphere(), weight) == "kernel" else "filter"

    def unfit(self, layout: Layout, shape: Shape) -> str | None:
        """Why components of ``shape`` cannot be dealt, or ``None`` where they can."""
        if layout.view == "matrix":
            return "the matrix view has one component, where a collection deals many: kernels or filters"
        if layout.view == "filter" and self.scheme in ("po", "pio"):
            return f"its components are filters, with no inputs for {self.scheme!r} to split; 'pi' deals them"
        if shape.count < len(self.manifolds):
            return f"it has {shape.count} components for {len(self.manifolds)} manifolds; use fewer manifolds"
        if self.scheme == "pio" and shape.outputs < 2:
            return "'pio' handles half of the outputs as 'po', and it has a single output; use 'po' or 'pi'"
        frozen = ((of, fit.frozen(of, shape)) for of in self.manifolds)
        return next((f"on the manifold {of} {reason}" for of, reason in frozen if reason), None)

    def draw(self, name: str, outputs: int, inputs: int) -> Assignment:
        """The assignment of a weight's ``outputs x inputs`` components, by seed and name alone.

        The same on every rank and with every version of torch and numpy: ``RandomState`` is frozen.
        """
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        from numpy.random import RandomState  # as long to import as the rest of the package

        dealer = _Dealer(RandomState(np.frombuffer(digest, "<u4").astype(np.uint32)), len(self.manifolds), self.shared)
        grid = np.arange(outputs * inputs).reshape(outputs, inputs)
        subsets = self.subsets or len(self.manifolds)
        if self.scheme == "po":
            dealer.split(grid, subsets)
        elif self.scheme == "pi":
            dealer.split(grid.T, subsets)
        elif self.scheme == "pio":
            order = dealer.random.permutation(outputs)
            half = np.sort(order[: outputs // 2 + (dealer.random.randint(2) if outputs % 2 else 0)])
            dealer.split(grid[half], subsets)
            rest = np.delete(grid, half, axis=0)
            for owner, column in zip(dealer.deal(inputs, len(self.manifolds)), rest.T, strict=True):
                dealer.add(column, owner)
        else:
            owners = dealer.deal(grid.size, len(self.manifolds))
            for owner in range(len(self.manifolds)):
                members = grid.flat[owners == owner]
                parts = members.size if self.scheme == "individual" else (self.subsets or 1)
                labels = np.arange(members.size) if parts == members.size else dealer.deal(members.size, parts)
                for part in range(parts):
                    dealer.add(members[labels == part], owner)
        return dealer.assignment(outputs, inputs)


def retraction_codes(of: Manifold | Collection, wanted: str | Mapping[str, str] | None) -> list[int]:
    """The number of the retraction ``wanted`` on each manifold of ``of``; ``None`` means the default of each.

    One name is for all manifolds of a collection but the Euclidean space; a mapping has one for each manifold's name.
    """
    if isinstance(of, Manifold):
        if isinstance(wanted, Mapping):
            raise ValueError(f"retraction: wanted a name or None for {of.name}, got {dict(wanted)!r}.")
        return [retraction_code(of, wanted)]
    names = {member.name for member in of.manifolds} - {Euclidean.name}
    if isinstance(wanted, Mapping) and not wanted.keys() <= names:
        raise ValueError(f"retraction: wanted names out of {sorted(names)}, got {sorted(wanted)}.")
    chosen = wanted if isinstance(wanted, Mapping) else dict.fromkeys(names, wanted)
    return [retraction_code(member, chosen.get(member.name)) for member in of.manifolds]


class _Dealer:
    """Draws at random and collects groups."""

    def __init__(self, random: RandomState, manifolds: int, shared: bool) -> None:
        self.random, self.manifolds, self.shared = random, manifolds, shared
        self.groups: list[np.ndarray] = []
        self.owners: list[int] = []

    def deal(self, count: int, hands: int) -> np.ndarray:
        """A hand for each of ``count`` things, near-equally many in each."""
        rounds = np.repeat(np.arange(hands), count // hands)
        return self.random.permutation(np.concatenate([rounds, self.random.permutation(hands)[: count % hands]]))

    def add(self, members: np.ndarray, owner: int) -> None:
        if members.size:
            self.groups.append(members)
            self.owners.append(int(owner))

    def split(self, channels: np.ndarray, subsets: int) -> None:
        """Every row of ``channels`` into ``subsets`` groups."""
        drawn: tuple[np.ndarray, np.ndarray] | None = None
        for channel in channels:
            if drawn is None or not self.shared:
                drawn = self.deal(channel.size, subsets), self.deal(subsets, self.manifolds)
            labels, owners = drawn
            for subset in range(subsets):
                self.add(channel[labels == subset], owners[subset])

    def assignment(self, outputs: int, inputs: int) -> Assignment:
        grid = np.empty(outputs * inputs, dtype=np.int64)
        for group, members in enumerate(self.groups):
            grid[members] = group
        return Assignment(torch.from_numpy(grid.reshape(outputs, inputs)), torch.tensor(self.owners, device="cpu"))


@dataclass(frozen=True, eq=False, repr=False)
class Assignment:
    """The groups of one weight's components; made by :func:`~manifold_kernels.partition`, or by hand.

    Args:
        groups: int64 ``(D, C)``: the group of the component of output d and input c. Filters are ``(D, 1)``.
        manifolds: int64 ``(groups,)``: the position of each group's manifold in ``Collection.manifolds``.

    Raises:
        ValueError: numbers out of range, a group without components.
    """

    groups: Tensor
    manifolds: Tensor

    def __post_init__(self) -> None:
        for name, dims in (("groups", 2), ("manifolds", 1)):
            tensor = getattr(self, name)
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64 or tensor.dim() != dims:
                got = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)
                raise ValueError(f"assignment: wanted {name} as an int64 tensor of {dims} dimensions, got {got}.")
            object.__setattr__(self, name, tensor.detach().cpu().contiguous())
        found = torch.unique(self.groups)
        if not torch.equal(found, torch.arange(self.manifolds.numel(), device="cpu")):
            raise ValueError(
                f"assignment: wanted components in each of {self.manifolds.numel()} groups, numbered from 0, got the "
                f"groups {found.tolist()[:8]}."
            )
        if bool((self.manifolds < 0).any()):
            raise ValueError("assignment: wanted positions of manifolds >= 0.")

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Assignment)
            and torch.equal(self.groups, other.groups)
            and torch.equal(self.manifolds, other.manifolds)
        )

    __hash__ = None  # type: ignore[assignment]  # as tensors compare by value

    def __repr__(self) -> str:
        return f"Assignment({self.groups.shape[0]}x{self.groups.shape[1]} in {self.manifolds.numel()} groups)"

    def sizes(self) -> Tensor:
        """The number of components of each group."""
        return torch.bincount(self.groups.flatten(), minlength=self.manifolds.numel())

    def members(self) -> list[Tensor]:
        """The component numbers ``d C + c`` of each group, ascending."""
        order = self.groups.flatten().sort(stable=True).indices
        return list(torch.split(order, self.sizes().tolist()))

    def grid(self) -> Tensor:
        """``(D, C)``: the position of each component's manifold in the collection."""
        return self.manifolds[self.groups]


def project_(of: Collection, weight: Tensor, layout: Layout, assignment: Assignment) -> None:
    """Move every component of ``weight`` to the nearest point of its manifold, in place; see ``project_weight_``."""
    batch = views.matrices(weight.detach(), layout).clone()
    owners = assignment.grid().flatten().to(batch.device)
    for position, manifold in enumerate(of.manifolds):
        if isinstance(manifold, Euclidean):
            continue
        members = (owners == position).nonzero().flatten()
        chosen = batch[members]  # a weight of one input, whose kernels they are
        functional.project_weight_(
            manifold, chosen.unsqueeze(1), Layout("kernel"), fit.scale_of(manifold, layout, weight)
        )
        batch[members] = chosen
    views.write_matrices(weight, layout, batch)


@dataclass(frozen=True)
class Row:
    """Components of a weight that are one row of a plan; ``components`` is ``None`` where they are all of them."""

    position: int
    manifold: Manifold
    components: Tensor | None
    individual: bool


def rows(of: Collection, assignment: Assignment, weight: Tensor, layout: Layout) -> list[Row]:
    """The rows of the plan of ``weight``: one a group, and one for all groups of one component on the same manifold.

    Raises:
        ValueError: an assignment that does not fit the weight or the collection.
    """
    shape = views.shape_of(weight, layout)
    wanted = (shape.outputs, shape.inputs) if layout.view == "kernel" else (shape.count, 1)
    if tuple(assignment.groups.shape) != wanted:
        raise ValueError(f"assignments: wanted a grid of {wanted} components, got {tuple(assignment.groups.shape)}.")
    if int(assignment.manifolds.max()) >= len(of.manifolds):
        raise ValueError(
            f"assignments: wanted manifolds 0 to {len(of.manifolds) - 1}, got {int(assignment.manifolds.max())}."
        )
    reason = of.unfit(layout, shape)
    if reason is not None:
        raise ValueError(f"manifold: {of} does not fit: {reason}.")
    alone = assignment.sizes() == 1
    made: list[Row] = []
    for position, manifold in enumerate(of.manifolds):
        singles = (alone & (assignment.manifolds == position))[assignment.groups].flatten().nonzero().flatten()
        if singles.numel():
            made.append(Row(position, manifold, singles, individual=True))
    for group, members in enumerate(assignment.members()):
        if not alone[group]:
            position = int(assignment.manifolds[group])
            made.append(Row(position, of.manifolds[position], members, individual=False))
    # Components in their order need no list, and kernels step them without copies.
    return [replace(made[0], components=None)] if len(made) == 1 else made
