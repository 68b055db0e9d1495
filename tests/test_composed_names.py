"""What code looks up by a name that it composes when it runs is in its key, or it has none."""

import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn

from ovshim.captured_code import variables
from ovshim.fingerprint import Unkeyable, fingerprint
from ovshim.fingerprint.composed import ANY, METHODS, getattr_asks

HELPERS = """
def act(x):
    return bound(x)

def bound(x):
    return x.clamp(max=50.0)

class Kind:
    @staticmethod
    def run(x):
        return bound(x)
"""

OF_ITS_OWN_CLASS = """
import sys, types
class Own(types.ModuleType):
    pass
sys.modules[__name__].__class__ = Own
"""

ANSWERING = """
def __getattr__(name):
    return act
"""

MODEL = """
import enum, functools, importlib, operator, os, sys, types
from torch import nn
import composed_helpers as helpers
pick = getattr

class Forwarding:
    def __getattr__(self, name):
        return getattr(helpers, name)

class Held:
    def act_a(self, x, low=-50.0):
        return helpers.bound(x).clamp(min=low)

class Function:
    def __init__(self, function):
        self.function = function

class Way(enum.Enum):
    A = Function(helpers.bound)

FORWARDING = Forwarding()
LONG = "act_" + "a" * 70

class Net(nn.Module):
    __handlers__ = {"a": helpers.bound}

    def __init__(self):
        super().__init__()
        self.kind = "ac"
        self.held = Held()

    def act_a(self, x, low=-50.0):
        return helpers.bound(x).clamp(min=low)

    def forward(self, x):
        return EXPRESSION

setattr(Net, LONG, lambda self, x: helpers.bound(x))
net = Net()
"""

FOLLOWED = {
    "getattr": 'getattr(helpers, self.kind + "t")(x)',
    "an f-string": 'getattr(helpers, f"{self.kind}t")(x)',
    "getattr by another name": 'pick(helpers, self.kind + "t")(x)',
    "vars": 'vars(helpers)[self.kind + "t"](x)',
    "__dict__": 'helpers.__dict__[self.kind + "t"](x)',
    "reduce": 'functools.reduce(getattr, "Kind.run".split("."), helpers)(x)',
    "attrgetter": 'operator.attrgetter(self.kind + "t")(helpers)(x)',
    "partial": 'functools.partial(getattr, helpers)(self.kind + "t")(x)',
    "a class": 'getattr(helpers, "Kin" + "d").run(x)',
    "an object that forwards": "FORWARDING.act(x)",
    "a method": 'getattr(self, "act_" + self.kind[0])(x)',
    "a method of another object": 'getattr(self.held, "act_" + self.kind[0])(x)',
    "a method with a long name": "getattr(self, LONG)(x)",
    "an enumeration's value": "Way.A.value.function(x)",
    "a table with a name like Python's": 'self.__handlers__["a"](x)',
}

REFUSED = {
    "sys.modules": 'sys.modules["composed_" + "helpers"].act(x)',
    "import_module": 'importlib.import_module("composed_helpers").act(x)',
    "__import__": '__import__("composed_helpers").act(x)',
    "eval": 'eval("helpers.act(x)")',
    "globals": 'globals()["helpers"].act(x)',
    "subclasses": "Forwarding.__subclasses__()[0].act(x)",
    "the environment": "x * float(os.environ[self.kind])",
    "the environment in parts": 'x * float(os.environ["A" + self.kind])',
    "getenv": "x * float(os.getenv(self.kind, '1'))",
}

Load = Callable[..., nn.Module]


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Load]:
    def module(name: str, source: str) -> types.ModuleType:
        path = tmp_path / f"{name}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        made = importlib.util.module_from_spec(spec)
        sys.modules[name] = made
        exec(compile(source, str(path), "exec"), vars(made))
        return made

    def make(expression: str, helpers: str = HELPERS, model: str = MODEL) -> nn.Module:
        module("composed_helpers", helpers)
        found = module("composed_model", model.replace("EXPRESSION", expression)).net
        assert isinstance(found, nn.Module)
        return found

    yield make
    for name in ("composed_helpers", "composed_model"):
        sys.modules.pop(name, None)


def key(module: nn.Module) -> str:
    return fingerprint(module, "forward", inputs="", options="", environment={}).key


def edited(source: str) -> str:
    assert "50.0" in source
    return source.replace("50.0", "4.0")


@pytest.mark.parametrize("name", FOLLOWED)
def test_an_edit_of_what_is_looked_up_changes_the_key(load: Load, name: str) -> None:
    expression = FOLLOWED[name]
    before = load(expression)
    torch.testing.assert_close(before(torch.tensor([60.0])), torch.tensor([50.0]))
    assert key(load(expression)) == key(load(expression))
    assert key(load(expression, edited(HELPERS))) != key(load(expression))


def test_an_edited_default_of_a_method_changes_the_key(load: Load) -> None:
    for name in ("a method", "a method of another object"):
        expression = FOLLOWED[name]
        assert key(load(expression, model=edited(MODEL))) != key(load(expression))


