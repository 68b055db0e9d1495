"""`explain`: its form is a public promise; the dry run leaves nothing behind."""

import copy
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checks import check, counts, falls_back, plans, quietly, same, served
from modules import (
    Branches,
    CountsInBuffer,
    Mlp,
    Towers,
    UsesHistc,
    make,
)
from test_docs import GUIDE, rows
from torch import nn

import ovshim
from ovshim.plan import Counter
from ovshim.reasons import TABLE
from ovshim.tally import Tally


@pytest.fixture(scope="module")
def served_one(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """Three calls by OpenVINO and one in training mode, which is eager's."""
    module = make(Mlp)
    fast = ovshim.accelerate(
        module,
        torch.randn(3, 8),
        device="CPU",
        precision="fp32",
        prefer="openvino",
        cache_dir=tmp_path_factory.mktemp("explained"),
    )
    with torch.inference_mode():
        for batch in (3, 1, 4):
            fast(torch.randn(batch, 8))
    fast.train()
    fast(torch.randn(3, 8))
    fast.eval()
    return fast


@pytest.fixture(scope="module")
def fallen_back() -> nn.Module:
    with quietly():
        fast = ovshim.accelerate(make(UsesHistc), torch.randn(3, 8), prefer="openvino")
        with torch.inference_mode():
            fast(torch.randn(3, 8))
            fast(torch.randn(3, 8))
    return fast


def test_the_promised_form(served_one: nn.Module) -> None:
    told = ovshim.explain(served_one).to_dict()
    assert told["module"] == "Mlp"
    assert told["device"] == "CPU"
    assert told["precision"] == "fp32"
    assert told["calls"] == {"openvino": 3, "mixed": 0, "eager": 1}
    (plan,) = told["plans"]
    assert isinstance(plan["signature"], str)
    assert "float32" in plan["signature"]
    assert plan["path"] == "openvino"
    assert plan["reason"] is None
    assert plan["precision_run"] == "f32"
    assert isinstance(plan["error"], float)
    assert plan["error"] < 1e-4
    assert plan["speedup"] is None or isinstance(plan["speedup"], float)
    assert plan["cache"] == "miss"
    assert Path(plan["cache_path"]).is_dir()
    assert plan["seconds"].keys() >= {"capture", "compile", "proof"}
    assert all(isinstance(value, float) and value >= 0 for value in plan["seconds"].values())
    assert plan["calls"] == 3


def test_the_promised_form_of_a_fallback(fallen_back: nn.Module) -> None:
    told = ovshim.explain(fallen_back).to_dict()
    assert told["calls"] == {"openvino": 0, "mixed": 0, "eager": 2}
    (plan,) = told["plans"]
    assert plan["path"] == "eager"
    assert plan["reason"].keys() == {"code", "message", "remedy"}
    assert plan["reason"]["code"] == "unsupported-op"
    assert plan["reason"]["code"] in TABLE
    assert "histc" in plan["reason"]["message"]
    assert plan["reason"]["remedy"]
    assert plan["calls"] == 2
    assert plan.keys() >= {
        "signature",
        "path",
        "reason",
        "precision_run",
        "error",
        "speedup",
        "cache",
        "cache_path",
        "seconds",
        "calls",
    }


def test_every_key_is_in_the_guide(served_one: nn.Module) -> None:
    cells = " ".join(row[0] for row in rows(GUIDE, "Reading a report"))
    documented = set(re.findall(r"\w+", cells)) - {"i"}
    told = ovshim.explain(served_one).to_dict()
    assert documented == {*told, *told["plans"][0], "keys_and_values"}  # the last of decodings


def test_it_is_plain_data(served_one: nn.Module, fallen_back: nn.Module) -> None:
    for fast in (served_one, fallen_back):
        told = ovshim.explain(fast).to_dict()
        assert json.loads(json.dumps(told)) == told


def test_it_is_a_snapshot() -> None:
    module = make(Mlp)
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    report = ovshim.explain(fast)
    before = copy.deepcopy(report.to_dict())
    check(fast, module, torch.randn(3, 8))
    assert report.to_dict() == before
    told = ovshim.explain(fast).to_dict()
    told["calls"]["openvino"] = 99
    told["plans"].clear()
    assert counts(fast)["openvino"] == 1
    assert len(plans(fast)) == 1


def test_printed_it_tells_each_plan(served_one: nn.Module, fallen_back: nn.Module) -> None:
    text = str(ovshim.explain(served_one))
    for part in ("Mlp", "CPU", "fp32", "OpenVINO", "f32", "3 openvino", "1 eager"):
        assert part in text
    text = str(ovshim.explain(fallen_back))
    reason = plans(fallen_back)[0]["reason"]
    for part in ("UsesHistc", "eager", reason["message"], reason["remedy"]):
        assert part in text


def test_html(served_one: nn.Module) -> None:
    class Sharp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor, kind: str = "<b>&") -> torch.Tensor:
            return self.linear(x)

    report = ovshim.explain(served_one)
    assert "Mlp" in report.html()
    assert report._repr_html_() == report.html()
    fast = ovshim.accelerate(make(Sharp), (torch.randn(3, 8), "<b>&"), prefer="openvino")
    assert "<b>" not in ovshim.explain(fast).html()


