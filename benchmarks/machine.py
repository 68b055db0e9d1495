"""What a figure was measured on: without it, no figure means anything."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

import ovshim

__all__ = ["describe", "hardware", "versions"]

_ISA = (
    *("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_int8", "amx_fp16"),
    *("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2"),
)
_PACKAGES = ("torch", "openvino", "nncf", "onnxruntime", "transformers", "numpy")


def hardware() -> dict[str, Any]:
    """CPU, instruction sets that matter, cores and threads."""
    info = _cpuinfo()
    model = info.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in info:
        model = f"{model} (family {info['cpu family']}, model {info.get('model', '?')})"
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "cpu": model,
        "isa": " ".join(flag for flag in _ISA if flag in flags) or "unknown",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries where Linux tells them; nothing elsewhere."""
    found: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                key, _, value = (part.strip() for part in line.partition(":"))
                if not key:
                    break
                found[key] = value
    except OSError:
        return {}
    return found


def versions() -> dict[str, str]:
    """Versions of Python and of what is compared."""
    found = {"ovshim": ovshim.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def describe() -> list[tuple[str, str]]:
    """Hardware and versions as lines of a table."""
    found = hardware()
    return [
        ("CPU", found["cpu"]),
        ("instruction sets", found["isa"]),
        ("cores, threads", f"{found['cores']}, {found['threads']}"),
        ("system", found["system"]),
        ("versions", ", ".join(f"{name} {v}" for name, v in versions().items())),
    ]
