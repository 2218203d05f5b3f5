"""archive_command and restore_command of the instance manager: asks the archiver over its Unix socket, and waits.

    python3 -I -S archive_client.py SOCKET push NAME
    python3 -I -S archive_client.py SOCKET fetch MODE NAME PATH

Used where there is no Perl; `client.pl` is the same, and starts five times as fast. One file, the standard library's socket
only, no other process. Exit codes: 0 done; for fetch 10 "proven absent"; 11
anything else. The shell line around it (`instance_manager.archive.commands`) makes of them what Postgres must see, also when
this program cannot start or is killed.
"""

# `_socket` is what `socket` is made of: importing that would double the time of this program.
import _socket
import os
import sys

ABSENT = 10
FAILED = 11


def main(arguments: list[str]) -> int:
    """The exit code; what the archiver has to say goes to standard error, which is Postgres's log."""
    path, *words = arguments
    if words[0] == "fetch":
        words[3] = words[3] if words[3].startswith("/") else os.getcwd() + "/" + words[3]
    if any("\n" in word or "\t" in word for word in words):
        raise ValueError("a line end or a tab in an argument")
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    connection.connect(path)
    request = ("\t".join(words) + "\n").encode()
    while request:
        request = request[connection.send(request) :]
    answer = b""
    while not answer.endswith(b"\n"):
        received = connection.recv(65536)
        if not received:
            raise OSError("the archiver ended before it answered")
        answer += received
    word, _, text = answer.decode().rstrip("\n").partition(" ")
    if text:
        sys.stderr.write("archive: " + text + "\n")
    return {"done": 0, "absent": ABSENT}.get(word, FAILED)


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except BaseException as error:
        sys.stderr.write("archive: no answer of the archiver: " + str(error) + "\n")
        code = FAILED
    sys.stderr.flush()
    os._exit(code)
