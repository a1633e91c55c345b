"""A process with an engine of its own, which ends as its argument says; its workers' pids come first, as a line."""

from __future__ import annotations

import os
import sys
import threading
import time

from pipelines import Beats, pipeline, session

from liveavatar_engine.pipeline.tpp.plan import StageCosts


def _say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


how = sys.argv[1]
with pipeline(2, StageCosts.of(5.0, 5.0), threads=False) as runner:
    stream = session(runner, Beats(None, held=3) if how == "waiting" else Beats(10**6))
    next(stream)
    if how == "forked" and os.fork() == 0:
        time.sleep(60)  # it has inherited the links, and holds them open
        os._exit(0)
    if how in ("exit", "waiting"):
        threading.Thread(target=lambda: [None for _ in stream], daemon=True).start()
        time.sleep(0.3)
    _say(*(worker.pid for worker in runner.workers()))
    if how in ("exit", "waiting"):
        runner.close = lambda: None  # a program that just ends closes nothing
        sys.exit()
    for _ in stream:
        _say("frames")
