"""`ovshim run` and OVSHIM=1: a program finds everything as under `python`, and runs accelerated."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from test_floors import package

import ovshim
from ovshim.cli import main, run

# Says what a program can see of how it was started.
LOOK = """
'''The doc.'''
import __main__, os, pickle, sys, threading
assert "torch" not in sys.modules and "ovshim.scope" not in sys.modules
class Own: pass
print(sys.argv, __name__, __file__, __doc__, __package__, __spec__ and __spec__.name)
print(sys.path[0], type(__loader__).__name__, __builtins__.__name__, vars() is vars(__main__))
print(type(pickle.loads(pickle.dumps(Own()))) is Own, sys.excepthook is sys.__excepthook__)
print(int.__add__.__class__, (lambda x: x).__annotations__, 1 if __debug__ else 0)
print(sys.stdin.read())
def fail():
    raise LookupError("the program's own")
what = sys.argv[-1]
if what == "fail":
    threading.Timer(0.1, print, ["a thread goes on"]).start()
    fail()
if what == "hook":
    sys.excepthook = lambda kind, error, trace: print("hooked", trace.tb_frame.f_code.co_name)
    fail()
if what == "exit":
    sys.exit(7)
if what == "text":
    sys.exit("a text")
if what == "interrupt":
    import signal
    # A shell has it ignored by what it starts in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait(5)
"""
NET = """
import multiprocessing, os, sys
os.environ["OMP_NUM_THREADS"] = "1"
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
    def forward(self, x):
        return self.last(torch.relu(self.first(x)))

def answers(seed=0):
    torch.manual_seed(seed)
    net = Net().eval()
    with torch.inference_mode():
        return [net(torch.randn(3, 8)) for _ in range(6)][-1].tolist(), nn.Module.__call__.__name__

if __name__ == "__main__":
    assert torch.get_num_threads() == 1
    print(answers())
    for method in sys.argv[1:]:
        with multiprocessing.get_context(method).Pool(1) as pool:
            print(pool.map(answers, [0]))
"""


def environment(**more: str) -> dict[str, str]:
    paths = [str(package().parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    path = os.pathsep.join(filter(None, paths))
    return os.environ | {"PYTHONPATH": path, "OVSHIM_REPORT": ""} | more


def python(
    *arguments: str, cwd: Path, stdin: str = "", **more: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment(**more),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def both(*arguments: str, cwd: Path, **more: Any) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr (without the table) by Python and by us."""
    plain = python(*arguments, cwd=cwd, **more)
    ours = python("-m", "ovshim", "run", *arguments, cwd=cwd, **more)
    said, table, _ = ours.stderr.rpartition("ovshim: torch was not imported\n")
    assert table
    return [(plain.returncode, plain.stdout, plain.stderr), (ours.returncode, ours.stdout, said)]


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    (tmp_path / "inside").mkdir()
    for path in ("look.py", "inside/__main__.py", "inside/look.py"):
        (tmp_path / path).write_text(LOOK, encoding="utf-8")
    (tmp_path / "broken.py").write_text("x = 1\nif x:\nprint(x)\n", encoding="utf-8")
    (tmp_path / "net.py").write_text(NET, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        ("look.py", "--report", "a b", "-m", "--", "--help"),
        ("inside/look.py", "fail"),
        ("inside/look.py", "hook"),
        ("look.py", "exit"),
        ("look.py", "text"),
        ("broken.py",),
        ("inside", "fail"),
        ("-m", "inside.look", "--device", "fail"),
        ("-m", "inside", "exit"),
    ],
    ids=" ".join,
)
def test_a_program_finds_everything_as_under_python(
    scripts: Path, arguments: tuple[str, ...]
) -> None:
    plain, ours = both(*arguments, cwd=scripts, stdin="what stdin has\n")
    assert ours == plain


def test_a_zip_file_and_a_program_on_stdin(scripts: Path) -> None:
    with zipfile.ZipFile(scripts / "app", "w") as archive:
        archive.writestr("__main__.py", LOOK)
    plain, ours = both("app", "exit", cwd=scripts)
    assert ours == plain
    plain, ours = both("-", "a", cwd=scripts, stdin="import sys; print(sys.argv, __name__)")
    assert ours == plain


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="ends by a signal")
def test_an_interrupt_ends_it_as_it_ends_python(scripts: Path) -> None:
    plain, ours = both("look.py", "interrupt", cwd=scripts)
    assert ours == plain
    assert ours[0] == -signal.SIGINT


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="ends by a signal")
def test_an_interrupt_behind_a_build_ends_it_as_it_ends_python(tmp_path: Path) -> None:
    program = """
import torch, ovshim
with torch.no_grad():
    fast = ovshim.accelerate(torch.nn.Linear(4, 4).eval(), torch.ones(1, 4), prefer="openvino")
assert fast.ovshim.stats()["eager"] == 0 and "torch._dynamo" in __import__("sys").modules
raise KeyboardInterrupt
"""
    assert python("-c", program, cwd=tmp_path).returncode == -signal.SIGINT


def test_what_cannot_be_run(scripts: Path) -> None:
    for arguments, said in (
        (("nothing.py",), "can't open file"),
        ((), "script=None"),
        (("--precision", "fp7", "look.py"), "'fp7'"),
        (("--device", "GPU.9", "look.py"), "GPU.9"),
        (("--min-speedup", "nan", "look.py"), "min_speedup=nan"),
        (("--report", "nowhere/report.json", "look.py"), "a directory that exists"),
    ):
        result = python("-m", "ovshim", "run", *arguments, cwd=scripts)
        assert result.returncode == 2
        assert said in result.stderr
        assert result.stdout == ""


