"""The command line parses, calls the library and prints; its exit codes are what scripts read."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ovshim
from ovshim.cli import main, parser

FACTORIES = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh()).eval()

def tensor():
    return torch.randn(2, 8)

def misfit():
    return torch.randn(2, 9)

def broken():
    raise LookupError("the user's own")

number = 3
"""


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's in the current directory."""
    (tmp_path / "users_models.py").write_text(FACTORIES, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    monkeypatch.delitem(sys.modules, "users_models", raising=False)
    return "users_models"


def explained(*arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["explain", *arguments, "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_devices_are_those_of_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed == [device.to_dict() for device in ovshim.devices()]
    assert "CPU" in [device["name"] for device in listed]


def test_devices_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "precisions", "full", "name"]
    for row, device in zip(rows, ovshim.devices(), strict=True):
        assert row.startswith(device.name)
        assert row.endswith(device.full_name)
        # Columns stand under their heads.
        assert row.index(device.full_name) == head.index("full name")


def test_explain_is_the_librarys_dry_run(named: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = explained(f"{named}:net", "--example", f"{named}:tensor", capsys=capsys)
    (plan,) = report["plans"]
    assert report["module"] == "Sequential"
    assert report["precision"] == "fp32"
    assert plan["precision_run"] == "f32"
    assert plan["error"] < 1e-4
    assert plan["cache"] == "off"


def test_explain_hands_options_on(named: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"{named}:net", "--example", f"{named}:tensor"]
    report = explained(*names, "--precision", "bfloat16", "--device", "cpu", capsys=capsys)
    assert report["precision"] == "bf16"
    assert report["device"] == "CPU"
    assert main(["explain", *names, "--precision", "fp7"]) == 2
    assert "'fp7'" in capsys.readouterr().err
    assert main(["explain", *names, "--device", "GPU.9"]) == 2
    assert "GPU.9" in capsys.readouterr().err


def test_explain_prints_the_report(named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{named}:net", "--example", f"{named}:tensor"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Sequential on CPU")
    assert "float32[?, 8]" in out


def test_an_example_that_the_module_refuses(named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{named}:net", "--example", f"{named}:misfit"]) == 2
    assert "example_input" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("users_models", "not of the form"),
        ("users_models:", "not of the form"),
        ("no_such_module:net", "no_such_module"),
        ("users_models:nothing", "no function 'nothing'"),
        ("users_models:number", "no function 'number'"),
    ],
)
def test_a_name_that_names_nothing(
    named: str, model: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["explain", model, "--example", f"{named}:tensor"])
    assert left.value.code == 2
    assert said in capsys.readouterr().err


def test_an_exception_of_the_users_is_shown_whole(named: str) -> None:
    with pytest.raises(LookupError, match="the user's own"):
        main(["explain", f"{named}:broken", "--example", f"{named}:tensor"])


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["demo", "--seed", "many"]])
def test_arguments_that_cannot_be_right(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert "usage: ovshim" in capsys.readouterr().err


def test_every_command_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["demo", "--help"], ["devices", "--help"], ["explain", "--help"]):
        with pytest.raises(SystemExit) as left:
            parser().parse_args(arguments)
        assert left.value.code == 0
        assert "usage: ovshim" in capsys.readouterr().out


def test_python_dash_m_is_the_same_and_loads_nothing_heavy() -> None:
    script = (
        "import runpy, sys; sys.argv = ['ovshim', '--version']\n"
        "try: runpy.run_module('ovshim', run_name='__main__')\n"
        "except SystemExit as left: print(left.code)\n"
        "print([m for m in ('openvino', 'sklearn', 'torch._dynamo') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert result.stdout.splitlines() == [f"ovshim {ovshim.__version__}", "0", "[]"]
