"""The programs that are compared, each with its commands for Postgres: ours, pgBackRest (asynchronous), barman-cloud."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from archive_harness import until
from archiving_server import REPOSITORY, ArchivingServer
from barman_programs import barman_programs
from harness import BIN_DIRECTORY, PostgresProcess, run_as
from s3_server import CREDENTIALS
from wal_source import REPLAY_SETTINGS, SEGMENT_BYTES

from instance_manager.archive.recovery.serving import NICENESS

BUCKET = "benchmark"
REGION = "us-east-1"
KEY_ID, SECRET = "testing", "testing-secret"
PREFETCH_BYTES = 128 << 20
REPLAYED_MAX = 100


@dataclass(frozen=True, slots=True)
class Store:
    """Where all of them archive to: the stand-in's port, or a directory."""

    certificate: Path
    port: int | None = None
    directory: Path | None = None

    @property
    def endpoint(self) -> str:
        return f"https://127.0.0.1:{self.port}"


class Peer(Protocol):
    """Begun for one run over an empty archive, with a server that is not started yet; closed at its end."""

    name: str

    async def begin(self, server: PostgresProcess, system_identifier: int) -> None: ...

    def archive_command(self) -> str: ...

    async def begin_restore(self, server: PostgresProcess, system_identifier: int) -> None: ...

    def restore_command(self) -> str: ...

    @property
    def resident_pid(self) -> int | None:
        """Of a process that stays, whose memory counts."""
        ...

    def close(self) -> None: ...


@dataclass
class Ours:
    """This project's archiver, as its process."""

    store: Store
    parallel: int
    work: Path
    name: str = "instance-manager"
    codec: str = "zstd"
    made: ArchivingServer | None = None
    placed_before: int = 0
    """So many segments are in place before Postgres has its first one."""

    async def begin(self, server: PostgresProcess, system_identifier: int) -> None:
        await self._start(server)
        assert self.made is not None
        self.made.order("primary", system_identifier)
        # It stays for as long as its instance: its start, and its first look at the archive, are not a segment's cost.
        made = self.made
        await until(lambda: made.status()["archive"] == "ok", deadline_s=60)

    async def begin_restore(self, server: PostgresProcess, system_identifier: int) -> None:
        self.close()

    async def recover(self, server: PostgresProcess, system_identifier: int, target_lsn: str) -> str:
        """Replay as `restore` does it, in a process of its own; Postgres's log."""
        user = run_as()
        job = {
            "archive": self._section(),
            "codec": self.codec,
            "data_directory": str(server.data),
            "bin_directory": str(BIN_DIRECTORY),
            "user": None if user is None else user.user_name,
            "system_identifier": str(system_identifier),
            "segment_bytes": SEGMENT_BYTES,
            "target_lsn": target_lsn,
            "placed_before": self.placed_before,
            "parameters": {**REPLAY_SETTINGS, "log_min_messages": "log"},
        }
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, str(Path(__file__).with_name("recovery_process.py")), json.dumps(job)),
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, **CREDENTIALS, "PYTHONPATH": str(REPOSITORY)},
            start_new_session=True,
        )
        output, _ = await process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"the recovery ended with {process.returncode}")
        return output.decode()

    async def _start(self, server: PostgresProcess) -> None:
        self.made = ArchivingServer(server, self._section(), segment_bytes=SEGMENT_BYTES)
        await self.made.start_archiver()

    def _section(self) -> dict[str, object]:
        section: dict[str, object] = {
            "parallel": self.parallel,
            "codec": self.codec,
            "prefetch_bytes": max(PREFETCH_BYTES, self.placed_before * SEGMENT_BYTES),
        }
        if self.store.directory is not None:
            section["directory"] = str(self.store.directory)
        else:
            section["s3"] = {
                **{"bucket": BUCKET, "endpoint": self.store.endpoint, "region": REGION, "path_style": True},
                "ca_file": str(self.store.certificate),
            }
        return section

    def archive_command(self) -> str:
        assert self.made is not None
        return self.made.archive_settings()["archive_command"]

    def restore_command(self) -> str:
        raise NotImplementedError("its recovery starts Postgres itself")

    @property
    def resident_pid(self) -> int | None:
        return None if self.made is None or self.made.process is None else self.made.process.pid

    def close(self) -> None:
        if self.made is not None:
            self.made.close()


