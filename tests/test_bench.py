"""The benchmark harness: it must not time a wrong answer, miscount bytes or lose rows."""

import dataclasses
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bench import (
    cases,
    evidence,
    floor,
    gpu_check,
    gpu_parts,
    inference,
    memory,
    results,
    run,
    shapes,
    timing,
)
from bench.case import OURS, Case, WrongAnswerError
from bench.experiment import SkippedError
from bench.gpu_check import FAILED, MISSING, PASSED, TIMEOUT, Command, Stage

TINY = "select_threshold/tiny/fp32"


@pytest.fixture(autouse=True)
def same_number_of_threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def tiny(**changes: Any) -> Case:
    return dataclasses.replace(cases.all_cases()[TINY], **changes)


# Shapes and cases


def test_resnet50_has_its_161_tensors() -> None:
    listed = shapes.resnet50()
    assert (len(listed), shapes.count(listed)) == (161, 25_557_032)
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        assert listed == [tuple(p.shape) for p in models.resnet50().parameters()]


@pytest.mark.parametrize(
    ("name", "per_element"),
    [
        ("select_threshold/resnet50/fp32", 8),
        ("select_threshold.magnitude/resnet50/fp32", 4),
        ("select_threshold/resnet50/bf16", 4),
        ("select_masks/resnet50/fp32", 9),
    ],
)
def test_a_case_counts_its_bytes(name: str, per_element: int) -> None:
    assert cases.all_cases()[name].bytes_moved == per_element * 25_557_032


@pytest.mark.parametrize("name", [n for n in cases.all_cases() if "/tiny/" in n])
def test_every_candidate_is_right_on_tiny_inputs(name: str) -> None:
    case = cases.all_cases()[name]
    inputs = case.make(torch.device("cpu"), 3)
    read = sum(t.nbytes for t in case.reads(inputs))
    assert case.bytes_moved >= read
    assert run.checked(case, inputs, "cpu", "wall").keys() == case.candidates("cpu").keys()


def test_large_cases_have_a_tiny_twin_and_other_globs_find_nothing() -> None:
    assert all(case.label != "tiny" for case in cases.matching(None, "cpu"))
    assert cases.matching("nothing*", "cpu") == []
    assert [c.name for c in cases.matching(TINY, "cpu")] == [TINY]


# A wrong answer is not timed


def off_by_one(inputs: Any) -> Any:
    right = cases.all_cases()[TINY].function(inputs)
    return lambda: (answer := right())._replace(tie_end=answer.tie_end + 1)


def test_a_wrong_answer_refuses_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("timed a wrong answer")

    monkeypatch.setattr(timing, "measure", never)
    with pytest.raises(WrongAnswerError, match=r"tie_end\[0\]"):
        run.run_case(tiny(function=off_by_one))
    with pytest.raises(WrongAnswerError, match="broken is wrong"):
        run.run_case(tiny(rivals={"broken": lambda inputs: lambda: torch.tensor(1.0)}))


def test_the_runner_says_refused_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tiny(function=off_by_one)
    monkeypatch.setattr(cases, "matching", lambda pattern, device: [wrong])
    assert run.main(["--threads", "1"]) == 1
    assert "REFUSED" in capsys.readouterr().out


def test_one_wrong_mask_element_is_seen() -> None:
    case = cases.all_cases()["select_masks/tiny/fp32"]
    inputs = case.make(torch.device("cpu"), 0)
    expected, answer = case.expect(inputs), case.function(inputs)()
    answer[0].view(-1)[5] ^= True
    with pytest.raises(WrongAnswerError, match="1 of"):
        case.check(expected, answer)


# Timing


def fake(order: list[str], name: str, seconds: list[float]) -> timing.Timed:
    left = iter(seconds)

    def sample() -> float:
        order.append(name)
        return next(left)

    return timing.Timed(lambda: None, sample, "wall")


def test_rounds_are_interleaved_and_every_candidate_comes_first() -> None:
    order: list[str] = []
    names = ["a", "b", "c"]
    samples = timing.measure({n: fake(order, n, [1.0] * 6) for n in names}, 6)
    rounds = [order[i : i + 3] for i in range(0, 18, 3)]
    assert all(sorted(r) == names for r in rounds)
    assert {r[0] for r in rounds} == set(names)
    before_b = {r[r.index("b") - 1] for r in rounds if r[0] != "b"}
    assert before_b == {"a", "c"}
    assert samples.rounds == 6


