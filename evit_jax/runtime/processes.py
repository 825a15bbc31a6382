# SPDX-License-Identifier: Apache-2.0
"""The processes of a run: how they find each other, are asked to stop, and leave."""

import os
import signal
import sys

import jax
from jax.experimental import multihost_utils

from evit_jax.errors import InputError


def start_processes(text: str) -> None:
    """Joins the processes of a run; call it before anything else of JAX.

    Args:
      text: "" for a single process, "auto" where JAX finds the others itself (TPU pods, Slurm,
        Open MPI, Kubernetes), else "HOST:PORT,COUNT,NUMBER": where process 0 listens, how many
        there are and which this one is.
    """
    if not text:
        return
    if text == "auto":
        try:
            return jax.distributed.initialize()
        except ValueError as error:
            raise InputError(
                f"--processes=auto found no cluster here ({error}); leave it out for a single "
                "process, or give HOST:PORT,COUNT,NUMBER"
            ) from None
    try:
        address, count, number = text.split(",")
        host, port = address.rsplit(":", 1)
        settings = dict(num_processes=int(count), process_id=int(number))
        right = host and int(port) > 0 and 0 <= int(number) < int(count)
    except ValueError:
        right = False
    if not right:
        raise InputError(
            '--processes must be "auto" or HOST:PORT,COUNT,NUMBER with NUMBER from 0 to COUNT - 1, '
            f"got {text!r}"
        )
    jax.distributed.initialize(address, **settings)


class Stop:
    """Whether somebody wants the run to end: SIGTERM, or Ctrl-C once (twice ends it at once)."""

    def __init__(self):
        self.asked, self.asks = False, 0
        signal.signal(signal.SIGINT, self.ask)
        if not jax.distributed.is_initialized():  # JAX's own handler spreads it over processes
            signal.signal(signal.SIGTERM, self.ask)

    def ask(self, number: int, _) -> None:
        self.asked = True
        signal.signal(number, signal.SIG_DFL)
        if jax.distributed.is_initialized():
            os.kill(os.getpid(), signal.SIGTERM)

    def now(self) -> bool:
        """Whether to stop here; the same answer in all processes, which ask at the same places."""
        self.asks += 1
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(self.asks)
        return self.asked


def leave(status: int) -> None:
    """Ends this process now, without waiting for programs and batches that are being made.

    With status 0 the processes of a run leave together. With another one this process must not wait
    for the others, which wait for it in a sum over devices: without it they end as well.
    """
    if jax.distributed.is_initialized() and status == 0:
        jax.distributed.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
