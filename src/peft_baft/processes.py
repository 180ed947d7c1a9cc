"""Data parallelism over the processes that torchrun or accelerate started, each with its own copy of the model.

The methods of `Processes` are named after torch.distributed's collectives. Unlike these, they pass on errors: if one process
fails, all of them raise its error instead of waiting forever.
"""

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
# Independent work of the processes may finish hours apart. A process that dies is noticed at once, whatever the timeout.
TIMEOUT = timedelta(days=30)


class Processes:
    """The processes of a job, and this one's rank among them. `Processes()` is a job of one process; its collectives do nothing.

    The processes wait for each other in `all_gather` and in the methods built on it, so each of them must make the same calls in
    the same order. An error raised inside `barrier` or `all_gather` is sent to the other processes, which raise it too. Messages
    use gloo and go through host memory even if the models are on GPUs; they are at most as large as an adapter.

    Attributes:
        rank: the index of this process, from 0. world_size: the number of processes.
    """

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT) if world_size > 1 else None
        self._exchanges = 0
        self._shared_error: BaseException | None = None  # the error that all processes have raised

    @classmethod
    @contextmanager
    def started(cls, expected: int | None = None) -> Iterator[Processes]:
        """Connect the processes that torchrun or accelerate started. If one of them fails inside the `with`, all of them raise.

        Args:
            expected: the number of processes that the user asked for; None accepts any.

        Raises:
            ValueError: another number of processes is running.
        """
        launched = dist.is_initialized() or "LOCAL_RANK" in os.environ
        world_size = int(os.environ.get("WORLD_SIZE", "1")) if launched else 1
        if expected not in (None, world_size):
            raise ValueError(UNEXPECTED.format(expected, world_size))
        owns_group = world_size > 1 and not dist.is_initialized()
        if owns_group:
            dist.init_process_group("gloo", timeout=TIMEOUT)
        try:
            processes = cls(dist.get_rank(), world_size) if world_size > 1 else cls()
            with processes.barrier():
                yield processes
        finally:
            if owns_group:
                dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this is the main process, rank 0, which prints and writes files."""
        return self.rank == 0

    def device(self, wanted: str) -> str:
        """Return this process's own GPU if `cuda` is wanted and several processes run; otherwise return `wanted`."""
        if self.world_size == 1 or wanted != "cuda":
            return wanted
        return f"cuda:{int(os.environ.get('LOCAL_RANK', self.rank)) % torch.cuda.device_count()}"

    def shard(self, items: Sequence[T]) -> list[T]:
        """Return this process's part of the items: every `world_size`-th one. It may be empty."""
        return list(items[self.rank :: self.world_size])

    def all_gather(self, work: Callable[[], T]) -> list[T]:
        """Run `work` in each process and return the results of all of them, in rank order. If one fails, all raise its error."""
        if self.world_size == 1:
            return [work()]
        try:
            result = work()
        except Exception as error:
            if error is not self._shared_error:
                self._exchange(None, error)
            raise
        return self._exchange(result, None)

    @contextmanager
    def barrier(self) -> Iterator[None]:
        """Wait for all processes at the end of the `with`. If one fails inside it, all raise its error."""
        try:
            yield
        except Exception as error:
            if self.world_size > 1 and error is not self._shared_error:
                self._exchange(None, error)
            raise
        if self.world_size > 1:
            self._exchange(None, None)

    def raise_if_peer_failed(self) -> None:
        """Raise `PeerFailed` if another process has failed, without waiting for it.

        Long work inside `all_gather` or `barrier` should call this now and then.
        """
        if self.world_size > 1 and dist.distributed_c10d._get_default_store().check(
            [self._failure_key]
        ):
            raise PeerFailed("another process has failed")

    def on_main(self, work: Callable[[], T]) -> T:
        """Run `work` in the main process only, and return its result in all processes."""
        return self.all_gather(lambda: work() if self.is_main else None)[0]  # type: ignore[return-value]

    def require_equal(self, value: Any, what: str) -> None:
        """Raise a ValueError in all processes unless `value` is the same in all of them."""
        values = self.all_gather(lambda: value)
        if any(other != values[0] for other in values):
            raise ValueError(f"All processes must have the same {what}.")

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite the tensors of all processes with those of the main process, which must have the same shapes."""
        if self.world_size == 1:
            return
        self.require_equal([tuple(tensor.shape) for tensor in tensors], "adapter")
        with torch.no_grad():
            for tensor in tensors:
                value = tensor.detach().cpu().contiguous()
                dist.broadcast(value, src=0, group=self._group)
                tensor.copy_(value)

    def all_gather_rows(self, work: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Concatenate each tensor (n, …) that `work` returns with those of the other processes: (n₁ + n₂ + …, …), in rank order.

        Only this process's own rows carry gradients. In a process that has nothing to do, `work` returns an empty list.
        """
        if self.world_size == 1:
            return work()
        own: list[Tensor] = []

        def detached() -> list[Tensor]:
            own.extend(work())
            return [tensor.detach().cpu() for tensor in own]

        gathered = self.all_gather(detached)
        gathered[self.rank] = own
        parts = [part for part in gathered if part]
        devices = [tensor.device for tensor in own or parts[0]]
        columns = zip(zip(*parts, strict=True), devices, strict=True)
        return [torch.cat([part.to(device) for part in column]) for column, device in columns]

    def backward(self, total: Tensor, parameters: Sequence[nn.Parameter]) -> None:
        """Run backward in each process and sum the gradients over all processes.

        A parameter that has no gradient in any process keeps None.
        """
        if self.world_size == 1:
            total.backward()
            return
        with self.barrier():
            if total.requires_grad:
                total.backward()
        dtype = reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)
        flat = []
        for parameter in parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            flat.append(gradient.detach().to("cpu", dtype).flatten())
        has_gradient = torch.tensor([p.grad is not None for p in parameters], dtype=dtype)
        message = torch.cat([*flat, has_gradient])
        dist.all_reduce(message, group=self._group)
        sizes = [*(p.numel() for p in parameters), len(parameters)]
        *sums, counts = torch.split(message, sizes)
        for parameter, gradient, count in zip(parameters, sums, counts.tolist(), strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter) if count else None

    def _exchange(self, result: T | None, error: Exception | None) -> list[T]:
        """Send a result or an error to all processes; return all results, or raise the first error."""
        if error is not None and not isinstance(error, PeerFailed):
            dist.distributed_c10d._get_default_store().set(self._failure_key, "")
        messages: list[Any] = [None] * self.world_size
        dist.all_gather_object(messages, (result, _picklable(error)), group=self._group)
        self._exchanges += 1
        errors = {rank: other for rank, (_, other) in enumerate(messages) if other is not None}
        if not errors:
            return [other for other, _ in messages]
        causes = [rank for rank, other in errors.items() if not isinstance(other, PeerFailed)]
        cause = min(causes or errors)
        self._shared_error = error if cause == self.rank else errors[cause]
        assert self._shared_error is not None
        raise self._shared_error

    @property
    def _failure_key(self) -> str:
        """The key in the process group's store that a process sets when it fails before the next exchange."""
        assert self._group is not None
        return f"peft_baft/{self._group.group_name}/{self._exchanges}"


class PeerFailed(RuntimeError):
    """This process gave up its work because another process failed."""


UNEXPECTED = (
    "{0} processes were requested, but the number of running processes is {1}. Start them with: "
    "torchrun --nproc_per_node {0} -m peft_baft_cli ... "
    "(`accelerate launch --cpu` starts only one process, whatever its --num_processes)."
)


def _picklable(error: Exception | None) -> Exception | None:
    """Replace an error that cannot be pickled, and so not be sent, by a RuntimeError with its message."""
    try:
        copy: Exception | None = pickle.loads(pickle.dumps(error))
        return copy
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
