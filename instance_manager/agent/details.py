"""The instance as tools that know Patroni ask for it: put together from what the duties keep in memory."""

from __future__ import annotations

from collections.abc import Mapping

from instance_manager.agent.context import Context
from instance_manager.config import Configuration
from instance_manager.core.record import ClusterRecord
from instance_manager.http.details import Details, HistoryLine, MemberAddress, ReplicationLine, ServerDetails
from instance_manager.postgres.observation import PostgresObservation

NOT_SHOWN = "(not shown)"


def details_of(context: Context, postgres: str) -> Details:
    """`postgres`: running, starting, stopped, unresponsive."""
    c = context
    lease = c.keeper.view()
    record = lease.record
    view = c.database.view()
    seen = c.database.last_look
    member_id = c.volume.state.member_id
    voter = record is not None and record.mode == "synchronous" and record.quorum > 0 and member_id in record.voters
    return Details(
        name=c.configuration.name,
        cluster=c.configuration.cluster.name,
        role=c.role.value,
        postgres=postgres,
        has_data=c.database.directory.has_data,
        receiving=view.receiving,
        voter=voter,
        holds_every_commit=voter and record is not None and record.quorum == len(record.voters),
        has_primary=record is not None and record.holder is not None,
        paused=record is not None and record.paused,
        timeline=view.end.timeline if view.end is not None else None,
        system_identifier=view.system_identifier or (record.system_identifier if record is not None else None),
        record_age_s=lease.read_age_s if lease.read else None,
        server=_server(seen) if seen is not None else None,
        addresses={
            member.name: MemberAddress(host=member.host, postgres_port=member.postgres_port, http_port=member.http_port)
            for member in c.configuration.members
        },
        history=_history(record),
        tags=c.configuration.instance.tags,
        maximum_lag_bytes=c.configuration.cluster.maximum_lag_on_failover_bytes,
        settings=settings_in_patronis_words(c.configuration),
    )


def _server(seen: PostgresObservation) -> ServerDetails:
    received = [lsn for lsn in (seen.receive_lsn, seen.replay_lsn) if lsn is not None]
    return ServerDetails(
        version_number=seen.version_number,
        started=seen.postmaster_start,
        flushed_lsn=seen.flush_lsn,
        received_lsn=max(received) if received else None,
        replayed_lsn=seen.replay_lsn,
        replayed_timestamp=seen.replayed_timestamp,
        replay_paused=seen.replay_pause == "paused",
        pending_restart=seen.pending_restart,
        replication=tuple(
            ReplicationLine(
                user=sender.user,
                application_name=sender.application_name,
                client_address=sender.client_address,
                state=sender.state,
                sync_state=sender.sync_state,
                sync_priority=sender.sync_priority,
            )
            for sender in seen.walsenders
        ),
    )


def _history(record: ClusterRecord | None) -> tuple[HistoryLine, ...]:
    if record is None or record.chain is None:
        return ()
    return tuple(
        HistoryLine(timeline=switch.parent, lsn=switch.switch_lsn, epoch=switch.epoch)
        for switch in record.chain.switches
    )


def settings_in_patronis_words(configuration: Configuration) -> Mapping[str, object]:
    """Patroni's names for what has one, and nothing that could be a secret.

    Commands and the settings of extensions may carry one: of those only the names are told.
    """
    timings, cluster = configuration.timings, configuration.cluster
    synchronous = configuration.wanted_synchronous_standbys > 0
    return {
        "ttl": timings.lease_duration_s,
        "loop_wait": timings.renew_interval_s,
        "retry_timeout": timings.request_timeout_s,
        "maximum_lag_on_failover": cluster.maximum_lag_on_failover_bytes,
        "synchronous_mode": "quorum" if synchronous else False,
        "synchronous_mode_strict": cluster.durability == "required",
        "synchronous_node_count": configuration.wanted_synchronous_standbys,
        "postgresql": {
            "parameters": {
                name: NOT_SHOWN if "." in name or name.endswith("_command") else value
                for name, value in sorted(configuration.postgres.parameters.items())
            },
            "use_pg_rewind": True,
            "use_slots": True,
        },
    }
