"""A server in a process of its own, for tests that measure its memory: `python served_alone.py DIRECTORY`.

Prints its port, serves until its standard input ends, and logs to its standard error.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from http_harness import FakeService, make_configuration

from instance_manager.http.server import serve


async def main() -> None:
    logging.basicConfig(level=logging.INFO)
    configuration = make_configuration(Path(sys.argv[1]))
    async with serve(FakeService(), configuration):
        print(configuration.me.http_port, flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
