"""What an operator asks of the cache, in Python and on the command line."""

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import run_python
from modules import Scaled, make

import ovshim
from ovshim import OptionError, cache, job
from ovshim.cache import Store, files
from ovshim.cache.entry import write_details
from ovshim.cli import main
from ovshim.version import exact_version

PARTS = {
    "code": "c" * 32,
    "weights": "d" * 32,
    "inputs": "x",
    "options": '{"precision": "fp32", "device": "CPU"}',
    "environment": '{"torch": "2.13.0"}',
}


def publish(store: Store, family: str, variant: str = "01", size: int = 1000, **parts: str) -> Path:
    graph = {"signature": "x: float32[?, 8]", "pattern": [[None, 8]], "route": variant}
    head = {"module": "Net", "method": "forward", "graph": graph, "fingerprint": {**PARTS, **parts}}
    path = store.publish(
        family, variant, lambda d: (d / "model.bin").write_bytes(b"x" * size) and None, head
    ).path
    proof = {"precision": "fp32", "error": 1e-7, "seconds": {"capture": 0.5}}
    store.amend(store.entries(family)[0], "proof", proof)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> Store:
    return Store(root)


def test_info(store: Store, root: Path) -> None:
    assert cache.info(root) == cache.Info(root, None, 0, 0, 0, store.max_size)
    publish(store, "aa")
    damaged = publish(store, "ab")
    (damaged / "model.bin").write_bytes(b"")
    cache.verify(root)
    found = cache.info(root)
    assert (found.entries, found.bytes) == (1, store.size())
    assert 0 < found.quarantined < found.bytes
    json.dumps(found.to_dict())


def test_the_default_is_the_cache_that_accelerate_uses(
    root: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, "aa")
    monkeypatch.setenv("OVSHIM_CACHE_DIR", str(root))
    assert cache.info().directory == root
    assert len(cache.entries()) == 1


