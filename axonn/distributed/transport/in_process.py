"""Transport and collectives of ranks in one process: deterministic, for tests and for debugging without MPI.

Each rank is a thread, but only the one that holds the baton runs; it passes the baton on when it waits. A run is
therefore the same every time (or, with `order_seed`, one reproducible order out of many), and when every rank waits,
the deadlock is reported at once with what each one waits for.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from axonn.distributed.collectives import CollectiveGroup, CollectiveHandle, Collectives, Operation
from axonn.distributed.tensor_spec import TensorSpec
from axonn.distributed.transport.base import Address, Decision, Message, MessageEdge, Transport, describe, mismatch
from axonn.errors import DeadlockError, TransportError
from axonn.grid import Axis, ProcessGrid
from axonn.schedules import Direction

T = TypeVar("T")


class _Stopped(Exception):
    """Raised in a rank when another one has failed, to end it quietly."""


class InProcessWorld:
    """A world of `size` ranks that take turns. With `order_seed` the next rank is drawn at random, reproducibly.

    Messages are then also held back for a random number of turns, so that ranks see them arrive in many orders (within
    each edge and direction still in send order).
    """

    def __init__(self, size: int, *, order_seed: int | None = None) -> None:
        self.size = size
        self._random = None if order_seed is None else random.Random(order_seed)
        self._lock = threading.Lock()
        # One per rank, so that passing the baton on wakes no other rank.
        self._my_turn = [threading.Condition(self._lock) for _ in range(size)]
        self._turn = 0
        self._ready: list[Callable[[], bool]] = [lambda: True] * size
        self._waits_for = [""] * size
        self._live: set[int] = set(range(size))
        self._failure: BaseException | None = None
        self.mailboxes: list[dict[tuple[int, Direction], deque[Message]]] = [{} for _ in range(size)]
        self.decisions: list[dict[int, deque[Decision]]] = [{} for _ in range(size)]
        self.rendezvous: dict[tuple[tuple[int, ...], int], tuple[Any, list[torch.Tensor | None]]] = {}
        """Each collective under way with its contributions, by its ranks and its number among the collectives of these
        ranks."""
        self.calls: list[dict[tuple[int, ...], int]] = [{} for _ in range(size)]
        """Number of collectives that each rank has issued so far, by their ranks, over all grids of the process."""

    def run(self, function: Callable[[int], T]) -> list[T]:
        """Run `function(rank)` on every rank; return the results by rank. Raises what the first failing rank raised."""
        results: dict[int, T] = {}
        self._live = set(range(self.size))
        self._failure = None

        def body(rank: int) -> None:
            try:
                self._take_baton(rank)
                results[rank] = function(rank)
            except _Stopped:
                pass
            except BaseException as error:
                self._failure = self._failure or error
            finally:
                with self._lock:
                    self._live.discard(rank)
                    self._pass_on(rank)

        threads = [threading.Thread(target=body, args=(rank,), name=f"rank-{rank}") for rank in range(self.size)]
        self._turn = 0
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._failure is not None:
            raise self._failure
        return [results[rank] for rank in range(self.size)]

    def until(self, rank: int, ready: Callable[[], bool], awaited: str) -> None:
        """Let other ranks run until `ready()`; `awaited` says what `rank` waits for. Raises `DeadlockError`."""
        with self._lock:
            self._ready[rank] = ready
            self._waits_for[rank] = awaited
            self._pass_on(rank)
        self._take_baton(rank)
        self._ready[rank] = lambda: True

    def holds_back(self) -> bool:
        """Return True if an arrived message is to be delivered only later (never, unless orders are random)."""
        return self._random is not None and self._random.random() < 0.3

    def _take_baton(self, rank: int) -> None:
        with self._lock:
            self._my_turn[rank].wait_for(lambda: self._turn == rank or self._failure is not None)
        if self._failure is not None:
            raise _Stopped

    def _pass_on(self, rank: int) -> None:
        in_turn = [(rank + i) % self.size for i in range(1, self.size + 1)]
        candidates = [r for r in in_turn if r in self._live and self._ready[r]()]
        if candidates:
            self._turn = candidates[0] if self._random is None else self._random.choice(candidates)
        elif self._live and self._failure is None:
            waits = "; ".join(f"rank {r} waits for {self._waits_for[r]}" for r in sorted(self._live))
            self._failure = DeadlockError(f"no rank can go on: {waits}")
        for woken in [self._turn] if self._failure is None else range(self.size):
            self._my_turn[woken].notify_all()


class InProcessTransport(Transport):
    """Transport of one rank of an `InProcessWorld`."""

    def __init__(self, world: InProcessWorld, rank: int) -> None:
        super().__init__(rank)
        self._world = world
        self._expected: dict[tuple[int, Direction], int] = {}
        self._edges: dict[tuple[int, Direction], MessageEdge] = {}
        self._decisions_left: dict[int, int] = {}
        self._arrived_decisions: list[Decision] = []

    def expect(self, edge: MessageEdge, count: int) -> None:
        key = (edge.peer, edge.direction)
        if self._expected.get(key):
            raise TransportError(f"rank {self.rank} still expects messages from rank {edge.peer}")
        self._expected[key] = count
        self._edges[key] = edge
        self._world.mailboxes[self.rank].setdefault(key, deque())

    def _send(self, peer: int, address: Address, tensors: tuple[torch.Tensor, ...]) -> None:
        start = 0.0 if self.spans is None else self.spans.now()
        box = self._world.mailboxes[peer].setdefault((self.rank, address.direction), deque())
        box.append(Message(address, tuple(t.clone() for t in tensors)))
        self._sent(peer, address, start)

    def expect_decisions(self, peer: int, count: int) -> None:
        if any(self._decisions_left.values()):
            raise self._still_expected(peer)
        self._decisions_left = {peer: count}
        self._world.decisions[self.rank].setdefault(peer, deque())

    def _send_decision(self, peer: int, decision: Decision) -> None:
        self._world.decisions[peer].setdefault(self.rank, deque()).append(decision)

    def poll_decisions(self) -> list[Decision]:
        self._receive_decisions()
        arrived, self._arrived_decisions = self._arrived_decisions, []
        return arrived

    def _receive_decisions(self) -> None:
        for peer, left in self._decisions_left.items():
            box = self._world.decisions[self.rank][peer]
            while box and left and not self._world.holds_back():
                self._arrived_decisions.append(box.popleft())
                left -= 1  # noqa: PLW2901
            self._decisions_left[peer] = left

    def poll(self) -> list[Message]:
        arrived = []
        for key, left in self._expected.items():
            box = self._world.mailboxes[self.rank][key]
            while box and left and not self._world.holds_back():
                arrived.append(self._checked(box.popleft(), self._edges[key]))
                left -= 1  # noqa: PLW2901
            self._expected[key] = left
        return arrived

    def _checked(self, message: Message, edge: MessageEdge) -> Message:
        actual = tuple(TensorSpec(tuple(t.shape), t.dtype) for t in message.tensors)
        if actual != edge.tensors:
            route = f"from rank {edge.peer} to rank {self.rank}"
            raise mismatch(message.address, route, describe(actual), describe(edge.tensors))
        return message

    def wait(self) -> list[Message]:
        counts = {f"{direction.name.lower()} from {peer}": left for (peer, direction), left in self._expected.items()}
        counts |= {f"decisions from {peer}": left for peer, left in self._decisions_left.items()}
        awaited = ", ".join(f"{left} {kind}" for kind, left in counts.items() if left)
        if not awaited and not self._arrived_decisions:
            raise self._nothing_expected()
        while True:
            arrived = self.poll()
            self._receive_decisions()
            if arrived or self._arrived_decisions:
                return arrived
            self._world.until(self.rank, self._has_mail, f"messages ({awaited})")

    def _has_mail(self) -> bool:
        boxes = self._world.mailboxes[self.rank]
        decisions = self._world.decisions[self.rank]
        return any(left and boxes[key] for key, left in self._expected.items()) or any(
            left and decisions[peer] for peer, left in self._decisions_left.items()
        )

    def flush(self) -> None:
        return None


class _Done(CollectiveHandle):
    def __init__(self, finish: Callable[[], None]) -> None:
        self._finish = finish

    def wait(self) -> None:
        self._finish()


class InProcessCollectives(Collectives):
    """Collectives of one rank of an `InProcessWorld`; sums are taken in the order of the ranks."""

    def __init__(self, world: InProcessWorld, grid: ProcessGrid, rank: int) -> None:
        super().__init__(grid, rank)
        self._world = world

    def _group(self, ranks: tuple[int, ...], axes: Sequence[Axis] | None) -> Any:
        return None

    def _all_reduce(self, tensor: torch.Tensor, group: CollectiveGroup, operation: Operation) -> CollectiveHandle:
        def combine(parts: list[torch.Tensor]) -> None:
            total, *others = parts
            for part in others:
                total = total + part if operation == "sum" else torch.maximum(total, part)
            tensor.copy_(total)

        return self._meet(tensor, group, f"all-reduce {operation}", combine)

    def _all_gather(self, output: torch.Tensor, tensor: torch.Tensor, group: CollectiveGroup) -> CollectiveHandle:
        return self._meet(tensor, group, "all-gather", lambda parts: torch.stack(parts, out=output))

    def _meet(
        self, tensor: torch.Tensor, group: CollectiveGroup, operation: str, combine: Callable[[list[torch.Tensor]], Any]
    ) -> CollectiveHandle:
        """Contribute `tensor` and, once all ranks have contributed, `combine` the contributions."""
        calls = self._world.calls[self.rank]
        number = calls.get(group.ranks, 0)
        calls[group.ranks] = number + 1
        call = (operation, tuple(tensor.shape), tensor.dtype)
        first_call, parts = self._world.rendezvous.setdefault((group.ranks, number), (call, [None] * len(group.ranks)))
        if first_call != call:
            raise TransportError(f"rank {self.rank} starts {call} with ranks {group.ranks}, which have {first_call}")
        parts[group.ranks.index(self.rank)] = tensor.clone()

        def complete() -> bool:
            return all(part is not None for part in parts)

        def finish() -> None:
            if not complete():
                self._world.until(self.rank, complete, f"{operation} {number} of ranks {group.ranks}")
            # The first rank to finish removes the entry; the others hold their own reference.
            self._world.rendezvous.pop((group.ranks, number), None)
            combine([part for part in parts if part is not None])

        return _Done(finish)
