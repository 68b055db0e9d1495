"""The page of coverage, and what keeps it from being taken for a good one."""

from torch import nn

from conformance.check import Record
from conformance.coverage import broken, page
from conformance.drawing import draw
from conformance.entries import Entry

CORPUS = {
    name: Entry(name, nn.Identity, draw(), path=path, tags=frozenset({tag}))
    for name, path, tag in (
        ("encoder/one", "openvino", "real"),
        ("encoder/two", "either", "real"),
        ("values/three", "eager", "awkward"),
    )
}


def _records(*paths: str) -> dict[str, Record]:
    made = {}
    for entry, path in zip(CORPUS.values(), paths, strict=False):
        reason = "value-dependent" if path == "eager" else None
        message = "Which operations run depends: a | b at x.py:1." if reason else None
        made[entry.name] = Record(entry.name, entry.path, path=path, reason=reason, message=message)
    return made


def test_a_kept_promise_breaks_nothing() -> None:
    assert not list(broken(CORPUS, _records("openvino", "mixed", "eager")))


def test_what_breaks_a_promise_is_told() -> None:
    records = _records("eager", "eager", "openvino")
    records["encoder/two"].wrong.append("example: output: off by 1")
    assert list(broken(CORPUS, records)) == [
        "encoder/one: eager for openvino",
        "encoder/two: wrong: example: output: off by 1",
        "values/three: openvino for eager",
        "0% of the architectures in OpenVINO, 85% promised",
    ]
    assert "values/three: not run" in list(broken(CORPUS, _records("openvino", "openvino")))


def test_the_page_counts_and_gives_reasons() -> None:
    told = page(CORPUS, _records("openvino", "mixed", "eager"))
    assert "| architectures | 2 | 1 | 1 | 0 | 0 |" in told
    assert "| awkward modules | 1 | 0 | 0 | 1 | 0 |" in told
    assert "100% of the architectures" in told
    assert "| `value-dependent` | 0 | 1 |" in told
    assert "| three | eager | `value-dependent` a \\| b at x.py:1 |" in told
