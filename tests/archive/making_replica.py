"""An agent that has a standby's directory made from an archive, and does nothing else: for tests that kill it.

python making_replica.py CONFIGURATION DATA_DIRECTORY < REQUEST
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from pathlib import Path

from instance_manager.agent.installed_postgres import local_server
from instance_manager.agent.recovering import make_replica
from instance_manager.archive.recovery.replica_request import ReplicaRequest
from instance_manager.codec import from_json
from instance_manager.config import load_configuration
from instance_manager.postgres.directory import remove_leftovers


async def run(file: Path, data_directory: Path, request: ReplicaRequest) -> None:
    server = replace(local_server(load_configuration(file)), data_directory=data_directory)
    await asyncio.to_thread(remove_leftovers, server)
    print(await make_replica(server, file, request, lambda text: print(text, flush=True)), flush=True)


if __name__ == "__main__":
    question = from_json(sys.stdin.buffer.read(), ReplicaRequest)
    asyncio.run(run(Path(sys.argv[1]), Path(sys.argv[2]), question))
