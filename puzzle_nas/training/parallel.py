"""Many processes: torchrun starts them, each is a rank; without torchrun there is one, and nothing here does anything.

Every rank comes to the same shares by itself. Ranks meet between stages, by gloo; where they have GPUs, GKD's shards
travel by NCCL.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import logging
import math
import os
import signal
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from puzzle_nas.errors import PuzzleError, RankError, RecipeError
from puzzle_nas.families import Anatomy
from puzzle_nas.machine import free_bytes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")

# One process is no accident here.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

WAIT = datetime.timedelta(days=30)
"""A rank waits for as long as the first one searches or measures; torchrun notices ranks that die."""
PEER_LOST = 75
"""Exit code of a rank that stops because another one did."""
GRACE_SECONDS = 5.0
"""For which it waits before."""
_store: dist.Store | None = None
"""torchrun's, once this process is a rank."""


def join() -> None:
    """Become one of torchrun's ranks. The first one prints."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    # Whatever is on disk is whole at any moment, and whoever started torchrun says how to go on.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    global _store
    _store, number, count = _unused_store()
    dist.init_process_group(backend, store=_store, rank=number, world_size=count, timeout=WAIT)
    atexit.register(dist.destroy_process_group)
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def leave() -> None:
    """Wait until no rank needs another any more.

    To a rank that still waits for its part of the last exchange, gloo may report the end of one that has its own as a
    failure. torchrun's store outlives all of them.
    """
    if _store is not None:
        _store.set(f"left/{rank()}", "")
        _store.wait([f"left/{number}" for number in range(world_size())], WAIT)


def _unused_store() -> tuple[dist.Store, int, int]:
    """A part of torchrun's store that belongs to this attempt, this process's number, and how many there are.

    torchrun keeps its store through restarts, addresses of dead ranks included, and several machines count restarts
    apart. So the first rank names the attempt, each other one answers with a name of its own, and takes the attempt
    for its own where it finds itself among the members.
    """
    store, number, count = next(dist.rendezvous("env://", timeout=WAIT))
    me = uuid.uuid4().hex
    if number == 0:
        store.set("puzzle/attempt", me)
        members = [store.get(f"puzzle/{me}/{other}").decode() for other in range(1, count)]
        store.set(f"puzzle/{me}/members", " ".join(members))
        return dist.PrefixStore(me, store), number, count
    while True:
        attempt = store.get("puzzle/attempt").decode()
        store.set(f"puzzle/{attempt}/{number}", me)
        with contextlib.suppress(dist.DistStoreError):
            store.wait([f"puzzle/{attempt}/members"], datetime.timedelta(seconds=1))
            if me in store.get(f"puzzle/{attempt}/members").decode().split():
                return dist.PrefixStore(attempt, store), number, count
        time.sleep(0.05)


def launch(nproc: int, arguments: Sequence[str]) -> int:
    """`puzzle ARGUMENTS` in `nproc` ranks on this machine, by torchrun; the exit code.

    Raises:
        RankError: a rank was killed.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    options = ["--standalone", f"--nproc-per-node={nproc}", "-m", "puzzle_nas", *arguments]
    try:
        torchrun.run(torchrun.parse_args(options))
    except SignalException:
        raise KeyboardInterrupt from None
    except ChildFailedError as error:
        # The first to stop; those that stopped because of it are no cause.
        causes = {rank: f for rank, f in error.failures.items() if f.exitcode not in (PEER_LOST, -signal.SIGTERM)}
        rank, failure = min((causes or error.failures).items(), key=lambda item: item[1].timestamp)
        if failure.exitcode == PEER_LOST:
            raise RankError(
                "The processes lost touch with each other. What is done is kept; the same command goes on from here."
            ) from None
        if failure.exitcode > 0:
            return failure.exitcode
        raise RankError(
            f"Process {rank} of {nproc} was killed ({signal.Signals(-failure.exitcode).name}; too little memory, "
            "perhaps). What is done is kept; the same command goes on from here."
        ) from None
    return 0


def is_lost_peer(error: Exception) -> bool:
    """Whether an exchange between ranks failed, as it does when another rank stops."""
    return world_size() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))


def wait_for_the_cause() -> None:
    """Let the rank that stopped be the first that torchrun sees gone, so that what it said is all that is said.

    torchrun ends this one as soon as it does.
    """
    with contextlib.suppress(KeyboardInterrupt):
        time.sleep(GRACE_SECONDS)


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are, on all machines."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process prints, writes stage records and runs what is not shared."""
    return rank() == 0


def from_first(compute: Callable[[], T]) -> T:
    """What `compute` returns on the first rank, on all of them."""
    if world_size() == 1:
        return compute()
    box: list[Any] = [compute() if is_first() else None]
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


