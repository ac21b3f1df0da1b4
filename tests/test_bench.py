"""The benchmark's structure, on tiny weights: nothing here looks at a time."""

import gc
import json
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from manifold_kernels import functional
from manifold_kernels.bench import cases as selection
from manifold_kernels.bench import formulas, networks, peers, plots, workloads
from manifold_kernels.bench.cases import Case, cases
from manifold_kernels.bench.measure import Bandwidth, Result, clock_of, measure
from manifold_kernels.bench.methods import METHODS, RETRACTIONS, Method
from manifold_kernels.bench.peers import PEERS, Peer
from manifold_kernels.bench.report import Report
from manifold_kernels.bench.workloads import WORKLOADS, Workload
from manifold_kernels.cli import app
from manifold_kernels.cli import bench as command
from manifold_kernels.manifolds import Euclidean
from manifold_kernels.optim.base import ManifoldOptimizer

runner = CliRunner()


def two_convolutions() -> nn.Module:
    return nn.Sequential(networks.conv(5, 4, 3), networks.conv(4, 4, 1))


KERNELS = Workload("kernels", two_convolutions, ("*",))
VECTORS = ("euclidean", "sphere*", "PSI*", "*-G")
ROWS = Workload("rows", partial(nn.Linear, 9, 4, bias=False), VECTORS, linear=True, view="filter")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command on small workloads; 3x3 convolutions of two sizes make a curve."""
    series = [
        Workload(f"conv {size}", partial(networks.conv, size, size, 3), ("sphere", "PSI-SGD"), peers=("*",))
        for size in (2, 4)
    ]
    half = replace(series[0], name="conv 2 bfloat16", dtype=torch.bfloat16, against=series[0])
    monkeypatch.setattr(selection, "WORKLOADS", (*series, half))
    monkeypatch.setattr(plots, "SERIES", ("conv 2", "conv 4"))
    monkeypatch.setattr(command, "bandwidth", lambda device: Bandwidth(copy=10.0, update=15.0))
    yield


# --- cases --------------------------------------------------------------------------------------------------------


def test_every_workload_and_method_of_the_promise_is_there() -> None:
    """The rows of the project's table of targets; "sphere" is one norm a component, "sphere, layer" one a layer."""
    found = {(case.workload.name, case.method) for case in cases(retractions=True, peers=PEERS)}
    products = [f"{of}{group}" for of in ("sphere", "oblique", "stiefel") for group in ("", ", layer")]
    rows = ["PSI-SGD", "PSI-SGDM", "SGD-G", "Adam-G"]
    for workload in ("conv 64x64x3x3", "conv 256x256x3x3", "conv 1024x1024x3x3", "ResNet-18 convolutions", "ResNet-20"):
        assert {(workload, method) for method in ("euclidean", *products, *rows)} <= found
        wanted = {(workload, peer.name) for peer in PEERS if workload != "ResNet-20" or "compiled" not in peer.name}
        assert wanted <= found
    for workload in ("conv 256x256x5x5", "conv 256x256x7x7", "512 matrices 64x32", "ResNet-50 convolutions"):
        assert {(workload, method) for method in products} <= found
    assert {(workload, "PIO") for workload in ("ResNet-18 convolutions", "ResNet-20")} <= found
    assert {("rows 512x4608", method) for method in ("sphere", "sphere, layer", *rows)} <= found
    for workload in ("linear 512x512", "linear 1024x256", "512 matrices 64x32"):
        assert {(workload, "stiefel"), (workload, "geoopt stiefel"), (workload, "compiled stiefel")} <= found
    for method in ("sphere exp", "oblique exp", "stiefel polar", "stiefel cayley", "stiefel exp"):
        assert ("conv 256x256x3x3", method) in found
    for workload in ("conv 256x256x3x3", "conv 1024x1024x3x3"):
        for variant in ("bfloat16", "channels_last"):
            assert (f"{workload} {variant}", "stiefel") in found


def test_networks_have_the_layers_of_their_papers() -> None:
    """He et al. 2016: parameters of torchvision's ResNets without norms and the linear layer; 65 tensors for CIFAR."""
    count = {name: of.elements() for name in ("18", "50") for of in WORKLOADS if of.name.startswith(f"ResNet-{name}")}
    assert count == {"18": 11_166_912, "50": 23_454_912}
    weights = list(networks.resnet20().parameters())
    assert len(weights) == 65 and sum(weight.dim() == 4 for weight in weights) == 21


