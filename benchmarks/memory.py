"""What a process that serves a model holds in memory, and what a build takes at its highest.

    python memory.py prime|hand|openvino|eager|shared|lean WORKLOAD PRECISION DIRECTORY [--small]

`prime` fills the directory (IR and inputs for raw OpenVINO, ovshim's cache) and says what that took
at its highest; `hand` says the same of the steps that no build can leave out, each called directly,
and of a first answer; the others serve some calls and say what they hold then. One line of JSON, in
bytes; each is meant for a process of its own. `openvino` never imports torch. Linux only.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
from pathlib import Path
from typing import Any

_CALLS = 5
_HINTS = {"fp32": "f32", "bf16": "bf16"}
_LOOK_SECONDS = 0.005


def held() -> dict[str, int]:
    """Bytes of this process: resident, its share of them, and those that no file stands behind."""
    found = {}
    with open("/proc/self/smaps_rollup", encoding="ascii") as lines:
        for line in lines:
            name, _, rest = line.partition(":")
            if name in ("Rss", "Pss", "Anonymous"):
                found[name.lower()] = int(rest.split()[0]) * 1024
    return found


class Peak:
    """The most anonymous memory while it is entered, above what was there before."""

    def __enter__(self) -> Peak:
        self.bytes = 0
        self._before = held()["anonymous"]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(_LOOK_SECONDS):
            self.bytes = max(self.bytes, held()["anonymous"] - self._before)

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()


def _openvino(precision: str, directory: Path) -> dict[str, Any]:
    import numpy as np
    import openvino

    loaded = np.load(directory / "inputs.npz")
    inputs = [loaded[name] for name in sorted(loaded)]
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": _HINTS[precision]}
    compiled = openvino.Core().compile_model(str(directory / "raw" / "model.xml"), "CPU", settings)
    for _ in range(_CALLS):
        compiled(inputs)
    return held()


def _with_torch(
    way: str, workload: str, precision: str, directory: Path, small: bool
) -> dict[str, Any]:
    import torch
    import workloads

    module, (args, kwargs) = workloads.make(workloads.Case(workload, 1), small)
    weights = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
    serves, found = module, {}
    if way == "hand":
        from coldbuild import by_hand

        with torch.no_grad(), Peak() as peak:
            answers, _ = by_hand(module, (args, kwargs), _HINTS[precision])
            answers(*args, *kwargs.values())
        return {"weights": weights, "peak": peak.bytes}
    if way != "eager":
        import ovshim

        with Peak() as peak:
            serves = ovshim.accelerate(
                module,
                args or None,
                example_kwargs=kwargs or None,
                precision=precision,
                prefer="openvino",
                cache_dir=directory / "cache",
                inplace=True,
                memory="lean" if way == "lean" else "shared",
            )
        plan = ovshim.explain(serves).to_dict()["plans"][0]
        if plan["path"] != "openvino":
            raise SystemExit(f"eager served: {plan['reason']}")
        found = {"peak": peak.bytes, "hit": plan["cache"] == "hit"}
    with torch.inference_mode():
        for _ in range(_CALLS):
            serves(*args, **kwargs)
    gc.collect()
    found |= {"weights": weights, **held()}
    if way == "prime":
        import numpy as np
        from backends import Task

        task = Task(module, args, kwargs, directory)
        task.save(directory / "raw")
        _, leaves = task.flat()
        arrays = {f"{i:03}": leaf.numpy() for i, leaf in enumerate(leaves)}
        np.savez(directory / "inputs.npz", **arrays)  # type: ignore[arg-type]
    return found


def main() -> None:
    way, workload, precision, directory = sys.argv[1:5]
    if way == "openvino":
        found = _openvino(precision, Path(directory))
    else:
        found = _with_torch(way, workload, precision, Path(directory), "--small" in sys.argv)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
