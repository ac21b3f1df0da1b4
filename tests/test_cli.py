"""The command line: what it prints, writes and with which status it ends, and the engines behind it."""

import gzip
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from manifold_kernels import ops, validate
from manifold_kernels import reference as reference_backend
from manifold_kernels.cli import app
from manifold_kernels.demo import data, methods, training
from manifold_kernels.demo.data import Images
from manifold_kernels.manifolds import MANIFOLDS
from manifold_kernels.validate import Case, Outcome

runner = CliRunner()


def test_info_names_versions_and_every_backend() -> None:
    result = runner.invoke(app, ["info"])
    assert result.exit_code == 0, result.output
    for wanted in (torch.__version__, torch.backends.cpu.get_cpu_capability(), *ops.backends()):
        assert wanted in result.output


def test_info_says_which_backend_is_used_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def said() -> str:
        return " ".join(runner.invoke(app, ["info"]).output.replace("│", " ").split())

    known = {"cuda": "there is no GPU", "triton": None, "cpu": None, "reference": None}
    monkeypatch.setattr(ops, "backends", lambda: known)
    monkeypatch.delenv("MANIFOLD_KERNELS_BACKEND", raising=False)
    assert "triton: the first of cuda, triton, reference that can be used" in said()
    assert "cpu: the first of cpu, reference that can be used" in said()
    monkeypatch.setenv("MANIFOLD_KERNELS_BACKEND", "reference")
    assert "reference: MANIFOLD_KERNELS_BACKEND says so" in said()


def test_info_tells_of_an_extension_built_with_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    extension = SimpleNamespace(build_info=lambda: {"compiler": "c++", "torch": "1.2.3"})
    monkeypatch.setitem(sys.modules, "manifold_kernels._C", extension)
    result = runner.invoke(app, ["info"], terminal_width=200)
    assert f"1.2.3, but {torch.__version__} is running: build it again" in " ".join(result.output.split())


# --- validate -----------------------------------------------------------------------------------------------------


def test_validate_passes_on_the_backends_that_are_present() -> None:
    result = runner.invoke(app, ["validate", "--quick"])
    assert result.exit_code == 0, result.output
    assert "reference: steps" in result.output and "FAILED" not in result.output
    assert all(f"{name}: " in result.output for name in ops.backends())  # checked, or why not


def test_validate_fails_where_a_backend_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(case: Case, backend: str) -> Outcome:
        return Outcome(error=math.inf if case.retraction == "cayley" else 0.1, limit=1.0)

    monkeypatch.setattr(validate, "run", run)
    result = runner.invoke(app, ["validate", "--quick"])
    assert result.exit_code == 1
    assert "FAILED" in result.output


def test_the_grid_reaches_every_retraction_dtype_and_layout() -> None:
    cases = list(validate.cases())
    assert {(case.manifold, case.retraction) for case in cases} == {
        (manifold.name, retraction) for manifold in MANIFOLDS for retraction in manifold.retractions
    }
    assert {case.dtype for case in cases} == set(validate.DTYPES)
    assert {case.layout for case in cases} == set(validate.LAYOUTS)
    assert {case.view for case in cases} == {"flat", "kernel", "filter", "matrix"}
    for manifold in MANIFOLDS:
        assert {case.individual for case in cases if case.manifold == manifold.name} == {False, True}


def test_a_spare_grid_reaches_the_same_and_is_short() -> None:
    cases, spare = list(validate.cases()), validate.spare()
    for name in ("label", "view", "dtype", "layout", "shape"):
        assert {getattr(case, name) for case in spare} == {getattr(case, name) for case in cases}
    assert set(spare) < set(cases) and len(spare) < len(cases) / 10