def test_variants_are_measured_against_themselves_in_float32_and_contiguous() -> None:
    for case in cases(workloads=["* bfloat16", "* channels_last"]):
        assert case.workload.against is not None
        (plain,) = (of for of in WORKLOADS if of.name == case.workload.against.name)
        assert plain.dtype == torch.float32 and plain.memory_format == torch.contiguous_format
        assert case.baseline_name == f"itself, {plain.name}"
    (weight,) = next(of for of in WORKLOADS if of.name == "conv 256x256x3x3 channels_last").model().parameters()
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert weight.grad is not None and weight.grad.stride() == weight.stride()


def test_everything_lies_on_the_device_in_the_same_strides() -> None:
    """Weights, gradients and those of the workload that is the yardstick; "meta" is there on every machine."""
    for case in cases(workloads=["conv 256* channels_last", "ResNet-20"], device="meta"):
        assert case.workload.device == "meta"
        for workload in filter(None, (case.workload, case.workload.against)):
            pairs = zip(workload.model().parameters(), workload.on("cpu").model().parameters(), strict=True)
            for there, here in pairs:
                assert there.is_meta and there.grad.is_meta and not here.is_meta
                assert there.stride() == here.stride() and there.grad.stride() == here.grad.stride()


def test_patterns_select_and_a_wrong_one_is_refused() -> None:
    found = list(cases(workloads=["conv 64*", "rows*"], methods=["stiefel*"], threads=[1, 3], backends=["cpu", "x"]))
    assert {(case.workload.name, case.method) for case in found} == {
        ("conv 64x64x3x3", "stiefel"),
        ("conv 64x64x3x3", "stiefel, layer"),
    }
    assert len(found) == 8
    for wrong in ({"workloads": ["con 64"]}, {"methods": ["geoopt*"]}):
        with pytest.raises(ValueError, match="wanted patterns of"):
            list(cases(**wrong))


def test_quick_names_what_there_is() -> None:
    found = {(case.workload.name, case.method) for case in cases(workloads=selection.QUICK_WORKLOADS)}
    assert {*selection.QUICK_METHODS} <= {method for _, method in found}
    assert {*selection.QUICK_WORKLOADS} == {workload for workload, _ in found}


