"""Entries that others have written, checksums and all: a miss at worst, never a wrong answer."""

import copy
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import quietly, run_python, same
from modules import Scaled, make

import ovshim
from ovshim import build
from ovshim.cache import Store, files
from ovshim.job import BuildStopped, Job
from ovshim.reasons import reason

ODD: list[Any] = [None, True, -1, 0, 7, 2**70, 1e308, float("inf"), "", "x", "../../x", [], {},
                  [[]], [[None]], {"x": 1}, [-5, 10**9], "a" * 1000]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a record, the record itself left out."""
    items = enumerate(value) if isinstance(value, list) else ()
    for key, inner in value.items() if isinstance(value, dict) else items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def with_value(record: Any, path: tuple[Any, ...], value: Any) -> Any:
    changed = copy.deepcopy(record)
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return changed


class Case:
    """A module, a call of it, and a cache with its entry; what it would cost to miss is spared."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root, self.module, self.x = root / "cache", make(Scaled), torch.randn(3, 8)
        with torch.inference_mode():
            self.expected = self.module(self.x)
        self.accelerated()
        (found,) = (self.root / "v1").glob("*/*/manifest.json")
        self.sound, self.inside = self.root, found.relative_to(self.root)
        self.manifest = files.read_sealed(found)
        self.copies = 0

        def missed(job: Job, family: str) -> Any:
            raise BuildStopped(reason("prefer-eager"))

        patch.setattr(build, "_from_cache_or_capture", missed)

    def accelerated(self) -> str:
        """How the cache answered, after a check of the answer: a graph that the proof of a hit lets
        pass is right within its tolerance there, and about so elsewhere."""
        fast = ovshim.accelerate(self.module, self.x, cache_dir=self.root, prefer="openvino")
        with torch.inference_mode():
            same(fast(self.x), self.expected, tolerance=1e-2)
        (plan,) = ovshim.explain(fast).plans
        str(ovshim.explain(fast))
        assert plan["reason"] is None or plan["reason"]["code"] != "build-failed"
        return "miss" if plan["cache"] == "off" else plan["cache"]

    @property
    def entry(self) -> Path:
        """The manifest."""
        return self.root / self.inside

    def again(self) -> None:
        """Another copy of the sound cache: a thread may still write its notes to the last one."""
        self.copies += 1
        self.root = self.sound.with_name(f"copy{self.copies}")
        shutil.copytree(self.sound, self.root)

    def forge(self, manifest: Any) -> None:
        self.again()
        self.entry.write_bytes(_sealed(manifest))


def _sealed(manifest: Any) -> bytes:
    """With infinities, which `files.seal` refuses and a reader of JSON takes."""
    body = json.dumps(manifest).encode()
    return files._HEAD % files.xxhash.xxh3_128(body).hexdigest().encode() + body + files._TAIL


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    return Case(tmp_path, monkeypatch)


def test_the_case_itself_hits(case: Case) -> None:
    case.forge(case.manifest)
    assert case.accelerated() == "hit"
    case.root = case.root.with_name("empty")
    with quietly():
        assert case.accelerated() == "miss"


@pytest.mark.parametrize("many", [60, pytest.param(1500, marks=pytest.mark.slow)])
def test_any_value_of_a_manifest(case: Case, many: int) -> None:
    draw = random.Random(0)
    everywhere = list(places(case.manifest))
    outcomes = set()
    for _ in range(many):
        case.forge(with_value(case.manifest, draw.choice(everywhere), draw.choice(ODD)))
        with quietly():
            outcomes.add(case.accelerated())
        for entry in Store(case.root).entries(case.entry.parent.parent.name):
            assert entry.path == case.entry.parent
    assert outcomes == {"hit", "miss"}


