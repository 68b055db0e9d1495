"""`fast.ovshim.export(directory, layout="ovms")`: a repository for OpenVINO Model Server.

    config.json                     the server's list of models
    <name>/<version>/model.xml      numbered from 1; an export of the same name adds a version
    <name>/<version>/model.bin

A server that has no config yet is started with `--config_path config.json`; paths in it are
relative to it. Inputs and outputs bear names, and what OpenVINO is told is written out: the
server's defaults would compute in bf16 wherever the processor can.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ovshim import runtime
from ovshim.artifact.names import IN_RANGE, names_of
from ovshim.artifact.save import portable, written_whole
from ovshim.errors import ArtifactError, OptionError
from ovshim.options import Options
from ovshim.plan import Plan

__all__ = ["LAYOUTS", "export"]

LAYOUTS = ("ovms",)

CONFIG = "config.json"


def export(
    module: nn.Module,
    call: Callable[..., Any],
    plans: Sequence[Plan],
    where: Path,
    options: Options,
    name: str | None,
) -> list[str]:
    """Add the graphs of these plans to a model repository. Returns the names of the models: of
    several kinds of calls the second is `<name>_2`, and so on.

    Args:
        call: the module's own method, bound: its parameters name the inputs.
        name: of the model; None: that of the module's class, in lower case.

    Raises:
        ArtifactError: there is nothing to export, or the repository cannot be written.
        OptionError: a name that is none; a device that the server's config cannot spell out.
    """
    name = _checked(type(module).__name__.lower() if name is None else name)
    chosen = portable(where, type(module).__qualname__, plans)
    config = _config(where)
    names = [name if n == 0 else f"{name}_{n + 1}" for n in range(len(chosen))]
    for model, plan in zip(names, chosen, strict=True):
        entry = {"config": _entry(model, plan, options)}
        version = 1 + max(_versions(where / model), default=0)
        written_whole(where / model / str(version), lambda d, plan=plan: _write(d, plan, call))  # type: ignore[misc]
        models = [m for m in config["model_config_list"] if m["config"].get("name") != model]
        config["model_config_list"] = [*models, entry]
    _replace(where / CONFIG, config)
    return names


def _checked(name: Any) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        allowed = "letters, digits, underscores, dots and dashes"
        raise OptionError("name", name, allowed, "It is part of a path and of the server's URLs.")
    return name


def _entry(name: str, plan: Plan, options: Options) -> dict[str, Any]:
    """The server's record of a model."""
    graph = plan.graph
    assert graph is not None
    settings = runtime.settings(
        device=options.device,
        precision=graph.hint,
        hint=options.hint,
        streams=options.streams,
        threads=None,
        properties={**dict(graph.properties), **options.properties},
    )
    if options.threads is not None:
        # Not torch's number, and nothing of this machine's cores: the server runs elsewhere.
        settings["INFERENCE_NUM_THREADS"] = options.threads
    if not all(isinstance(value, str | int | float) for value in settings.values()):
        remedy = "Accelerate the module on a single device, such as CPU or GPU."
        raise OptionError("device", options.device, "a device by its own name", remedy)
    return {
        "name": name,
        "base_path": name,
        "target_device": options.device,
        "plugin_config": settings,
    }


def _write(directory: Path, plan: Plan, call: Callable[..., Any]) -> None:
    graph = plan.graph
    assert graph is not None
    inputs, outputs = names_of(plan.kind, graph, call)
    distinct = plan.kind.distinct
    taken = [n for n, i in enumerate(plan.kind.tensors) if i in distinct]
    model = runtime.core().read_model(str(graph.source))
    for result in model.get_results():
        source = result.input_value(0)
        if source.get_node().get_type_name() == "Parameter":
            # One tensor has one set of names: the output's would take the place of the input's.
            apart = runtime.openvino().opset16.identity(source)
            result.input(0).replace_source_output(apart.output(0))
    model.validate_nodes_and_infer_types()
    for port, n in zip(model.inputs, taken, strict=True):
        port.get_tensor().set_names({inputs[n]})
    checked = (IN_RANGE,) if len(model.outputs) > len(outputs) else ()
    for port, name in zip(model.outputs, (*outputs, *checked), strict=True):
        port.get_tensor().set_names({name})
    target = str(directory / "model.xml")
    runtime.openvino().save_model(model, target, compress_to_fp16=False)


def _versions(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    return [int(p.name) for p in directory.iterdir() if re.fullmatch(r"[1-9]\d*", p.name)]


def _config(where: Path) -> dict[str, Any]:
    """The config that is there, or an empty one."""
    path = where / CONFIG
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"model_config_list": []}
    except (OSError, ValueError) as error:
        what, remedy = f"it cannot be read: {error}.", "Correct it, or name another directory."
        raise ArtifactError(str(path), what, remedy) from error
    models = found.get("model_config_list") if isinstance(found, dict) else None
    if not isinstance(models, list) or not all(_is_model(model) for model in models):
        remedy = "Correct it, or name another directory."
        raise ArtifactError(str(path), "it is no config of a model server.", remedy)
    return {**found, "model_config_list": models}


def _is_model(stored: Any) -> bool:
    return isinstance(stored, dict) and isinstance(stored.get("config"), dict)


def _replace(path: Path, config: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        remedy = "Make room, or name a directory that can be written to."
        raise ArtifactError(str(path), f"it cannot be written: {error}.", remedy) from error
