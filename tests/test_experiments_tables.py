"""The experiments of ``bench``: sets of runs go on where they were, every method trains, sweeps find the best rate."""

import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from manifold_kernels.demo import data, training
from manifold_kernels.demo.data import Images
from manifold_kernels.demo.methods import FG, PSI, SWEPT, Method, regularised, select
from manifold_kernels.demo.training import Run, Training
from manifold_kernels.manifolds import Grassmann
from manifold_kernels.optim.base import ManifoldOptimizer

BENCH = Path(__file__).parent.parent / "bench"
SMALL = ["--epochs", "1", "--blocks", "1", "--width", "2", "--threads", "1", "--seeds", "2"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors of a few elements: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> Images:
    """Ten blurred classes that a network can tell apart at once."""
    centers = torch.randn(10, 1, 7, 7).repeat_interleave(4, 2).repeat_interleave(4, 3)
    labels = torch.arange(260) % 10
    pixels = centers[labels] + 0.3 * torch.randn(260, 1, 28, 28)
    found = Images(pixels[:200], labels[:200], pixels[200:], labels[200:])
    monkeypatch.setitem(data.SETS, "digits", lambda: found)
    return found


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch, images: Images) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("paper_tables")


def training_of(method: Method, images: Images, epochs: int = 8, width: int = 4) -> Training:
    return Training(method, images, epochs=epochs, blocks=1, width=width, seed=0)


def named(name: str) -> Method:
    (method,) = select(PSI + FG, [name])
    return method


# --- sets of runs -------------------------------------------------------------------------------------------------


