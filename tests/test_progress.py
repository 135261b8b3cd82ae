"""Progress: a bar on a terminal, one line or nothing elsewhere."""

import io
from typing import Any

import pytest
import torch.nn.functional as F

import fastprune as fp
from fastprune.progress import Progress

from .methods.networks import network


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def advanced(*arguments: Any, **options: Any) -> None:
    with Progress(*arguments, **options) as progress:
        for i in range(3):
            progress.advance(f"loss {i}")


def test_one_line_of_what_has_a_unit(capsys: pytest.CaptureFixture[str]) -> None:
    advanced("training", 3, "epochs")
    assert capsys.readouterr().out.startswith("training: 3 epochs, loss 2, ")
    advanced("scoring", 3)
    assert capsys.readouterr().out == ""


def test_a_bar_on_a_terminal_unless_it_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    advanced("scoring", 3)
    assert "scoring" in terminal.getvalue() and "3/3" in terminal.getvalue()
    model, batches, _ = network("mlp")
    fp.prospr(model, batches, F.cross_entropy, 0.5, steps=2)
    assert "ProsPr" in terminal.getvalue() and "5/5" in terminal.getvalue()
    written = terminal.getvalue()
    fp.prospr(model, batches, F.cross_entropy, 0.5, progress=False)
    assert terminal.getvalue() == written


def test_an_error_prints_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), Progress("training", 3, "epochs"):
        raise RuntimeError
    assert capsys.readouterr().out == ""
