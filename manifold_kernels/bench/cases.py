"""What is measured: which method on which workload, by which backend and on how many threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Protocol, TypeVar

from manifold_kernels.bench.methods import METHODS, RETRACTIONS, Method, Step, yardstick
from manifold_kernels.bench.peers import PEERS, Peer
from manifold_kernels.bench.workloads import WORKLOADS, Workload

#: What ``--quick`` measures.
QUICK_WORKLOADS = ("conv 256x256x3x3", "ResNet-20", "rows 512x4608")
QUICK_METHODS = ("sphere", "oblique", "stiefel", "PIO", "PSI-SGDM")

#: What peers have for a backend.
PEER = "peer"


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        accesses: reads and writes of memory that the step needs at least, for each element.
        subject: makes the step that is timed.
        baseline: makes the one that it takes turns with.
        baseline_name: what that is.
    """

    workload: Workload
    method: str
    backend: str
    threads: int
    accesses: int
    subject: Callable[[], Step]
    baseline: Callable[[], Step]
    baseline_name: str = "fused SGD"


class _Named(Protocol):
    @property
    def name(self) -> str: ...


_T = TypeVar("_T", bound=_Named)


def select(what: str, offered: Sequence[_T], patterns: Sequence[str]) -> list[_T]:
    """Those of ``offered`` whose names match one of the shell-style patterns; all of them where there is no pattern.

    Raises:
        ValueError: a pattern matches none.

    >>> [method.name for method in select("method", METHODS, ["PSI*", "stiefel"])]
    ['stiefel', 'PSI-SGD', 'PSI-SGDM']
    """
    for pattern in patterns:
        if not any(_matches(one.name, [pattern]) for one in offered):
            raise ValueError(f"{what}: wanted patterns of {[one.name for one in offered]}, got {pattern!r}.")
    return [one for one in offered if not patterns or _matches(one.name, patterns)]


def cases(
    *,
    workloads: Sequence[str] = (),
    methods: Sequence[str] = (),
    backends: Sequence[str] = ("cpu",),
    threads: Sequence[int] = (1,),
    retractions: bool = False,
    peers: Sequence[Peer] = (),
    device: str = "cpu",
) -> list[Case]:
    """Everything to be measured, workload by workload and in these by threads.

    Args:
        workloads: patterns of names.
        methods: patterns of names of methods and peers.
        backends: of the methods; peers have none.
        threads: numbers of threads.
        retractions: with the retractions beside the default ones.
        peers: with other libraries.
        device: where everything lies, ``"cpu"`` or ``"cuda"``.

    Raises:
        ValueError: a pattern matches nothing, or no method of those is measured on one of these workloads.
    """
    offered: list[Method | Peer] = [*METHODS, *(RETRACTIONS if retractions else ()), *peers]
    chosen = select("method", offered, methods)
    found = [
        case
        for workload in select("workload", WORKLOADS, workloads)
        for count in threads
        for one in chosen
        for case in _cases_of(workload.on(device), one, backends, count)
    ]
    if not found:
        raise ValueError(f"method: wanted one that is measured on {list(workloads)}, got {list(methods)}.")
    return found


def _cases_of(workload: Workload, one: Method | Peer, backends: Sequence[str], threads: int) -> list[Case]:
    if isinstance(one, Method):
        worth = _matches(one.name, workload.methods)
        return [_case(workload, one, backend, threads) for backend in backends] if worth else []
    worth = _matches(one.name, workload.peers) and _matches(one.manifold, workload.methods)
    return [_peer_case(workload, one, threads)] if worth else []


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _case(workload: Workload, method: Method, backend: str, threads: int) -> Case:
    subject = partial(method.step, workload, backend)
    if workload.against is None:
        return Case(workload, method.name, backend, threads, method.accesses, subject, partial(yardstick, workload))
    baseline = partial(method.step, workload.against, backend)
    name = f"itself, {workload.against.name}"
    return Case(workload, method.name, backend, threads, method.accesses, subject, baseline, name)


def _peer_case(workload: Workload, peer: Peer, threads: int) -> Case:
    subject = partial(peer.step, workload)
    return Case(workload, peer.name, PEER, threads, 5, subject, partial(yardstick, workload))


def usable(peers: Sequence[Peer] = PEERS) -> tuple[list[Peer], dict[str, str]]:
    """The peers that can be used here, and for the others the reason why not."""
    reasons = {peer.name: peer.missing() for peer in peers}
    missing = {name: reason for name, reason in reasons.items() if reason is not None}
    return [peer for peer in peers if peer.name not in missing], missing
