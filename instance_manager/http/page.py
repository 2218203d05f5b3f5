"""The status page: what an engineer asks at three in the morning, in that order, made on the server without a script.

Who is primary, is anything at risk, how is each instance, why. Every text that comes from outside of this file passes
through `_text`.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from aiohttp import web

from instance_manager.core.archive_state import BackupsState
from instance_manager.core.types import format_lsn
from instance_manager.http.details import Details
from instance_manager.http.lag_history import MINUTES, LagHistory, Sample
from instance_manager.http.page_chart import lag_chart
from instance_manager.http.page_style import CONTENT_SECURITY_POLICY, STYLE
from instance_manager.status import ClusterStatus, DecisionLine, InstanceStatus
from instance_manager.status_view import format_bytes, format_seconds

REFRESH_S = 5
RISKS_MAX = 10
INSTANCES_MAX = 8
HISTORY_MAX = 8
NAME_MAX = 64
SENTENCE_MAX = 240


def response(status: ClusterStatus, details: Details, lags: LagHistory) -> web.Response:
    return web.Response(
        text=render(status, details, lags),
        content_type="text/html",
        headers={
            "Cache-Control": "no-store",
            "Content-Security-Policy": CONTENT_SECURITY_POLICY,
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        },
    )


def render(status: ClusterStatus, details: Details, lags: LagHistory) -> str:
    """One document, under 40 KB whatever the cluster is like."""
    parts = (
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width,initial-scale=1">',
        f'<meta http-equiv=refresh content="{REFRESH_S}"><link rel=icon href="data:,">',
        f"<title>{_text(_title(status))}</title><style>{STYLE}</style></head><body>",
        *_head(status),
        *_risks(status),
        *_instances(status, lags),
        *_commits(status),
        *_archive(status),
        *_decisions(status),
        *_history(details),
        f"<footer>Told by <code>{_text(status.told_by)}</code> from its memory; renewed every {REFRESH_S} s. ",
        "The same for programs: <a href=/status>/status</a>, <a href=/cluster>/cluster</a>, ",
        "<a href=/openapi.json>/openapi.json</a>.</footer></body></html>",
    )
    return "".join(parts)


def _title(status: ClusterStatus) -> str:
    warning = "" if not status.at_risk else f"({len(status.at_risk)}) "
    return f"{warning}{status.cluster}: {status.primary or 'no primary'}"


def _head(status: ClusterStatus) -> Iterable[str]:
    yield f"<header><h1><small>{_text(status.cluster)}</small>"
    if status.primary is None:
        yield '<span class="bad">There is no primary</span>'
    elif status.accepts_clients:
        yield f'{_text(status.primary)} <span class="good">is primary, clients are let in</span>'
    else:
        yield f'{_text(status.primary)} <span class="bad">holds the Lease, clients are not let in</span>'
    yield "</h1><p>"
    facts = [f"epoch {_number(status.epoch)}", f"timeline {_number(status.timeline)}"]
    if status.lease_age_s is None:
        facts.append("the Lease was never read")
    else:
        facts.append(f"the Lease changed {_seconds(status.lease_age_s)} ago")
    if not status.lease_readable:
        facts.append('<b class="bad">it cannot be read now</b>')
    if status.seconds_to_fence is not None:
        facts.append(f"Postgres stops in {_seconds(max(status.seconds_to_fence, 0))} unless it is renewed")
    yield ", ".join(facts)
    yield "</p></header>"
    special = []
    if status.paused:
        special.append("Paused: no failover until <code>resume</code>.")
    if status.fenced:
        special.append(f"Fenced: {_sentence(', '.join(status.fenced))}.")
    if status.switchover is not None:
        special.append(f"A switchover is asked for, to {_text(status.switchover)}.")
    if special:
        yield f'<p class="warn"><b>{" ".join(special)}</b></p>'


def _risks(status: ClusterStatus) -> Iterable[str]:
    if not status.at_risk:
        yield '<div class="panel risk none"><b class="good">Nothing is at risk</b></div>'
        return
    yield '<div class="panel risk"><b class="bad">At risk</b><ul>'
    for risk in status.at_risk[:RISKS_MAX]:
        yield f"<li>{_sentence(risk)}</li>"
    if len(status.at_risk) > RISKS_MAX:
        yield f"<li>and {len(status.at_risk) - RISKS_MAX} more</li>"
    yield "</ul></div>"


def _instances(status: ClusterStatus, lags: LagHistory) -> Iterable[str]:
    yield '<h2>Instances</h2><div class="cards">'
    ordered = sorted(status.instances, key=lambda instance: (instance.name != status.primary, instance.name))
    for instance in ordered[:INSTANCES_MAX]:
        yield from _card(instance, status, lags.of(instance.name))
    yield "</div>"
    if len(ordered) > INSTANCES_MAX:
        yield f'<p class="dim">and {len(ordered) - INSTANCES_MAX} more: see <a href=/status>/status</a></p>'


def _card(instance: InstanceStatus, status: ClusterStatus, samples: Sequence[Sample]) -> Iterable[str]:
    leads = instance.name == status.primary
    well = instance.reachable and instance.postgres == "running" and (leads or instance.receiving)
    kind = "off" if not well else "primary" if leads else "standby"
    colour = {"off": "bad", "primary": "good", "standby": "dim"}[kind]
    role = instance.role if instance.reachable else "no answer"
    yield f'<section class="panel card {kind}"><h3>{_text(instance.name)}<span class="role {colour}">{_text(role)}</span></h3>'
    yield f'<p class="from">{_relation(instance, status)}</p><dl>'
    facts = [
        ("Postgres", _text(instance.postgres)),
        ("position", f'<span class="n">{_number(instance.timeline)}:{_text(instance.lsn or "-")}</span>'),
    ]
    if not leads:
        facts += [
            ("behind", _size(instance.lag_bytes)),
            ("not replayed", _size(instance.replay_lag_bytes)),
            ("votes", "yes" if instance.voter else "no"),
        ]
    epoch = f"follows {_number(instance.followed_epoch)}"
    if instance.promised_epoch is not None and instance.promised_epoch > (instance.followed_epoch or 0):
        epoch += f", promised {instance.promised_epoch}"
    facts.append(("epoch", epoch))
    for name, value in facts:
        yield f"<dt>{name}</dt><dd>{value}</dd>"
    yield "</dl>"
    for note in (instance.problem, instance.operation):
        if note:
            yield f'<p class="note">{_sentence(note)}</p>'
    if not leads and samples:
        known = [sample for sample in samples if sample is not None]
        highest = format_bytes(max(known)) if known else "not known"
        yield f"<figure>{lag_chart(samples)}<figcaption><span>lag, last {MINUTES} min</span>"
        yield f"<span>highest {highest}</span></figcaption></figure>"
    yield "</section>"


def _relation(instance: InstanceStatus, status: ClusterStatus) -> str:
    if instance.name == status.primary:
        following = [each for each in status.instances if each is not instance and each.receiving and each.reachable]
        return f"streams to {len(following)} of {len(status.instances) - 1}"
    if not instance.reachable:
        return '<span class="bad">does not answer; what is below is old</span>'
    if instance.receiving:
        return f"streams from {_text(status.primary)}" if status.primary is not None else "streams"
    return '<span class="warn">receives nothing</span>'


def _commits(status: ClusterStatus) -> Iterable[str]:
    yield "<h2>A commit is acknowledged when</h2>"
    yield '<div class="panel">'
    if status.synchronous_standby_names:
        yield f"<code>{_sentence(status.synchronous_standby_names)}</code> hold it"
    else:
        yield '<span class="warn">the primary alone holds it</span>'
    yield f". Standbys wanted: {status.synchronous_wanted}; durability <code>{_text(status.durability)}</code>."
    voters = ", ".join(status.voters[:INSTANCES_MAX]) or "nobody"
    yield f'<br><span class="dim">Voters <code>{_sentence(voters)}</code>, q = {_number(status.quorum)}</span></div>'


def _archive(status: ClusterStatus) -> Iterable[str]:
    archive = status.archive
    if archive is None:
        return
    colour = {"calm": "good", "behind": "warn"}.get(archive.level, "bad")
    yield f'<h2>Archive</h2><div class="panel"><b class="{colour}">{_text(archive.level)}</b>'
    if archive.position is not None:
        yield f', complete to <span class="n">{format_lsn(archive.position)}</span>'
    if archive.lag_bytes is not None and archive.lag_s is not None:
        yield f", {_size(archive.lag_bytes)} and {_seconds(archive.lag_s)} behind"
    if archive.waiting:
        yield f"; {archive.waiting} files wait, the oldest for {_seconds(archive.oldest_age_s)}"
    if archive.backups is not None:
        yield from _backups(archive.backups)
    for count, what in ((archive.gaps, "missing segments: no recovery passes them"), (archive.conflicts, "conflicts")):
        if count:
            yield f'<p class="note">{count} {what}</p>'
    if archive.trouble:
        yield f'<p class="note">{_sentence(archive.trouble)}</p>'
    yield "</div>"


def _backups(backups: BackupsState) -> Iterable[str]:
    yield '<dl class="facts">'
    if backups.good:
        age = f", {_seconds(backups.newest_age_s)} ago" if backups.newest_age_s is not None else ""
        yield f'<dt>newest backup</dt><dd><span class="n">{_text(backups.newest)}</span>{age}</dd>'
    else:
        yield '<dt>newest backup</dt><dd class="bad">none that can be restored</dd>'
    yield f"<dt>good backups</dt><dd>{backups.good}</dd>"
    if backups.recoverable_from:
        back = f", {_seconds(backups.recoverable_s)} back" if backups.recoverable_s is not None else ""
        yield f'<dt>recoverable since</dt><dd><span class="n">{_text(backups.recoverable_from)}</span> UTC{back}</dd>'
    if backups.first_gap:
        yield f'<dt>gap at</dt><dd class="bad n">{_text(backups.first_gap)}</dd>'
    yield "</dl>"
    if backups.problem:
        yield f'<p class="note">backups could not be looked at anew: {_sentence(backups.problem)}</p>'


def _decisions(status: ClusterStatus) -> Iterable[str]:
    yield f'<h2>Last decisions of {_text(status.told_by)}</h2><div class="panel"><table class="log">'
    yield "<tr class=head><th>ago</th><th>what</th><th>why</th></tr>"
    for line in status.decisions:
        yield _decision(line)
    yield "</table></div>"


def _decision(line: DecisionLine) -> str:
    times = f' <span class="dim">{line.count} times</span>' if line.count > 1 else ""
    return (
        f'<tr><td class="n dim">{_seconds(line.age_s)}</td><td><b>{_text(line.decision)}</b>{times}</td>'
        f"<td>{_sentence(line.reason)}</td></tr>"
    )


def _history(details: Details) -> Iterable[str]:
    if not details.history:
        return
    yield '<h2>Changes of the timeline</h2><div class="panel"><table>'
    yield "<tr><th>in epoch</th><th>left timeline</th><th>at</th></tr>"
    for line in reversed(details.history[-HISTORY_MAX:]):
        yield f'<tr><td>{line.epoch}</td><td>{line.timeline}</td><td class="n">{format_lsn(line.lsn)}</td></tr>'
    yield "</table></div>"


def _text(text: str, most: int = NAME_MAX) -> str:
    """Escaped, and no longer than one can read."""
    return html.escape(text if len(text) <= most else f"{text[: most - 1]}…")


def _sentence(text: str) -> str:
    return _text(text, SENTENCE_MAX)


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


def _seconds(seconds: float) -> str:
    return format_seconds(seconds)


def _size(value: int | None) -> str:
    return "-" if value is None else f'<span class="n">{format_bytes(value)}</span>'
