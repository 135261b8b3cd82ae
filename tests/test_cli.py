"""The command line, as a person calls it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fastprune as fp
from fastprune import cli


def test_info_prints_the_build_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out == f"fastprune {fp.__version__}\n{fp.build_info()}\n"


def test_demo_hands_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(cli, "run_demo", lambda **options: given.update(options))
    assert cli.main(["demo", "--epochs", "3", "--seed", "7"]) == 0
    assert given == {"epochs": 3, "seed": 7, "pictures": None}
    assert cli.main(["demo", "--pictures", "there"]) == 0
    assert given == {"epochs": 10, "seed": 0, "pictures": Path("there")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["prune-it"], "invalid choice: 'prune-it'"),
        (["demo", "--epochs", "0"], "expected a positive number, got 0"),
        (["demo", "--epochs", "many"], "invalid"),
    ],
)
def test_wrong_usage_exits_with_2_and_a_reason(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_python_dash_m_works_and_output_without_unicode_does_too() -> None:
    call = [sys.executable, "-m", "fastprune", "--version"]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    assert done.stdout == f"fastprune {fp.__version__}\n"
    code = "from fastprune.train.console import arrow, bar; print(arrow(), bar(0.5))"
    done = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONIOENCODING": "ascii", "PYTHONPATH": ":".join(filter(None, sys.path))},
    )
    assert done.stdout == "-> ##..\n"