def test_ctrl_c_keeps_whole_rounds() -> None:
    order: list[str] = []

    def interrupt(name: str) -> None:
        if len(order) == 5:
            raise KeyboardInterrupt

    both = {n: fake(order, n, [1.0, 2.0, 3.0]) for n in ("a", "b")}
    samples = timing.measure(both, 3, before=interrupt)
    assert samples.interrupted
    assert samples.seconds == {"a": [1.0, 2.0], "b": [1.0, 2.0]}


def test_statistics() -> None:
    stats = timing.summary([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (stats.median, round(stats.p20, 6), round(stats.p80, 6)) == (3.0, 1.8, 4.2)
    assert timing.summary([2.0]) == timing.Summary(2.0, 2.0, 2.0)
    assert timing.ratio_by_round([2.0, 40.0, 6.0], [1.0, 10.0, 3.0]) == 2.0


# The read pass


def words(tensors: list[torch.Tensor]) -> int:
    total = 0
    for tensor in tensors:
        data = tensor.numpy().tobytes()
        padded = np.frombuffer(data + b"\0" * (-len(data) % 8), dtype=np.uint64)
        total += int(padded.sum(dtype=np.uint64))
    return total % 2**64


def test_the_read_pass_reads_every_byte_once() -> None:
    tensors = [torch.randn(n) for n in (1, 3, 0, 127, 4097, 100_003)]
    if floor.read_pass(tensors) is None:
        pytest.skip("no C++ compiler")
    passes = [floor.read_pass(tensors, t, isa) for t in (1, 2, 5) for isa in floor.ISAS]
    assert {p() for p in passes if p} == {words(tensors)}


# Rows


def test_rows_are_appended_and_parse(tmp_path: Path) -> None:
    rows, interrupted = run.run_case(cases.all_cases()[TINY], rounds=2)
    path = results.append_timings(rows, "cpu", tmp_path)
    results.append_timings(rows, "cpu", tmp_path)
    read = results.read(path)
    assert not interrupted and len(read) == 2 * len(rows)
    assert [row["candidate"] for row in read[: len(rows)]] == [row["candidate"] for row in rows]
    ours = read[0]
    assert (ours["role"], ours["candidate"], float(ours["times_ours"])) == ("ours", OURS, 1.0)
    assert float(ours["median_ms"]) > 0 and ours["torch"] == torch.__version__
    assert "time ratios" in run.table(rows)


def test_rows_of_another_shape_are_not_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    results.append(path, ("a", "b"), [{"a": 1, "b": "x,y"}])
    with pytest.raises(ValueError, match="other columns"):
        results.append(path, ("a", "c"), [{"a": 1, "c": 2}])
    assert results.read(path) == [{"a": "1", "b": "x,y"}]


def test_committed_rows_parse() -> None:
    kinds = {
        "-evidence": results.FACT,
        "-inference": inference.COLUMNS,
        "-inference-layers": inference.LAYER_COLUMNS,
    }
    for path in results.FOLDER.glob("*.csv"):
        kind = next((kind for kind in kinds if path.stem.endswith(kind)), None)
        columns = kinds[kind] if kind else results.TIMING
        for row in results.read(path):
            assert tuple(row) == columns and None not in row.values(), path.name


@pytest.mark.parametrize(
    "arguments",
    [["--case", "nothing*"], ["--rounds", "0"], ["--threads", "0"], ["--clock", "process"]],
)
def test_the_runner_checks_its_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run.parse(arguments)
    assert stopped.value.code == 2


def test_memory_of_one_call_is_measured_in_a_process_of_its_own() -> None:
    if not memory.STATUS.exists():
        pytest.skip("needs /proc")
    found = memory.measure(cases.all_cases()[TINY], OURS, 1)
    assert found["inputs"] == cases.all_cases()[TINY].bytes_moved
    assert 0 <= found["extra"] < 64 * memory.MIB


def test_a_failed_experiment_does_not_stop_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    ran = []

    def fails() -> None:
        raise RuntimeError("broken")

    def is_skipped() -> None:
        raise SkippedError("no such machine")

    experiments: dict[str, evidence.Experiment] = {
        "fails": ("", fails),
        "skips": ("", is_skipped),
        "runs": ("", lambda: ran.append(1)),
    }
    assert evidence.run(list(experiments), experiments) == 1
    assert ran == [1]
    assert "skipped: no such machine" in capsys.readouterr().out


# gpu_check


def stage(name: str, code: str, limit: float = 20, needs: str = "") -> Stage:
    return Stage(name, "a test", limit, lambda _: [Command([sys.executable, "-c", code])], needs)


def test_a_failed_stage_does_not_stop_the_others(tmp_path: Path) -> None:
    options = SimpleNamespace(out=tmp_path / "check.json")
    stages = [
        stage("build", "print('RESULT {\"a\": 1}')"),
        stage("tests", "print('3 passed, 1 skipped'); raise SystemExit(3)"),
        stage("graphs", "import time; time.sleep(60)", limit=0.5),
        stage("sanitize", "", needs="no-such-program"),
        stage("bench", "print('fine')"),
    ]
    start = time.monotonic()
    done = gpu_check.run_stages(stages, options, {"device": "fake", "commit": "1"})
    assert time.monotonic() - start < 15
    assert [o.status for o in done] == [PASSED, FAILED, TIMEOUT, MISSING, PASSED]
    assert done[0].facts == [{"a": 1}]
    assert done[1].returncodes == [3] and done[1].notes == ["3 passed, 1 skipped"]


def test_the_result_file_keeps_stages_of_the_same_device_and_commit(tmp_path: Path) -> None:
    options = SimpleNamespace(out=tmp_path / "deep" / "check.json")
    here = {"device": "fake", "commit": "1"}
    gpu_check.run_stages([stage("tests", ""), stage("build", "exit(1)")], options, here)
    gpu_check.run_stages([stage("build", "")], options, here)
    facts, outcomes = gpu_check.load(options.out)
    assert facts == here
    assert [(o.stage, o.status) for o in outcomes] == [("build", PASSED), ("tests", PASSED)]
    gpu_check.run_stages([stage("build", "")], options, {"device": "other", "commit": "1"})
    assert [o.stage for o in gpu_check.load(options.out)[1]] == ["build"]
    lines = options.out.read_text().splitlines()
    assert lines[0].startswith("# ") and json.loads(lines[-1])["stage"] == "build"


def test_without_a_gpu_it_says_so_after_checking_its_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--stage", "build", "graphs"]) == 2
    assert "no GPU" in capsys.readouterr().out
    for wrong in (["--stage", "nothing"], ["--arch", "sm_90"], ["--out", str(tmp_path)]):
        with pytest.raises(SystemExit):
            gpu_check.main(wrong)
        assert "error" in capsys.readouterr().err


def test_every_stage_fits_ten_minutes_and_names_real_parts() -> None:
    options = SimpleNamespace(arch="9.0", out=Path("check.json"))
    assert all(s.limit < 600 for s in gpu_check.STAGES)
    commands = [c for s in gpu_check.STAGES for c in s.commands(options)]
    parts = {c.arguments[-1] for c in commands if "bench.gpu_parts" in c.arguments}
    assert parts == set(gpu_parts.PARTS)


class OnlyThreshold:
    """An implementation whose thresholds are the reference's and whose masks are not."""

    def __init__(self) -> None:
        self.select_threshold = gpu_parts.reference.select_threshold

    def select_masks(self, values: Any, *_: Any) -> list[torch.Tensor]:
        return [torch.ones_like(v, dtype=torch.bool) for v in values]


def test_the_comparison_of_the_gpu_parts_sees_a_wrong_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parts, "DEVICE", "cpu")
    problem = next(p for p in gpu_parts.problems() if p.name == "ties saliency float32 layers")
    gpu_parts.compare(problem, gpu_parts.OPS)
    with pytest.raises(AssertionError, match="mask 0 differs"):
        gpu_parts.compare(problem, OnlyThreshold())


def test_the_gpu_parts_pass_with_the_operators_of_this_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parts, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    some = list(gpu_parts.problems())[::5]
    monkeypatch.setattr(gpu_parts, "problems", lambda large: some)
    gpu_parts.compare_all(gpu_parts.OPS, ["block_scores"], large=False)