@pytest.mark.parametrize("case", list(validate.cases(quick=True)), ids=str)
def test_an_error_above_the_limit_is_seen(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of two ten-thousandths, of the step or of the momentum: nothing that one would notice in training."""

    def off(tensors_of: str) -> None:
        def step(params, grads, momenta, *rest):  # type: ignore[no-untyped-def]
            before = [param.clone() for param in params]
            reference_backend.step_(params, grads, momenta, *rest)
            if tensors_of == "weights":
                for param, old in zip(params, before, strict=True):
                    param.add_(param - old, alpha=2e-4)
            else:
                momenta[0].mul_(1 + 2e-4)

        monkeypatch.setattr(ops, "resolve", lambda backend, device: step)

    assert validate.run(case, "reference").passed
    for tensors_of in ("weights", "momentum"):
        off(tensors_of)
        assert not validate.run(case, "reference").passed, tensors_of


def test_steps_are_a_third_of_a_scale_long() -> None:
    """Long enough for retractions to differ: else their errors could not be seen."""
    lengths = []

    def step(params, grads, momenta, *rest):  # type: ignore[no-untyped-def]
        before = params[0].clone()
        reference_backend.step_(params, grads, momenta, *rest)
        lengths.append(float((params[0] - before).norm() / before.norm()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "resolve", lambda backend, device: step)
        for case in validate.cases(quick=True):
            if case.rule == "fg_sgd" and case.manifold != "euclidean":
                validate.run(case, "reference")
    assert all(0.05 < length < 0.6 for length in lengths), lengths


@pytest.mark.parametrize("kind", validate.QR_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_qr_ratios_of_lapack(kind: str, dtype: torch.dtype) -> None:
    for size in validate.QR_SIZES:
        assert validate.run_qr(kind, size, dtype, ops.automatic("cpu")).passed, size


def test_qr_ratios_see_a_wrong_sign_and_a_lost_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    a = validate.qr_matrices("random", (9, 4), torch.float64)
    q, r = torch.linalg.qr(a)
    sign = r.diagonal(dim1=-2, dim2=-1).sign()
    for wrong in ((q, r), (q * sign.unsqueeze(-2) * (1 + 1e-13), r * sign.unsqueeze(-1))):
        monkeypatch.setattr(validate.functional, "qr", lambda x, backend, wrong=wrong: wrong)
        assert not validate.run_qr("random", (9, 4), torch.float64, "reference").passed


# --- train --------------------------------------------------------------------------------------------------------


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> Images:
    """Ten blurred classes that a network can tell apart at once."""
    centers = torch.randn(10, 1, 7, 7).repeat_interleave(4, 2).repeat_interleave(4, 3)
    labels = torch.arange(260) % 10
    pixels = centers[labels] + 0.3 * torch.randn(260, 1, 28, 28)
    images = Images(pixels[:200], labels[:200], pixels[200:], labels[200:])
    monkeypatch.setitem(data.SETS, "digits", lambda: images)
    return images


def test_train_draws_curves_and_shows_every_method(tmp_path: Path, few_images: Images) -> None:
    small = ["--epochs", "2", "--blocks", "1", "--width", "4"]
    result = runner.invoke(app, ["train", *small, "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    for method in methods.METHODS:
        assert method.name in result.output
    assert (tmp_path / "train-digits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("method", methods.METHODS, ids=lambda method: method.name)
def test_every_method_learns_and_keeps_its_constraints(method: methods.Method, few_images: Images) -> None:
    run = training.train(method, few_images, epochs=30, blocks=1, width=4)
    assert run.losses[-1] < 0.5 * run.losses[0]
    assert (run.violation is not None) == (method.name == "FG-SGD")
    assert training.complaints([training.Run("SGD", [0.0], [100.0]), run]) == []


def test_check_complains_about_methods_that_do_not_learn_and_constraints_that_do_not_hold() -> None:
    good = training.Run("SGD", [0.1], [4.0], [1.0])
    assert training.complaints([good, training.Run("a", [0.1], [7.0], [1.0], violation=1e-6)]) == []
    assert len(training.complaints([good, training.Run("a", [0.1], [7.1], [1.0])])) == 1
    assert len(training.complaints([good, training.Run("a", [0.1], [math.nan], [1.0], violation=1e-3)])) == 2


def test_check_ends_with_an_error(tmp_path: Path, few_images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {"SGD": training.Run("SGD", [0.1], [4.0], [1.0])}
    bad = training.Run("bad", [2.3], [90.0], [1.0])
    monkeypatch.setattr("manifold_kernels.cli.train.run_training", lambda method, *_, **__: runs.get(method.name, bad))
    arguments = ["train", "--output", str(tmp_path)]
    assert runner.invoke(app, arguments).exit_code == 0
    assert runner.invoke(app, [*arguments, "--check"]).exit_code == 1


def test_fashion_reads_the_files_of_the_debian_package(tmp_path: Path) -> None:
    for part, count in (("train", 6), ("t10k", 3)):
        pixels = bytes(range(count)) * 784
        sizes = b"".join(size.to_bytes(4, "big") for size in (count, 28, 28))
        with gzip.open(tmp_path / f"{part}-images-idx3-ubyte.gz", "wb") as file:
            file.write(b"\x00\x00\x08\x03" + sizes + pixels)
        with gzip.open(tmp_path / f"{part}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(b"\x00\x00\x08\x01" + count.to_bytes(4, "big") + bytes(range(count)))
    images = data.fashion(tmp_path)
    assert images.train_images.shape == (6, 1, 28, 28) and images.test_images.shape == (3, 1, 28, 28)
    assert images.train_labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert images.train_images.mean().abs() < 1e-6 and abs(images.train_images.std() - 1) < 1e-5
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"\x00\x00\x0d\x01"))
    with pytest.raises(ValueError, match="wanted an IDX file"):
        data.fashion(tmp_path)


def test_fashion_says_which_package_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        data.fashion(tmp_path)


@pytest.mark.skipif(not data.FASHION.exists(), reason="the Debian package dataset-fashion-mnist is not installed")
def test_fashion_is_where_the_package_puts_it() -> None:
    images = data.fashion()
    assert images.train_images.shape == (60000, 1, 28, 28)
    assert images.test_labels.bincount().tolist() == [1000] * 10
