"""Builds the compiled helper, `ovshim._hot`, into the wheel. Without a compiler for C there is none
in it, and it is for every platform: what the helper does Python can do as well. And it writes down
what the wheel is built of, for the keys of the cache (`ovshim/version.py`)."""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_NAME = "ovshim._hot"
# Whatever CFLAGS say: with fast math a library switches off small numbers for the whole process.
_EXACT = [] if sys.platform == "win32" else ["-fno-fast-math"]
_FASTER = [] if sys.platform == "win32" else ["-O3", "-fvisibility=hidden"]


class Built(BuildHookInterface):  # type: ignore[type-arg]
    """Called for wheels. An editable one finds the helper in the checkout, whose sources change."""

    _work: tempfile.TemporaryDirectory[str] | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add what the sources do not hold."""
        self._work = tempfile.TemporaryDirectory()
        if version != "editable":
            written = _written(Path(self.root), Path(self._work.name))
            build_data["force_include"][str(written)] = f"ovshim/{written.name}"
        if os.environ.get("OVSHIM_HELPER") != "0":
            self._add_helper(version == "editable", build_data, self._work.name)

    def _add_helper(self, editable: bool, build_data: dict[str, Any], work: str) -> None:
        """Build it; say so where that fails."""
        root = Path(self.root)
        try:
            built = _built(root, root if editable else Path(work), work)
        except Exception as error:  # of compilers there are many
            self.app.display_warning(f"The compiled helper is left out: {error}")
            return
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        if not editable:
            build_data["force_include"][str(built)] = f"ovshim/{built.name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Called when the wheel has taken what was built."""
        if self._work is not None:
            self._work.cleanup()


def _written(root: Path, into: Path) -> Path:
    # By its path: the package itself imports torch, which is not here.
    known = runpy.run_path(str(root / "ovshim" / "version.py"))
    path = into / str(known["WRITTEN"])
    path.write_text(known["sources_of"](root / "ovshim"), encoding="utf-8")
    return path


def _built(root: Path, into: Path, work: str) -> Path:
    from setuptools import Distribution, Extension
    from setuptools.command.build_ext import build_ext

    sources = sorted(str(path) for path in (root / "helper").glob("*.c"))
    headers = [str(root / "helper" / "hot.h")]
    extension = Extension(
        _NAME,
        sources,
        depends=headers,
        extra_compile_args=[*_FASTER, *_EXACT],
        extra_link_args=_EXACT,
    )
    command = build_ext(Distribution({"name": "ovshim", "ext_modules": [extension]}))
    command.build_lib, command.build_temp = str(into), work
    command.ensure_finalized()
    command.run()
    return Path(command.get_ext_fullpath(_NAME))
