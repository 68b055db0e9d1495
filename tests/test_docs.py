"""What the documentation says is so: its code runs, its tables agree, its links lead somewhere."""

import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_floors import FLOORS, SOURCES, room

import ovshim
from ovshim.cli import parser

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
GUIDE = PAGES["docs/guide.md"]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def program(text: str) -> str:
    """The blocks of Python in a page, on the lines where they stand in it."""
    lines = [""] * (text.count("\n") + 1)
    for block in FENCED.finditer(text):
        if block[1] == "python":
            first = text.count("\n", 0, block.start(2))
            code = block[2].splitlines()
            lines[first : first + len(code)] = code
    return "\n".join(lines)


WITH_CODE = [page for page, text in PAGES.items() if program(text).strip()]


def test_a_programs_lines_stand_where_they_do_in_the_page() -> None:
    text = "one\n```python\nx = 1\n```\n\n```text\ny\n```\n```python\nz = 2\n```\n"
    assert program(text).splitlines() == ["", "", "x = 1", "", "", "", "", "", "", "z = 2", ""]


def test_the_pages_that_should_have_code_have_it() -> None:
    assert {"README.md", "docs/guide.md"} <= set(WITH_CODE)


@pytest.mark.parametrize("page", WITH_CODE)
def test_code_runs_as_it_stands(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A module of its own, not exec: classes have to belong somewhere, as users' classes do.
    name = "page_" + re.sub(r"\W", "_", page.lower())
    path = tmp_path / f"{name}.py"
    path.write_text(program(PAGES[page]), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.chdir(tmp_path)
    spec.loader.exec_module(module)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{page}: {target}"


def anchors(text: str) -> set[str]:
    """Headings as links name them."""
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its head."""
    section = re.split(r"^## ", text, flags=re.MULTILINE)
    (found,) = [part for part in section if part.startswith(heading + "\n")]
    table = [line for line in found.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def test_every_option_is_in_the_guide_with_its_default() -> None:
    documented = {row[0].strip("`"): row[1].strip("`") for row in rows(GUIDE, "Options")}
    fields = dataclasses.fields(ovshim.Options)
    assert documented == {field.name: repr(field.default) for field in fields}


def test_every_command_is_in_the_guide() -> None:
    documented = {row[0].strip("`").split()[1] for row in rows(GUIDE, "The command line")}
    (commands,) = [a for a in parser()._actions if a.dest == "command" or a.metavar == "command"]
    assert commands.choices is not None
    assert documented == set(commands.choices)


def test_the_floors_are_those_that_are_checked() -> None:
    documented: dict[str, set[str]] = {}
    for head, _, rooms in rows(PAGES["docs/design.md"], "Floors"):
        documented.setdefault(head.split()[0], set()).update(re.findall(r"`(\w+)/?`", rooms))
    there = {room(module) for module in SOURCES}
    assert documented == {floor: known & there for floor, known in FLOORS.items()}


def test_the_readmes_two_commands() -> None:
    blocks = [block[2] for block in FENCED.finditer(PAGES["README.md"]) if block[1] == "bash"]
    commands = [block.strip() for block in blocks if ".venv" in block]
    assert len(commands) == 2
    main_job, tests = commands
    for command in commands:
        assert "\n" not in command
        assert command.startswith("python3 -m venv .venv && . .venv/bin/activate && ")
        assert "pip install torch==2.13.0 && pip install" in command
    assert main_job.endswith("&& ovshim demo")
    assert "&& pytest" in tests
    # What .ci/run looks for.
    assert f"<!-- test command -->\n```bash\n{tests}\n```" in PAGES["README.md"]


EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SAID = {
    "digits.py": r"otherwise than eager: 0\n.*calls: 501 openvino\n",
    "ray_data.py": r"served: 0\nworkers that converted: 1 of 2\n",
    "service.py": r"largest relative error: \d\.\de-0[5-9]\n.*calls: 400 openvino\n",
    "spark_udf.py": r"eager: \d\.\de-0[5-9]\n.*converted: 1 of 2\n.*served: 2\n",
    "text_encoder.py": r"against eager: \d\.\de-0[5-9]\n.*calls: 4 openvino\n",
}
# What they need beside the tests' own group.
NEEDS = {"ray_data.py": "ray", "spark_udf.py": "pyspark"}


def test_every_example_is_known() -> None:
    assert [path.name for path in EXAMPLES] == sorted(SAID)


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(example: Path, tmp_path: Path) -> None:
    needed = NEEDS.get(example.name)
    if needed is not None and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    if needed == "pyspark" and not (shutil.which("java") or os.environ.get("JAVA_HOME")):
        pytest.skip("Spark needs Java")
    result = subprocess.run(
        [sys.executable, "-W", "error::ovshim.OvshimWarning", str(example)],
        env=os.environ
        | {"OMP_NUM_THREADS": "1"}  # tests share the cores
        | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
        | {"SPARK_LOCAL_IP": "127.0.0.1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(SAID[example.name], result.stdout), result.stdout
