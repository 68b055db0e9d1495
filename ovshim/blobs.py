"""Compiled graphs, kept as OpenVINO exports them: importing one is faster than compiling again.

On the CPU, two threads of a Zen 5, a graph with an open batch (OpenVINO 2026.4): ResNet-50 0.07 s
to compile, 0.03 to import; BERT-base 0.29 and 0.19. With its weights in it a blob of BERT-base
takes 0.6 or more: so they stay in the IR, as far as they are there as the compiled graph has them;
that they are is what `runtime.fold` is for.

OpenVINO's own cache (CACHE_DIR) leaves the precision out of its key, takes an IR for unchanged by
its time, and checks nothing that it reads. Here a blob is an entry of the store like any other,
checksums and all, and its key is everything that it was made of and for.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from ovshim import runtime
from ovshim.cache.entry import Entry
from ovshim.cache.store import Store, StoreError

__all__ = ["compiled", "discard", "keep"]

log = logging.getLogger("ovshim")

_FILE, _VARIANT = "compiled.blob", "0"
# Below that it takes no time worth a file.
_LEAST_BYTES = 16 << 20


def compiled(
    store: Store, entry: Entry, device: str, settings: Mapping[str, Any]
) -> tuple[Any, bool]:
    """The compiled graph of an entry, and whether it was there already.

    Raises:
        RuntimeError: OpenVINO cannot compile it.
    """
    source = entry.file("model.xml")
    if not _pays(entry, device):
        return runtime.compile_model(source, device, settings), False
    key = _key(entry, device, settings)
    blob = store.content(key, _VARIANT, _FILE)
    settings = _to_export(device, settings)
    if blob is not None:
        try:
            return runtime.import_model(blob, source.with_suffix(".bin"), device, settings), True
        except RuntimeError as error:
            log.info("%s was compiled, and cannot be imported: %s", entry.path, error)
            _discard(store, key)
    return runtime.compile_model(source, device, settings), False


def keep(store: Store, entry: Entry, device: str, settings: Mapping[str, Any], model: Any) -> None:
    """Keep a compiled graph of an entry, where that pays. Whatever fails, it is compiled again."""
    if not _pays(entry, device):
        return

    def write(directory: Path) -> None:
        (directory / _FILE).write_bytes(runtime.export_model(model))

    head = {
        "module": entry.manifest.get("module"),
        "method": entry.manifest.get("method"),
        "graph": {"signature": f"{entry.family}/{entry.variant}, compiled"},
    }
    try:
        store.publish(_key(entry, device, settings), _VARIANT, write, head)
    except StoreError as error:  # not every device exports; a disk may be full
        log.debug("the compiled graph is not kept: %s", error)


def discard(store: Store, entry: Entry, device: str, settings: Mapping[str, Any]) -> None:
    """Take the compiled graph of an entry out of the store: what it computes was not right."""
    _discard(store, _key(entry, device, settings))


def _discard(store: Store, key: str) -> None:
    for blob in store.entries(key):
        store.discard(blob)


def is_large(entry: Path, least: int | None = None) -> bool:
    """Whether the graph of an entry is one whose compilation takes time: it has that many bytes of
    weights; None: as many as make a file of the compiled one worth while."""
    try:
        size = (entry / "model.bin").stat().st_size
        return size >= (_LEAST_BYTES if least is None else least)
    except OSError:
        return False


def _pays(entry: Entry, device: str) -> bool:
    # What stands for several devices has nothing to export.
    return is_large(entry.path) and device.partition(":")[0] not in runtime.HANDING_ON


def _to_export(device: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """With the weights left in the IR, by devices that are known to do so."""
    return {**settings, "CACHE_MODE": "OPTIMIZE_SIZE"} if device == "CPU" else settings


def _key(entry: Entry, device: str, settings: Mapping[str, Any]) -> str:
    facts = [
        *("blob", entry.manifest["files"], device, runtime.version(), runtime.processor()),
        {name: str(value) for name, value in settings.items()},
    ]
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())
