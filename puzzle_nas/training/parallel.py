"""Many processes: torchrun starts them, each is a rank; without torchrun there is one, and nothing here does anything.

Every rank comes to the same shares by itself. Ranks meet between stages, by gloo; where they have GPUs, GKD's shards
travel by NCCL. A checkpoint of shards is a folder of safetensors that any number of ranks can read.
"""

from __future__ import annotations

import atexit
import datetime
import logging
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from puzzle_nas.artifacts import complete_folder
from puzzle_nas.errors import RankError, RecipeError
from puzzle_nas.families.loading import build
from puzzle_nas.modeling import PuzzleForCausalLM

T = TypeVar("T")

# One process is no accident here.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

WAIT = datetime.timedelta(days=30)
"""A rank waits for as long as the first one searches or measures; torchrun notices ranks that die."""
PEER_LOST = 75
"""Exit code of a rank that stops because another one did."""


def join() -> None:
    """Become one of torchrun's ranks. The first one prints."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    # Whatever is on disk is whole at any moment, and whoever started torchrun says how to go on.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    backend = "cpu:gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=WAIT)
    atexit.register(dist.destroy_process_group)
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


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


def divide_threads() -> None:
    """Give each rank of this machine its part of the threads."""
    torch.set_num_threads(max(1, torch.get_num_threads() // ranks_here()))


def ranks_here() -> int:
    """How many processes share this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if world_size() > 1 else 1


class ShardedLoss(nn.Module):
    """A loss in which a parent and a child in training take part, both in shards (FSDP2) where there are ranks.

    Args:
        loss: of parent, child and tokens [B, T], a mean over sequences.
    """

    def __init__(self, parent: PuzzleForCausalLM, child: PuzzleForCausalLM, loss: Callable[..., torch.Tensor]):
        super().__init__()
        self.child = child
        self._compute = lambda tokens_BT: loss(parent, child, tokens_BT)
        if world_size() == 1:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        device = parent.device.type
        if device == "cuda" and torch.cuda.device_count() < ranks_here():
            raise RecipeError(
                f"GKD needs a GPU for each process: there are {ranks_here()} processes here and "
                f"{torch.cuda.device_count()} GPUs. Start no more processes than GPUs, or set device=cpu."
            )
        mesh = init_device_mesh(device, (world_size(),))
        # The parent's embeddings and head stay whole on every rank: the loss reads the head without calling it.
        for layer in [*parent.model.layers, *child.model.layers]:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        fully_shard(self, mesh=mesh)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Scalar."""
        return self._compute(tokens_BT)

    def backward(self, tokens_BT: torch.Tensor) -> float:
        """Loss over all ranks' parts of a batch; its gradients are in the child's parameters, averaged."""
        count = len(tokens_BT)
        mine = tokens_BT[rank() :: world_size()]
        weight = len(mine) / count
        # A rank for which nothing is left still takes part in the exchange of shards.
        loss = self(mine if len(mine) else tokens_BT[:1]) * weight
        # FSDP divides by the number of ranks.
        (loss * world_size()).backward()
        return sum(gathered([loss.item()]))


@torch.no_grad()
def whole(model: PuzzleForCausalLM, dtype: torch.dtype) -> PuzzleForCausalLM | None:
    """A model in one piece, for measuring, on the first rank; None on the others. What needs no copy is shared."""
    weights = {}
    for name, weight in model.state_dict().items():
        full = weight.full_tensor() if isinstance(weight, DTensor) else weight
        if is_first():
            weights[name] = full.to(dtype)
    return build(model.config, weights) if is_first() else None


def save_checkpoint(folder: Path, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors, each rank its shards, and forget earlier steps."""
    import torch.distributed.checkpoint as checkpoint

    target = folder / f"step_{step:08d}"
    with complete_folder(target) if is_first() else nullcontext(target.with_name(target.name + ".partial")) as partial:
        gathered(())
        writer = checkpoint.HuggingFaceStorageWriter(str(partial), save_distributed=True)
        checkpoint.save(dict(tensors), storage_writer=writer, no_dist=world_size() == 1)
    if is_first():
        for path in folder.glob("step_*"):
            if path != target:
                shutil.rmtree(path)


def load_checkpoint(folder: Path, parameters: Mapping[str, torch.Tensor]) -> tuple[int, dict[str, torch.Tensor]] | None:
    """The last step and its tensors, None when there is none; written by any number of ranks.

    Tensors named `.../NAME` come sharded as the parameter NAME is; others whole.
    """
    import torch.distributed.checkpoint as checkpoint

    found = sorted(path for path in folder.glob("step_*") if not path.name.endswith(".partial"))
    if not found:
        return None
    reader = checkpoint.HuggingFaceStorageReader(str(found[-1]))
    tensors: dict[str, Any] = {}
    for key, facts in reader.read_metadata().state_dict_metadata.items():
        like = parameters.get(key.partition("/")[2])
        if like is not None and like.shape == facts.size:
            tensors[key] = torch.empty_like(like, dtype=facts.properties.dtype, requires_grad=False)
        else:
            tensors[key] = torch.empty(facts.size, dtype=facts.properties.dtype)
    checkpoint.load(tensors, storage_reader=reader, no_dist=world_size() == 1)
    return int(found[-1].name.removeprefix("step_")), tensors
