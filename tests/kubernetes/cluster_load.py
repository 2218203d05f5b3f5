"""The drill's clients and its judge over a cluster in pods: every acknowledgement is remembered, and looked for at the end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import msgspec
from kube_processes import wait_for
from kubernetes_cluster import KubernetesCluster
from pod_image import ROOT

from instance_manager.demo.processes import end_with_parent, now_s
from instance_manager.drill.checker import Findings, describe, judge
from instance_manager.drill.history import HistoryReader, Outcome, Seen, whole_read

CLIENTS = 4
INTERVAL_S = 0.01
WRITES_DEADLINE_S = 30.0
_CLIENT_DEADLINE_S = 60.0


class ClusterLoad:
    """From the start of the block to its end; `judge` afterwards. The table is made anew."""

    def __init__(self, cluster: KubernetesCluster) -> None:
        self._cluster = cluster
        self._history = cluster.directory / f"clients-{now_s():.3f}.history"
        self.reader = HistoryReader(self._history)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ClusterLoad:
        self._run("prepare")
        argv = self._command("run", "--output", str(self._history), "--clients", str(CLIENTS))
        with self._history.with_suffix(".log").open("ab") as log:
            self._process = subprocess.Popen(
                [*argv, "--interval-s", str(INTERVAL_S)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(),
                preexec_fn=end_with_parent(signal.SIGTERM),
            )
        self.wait_writes()
        return self

    def __exit__(self, *_: object) -> None:
        process = self._process
        if process is not None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.reader.read_on()

    def wait_writes(self, *, count: int = 20, deadline_s: float = WRITES_DEADLINE_S) -> None:
        """Until so many rows that were begun after now are acknowledged."""
        since_s = now_s()

        def enough() -> bool:
            self.reader.read_on()
            recent = (write for write in reversed(self.reader.writes) if write.begin_s >= since_s)
            return sum(write.outcome is Outcome.ACKNOWLEDGED for write in recent) >= count

        wait_for(enough, deadline_s, f"{count} acknowledged writes: {self._log()}")

    def judge(self, *, from_s: float, to_s: float) -> Findings:
        """After the block. The outage is looked for between these times; everything else in the whole history."""
        primary = self._cluster.wait_redundant()
        begin_s = now_s()
        rows = self.rows_of(primary)
        closing = whole_read(primary, begin_s, now_s(), Seen.PRIMARY, None, rows.elements())
        reader = self.reader
        found = judge(reader.writes, reader.samples, [*reader.reads, closing], from_s=from_s, to_s=to_s)
        assert not found.contradictions, describe(found.contradictions)
        assert found.closed
        for name in self._cluster.names:
            wait_for(partial(self._has_rows, name, rows), 20, f"{name} holds the same rows as {primary}")
        return found

    def _has_rows(self, name: str, rows: Counter[tuple[int, int]]) -> bool:
        # The name of a pod that has just come back may have no address yet.
        with contextlib.suppress(AssertionError):
            return self.rows_of(name) == rows
        return False

    def rows_of(self, name: str) -> Counter[tuple[int, int]]:
        """What the member holds."""
        found = msgspec.json.decode(self._run("rows", members=[name]), type=list[tuple[int, int, int]])
        return Counter({(client, number): count for client, number, count in found})

    def _run(self, mode: str, members: Sequence[str] | None = None) -> bytes:
        done = subprocess.run(
            self._command(mode, members=members),
            capture_output=True,
            check=False,
            timeout=_CLIENT_DEADLINE_S,
            env=_environment(),
        )
        assert done.returncode == 0, done.stderr.decode(errors="replace")[-1000:]
        return done.stdout

    def _command(self, mode: str, *arguments: str, members: Sequence[str] | None = None) -> list[str]:
        enter = self._cluster.runner.as_client(self._cluster.namespace)
        argv = [*enter, sys.executable, "-m", "instance_manager.drill.client", mode]
        for name in members or self._cluster.names:
            argv += ["--member", f"{name}={self._cluster.host(name)}:5432"]
        return [*argv, "--password-file", str(self._cluster.password_file()), *arguments]

    def _log(self) -> str:
        path = self._history.with_suffix(".log")
        return path.read_text(errors="replace")[-500:] if path.exists() else ""


def _environment() -> dict[str, str]:
    # The code of this checkout, also where the package is installed from another.
    return {**os.environ, "PYTHONPATH": str(Path(ROOT))}