def gathered(items: Sequence[T]) -> list[T]:
    """Every rank's items, in the order of ranks. No rank goes on before all are here."""
    if world_size() == 1:
        return list(items)
    boxes: list[Any] = [None] * world_size()
    dist.all_gather_object(boxes, list(items))
    return [item for box in boxes for item in box]


def share(items: Sequence[T]) -> list[T]:
    """This rank's part of what is still to do: every n-th item. All ranks have looked before any begins."""
    gathered(())
    return list(items)[rank() :: world_size()]


def parts(items: Sequence[T], count: int) -> list[Sequence[T]]:
    """Items in `count` contiguous parts of equal lengths, or nearly so."""
    return [items[len(items) * part // count : len(items) * (part + 1) // count] for part in range(count)]


def pass_up(tensors: Iterable[torch.Tensor]) -> None:
    """Send tensors, from any device, to the next rank; waits until it has taken them."""
    for tensor in tensors:
        dist.send(tensor.cpu().contiguous(), rank() + 1)


def take_from_below(tensors: Iterable[torch.Tensor]) -> None:
    """Fill tensors with those that the rank before this one passes up."""
    for tensor in tensors:
        received = torch.empty(tensor.shape, dtype=tensor.dtype)
        dist.recv(received, rank() - 1)
        tensor.copy_(received)


def divide_threads() -> None:
    """Give each rank of this machine its part of the threads."""
    torch.set_num_threads(max(1, torch.get_num_threads() // ranks_here()))


def ranks_here() -> int:
    """How many processes share this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if world_size() > 1 else 1


def share_of_memory(device: torch.device) -> float:
    """Bytes that this process may count on, of the machine's memory or a GPU's: its part of what is free.

    On a GPU that several processes share, others may have taken theirs already.
    """
    if device.type == "cpu":
        return free_bytes(device) / ranks_here()
    sharing = math.ceil(ranks_here() / torch.cuda.device_count())
    return min(free_bytes(device), torch.cuda.get_device_properties(device).total_memory / sharing)


def stop(error: PuzzleError) -> NoReturn:
    """Raise what all ranks have come to; the first one says it."""
    if not is_first():
        gathered(())
    raise error


@functools.cache
def _mesh(device: str) -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh

    if device == "cuda" and torch.cuda.device_count() < ranks_here():
        stop(
            RecipeError(
                f"GKD needs a GPU for each process: there are {ranks_here()} processes here and "
                f"{torch.cuda.device_count()} GPUs. Start no more processes than GPUs, or set device=cpu."
            )
        )
    return init_device_mesh(device, (world_size(),))


def shard_layers(model: PreTrainedModel) -> None:
    """Divide a model's layers among the ranks (FSDP2); embeddings, final norm and LM head stay whole on each."""
    if world_size() > 1:
        from torch.distributed.fsdp import fully_shard

        for layer in Anatomy(model).layers:
            fully_shard(layer, mesh=_mesh(model.device.type), reshard_after_forward=True)


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may lie in shards, in one piece on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class ShardedLoss(nn.Module):
    """The loss of a child in training, which lies in shards (FSDP2) where there are several ranks.

    Args:
        compute: of tokens [B, T] and their numbers in the split [B], a scalar: a mean over sequences.
    """

    def __init__(self, child: PreTrainedModel, compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]):
        super().__init__()
        self.child, self.compute = child, compute
        if world_size() > 1:
            from torch.distributed.fsdp import fully_shard

            shard_layers(child)
            fully_shard(self, mesh=_mesh(child.device.type))

    def forward(self, tokens_BT: torch.Tensor, blocks_B: torch.Tensor) -> torch.Tensor:
        """Scalar."""
        return self.compute(tokens_BT, blocks_B)

    def backward(self, tokens_BT: torch.Tensor, blocks_B: torch.Tensor, at_once: int) -> torch.Tensor:
        """The loss of a batch, scalar, in which each rank takes its part; gradients gather in the child's parameters.

        Args:
            tokens_BT, blocks_B: of all ranks.
            at_once: sequences that pass through the models of one rank together.
        """
        total = torch.zeros((), device=self.child.device)
        parts = (tensor.split(at_once * world_size()) for tensor in (tokens_BT, blocks_B))
        for tokens, blocks in zip(*parts, strict=True):
            mine = slice(rank(), None, world_size())
            weight = len(blocks[mine]) / len(blocks_B)
            # A rank for which nothing is left still takes part in the exchange of shards.
            mine = mine if weight else slice(1)
            loss = self(tokens[mine].to(self.child.device), blocks[mine]) * weight
            # FSDP divides by the number of ranks.
            (loss * world_size()).backward()
            total += loss.detach()
        if world_size() > 1:
            total.fill_(sum(gathered([total.item()])))
        return total
