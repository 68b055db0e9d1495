"""torch keeps working on it: each feature on a plain module and on its twin, and who answered."""

import copy
from collections.abc import Iterator

import pytest
import torch
from checks import ROOT, counts, same
from compatibility import FEATURES, Feature, Model, X, page
from modules import make

import ovshim

# They take no time worth mentioning; the others run in `nox -s full`.
# Of which nothing runs in OpenVINO.
IN_EAGER = ()

QUICK = (
    "fast(x)",
    "nn.Sequential(fast, head)",
    "fast.encoder(x)",
    "torch.func.functional_call(fast, weights, (x,))",
    "copy.deepcopy(fast)",
)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # torch's own, of what is deprecated
@pytest.mark.parametrize(
    "feature",
    [
        pytest.param(f, id=f.code, marks=[] if f.code in QUICK else pytest.mark.slow)
        for f in FEATURES
    ],
)
def test_torch_keeps_working_on_it(feature: Feature) -> None:
    module = make(Model)
    fast = ovshim.accelerate(copy.deepcopy(module), X, prefer="openvino")
    torch.manual_seed(0)
    expected, _ = feature.use(module)
    torch.manual_seed(0)
    actual, asked = feature.use(fast)
    same(actual, expected)
    served = counts(asked)["openvino"]
    assert (served > 0) is (feature.who == "OpenVINO"), ovshim.explain(asked)


def test_the_page_is_of_this_matrix() -> None:
    assert (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8") == page()


# PyTorch's own modules, with the inputs of PyTorch's own tests


def of_torch() -> dict[str, Any]:
    from torch.testing._internal.common_modules import module_db

    return {info.name: info for info in module_db}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, of sizes and of what is deprecated
@pytest.mark.parametrize("name", of_torch())
def test_torchs_own_tests_of_its_modules(name: str) -> None:
    info = of_torch()[name]
    inputs = info.module_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=False
    )
    assert inputs
    in_openvino = 0
    for given in inputs:
        made = given.constructor_input
        module = info.module_cls(*made.args, **made.kwargs).eval()
        args, kwargs = given.forward_input.args, given.forward_input.kwargs
        module(*args, **kwargs)  # some have no weights before
        fast = ovshim.accelerate(copy.deepcopy(module), prefer="openvino", cache_dir=False)
        for under in (torch.inference_mode, torch.enable_grad):
            for _ in range(3):
                torch.manual_seed(0)
                with under():
                    expected = module(*copy.deepcopy(args), **copy.deepcopy(kwargs))
                torch.manual_seed(0)
                with under():
                    actual = fast(*copy.deepcopy(args), **copy.deepcopy(kwargs))
                same(actual, expected, where=f"{given.desc} of {name}")
        in_openvino += counts(fast)["openvino"]
    assert in_openvino > 0 or name in IN_EAGER
