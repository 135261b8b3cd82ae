"""The comparison with dense engines: nothing wrong is timed, rows and pictures are right."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import inference, inference_rivals, results
from bench.inference_rivals import Engine, MissingError, Setting
from fastprune.reporting.pictures import break_even, plot_speed

pytest.importorskip("torchvision")
TINY = ["--model", "resnet18", "--image", "32", "--rounds", "3", "--threads", "1"]


@pytest.fixture(autouse=True)
def threads_put_back(threads: None) -> None: ...


def test_a_run_prints_and_saves_rows_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DEEPSPARSE_PYTHON", raising=False)
    picture = tmp_path / "speed.png"
    save = ["--save", "--results", str(tmp_path), "--picture", str(picture), "--layers"]
    options = [*TINY, "--sparsity", "0.5", "0.95", "--rivals", "torch eager", "DeepSparse", *save]
    assert inference.main(options) == 0
    said = capsys.readouterr().out
    assert "DeepSparse: not timed, give --deepsparse-python" in said
    assert "resnet18, sparsity 0.95, batch 1, threads 1" in said
    (rows_file,) = tmp_path.glob("*-inference.csv")
    rows = results.read(rows_file)
    assert [row["candidate"] for row in rows] == ["fastprune", "torch eager"] * 2
    assert [row["sparsity"] for row in rows] == ["0.5"] * 2 + ["0.95"] * 2
    for row in rows:
        assert float(row["largest_error"]) < 1e-3 and row["rounds"] == "3"
    eager = float(rows[1]["median_ms"]) / float(rows[0]["median_ms"])
    assert float(rows[0]["speed_over_best_dense"]) == pytest.approx(eager, rel=0.01)
    (layers_file,) = tmp_path.glob("*-inference-layers.csv")
    layers = results.read(layers_file)
    assert "64-64 3x3/1 @8" in [row["layer"] for row in layers]
    assert sum(int(row["count"]) for row in layers) == 2 * 21
    assert picture.read_bytes()[:4] == b"\x89PNG"


def setting(tmp_path: Path) -> Setting:
    model = inference.pruned("resnet18", 0.9, 32)
    return Setting(model, torch.randn(8, 2, 3, 32, 32), 1, "wall", tmp_path, None)


@pytest.mark.parametrize("name", ["ONNX Runtime", "OpenVINO", "torch eager"])
def test_a_rival_gives_the_models_outputs(name: str, tmp_path: Path) -> None:
    given = setting(tmp_path)
    try:
        with torch.no_grad(), inference_rivals.RIVALS[name](given) as engine:
            for i in (0, 5):
                output, seconds = engine.run(i)
                assert inference.error(given.model(given.inputs[i]), output) < 1e-4
                assert seconds > 0
    except MissingError as why:
        pytest.skip(str(why))


def test_a_rival_of_another_interpreter_is_asked_line_by_line(tmp_path: Path) -> None:
    """With a module that looks like deepsparse and doubles its input."""
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "deepsparse.py").write_text(
        "class Engine:\n"
        "    def __init__(self, model, batch_size, num_cores):\n"
        "        assert batch_size == 2 and num_cores == 1\n"
        "    def run(self, inputs):\n"
        "        return [inputs[0] * 2]\n"
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={fake} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    given = setting(tmp_path)
    given = Setting(*(*vars(given).values(),)[:-1], str(python))
    (tmp_path / "batch2.onnx").touch()
    with inference_rivals.deepsparse(given) as engine:
        for i in (3, 0):
            output, seconds = engine.run(i)
            assert torch.equal(output, given.inputs[i] * 2) and 0 < seconds < 1
    broken = Setting(*(*vars(given).values(),)[:-1], "/bin/false")
    with pytest.raises(MissingError, match="does not start"), inference_rivals.deepsparse(broken):
        pass


def engine(value: float) -> Engine:
    return Engine(lambda i: (torch.tensor([value, 1.0]), 0.001))


def test_a_wrong_engine_is_taken_out_and_our_own_stops_the_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = [torch.tensor([1.0, 1.0])]
    engines: Any = {"fastprune": engine(1.0), "right": engine(1.0005), "wrong": engine(1.1)}
    assert set(inference.check(engines, expected)) == set(engines) == {"fastprune", "right"}
    assert "wrong: REFUSED" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="fastprune is wrong"):
        inference.check({"fastprune": engine(torch.nan)}, expected)


def test_ratios_are_against_the_fastest_dense_engine_in_float32() -> None:
    seconds = {"fastprune": [2.0] * 3, "a": [4.0] * 3, "b": [5.0] * 3, "bf16": [1.0] * 3}
    engines = {
        "fastprune": Engine(engine(1).run, "ours"),
        "a": engine(1),
        "b": engine(1),
        "bf16": Engine(engine(1).run, "16-bit rival"),
    }
    samples = inference.timing.Samples(seconds, rounds=3)
    rows = inference.rows_of(engines, samples, dict.fromkeys(engines, 0.0), "wall")
    speeds = {row["candidate"]: float(row["speed_over_best_dense"]) for row in rows}
    assert speeds == {"fastprune": 2.0, "a": 1.0, "b": 0.8, "bf16": 4.0}


def test_layers_that_are_alike_are_added() -> None:
    class Report:
        layers = (
            inference.fp.deploy.LayerKernel("a", 0.9, "rows", 1.0, 4.0),
            inference.fp.deploy.LayerKernel("b", 0.9, "generated", 2.0, 5.0),
            inference.fp.deploy.LayerKernel("c", 0.0, "dense", 3.0, 3.0),
        )

    first, second = inference.layer_rows(Report, {"a": "same", "b": "same"})
    assert (first["count"], first["kernel"], first["ratio"]) == (2, "generated+rows", "3.00")
    assert (second["layer"], second["ratio"]) == ("c", "1.00")


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(0.5, 0.5), (0.9, 1.5)], 0.7),
        ([(0.9, 3.0), (0.6, 0.8), (0.7, 1.2)], 0.65),
        ([(0.5, 1.2), (0.6, 0.9), (0.8, 1.1)], 0.7),  # the last crossing
        ([(0.8, 1.5), (0.9, 2.0)], None),
        ([(0.8, 0.5)], None),
    ],
)
def test_break_even(points: list[tuple[float, float]], expected: float | None) -> None:
    found = break_even(points)
    assert found is None if expected is None else found == pytest.approx(expected)


def test_the_picture_names_the_break_even(tmp_path: Path) -> None:
    plot_speed({"batch 1": [(0.9, 2.0), (0.5, 0.5)]}, tmp_path / "a.svg")
    assert "faster from 63% on" in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize(
    "options", [["--sparsity", "90"], ["--clock", "process", "--threads", "2"]]
)
def test_impossible_options_are_refused(options: list[str]) -> None:
    with pytest.raises(SystemExit):
        inference.parse(options)
