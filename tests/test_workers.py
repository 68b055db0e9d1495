"""Workers of Ray and Spark: right, accelerated, and one conversion for all of them.

The engines start processes of their own, some tens of seconds' worth; `examples/` holds what users
would write for Ray Data and for Spark, and `test_docs.py` runs it.
"""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import ROOT, same
from torch import Tensor, nn

import ovshim

pytestmark = [
    pytest.mark.slow,
    # Engines warn as they please; of what is ours nothing may be in the way.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::ovshim.OvshimWarning"),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def given() -> Tensor:
    return torch.linspace(-1, 1, 24).view(3, 8)


class Worker:
    """What both kinds of processes hold. Their classes reach them by value: they have not to
    import this file."""

    def __init__(self, model: nn.Module, accelerate: bool) -> None:
        import ovshim

        example = torch.zeros(3, 8)
        self.fast: Any = (
            ovshim.accelerate(model, example, prefer="openvino") if accelerate else model
        )

    def answer(self) -> tuple[Any, dict[str, Any]]:
        """The second answer, and the report with what the process was given."""
        with torch.inference_mode():
            for _ in range(2):
                y = self.fast(torch.linspace(-1, 1, 24).view(3, 8))
        told = ovshim.explain(self.fast).to_dict()
        return y.numpy(), {**told, "process": os.getpid(), "threads": torch.get_num_threads()}


def assert_converted(answers: list[Any], conversions: int) -> None:
    with torch.inference_mode():
        expected = network()(given())
    for y, told in answers:
        same(torch.tensor(y), expected)
        assert told["calls"]["openvino"] > 0, told
        assert told["threads"] == 1  # Ray's; OpenVINO takes as many, and they are not pinned
    assert len({told["process"] for _, told in answers}) == len(answers)
    caches = [plan["cache"] for _, told in answers for plan in told["plans"]]
    assert sorted(caches) == sorted(["miss"] * conversions + ["hit"] * (2 - conversions))
    assert len(list(Path(os.environ["OVSHIM_CACHE_DIR"]).rglob("*.xml"))) == 1


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A cluster of two workers on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        places = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, places)))
        import ray

        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield ray
        ray.shutdown()


@pytest.mark.parametrize("accelerate", [True, False], ids=["accelerates", "is given"])
def test_actors_of_ray(
    ray: Any, accelerate: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each accelerates the module that it is given, or is given one that is accelerated."""
    monkeypatch.setenv("OVSHIM_CACHE_DIR", str(tmp_path))
    settings = {"env_vars": {"OVSHIM_CACHE_DIR": str(tmp_path)}}
    model = network()
    if not accelerate:
        model = ovshim.accelerate(model, given(), prefer="openvino")
    actor = ray.remote(num_cpus=1, runtime_env=settings)(Worker)
    workers = [actor.remote(model, accelerate) for _ in range(2)]
    answers = ray.get([worker.answer.remote() for worker in workers], timeout=200)
    assert_converted(answers, conversions=1 if accelerate else 0)
    for worker in workers:
        ray.kill(worker)


def test_replicas_of_ray_serve(ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVSHIM_CACHE_DIR", str(tmp_path))
    from ray import serve

    class Replica(Worker):
        def __init__(self) -> None:
            super().__init__(network(), accelerate=True)

        def __call__(self) -> tuple[Any, dict[str, Any]]:
            return self.answer()

    settings = {"num_cpus": 1, "runtime_env": {"env_vars": {"OVSHIM_CACHE_DIR": str(tmp_path)}}}
    deployment = serve.deployment(Replica, num_replicas=2, ray_actor_options=settings)
    serve.start(http_options={"location": "NoServer"})
    try:
        handle = serve.run(deployment.bind(), route_prefix=None)
        answers: dict[int, Any] = {}
        for _ in range(100):  # each replica's turn comes, at random
            y, told = handle.remote().result(timeout_s=200)
            answers[told["process"]] = (y, told)
            if len(answers) == 2:
                break
    finally:
        serve.shutdown()
    assert_converted(list(answers.values()), conversions=1)
