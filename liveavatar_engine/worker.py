"""`python -m liveavatar_engine.worker`: a process of an engine on several devices; engines start it themselves."""

from __future__ import annotations

import json
import signal
import sys

from .pipeline.tpp.link import connect
from .pipeline.tpp.worker import Worker


def main() -> None:
    """Read from stdin, as one line of JSON, where the front is and which rank this is; then serve it."""
    told = json.loads(sys.stdin.readline())
    key, (host, port) = bytes.fromhex(told["key"]), told["address"]
    worker = Worker(connect((host, port), key), told["rank"], key, told["host"])
    signal.signal(signal.SIGTERM, lambda *_: worker.drain())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker.serve()


if __name__ == "__main__":
    main()
