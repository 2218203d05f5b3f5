"""HEALTHCHECK of the image: is the agent alive? It never asks about Postgres, which may be in a long crash recovery."""

import os
import sys
from http.client import HTTPConnection, HTTPException

TIMEOUT_S = 3.0


def main() -> int:
    """0 if /livez says so; else 1 with the reason."""
    host = os.environ.get("POD_IP") or "127.0.0.1"
    connection = HTTPConnection(host, int(os.environ.get("INSTANCE_MANAGER_HTTP_PORT", "8008")), timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/livez")
        answer = connection.getresponse()
        text = answer.read(4096).decode("utf-8", "replace").strip()
    except (OSError, HTTPException) as error:
        print(f"{host}: {error}")
        return 1
    print(text)
    return 0 if answer.status == 200 else 1


if __name__ == "__main__":
    sys.exit(main())
