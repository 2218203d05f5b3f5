"""`instance-manager backup`, and `backup verify|delete|keep|unkeep|expire`.

Exit codes: 0 done; 1 not done, or a backup with damaged pages; 2 wrong use, nothing was done.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from functools import partial

from instance_manager.archive.backup.catalogue import Listed, NoSuchBackup, chain_of, find_backup, list_backups
from instance_manager.archive.backup.configured import policy_of
from instance_manager.archive.backup.expire import Doomed, expire, foresee
from instance_manager.archive.backup.names import BackupNames
from instance_manager.archive.backup.removal import BackupKept, delete_backup, keep_backup
from instance_manager.archive.backup.requests import ATTEMPTS_MAX, Ended, Request, Requests, manual_id
from instance_manager.archive.backup.retention import Policy, RetentionRefused, stands_on
from instance_manager.archive.backup.verify import verify_chain
from instance_manager.archive.backup.view import size_text
from instance_manager.archive.where import WRONG_USE, Where, add_where, carry_out
from instance_manager.threads import monotonic_s
from instance_manager.wall_clock import now_utc, timestamp

DEADLINE_S = 60.0
POLL_S = 1.0
UNCLAIMED_NOTE_S = 60.0
NAME_MAX = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--wait", action="store_true", help="until it is complete, showing its progress")
    parser.add_argument("--name", help="a name besides its id")
    parser.add_argument(
        "--incremental",
        nargs="?",
        const="",
        metavar="FROM",
        help="only what has changed since the backup FROM, an id or a name, by default the newest good one (Postgres 17 and later)",
    )
    parser.add_argument("--timeout", type=float, default=86400.0, metavar="SECONDS", help="how long --wait waits")
    add_where(parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="backup_command")
    for name, text in (
        ("verify", "read a whole backup and the WAL that it needs: is all as it was stored?"),
        ("delete", "delete a backup; its WAL stays until `expire`"),
        ("keep", "keep a backup for ever, whatever the retention"),
        ("unkeep", "let the retention decide again"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("backup", metavar="ID", help="or its name, or `latest`")
        add_where(command, default=argparse.SUPPRESS)
        if name == "delete":
            command.add_argument("--yes", action="store_true", help="do not ask")
        if name == "keep":
            command.add_argument(
                "--standalone",
                action="store_true",
                help="only with the WAL that makes it consistent, not with all after it",
            )
    command = commands.add_parser(
        "expire", help="delete what the retention no longer keeps, and the WAL that nobody needs"
    )
    command.add_argument("--window-days", type=float, metavar="N", help="by default archive.backup.retention's")
    command.add_argument("--count", type=int, metavar="N")
    command.add_argument("--dry-run", action="store_true", help="only say what would go")
    command.add_argument("--yes", action="store_true", help="do not ask")
    add_where(command, default=argparse.SUPPRESS)


def run(namespace: argparse.Namespace) -> int:
    """Its exit code."""
    works = {
        None: _request,
        "verify": _verify,
        "delete": _delete,
        "keep": _keep,
        "unkeep": _unkeep,
        "expire": _expire,
    }
    return carry_out(namespace, partial(works[namespace.backup_command], namespace))


def complain(text: str, code: int = 1) -> int:
    print(f"instance-manager: {text}", file=sys.stderr)
    return code


async def _request(namespace: argparse.Namespace, where: Where) -> int:
    name = namespace.name
    if name is not None and (not 0 < len(name) <= NAME_MAX or not name.isprintable() or name == "latest"):
        return complain(f"not a name for a backup: {name!r}", WRONG_USE)
    requests = Requests(where.store, where.layout)
    request_id = manual_id(now_utc())
    incremental, on = namespace.incremental is not None, namespace.incremental or None
    if on is not None:
        try:
            on = find_backup(await list_backups(where.store, where.layout, deadline_s=DEADLINE_S), on).backup_id
        except NoSuchBackup as error:
            return complain(str(error), WRONG_USE)
    await requests.ask(request_id, Request(name, "command", timestamp(), incremental, on))
    if not namespace.wait:
        print(
            f"asked for a backup, as {request_id}: the best placed instance takes it; `instance-manager backups` shows it"
        )
        return 0
    ended = await _wait(requests, request_id, namespace.timeout)
    if ended is None:
        return complain(f"not complete within {namespace.timeout:g} s; the request {request_id} stays")
    if ended.backup_id is None:
        return complain(f"no backup: {ended.error}")
    print(f"backup {ended.backup_id} is complete")
    if ended.damaged_pages:
        return complain(
            f"but {ended.damaged_pages} pages have a wrong checksum: `instance-manager backups --json` names them. The data "
            "directory itself is damaged there; older backups are kept"
        )
    return 0


async def _wait(requests: Requests, request_id: str, timeout_s: float) -> Ended | None:
    """Progress on standard error meanwhile."""
    begin_s, shown = monotonic_s(), ""
    while monotonic_s() - begin_s < timeout_s:
        found = (await requests.listing()).get(request_id)
        last = None if found is None else found.last
        if last is not None and last.is_over:
            ended = await requests.ended(request_id, last.number)
            if ended is not None and (ended.backup_id is not None or last.number >= ATTEMPTS_MAX):
                return ended
            text = f"attempt {last.number} failed: {'' if ended is None else ended.error}"
        elif last is not None:
            beat = await requests.progress(request_id, last)
            claim = await requests.claimed_by(request_id, last.number)
            by = "" if claim is None else claim.instance
            text = (
                f"{by}: claimed"
                if beat is None
                else f"{by}: {beat.phase}, {size_text(beat.read_bytes)} of about {size_text(beat.estimated_bytes)}"
            )
        else:
            waited = monotonic_s() - begin_s > UNCLAIMED_NOTE_S
            text = "nobody has taken it yet" + (": does an archiver run? See its log" if waited else "")
        if text != shown:
            print(text, file=sys.stderr, flush=True)
            shown = text
        await asyncio.sleep(POLL_S)
    return None


async def _found(namespace: argparse.Namespace, where: Where) -> Listed | None:
    """None: it was said why not."""
    listed = await list_backups(where.store, where.layout, deadline_s=DEADLINE_S)
    try:
        return find_backup(listed, namespace.backup)
    except NoSuchBackup as error:
        complain(str(error))
        return None


async def _verify(namespace: argparse.Namespace, where: Where) -> int:
    listed = await _found(namespace, where)
    if listed is None:
        return WRONG_USE
    all_listed = await list_backups(where.store, where.layout, deadline_s=DEADLINE_S)
    chain = chain_of(all_listed, listed) if listed.is_restorable else (listed,)
    verdict = await verify_chain(where.store, where.layout, chain, tell=lambda text: print(text, flush=True))
    print(f"{verdict.files} files, {size_text(verdict.file_bytes)}, and {verdict.segments} segments of WAL were read")
    if not verdict.has_hashes:
        print("barman took it: there are no hashes of its files, only that its tars are whole is known")
    for text in verdict.unread:
        complain(f"not read: {text}")
    for text in verdict.problems:
        complain(text)
    print(
        f"backup {listed.backup_id} is "
        + ("good" if verdict.is_good else "not proven good" if not verdict.problems else "NOT good")
    )
    return 0 if verdict.is_good else 1


async def _delete(namespace: argparse.Namespace, where: Where) -> int:
    listed = await _found(namespace, where)
    if listed is None:
        return WRONG_USE
    all_listed = await list_backups(where.store, where.layout, deadline_s=DEADLINE_S)
    if above := [each for each in stands_on(all_listed, listed.backup_id) if listed.info is not None]:
        return complain(
            f"backup {listed.backup_id} is needed by {', '.join(above)}, which cannot be restored without it: delete those first"
        )
    others = [each.backup_id for each in all_listed if each.state == "done" and each.backup_id != listed.backup_id]
    print(
        f"backup {listed.backup_id} ({listed.state}) is deleted for ever; good ones left: {', '.join(others) or 'NONE'}"
    )
    if not namespace.yes and not _agreed(listed.backup_id):
        return complain("nothing was deleted (--yes agrees beforehand)", WRONG_USE)
    try:
        await delete_backup(where.store, BackupNames(where.layout, listed.backup_id), deadline_s=DEADLINE_S)
    except BackupKept as error:
        return complain(str(error))
    print("deleted")
    return 0


async def _keep(namespace: argparse.Namespace, where: Where) -> int:
    listed = await _found(namespace, where)
    if listed is None:
        return WRONG_USE
    if not listed.is_restorable:
        return complain(f"backup {listed.backup_id} is no whole backup: {listed.problem}")
    target = "standalone" if namespace.standalone else "full"
    if namespace.standalone and listed.parent_id is not None:
        return complain(
            f"backup {listed.backup_id} stands on {listed.parent_id}, which stays with it and with its log: keep it without --standalone"
        )
    if listed.keep not in (None, target):
        return complain(f"it is kept as `{listed.keep}`: `backup unkeep {listed.backup_id}` first")
    try:
        await keep_backup(where.store, BackupNames(where.layout, listed.backup_id), target, deadline_s=DEADLINE_S)
    except BackupKept as error:
        return complain(str(error))
    print(f"backup {listed.backup_id} is kept ({target})")
    return 0


async def _unkeep(namespace: argparse.Namespace, where: Where) -> int:
    listed = await _found(namespace, where)
    if listed is None:
        return WRONG_USE
    await where.store.delete(BackupNames(where.layout, listed.backup_id).keep, deadline_s=DEADLINE_S)
    print(f"backup {listed.backup_id} is kept only as the retention says")
    return 0


async def _expire(namespace: argparse.Namespace, where: Where) -> int:
    policy = _policy(namespace, where)
    if policy.keeps_all and not namespace.dry_run:
        print("the retention keeps every backup; only WAL older than all of them goes")
    try:
        doomed = await foresee(where.store, where.layout, policy)
        print(_told(doomed))
        if namespace.dry_run or not (doomed.backups or doomed.wal_objects):
            return 0
        if not namespace.yes and not _agreed("expire"):
            return complain("nothing was deleted (--yes agrees beforehand)", WRONG_USE)
        await expire(where.store, where.layout, policy, tell=lambda text: print(text, flush=True))
    except RetentionRefused as error:
        return complain(str(error))
    return 0


def _policy(namespace: argparse.Namespace, where: Where) -> Policy:
    if namespace.window_days is not None or namespace.count is not None:
        window_s = None if namespace.window_days is None else namespace.window_days * 86400
        return Policy(window_s=window_s, count=namespace.count)
    section = where.configuration.archive if where.configuration is not None else None
    return Policy() if section is None else policy_of(section.backup)


def _told(doomed: Doomed) -> str:
    if not doomed.backups and not doomed.wal_objects:
        return "nothing is to go"
    lines = [f"backup {backup_id} goes" for backup_id in doomed.backups]
    if doomed.wal_objects:
        first, last = (name.rpartition("/")[2] for name in (doomed.wal_objects[0], doomed.wal_objects[-1]))
        lines.append(f"{len(doomed.wal_objects)} WAL objects go ({size_text(doomed.wal_bytes)}), {first} to {last}")
    return "\n".join(lines)


def _agreed(word: str) -> bool:
    print(f"Type {word} to go on: ", end="", flush=True)
    return sys.stdin.readline().strip() == word
