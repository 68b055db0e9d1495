"""What is checked, each in an environment of its own: ``nox -l`` lists it, ``nox`` runs the usual.

Everything runs against the installed wheel, not the checkout, so that a file missing from the
wheel is noticed.
"""

from pathlib import Path

import nox

nox.needs_version = ">=2025.2"
nox.options.sessions = ["tests", "lint", "types"]
nox.options.error_on_missing_interpreters = True

PROJECT = nox.project.load_toml("pyproject.toml")

# Exact, because the errors and timings that the checks compare belong to one release, and first,
# so that the build for the CPU stays in place where it was chosen.
TORCH = "torch==2.13.0"

# Tests differ in length by a hundred: a worker that is done takes over from one that is not.
PARALLEL = ("-n", "2", "--dist", "worksteal")


def install(session: nox.Session, *groups: str) -> None:
    session.install(TORCH)
    session.install(".", *nox.project.dependency_groups(PROJECT, *groups))


@nox.session
def tests(session: nox.Session) -> None:
    """The tests that run on every change."""
    install(session, "test")
    session.run("pytest", *PARALLEL, *session.posargs)


@nox.session(python=["3.12", "3.13"], default=False)
def newer(session: nox.Session) -> None:
    """The same on newer Pythons."""
    install(session, "test")
    session.run("pytest", *PARALLEL, *session.posargs)


@nox.session
def full(session: nox.Session) -> None:
    """Every test but the conformance corpus, those that take long among them."""
    install(session, "test")
    session.run("pytest", *PARALLEL, "-m", "not conformance", *session.posargs)


@nox.session
def conformance(session: nox.Session) -> None:
    """The corpus of modules, real and awkward ones, and PyTorch's operators; a whole run writes
    docs/coverage.md and docs/operators.md."""
    install(session, "conformance")
    results = Path(session.create_tmp())
    for former in results.glob("*.json"):
        former.unlink()
    # Passive: threads that spin while they wait would take the cores from the other worker.
    env = {"CONFORMANCE_RESULTS": str(results), "OMP_WAIT_POLICY": "passive"}
    run = ("pytest", *PARALLEL, "-m", "conformance", *session.posargs)
    if session.posargs:
        session.run(*run, env=env)
        return
    # The page is written of a run with failures as well, and ends the session with them.
    session.run(*run, env=env, success_codes=[0, 1])
    page = ("-m", "conformance.coverage", str(results), "docs/coverage.md")
    session.run("python", *page, env={"PYTHONPATH": "tests"})
    operators = ("-m", "conformance.operators", "docs/operators.md")
    session.run("python", *operators, env={"PYTHONPATH": "tests"})


@nox.session
def ecosystem(session: nox.Session) -> None:
    """Libraries built on torch, each given an accelerated model (docs/ecosystem.md), and engines
    that call one in several processes (docs/workers.md), Spark where there is Java."""
    install(session, "ecosystem")
    tests = ("tests/test_ecosystem.py", "tests/test_workers.py", "tests/test_docs.py")
    session.run("pytest", *PARALLEL, "-m", "slow", *tests, *session.posargs)


# By page in docs, what is measured for it.
PAGES = {
    "benchmarks": (
        "benchmarks",
        "--ignore=benchmarks/test_precision.py",
        "--ignore=benchmarks/test_scaling.py",
    ),
    "precision": ("benchmarks/test_precision.py",),
    "performance": ("benchmarks/test_scaling.py",),
}


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmarks, on an otherwise idle machine; names of pages choose among them."""
    install(session, "bench")
    pages = [name for name in PAGES if name in session.posargs] or list(PAGES)
    rest = [argument for argument in session.posargs if argument not in PAGES]
    failed = []
    for name in pages:
        try:
            # Other backends warn as they please; a benchmark of them is no place to object.
            # Nothing of a page may have been chosen by -k: that is no failure.
            arguments = (*PAGES[name], "-W", "default", *rest)
            session.run("pytest", *arguments, success_codes=[0, 5])
        except nox.command.CommandFailed:  # the other pages are measured all the same
            failed.append(name)
    if failed:
        session.error(f"something failed: {', '.join(failed)}")


@nox.session
def lint(session: nox.Session) -> None:
    """Style and format, without installing the package."""
    session.install(*nox.project.dependency_groups(PROJECT, "lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Types of the package, and of the public names as users write them."""
    install(session, "lint")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation as pages, in docs/_build."""
    session.install(*nox.project.dependency_groups(PROJECT, "docs"))
    session.run("sphinx-build", "-W", "--keep-going", "docs", "docs/_build")
