"""Feature maps of the most and the least important channels."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastprune as fp
from fastprune.reporting import feature_maps, plot_feature_maps

pytest.importorskip("matplotlib")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Dropout(), nn.Flatten(),
        nn.Linear(6 * 36, 5), nn.Linear(5, 2),
    ).train()  # fmt: skip


def images() -> Tensor:
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def ranks() -> fp.DirichletRanks:
    return fp.DirichletRanks(
        {"0": torch.tensor([3.0, 1.0, 6.0, 0.5, 2.0, 4.0]), "5": torch.ones(5)}
    )


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The panels of the figures that were made."""
    figures: list[Any] = []
    plain = feature_maps.figure

    def figure(*arguments: Any, **options: Any) -> Any:
        made = plain(*arguments, **options)
        figures.append(made[1])
        return made

    monkeypatch.setattr(feature_maps, "figure", figure)
    return figures


def map_of(panel: Any) -> Tensor:
    return torch.as_tensor(panel.images[0].get_array().data)


@pytest.mark.parametrize("module", [None, "1", "2"])
def test_the_maps_are_those_of_the_channels(
    module: str | None, drawn: list[Any], tmp_path: Path
) -> None:
    model, x = network(), images()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    path = tmp_path / "maps.png"
    plot_feature_maps(model, ranks(), x, path, layer="0", count=2, examples=2, module=module)
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert model.training and model[1].training and not model[0]._forward_hooks
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with torch.no_grad():
        expected = model.eval()[: int(module or 0) + 1](x)
    assert drawn[0].shape == (2, 5)
    for example, row in enumerate(drawn[0]):
        assert row[0].get_ylabel() == f"image {example}"
        colours = {panel.images[0].get_clim() for panel in row[1:]}
        assert len(colours) == 1 and sum(colours.pop()) == 0
        for panel, channel in zip(row[1:], (2, 5, 1, 3), strict=True):
            torch.testing.assert_close(map_of(panel), expected[example, channel])
    titles = [panel.get_title().splitlines() for panel in drawn[0][0]]
    assert titles[0] == ["input"]
    # 6 of 16.5 in total, times 6 channels.
    assert titles[1] == ["most important", "channel 2", "switch 2.18"]
    assert titles[2] == ["channel 5", "switch 1.45"]
    assert titles[3][:2] == ["least important", "channel 1"] and titles[4][0] == "channel 3"


def test_fewer_channels_and_images_than_asked(drawn: list[Any], tmp_path: Path) -> None:
    plot_feature_maps(network(), ranks(), images(), tmp_path / "maps.png", layer="0", count=9)
    assert drawn[0].shape == (3, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "head"}, "layer must be one of .*'0', '5'.*, got 'head'"),
        ({"layer": "5"}, r"5 must give maps \[N, 5, H, W\] to be shown, it gives \(3, 5\)"),
        ({"layer": "0", "module": "4"}, r"4 must give maps \[N, 6, H, W\]"),
        ({"layer": "0", "count": 0}, "count must be at least 1, got 0"),
        ({"layer": "0", "examples": 0}, "examples must be at least 1, got 0"),
    ],
)
def test_what_is_wrong_is_said(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = network()
    with pytest.raises(ValueError, match=message):
        plot_feature_maps(model, ranks(), images(), tmp_path / "none.png", **options)
    assert not list(tmp_path.iterdir()) and model.training