def test_a_set_of_runs_goes_on_where_it_was(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[tuple[str, int]] = []

    def train(method: Method, images: Images, *, seed: int, **rest: object) -> Run:
        ran.append((method.name, seed))
        return training.train(method, images, seed=seed, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(tables, "train", train)
    arguments = [*SMALL, "--methods", "SGD", "PIO (Sp+Ob+St+Euc.)", "--output", str(tmp_path)]
    first = tables.main(arguments)
    shown = capsys.readouterr().out
    assert sorted(ran) == [("PIO (Sp+Ob+St+Euc.)", 0), ("PIO (Sp+Ob+St+Euc.)", 1), ("SGD", 0), ("SGD", 1)]
    assert (tmp_path / "digits" / "test-errors.png").read_bytes().startswith(b"\x89PNG")

    ran.clear()
    assert tables.main(arguments) == first
    again = capsys.readouterr().out
    assert ran == []
    assert again[again.index("digits,") :] == shown[shown.index("digits,") :]  # the table, to the last digit

    (tmp_path / "digits" / "sgd-1.json").unlink()
    line, _ = tables.main(arguments)
    assert ran == [("SGD", 1)]
    assert line.errors == first[0].errors  # the same seed, the same bits


def test_methods_are_chosen_by_their_own_names_with_the_regulariser_too(tables: ModuleType, tmp_path: Path) -> None:
    arguments = [*SMALL, "--regularizer", "--methods", "SGD", "PSI-SGD", "--output", str(tmp_path)]
    assert [line.method for line in tables.main(arguments)] == ["SGD, regularised", "PSI-SGD, regularised"]


def test_an_interrupted_set_leaves_no_half_file(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(method: Method, images: Images, **rest: object) -> Run:
        if rest["seed"] == 1:
            rest["after_batch"] = lambda run: (_ for _ in ()).throw(KeyboardInterrupt)
        return training.train(method, images, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(tables, "train", train)
    arguments = [*SMALL, "--methods", "SGD", "--output", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        tables.main(arguments)
    (kept,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert kept.name == "sgd-0.json"
    assert math.isfinite(Run(**json.loads(kept.read_text())["result"]).losses[0])


def test_a_file_is_replaced_as_a_whole_or_not_at_all(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = importlib.import_module("runs")
    path = tmp_path / "run.json"
    runs.save(path, {"lr": 1.0}, {"value": 1})

    def full(self: Path, text: str) -> int:
        with self.open("w") as file:
            file.write(text[:10])
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="no space left"):
            runs.save(path, {"lr": 1.0}, {"value": 2})
    assert list(tmp_path.iterdir()) == [path]
    assert runs.load(path, {"lr": 1.0}) == {"value": 1}


def test_runs_with_other_settings_are_not_mixed(tables: ModuleType, tmp_path: Path) -> None:
    arguments = [*SMALL, "--methods", "SGD", "--output", str(tmp_path)]
    tables.main(arguments)
    for other in (["--width", "3"], ["--train-images", "150"]):
        with pytest.raises(ValueError, match=r"sgd-0\.json: wanted a run with .* got one with .* delete the file"):
            tables.main([*arguments, *other])
    with pytest.raises(ValueError, match="methods: wanted patterns of"):
        tables.main([*SMALL, "--methods", "nothing", "--output", str(tmp_path)])


# --- sweeps -------------------------------------------------------------------------------------------------------


def test_a_sweep_picks_the_best_rate_without_the_test_images(
    tables: ModuleType, images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = set()

    def train(method: Method, seen: Images, *, seed: int, **_: object) -> Run:
        assert torch.equal(torch.cat([seen.train_images, seen.test_images]), images.train_images)
        assert torch.equal(torch.cat([seen.train_labels, seen.test_labels]), images.train_labels)
        seeds.add(seed)
        # Best at 3 for spheres. SGD has the same error at 0.1 and 0.3, and the lower loss at 0.1.
        best = {"Sp": {3.0: 1.0}, "SGD": {0.1: 2.0, 0.3: 2.0}}[method.name]
        return Run(method.name, [method.lr], [best.get(method.lr, 5.0)], [1.0])

    monkeypatch.setattr(tables, "train", train)
    arguments = [*SMALL, "--methods", "Sp", "SGD", "--output", str(tmp_path)]
    found = tables.main([*arguments, "--sweep"])
    assert {of.method: of.lr for of in found} == {"Sp": 3.0, "SGD": 0.1}

    reported = set()

    def report(method: Method, seen: Images, *, seed: int, **_: object) -> Run:
        assert seen is images
        reported.add(seed)
        return Run(method.name, [0.0], [method.lr], [1.0])

    monkeypatch.setattr(tables, "train", report)
    lines = tables.main([*arguments, "--rates", str(tmp_path / "digits" / "rates.json")])
    assert {of.method: of.lr for of in lines} == {"Sp": 3.0, "SGD": 0.1}
    assert len(seeds) == len(reported) == 2 and not seeds & reported
    with pytest.raises(ValueError, match="--rates: wanted a rate for 'Ob'"):
        tables.main([*SMALL, "--methods", "Ob", "--rates", str(tmp_path / "digits" / "rates.json")])


# --- methods ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [*PSI, *SWEPT, *map(regularised, PSI), *FG, regularised(FG[-1])], ids=lambda of: of.name
)
def test_every_method_lowers_the_loss_and_holds_its_constraint(method: Method, images: Images) -> None:
    of = training_of(method, images)
    losses = [of.epoch() for _ in range(8)]
    assert losses[-1] < 0.95 * losses[0]
    if isinstance(of.optimizer, ManifoldOptimizer):
        of.optimizer.check()  # to rounding
    constrained = isinstance(of.optimizer, ManifoldOptimizer) and not method.name.startswith("PSI")
    assert (of.violation() is not None) == constrained


def test_methods_have_names_of_their_own_and_find_their_files(tables: ModuleType) -> None:
    methods = [*PSI, *SWEPT, *FG, *map(regularised, PSI + SWEPT + FG)]
    files = {importlib.import_module("runs").file_name(method.name) for method in methods}
    assert len(files) == len(methods)
    published = {name for name in tables.PUBLISHED if not name.startswith("Euc.")}
    assert published < {method.name for method in methods}


def test_renormalised_kernels_have_the_scale_of_the_paper(images: Images) -> None:
    of = training_of(named("PIO (Sp+Ob+St), renormalised"), images)
    of.epoch()
    # [FG] Eq. 2 for the first layer: 9 weights into a neuron, 4 maps of 14 x 14, and lambda = 1 in the first epoch.
    scale = (9 + 4 * 14 * 14) ** -0.5
    norms = of.model.conv.weight.detach().double().norm(dim=(2, 3)).flatten() / scale
    # On spheres the norm is the scale, and three columns have it on the others; float32, eps = 1.2e-7.
    assert all(min(abs(norm - 1), abs(norm - math.sqrt(3))) < 1e-6 for norm in norms.tolist()), norms


def test_the_penalty_of_sgdg_keeps_filters_apart(images: Images) -> None:
    gram_errors = []
    for method in (named("SGD-G"), regularised(named("SGD-G"))):
        of = training_of(method, images)
        for _ in range(8):
            of.epoch()
        groups = [group for group in of.optimizer.param_groups if isinstance(group["manifold"], Grassmann)]
        rows = [weight.detach().flatten(1) for group in groups for weight in group["params"]]
        gram_errors.append(sum(float((row @ row.T - torch.eye(len(row))).square().sum()) for row in rows))
    assert gram_errors[1] < gram_errors[0]


def test_layers_with_more_filters_than_a_filter_has_elements_leave_the_grassmannian(images: Images) -> None:
    for width, free in ((8, False), (16, True)):  # the first convolution's filters have nine elements
        of = training_of(named("SGD-G"), images, width=width)
        groups = [group for group in of.optimizer.param_groups if isinstance(group["manifold"], Grassmann)]
        on_manifold = {id(weight) for group in groups for weight in group["params"]}
        assert (id(of.model.conv.weight) not in on_manifold) == free


# --- time of an epoch ---------------------------------------------------------------------------------------------


def test_epochs_of_all_methods_are_measured_in_every_round(tables: ModuleType, tmp_path: Path) -> None:
    epoch_time = importlib.import_module("epoch_time")
    size = ["--blocks", "1", "--width", "2", "--threads", "1", "--rounds", "2", "--train-images", "140"]
    results = epoch_time.main([*size, "--methods", "SGD", "PSI-SGD", "PI (*", "--output", str(tmp_path)])
    names = ["SGD, fused", "SGD", "PSI-SGD", "PI (Sp+Ob+St)", "PI (Sp+Ob+St+Euc.)"]
    assert [of.method for of in results] == names
    assert results[0].ratios(results[0]) == (1.0, 1.0, 1.0)
    assert all(len(of.seconds) == len(of.steps) == 2 and 0 < of.share < 1 for of in results)
    written = json.loads((tmp_path / "epoch-time.json").read_text())
    assert [written["result"][name]["seconds"] for name in names] == [list(of.seconds) for of in results]
    assert (tmp_path / "epoch-time.png").read_bytes().startswith(b"\x89PNG")


def test_ratios_are_taken_within_a_round(tables: ModuleType) -> None:
    """A machine that slows down between the rounds changes no ratio."""
    epoch_time = importlib.import_module("epoch_time")
    yardstick = epoch_time.Timed("a", (1.0, 2.0, 4.0, 3.0), (0.1,) * 4)
    assert epoch_time.Timed("b", (1.5, 3.0, 6.0, 4.5), (0.1,) * 4).ratios(yardstick) == (1.5, 1.5, 1.5)
