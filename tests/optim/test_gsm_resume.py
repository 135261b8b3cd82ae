"""A training run that is killed and resumed gives the bits of one that was not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastprune.optim import GSM, prunable_groups

ROOT = Path(__file__).parent.parent.parent
STEPS, EVERY = 60, 10


def train(checkpoint: Path, seconds_per_step: float = 0.0) -> dict[str, Any]:
    """Starts anew or from the checkpoint; data of a step depend on its number alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4)).bfloat16()
    optimizer = GSM(prunable_groups(model), 0.1, momentum=0.9, sparsity=0.8)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    start = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        start = saved.pop("step")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    for step in range(start, STEPS):
        random = torch.Generator().manual_seed(step)
        x = torch.randn(16, 12, generator=random).bfloat16()
        loss = F.cross_entropy(model(x).float(), torch.randint(4, (16,), generator=random))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % EVERY == 0:
            new = checkpoint.with_suffix(".new")
            torch.save({"step": step + 1, **{n: p.state_dict() for n, p in parts.items()}}, new)
            os.replace(new, checkpoint)  # a kill leaves the old one or the new one, never half
        time.sleep(seconds_per_step)
    return {name: part.state_dict() for name, part in parts.items()}


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def test_kill_and_resume(tmp_path: Path) -> None:
    expected = train(tmp_path / "whole.pt")
    checkpoint = tmp_path / "killed.pt"
    command = [sys.executable, "-m", "tests.optim.test_gsm_resume", str(checkpoint)]
    process = subprocess.Popen(command, cwd=ROOT)
    deadline = time.monotonic() + 50
    while not checkpoint.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 0 < torch.load(checkpoint)["step"] < STEPS
    assert_same(train(checkpoint), expected)


if __name__ == "__main__":
    train(Path(sys.argv[1]), seconds_per_step=0.05)
