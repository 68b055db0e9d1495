"""Every module is on a known floor and imports downwards only; `import ovshim` stays light."""

import ast
import graphlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# A floor may import from those above it in this table; 2a and 2b do not know each other. A room is
# a module or a folder directly under ovshim/.
FLOORS: dict[str, set[str]] = {
    "0": {
        "binding",
        "helper",
        "options",
        "arguments",
        "checks",
        "errors",
        "imports",
        "inherited",
        "lazy",
        "pace",
        "reasons",
        "shortage",
        "signals",
        "unfused",
        "version",
    },
    "1": {
        "containers",
        "signature",
        "matcher",
        "example",
        "shapes",
        "buckets",
        "classes",
        "guards",
        "values",
        "views",
        "watch",
        "stays",
        "building",
        "conditions",
        "deferred",
        "scripted",
        "captured_code",
        "namespaces",
        "attributes",
        "reached",
        "dict_versions",
        "carried",
        "places",
        "untouched",
        "special_mode",
        "modes",
        "random_generators",
        "settings",
        "stamps",
        "watched",
        "outside",
        "fingerprint",
        "cache",
        "onnx_module",
        "report",
        "progress",
        "pages",
        "garbage",
        "hooks",
        "waiting",
        "intraop",
    },
    "2a": {"runtime", "executed"},
    "2b": {"preflight", "inputs", "verify", "race", "generation", "child", "frozen", "mapped"},
    "2c": {"infer", "pool", "single", "slots", "properties", "capture", "precision"},
    "3": {
        "answered",
        "artifact",
        "auto",
        "background",
        "blobs",
        "build",
        "builder",
        "decode",
        "eager",
        "early",
        "floats",
        "job",
        "lanes",
        "lean",
        "rest",
        "rival",
        "turns",
        "unmet",
        "lowering",
        "miss",
        "ran",
        "record",
        "trial",
        "verdict",
        "assemble",
        "hit",
        "kept",
        "tally",
        "tiny",
        "dispatch",
        "shortcut",
        "unplanned",
        "plan",
        "planner",
        "families",
        "gradients",
        "recordable",
        "proof",
        "limits",
        "wanted",
    },
    "4": {
        "__init__",
        "__main__",
        "api",
        "backend",
        "bound",
        "cli",
        "foreign",
        "handle",
        "holders",
        "loaded",
        "parts",
        "scope",
        "serve",
        "twin",
    },
}
HEIGHT = {"0": 0, "1": 1, "2a": 2, "2b": 2, "2c": 3, "3": 4, "4": 5}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
NO_NEIGHBOURS = {"2a", "2b"}
NOT_ON = {
    "1": {"openvino", "nncf"},
    "2a": {"torch"},
    "2b": {"openvino", "nncf"},
}
HEAVY = ("openvino.", "nncf.", "torch._dynamo.", "transformers.", "onnx.", "sklearn.")


def package() -> Path:
    """The directory of the package under test, installed or not, without importing it."""
    spec = importlib.util.find_spec("ovshim")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def sources() -> dict[str, Path]:
    """Dotted name of each module, with its file."""
    root = package()
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = ["ovshim", *path.relative_to(root).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


SOURCES = sources()


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imports(tree: ast.AST, package_name: str, known: set[str]) -> Iterator[str]:
    """Every module that is imported, at the top or in a function, as a dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(base, package_name)
            for alias in node.names:
                module = f"{base}.{alias.name}"
                yield module if module in known else base


def imports_of(module: str) -> list[str]:
    path = SOURCES[module]
    package_name = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return list(imports(tree, package_name, set(SOURCES)))


def objections(module: str, imported: list[str]) -> list[str]:
    """What is wrong with these imports of that module."""
    floor = FLOOR_OF[room(module)]
    found = []
    for name in imported:
        top = name.partition(".")[0]
        if top == "ovshim":
            other = FLOOR_OF[room(name)]
            lower = HEIGHT[other] < HEIGHT[floor]
            beside = other == floor and (floor not in NO_NEIGHBOURS or room(name) == room(module))
            if not lower and not beside:
                found.append(f"{module} (floor {floor}) imports {name} (floor {other})")
        elif top in NOT_ON.get(floor, set()) or (
            floor == "0" and top not in sys.stdlib_module_names
        ):
            found.append(f"{module} (floor {floor}) imports {name}")
    return found


@pytest.mark.parametrize("module", SOURCES)
def test_every_module_is_on_a_floor_and_imports_downwards(module: str) -> None:
    assert room(module) in FLOOR_OF, f"give {module} a floor, here and in the documentation"
    assert objections(module, imports_of(module)) == []


def test_no_room_imports_itself_by_way_of_others() -> None:
    """Rooms, not modules: within a folder, its files and what they share may know each other."""
    doors: dict[str, set[str]] = {room(module): set() for module in SOURCES}
    for module in SOURCES:
        doors[room(module)].update(
            room(name)
            for name in imports_of(module)
            if name in SOURCES and room(name) != room(module)
        )
    graphlib.TopologicalSorter(doors).prepare()


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("ovshim.errors", "from .reasons import Reason", 0),
        ("ovshim.errors", "import torch", 1),
        ("ovshim.errors", "def f():\n    from .cache import Store", 1),
        ("ovshim.cache", "from . import options, build", 1),
        ("ovshim.cache", "from ovshim import __version__", 1),
        ("ovshim.cache", "import openvino.properties", 1),
        ("ovshim.race", "from ovshim.verify import compare", 1),
        ("ovshim.race", "import ovshim.runtime", 1),
        ("ovshim.runtime", "import torch.nn as nn", 1),
        ("ovshim.capture.dynamo", "from ..runtime import core; from .rewrites import apply", 0),
        ("ovshim.capture.dynamo", "from ..build import make", 1),
        ("ovshim.plan", "from .dispatch import Dispatcher; import openvino", 0),
        ("ovshim.api", "from ovshim import twin, build, runtime, verify", 0),
    ],
)
def test_the_check_sees_what_it_should(module: str, source: str, wrong: int) -> None:
    known = {f"ovshim.{name}" for name in FLOOR_OF}
    found = list(imports(ast.parse(source), module.rpartition(".")[0], known))
    assert len(objections(module, found)) == wrong


def test_importing_ovshim_loads_nothing_heavy() -> None:
    """What a build needs comes with the first build; most of it takes a second or more to load."""
    script = (
        "import sys, ovshim; print(*sys.modules); "
        "ovshim.accelerate, ovshim.enabled; print(*sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(package().parent)}
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    plain, used = (line.split() for line in result.stdout.splitlines())
    assert "ovshim" in plain
    assert "torch" not in plain  # `ovshim run` leaves that to the script
    assert "ovshim.api" in used
    assert [name for name in used if f"{name}.".startswith(HEAVY)] == []