@pytest.mark.parametrize("name", ["a method", "a method of another object"])
def test_what_a_library_puts_into_a_class_is_no_method_of_the_users(
    load: Load, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers gives nn.Module a method as soon as it has made a model."""
    monkeypatch.delattr(nn.Module, "smart_apply", raising=False)
    before = key(load(FOLLOWED[name]))
    config = hf.BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    hf.BertModel(config)
    assert hasattr(nn.Module, "smart_apply")
    assert key(load(FOLLOWED[name])) == before


def test_members_that_are_composed_by_and_by_are_no_part_of_an_enumeration(load: Load) -> None:
    flags = MODEL.replace(
        "class Way(enum.Enum):",
        """class Flag(enum.Flag):
    ONE = 1
    TWO = 2

class Held2(Held):
    flag = Flag.ONE

class Way(enum.Enum):""",
        1,
    ).replace("Held()", "Held2()")
    assert "Held2()" in flags
    expression = FOLLOWED["a method of another object"]
    before = load(expression, model=flags)
    found = key(before)
    one, two = type(sys.modules["composed_model"].Flag.ONE)
    assert one | two
    assert key(before) == found


@pytest.mark.parametrize("more", [OF_ITS_OWN_CLASS, ANSWERING])
def test_a_module_that_answers_by_itself_is_read(load: Load, more: str) -> None:
    name = "act" if more == OF_ITS_OWN_CLASS else "unheard_of"
    expression = f"helpers.{name}(x)"
    first = key(load(expression, HELPERS + more))
    assert first == key(load(expression, HELPERS + more))
    assert first != key(load(expression, edited(HELPERS) + more))


@pytest.mark.parametrize("name", REFUSED)
def test_what_may_reach_anything_has_no_key(load: Load, name: str) -> None:
    with pytest.raises(Unkeyable):
        key(load(REFUSED[name]))


@pytest.mark.parametrize(
    "asked", ['getattr(self, "act_a", None)', 'getattr(self, "act_" + self.kind[0])']
)
def test_modules_that_are_not_asked_are_read_by_name(load: Load, asked: str) -> None:
    expression = f"helpers.act({asked}(x))"
    assert key(load(expression, HELPERS + "unheard_of = 1")) == key(load(expression))


def _constant(self, x):  # type: ignore[no-untyped-def]
    return getattr(self.a["k"](x).b, "name", self.b(x)) or getattr(getattr(x, "a", 0), "b", 1)


def _own(self, x):  # type: ignore[no-untyped-def]
    return [getattr(self, f"layer{i}", None)(x) for i in x]


def _chosen(self, x):  # type: ignore[no-untyped-def]
    return getattr(self, "a" if x else "b")


def _either(self, x):  # type: ignore[no-untyped-def]
    return getattr(self, x or "b")


def _one_of(self, x):  # type: ignore[no-untyped-def]
    return getattr(self, "a" if x else "b" if self.b else x.name, 1)


def _other_one(self, x):  # type: ignore[no-untyped-def]
    return getattr(self, "a", x or 1)


def _joined(self, x):  # type: ignore[no-untyped-def]
    return getattr(x, "a" + x)


def _inner(self, x):  # type: ignore[no-untyped-def]
    return getattr(self["a"], x)


@pytest.mark.parametrize(
    ("function", "asks"),
    [(_constant, ()), (_own, (METHODS,)), (_chosen, (ANY, METHODS)), (_joined, (ANY, METHODS)),
     (_inner, (ANY, METHODS)), (_either, (ANY, METHODS)), (_one_of, (ANY, METHODS))],
)  # fmt: skip
def test_which_names_getattr_is_given(function: types.FunctionType, asks: tuple[str, ...]) -> None:
    assert set(getattr_asks(function.__code__)) == set(asks)


def test_what_getattr_gives_otherwise_is_no_name() -> None:
    # How far such code is seen through is a matter of its Python.
    assert set(getattr_asks(_other_one.__code__)) <= {METHODS}


def _named(k):  # type: ignore[no-untyped-def]
    return ("A" in os.environ and os.environ.get("B", k)) or os.getenv("C") or os.environ["D"]


def _in_parts(k):  # type: ignore[no-untyped-def]
    return os.environ["A" + k.upper()]


def _in_either(k):  # type: ignore[no-untyped-def]
    return os.environ.get("A" if k else "B")


def _has_either(k):  # type: ignore[no-untyped-def]
    return (k or "A") in os.environ


def test_variables_are_named_where_their_whole_name_is_there() -> None:
    assert variables([_named.__code__]) == ["A", "B", "C", "D"]
    for function in (_in_parts, _in_either, _has_either):
        assert variables([function.__code__]) is None


@pytest.mark.parametrize("names", [0, 300])
def test_a_choice_of_variables_in_a_long_function(names: int) -> None:
    """What is jumped to there begins with an instruction of its own."""
    lines = "\n".join(f"    a{n}" for n in range(names))
    found: dict[str, types.FunctionType] = {}
    for asked in ('("A" if flag else "B")', '"B"'):
        exec(f"def f(flag):\n{lines}\n    return {asked} in environ", found)
        # Newer Pythons write the end of the function down twice, with a name for each.
        expected = (None, ["A", "B"]) if "if" in asked else (["B"],)
        assert variables([found["f"].__code__]) in expected
