"""Two processes in one gloo group, started once and given functions to run."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SIZE = 2


def _serve(rank: int, store: str, connection: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=SIZE, timeout=timedelta(seconds=20)
    )
    while (task := connection.recv()) is not None:
        function, arguments = task
        try:
            connection.send((True, function(rank, *arguments)))
        except BaseException as error:
            connection.send((False, f"{type(error).__name__}: {error}"))
    dist.destroy_process_group()


class Pair:
    """``pair(function, *arguments)`` is ``[function(rank, *arguments) for each rank]``, run at the same time."""

    def __init__(self, store: str) -> None:
        context = mp.get_context("spawn")
        pipes = [context.Pipe() for _ in range(SIZE)]
        self._connections = [here for here, _ in pipes]
        self._processes = [
            context.Process(target=_serve, args=(rank, store, there), daemon=True)
            for rank, (_, there) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for connection in self._connections:
            connection.send((function, arguments))
        answers = []
        for connection in self._connections:
            assert connection.poll(60), f"{function.__name__} does not end"
            answers.append(connection.recv())
        assert all(done for done, _ in answers), [answer for done, answer in answers if not done]
        return [answer for _, answer in answers]

    def close(self) -> None:
        for connection in self._connections:
            connection.send(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