@pytest.mark.parametrize("limit", [2**63, -(10**30)])
def test_limits_that_no_integer_of_a_tensor_has(case: Case, limit: int) -> None:
    proof = {**case.manifest["proof"], "limits": {"0": sorted([0, limit])}}
    case.forge({**case.manifest, "proof": proof})
    with quietly():
        assert case.accelerated() == "miss"


FUZZ = """
import faulthandler, random, sys
from pathlib import Path
import pytest, torch
from test_hostile_entries import Case, files
from checks import quietly

def resealed(case):
    manifest = dict(case.manifest)
    manifest["files"] = {}
    for name in case.manifest["files"]:
        size, digest = files.checksum(case.entry.parent / name)
        manifest["files"][name] = {"size": size, "xxh3": digest}
    return manifest

case = Case(Path(sys.argv[1]), pytest.MonkeyPatch())
draw, outcomes = random.Random(int(sys.argv[3])), {"hit": 0, "miss": 0}
for turn in range(int(sys.argv[2])):
    case.again()
    path = case.entry.parent / draw.choice(["model.xml", "model.xml", "model.bin"])
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 1, 8])):
        at = draw.randrange(len(data))
        how = draw.randrange(4)
        if how == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif how == 1:
            data[at:at + 1] = bytes([draw.choice(b'0123456789<>"=/- ')])
        elif how == 2:
            del data[at:at + draw.choice([1, 8, len(data)])]
        else:
            data[at:at] = data[at:at + draw.choice([1, 50])]
    path.write_bytes(data)
    case.entry.write_bytes(files.seal(resealed(case)))
    print(turn, file=sys.stderr, flush=True)
    with quietly():
        outcomes[case.accelerated()] += 1
print(outcomes["hit"], outcomes["miss"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_graphs_with_other_bytes(tmp_path: Path, seed: int) -> None:
    hits, misses = map(int, run_python(FUZZ, str(tmp_path), "120", str(seed)).split())
    assert hits + misses == 120
    assert misses >= 40


FAILING = """
import errno, itertools, sys
from pathlib import Path
import pytest, torch, ovshim
from checks import quietly, same
from modules import Scaled, make
from test_cache import Failing

root, first, step = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
module, x = make(Scaled), torch.randn(3, 8)
with torch.inference_mode():
    expected = module(x)

def accelerated(where):
    fast = ovshim.accelerate(module, x, cache_dir=where, prefer="openvino")
    with torch.inference_mode():
        same(fast(x), expected)
    (plan,) = ovshim.explain(fast).plans
    reason = (plan["reason"] or {"code": ""})["code"]
    assert reason != "build-failed", plan
    return plan["cache"]

accelerated(root / "sound")
patch, seen, fails = pytest.MonkeyPatch(), set(), 0
failing = Failing(patch, within=root)
for position in itertools.count(first, step):
    where = root / str(position)
    with quietly(), failing.at(position, errno.EIO):
        accelerated(where)
    if failing.count < position:
        break
    fails += 1
    seen.add(accelerated(where))
print(fails, *sorted(seen))
"""


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1, 5))
def test_a_build_survives_any_failing_system_call(tmp_path: Path, first: int) -> None:
    fails, *seen = run_python(FAILING, str(tmp_path), str(first), "4").split()
    assert int(fails) > 10
    assert set(seen) <= {"hit", "miss"}


@pytest.mark.parametrize("cut", [0, 10])
def test_a_file_that_is_cut_while_it_is_in_use(tmp_path: Path, cut: int) -> None:
    module, x = make(Scaled), torch.randn(2, 8)
    fast = ovshim.accelerate(module, x, cache_dir=tmp_path, prefer="openvino")
    with torch.inference_mode():
        same(fast(x), module(x))
        (weights,) = tmp_path.glob("v1/*/*/model.bin")
        with weights.open("r+b") as file:
            file.truncate(cut)
        for rows in (2, 3, 2):
            x = torch.randn(rows, 8)
            same(fast(x), module(x))
    assert ovshim.explain(fast).to_dict()["calls"]["openvino"] > 1