def test_a_directory_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="directory"):
        cache.info(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(OptionError, match="directory"):
        cache.prune(5)  # type: ignore[arg-type]
    (tmp_path / "v1").write_bytes(b"")
    found = cache.info(tmp_path)
    assert found.directory is None
    assert found.problem
    assert cache.entries(tmp_path) == []
    assert cache.clear(tmp_path) == cache.Removed(0, 0, 0)
    assert cache.verify(tmp_path) == cache.Verification([], [], [], [])


def test_entries_last_used_first(store: Store, root: Path) -> None:
    for age, family in enumerate(("aa", "ab", "ac")):
        path = publish(store, family)
        os.utime(path / "in-use", (1000.0 - age, 1000.0 - age))
    found = cache.entries(root)
    assert [entry.key for entry in found] == ["aa/01", "ab/01", "ac/01"]
    first = found[0]
    assert (first.module, first.method, first.signature) == ("Net", "forward", "x: float32[?, 8]")
    assert (first.precision, first.error, first.verdict) == ("fp32", 1e-7, None)
    assert first.last_used == 1000.0
    assert abs((first.created or 0) - time.time()) < 60
    assert first.seconds == {"capture": 0.5}
    assert first.fingerprint == PARTS
    assert first.bytes > 1000
    json.dumps(first.to_dict())


def test_an_entry_that_cannot_be_described_is_listed(store: Store, root: Path) -> None:
    path = publish(store, "aa")
    (path / "manifest.json").write_bytes(b"?")
    hostile = publish(store, "ab")
    record = {"graph": [1], "proof": 7, "verdict": "x", "module": {}, "fingerprint": None,
              "created": "long ago"}  # fmt: skip
    (hostile / "manifest.json").write_bytes(files.seal(record))
    found = {entry.key: entry for entry in cache.entries(root)}
    assert found["aa/01"].problem == "the seal does not match"
    odd = found["ab/01"]
    assert (odd.module, odd.created, odd.signature, odd.verdict) == (None,) * 4


def test_verify(store: Store, root: Path) -> None:
    sound, torn, other = (publish(store, family) for family in ("aa", "ab", "ac"))
    (torn / "model.bin").write_bytes(b"x" * 999)
    manifest = files.read_sealed(other / "manifest.json")
    (other / "manifest.json").write_bytes(files.seal({**manifest, "schema": 99}))
    found = cache.verify(root)
    assert found.sound == [sound]
    assert found.foreign == [other]
    assert found.damaged == [(torn, "model.bin does not match its checksum")]
    assert (torn.exists(), other.exists()) == (False, True)
    assert cache.verify(root).damaged == []


def test_verify_of_what_cannot_be_read(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = publish(store, "aa")

    def refuse(path: Path) -> Any:
        raise PermissionError(13, "no")

    monkeypatch.setattr("ovshim.cache.admin.read", refuse)
    found = cache.verify(root)
    assert [where for where, _ in found.unreadable] == [path]
    assert path.exists()


def test_prune_and_clear(store: Store, root: Path) -> None:
    for family in ("aa", "ab", "ac"):
        path = publish(store, family, size=10_000)
    os.utime(path / "in-use", (1.0, 1.0))
    removed = cache.prune(root, max_size="25KB")
    assert (removed.entries, removed.left) == (1, 2)
    assert removed.bytes > 10_000
    assert not path.exists()
    lease = store.hold(store.entries("aa")[0])
    assert lease is not None
    assert cache.clear(root).left == 1
    lease.release()
    assert cache.clear(root).entries == 1
    assert cache.info(root).entries == 0


@pytest.mark.parametrize("size", ["many", -1, True, 1.5, [1]])
def test_a_size_that_is_none(root: Path, store: Store, size: Any) -> None:
    with pytest.raises(OptionError, match="max_size"):
        cache.prune(root, max_size=size)


# ------------------------------------------------------------------ why was this a miss?


def test_parts_that_differ(store: Store, root: Path) -> None:
    publish(store, "aa")
    publish(store, "ab", weights="e" * 32, environment='{"torch": "2.13.1"}')
    found = cache.why_miss("aa", "ab", root)
    assert found.parts == {
        "weights": ("d" * 32, "e" * 32),
        "environment.torch": ("2.13.0", "2.13.1"),
    }
    assert "environment.torch:\n  a: 2.13.0\n  b: 2.13.1" in str(found)
    json.dumps(found.to_dict())


def test_graphs_of_one_fingerprint(store: Store, root: Path) -> None:
    one = publish(store, "aa", "01")
    publish(store, "aa", "02")
    found = cache.why_miss(one, "aa/02", root)
    assert found.parts == {"graph.route": ('"01"', '"02"')}
    assert "do not differ" in str(cache.why_miss(one, one, root))
    assert cache.why_miss(found.a, found.b, root) == found


def test_an_entry_that_recorded_nothing(store: Store, root: Path) -> None:
    publish(store, "aa")
    store.publish("ab", "01", lambda directory: None, {})
    assert cache.why_miss("aa", "ab", root).parts["code"] == ("c" * 32, "not recorded")


def test_places_that_differ(store: Store, root: Path) -> None:
    each = {f"layer.{n}": "00000000" for n in range(30)}
    for family, code, weights in (
        ("aa", {"Net.forward": "11111111", "eps": "1e-05"}, each),
        ("ab", {"Net.forward": "22222222", "eps": "1e-05", "helper": "3"}, dict.fromkeys(each, "")),
    ):
        said = {"code": code, "weights": weights}
        digests = {**PARTS, "code": family, "weights": family}
        write = functools.partial(write_details, details=said)
        store.publish(family, "01", write, {"fingerprint": digests})
    found = cache.why_miss("aa", "ab", root)
    assert found.parts["code.Net.forward"] == ("11111111", "22222222")
    assert found.parts["code.helper"] == ("not there", "3")
    assert len(found.parts) == 2 + 30
    assert "weights: 20 more differences" in str(found)
    # What has no such file, or none that can be read, is compared by its hashes.
    (found.a.path / "fingerprint.json").write_bytes(b"")
    assert cache.why_miss("aa", "ab", root).parts["code"] == ("aa", "ab")


@pytest.mark.parametrize("name", ["a", "ac", "aa/03", "", 5])
def test_a_name_that_is_not_one_entrys(store: Store, root: Path, name: Any) -> None:
    publish(store, "aa")
    publish(store, "ab")
    with pytest.raises(OptionError, match="entr"):
        cache.why_miss(name, "ab", root)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with one module, converted once as it is and once with another attribute in bf16."""
    root = tmp_path_factory.mktemp("filled")
    module, x = make(Scaled), torch.randn(2, 8)
    ovshim.accelerate(module, x, cache_dir=root, prefer="openvino")
    module.k = 3.0
    ovshim.accelerate(module, x, cache_dir=root, prefer="openvino", tolerance=1e-3)
    return root


def test_real_entries_say_what_differs(filled: Path) -> None:
    one, other = cache.entries(filled)
    assert one.module == other.module == "Scaled"
    assert one.signature == "[0]: float32[?, 8]"
    assert set(one.seconds) >= {"capture", "compile"}
    found = cache.why_miss(one, other, filled)
    assert found.parts.keys() == {"code.k", "options.tolerance"}
    assert set(found.parts["code.k"]) == {"2.0", "3.0"}
    assert "code.k:\n" in str(found)
    assert set(one.fingerprint) == {"code", "weights", "inputs", "options", "environment"}
    versions = json.loads(one.fingerprint["environment"])
    assert versions["ovshim"] == exact_version()
    assert versions["torch"] == torch.__version__


def test_what_other_sources_have_made_is_not_used(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = make(Scaled), torch.randn(2, 8)
    for sources, told in (("one", "miss"), ("one", "hit"), ("other", "miss"), ("one", "hit")):
        monkeypatch.setattr(job, "exact_version", lambda sources=sources: sources)
        fast = ovshim.accelerate(module, x, cache_dir=root, prefer="openvino")
        assert ovshim.explain(fast).plans[0]["cache"] == told
    found = cache.why_miss(*cache.entries(root), root)
    assert found.parts == {"environment.ovshim": ("one", "other")}


def test_what_cannot_be_keyed_is_not_cached_and_says_so(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, x = make(Scaled), torch.randn(2, 8)
    module.note = memoryview(b"of bytes that may change")
    with caplog.at_level("INFO", "ovshim"), torch.no_grad():
        fast = ovshim.accelerate(module, x, cache_dir=root, prefer="openvino")
        assert torch.allclose(fast(x), module(x), atol=1e-5)
    assert "Scaled is not cached: note holds an object of type builtins.memoryview" in caplog.text
    (plan,) = ovshim.explain(fast).plans
    assert (plan["path"], plan["cache"]) == ("openvino", "off")
    assert cache.entries(root) == []


# ------------------------------------------------------------------ the command line


def told(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(["cache", *arguments]) == code
    return capsys.readouterr().out


def test_commands_print_what_the_library_says(
    filled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--cache-dir", str(filled), "--json")
    listed = json.loads(told(capsys, "ls", *where))
    assert [entry["key"] for entry in listed] == [entry.key for entry in cache.entries(filled)]
    assert json.loads(told(capsys, "info", *where)) == cache.info(filled).to_dict()
    keys = [entry["key"] for entry in listed]
    why = json.loads(told(capsys, "why-miss", *keys, *where))
    assert why == cache.why_miss(*keys, filled).to_dict()
    sound = json.loads(told(capsys, "verify", *where))
    assert sound == cache.verify(filled).to_dict()
    assert len(sound["sound"]) == 2


def test_commands_in_words(
    store: Store, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OVSHIM_CACHE_DIR", str(root))
    path = publish(store, "aa", size=20_000)
    publish(store, "ab", weights="other")
    assert f"{root}\n2 entries, " in told(capsys, "info")
    head, *rows = told(capsys, "ls").splitlines()
    assert head.split()[:2] == ["key", "module"]
    assert sorted(row.split()[0] for row in rows) == ["aa/01", "ab/01"]
    assert all("float32[?, 8]" in row for row in rows)
    assert "weights:\n" in told(capsys, "why-miss", "aa", "ab")
    assert "0 entries removed" in told(capsys, "prune")
    (path / "model.bin").write_bytes(b"")
    assert f"damaged, in quarantine now: {path}" in told(capsys, "verify", code=1)
    assert "1 entries removed" in told(capsys, "clear")
    assert told(capsys, "ls").splitlines() == ["key  module  precision  size  last used"]


def test_commands_that_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["cache", "info", "--cache-dir", str(tmp_path / "nowhere")]) == 2
    assert main(["cache", "why-miss", "aa", "ab"]) == 2
    assert main(["cache", "prune", "--max-size", "much"]) == 2
    (tmp_path / "v1").write_bytes(b"")
    capsys.readouterr()
    monkeypatch.setenv("OVSHIM_CACHE_DIR", str(tmp_path))
    for action in ("info", "ls"):
        assert main(["cache", action]) == 1
        assert "there is no cache" in capsys.readouterr().err


NET = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh()).eval()

def one():
    return torch.randn(1, 8)

def two():
    return torch.randn(2, 3, 8)

class Random(nn.Module):
    def forward(self, x):
        return x + torch.randn(8)

def random():
    return Random().eval()
"""


def test_warm_fills_a_cache_that_others_then_only_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "warmed_models.py").write_text(NET, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = ["--example", "warmed_models:one", "--example", "warmed_models:two"]
    arguments += ["--cache-dir", str(tmp_path / "prepared"), "--json"]
    assert main(["warm", "warmed_models:net", *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [plan["cache"] for plan in report["plans"]] == ["miss", "miss"]
    assert cache.info(tmp_path / "prepared").entries == 2

    said = run_python(READ_ONLY, str(tmp_path / "prepared"))
    assert said.split() == ["['hit']", "1"]


READ_ONLY = """
import errno, os, sys
from pathlib import Path
import torch, ovshim, warmed_models

def refuse(*args, **kwargs):
    raise OSError(errno.EROFS, "read-only file system")

root = sys.argv[1]
before = sorted(map(str, Path(root).rglob("*")))
real_open, real_mkdir = os.open, os.mkdir
inside = lambda path: str(path).startswith(root)
WRITES = os.O_CREAT | os.O_RDWR | os.O_WRONLY

def open_(path, flags, *args, **kwargs):
    return refuse() if inside(path) and flags & WRITES else real_open(path, flags, *args, **kwargs)

def mkdir(path, *args, **kwargs):
    new = inside(path) and not os.path.isdir(path)
    return refuse() if new else real_mkdir(path, *args, **kwargs)

os.open, os.mkdir, os.utime = open_, mkdir, refuse
for name in ("rename", "replace", "unlink", "rmdir"):
    real = getattr(os, name)
    setattr(os, name, lambda p, *a, real=real, **k: refuse() if inside(p) else real(p, *a, **k))

x = warmed_models.one()
fast = ovshim.accelerate(warmed_models.net(), x, cache_dir=root, prefer="openvino")
with torch.inference_mode():
    fast(x)
print([plan["cache"] for plan in ovshim.explain(fast).plans], fast.ovshim.stats()["openvino"])
assert before == sorted(map(str, Path(root).rglob("*")))
"""


def test_warm_says_what_is_not_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "warmed_models.py").write_text(NET, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("warmed_models", None)
    code = main(["warm", "warmed_models:random", "--example", "warmed_models:one"])
    assert code == 1
    assert "draws random numbers" in capsys.readouterr().out


# ------------------------------------------------------------------ real mounts


MOUNTED = """
import logging, sys
import torch, ovshim
from modules import Scaled, make

said = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("ovshim").addHandler(handler)
module, x = make(Scaled), torch.ones(3, 8)
fast = ovshim.accelerate(module, x, cache_dir=sys.argv[1], prefer="openvino")
with torch.inference_mode():
    assert torch.allclose(fast(x), module(x), atol=1e-5)
(plan,) = ovshim.explain(fast).plans
print(plan["path"], plan["cache"], len(said))
"""


def mounted(command: str, root: Path) -> str:
    """What the script prints with a mount of its own, which nobody else sees."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rm", "true"], check=False).returncode:
        pytest.skip("nobody may mount here")
    script = f'{command} && exec "$0" -c "$1" "$2"'
    places = [str(Path(__file__).parent), *sys.path]
    done = subprocess.run(
        [unshare, "-rm", "sh", "-c", script, sys.executable, MOUNTED, str(root)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("size", ["4k", "8k"])
def test_a_disk_that_is_full(tmp_path: Path, size: str) -> None:
    said = mounted(f"mount -t tmpfs -o size={size},mode=700 tmpfs {tmp_path}", tmp_path)
    assert said == "openvino off 1"


@pytest.mark.slow
def test_a_read_only_mount(tmp_path: Path) -> None:
    assert mounted("true", tmp_path) == "openvino miss 0"
    read_only = f"mount --bind {tmp_path} {tmp_path} && mount -o remount,ro,bind {tmp_path}"
    assert mounted(read_only, tmp_path) == "openvino hit 0"
