"""The demonstration: exact counts, the same result twice, and no more than is true."""

import builtins
import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastprune.masks import num_kept
from fastprune.optim.decay import passive_residual
from fastprune.train import accuracy, dirichlet_demo, gsm_demo, load_digits, train
from fastprune.train.console import arrow, bar
from fastprune.train.demo import METHODS, SPARSITIES, DemoResult, Epochs, digits_cnn, run_demo

SHORT: dict[str, Any] = {
    "epochs": 2,
    "of_parts": Epochs(gsm=2, aswl=6, sdprun=15, dirichlet=3, initial=3),
    "seed": 3,
    "shapes": [(64, 64)],
}


@pytest.fixture(scope="module")
def printed() -> tuple[DemoResult, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        result = run_demo(**SHORT)
    return result, out.getvalue()


@pytest.fixture(scope="module")
def result(printed: tuple[DemoResult, str]) -> DemoResult:
    return printed[0]


def test_the_network_learns_and_every_row_has_its_exact_count(result: DemoResult) -> None:
    assert result.dense_accuracy > 0.9
    assert [(r.method, r.asked) for r in result.rows] == [
        (method, sparsity) for method in METHODS for sparsity in SPARSITIES
    ]
    for row in result.rows:
        _, block = METHODS[row.method]
        if block == (1, 1):
            assert row.masks.num_kept == num_kept(row.asked, 25_744)
        assert abs(row.masks.sparsity - row.asked) < 0.02
    by_method = {m: [r.accuracy for r in result.rows if r.method == m] for m in METHODS}
    assert all(found[0] > found[-1] for found in by_method.values())


def test_gsm_rows_have_their_exact_count_and_are_printed(
    printed: tuple[DemoResult, str],
) -> None:
    result, out = printed
    assert [r.asked for r in result.gsm] == [0.9, 0.95, 0.975]
    for row in result.gsm:
        assert row.num_kept == num_kept(row.asked, 25_744) and f"{row.num_kept:,}" in out
        assert f"GSM, {row.asked:.1%} zeros: 2 epochs" in out
        assert row.dense == result.dense_accuracy


def test_aswl_and_magnitude_share_the_same_zeros(printed: tuple[DemoResult, str]) -> None:
    result, out = printed
    assert [r.method for r in result.aswl] == ["ASWL", "global magnitude", "uniform magnitude"]
    assert [r.masks.num_kept for r in result.aswl[:2]] == [num_kept(0.9, 25_744)] * 2
    assert result.aswl[0].accuracy > result.aswl[2].accuracy
    assert all(f"{r.accuracy:.1%}" in out for r in result.aswl)
    shares = [layer.sparsity for layer in result.aswl[0].masks.layers.values()]
    assert max(shares) - min(shares) > 0.1


def test_sparse_inference_ends_the_demonstration(printed: tuple[DemoResult, str]) -> None:
    result, out = printed
    assert [row.images for row in result.sparse] == [1, 16]
    for row in result.sparse:
        assert row.dense > 0 and f"{row.now:.3f}" in out
    assert out.index("by fp.sparsify") > out.index("torch.cat + kthvalue")


def test_sdprun_removes_channels_and_nothing_else(printed: tuple[DemoResult, str]) -> None:
    result, out = printed
    found = result.sdprun
    assert found.accuracy == found.compacted_accuracy > 0.9
    before, after = found.channels["conv3"]
    assert before == 64 and after < 64
    widths = [found.channels[f"conv{i}"][1] for i in (1, 2, 3)]
    assert found.parameters == (25_978, parameters_of(*widths))
    assert found.bytes[0] - found.bytes[1] >= 4 * (25_978 - found.parameters[1])
    assert f"{found.parameters[1]:,}" in out and "conv3" in out


def test_dirichlet_pruning_and_its_table(printed: tuple[DemoResult, str]) -> None:
    result, out = printed
    found = result.dirichlet
    before, after = zip(*found.channels.values(), strict=True)
    assert list(found.channels) == ["conv1", "conv2", "conv3"] and before == (16, 32, 64)
    assert found.parameters == (25_978, parameters_of(*after))
    assert 0.38 < found.parameters[1] / 25_978 <= 0.4
    assert found.dense_accuracy == result.dense_accuracy
    assert found.accuracy > 0.9 > found.pruned_accuracy
    shown = f" {arrow()} ".join(
        f"{x:.1%}" for x in (found.dense_accuracy, found.pruned_accuracy, found.accuracy)
    )
    assert shown in out and f"{found.parameters[1]:,}" in out


def test_pictures_of_the_ranked_channels(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    digits, folder = load_digits(0), tmp_path / "a" / "b"
    dirichlet_demo.prune_by_dirichlet(digits_cnn(), digits, 1, 0, folder)
    names = ["dirichlet_feature_maps.png", "dirichlet_posterior.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in folder.iterdir())


def test_pruned_before_training(printed: tuple[DemoResult, str]) -> None:
    result, out = printed
    assert [row.method for row in result.initial] == ["ProsPr", "SNIP", "random"]
    for row in result.initial:
        assert row.num_kept == num_kept(0.98, 25_744) and f"{row.accuracy:.1%}" in out
    assert result.initial[0].accuracy > result.initial[2].accuracy


def parameters_of(first: int, second: int, third: int) -> int:
    convolutions = 9 * (first + first * second + second * third)
    return convolutions + 2 * (first + second + third) + 4 * third * 10 + 10


def test_the_schedule_of_the_demo_decays_passive_weights() -> None:
    steps = Epochs().gsm * 22

    def lr(step: int) -> float:
        return gsm_demo.LR * 0.1 ** ((step >= steps * 6 // 10) + (step >= steps * 8 // 10))

    left = passive_residual(steps, lr, gsm_demo.MOMENTUM, gsm_demo.WEIGHT_DECAY)
    assert left < 0.01


def test_the_same_seed_gives_the_same_rows(result: DemoResult) -> None:
    again = run_demo(**SHORT)
    assert again.dense_accuracy == result.dense_accuracy
    assert again.gsm == result.gsm
    assert again.initial == result.initial
    assert again.dirichlet.channels == result.dirichlet.channels
    assert again.dirichlet.accuracy == result.dirichlet.accuracy
    assert again.sdprun.channels == result.sdprun.channels
    assert again.sdprun.accuracy == result.sdprun.accuracy
    for row, same in zip(result.rows, again.rows, strict=True):
        assert row.masks == same.masks and row.accuracy == same.accuracy


def test_what_is_printed(printed: tuple[DemoResult, str]) -> None:
    result, out = printed
    assert out.startswith("training a small CNN on 1,400 digits: 2 epochs, loss ")
    for row in result.rows:
        assert f"{row.masks.num_kept:,}" in out
        assert f"{result.dense_accuracy:.1%} {arrow()} {row.accuracy:.1%}" in out
    assert "torch.cat + kthvalue" in out and "x as fast" in out
    assert "These zeros are written, not removed" in out
    assert "select_threshold" in out
    tables = out.split("Exact threshold")[0]
    assert max(map(len, tables.splitlines()[1:])) <= 80


def test_digits_are_split_once_each_and_by_the_seed() -> None:
    digits = load_digits(0)
    assert [len(t) for t in digits] == [1400, 1400, 397, 397]
    assert digits.train_images.shape[1:] == (1, 8, 8)
    everything = torch.cat([digits.train_images, digits.test_images])
    other = load_digits(1)
    shuffled = torch.cat([other.train_images, other.test_images])
    assert not torch.equal(everything, shuffled)
    assert torch.equal(*(t.flatten(1).sum(1).sort().values for t in (everything, shuffled)))
    assert (float(everything.min()), float(everything.max())) == (0.0, 1.0)
    assert torch.equal(load_digits(0).test_labels, digits.test_labels)


def test_missing_scikit_learn_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_sklearn(name: str, *args: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real_import(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        load_digits()


def test_a_training_step_is_that_of_the_optimizer_and_the_last_batch_counts() -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])
    model = nn.Linear(3, 2)
    expected = nn.Linear(3, 2)
    expected.load_state_dict(model.state_dict())
    losses = train(
        model, torch.optim.SGD(model.parameters(), 0.1), images, labels, epochs=1, batch_size=3
    )
    order = torch.randperm(5, generator=torch.Generator().manual_seed(0))
    optimizer, total = torch.optim.SGD(expected.parameters(), 0.1), 0.0
    for batch in (order[:3], order[3:]):
        loss = nn.functional.cross_entropy(expected(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(batch)
    assert torch.equal(model.weight, expected.weight)
    assert losses == pytest.approx([total / 5])


def test_accuracy_evaluates_and_puts_the_mode_back() -> None:
    images, labels = torch.eye(4), torch.tensor([0, 1, 2, 0])
    model = nn.Sequential(nn.Dropout(1.0), nn.Identity())
    assert accuracy(model, images, labels, batch_size=3) == 0.75
    assert model.training


def test_the_network_has_the_size_its_docstring_says() -> None:
    assert sum(p.numel() for p in digits_cnn().parameters() if p.dim() > 1) == 25_744


@pytest.mark.parametrize(
    ("fraction", "text"), [(0, "····"), (1, "████"), (0.5, "██··"), (0.001, "▏···")]
)
def test_bars(fraction: float, text: str) -> None:
    assert bar(fraction) == text
