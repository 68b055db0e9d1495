"""Settings of torch's that the whole program shares: whether a call changes them, which a graph
would not."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch

__all__ = ["SETTERS", "Settings", "setting"]

_Read = Callable[[], Any]
_Write = Callable[[Any], Any]

# By what programs call: what is set now, and what sets it.
_SETTINGS: dict[str, tuple[_Read, _Write]] = {
    "set_grad_enabled": (torch.is_grad_enabled, torch._C._set_grad_enabled),
    "set_num_threads": (torch.get_num_threads, torch.set_num_threads),
    "set_default_dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "set_float32_matmul_precision": (
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
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
}

SETTERS = {
    "set_num_threads": "set_num_threads",
    "_set_default_dtype": "set_default_dtype",
    "_set_float32_matmul_precision": "set_float32_matmul_precision",
    "_set_deterministic_algorithms": "use_deterministic_algorithms",
    "set_anomaly_enabled": "autograd.set_detect_anomaly",
}
"""Names of what torch's C library is called by to set them. Not grad mode: every `no_grad` block
sets it, and sets it back."""


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
