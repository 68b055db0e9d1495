"""The table of reasons, and the page that documents it."""

import ast
import dataclasses
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from ovshim import reasons, tally
from ovshim.reasons import TABLE, Reason, reason

PAGE = Path(__file__).parents[1] / "docs" / "reasons.md"


def rows_of_the_page() -> list[tuple[str, str, str]]:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"\| `([^`]+)` \| (.+) \| (.+) \|", line) for line in lines]
    return [(row[1], row[2], row[3]) for row in found if row]


def test_the_page_has_every_row_of_the_table_and_no_other() -> None:
    rows = rows_of_the_page()
    assert len({code for code, _, _ in rows}) == len(rows)
    assert {code: (message, remedy) for code, message, remedy in rows} == dict(TABLE)


def test_the_page_says_of_which_reasons_nobody_is_warned() -> None:
    text = PAGE.read_text(encoding="utf-8")
    sentence = text.partition("Nobody is warned of these,")[2].partition(".")[0]
    assert set(re.findall(r"`([a-z-]+)`", sentence)) == tally._SILENT
    assert {"grad"} == tally._FINE_WITH_STRICT - tally._SILENT


def test_every_code_is_given_somewhere() -> None:
    """As a string in the first argument of a call of `reason`."""
    given: set[Any] = set()
    for path in Path(reasons.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "reason":
                strings = (n for n in ast.walk(node.args[0]) if isinstance(n, ast.Constant))
                given.update(constant.value for constant in strings)
    assert set(TABLE) <= given


@pytest.mark.parametrize("code", TABLE)
def test_code_message_and_remedy_are_well_formed(code: str) -> None:
    message, remedy = TABLE[code]
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", code)
    for sentence in (message, remedy):
        assert re.fullmatch(r"[A-Za-z].*[^.]\.", sentence)
        assert "|" not in sentence  # it would end a cell of the page
    assert message != remedy


def test_a_detail_follows_the_sentence() -> None:
    found = reason("unsupported-op", "aten::histc in encoder.layer.0")
    assert found.message == (
        "An operator has no OpenVINO counterpart: aten::histc in encoder.layer.0."
    )
    assert found.remedy == TABLE["unsupported-op"].remedy
    assert str(found) == f"{found.message} {found.remedy}"


@pytest.mark.parametrize("detail", ["x failed.", "x  failed", "x\n failed.\n"])
def test_a_detail_becomes_part_of_one_sentence(detail: str) -> None:
    assert reason("build-failed", detail).message.endswith("error: x failed.")


@pytest.mark.parametrize("detail", ["", " ", "\n"])
def test_without_a_detail_the_sentence_stands_alone(detail: str) -> None:
    assert reason("random", detail).message == TABLE["random"].message


def test_an_unknown_code_is_a_mistake_of_ours() -> None:
    with pytest.raises(KeyError):
        reason("no-such-code")


def test_the_table_is_read_only() -> None:
    table: Any = TABLE
    with pytest.raises(TypeError):
        table["new"] = table["off"]


def test_a_reason_is_a_value() -> None:
    found: Any = reason("slower", "3.1 ms against 2.0 ms")
    assert found == Reason(**found.to_dict())
    assert pickle.loads(pickle.dumps(found)) == found
    assert len({found, reason("slower", "3.1 ms against 2.0 ms")}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.code = "off"
