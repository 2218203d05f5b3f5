"""archive_command and restore_command of the instance manager: asks the archiver over its Unix socket, and waits.

    python3 -I -S archive_client.py SOCKET push NAME [ALLOWS]
    python3 -I -S archive_client.py SOCKET fetch MODE NAME PATH [ALLOWS]

ALLOWS is a file whose one word says what may be done now, push or fetch. Where it is given, the wait ends as soon as it says
anything else: so the agent ends a wait whatever becomes of the archiver, and neither a shutdown nor a vote stands behind it.

Used where there is no Perl; `client.pl` does the same, and starts five times as fast. One file, the standard library's socket
only, no other process. Exit codes: 0 done; for fetch 10 "proven absent"; 11
anything else; 12 not allowed now. The shell line around it (`instance_manager.archive.commands`) makes of them what Postgres
must see, also when this program cannot start or is killed.
"""

# `_socket` is what `socket` is made of: importing that would double the time of this program.
import _socket
import os
import sys
import time

ABSENT = 10
FAILED = 11
NOT_ALLOWED = 12
LOOK_S = 0.05
STANDBY_WAITS_S = 12.0
"""A standby that waits here asks nobody for a stream: longer than the archiver's own patience, and no more."""


def main(arguments: list[str]) -> int:
    """The exit code; what the archiver has to say goes to standard error, which is Postgres's log."""
    path, *words = arguments
    known = 2 if words[0] == "push" else 4
    allows = words[known] if len(words) > known else None
    words = words[:known]
    ends_s = None
    if words[0] == "fetch":
        words[3] = words[3] if words[3].startswith("/") else os.getcwd() + "/" + words[3]
        ends_s = time.monotonic() + STANDBY_WAITS_S if words[1] == "standby" else None
    if any("\n" in word or "\t" in word for word in words):
        raise ValueError("a line end or a tab in an argument")
    if allows is not None and not is_allowed(allows, words[0]):
        return NOT_ALLOWED
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    if allows is not None or ends_s is not None:
        connection.settimeout(LOOK_S)
    connection.connect(path)
    request = ("\t".join(words) + "\n").encode()
    while request:
        request = request[connection.send(request) :]
    answer = b""
    while not answer.endswith(b"\n"):
        try:
            received = connection.recv(65536)
        except TimeoutError:
            if allows is not None and not is_allowed(allows, words[0]):
                return NOT_ALLOWED
            if ends_s is not None and time.monotonic() > ends_s:
                raise OSError("the archiver does not answer") from None
            continue
        if not received:
            raise OSError("the archiver ended before it answered")
        answer += received
    word, _, text = answer.decode().rstrip("\n").partition(" ")
    if text:
        sys.stderr.write("archive: " + text + "\n")
    return {"done": 0, "absent": ABSENT}.get(word, FAILED)


def is_allowed(path: str, verb: str) -> bool:
    """Whether the file's word is this verb; no file allows nothing."""
    try:
        with open(path) as file:
            return file.read(16).strip() == verb
    except FileNotFoundError:
        return False


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except BaseException as error:
        sys.stderr.write("archive: no answer of the archiver: " + str(error) + "\n")
        code = FAILED
    sys.stderr.flush()
    os._exit(code)
