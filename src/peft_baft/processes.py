"""Several processes at one job, each with a model of its own: who does what, what they tell each other, how they end."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import reduce
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")
# Shares of independent work may end hours apart; a process that dies is noticed at once.
PATIENCE = timedelta(days=30)


class Processes:
    """The processes of a job, and this one's place among them. `Processes()` is this one alone, for which all is a no-op.

    They wait for each other in `gather` and in what is built on it. An error of one of them inside `together` or `gather`
    takes the place of whatever the others wait for, so that all raise it and none waits for ever. Messages go through the
    host's memory (gloo), also where models are on GPUs: they are as small as an adapter.

    Attributes:
        rank: this one's number, from 0. count: how many there are.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if count > 1 else None
        self._exchanges = 0
        self._told: BaseException | None = None  # an error that all processes know of already

    @classmethod
    @contextmanager
    def started(cls, expected: int | None = None) -> Iterator[Processes]:
        """Bring together the processes that torchrun, or accelerate, has started; an error of one is raised by all.

        Args:
            expected: how many are meant to run.

        Raises:
            ValueError: so many do not run.
        """
        launched = dist.is_initialized() or "LOCAL_RANK" in os.environ
        count = int(os.environ.get("WORLD_SIZE", "1")) if launched else 1
        if expected not in (None, count):
            raise ValueError(UNEXPECTED.format(expected, count))
        ours = count > 1 and not dist.is_initialized()
        if ours:
            dist.init_process_group("gloo", timeout=PATIENCE)
        try:
            processes = cls(dist.get_rank(), count) if count > 1 else cls()
            with processes.together():
                yield processes
        finally:
            if ours:
                dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def device(self, wanted: str) -> str:
        """Choose a device of this process's own where `cuda` is wanted and there are several."""
        if self.count == 1 or wanted != "cuda":
            return wanted
        return f"cuda:{int(os.environ.get('LOCAL_RANK', self.rank)) % torch.cuda.device_count()}"

    def share(self, items: Sequence[T]) -> list[T]:
        """This one's part of what is to be done; none if there are fewer items than processes before it."""
        return list(items[self.rank :: self.count])

    def gather(self, work: Callable[[], T]) -> list[T]:
        """List what `work` gives in each process, in the order of their ranks; an error of one is raised by all."""
        if self.count == 1:
            return [work()]
        try:
            result = work()
        except Exception as error:
            if error is not self._told:
                self._exchange(None, error)
            raise
        return self._exchange(result, None)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wait for the others at the end of what is inside; an error of one is raised by all."""
        try:
            yield
        except Exception as error:
            if self.count > 1 and error is not self._told:
                self._exchange(None, error)
            raise
        if self.count > 1:
            self._exchange(None, None)

    def look_up(self) -> None:
        """Stop if another process has failed. For independent work inside `gather` or `together`; waits for nobody."""
        if self.count > 1 and dist.distributed_c10d._get_default_store().check([self._alarm]):
            raise Stopped("another process has failed")

    def of_first(self, work: Callable[[], T]) -> T:
        """Let the first process alone do `work`, and give all processes its result."""
        return self.gather(lambda: work() if self.first else None)[0]  # type: ignore[return-value]

    def require_alike(self, value: Any, what: str) -> None:
        """Raise a ValueError in all processes unless `value` is equal in all."""
        values = self.gather(lambda: value)
        if any(other != values[0] for other in values):
            raise ValueError(f"All processes must have the same {what}.")

    def spread(self, tensors: Sequence[Tensor]) -> None:
        """Give all processes the values that the tensors, of the same shapes in all, have in the first one."""
        if self.count == 1:
            return
        self.require_alike([tuple(tensor.shape) for tensor in tensors], "adapter")
        with torch.no_grad():
            for tensor in tensors:
                value = tensor.detach().cpu().contiguous()
                dist.broadcast(value, 0, group=self._group)
                tensor.copy_(value)

    def joined(self, work: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Join each tensor (n, …) that `work` gives with its rows from all processes: (n₁ + n₂ + …, …), in the order of ranks.

        Only this process's rows carry gradients. A process with nothing to do gives no tensors.
        """
        if self.count == 1:
            return work()
        own: list[Tensor] = []

        def shown() -> list[Tensor]:
            own.extend(work())
            return [tensor.detach().cpu() for tensor in own]

        found = self.gather(shown)
        parts = [own if rank == self.rank else other for rank, other in enumerate(found) if other]
        devices = [tensor.device for tensor in own or parts[0]]
        columns = zip(zip(*parts, strict=True), devices, strict=True)
        return [torch.cat([part.to(device) for part in column]) for column, device in columns]

    def backward(self, total: Tensor, parameters: Sequence[nn.Parameter]) -> None:
        """Backward in each process; the gradients of all, added up, in all. None stays where no process has a gradient."""
        if self.count == 1:
            total.backward()
            return
        with self.together():
            if total.requires_grad:
                total.backward()
        gradients = [p.grad for p in parameters]
        dtype = reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)
        flat = [
            (p if p.grad is None else p.grad).detach().to("cpu", dtype).flatten()
            for p in parameters
        ]
        flat = [part * 0 if g is None else part for part, g in zip(flat, gradients, strict=True)]
        message = torch.cat([*flat, torch.tensor([g is not None for g in gradients], dtype=dtype)])
        dist.all_reduce(message, group=self._group)
        *sums, found = message.split([*(p.numel() for p in parameters), len(parameters)])
        for parameter, gradient, reached in zip(parameters, sums, found.tolist(), strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter) if reached else None

    def _exchange(self, result: T | None, error: Exception | None) -> list[T]:
        """Send one message of each to all: a result, or an error."""
        if error is not None and not isinstance(error, Stopped):
            dist.distributed_c10d._get_default_store().set(self._alarm, "")
        said: list[Any] = [None] * self.count
        dist.all_gather_object(said, (result, _portable(error)), group=self._group)
        self._exchanges += 1
        errors = {rank: other for rank, (_, other) in enumerate(said) if other is not None}
        if not errors:
            return [other for other, _ in said]
        cause = next(
            (rank for rank, other in errors.items() if not isinstance(other, Stopped)), min(errors)
        )
        self._told = error if cause == self.rank else errors[cause]
        assert self._told is not None
        raise self._told

    @property
    def _alarm(self) -> str:
        """Under what a failure before the next exchange is made known."""
        assert self._group is not None
        return f"peft_baft/{self._group.group_name}/{self._exchanges}"


class Stopped(RuntimeError):
    """Work was given up since another process failed."""


UNEXPECTED = (
    "{0} processes were asked for, and {1} runs or run. Start them with: torchrun --nproc_per_node {0} -m peft_baft_cli ... "
    "(`accelerate launch --cpu` starts a single one, whatever its --num_processes)."
)


def _portable(error: Exception | None) -> Exception | None:
    """Make the error one that can be sent: not every class of errors can be pickled."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