def test_report_is_explain(served_one: nn.Module) -> None:
    assert served_one.ovshim.report().to_dict() == ovshim.explain(served_one).to_dict()
    assert served_one.ovshim.stats() == counts(served_one)


def test_before_any_plan() -> None:
    fast = ovshim.accelerate(make(Mlp))
    told = ovshim.explain(fast).to_dict()
    assert told["calls"] == {"openvino": 0, "mixed": 0, "eager": 0}
    assert told["plans"] == []
    assert "Mlp" in str(ovshim.explain(fast))


def test_every_call_is_counted_by_its_plan() -> None:
    module = make(Mlp)
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
    with served(fast, "openvino", calls=7), torch.inference_mode():
        for _ in range(7):
            fast(torch.randn(2, 8))
    assert sum(plan["calls"] for plan in plans(fast)) == 7
    fast.ovshim.reset_stats()
    assert counts(fast) == {"openvino": 0, "mixed": 0, "eager": 0}
    assert sum(plan["calls"] for plan in plans(fast)) == 0


def test_a_call_that_ends_after_its_plan_is_counted() -> None:
    tally = Tally(make(Mlp), list, strict=False, quiet=True)
    gone: list[Any] = [SimpleNamespace(counted_as="openvino", calls=Counter()) for _ in range(200)]
    for plan in gone:
        plan.calls.add()
        tally.retire([plan])
        plan.calls.add()
    assert tally.served("openvino") > 300
    last = gone[-3:]
    before = tally.served("openvino", last)
    for plan in last:
        plan.calls.add()
    assert tally.served("openvino", last) == before + 3  # also where it stands once more
    tally.reset()
    assert tally.served("openvino") == 0


def test_miss_and_hit_and_off() -> None:
    module = make(Mlp)
    x = torch.randn(3, 8)
    told = [plans(ovshim.accelerate(module, x, prefer="openvino"))[0] for _ in range(2)]
    assert [plan["cache"] for plan in told] == ["miss", "hit"]
    assert told[0]["cache_path"] == told[1]["cache_path"]
    assert told[1]["seconds"].get("capture", 0) == 0
    assert told[1]["error"] < 1e-4
    off = plans(ovshim.accelerate(module, x, prefer="openvino", cache_dir=False))[0]
    assert off["cache"] == "off"
    assert not off["cache_path"]


def test_several_methods_are_in_one_report() -> None:
    fast = ovshim.accelerate(
        make(Towers), methods=["encode_image", "encode_text"], prefer="openvino"
    )
    with torch.inference_mode():
        for _ in range(2):
            fast.encode_image(torch.randn(2, 8))
            fast.encode_text(torch.randn(2, 6))
    assert len(plans(fast)) == 2
    assert sum(counts(fast).values()) == 4


# The dry run


def tree(directory: str) -> list[str]:
    return sorted(
        os.path.join(place, name)
        for place, _, names in os.walk(directory)
        for name in names
        if not name.endswith(".lock")
    )


def snapshot(module: nn.Module) -> Any:
    return [
        (name, dict(part.__dict__), part.training, {k: id(v) for k, v in part._parameters.items()})
        for name, part in module.named_modules()
    ]


