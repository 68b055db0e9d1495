"""Errors and warnings: their tree, fields, texts and the way to another process."""

import copy
import inspect
import pickle
import re
import threading
import warnings
from typing import Any

import pytest

from ovshim import errors
from ovshim.errors import (
    ArtifactError,
    CalibrationError,
    FallbackError,
    FallbackWarning,
    OptionError,
    OvshimError,
    OvshimWarning,
    PrecisionWarning,
)
from ovshim.reasons import reason

REASON = reason("unsupported-op", "aten::histc")

EXAMPLES: list[tuple[Exception, dict[str, Any], str]] = [
    (
        OptionError("precision", "int3", "'fp32' or None", "Leave it out."),
        {"name": "precision", "value": "int3", "allowed": "'fp32' or None"},
        "Leave it out.",
    ),
    (
        CalibrationError("calibration", None, "example inputs", "Give some ten."),
        {"name": "calibration", "value": None, "allowed": "example inputs"},
        "Give some ten.",
    ),
    (FallbackError(REASON), {"reason": REASON}, REASON.remedy),
    (FallbackWarning(REASON, "Net"), {"reason": REASON, "module": "Net"}, REASON.remedy),
    (
        ArtifactError("a/b.xml", "it is empty.", "Save it again."),
        {"value": "a/b.xml", "problem": "it is empty."},
        "Save it again.",
    ),
    (
        PrecisionWarning("fp16", "the processor computes in bf16.", "Give precision='bf16'."),
        {"value": "fp16", "problem": "the processor computes in bf16."},
        "Give precision='bf16'.",
    ),
]
each = pytest.mark.parametrize(
    ("error", "fields", "remedy"), EXAMPLES, ids=[type(row[0]).__name__ for row in EXAMPLES]
)


@each
def test_text_has_every_part_and_ends_with_the_remedy(
    error: Exception, fields: dict[str, Any], remedy: str
) -> None:
    text = str(error)
    assert text.endswith(remedy)
    for value in fields.values():
        assert str(value) in text


@each
@pytest.mark.parametrize("through", [lambda e: pickle.loads(pickle.dumps(e)), copy.deepcopy])
def test_fields_survive_the_way_to_another_process(
    error: Exception, fields: dict[str, Any], remedy: str, through: Any
) -> None:
    arrived = through(error)
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert {name: getattr(arrived, name) for name in fields} == fields


def test_a_value_that_cannot_be_pickled_travels_as_its_text() -> None:
    lock = threading.Lock()
    error = OptionError("device", lock, "a name", "Give a name.")
    assert error.value is lock
    arrived = pickle.loads(pickle.dumps(error))
    assert arrived.value == repr(lock)
    assert (arrived.name, arrived.allowed, arrived.remedy) == ("device", "a name", "Give a name.")


def test_a_long_value_is_cut() -> None:
    text = str(OptionError("device", "G" * 5000, "a name", "Give a name."))
    assert "device='GGG" in text
    assert len(text) < 300


def test_the_tree_is_the_one_drawn_in_the_docstring() -> None:
    """Indentation in the docstring is inheritance; brackets name the builtin beside it."""
    drawn: dict[str, set[str]] = {}
    parents: dict[int, str] = {}
    for line in (inspect.getdoc(errors) or "").split("\n"):
        row = re.match(r"    ( *)(\w+)(?: \((\w+)\))?(  |$)", line)
        if row:
            indent, name, beside = row[1], row[2], row[3]
            drawn[name] = {beside} if beside else set()
            if indent:
                drawn[name].add(parents[len(indent) - 2])
            parents[len(indent)] = name
    public = {
        name: thing
        for name, thing in vars(errors).items()
        if isinstance(thing, type) and issubclass(thing, Exception) and name[0] != "_"
    }
    assert public.keys() == drawn.keys()
    for name, bases in drawn.items():
        actual = {base.__name__ for base in public[name].__bases__ if base.__name__[0] != "_"}
        assert actual - {"Exception"} == bases, name


def test_one_except_clause_catches_all_errors_and_one_filter_all_warnings() -> None:
    for error, _, _ in EXAMPLES:
        assert isinstance(error, OvshimError) is not isinstance(error, OvshimWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("error", OvshimWarning)
        with pytest.raises(FallbackWarning) as caught:
            warnings.warn(FallbackWarning(REASON, "Net"), stacklevel=1)
    assert caught.value.reason is REASON
