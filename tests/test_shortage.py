"""What was not built for want of memory, disk, threads or files may be built later."""

import errno
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import check, plans, quietly
from modules import Mlp, make

import ovshim
from ovshim import runtime
from ovshim.shortage import SHORTAGE, build_failure, compile_failure

PASSING = [
    "Resource temporarily unavailable",
    "std::bad_alloc",
    "Exception from src/core/src/runtime/allocator.cpp:79:\nbad allocation",
    "Cannot allocate memory",
    "Check 'ptr' failed at src/cpu_memory.cpp:257:\nFailed to allocate 76638 bytes of memory",
    "Could not allocate memory",
    "could not create a memory object",
    "out of memory",
    "Can not create file mapping for model.bin, err=Too many open files\nin front of more",
    "Can not open file model.bin for mapping. Ensure that file exists",
    "No space left on device",
    "pthread_create has failed",
    "basic_ios::clear: iostream error",
]
LASTING = [
    "Cannot fallback on ngraph reference implementation",
    "could not create a primitive descriptor for the matmul primitive",
    "Cannot allocate memory for incompatible descriptors.",
    "Failed to allocate required number of vector registers",
    "",
]


@pytest.mark.parametrize("text", PASSING)
def test_a_want_passes(text: str) -> None:
    found = compile_failure(RuntimeError(text))
    assert found.code == SHORTAGE
    assert re.sub(r"\s+", " ", text.splitlines()[-1]) in found.message


@pytest.mark.parametrize("text", LASTING)
def test_a_fault_of_the_graph_stays(text: str) -> None:
    assert compile_failure(RuntimeError(text)).code == "compile-failed"


def test_no_verdict_is_kept_and_no_entry_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = make(Mlp), torch.randn(3, 8)

    def refuse(*args: Any) -> Any:
        raise RuntimeError("Resource temporarily unavailable")

    def made() -> tuple[str, str, str | None]:
        with quietly():
            (plan,) = plans(ovshim.accelerate(module, x, prefer="openvino"))
        return plan["path"], plan["cache"], plan["reason"] and plan["reason"]["code"]

    def wanting() -> tuple[str, str, str | None]:
        with monkeypatch.context() as patch:
            patch.setattr(runtime, "compile_model", refuse)
            patch.setattr(runtime, "import_model", refuse)
            return made()

    assert wanting() == ("eager", "off", SHORTAGE)
    assert made() == ("openvino", "miss", None)
    assert wanting() == ("eager", "off", SHORTAGE)
    assert made() == ("openvino", "hit", None)
    with quietly():
        check(ovshim.accelerate(module, x, prefer="openvino"), module, x)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("basic_ios::clear: iostream error"),
        OSError(errno.ENOSPC, "No space left on device"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_disk_that_is_full_passes(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = make(Mlp), torch.randn(3, 8)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise error

    with quietly():
        with monkeypatch.context() as patch:
            patch.setattr(runtime.openvino(), "save_model", refuse)
            fast = ovshim.accelerate(module, x, prefer="openvino")
            check(fast, module, x, path="eager")
            (plan,) = plans(fast)
        assert plan["reason"]["code"] == SHORTAGE
        assert type(error).__name__ in plan["reason"]["message"]
        check(ovshim.accelerate(module, x, prefer="openvino"), module, x)


def test_a_fault_of_ours_stays() -> None:
    assert build_failure(AssertionError("x")).code == "build-failed"
    assert build_failure(FileNotFoundError(errno.ENOENT, "x")).code == "build-failed"


def test_a_file_that_is_not_compiled_is_let_go_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[bool] = []

    def refuse(source: Path, *args: Any) -> Any:
        seen.append(source.exists() and tmp_path in source.parents)
        raise RuntimeError(LASTING[0])

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(runtime, "compile_model", refuse)
    with quietly():
        fast = ovshim.accelerate(make(Mlp), torch.randn(3, 8), cache_dir=False, prefer="openvino")
    assert plans(fast)[0]["reason"]["code"] == "compile-failed"
    assert seen
    assert all(seen)
    assert not list(tmp_path.glob("ovshim-*"))
