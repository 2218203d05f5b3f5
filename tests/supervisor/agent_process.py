"""The process of the fake agent: gives its socket to the test, ticks, and does what the test says on a second socket."""

import os
import select
import socket
import sys

TICK_S = 0.1


def daemonise(seconds: str) -> None:
    """Leave an orphan behind, in the agent's session: a grandchild whose parent exits at once."""
    if os.fork() == 0:
        if os.fork() == 0:
            os.execvp("sleep", ["sleep", seconds])  # noqa: S606
        os._exit(0)
    os.wait()


def main() -> None:
    supervisor = socket.socket(fileno=int(os.environ["INSTANCE_MANAGER_SUPERVISOR_FD"]))
    test = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    test.connect(sys.argv[1])
    socket.send_fds(test, [str(os.getpid()).encode()], [supervisor.fileno()])
    ticking = True
    while True:
        if ticking:
            supervisor.send(b'{"type":"tick"}')
        if not select.select([test], [], [], TICK_S)[0]:
            continue
        command, _, argument = test.recv(1000).decode().partition(" ")
        if command == "quiet":
            ticking = False
        elif command == "close":
            ticking = False
            supervisor.close()
        elif command == "daemonise":
            daemonise(argument)
        elif command == "exit":
            os._exit(int(argument))
        elif command == "child":
            if os.fork() == 0:
                os.execvp("sleep", ["sleep", argument])  # noqa: S606
        else:
            os._exit(99)
        test.send(b"done")


main()
