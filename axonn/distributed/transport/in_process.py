"""All ranks in one process: deterministic messages and collectives, for tests and for debugging without MPI.

Each rank is a thread, but only the one that holds the baton runs; it passes the baton on when it waits. So a run is
the same every time (or, with `order_seed`, one reproducible order out of many), and when every rank waits, the
deadlock is reported at once with what each one waits for.
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
    """Another rank has failed; this one ends quietly."""


class InProcessWorld:
    """`size` ranks that take turns. With `order_seed`, who goes next is drawn at random, reproducibly.

    Messages may also be held back for a random number of turns then, so ranks see them arrive in many orders (each edge
    and direction still in send order).
    """

    def __init__(self, size: int, *, order_seed: int | None = None) -> None:
        self.size = size
        self._random = None if order_seed is None else random.Random(order_seed)
        self._lock = threading.Lock()
        # One for each rank, so that passing the baton on wakes nobody else.
        self._my_turn = [threading.Condition(self._lock) for _ in range(size)]
        self._turn = 0
        self._ready: list[Callable[[], bool]] = [lambda: True] * size
        self._waits_for = [""] * size
        self._live: set[int] = set(range(size))
        self._failure: BaseException | None = None
        self.mailboxes: list[dict[tuple[int, Direction], deque[Message]]] = [{} for _ in range(size)]
        self.decisions: list[dict[int, deque[Decision]]] = [{} for _ in range(size)]
        self.rendezvous: dict[tuple[tuple[int, ...], int], tuple[Any, list[torch.Tensor | None]]] = {}
        """What each collective under way is, and the contributions to it, by its ranks and its number among the
        collectives of these."""
        self.calls: list[dict[tuple[int, ...], int]] = [{} for _ in range(size)]
        """Collectives that each rank has issued so far, by their ranks: of all grids of the process together."""

    def run(self, function: Callable[[int], T]) -> list[T]:
        """Results of `function(rank)` by rank. Raises what the first failing rank raised."""
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

    def until(self, rank: int, ready: Callable[[], bool], what: str) -> None:
        """Let the others run until `ready()`; `what` says what `rank` waits for."""
        with self._lock:
            self._ready[rank] = ready
            self._waits_for[rank] = what
            self._pass_on(rank)
        self._take_baton(rank)
        self._ready[rank] = lambda: True

    def holds_back(self) -> bool:
        """Whether an arrived message is to be seen only later (never, unless orders are random)."""
        return self._random is not None and self._random.random() < 0.3

    def _take_baton(self, rank: int) -> None:
        with self._lock:
            self._my_turn[rank].wait_for(lambda: self._turn == rank or self._failure is not None)
        if self._failure is not None:
            raise _Stopped

    def _pass_on(self, rank: int) -> None:
        after = [(rank + i) % self.size for i in range(1, self.size + 1)]
        candidates = [r for r in after if r in self._live and self._ready[r]()]
        if candidates:
            self._turn = candidates[0] if self._random is None else self._random.choice(candidates)
        elif self._live and self._failure is None:
            waits = "; ".join(f"rank {r} waits for {self._waits_for[r]}" for r in sorted(self._live))
            self._failure = DeadlockError(f"no rank can go on: {waits}")
        for woken in [self._turn] if self._failure is None else range(self.size):
            self._my_turn[woken].notify_all()


class InProcessTransport(Transport):
    """The messages of one rank of an `InProcessWorld`."""

    def __init__(self, world: InProcessWorld, rank: int) -> None:
        super().__init__(rank)
        self._world = world
        self._expected: dict[tuple[int, Direction], int] = {}
        self._edges: dict[tuple[int, Direction], MessageEdge] = {}
        self._decisions_left: dict[int, int] = {}
        self._told: list[Decision] = []

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
            raise self._still_told(peer)
        self._decisions_left = {peer: count}
        self._world.decisions[self.rank].setdefault(peer, deque())

    def _tell(self, peer: int, decision: Decision) -> None:
        self._world.decisions[peer].setdefault(self.rank, deque()).append(decision)

    def told(self) -> list[Decision]:
        self._hear()
        told, self._told = self._told, []
        return told

    def _hear(self) -> None:
        for peer, left in self._decisions_left.items():
            box = self._world.decisions[self.rank][peer]
            while box and left and not self._world.holds_back():
                self._told.append(box.popleft())
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
        found = tuple(TensorSpec(tuple(t.shape), t.dtype) for t in message.tensors)
        if found != edge.tensors:
            way = f"from rank {edge.peer} to rank {self.rank}"
            raise mismatch(message.address, way, describe(found), describe(edge.tensors))
        return message

    def wait(self) -> list[Message]:
        ways = {f"{direction.name.lower()} from {peer}": left for (peer, direction), left in self._expected.items()}
        ways |= {f"told by {peer}": left for peer, left in self._decisions_left.items()}
        what = ", ".join(f"{left} {way}" for way, left in ways.items() if left)
        if not what and not self._told:
            raise self._nothing_expected()
        while True:
            arrived = self.poll()
            self._hear()
            if arrived or self._told:
                return arrived
            self._world.until(self.rank, self._has_mail, f"messages ({what})")

    def _has_mail(self) -> bool:
        boxes = self._world.mailboxes[self.rank]
        told = self._world.decisions[self.rank]
        return any(left and boxes[key] for key, left in self._expected.items()) or any(
            left and told[peer] for peer, left in self._decisions_left.items()
        )

    def flush(self) -> None:
        return None


class _Done(CollectiveHandle):
    def __init__(self, finish: Callable[[], None]) -> None:
        self._finish = finish

    def wait(self) -> None:
        self._finish()


class InProcessCollectives(Collectives):
    """The collectives of one rank of an `InProcessWorld`; sums are taken in the order of the ranks."""

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
        """Lay `tensor` on the table and, once those of all ranks are there, `combine` them."""
        calls = self._world.calls[self.rank]
        number = calls.get(group.ranks, 0)
        calls[group.ranks] = number + 1
        wanted = (operation, tuple(tensor.shape), tensor.dtype)
        found, parts = self._world.rendezvous.setdefault((group.ranks, number), (wanted, [None] * len(group.ranks)))
        if found != wanted:
            raise TransportError(f"rank {self.rank} starts {wanted} with ranks {group.ranks}, which have {found}")
        parts[group.ranks.index(self.rank)] = tensor.clone()

        def complete() -> bool:
            return all(part is not None for part in parts)

        def finish() -> None:
            if not complete():
                self._world.until(self.rank, complete, f"{operation} {number} of ranks {group.ranks}")
            # Whoever comes here first takes it off the table; the others hold their own reference.
            self._world.rendezvous.pop((group.ranks, number), None)
            combine([part for part in parts if part is not None])

        return _Done(finish)