@dataclass
class Placed(Ours):
    """What this way of replay costs where bringing the segments costs nothing."""

    name: str = "instance-manager, all placed before"
    placed_before: int = REPLAYED_MAX - 1  # the first is the one that is asked for


@dataclass
class PgBackRest:
    """Debian's, asynchronous in both directions, as many processes as we have uploads."""

    store: Store
    parallel: int
    work: Path
    name: str = "pgBackRest"
    configuration: Path = field(init=False)

    async def begin(self, server: PostgresProcess, system_identifier: int) -> None:
        self.configuration = self.work / "pgbackrest.conf"
        folders = {kind: self.work / kind for kind in ("spool", "lock")}
        for folder in folders.values():
            folder.mkdir(exist_ok=True)
        if self.store.directory is not None:
            repository = {"repo1-type": "posix", "repo1-path": str(self.store.directory)}
        else:
            repository = {
                **{"repo1-type": "s3", "repo1-path": "/repo", "repo1-s3-bucket": BUCKET, "repo1-s3-region": REGION},
                **{"repo1-s3-endpoint": "127.0.0.1", "repo1-storage-port": str(self.store.port)},
                **{"repo1-s3-uri-style": "path", "repo1-s3-key": KEY_ID, "repo1-s3-key-secret": SECRET},
                **{"repo1-storage-ca-file": str(self.store.certificate), "repo1-storage-verify-tls": "n"},
            }
        options = {
            **{"archive-async": "y", "process-max": str(self.parallel), "spool-path": str(folders["spool"])},
            **{"compress-type": "zst", "compress-level": "1", "lock-path": str(folders["lock"])},
            **{"archive-get-queue-max": str(PREFETCH_BYTES), "log-level-file": "off", "log-level-console": "warn"},
            **repository,
        }
        text = "[global]\n" + "".join(f"{key}={value}\n" for key, value in options.items())
        self.configuration.write_text(f"{text}\n[bench]\npg1-path={server.data}\n")
        server.own(self.work, *folders.values())
        run_as_postgres([*self._program, "--no-online", "stanza-create"])

    async def begin_restore(self, server: PostgresProcess, system_identifier: int) -> None:
        text = self.configuration.read_text().rpartition("pg1-path=")[0]
        self.configuration.write_text(f"{text}pg1-path={server.data}\n")

    @property
    def _program(self) -> list[str]:
        return ["/usr/bin/pgbackrest", f"--config={self.configuration}", "--stanza=bench"]

    def archive_command(self) -> str:
        return " ".join([*self._program, "archive-push", "%p"])

    def restore_command(self) -> str:
        return " ".join([*self._program, "archive-get", "%f", '"%p"'])

    @property
    def resident_pid(self) -> int | None:
        return None

    def close(self) -> None:
        return


