"""Compiled graphs are kept, and taken up early; neither decides what is served."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import same
from modules import two_layers as net
from torch import nn

import ovshim
from ovshim import blobs, build, cache, early, executed, hit, intraop, runtime, tiny
from ovshim.cache.entry import OURS
from ovshim.infer import Engine, EngineDead


class Seen:
    """Which graphs OpenVINO compiles and imports."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.compiled: list[str] = []
        self.imported: list[str] = []
        compile_model, import_model = runtime.compile_model, runtime.import_model

        def compiling(source: Path, *rest: Any) -> Any:
            self.compiled.append(threading.current_thread().name)
            return compile_model(source, *rest)

        def importing(*given: Any) -> Any:
            self.imported.append(threading.current_thread().name)
            return import_model(*given)

        monkeypatch.setattr(runtime, "compile_model", compiling)
        monkeypatch.setattr(runtime, "import_model", importing)

    def forget(self) -> None:
        self.compiled.clear()
        self.imported.clear()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    monkeypatch.setattr(blobs, "_LEAST_BYTES", 0)
    # Nobody finds out how so small a graph is best run, which compiles it too.
    monkeypatch.setattr(tiny, "_TINY_BYTES", -1)
    yield Seen(monkeypatch)
    assert not any(t.name == "ovshim-compile" for t in threading.enumerate())


def fast_net(directory: Path, last: float = 0.0, **options: Any) -> Any:
    options = {"prefer": "openvino", **options}
    return ovshim.accelerate(net(last), torch.ones(3, 64), cache_dir=directory, **options)


def check(fast: Any, cached: str, last: float = 0.0) -> None:
    x = torch.randn(3, 64)
    with torch.inference_mode():
        same(fast(x), net(last)(x))
    report = ovshim.explain(fast).to_dict()
    assert report["calls"]["openvino"] == 1
    assert report["plans"][0]["cache"] == cached


def kept(directory: Path) -> list[Path]:
    found = cache.entries(directory)
    return [entry.path for entry in found if (entry.signature or "").endswith(", compiled")]


def test_a_hit_imports_what_was_compiled(seen: Seen, tmp_path: Path) -> None:
    check(fast_net(tmp_path), "miss")
    assert (len(seen.compiled), seen.imported) == (1, [])
    assert len(kept(tmp_path)) == 1
    seen.forget()
    check(fast_net(tmp_path), "hit")
    # In the thread that the hint has begun, before the fingerprint was known.
    assert (seen.compiled, seen.imported) == ([], ["ovshim-compile"])
    assert len(kept(tmp_path)) == 1


@pytest.mark.slow
def test_what_it_was_compiled_for_is_its_key(seen: Seen, tmp_path: Path) -> None:
    check(fast_net(tmp_path), "miss")
    for n, options in enumerate(({"threads": 1}, {"hint": "throughput"}, {"streams": 2})):
        seen.forget()
        check(fast_net(tmp_path, **options), "hit")
        assert (len(seen.compiled), seen.imported) == (1, [])
        assert len(kept(tmp_path)) == n + 2


def test_a_hint_decides_nothing(seen: Seen, tmp_path: Path) -> None:
    check(fast_net(tmp_path), "miss")
    # At a glance it is the same module, and the other one's graph is begun with.
    check(fast_net(tmp_path, last=3.0), "miss", last=3.0)
    check(fast_net(tmp_path), "hit")
    check(fast_net(tmp_path, last=3.0), "hit", last=3.0)


def test_no_hint_no_haste(seen: Seen, tmp_path: Path) -> None:
    check(fast_net(tmp_path), "miss")
    for path in (tmp_path / "v1" / "hints").iterdir():
        path.write_bytes(b"{}")
    seen.forget()
    check(fast_net(tmp_path), "hit")
    assert seen.imported == ["ovshim-compile"]  # beside eager's part of the proof


