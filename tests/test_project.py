"""What the project says of itself agrees with what it is."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import ovshim
from ovshim import helper, version

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_version_is_the_distributions() -> None:
    assert ovshim.__version__ == PROJECT["project"]["version"]


def test_the_sources_are_part_of_the_exact_version(tmp_path: Path) -> None:
    package = Path(ovshim.__file__).parent
    assert version.exact_version() == f"{ovshim.__version__}+{version.sources_of(package)}"
    copied, seen = tmp_path / "ovshim", set[str]()
    (copied / "deep").mkdir(parents=True)

    def write(name: str, text: str) -> None:
        (copied / name).write_text(text)
        seen.add(version.sources_of(copied))

    write("a.py", "1")
    write("deep/a.py", "1")
    write("deep/a.py", "2")
    (copied / "a.py").rename(copied / "b.py")
    seen.add(version.sources_of(copied))
    assert len(seen) == 4
    write(version.WRITTEN, "3")
    assert len(seen) == 4


def test_every_public_name_is_there() -> None:
    assert all(getattr(ovshim, name) is not None for name in ovshim.__all__)
    assert set(ovshim.__all__) <= set(dir(ovshim))
    assert ovshim.__all__ == sorted(ovshim.__all__)
    assert not hasattr(ovshim, "acelerate")


def test_the_changelog_begins_with_what_is_unreleased() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[?([^\]\n]+)", text, re.MULTILINE)[0] == "Unreleased"


def test_every_lint_exception_states_its_reason() -> None:
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    start = lines.index("ignore = [") + 1
    ignored = lines[start : lines.index("]", start)]
    assert len(ignored) == len(PROJECT["tool"]["ruff"]["lint"]["ignore"])
    assert all(re.search(r'", +# \w', line) for line in ignored)


def test_the_wheel_says_that_it_is_typed() -> None:
    assert (Path(ovshim.__file__).parent / "py.typed").exists()


def test_the_helper_is_built_where_it_can_be() -> None:
    compiler = str(sysconfig.get_config_var("CC") or "cc").split()[0]
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if os.environ.get("OVSHIM_HELPER") == "0" or not (shutil.which(compiler) and headers.exists()):
        pytest.skip("there is no compiler, or it is left out")
    assert helper.hot is not None


def test_the_check_can_be_run() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_what_was_written_is_read_out_of_a_zip_file(tmp_path: Path) -> None:
    package = Path(version.__file__).parent
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("zipped/__init__.py", "")
        archive.write(package / "version.py", "zipped/version.py")
        archive.writestr(f"zipped/{version.WRITTEN}", "0123456789abcdef")
    told = subprocess.run(
        [sys.executable, "-c", "from zipped.version import exact_version as v; print(v())"],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "all.zip")},
        capture_output=True,
        check=True,
        text=True,
    )
    assert told.stdout == f"{ovshim.__version__}+0123456789abcdef\n"
