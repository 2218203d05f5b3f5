"""Who the peers of this instance are, and whether anybody among them still has the cluster's data."""

from __future__ import annotations

from instance_manager.agent.context import Context
from instance_manager.core.types import MemberName, member_name_of


class Membership:
    def __init__(self, context: Context) -> None:
        self._c = context
        self._peers_of: tuple[object, ...] = ()
        """What the peers were last taken from."""

    def follow(self) -> None:
        """Peers are the members of the configuration, and whoever the record names: of what it was, or is to be."""
        c = self._c
        record = c.keeper.record
        holder = record.holder.name if record is not None and record.holder is not None else None
        voters = record.voters if record is not None else frozenset()
        if (holder, voters, c.configuration) != self._peers_of:
            self._peers_of = (holder, voters, c.configuration)
            named = [*([holder] if holder is not None else ()), *(member_name_of(voter) for voter in voters)]
            names = {MemberName(member.name) for member in c.configuration.members}
            names |= {name for name in named if c.configuration.member(name) is not None}
            c.peers.set_names(frozenset(names - {c.configuration.name}))

    def notice_lost_data(self) -> None:
        """A Lease that outlived its cluster, or a cluster that lost every volume: only a person can tell which (R14)."""
        c = self._c
        record = c.keeper.record
        if record is None or record.system_identifier is None or c.database.directory.has_data:
            return
        if c.keeper.view().unchanged_for_s < record.lease_duration_s:
            return
        peers = c.peers.views().values()
        if all(peer.answers and peer.state is not None and not peer.state.has_data for peer in peers):
            c.journal.note(
                "no data anywhere",
                f"the Lease is of the cluster {record.system_identifier}, and no instance has its data: bring the volumes "
                "back; or, if the Lease is left over from a cluster that was deleted, delete it and a new one begins",
            )
