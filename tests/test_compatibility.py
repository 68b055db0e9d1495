"""torch keeps working on it: each feature on a plain module and on its twin, and who answered."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from checks import ROOT, counts, same
from compatibility import FEATURES, Feature, Model, X, page
from modules import make
from torch import nn

import ovshim

# They take no time worth mentioning; the others run in `nox -s full`.
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

# Of these nothing runs in OpenVINO: losses, whose operators it lacks, and random numbers.
LOSSES = "BCE CTC CosineEmbedding GaussianNLL HingeEmbedding MarginRanking MultiLabelMargin"
IN_EAGER = {f"{name}Loss" for name in [*LOSSES.split(), "MultiMargin", "PoissonNLL"]}
IN_EAGER |= {"FractionalMaxPool2d", "FractionalMaxPool3d"}
INITIALS = "ABCEFGHIKLMNPRSTZ"
# LinearCrossEntropyLoss alone has hundreds, which differ in a flag or two.
MOST_INPUTS = 10


def answer_or_error(module: nn.Module, under: Any, given: Any) -> Any:
    torch.manual_seed(0)
    args, kwargs = copy.deepcopy((given.args, given.kwargs))
    try:
        with under():
            return module(*args, **kwargs)
    except Exception as error:  # whatever torch says to it
        return f"{type(error).__name__}: {error}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, of sizes and of what is deprecated
@pytest.mark.parametrize("initial", INITIALS)
def test_torchs_own_tests_of_its_modules(initial: str) -> None:
    from torch.testing._internal.common_modules import module_db

    infos = {info.name.removeprefix("nn."): info for info in module_db}
    assert {name[0] for name in infos} == set(INITIALS)
    infos = {name: info for name, info in infos.items() if name[0] == initial}
    in_eager = set(infos)
    for name, info in infos.items():
        inputs = info.module_inputs_func(
            info, device="cpu", dtype=torch.float32, requires_grad=False, training=False
        )
        assert inputs
        for number, given in enumerate(inputs[:MOST_INPUTS]):
            made, call = given.constructor_input, given.forward_input
            module = info.module_cls(*made.args, **made.kwargs).eval()
            answer_or_error(module, torch.no_grad, call)  # some have no weights before
            fast = ovshim.accelerate(copy.deepcopy(module), prefer="openvino", cache_dir=False)
            modes = [torch.inference_mode, torch.enable_grad][: 2 if number == 0 else 1]
            for under in [mode for mode in modes for _ in range(3)]:
                expected = answer_or_error(module, under, call)
                same(answer_or_error(fast, under, call), expected, where=f"{name}, {given.desc}")
            if counts(fast)["openvino"] > 0:
                in_eager.discard(name)
    assert in_eager == {name for name in IN_EAGER if name[0] == initial}
