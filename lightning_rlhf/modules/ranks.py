"""What processes tell each other."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if _is_distributed() else 1


def rank() -> int:
    """Number of this process among them."""
    return dist.get_rank() if _is_distributed() else 0


def spoken(tensor: Tensor) -> Tensor:
    """A tensor where processes can tell it each other: NCCL knows no host memory.

    Args:
        tensor: Anywhere.

    Returns:
        The same, or a copy on this process's GPU.
    """
    return tensor.cuda() if tensor.is_cpu and dist.get_backend() == "nccl" else tensor


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Adds a tensor up over all processes; a collective.

    Args:
        tensor: Of one shape on all.

    Returns:
        The sum, on all.
    """
    if not _is_distributed():
        return tensor
    total = spoken(tensor).clone()
    dist.all_reduce(total)
    return total.to(tensor.device)


def gather_over_ranks(tensor: Tensor) -> Tensor:
    """Collects a tensor from all processes; a collective.

    Args:
        tensor: Of one shape on all.

    Returns:
        (ranks, ...), on all.
    """
    if not _is_distributed():
        return tensor[None]
    told = spoken(tensor).contiguous()
    parts = [torch.empty_like(told) for _ in range(world_size())]
    dist.all_gather(parts, told)
    return torch.stack(parts).to(tensor.device)


def most_over_ranks(number: int, device: torch.device) -> int:
    """The largest of the numbers of all processes; a collective.

    Args:
        number: Of this process.
        device: On which processes talk.

    Returns:
        The largest, on all.
    """
    return int(gather_over_ranks(torch.tensor(number, device=device)).max())


def any_over_ranks(here: bool, device: torch.device) -> bool:
    """Whether something is so on some process; a collective.

    Args:
        here: Whether it is on this one.
        device: On which processes talk.

    Returns:
        The answer, on all.
    """
    return most_over_ranks(int(here), device) > 0


def agree(error: Exception | None, what: str, rows: int, device: torch.device) -> int:
    """Raises on all processes if one of them has an error, so that none waits for another; a collective.

    Args:
        error: What went wrong here, if anything did.
        what: What was being done, for those processes on which it went well.
        rows: Rows of this process.
        device: On which processes talk.

    Returns:
        Rows of the process that has most.

    Raises:
        RuntimeError: If the error happened elsewhere, with what it said there; here it is raised as it is.
    """
    states = gather_over_ranks(torch.tensor([error is not None, rows], device=device, dtype=torch.int64))
    failed = states[:, 0].nonzero().flatten().tolist()
    if failed:
        said = gather_objects(error and f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        where = "; ".join(f"rank {number}: {said[number]}" for number in failed)
        raise RuntimeError(f"{what} failed on {where}")
    return int(states[:, 1].max())


@torch.no_grad()
def take_over(module: nn.Module, device: torch.device) -> None:
    """Gives a module the weights that it has on the first process; a collective.

    Args:
        module: Of one kind on all processes.
        device: On which processes talk.
    """
    if world_size() == 1:
        return
    for tensor in [*module.parameters(), *module.buffers()]:
        sent = tensor.detach().to(device)
        dist.broadcast(sent, src=0)
        tensor.copy_(sent)


def gather_objects(mine: Any) -> list[Any]:
    """Collects whatever can be pickled from all processes; a collective, for what is rare and small.

    Args:
        mine: Of this process.

    Returns:
        One of each process, on all.
    """
    everyones = [mine] * world_size()
    if _is_distributed():
        dist.all_gather_object(everyones, mine)
    return everyones


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
