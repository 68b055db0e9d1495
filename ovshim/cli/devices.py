"""`ovshim devices`: what `ovshim.devices()` finds."""

from __future__ import annotations

import argparse
import json

import ovshim

__all__ = ["add"]


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "devices",
        help="list the devices that OpenVINO can use here",
        description="List the devices that OpenVINO can use here, by the names that device= takes.",
    )
    command.add_argument("--json", action="store_true", help="print a JSON array instead")
    command.set_defaults(run=run)


def run(chosen: argparse.Namespace) -> int:
    found = ovshim.devices()
    if chosen.json:
        print(json.dumps([device.to_dict() for device in found], indent=2))
        return 0
    rows = [("name", "precisions", "full name")]
    rows += [(d.name, ", ".join(d.precisions), d.full_name) for d in found]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for name, precisions, full_name in rows:
        print(f"{name:{widths[0]}}  {precisions:{widths[1]}}  {full_name}")
    return 0
