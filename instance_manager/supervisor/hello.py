"""What an agent is told before anything else: what its predecessor left running."""

from instance_manager.supervisor.children import Postgres
from instance_manager.supervisor.permit import WritePermit


def hello(
    *,
    incarnation: str,
    started_s: float,
    now_s: float,
    postgres: Postgres | None,
    permit: WritePermit,
    agent_restarts: int,
    reaped: int,
    terminating: bool,
) -> dict[str, object]:
    """The message. All times in seconds of CLOCK_BOOTTIME."""
    current = permit.current
    return {
        "type": "hello",
        "incarnation": incarnation,
        "started_s": started_s,
        "now_s": now_s,
        "postgres": None
        if postgres is None
        else {"pid": postgres.child.pid, "mode": postgres.mode, "started_s": postgres.started_s},
        "permit": None if current is None else {"epoch": current.epoch, "soft": current.soft_s, "hard": current.hard_s},
        "revoked_epoch": permit.revoked_epoch,
        "agent_restarts": agent_restarts,
        "reaped": reaped,
        "terminating": terminating,
    }
