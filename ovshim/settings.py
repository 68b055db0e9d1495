"""Settings of torch's that the whole program shares: whether a call changes them, which a graph
would not."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch

__all__ = ["READ_BY_CODE", "SETTERS", "Settings", "setting"]

_Read = Callable[[], Any]
_Write = Callable[[Any], Any]


# --- how exactly products of float32 are computed -------------------------------------------------

_PRECISIONS = (
    ("generic", "all"),
    *((library, of) for library in ("cuda", "mkldnn") for of in ("all", "matmul", "conv", "rnn")),
)


def _precisions() -> tuple[str | None, tuple[str, ...]]:
    """By torch's older name, None where it has none, and of each library and operation."""
    try:
        told = torch.get_float32_matmul_precision()
    except RuntimeError:  # what was set by `fp32_precision` may have no such name
        told = None
    return told, tuple(torch._C._get_fp32_precision_getter(*of) for of in _PRECISIONS)


def _set_precisions(wanted: tuple[str | None, tuple[str, ...]]) -> None:
    told, each = wanted
    if told is not None:
        torch.set_float32_matmul_precision(told)
    for of, one in zip(_PRECISIONS, each, strict=True):
        # "all" is set of all, and sets them: what is right by now is not to be set.
        if torch._C._get_fp32_precision_getter(*of) != one:
            torch._C._set_fp32_precision_setter(*of, one)


# --- all of them ----------------------------------------------------------------------------------

# By what programs call: what is set now, and what sets it.
_SETTINGS: dict[str, tuple[_Read, _Write]] = {
    "set_grad_enabled": (torch.is_grad_enabled, torch._C._set_grad_enabled),
    "set_num_threads": (torch.get_num_threads, torch.set_num_threads),
    "set_default_dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "set_float32_matmul_precision": (_precisions, _set_precisions),
    "use_deterministic_algorithms": (
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        lambda both: torch.use_deterministic_algorithms(both[0], warn_only=both[1]),
    ),
    "autograd.set_detect_anomaly": (
        lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        lambda both: torch.set_anomaly_enabled(*both),
    ),
    "set_warn_always": (torch.is_warn_always_enabled, torch.set_warn_always),
}

# Those that torch's C library keeps as they are: the ends of the names of what reads and sets them.
_FLAGS = {
    "backends.cuda.enable_flash_sdp": ("flash_sdp_enabled", "sdp_use_flash"),
    "backends.cuda.enable_mem_efficient_sdp": (
        "mem_efficient_sdp_enabled",
        "sdp_use_mem_efficient",
    ),
    "backends.cuda.enable_math_sdp": ("math_sdp_enabled", "sdp_use_math"),
    "backends.cuda.enable_cudnn_sdp": ("cudnn_sdp_enabled", "sdp_use_cudnn"),
    "backends.cudnn.enabled": ("cudnn_enabled",) * 2,
    "backends.cudnn.benchmark": ("cudnn_benchmark",) * 2,
    "backends.cudnn.deterministic": ("cudnn_deterministic",) * 2,
    "backends.mkldnn.enabled": ("mkldnn_enabled",) * 2,
    "backends.mkldnn.deterministic": ("mkldnn_deterministic",) * 2,
    "backends.nnpack.set_flags": ("nnpack_enabled",) * 2,
}
_SETTINGS.update(
    (name, (getattr(torch._C, f"_get_{read}"), getattr(torch._C, f"_set_{write}")))
    for name, (read, write) in _FLAGS.items()
)

SETTERS = {
    "set_num_threads": "set_num_threads",
    "_set_default_dtype": "set_default_dtype",
    "_set_default_tensor_type": "set_default_dtype",
    "_set_float32_matmul_precision": "set_float32_matmul_precision",
    "_set_fp32_precision_setter": "set_float32_matmul_precision",
    "_set_cublas_allow_tf32": "set_float32_matmul_precision",
    "_set_cudnn_allow_tf32": "set_float32_matmul_precision",
    "_set_deterministic_algorithms": "use_deterministic_algorithms",
    "set_anomaly_enabled": "autograd.set_detect_anomaly",
    "_set_warnAlways": "set_warn_always",
    **{f"_set_{write}": name for name, (_, write) in _FLAGS.items()},
}
"""Names of what torch's C library is called by to set them. Not grad mode: every `no_grad` block
sets it, and sets it back."""


READ_BY_CODE: tuple[tuple[frozenset[str], _Read], ...] = (
    (
        frozenset({"are_deterministic_algorithms_enabled", "_get_deterministic_algorithms"}),
        torch.are_deterministic_algorithms_enabled,
    ),
    (
        frozenset(
            {
                "is_deterministic_algorithms_warn_only_enabled",
                "_get_deterministic_algorithms_warn_only",
                "get_deterministic_debug_mode",
            }
        ),
        torch.get_deterministic_debug_mode,
    ),
    (frozenset({"allow_tf32", "fp32_precision", "get_float32_matmul_precision"}), _precisions),
    (
        frozenset({"get_autocast_dtype", "get_autocast_cpu_dtype"}),
        functools.partial(torch.get_autocast_dtype, "cpu"),
    ),
    (frozenset({"is_autocast_cache_enabled"}), torch.is_autocast_cache_enabled),
)
"""What code may branch on of which Dynamo makes a constant with no guard of its own: the words that
it is asked by, and what is answered now."""


def setting(name: str) -> Any:
    """What is set now."""
    return _SETTINGS[name][0]()


class Settings:
    """What is set, all of it."""

    def __init__(self) -> None:
        self._before = {name: read() for name, (read, _) in _SETTINGS.items()}

    def changed(self) -> list[str]:
        """Those that are set otherwise by now."""
        return [name for name, before in self._before.items() if setting(name) != before]

    def put_back(self, names: Collection[str]) -> None:
        """Set these as they were."""
        for name in names:
            _SETTINGS[name][1](self._before[name])
