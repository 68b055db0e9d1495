"""`ovshim demo`, the main job of the README, as it is typed; and the parts that it stands on."""

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ovshim
from ovshim.cli import demo, digits, main
from ovshim.report import Report

BATCHES = demo.BATCHES
FOUND_HELD_OUT = "500 held-out glyphs on CPU"


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where tests share the cores, the threads of eager's small convolutions wait for each other a
    hundred times longer than they compute."""
    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less training and less timing: what is learnt, and how fast it is, are not tested by it."""
    monkeypatch.setattr(digits, "_EPOCHS", 1)
    monkeypatch.setattr(demo, "_SECONDS_PER_BATCH_SIZE", 0.0)


def demo_in_a_process(cache: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ovshim", "demo"],
        env=os.environ | {"OVSHIM_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def cells(out: str) -> list[list[str]]:
    """The table's rows: batch, accuracies, disagreements, error, times, ratio (and a remark)."""
    rows = [line.split() for line in out.splitlines() if re.match(r" +\d+ +\d+\.\d+%", line)]
    assert [int(row[0]) for row in rows] == list(BATCHES)
    return rows


@pytest.mark.slow
def test_two_runs_as_the_readme_has_them(tmp_path: Path) -> None:
    runs = [demo_in_a_process(tmp_path) for _ in range(2)]
    for run in runs:
        assert run.returncode == 0, run.stdout + run.stderr
        assert run.stderr == ""  # no bar where there is no terminal, and no warning
        assert FOUND_HELD_OUT in run.stdout
        assert "runs f32" in run.stdout
        for row in cells(run.stdout):
            assert float(row[1].rstrip("%")) > 97
            assert row[2] == row[1]
            assert row[3] == "0"
            assert float(row[4]) < 1e-4
        assert re.search(r"^OpenVINO served all \d+ calls\.$", run.stdout, re.MULTILINE)
    assert "\ncache miss: this run converted the network" in runs[0].stdout
    assert "\ncache hit: an earlier run converted this network" in runs[1].stdout
    entries = [re.search(r"^entry (.+)$", run.stdout, re.MULTILINE) for run in runs]
    assert entries[0] is not None
    assert entries[1] is not None
    assert entries[0][1] == entries[1][1]
    assert (Path(entries[0][1]) / "model.xml").is_file()
    for run in runs:
        cold, warm = re.findall(r"(?:nothing cached|from the cache) +([\d.]+) s", run.stdout)
        assert float(warm) < float(cold)


def test_training_gives_the_same_bits_and_leaves_torch_as_it_was() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    threads = torch.get_num_threads()
    few = digits.Glyphs(torch.rand(128, 1, 16, 16), torch.arange(128) % 10)
    torch.set_rng_state(state)
    first = digits.train(few, seed=3, progress=False)
    torch.set_num_threads(threads + 1)
    try:
        second = digits.train(few, seed=3, progress=False)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not first.training
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    other = digits.train(few, seed=4, progress=False)
    assert not torch.equal(other.head.weight, first.head.weight)


def test_held_out_glyphs_are_not_trained_on() -> None:
    seen, held = digits.glyphs(seed=0)
    assert (len(seen), len(held)) == (1297, 500)
    assert held.images.shape == (500, 1, 16, 16)
    assert held.images.dtype is torch.float32
    assert 0 <= float(held.images.min()) < float(held.images.max()) <= 1
    assert held.labels.dtype is torch.int64
    again, _ = digits.glyphs(seed=0)
    assert torch.equal(again.labels, seen.labels)
    assert not torch.equal(digits.glyphs(seed=1)[0].labels, seen.labels)


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_a_bar_where_it_is_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--progress"]) == 0
    assert "training:" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_lower_precision_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ovshim.PrecisionWarning)  # where there is no unit for it
        code = main(["demo", "--precision", "bf16"])
    out = capsys.readouterr().out
    assert code == 0
    assert "asked for bf16, OpenVINO runs" in out
    assert max(float(row[4]) for row in cells(out)) < 0.03


@pytest.mark.usefixtures("short")
def test_a_disagreement_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = demo._row

    def one_off(*arguments: object) -> demo.Row:
        row = honest(*arguments)  # type: ignore[arg-type]
        return demo.dataclasses.replace(row, disagreements=1)

    monkeypatch.setattr(demo, "_row", one_off)
    assert main(["demo"]) == 1
    assert "In fp32 no glyph" in capsys.readouterr().err


def test_switched_off_there_is_nothing_to_show(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OVSHIM", "0")
    assert main(["demo"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "OVSHIM" in captured.err


@pytest.mark.parametrize(("openvino", "eager"), [(5, 1), (0, 0)])
def test_calls_that_openvino_did_not_serve_are_a_failure(
    openvino: int, eager: int, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = {"openvino": openvino, "mixed": 0, "eager": eager}
    report = Report("DigitsNet", "CPU", "fp32", calls=calls, eager={"stale": eager}, plans=[])
    assert demo._verdict([], report) == 1
    captured = capsys.readouterr()
    assert "served all" not in captured.out
    assert "did not serve every call" in captured.err
    assert "DigitsNet on CPU" in captured.err


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_without_a_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("OVSHIM_CACHE_DIR", str(tmp_path / "file"))
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "cache off" in out
    assert "nothing cached" in out
    assert "from the cache" not in out


def test_without_scikit_learn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert main(["demo"]) == 2
    assert 'pip install "ovshim[demo]"' in capsys.readouterr().err


def test_wrong_options_are_found_before_the_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(digits, "train", lambda *_: pytest.fail("it trains"))
    assert main(["demo", "--precision", "fp7"]) == 2
    assert "'fp7'" in capsys.readouterr().err
    assert main(["demo", "--device", "GPU/9"]) == 2
    assert main(["demo", "--device", "GPU.9"]) == 2
    assert "'GPU/9'" in capsys.readouterr().err