@pytest.mark.parametrize("pattern", ["--include=", "--exclude="])
def test_a_pattern_of_nothing(pattern: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", pattern, "look.py"]) == 2
    assert f"{pattern[2:]}['']" in capsys.readouterr().err


def test_its_own_arguments_end_where_the_script_begins() -> None:
    assert run.split(["--device", "CPU", "x.py", "--device", "y"]) == (
        ["--device", "CPU", "x.py"],
        ["--device", "y"],
    )
    assert run.split(["--quiet", "--report=r", "-m", "x", "-m"]) == (
        ["--quiet", "--report=r", "-m", "x"],
        ["-m"],
    )
    assert run.split(["--", "-x.py", "-m"]) == (["-x.py"], ["-m"])
    assert run.split([]) == ([], [])


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["run", "--help"])
    assert end.value.code == 0
    assert "--min-speedup" in capsys.readouterr().out


def test_a_script_is_accelerated_and_the_second_run_finds_what_was_built(scripts: Path) -> None:
    names: dict[str, Any] = {"__name__": "net"}
    exec(NET.replace('os.environ["OMP_NUM_THREADS"]', "_"), names)
    expected = torch.tensor(names["answers"]()[0]).flatten().tolist()
    for found in ("built now", "cached"):
        arguments = ("--prefer", "openvino", "--report", "r.json", "net.py")
        result = python("-m", "ovshim", "run", *arguments, cwd=scripts)
        assert result.returncode == 0, result.stderr
        assert numbers(result.stdout) == pytest.approx(expected, abs=1e-5)
        assert re.search(rf"3 of 6 calls in OpenVINO(.|\n)* Net .* f32, {found}", result.stderr)
        report = json.loads((scripts / "r.json").read_text(encoding="utf-8"))
        assert [row["calls"]["openvino"] for row in report["modules"]] == [3]


@pytest.mark.slow
def test_ovshim_0_wins_over_run(scripts: Path) -> None:
    (scripts / "off.py").write_text(
        "import ovshim, torch; ovshim.enable(); print(torch.nn.Module.__call__.__name__)",
        encoding="utf-8",
    )
    result = python("-m", "ovshim", "run", "off.py", cwd=scripts, OVSHIM="0")
    assert result.stdout == "_wrapped_call_impl\n"
    assert result.stderr == "ovshim: switched off by OVSHIM=0\n"


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.\d+", text)]


# OVSHIM=1, which acts for an installed package only


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory that makes the package under test an installed one."""
    site = tmp_path_factory.mktemp("site")
    info = site / f"ovshim-{ovshim.__version__}.dist-info"
    info.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: ovshim\nVersion: {ovshim.__version__}\n"
    (info / "METADATA").write_text(metadata, encoding="utf-8")
    entry_points = "[torch.backends]\novshim = ovshim_autoload:start\n"
    (info / "entry_points.txt").write_text(entry_points, encoding="utf-8")
    return os.pathsep.join([str(site), str(package().parent)])


def test_ovshim_1_reaches_an_untouched_program(scripts: Path, installed: str) -> None:
    report = {"OVSHIM_REPORT": str(scripts / "r.json")}
    result = python("net.py", cwd=scripts, PYTHONPATH=installed, OVSHIM="1", **report)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.endswith("'_call')\n")
    written = json.loads((scripts / "r.json").read_text(encoding="utf-8"))
    assert [row["module"] for row in written["modules"]] == ["Net"]


def test_without_the_variable_the_stub_loads_nothing(scripts: Path, installed: str) -> None:
    look = "import torch, sys; print([m for m in sys.modules if m.startswith('ovshim')])"
    result = python("-c", look, cwd=scripts, PYTHONPATH=installed, OVSHIM="")
    assert result.stdout == "['ovshim_autoload']\n", result.stderr


def test_the_stub_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    import ovshim_autoload

    said: list[str] = []
    monkeypatch.setattr(ovshim_autoload, "_tell", said.append)
    monkeypatch.setenv("OVSHIM", "1")
    monkeypatch.setitem(sys.modules, "ovshim.scope.program", None)
    monkeypatch.delattr("ovshim.scope.program", raising=False)
    ovshim_autoload.start()
    (text,) = said
    assert text.startswith("ovshim: OVSHIM=1 has no effect: ")
    monkeypatch.undo()
    monkeypatch.setattr(sys, "stderr", None)
    ovshim_autoload._tell("nobody hears this")
    ovshim.disable()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_children_of_multiprocessing(scripts: Path, installed: str, method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip("not on this platform")
    plain = python("net.py", method, cwd=scripts)
    arguments = ("-m", "ovshim", "run", "--prefer", "openvino", "net.py", method)
    result = python(*arguments, cwd=scripts, PYTHONPATH=installed)
    assert result.returncode == plain.returncode == 0, result.stderr
    assert numbers(result.stdout) == pytest.approx(numbers(plain.stdout), abs=1e-5)
    assert result.stdout.count("_call'") == 2
    assert result.stderr.count("ovshim: ") == 1  # children print no table
