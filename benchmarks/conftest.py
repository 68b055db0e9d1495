"""Options of the benchmarks, what they share, and the tables at the end.

pytest benchmarks -W default                all but inductor, which compiles for minutes
pytest benchmarks -W default --quick        small models, few rounds: does it all work?
pytest benchmarks -W default --write-docs   everything, into the pages in docs
pytest benchmarks/test_precision.py ...     what is on docs/precision.md alone
pytest benchmarks/test_scaling.py ...       what is on docs/performance.md alone
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import machine
import page
import performance_page
import precision_page
import precisions
import pytest
import quiet
import rows
import scaling
import workloads
from board import Board
from interleave import Effort

_COLD = ("ResNet-50", "BERT-base/128")
_COLD_SMALL = ("MLP 256-256-10",)
_BUILT = (*_COLD_SMALL, *_COLD)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ovshim benchmarks")
    group.addoption("--quick", action="store_true", help="small models and few rounds")
    group.addoption("--inductor", action="store_true", help="torch.compile too, which takes long")
    group.addoption(
        "--patience",
        type=float,
        default=15.0,
        metavar="SECONDS",
        help="for how long each group may wait for the machine to be quiet (default: 15)",
    )
    group.addoption(
        "--write-docs",
        action="store_true",
        help="write those pages in docs of which everything is run; inductor included",
    )


_BOARD = pytest.StashKey[Board]()


def pytest_configure(config: pytest.Config) -> None:
    quick = config.getoption("--quick")
    if quick and config.getoption("--write-docs"):
        raise pytest.UsageError("--write-docs takes the full run: leave --quick out.")
    patience = config.getoption("--patience")
    config.stash[_BOARD] = Board(
        small=quick,
        inductor=config.getoption("--inductor") or config.getoption("--write-docs"),
        axis_effort=Effort(0.2, 3, 5, 1, 0.0) if quick else Effort(2.0, 5, 21, 1, patience),
        effort=Effort(0.5, 3, 7, 1, 0.0) if quick else Effort(6.0, 9, 61, 2, patience),
        starts=2 if quick else 7,
        load=quiet.share_of_others() if config.getoption("--write-docs") else 0.0,
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    small = config.getoption("--quick")
    if "case" in metafunc.fixturenames:
        inductor = config.getoption("--inductor") or config.getoption("--write-docs")
        pairs = [(c, b) for c, b in workloads.cases(small) if inductor or b != "inductor"]
        metafunc.parametrize(("case", "backend"), pairs, ids=[_id(*pair) for pair in pairs])
    if "cold" in metafunc.fixturenames:
        metafunc.parametrize("cold", _COLD_SMALL if small else _COLD)
    if "built" in metafunc.fixturenames:
        metafunc.parametrize("built", _COLD_SMALL if small else _BUILT)


def _id(case: workloads.Case, backend: str) -> str:
    """A name that -k and every terminal take."""
    return re.sub(r"[^a-z0-9]+", "-", f"{case.workload}-{case.batch}-{backend}".lower())


def pytest_collection_finish(session: pytest.Session) -> None:
    """Note which backends each group needs: what was deselected is not built either."""
    chosen = session.config.stash[_BOARD].chosen
    for item in session.items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            params = item.callspec.params
            case, backend = params.get("case"), params.get("backend")
            if isinstance(case, workloads.Case) and isinstance(backend, str):
                chosen.setdefault(case, []).append(backend)


@pytest.fixture(scope="session")
def board(pytestconfig: pytest.Config) -> Board:
    return pytestconfig.stash[_BOARD]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    found = config.stash[_BOARD]
    say = terminalreporter.write_line
    tables = [
        (rows.HEAD, [row.cells() for row in found.rows]),
        (page.COLD_HEAD, found.cold),
        (page.BUILD_HEAD, found.built),
        (precisions.HEAD, [row.cells() for group in found.precision.values() for row in group]),
        (
            precisions.ACCURACY_HEAD,
            [row.cells() for group in found.accuracy.values() for row in group],
        ),
        *(
            (scaling.head_of(axis), [point.cells() for point in axis.points])
            for axis in found.axes.values()
        ),
    ]
    if any(lines for _, lines in tables):
        terminalreporter.section("how many times as fast")
        for name, value in machine.describe():
            say(f"{name}: {value}")
    for head, lines in tables:
        if lines:
            say("")
            for line in rows.text(head, lines):
                say(line)
    if config.getoption("--write-docs"):
        _write(found, config.rootpath / "docs", say)


def _write(found: Board, docs: Path, say: Callable[[str], None]) -> None:
    """Write each page of which the run has measured everything."""
    measured = {(case, backend) for case, chosen in found.chosen.items() for backend in chosen}
    # A workload's rows are added together, when all of its ways have been measured.
    cold, built = ({row[0] for row in lines} for lines in (found.cold, found.built))
    started = cold == set(_COLD) and built == set(_BUILT)
    calls = not set(workloads.cases(small=False)) - measured and started
    precision = len(found.precision) == len(precisions.SUBJECTS)
    if calls:
        path = docs / "benchmarks.md"
        path.write_text(
            page.page(found.rows, found.cold, found.built, found.load), encoding="utf-8"
        )
        say(f"{path} was written.")
    if precision and len(found.accuracy) == len(precisions.ACCURACY_OF):
        path = docs / "precision.md"
        text = precision_page.page(found.precision, found.accuracy, found.load)
        path.write_text(text, encoding="utf-8")
        say(f"{path} was written.")
    if len(found.axes) == len(scaling.AXES):
        say(f"{performance_page.write(found.axes, found.load, docs)} was written.")
    say("Pages of which the run is not whole were left as they are.")
