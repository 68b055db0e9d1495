"""What every test stands on: a cache of its own, a fixed seed, and no network."""

import logging
import os
import zlib
from collections.abc import Callable, Iterator, Sequence

# Before anything imports transformers, which reads it once. Child processes inherit it.
os.environ["HF_HUB_OFFLINE"] = "1"
# Before torch is imported. Eager's threads spin while they wait, which takes the cores from the
# other worker: with one more load on two cores a test takes several times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from collections import Counter
from typing import Any

import hypothesis
import pytest
import torch
from cases import CASES

# A first call converts and compiles: its length says nothing about the property.
hypothesis.settings.register_profile("ovshim", deadline=None)
hypothesis.settings.load_profile("ovshim")

# To what does not propagate pytest adds handlers of its own, and for whoever listens torch writes
# down all of a capture: a twentieth of the suite's time.
logging.getLogger("torch.__trace").propagate = True

# Where tiny graphs are compiled in every way there is, and the fastest is looked for, whatever is
# tested. It is a quarter of the suite's time: of the other tests every eighth does so on a change.
_OF_TINY_GRAPHS = frozenset(
    {
        "test_answered",
        "test_compiled",
        "test_first_answer",
        "test_hot_path",
        "test_infer",
        "test_lanes",
        "test_rival",
        "test_shortcut",
    }
)
_EVERY = 8


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the further cases as slow, before those are left out."""
    seen: Counter[str] = Counter()
    for item in items:
        name = getattr(item, "originalname", item.name)
        seen[name] += 1
        if seen[name] > CASES.get(name, seen[name]):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def _away_from_the_users_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For what fixtures of a wider scope accelerate; each xdist worker has its own session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OVSHIM_CACHE_DIR", str(tmp_path_factory.mktemp("session-cache")))
        patch.delenv("OVSHIM", raising=False)
        yield


@pytest.fixture(autouse=True)
def _alone(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """A cache directory and a random state that no other test has touched."""
    monkeypatch.setenv("OVSHIM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("OVSHIM", raising=False)
    if not _looks_for_ways(request):
        monkeypatch.setattr("ovshim.tiny._is_tiny", lambda *_: False)
    if request.path.stem != "test_garbage":
        # Its look goes through all that pytest and hypothesis have made: 0.4 s each time.
        monkeypatch.setattr("ovshim.garbage.note", lambda *_: None)
    torch.manual_seed(0)


def _looks_for_ways(request: pytest.FixtureRequest) -> bool:
    whole = "not slow" not in request.config.getoption("-m")
    by_turns = zlib.crc32(request.node.name.encode()) % _EVERY == 0
    return whole or by_turns or request.path.stem in _OF_TINY_GRAPHS


@pytest.fixture
def exact_wins(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Graphs for some sizes alone win their race; what was compiled for such."""
    from ovshim import runtime, tiny

    compiled: list[Any] = []
    compile_model = runtime.compile_model

    def noted(*args: Any) -> Any:
        if any(args[3:]):
            compiled.append(args[3])
        return compile_model(*args)

    def rounds(calls: Sequence[Callable[[], Any]], *_: Any, **__: Any) -> list[list[float]]:
        return [[1e-6 / (n + 1)] * 5 for n in range(len(calls))]

    monkeypatch.setattr(runtime, "compile_model", noted)
    monkeypatch.setattr(tiny, "rounds", rounds)
    monkeypatch.setattr(tiny, "_seconds", lambda call: 0.0)
    return compiled
