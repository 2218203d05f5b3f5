"""One container of a test pod: makes its namespaces and mounts, becomes its parent, tells how it ended.

    python -I container_shim.py SPECIFICATION.json

The standard library only, one thread: it forks. Its output is JSON lines: `{"pid": ...}`, then `{"exit_code": ...}` or
`{"signal": ...}`, or `{"error": ...}` for a container that could not start. Lines `TERM` and `KILL` on its input are sent
on to the container's first process; the end of its input is a KILL, so that no container outlives the tests.

The root filesystem is the machine's own, below a writable layer of this container; what is another filesystem of the
machine is not in it. There are no control groups, no seccomp profile and no user namespace.
"""

import ctypes
import json
import os
import select
import signal
import socket
import sys
from pathlib import Path
from typing import Any

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1,
    2,
    4,
    8,
    32,
    4096,
    16384,
    1 << 18,
)
MNT_DETACH = 2
OLD_ROOT = "/.machine"
PR_SET_NO_NEW_PRIVS = 38
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_libc = ctypes.CDLL(None, use_errno=True)


def main() -> int:
    specification = json.loads(Path(sys.argv[1]).read_text())
    descriptor = os.open(specification["network_namespace"], os.O_RDONLY | os.O_CLOEXEC)
    _check(_libc.setns(descriptor, CLONE_NEWNET), "setns")
    _check(_libc.unshare(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID), "unshare")
    _mount("none", "/", None, MS_REC | MS_PRIVATE)
    failed_read, failed_write = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        _become_container(specification, failed_write)
    os.close(failed_write)
    with os.fdopen(failed_read) as failed:
        error = failed.read()  # ends with the container's exec
    if error:
        os.waitpid(pid, 0)
        _tell({"error": error})
        return 1
    _tell({"pid": pid})
    _tell(_follow(pid))
    return 0


def _follow(pid: int) -> dict[str, Any]:
    """Pass signals on until the container ended."""
    pidfd = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(0, select.POLLIN)
    while True:
        ready = {descriptor for descriptor, _ in poll.poll()}
        if pidfd in ready:
            # The kernel lets PID 1 be waited for only when every process of its namespace is gone.
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            return {"exit_code": code} if code >= 0 else {"signal": -code}
        words = os.read(0, 4096).split()
        for word in words or [b"KILL"]:
            signal.pidfd_send_signal(pidfd, signal.SIGTERM if word == b"TERM" else signal.SIGKILL)
        if not words:
            poll.unregister(0)


def _become_container(specification: dict[str, Any], failed: int) -> None:
    try:
        _make_root(specification)
        socket.sethostname(specification["hostname"])
        log = os.open("/dev/null", os.O_RDONLY)
        os.dup2(log, 0)
        os.chdir(specification["working_directory"])
        os.setgroups(specification["groups"])
        os.setresgid(*[specification["gid"]] * 3)
        os.setresuid(*[specification["uid"]] * 3)
        if specification["no_new_privileges"]:
            _check(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
        os.umask(0o022)
        environment = specification["environment"]
        os.execvpe(specification["argv"][0], specification["argv"], environment)  # noqa: S606
    except BaseException as error:
        os.write(failed, f"{type(error).__name__}: {error}".encode())
    os._exit(128)


def _make_root(specification: dict[str, Any]) -> None:
    """Everything is mounted from inside the new root, so that its symbolic links lead nowhere else."""
    log = os.open(specification["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    place = specification["place"]
    _mount("layer", place, "tmpfs", MS_NOSUID)
    upper, work, root = (f"{place}/{name}" for name in ("upper", "work", "root"))
    for directory in (upper, work, root):
        Path(directory).mkdir(mode=0o755)
    _mount("root", root, "overlay", 0, f"lowerdir=/,upperdir={upper},workdir={work}")
    Path(root + OLD_ROOT).mkdir()
    os.chdir(root)
    _check(_libc.pivot_root(b".", OLD_ROOT[1:].encode()), "pivot_root")
    os.chdir("/")
    for file in specification["files"]:
        _write(file["path"], file["text"], file["mode"])
    for link in specification["links"]:
        path = Path(link["path"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(link["target"])
    _mount_system()
    for mount in sorted(specification["mounts"], key=lambda mount: len(mount["target"])):
        _bind(OLD_ROOT + mount["source"], mount["target"], mount["read_only"])
    _check(_libc.umount2(OLD_ROOT.encode(), MNT_DETACH), "umount")
    Path(OLD_ROOT).rmdir()
    if specification["read_only_root"]:
        _mount("none", "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY)


def _mount_system() -> None:
    _mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    _mount("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_RDONLY)
    _mount("dev", "/dev", "tmpfs", MS_NOSUID, "mode=755")
    for name in DEVICES:
        _bind(f"{OLD_ROOT}/dev/{name}", f"/dev/{name}", read_only=False)
    for name, target in (("fd", "/proc/self/fd"), ("stdout", "/proc/self/fd/1"), ("stderr", "/proc/self/fd/2")):
        Path("/dev", name).symlink_to(target)
    Path("/dev/shm").mkdir()
    _mount("shm", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777,size=64m")


def _bind(source: str, target: str, read_only: bool) -> None:
    if Path(source).is_dir():
        Path(target).mkdir(parents=True, exist_ok=True)
    else:
        _write(target, None, 0o644)
    _let_enter(Path(target))
    _mount(source, target, None, MS_BIND)
    if read_only:
        _mount("none", target, None, MS_REMOUNT | MS_BIND | MS_RDONLY)


def _let_enter(path: Path) -> None:
    """In this container's layer: what is mounted below a closed directory of the machine could not be reached."""
    for directory in path.parents:
        mode = directory.stat().st_mode & 0o7777
        if not mode & 0o001:
            directory.chmod(mode | 0o011)


def _write(path: str, text: str | None, mode: int) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | (0 if text is None else os.O_TRUNC), mode)
    if text is not None:
        os.write(descriptor, text.encode())
        os.fchmod(descriptor, mode)
    os.close(descriptor)


def _mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    kind_bytes = None if kind is None else kind.encode()
    result = _libc.mount(source.encode(), target.encode(), kind_bytes, ctypes.c_ulong(flags), data.encode())
    _check(result, f"mount {kind or 'bind'} {source} at {target}")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _tell(words: dict[str, Any]) -> None:
    print(json.dumps(words), flush=True)


if __name__ == "__main__":
    sys.exit(main())