@pytest.mark.parametrize(
    "how", ["flipped", *(pytest.param(how, marks=pytest.mark.slow) for how in ("cut", "gone"))]
)
def test_a_damaged_one_is_compiled_again(seen: Seen, tmp_path: Path, how: str) -> None:
    check(fast_net(tmp_path), "miss")
    file = kept(tmp_path)[0] / "compiled.blob"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(data if how == "flipped" else data[:-1])
    seen.forget()
    check(fast_net(tmp_path), "hit")
    assert (len(seen.compiled), seen.imported) == (1, [])
    assert (tmp_path / "v1" / "quarantine").is_dir() or how == "gone"
    seen.forget()
    check(fast_net(tmp_path), "hit")
    assert len(seen.imported) == 1


@pytest.mark.slow
def test_one_that_cannot_be_imported_is_compiled_again(
    seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(fast_net(tmp_path), "miss")

    def refuses(*given: Any) -> Any:
        raise RuntimeError("another version's")

    seen.forget()
    with monkeypatch.context() as patched:
        patched.setattr(runtime, "import_model", refuses)
        check(fast_net(tmp_path), "hit")
    assert len(seen.compiled) == 1
    seen.forget()
    check(fast_net(tmp_path), "hit")
    assert len(seen.imported) == 1


def test_one_that_computes_something_else_never_serves(
    seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(fast_net(tmp_path), "miss")
    other = net()
    with torch.no_grad():
        other[2].bias.add_(1)  # type: ignore[operator, union-attr]
    ovshim.accelerate(other, torch.ones(3, 64), cache_dir=tmp_path / "other", prefer="openvino")
    wrong = runtime.core().compile_model(
        str(next((tmp_path / "other").glob("v1/*/*/model.xml"))),
        "CPU",
        {"INFERENCE_PRECISION_HINT": "f32"},
    )
    with monkeypatch.context() as patched:
        patched.setattr(runtime, "import_model", lambda *given: wrong)
        # Nothing of the entry is trusted any more: it is made anew, and proved in full.
        check(fast_net(tmp_path), "miss")
    assert len(kept(tmp_path)) == 1
    check(fast_net(tmp_path), "hit")


class Ran:
    """Which threads have called a compiled graph."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.threads: list[str] = []
        self.engines: list[Engine] = []
        run = Engine.run

        def running(engine: Engine, *given: Any, **kwargs: Any) -> list[torch.Tensor]:
            self.threads.append(threading.current_thread().name)
            self.engines.append(engine)
            return run(engine, *given, **kwargs)

        monkeypatch.setattr(Engine, "run", running)


def test_the_proof_takes_the_call_that_was_made_early(
    seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(fast_net(tmp_path), "miss")
    ran = Ran(monkeypatch)
    fast = fast_net(tmp_path)
    assert ran.threads == ["ovshim-compile"]
    check(fast, "hit")
    # What it took memory for, and is bound to, serves on.
    assert len(set(map(id, ran.engines))) == 1


@pytest.mark.parametrize("threads", [2, 3])
def test_eager_works_in_one_thread_beside_a_compilation(
    threads: int, seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two, that is: of more it would take too long."""
    check(fast_net(tmp_path), "miss")
    looked, counted = threading.Event(), []
    importing, look = runtime.import_model, hit._looked_small

    def slowly(*given: Any) -> Any:
        looked.wait(10 if threads == 2 else 0.2)
        return importing(*given)

    def watched(*given: Any) -> Any:
        counted.append((torch.get_num_threads(), looked.is_set()))
        looked.set()
        return look(*given)

    monkeypatch.setattr(runtime, "import_model", slowly)
    monkeypatch.setattr(hit, "_looked_small", watched)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        fast = fast_net(tmp_path)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    one = threads == 2 and intraop.can_be_one()
    assert counted == [(1 if one else threads, False)]
    check(fast, "hit")


def test_eager_that_fails_beside_a_compilation_waits_for_it(
    seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(fast_net(tmp_path), "miss")
    looked, importing = threading.Event(), runtime.import_model

    def slowly(*given: Any) -> Any:
        looked.wait(10)
        return importing(*given)

    def fails(*given: Any) -> Any:
        looked.set()
        raise KeyboardInterrupt

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(runtime, "import_model", slowly)
            patched.setattr(hit, "_looked_small", fails)
            with pytest.raises(KeyboardInterrupt):
                fast_net(tmp_path)
        assert not any(t.name == "ovshim-compile" for t in threading.enumerate())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    check(fast_net(tmp_path), "hit")


Call = Callable[[Any], tuple[Engine, list[torch.Tensor]]]


def change_early_call(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[list[Any], Call], Call]
) -> None:
    """Have another call made early.

    Args:
        change: gives it, for the leaves of the input and the call that there is; may change those.
    """
    small_call = early._small_call

    def changed(*given: Any) -> tuple[list[Any], Call]:
        leaves, call = small_call(*given)
        return leaves, change(leaves, call)

    monkeypatch.setattr(early, "_small_call", changed)


def test_a_call_of_something_else_proves_nothing(
    seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(fast_net(tmp_path), "miss")
    ran = Ran(monkeypatch)

    def other(leaves: list[Any], call: Call) -> Call:
        leaves[0].add_(1)  # they are what the call reads
        return call

    change_early_call(monkeypatch, other)
    fast = fast_net(tmp_path)
    assert ran.threads == ["ovshim-compile", threading.current_thread().name]
    check(fast, "hit")


def test_a_wrong_answer_to_the_early_call_never_serves(
    seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(fast_net(tmp_path), "miss")

    def wrong(_: list[Any], call: Call) -> Call:
        def answer(compiled: Any) -> tuple[Engine, list[torch.Tensor]]:
            engine, tensors = call(compiled)
            return engine, [tensor + 1 for tensor in tensors]

        return answer

    with monkeypatch.context() as patched:
        change_early_call(patched, wrong)
        check(fast_net(tmp_path), "miss")
    check(fast_net(tmp_path), "hit")


def test_an_early_call_that_fails_costs_the_graph(
    seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(fast_net(tmp_path), "miss")

    def failing(compiled: Any) -> tuple[Engine, list[torch.Tensor]]:
        raise EngineDead("it failed")

    change_early_call(monkeypatch, lambda *_: failing)
    seen.forget()
    check(fast_net(tmp_path), "hit")
    # The one that has failed is not used any more.
    assert seen.imported == ["ovshim-compile", threading.current_thread().name]


@pytest.fixture(params=["beside", "behind"])
def compared(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the weights are compared with their checksum: beside the compilation, or behind it."""
    where: str = request.param
    if where == "behind":
        monkeypatch.setattr(early, "_BEHIND_BYTES", 0)
    return where


def damage(directory: Path) -> None:
    (weights,) = directory.glob("v1/*/*/model.bin")
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 0x40
    weights.write_bytes(data)


def test_weights_are_compared_where_it_takes_no_time(
    seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compared: str
) -> None:
    check(fast_net(tmp_path), "miss")
    whole, sound = [], cache.Store.sound

    def watched(store: cache.Store, path: Path, unread: str | None = None) -> Any:
        if unread is None:
            whole.append(threading.current_thread().name)
        return sound(store, path, unread)

    monkeypatch.setattr(cache.Store, "sound", watched)
    check(fast_net(tmp_path), "hit")
    here = threading.current_thread().name
    assert whole == ["ovshim-compile" if compared == "behind" else here]


def test_weights_damaged_on_the_disk_are_found_meanwhile(
    seen: Seen, tmp_path: Path, compared: str
) -> None:
    check(fast_net(tmp_path), "miss")
    damage(tmp_path)
    check(fast_net(tmp_path), "miss")
    assert (tmp_path / "v1" / "quarantine").is_dir()
    check(fast_net(tmp_path), "hit")


def test_weights_are_compared_though_the_compilation_has_failed(
    seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compared: str
) -> None:
    check(fast_net(tmp_path), "miss")
    ran = executed.precision_run

    def fails(compiled: Any) -> str:
        if threading.current_thread().name == "ovshim-compile":
            raise RuntimeError("it fails there")
        return ran(compiled)

    monkeypatch.setattr(executed, "precision_run", fails)
    check(fast_net(tmp_path), "hit")
    damage(tmp_path)
    check(fast_net(tmp_path), "miss")
    assert (tmp_path / "v1" / "quarantine").is_dir()


def test_an_entry_that_took_the_place_of_a_damaged_one_serves(
    seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(early, "_BEHIND_BYTES", 0)
    check(fast_net(tmp_path), "miss")
    (entry,) = tmp_path.glob("v1/*/*/model.bin")
    importing, from_cache = runtime.import_model, build.from_cache
    replaced = threading.Event()

    def meanwhile(*given: Any) -> Any:
        compiled = importing(*given)
        store = cache.Store(tmp_path)
        (found,) = store.entries(entry.parents[1].name)
        # The same graph, published anew beside another file.
        head = {name: found.manifest[name] for name in found.manifest if name not in OURS}
        kept = {name: found.file(name).read_bytes() for name in found.manifest["files"]}
        kept["more"] = b"than there was"

        def write(directory: Path) -> None:
            for name, data in kept.items():
                (directory / name).write_bytes(data)

        store.discard(found)
        store.publish(found.family, found.variant, write, head)
        replaced.set()
        return compiled

    def afterwards(*given: Any) -> Any:
        assert replaced.wait(60)
        return from_cache(*given)

    monkeypatch.setattr(runtime, "import_model", meanwhile)
    monkeypatch.setattr(build, "from_cache", afterwards)
    check(fast_net(tmp_path), "hit")
    assert (entry.parent / "more").exists()


def test_a_compiled_graph_brings_no_weights(seen: Seen, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 256, 3), nn.BatchNorm2d(256), nn.Conv2d(256, 64, 3)).eval()
    with torch.no_grad():
        module[1].running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr, operator]
    x = torch.randn(2, 3, 12, 12)
    fast = ovshim.accelerate(module, x, cache_dir=tmp_path, prefer="openvino")
    with torch.inference_mode():
        same(fast(x), module(x))
    (blob,) = kept(tmp_path)
    (weights,) = tmp_path.glob("v1/*/*/model.bin")
    # BatchNorm is in the convolution's weights, which lie in the graph's own file.
    assert (blob / "compiled.blob").stat().st_size < weights.stat().st_size / 4


_DIES = """
import os, sys, torch
from torch import nn
import ovshim
from ovshim import blobs, runtime, tiny
blobs._LEAST_BYTES, tiny._TINY_BYTES = 0, -1
if sys.argv[2] == "dies":
    runtime.import_model = lambda *given: os.abort()
torch.manual_seed(0)
module = nn.Linear(8, 8).eval()
fast = ovshim.accelerate(module, torch.ones(2, 8), cache_dir=sys.argv[1], prefer="openvino")
x = torch.ones(3, 8)
with torch.inference_mode():
    assert torch.allclose(fast(x), module(x), atol=1e-5)
print(ovshim.explain(fast).to_dict()["plans"][0]["path"])
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="a child is forked to try it")
def test_one_that_ends_the_process_does_so_once(tmp_path: Path) -> None:
    def run(how: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "ignore", "-c", _DIES, str(tmp_path), how]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert run("lives").stdout == "openvino\n"
    assert run("lives").stdout == "openvino\n"
    assert run("dies").returncode < 0
    after = run("dies")
    assert (after.returncode, after.stdout) == (0, "eager\n"), after.stderr


def test_a_read_only_cache_gives_what_it_has(
    seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(fast_net(tmp_path), "miss")
    monkeypatch.setattr("os.access", lambda *given: False)
    seen.forget()
    check(fast_net(tmp_path), "hit")
    assert len(seen.imported) == 1


@pytest.mark.slow
def test_bf16_stays_bf16(seen: Seen, tmp_path: Path) -> None:
    def ran(**options: Any) -> str:
        plan = ovshim.explain(fast_net(tmp_path, **options)).to_dict()["plans"][0]
        return str(plan["precision_run"])

    first = [ran(), ran(precision="bf16")]
    assert [ran(), ran(precision="bf16")] == first
    assert first[0] == "f32"
    assert len(seen.imported) == 2
