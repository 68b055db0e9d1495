"""Many processes that build, use, evict, clear and corrupt one cache, and are killed meanwhile."""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from checks import quietly, same, start_python
from torch import nn

import ovshim
from ovshim import cache

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="files in use cannot be removed"),
]

SCALES = (1.0, 2.0, 3.0)
OPERATIONS = 50
SECONDS = 120  # for each process, at the most


class Scaled(nn.Module):
    """One of a few modules, each with a family of its own."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(8, 8)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.scale


def use(root: Path, scale: float) -> str:
    """Accelerate a module by a cache, compare some calls; hit, miss or off."""
    module = Scaled(scale).eval()
    with torch.inference_mode(), quietly():
        fast = ovshim.accelerate(module, torch.ones(2, 8), cache_dir=root, prefer="openvino")
        for _ in range(3):
            x = torch.randn(2, 8)
            same(fast(x), module(x))
    report = ovshim.explain(fast).to_dict()
    assert "build-failed" not in report["eager_reasons"], report
    return str(report["plans"][0]["cache"]) if report["plans"] else "none"


def corrupt(root: Path, draw: random.Random) -> None:
    """One byte of one file, or its end, or the file, or the entry, as nobody should."""
    with suppress(OSError, IndexError, ValueError):  # gone, or empty already
        path = draw.choice([p for p in root.glob("v1/*/*/*") if p.is_file()])
        how = draw.choice(["flip", "cut", "remove", "entry"])
        if how == "entry":
            shutil.rmtree(path.parent)
        elif how == "remove":
            path.unlink()
        elif how == "cut":
            os.truncate(path, draw.randrange(path.stat().st_size))
        else:
            with open(path, "r+b") as file:
                place = draw.randrange(path.stat().st_size)
                file.seek(place)
                byte = file.read(1)
                file.seek(place)
                file.write(bytes([byte[0] ^ 1 << draw.randrange(8)]))


def live(root: Path, seed: int) -> Counter[str]:
    """The life of one process: what it did, and what became of its builds."""
    torch.set_num_threads(1)
    draw = random.Random(seed)
    torch.manual_seed(seed)
    did: Counter[str] = Counter()
    actions: dict[str, Callable[[], object]] = {
        "build": lambda: use(root, draw.choice(SCALES)),
        "evict": lambda: cache.prune(root, max_size=draw.choice([0, 5_000, 50_000])),
        "clear": lambda: cache.clear(root),
        "verify": lambda: cache.verify(root),
        "corrupt": lambda: corrupt(root, draw),
    }
    end = time.monotonic() + SECONDS
    for _ in range(OPERATIONS):
        if time.monotonic() > end:
            break
        # Others in between, so that there is something to hit.
        name = draw.choices(list(actions), weights=[6, 1, 1, 1, 2])[0]
        outcome = actions[name]()
        did[name] += 1
        if isinstance(outcome, str):
            did[outcome] += 1
    return did


def test_a_storm(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(8) as pool:
        did = pool.starmap(live, [(tmp_path, seed) for seed in range(8)])
    total = sum(did, Counter())
    assert total["build"] > 20, total
    assert total["hit"] > 3, total
    assert total["miss"] > 3, total
    assert all(total[name] for name in ("evict", "clear", "corrupt", "verify")), total
    # What is left is sound or found out, and a calm process needs one build at the most.
    cache.verify(tmp_path)
    for scale in SCALES:
        assert use(tmp_path, scale) in ("hit", "miss")
        assert use(tmp_path, scale) == "hit"
    assert not cache.verify(tmp_path).damaged
    assert not list((tmp_path / "v1" / "tmp").iterdir())


KILLED = """
import os, random, select, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import torch._dynamo, openvino, ovshim.build, ovshim.cache, ovshim.capture.dynamo
from test_cache_storm import in_child, use

root, times, draw = Path(sys.argv[1]), int(sys.argv[2]), random.Random(3)
# How long a build takes, and a hit: half of the children are killed in each.
spans = [in_child(lambda: use(root, 1.0)) for _ in range(2)]
at_work = 0
for turn in range(times):
    hits = turn % 2
    if not hits:
        for path in root.glob("v1/[0-9a-f]*/*/manifest.json"):
            path.unlink()
    ended, alive = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ended)
        use(root, 1.0)
        os._exit(0)
    os.close(alive)
    time.sleep(draw.random() * spans[hits])
    os.kill(child, signal.SIGKILL)
    at_work += os.waitpid(child, 0)[1] == signal.SIGKILL
    # A build that was killed before is tried in a child's child, which has to end as well.
    assert select.select([ended], [], [], 300)[0] and os.read(ended, 1) == b"", "an orphan is left"
    os.close(ended)
    left = [p for p in (root / "v1" / "tmp").glob("*")]
    assert len(left) <= 1, left
    for path in left:
        os.utime(path, (0, 0))
    if turn % 10 == 9:  # whatever stands there now, the next one is right, soon, and leaves nothing
        in_child(lambda: use(root, 1.0))
        in_child(lambda: use(root, 1.0))
    ovshim.cache.prune(root)
    assert not list((root / "v1" / "tmp").glob("*"))
print(at_work, *spans)
"""


def in_child(work: Callable[[], object], seconds: float = 300) -> float:
    """Do it in a forked process, which has to end by itself. Seconds that it took."""
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() - began > seconds:
            os.kill(child, signal.SIGKILL)
            raise AssertionError("it is stuck")
        time.sleep(0.01)
    return time.monotonic() - began


def test_builds_killed_at_random_moments(tmp_path: Path) -> None:
    process = start_python(KILLED, str(tmp_path), "200")
    output, errors = process.communicate(timeout=1800)
    assert process.returncode == 0, errors
    assert int(output.split()[0]) > 60
