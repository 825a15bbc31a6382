# SPDX-License-Identifier: Apache-2.0
"""A process with one framework in it: the loop that answers requests, and who sends them.

A request is a line of JSON, dict(do=NAME, ...); the answer another, dict(result=...) or
dict(error=TEXT). JAX and PyTorch each get a process, so that neither one's threads, memory or
crashes reach the other, and one that hangs can be ended.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

TAIL = 600  # characters of a process's own words that go into an error


class Failed(Exception):
    """What a worker answered instead of a result, or how it ended."""


def answer(operations: dict[str, Callable]) -> None:
    """Serves requests from standard input until it ends; for the worker's side."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not get between the answers
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = dict(result=operations[request.pop("do")](**request))
        except Exception as error:
            traceback.print_exc()
            reply = dict(error=brief(error))
        channel.write(json.dumps(reply) + "\n")


def brief(error: BaseException) -> str:
    """Type and the beginning of the message, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:TAIL]


class Worker:
    """Asks a module's process, which is started when needed and again after it failed.

    Args:
      module: its name, for `python -m`.
      log: where its standard error goes.
      environment: variables to set for it.
    """

    def __init__(self, module: str, log: Path, environment: dict[str, str]):
        self.module, self.log, self.environment = module, log, os.environ | environment
        self.process = None

    def send(self, do: str, **request) -> None:
        if self.process is None:
            with self.log.open("a") as log:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", self.module],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    bufsize=1,
                    env=self.environment,
                )
            self.answers = queue.Queue()
            pump = threading.Thread(
                target=forward, args=(self.process.stdout, self.answers), daemon=True
            )
            pump.start()
        with contextlib.suppress(OSError):  # it ended; `receive` says so
            self.process.stdin.write(json.dumps(dict(do=do, **request)) + "\n")

    def receive(self, deadline: float) -> object:
        """The result of the request sent before, by `time.monotonic()` == deadline.

        Raises:
          Failed: an error over there, or no answer; the process then is ended.
        """
        try:
            line = self.answers.get(timeout=max(deadline - time.monotonic(), 0.1))
        except queue.Empty:
            self.stop()
            raise Failed("no answer in the time there was") from None
        if line is None:
            code = self.process.wait()
            self.stop()
            words = self.log.read_text(errors="replace")[-TAIL:]
            raise Failed(f"the process ended with exit code {code}: {words}")
        reply = json.loads(line)
        if "error" in reply:
            raise Failed(reply["error"])
        return reply["result"]

    def ask(self, do: str, deadline: float, **request) -> object:
        self.send(do, **request)
        return self.receive(deadline)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def forward(stream, answers: queue.Queue) -> None:
    """Lines of a stream into a queue, then None."""
    for line in stream:
        answers.put(line)
    answers.put(None)
