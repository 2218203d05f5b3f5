"""What the agent tells the archiver: its role, the write permit, and the accepted history. The archiver decides none of it.

The agent sends the whole of it with each renewal of the permit, over the archiver's socket. A deadline is absolute
CLOCK_BOOTTIME, so an agent that is silent or gone ends the uploads as it ends the permit, and a restarted one goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import msgspec

from instance_manager.archive.wal_names import SegmentSize
from instance_manager.codec import from_json
from instance_manager.core.types import Epoch, TimelineChain

Role = Literal["primary", "standby"]


class OrdersRefused(Exception):
    """What came is no order, or a late one of an epoch that is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """One complete statement; a later one replaces it."""

    role: Role
    epoch: Epoch
    permit_until_s: float = 0.0
    """Absolute CLOCK_BOOTTIME until which this instance may write to the archive; for a primary only."""
    cluster_uid: str
    """Of the record: whose archive it must be."""
    system_identifier: str
    wal_segment_bytes: int
    chain: TimelineChain | None = None
    """The accepted history of the cluster; None: not known, nothing is withheld by it."""
    is_streaming: bool = False
    """A walreceiver brings the WAL: `restore_command` need not look into the archive."""
    is_withholding: bool = False
    """From a promise until a later epoch is followed, `restore_command` brings no segment (P9)."""
    has_gaps: bool = False
    """For a standby: its primary tells of files that it cannot bring to the archive (`filling`)."""

    @property
    def standing(self) -> tuple[object, ...]:
        """What stays the same while a permit is renewed."""
        return self.role, self.epoch, self.cluster_uid, self.system_identifier, self.wal_segment_bytes, self.chain

    @property
    def size(self) -> SegmentSize:
        return SegmentSize(self.wal_segment_bytes)

    @property
    def system(self) -> int:
        return int(self.system_identifier)


def parse_orders(content: bytes | str) -> Orders:
    """From JSON. OrdersRefused: not exactly an order."""
    try:
        orders = from_json(content, Orders)
        SegmentSize(orders.wal_segment_bytes)
        int(orders.system_identifier)
    except (msgspec.MsgspecError, ValueError) as error:
        raise OrdersRefused(f"not an order: {error}") from error
    if not orders.cluster_uid:
        raise OrdersRefused("not an order: cluster_uid is empty")
    if not math.isfinite(orders.permit_until_s) or orders.epoch < 0:
        raise OrdersRefused("not an order: epoch or permit_until_s is out of range")
    if orders.chain is not None and orders.chain.first < 1:
        raise OrdersRefused("not an order: the chain begins with no timeline")
    return orders


class OrderBook:
    """The orders that hold now. Epochs only rise; within one the last word counts."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._orders: Orders | None = None

    @property
    def current(self) -> Orders | None:
        """None: the agent has said nothing yet."""
        return self._orders

    def take(self, orders: Orders) -> None:
        """OrdersRefused: a late message of an earlier epoch."""
        if self._orders is not None and orders.epoch < self._orders.epoch:
            raise OrdersRefused(f"epoch {orders.epoch} is over: the last order was of {self._orders.epoch}")
        self._orders = orders

    def permitted(self) -> Orders | None:
        """The orders of a primary whose permit holds now; None: nothing may be written to the archive."""
        orders = self._orders
        if orders is None or orders.role != "primary" or self._now_s() >= orders.permit_until_s:
            return None
        return orders