@dataclass
class BarmanCloud:
    """barman-cloud-wal-archive: a process for each segment. It has no directory as a store."""

    store: Store
    parallel: int
    work: Path
    name: str = "barman-cloud"

    async def begin(self, server: PostgresProcess, system_identifier: int) -> None:
        self._programs = reachable(barman_programs().parent, self.work.parent.parent / "barman")

    async def begin_restore(self, server: PostgresProcess, system_identifier: int) -> None:
        return

    def _command(self, program: str, *options: str) -> str:
        environment = {
            **{"AWS_ACCESS_KEY_ID": KEY_ID, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": REGION},
            **{"AWS_CA_BUNDLE": str(self.store.certificate), "AWS_EC2_METADATA_DISABLED": "true"},
            # Cheaper for it, and what our own client does.
            **{"AWS_REQUEST_CHECKSUM_CALCULATION": "when_required", "PYTHONDONTWRITEBYTECODE": "1"},
        }
        words = [f"{key}={value}" for key, value in environment.items()]
        words += [str(self._programs / program), "--cloud-provider", "aws-s3", "--addressing-style", "path"]
        return " ".join([*words, "--endpoint-url", self.store.endpoint, *options])

    def archive_command(self) -> str:
        return self._command(
            "barman-cloud-wal-archive", "--zstd", "--compression-level", "1", f"s3://{BUCKET}/barman", "bench", "%p"
        )

    def restore_command(self) -> str:
        return self._command("barman-cloud-wal-restore", f"s3://{BUCKET}/barman", "bench", "%f", '"%p"')

    @property
    def resident_pid(self) -> int | None:
        return None

    def close(self) -> None:
        return


class Nothing:
    """archive_command = /bin/true: the ceiling that Postgres's archiver sets; replay from pg_wal."""

    name = "(nothing)"
    resident_pid = None

    async def begin(self, server: PostgresProcess, system_identifier: int) -> None:
        return

    async def begin_restore(self, server: PostgresProcess, system_identifier: int) -> None:
        return

    def archive_command(self) -> str:
        return "/bin/true"

    def restore_command(self) -> str:
        return ""

    def close(self) -> None:
        return


class Busy(Nothing):
    """Replay from pg_wal beside an empty loop, which is as nice as what brings segments: what it costs that anybody works on another processor."""

    name = "(nothing), beside an empty loop"
    loop: subprocess.Popen[bytes] | None = None

    async def begin_restore(self, server: PostgresProcess, system_identifier: int) -> None:
        program = f"import os\nos.nice({NICENESS})\nwhile True: pass"
        self.loop = subprocess.Popen([sys.executable, "-c", program])  # noqa: ASYNC220 - it takes no time

    def close(self) -> None:
        if self.loop is not None:
            self.loop.kill()
            self.loop.wait()


@dataclass
class Moved(Nothing):
    """Replay of segments that lie decompressed on the same file system, moved by mv: less than that no restore_command costs."""

    work: Path
    name = "(mv)"

    async def begin(self, server: PostgresProcess, system_identifier: int) -> None:
        self._source = server

    async def begin_restore(self, server: PostgresProcess, system_identifier: int) -> None:
        self._place = self.work / "moved"
        self._place.mkdir()
        segments = [str(path) for path in (self._source.data / "pg_wal").iterdir() if len(path.name) == 24]
        for argv in (["cp", "-a", *sorted(segments)[: REPLAYED_MAX + 20], str(self._place)], ["sync"]):
            await asyncio.to_thread(subprocess.run, argv, check=True)
        server.own(self._place)

    def restore_command(self) -> str:
        return f'mv {self._place}/%f "%p"'


def reachable(source: Path, place: Path) -> Path:
    """The programs of a virtual environment at a path that Postgres's user can enter; made once."""
    if not place.exists():
        subprocess.run(["cp", "-a", str(source), str(place)], check=True)
        for script in (place / "bin").glob("barman-cloud-*"):
            script.write_text(script.read_text().replace(str(source), str(place)))
        interpreter = Path(os.path.realpath(source / "bin/python"))
        closed = [each for each in (interpreter, *interpreter.parents) if not each.stat().st_mode & 0o001]
        if closed and run_as() is not None:
            # The same version's system interpreter reads the same packages.
            for name in ("python", "python3"):
                (place / "bin" / name).unlink(missing_ok=True)
                (place / "bin" / name).symlink_to("/usr/bin/python3")
    return place / "bin"


def run_as_postgres(argv: list[str]) -> None:
    owner = run_as()
    done = subprocess.run(
        argv,
        check=False,
        capture_output=True,
        text=True,
        cwd="/",
        user=None if owner is None else owner.uid,
        group=None if owner is None else owner.gid,
        extra_groups=None if owner is None else [],
    )
    if done.returncode != 0:
        raise RuntimeError(f"{argv}: {done.stdout[-1000:]}{done.stderr[-1000:]}")
