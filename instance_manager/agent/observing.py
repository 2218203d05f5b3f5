"""What an instance observes: everything its parts know now, put together for `decide`, and how long it has lasted."""

from __future__ import annotations

import logging
from dataclasses import replace

from instance_manager.agent.context import Context
from instance_manager.agent.giving_back import unopened_for_s
from instance_manager.core.decide import suspicion
from instance_manager.core.observation import DirectoryView, Observation
from instance_manager.core.roles import Role

log = logging.getLogger("instance_manager.agent")


class Observing:
    """It remembers since when there is a suspicion and a release: of both only the duration counts."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.suspected_since_s: float | None = None
        """CLOCK_BOOTTIME; None: no suspicion."""
        self._released_since_s: float | None = None
        self._release_seen: object = None

    def observe(self) -> Observation:
        c = self.context
        now_s = c.clock.now_s()
        lease = c.keeper.view()
        record = lease.record
        permit = c.link.permit
        permit_ok = permit is not None and (record is None or permit.epoch >= record.epoch)
        release = record.release if record is not None else None
        if release != self._release_seen:
            self._release_seen, self._released_since_s = release, now_s
            # Whether this log ends where the release says is known by a look that is younger.
            c.database.look_soon()
        observation = Observation(
            now_s=now_s,
            agent_age_s=now_s - c.started_s,
            name=c.configuration.name,
            incarnation=c.link.incarnation,
            priority=c.configuration.instance.priority,
            lease=lease,
            volume=c.volume.state,
            directory=DirectoryView(
                exists=c.database.directory.has_data,
                was_primary=c.volume.state.was_primary,
                half_rewound=c.database.directory.is_half_rewound,
            ),
            postgres=c.database.view(),
            peers=c.peers.views(),
            timings=c.configuration.timings,
            maximum_lag_bytes=c.configuration.cluster.maximum_lag_on_failover_bytes,
            terminating=c.link.terminating,
            was_fenced=c.role is Role.FENCED,
            unhealthy=self._unhealthy(),
            permit_left_s=permit.soft_s - now_s if permit is not None and permit_ok else 0.0,
            suspected_for_s=0.0,
            proven_dead=c.is_proven_dead(record),
            released_for_s=now_s - self._released_since_s
            if release is not None and self._released_since_s is not None
            else 0.0,
            yielding_for_s=now_s - c.yielding_since_s if c.yielding_since_s is not None else None,
            stand_again_in_s=c.stand_again_s - now_s,
            reaffirm_again_in_s=c.reaffirm_again_s - now_s,
            unopened_for_s=unopened_for_s(c),
        )
        c.suspects = suspicion(observation) if not c.holds_lease else None
        if c.suspects is None:
            self.suspected_since_s = None
            return observation
        if self.suspected_since_s is None:
            self.suspected_since_s = now_s
            log.info("suspicion: %s", c.suspects)
        return replace(observation, suspected_for_s=now_s - self.suspected_since_s)

    def _unhealthy(self) -> str | None:
        """Why another should be primary; a full disk only where a voter's is not."""
        c = self.context
        reason = c.health.unhealthy()
        record = c.keeper.record
        if reason is not None or not c.health.is_full or record is None:
            return reason
        for peer in c.peers.views().values():
            state = peer.state
            if peer.answers and state is not None and state.member_id in record.voters and not state.disk_full:
                return f"its volume is full, and {state.name}'s is not"
        return None
