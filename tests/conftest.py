"""What every test stands on: a cache of its own, a fixed seed, and no network."""

import os
from collections.abc import Iterator

# Before anything imports transformers, which reads it once. Child processes inherit it.
os.environ["HF_HUB_OFFLINE"] = "1"
# Before torch is imported. Eager's threads spin while they wait, which takes the cores from the
# other worker: with one more load on two cores a test takes several times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch

# A first call converts and compiles: its length says nothing about the property.
hypothesis.settings.register_profile("ovshim", deadline=None)
hypothesis.settings.load_profile("ovshim")


@pytest.fixture(scope="session", autouse=True)
def _away_from_the_users_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For what fixtures of a wider scope accelerate; each xdist worker has its own session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OVSHIM_CACHE_DIR", str(tmp_path_factory.mktemp("session-cache")))
        patch.delenv("OVSHIM", raising=False)
        yield


@pytest.fixture(autouse=True)
def _alone(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache directory and a random state that no other test has touched."""
    monkeypatch.setenv("OVSHIM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("OVSHIM", raising=False)
    torch.manual_seed(0)
