"""The picture of a posterior: what is drawn, and the quantiles behind it."""

from pathlib import Path
from typing import Any

import pytest
import torch

import fastprune as fp
from fastprune.reporting import plot_posterior, posterior
from fastprune.reporting.posterior import credible_interval

pytest.importorskip("matplotlib")


def ranks() -> fp.DirichletRanks:
    return fp.DirichletRanks(
        {"conv": torch.tensor([1.0, 4.0, 0.5, 2.0]), "fc": torch.tensor([3.0, 3.0])}
    )


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were made."""
    figures: list[Any] = []
    plain = posterior.figure

    def figure(*arguments: Any, **options: Any) -> Any:
        made = plain(*arguments, **options)
        figures.append(made[0])
        return made

    monkeypatch.setattr(posterior, "figure", figure)
    return figures


def test_quantiles_worked_by_hand() -> None:
    """Of two channels: Beta(1, 1) is uniform, Beta(2, 1) has x^2 for its distribution function."""
    low, high = credible_interval(torch.tensor([1.0, 1.0]), 0.95)
    torch.testing.assert_close(low, torch.full((2,), 0.025, dtype=torch.float64), rtol=1e-4, atol=0)
    torch.testing.assert_close(high, 1 - low, rtol=1e-5, atol=0)
    low, high = credible_interval(torch.tensor([2.0, 1.0]), 0.5)
    root = torch.tensor([0.25, 0.75], dtype=torch.float64).sqrt()
    torch.testing.assert_close(torch.stack([low[0], high[0]]), root, rtol=1e-4, atol=0)


@pytest.mark.parametrize("scale", [0.01, 0.1, 1.0, 30.0, 1e5])
@pytest.mark.parametrize("level", [0.5, 0.95])
def test_quantiles_are_those_of_the_beta_distribution(scale: float, level: float) -> None:
    beta = pytest.importorskip("scipy.stats").beta
    a = torch.rand(64, generator=torch.Generator().manual_seed(0)).double() * scale + 0.01
    b = a.sum() - a
    expected = [
        torch.from_numpy(beta.ppf(p, a.numpy(), b.numpy()))
        for p in ((1 - level) / 2, (1 + level) / 2)
    ]
    # Channels that are nearly off or nearly alone have tails longer than the grid is fine.
    atol = 2e-3 if scale < 0.1 else 1e-5
    for ours, wanted in zip(credible_interval(a, level), expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=5e-3, atol=atol)


def test_means_are_drawn_in_order_and_the_kept_ones_marked(
    drawn: list[Any], tmp_path: Path
) -> None:
    found = ranks()
    plot_posterior(found, tmp_path / "posterior.png", counts={"conv": 3}, title="a network")
    assert (tmp_path / "posterior.png").read_bytes()[:4] == b"\x89PNG"
    conv, fc = drawn[0].axes
    assert (conv.get_title(), fc.get_title()) == ("conv: 3 of 4 kept", "fc")
    points = {line.get_label(): line.get_xydata().tolist() for line in conv.lines}
    # 4, 2, 1, 0.5 of 7.5 in total, times 4 channels.
    assert points["mean, kept"] == [
        [1, pytest.approx(16 / 7.5)], [2, pytest.approx(8 / 7.5)], [3, pytest.approx(4 / 7.5)]
    ]  # fmt: skip
    assert points["mean, pruned"] == [[4, pytest.approx(2 / 7.5)]]
    low, high = (
        bound[found["conv"]] * 4 for bound in credible_interval(found.concentration["conv"], 0.95)
    )
    ends = [s.tolist() for c in conv.collections for s in c.get_segments()]
    for i, ((_, bottom), (_, top)) in enumerate(ends):
        assert (bottom, top) == (pytest.approx(float(low[i])), pytest.approx(float(high[i])))
    assert conv.get_xlabel() == fc.get_xlabel() == "channel, the most important first"
    assert drawn[0].get_supylabel().startswith("switch")


def test_layers_can_be_chosen(drawn: list[Any], tmp_path: Path) -> None:
    plot_posterior(ranks(), tmp_path / "one.png", layers=["fc"])
    assert [panel.get_title() for panel in drawn[0].axes] == ["fc"]


def test_more_layers_than_a_row_holds(drawn: list[Any], tmp_path: Path) -> None:
    many = fp.DirichletRanks({f"layer{i}": torch.ones(2 + i) for i in range(6)})
    plot_posterior(many, tmp_path / "many.png", counts=many.counts(ratio=0.5))
    assert len(drawn[0].axes) == 6


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": ["head"]}, ValueError, "layers must name entries.*'conv', 'fc'.*got 'head'"),
        ({"layers": []}, ValueError, "at least one layer"),
        ({"level": 1.0}, ValueError, "level must be between 0 and 1, got 1.0"),
    ],
)
def test_what_is_wrong_is_said(
    options: dict[str, Any], error: type, message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        plot_posterior(ranks(), tmp_path / "none.png", **options)
    assert not list(tmp_path.iterdir())


def test_something_else_than_ranks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"ranks must be what fp\.dirichlet returns, got dict"):
        plot_posterior({"conv": torch.ones(3)}, tmp_path / "none.png")  # type: ignore[arg-type]