def test_the_dry_run_tells_what_would_be() -> None:
    told = ovshim.explain(make(Mlp), torch.randn(3, 8), prefer="openvino").to_dict()
    assert told["module"] == "Mlp"
    assert told["calls"] == {"openvino": 0, "mixed": 0, "eager": 0}
    (plan,) = told["plans"]
    assert (plan["path"], plan["cache"], plan["precision_run"]) == ("openvino", "off", "f32")


def test_the_dry_run_leaves_nothing_behind() -> None:
    module = make(Mlp)
    module.first.train()
    before, state = snapshot(module), copy.deepcopy(module.state_dict())
    random = torch.get_rng_state()
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    kept = x.clone()
    cache = os.environ["OVSHIM_CACHE_DIR"]
    files = tree(cache)
    module.first.eval()
    before[1] = ("first", dict(module.first.__dict__), False, before[1][3])
    ovshim.explain(module, x, prefer="openvino")
    assert tree(cache) == files
    assert snapshot(module) == before
    assert not hasattr(module, "ovshim")
    assert "forward" not in module.__dict__
    same(module.state_dict(), state, 0.0)
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), random)


def test_the_dry_run_of_a_module_that_falls_back() -> None:
    module = make(Branches)
    with quietly():
        (plan,) = ovshim.explain(module, torch.randn(3, 8)).to_dict()["plans"]
    assert plan["path"] == "eager"
    assert plan["reason"]["code"] == "value-dependent"


def test_the_dry_run_of_a_counter_does_not_count() -> None:
    module = make(CountsInBuffer)
    with quietly():
        (plan,) = ovshim.explain(module, torch.randn(3, 8)).to_dict()["plans"]
    assert plan["reason"]["code"] == "mutates-buffer"
    assert module.calls == 0


def test_the_dry_run_does_not_warn() -> None:
    """Its report is the answer: nothing runs in eager yet."""
    with falls_back():
        ovshim.explain(make(UsesHistc), torch.randn(3, 8))


def test_the_dry_run_reads_no_cache() -> None:
    module = make(Mlp)
    x = torch.randn(3, 8)
    ovshim.accelerate(module, x, prefer="openvino")
    (plan,) = ovshim.explain(module, x, prefer="openvino").to_dict()["plans"]
    assert plan["cache"] == "off"


def test_the_dry_run_takes_keywords_and_options() -> None:
    told = ovshim.explain(
        make(Towers),
        (torch.randn(2, 8),),
        example_kwargs={"text": torch.randn(3, 6)},
        prefer="openvino",
        precision="bf16",
    ).to_dict()
    assert told["precision"] == "bf16"
    assert told["plans"][0]["path"] == "openvino"
    with pytest.raises(ovshim.OptionError):
        ovshim.explain(make(Mlp), torch.randn(3, 8), precision="fp7")


def test_the_dry_run_never_raises_for_what_strict_would() -> None:
    with quietly():
        (plan,) = ovshim.explain(make(UsesHistc), torch.randn(3, 8), strict=True).plans
    assert plan["reason"]["code"] == "unsupported-op"


def test_the_dry_run_takes_options_as_a_whole() -> None:
    options = ovshim.Options(prefer="eager", precision="bf16")
    report = ovshim.explain(make(Mlp), torch.randn(3, 8), options=options, precision="fp16")
    assert report.precision == "fp16"
    assert report.plans == []


@pytest.mark.parametrize(
    "fields", [{"precision": "bf16"}, {"precision": "fp7"}, {"nonsense": 1}, {"options": 1}]
)
def test_an_accelerated_module_is_explained_as_it_is(fields: dict[str, Any]) -> None:
    fast = ovshim.accelerate(make(Mlp))
    with pytest.raises(ovshim.OptionError, match=next(iter(fields))):
        ovshim.explain(fast, torch.randn(3, 8), **fields)


def test_what_cannot_be_explained() -> None:
    with pytest.raises(ovshim.OptionError):
        ovshim.explain(make(Mlp))
    with pytest.raises(ovshim.OptionError):
        ovshim.explain(Mlp)  # type: ignore[arg-type]
    with pytest.raises(ovshim.OptionError):
        ovshim.explain(lambda x: x)  # type: ignore[arg-type]
