"""`instance-manager backups [--json]`: what is in the archive, and what can be recovered from it."""

from __future__ import annotations

import argparse
import json
from functools import partial

from instance_manager.archive.backup.catalogue import Window, list_backups, window_of
from instance_manager.archive.backup.requests import Open, Requests
from instance_manager.archive.backup.view import plain_backup, table
from instance_manager.archive.where import Where, add_where, carry_out
from instance_manager.ports import ContentDamaged

DEADLINE_S = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for machines")
    add_where(parser)


def run(namespace: argparse.Namespace) -> int:
    """Its exit code."""
    return carry_out(namespace, partial(_show, namespace))


async def _show(namespace: argparse.Namespace, where: Where) -> int:
    listed = await list_backups(where.store, where.layout, deadline_s=DEADLINE_S)
    windows: dict[str, Window] = {}
    problem = ""
    for each in listed:
        if each.is_restorable and each.info is not None:
            try:
                windows[each.backup_id] = await window_of(where.store, where.layout, each.info, deadline_s=DEADLINE_S)
            except ContentDamaged as error:
                problem = str(error)
    requests = await Requests(where.store, where.layout).listing()
    waiting = [text for request in requests.values() if (text := _open_text(request))]
    if namespace.json:
        backups = [plain_backup(each, windows.get(each.backup_id)) for each in listed]
        print(json.dumps({"backups": backups, "requests": waiting, "problem": problem}, indent=2))
        return 0
    print(table([(each, windows.get(each.backup_id)) for each in listed]) if listed else "there is no backup")
    for text in (*waiting, *((problem,) if problem else ())):
        print(text)
    return 0


def _open_text(request: Open) -> str:
    last = request.last
    if last is None:
        return f"request {request.request_id} waits for somebody to take it"
    return "" if last.is_over else f"request {request.request_id} is being taken (attempt {last.number})"