# --- methods and peers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workload", "method"),
    [
        (workload, method)
        for workload in (KERNELS, ROWS)
        for method in (*METHODS, *RETRACTIONS)
        if any(fnmatchcase(method.name, pattern) for pattern in workload.methods)
    ],
    ids=lambda of: of.name,
)
def test_every_method_moves_every_weight_and_keeps_its_constraint(workload: Workload, method: Method) -> None:
    model = workload.model()
    optimizer = method.optimizer(workload, model, "reference")
    before = [weight.detach().clone() for weight in model.parameters()]
    optimizer.step()
    assert all((now != old).any() for now, old in zip(model.parameters(), before, strict=True))
    assert isinstance(optimizer, ManifoldOptimizer)
    on_manifold = [not isinstance(group["manifold"], Euclidean) for group in optimizer.param_groups]
    assert all(on_manifold) == (method.name != "euclidean")
    individual = {int(one) for one in optimizer.plan.column("individual")}
    if method.name in ("sphere", "oblique", "stiefel") or method in RETRACTIONS:
        assert individual == {1}
    elif method.name.endswith(", layer"):
        assert individual == {0}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[peers._Batches]:
    """What peers take from a workload, with steps of a third of the scale and compiled formulas as they are."""
    found: list[peers._Batches] = []
    collect = peers._Batches.of

    def of(workload: Workload, manifold: str) -> peers._Batches:
        found.append(collect(workload, manifold))
        return found[-1]

    monkeypatch.setattr(peers._Batches, "of", of)
    for module in (peers, formulas):
        monkeypatch.setattr(module, "LR", 0.1)
    monkeypatch.setattr(workloads, "_GRADIENT", 1.0)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    return found


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize(
    "peer", [peer for peer in PEERS if peer.name.startswith(("eager", "compiled"))], ids=lambda peer: peer.name
)
def test_formulas_take_the_same_step(peer: Peer, size: int, taken: list[peers._Batches]) -> None:
    """The formulas that are timed against ``functional`` in float64.

    Elements are below 1 and go through some dozens of float32 operations, each off by eps/2 = 6e-8; the compiled
    formula for 5x5 iterates from ||V^T V|| = 0.25, which two iterations take to 0.25^4 = 4e-3 at most.
    """
    workload = Workload("kernels", partial(networks.conv, 3, 4, size), ("*",))
    step = peer.step(workload)
    (weight,), (grad,) = taken[0].weights, taken[0].grads
    n, p = (size * size, 1) if peer.manifold == "sphere" else (size, size)
    x, g = (of.double().reshape(12, n, p).clone() for of in (weight, grad))
    step()
    wanted = functional.retr(peer.manifold, x, -0.1 * functional.proj(peer.manifold, x, g))
    tolerance = 4e-3 if (peer.name, size) == ("compiled stiefel", 5) else 5e-6
    assert (wanted - x).abs().max() > 0.1
    torch.testing.assert_close(weight.double().reshape(x.shape), wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_peers_step_every_weight_and_what_lies_on_no_manifold_too(peer: Peer, taken: list[peers._Batches]) -> None:
    if peer.name.startswith("geoopt"):
        pytest.importorskip("geoopt")
    step = peer.step(Workload("network", lambda: nn.Sequential(two_convolutions(), nn.BatchNorm2d(4)), ("*",)))
    weights = [weight.detach() for weight in (*taken[0].weights, *taken[0].others)]
    before = [weight.clone() for weight in weights]
    step()
    assert len(weights) == 2 + 2
    assert all((now != old).all() for now, old in zip(weights, before, strict=True))
    for batch in taken[0].weights:
        points = batch.detach().unsqueeze(-1) if peer.manifold == "sphere" else batch.detach()
        assert functional.violation(peer.manifold, points).max() < 1e-5


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_writes_what_it_measured_and_on_what(tiny: None, tmp_path: Path) -> None:
    threads, file = torch.get_num_threads(), tmp_path / "bench.json"
    arguments = ["--threads", "1", "--threads", "2", "--repeats", "3", "--json", str(file)]
    result = runner.invoke(app, ["bench", *arguments])
    assert result.exit_code == 0, result.output
    assert torch.get_num_threads() == threads
    written = json.loads(file.read_text())
    assert written["machine"]["torch"] == torch.__version__
    assert written["bandwidth"] == {count: {"copy": 10.0, "update": 15.0} for count in "12"}
    lines = written["results"]
    assert len(lines) == 3 * 2 * 2  # workloads, methods, threads
    for line in lines:
        low, high = line["ratio_quartiles"]
        assert low <= line["ratio"] <= high and line["turns"] == 3
        size, accesses = (2 if "16" in line["workload"] else 4), (3 if line["method"] == "PSI-SGD" else 5)
        assert line["bytes_per_element"] == size * accesses
        assert line["elements"] == 9 * int(line["workload"].split()[1]) ** 2
        assert line["baseline"] == ("itself, conv 2" if "16" in line["workload"] else "fused SGD")


def test_a_report_survives_the_file_and_is_shown_again(tiny: None, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    first = runner.invoke(app, ["bench", "--repeats", "2", "--threads", "1", "--json", str(file)])
    report = Report.read(file)
    report.write(tmp_path / "again.json")
    assert Report.read(tmp_path / "again.json") == report
    again = runner.invoke(app, ["bench", "--read", str(file)])
    assert again.exit_code == 0, again.output
    table = "\n".join(report.markdown())
    assert table in first.output and table in again.output
    assert table.startswith("| workload | sphere")
    file.write_text('{"results": []}')
    with pytest.raises(ValueError, match=r"bench\.json: wanted a report"):
        Report.read(file)


def test_plots_are_drawn_from_what_there_is(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "plots"
    by_formula = [peer for peer in PEERS if peer.name.startswith("eager")]
    monkeypatch.setattr(command, "usable", partial(selection.usable, by_formula))
    arguments = ["--repeats", "2", "--threads", "1", "--json", str(tmp_path / "bench.json"), "--plots", str(folder)]
    for more, wanted in (
        (["--workload", "conv 2"], {"ratios.png"}),
        (["--peers", "--method", "sphere", "--method", "eager*"], {"ratios.png", "peers.png", "throughput.png"}),
    ):
        result = runner.invoke(app, ["bench", *arguments, *more])
        assert result.exit_code == 0, result.output
        assert {path.name for path in folder.iterdir()} == wanted
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.iterdir())


def test_what_is_missing_is_told_and_left_out(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = replace(PEERS[0], missing=lambda: "no such package")
    monkeypatch.setattr(command, "usable", partial(selection.usable, [broken]))
    arguments = ["--repeats", "2", "--threads", "1", "--json", str(tmp_path / "bench.json")]
    result = runner.invoke(app, ["bench", "--peers", *arguments])
    assert result.exit_code == 0 and f"{broken.name}: left out: no such package" in result.output
    monkeypatch.setattr(plots, "missing", lambda: "plots: need matplotlib.")
    result = runner.invoke(app, ["bench", "--plots", str(tmp_path), *arguments])
    assert result.exit_code == 2 and "need matplotlib" in result.output


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--workload", "nothing"], "wanted patterns of"),
        (["--workload", "conv 2", "--method", "stiefel"], "wanted one that is measured on"),
        (["--backend", "gpu"], "wanted 'auto' or one of"),
        (["--device", "tpu"], "wanted 'cpu' or 'cuda', got 'tpu'"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_wrong_name_ends_the_command(tiny: None, arguments: list[str], complaint: str) -> None:
    result = runner.invoke(app, ["bench", *arguments], terminal_width=200)
    assert result.exit_code == 2 and complaint in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(tiny: None) -> None:
    result = runner.invoke(app, ["bench", "--device", "cuda"], terminal_width=200)
    assert result.exit_code == 2 and "device: wanted a GPU" in result.output


def test_a_peer_that_fails_is_told_and_left_out(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(workload: Workload, manifold: str) -> None:
        raise RuntimeError("no step")

    broken = replace(PEERS[0], make=fail, missing=lambda: None)
    monkeypatch.setattr(command, "usable", partial(selection.usable, [broken]))
    arguments = ["--peers", "--repeats", "2", "--threads", "1", "--json", str(tmp_path / "bench.json")]
    result = runner.invoke(app, ["bench", *arguments, "--workload", "conv 2", "--method", broken.name])
    assert result.exit_code == 0 and f"{broken.name} fails on conv 2: no step" in result.output
    assert Report.read(tmp_path / "bench.json").results == ()


def test_an_interruption_leaves_the_figures_so_far(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(case: Case, seconds: float, turns: int | None) -> Result:
        if case.method != "sphere":
            raise KeyboardInterrupt
        return measure(case, seconds, turns)

    monkeypatch.setattr(command, "measure", interrupted)
    file = tmp_path / "bench.json"
    result = runner.invoke(app, ["bench", "--repeats", "2", "--threads", "1", "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert [line.method for line in Report.read(file).results] == ["sphere"]


# --- measuring ----------------------------------------------------------------------------------------------------


def test_steps_take_turns_and_alternate_who_is_first() -> None:
    order: list[str] = []
    case = Case(KERNELS, "", "auto", 1, 5, lambda: lambda: order.append("own"), lambda: lambda: order.append("other"))
    result = measure(case, seconds=10.0, turns=4)
    timed = order[-8:]
    assert timed == ["other", "own", "own", "other"] * 2 and len(order) > 8
    assert result.turns == 4 and gc.isenabled()


def test_a_gpu_is_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its events, in milliseconds, lie round all steps of a row, which begins when earlier work is done."""
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("record")

        def synchronize(self) -> None:
            order.append("wait")

        def elapsed_time(self, end: "Event") -> float:
            return 2.0 * order.count("step")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    assert clock_of("cuda")(lambda: order.append("step")) == pytest.approx(2e-3)
    steps = order.count("step")
    assert steps > 1 and order == ["wait", "record", *["step"] * steps, "record", "wait"]


def test_weights_stay_what_they_are_over_a_long_run() -> None:
    """Neither denormal nor large numbers, which would have their own speed: 4,000 steps as in the longest case."""
    for method in METHODS:
        model = KERNELS.model()
        optimizer = method.optimizer(KERNELS, model, "auto")
        before = [weight.detach().norm() for weight in model.parameters()]
        for _ in range(4000):
            optimizer.step()
        for weight, norm in zip(model.parameters(), before, strict=True):
            assert abs(weight.detach().norm() / norm - 1) < 0.1
            for state in optimizer.state[weight].values():
                if state.is_floating_point() and state.numel() == weight.numel():
                    assert state.abs().median() > 1e-9, method.name
