"""Every test here runs in virtual time: an hour of leases takes no time, and nothing depends on how busy the machine is."""

from __future__ import annotations

import asyncio

import pytest
from agent_fakes import VirtualLoop


class _Policy(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return VirtualLoop()


@pytest.fixture(scope="session")
def event_loop_policy() -> asyncio.AbstractEventLoopPolicy:
    return _Policy()
