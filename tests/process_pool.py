# SPDX-License-Identifier: Apache-2.0
"""Processes in a Gloo group that stay over many tests: starting one costs more than most tests."""

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

WORLD = 4
groups: dict[int, Any] = {}  #: in a worker, the process group of the first n processes


class Pool:
    """Processes that stay: ``run(function, *args)`` calls it on all of them and returns what each returned."""

    def __init__(self, world: int, rendezvous: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.connections: list[Connection[Any, Any]] = []
        self.processes: list[multiprocessing.process.BaseProcess] = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            self.processes.append(
                context.Process(target=work, args=(theirs, rank, world, str(rendezvous)), daemon=True)
            )
            self.connections.append(ours)
        for process in self.processes:
            process.start()

    def run(self, function: Callable[..., Any], *args: Any, ranks: int | None = None) -> list[Any]:
        connections = self.connections[:ranks]
        for connection in connections:
            connection.send((function, args))
        answers = []
        for connection in connections:
            if not connection.poll(300):
                self.close()  # what it says later must not be taken for the next answer
                pytest.fail("a process hangs")
            answers.append(connection.recv())
        for failure in (a for a in answers if isinstance(a, str)):
            pytest.fail(failure)
        return [result for (result,) in answers]

    def close(self) -> None:
        for process in self.processes:
            process.kill()  # they hold nothing that wants an orderly end
            process.join()


def work(connection: Any, rank: int, world: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=world)
    groups.update({n: dist.new_group(list(range(n))) for n in range(1, world)} | {world: None})
    while True:
        function, args = connection.recv()
        try:
            connection.send((function(*args),))
        except BaseException:
            connection.send(f"process {rank}:\n{traceback.format_exc()}")
