"""The replay of this project as it is: `Replay` with a `RecoveryArchive`, over a directory that lies ready. Prints Postgres's log.

python recovery_process.py JSON    # the fields of `Job`
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import msgspec

from instance_manager.archive.codecs import Codec, CodecName
from instance_manager.archive.fetch import FetchSettings
from instance_manager.archive.layout import Layout
from instance_manager.archive.recovery.replay import Replay, ReplaySettings
from instance_manager.archive.recovery.serving import RecoveryArchive
from instance_manager.archive.recovery.target import make_target
from instance_manager.archive.wal_names import SegmentSize
from instance_manager.archive.where import make_store
from instance_manager.config_sections import ArchiveSection
from instance_manager.core.types import Timeline, TimelineChain
from instance_manager.postgres.server import LocalServer, RunAs


@dataclass(frozen=True, slots=True)
class Job:
    archive: ArchiveSection
    codec: CodecName
    data_directory: Path
    bin_directory: Path
    user: str | None
    system_identifier: str
    segment_bytes: int
    target_lsn: str
    placed_before: int
    parameters: dict[str, str]


class Patient(RecoveryArchive):
    """Whose first answer comes when `placed_before` segments are in place."""

    placed_before = 0

    async def _fetch(self, words: list[str]) -> str:
        answer = await super()._fetch(words)
        assert self._place is not None
        while len(self._place._placed) < self.placed_before:  # noqa: ASYNC110 - nothing tells of one that is placed
            await asyncio.sleep(0.01)
        self.placed_before = 0
        return answer


async def replay(job: Job, work: Path) -> str:
    run_as = None if job.user is None else RunAs.of_user(job.user)
    if run_as is not None:
        os.chown(work, run_as.uid, run_as.gid)
    server = LocalServer(job.data_directory, work, work, "", 5432, job.bin_directory, run_as)
    store, chain = make_store(job.archive), TimelineChain(Timeline(1))
    archive = Patient(
        store,
        Layout("orders", Codec(job.codec)),
        data_directory=job.data_directory,
        work_directory=work,
        system_identifier=job.system_identifier,
        size=SegmentSize(job.segment_bytes),
        chain=chain,
        run_as=run_as,
        settings=FetchSettings(parallel=job.archive.parallel, prefetch_bytes=job.archive.prefetch_bytes),
    )
    archive.placed_before = job.placed_before
    settings = ReplaySettings(parameters=job.parameters)
    target = make_target(lsn=job.target_lsn)
    made = Replay(server, archive, target, chain, settings, work_directory=work, last_known=None)
    await archive.start()
    try:
        await made.run()
        return made.log_file.read_text()
    finally:
        await archive.close()
        await store.close()


def _path(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise TypeError(f"{value!r} is no {kind}")


def main() -> None:
    job = msgspec.json.decode(sys.argv[1], type=Job, dec_hook=_path)
    with tempfile.TemporaryDirectory(prefix="im-benchmark-") as work:
        sys.stdout.write(asyncio.run(replay(job, Path(work))))


if __name__ == "__main__":
    main()
