"""What global distillation asks of the parent: from the parent itself, or from files that it left.

Shapes: S sequences in the split, B of them in a batch, T tokens, N = B * T, D hidden, K kept tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import safetensors
import safetensors.torch
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from puzzle_nas.artifacts import write_whole
from puzzle_nas.families import Anatomy, Head
from puzzle_nas.progress import progress
from puzzle_nas.scoring.comparison import ParentReference
from puzzle_nas.scoring.replacement import final_states
from puzzle_nas.training import parallel
from puzzle_nas.training.compilation import compile_layers
from puzzle_nas.training.losses import MATMUL_ROWS, ParentLogits, ParentTopK, log_softmax

FILE_SEQUENCES = 64
"""Sequences in one file: what an interrupted pass loses at most."""
STORED = ("ids", "log_p", "log_rest")
"""Tensors in a file: the fields of `ParentTopK`, in order."""


class ParentOutputs(Protocol):
    """Where outputs come from."""

    dtype: torch.dtype
    device: torch.device

    def outputs(
        self, tokens_BT: torch.Tensor, blocks_B: torch.Tensor, hidden: bool
    ) -> tuple[ParentLogits | ParentTopK, Sequence[torch.Tensor]]:
        """The parent's token distributions, and, if `hidden`, its residual stream after each block, [B, T, D]."""
        ...

    def reference(self, selection_ST: torch.Tensor) -> ParentReference:
        """To measure children by."""
        ...

    def prepare(self, compiled: bool) -> None:
        """Compile what of the parent is in memory, if asked, and divide it among the processes.

        To be called once, after `reference`.
        """
        ...


class LiveParent:
    """The parent itself, run on every batch."""

    def __init__(self, parent: PreTrainedModel):
        self.parent, self.dtype, self.device = parent, parent.dtype, parent.device

    @torch.no_grad()
    def outputs(
        self, tokens_BT: torch.Tensor, blocks_B: torch.Tensor, hidden: bool
    ) -> tuple[ParentLogits, Sequence[torch.Tensor]]:
        """See `ParentOutputs`."""
        parts = Anatomy(self.parent)
        *states, final = parts.states(tokens_BT, parts.inputs(tokens_BT.shape[1]))
        return ParentLogits(final.flatten(0, 1), parts.head), states if hidden else ()

    def reference(self, selection_ST: torch.Tensor) -> ParentReference:
        """See `ParentOutputs`."""
        return ParentReference(self.parent, selection_ST)

    def prepare(self, compiled: bool) -> None:
        """See `ParentOutputs`."""
        if compiled:
            compile_layers(self.parent)
        parallel.shard_layers(self.parent)


class StoredParent:
    """The parent's K most likely tokens in the blocks that training uses; the parent is loaded only to write them.

    A position takes 6 K + 4 bytes: ids as int32, log-probabilities as float16, what is left as float32.
    """

    def __init__(
        self,
        folder: Path,
        load: Callable[[], PreTrainedModel],
        train_ST: torch.Tensor,
        blocks: torch.Tensor,
        selection_ST: torch.Tensor,
        top_k: int,
        device: torch.device,
    ):
        self.device = device
        used = blocks.unique()
        train_ST = train_ST[used]
        self._place = {block: place for place, block in enumerate(used.tolist())}
        self.paths = [folder / f"{start:08d}.safetensors" for start in range(0, len(train_ST), FILE_SEQUENCES)]
        measured = folder / "selection.safetensors"
        if not all(path.exists() for path in [*self.paths, measured]):
            self._write(load(), train_ST, selection_ST, top_k, measured)
        tensors = safetensors.torch.load_file(measured)
        self.dtype = tensors["head"].dtype
        self._final = [tensors[f"final/{i}"].to(device) for i in range(len(tensors) - 2)]
        matrix = nn.Linear(*reversed(tensors["head"].shape), bias=False, device="meta")
        matrix.weight = nn.Parameter(tensors["head"].to(device), requires_grad=False)
        divisor, cap = tensors["head_shape"].tolist()
        self._head = Head(matrix, divisor, cap or None)

    def _write(self, parent: PreTrainedModel, train_ST, selection_ST, top_k: int, measured: Path) -> None:
        parts = zip(self.paths, train_ST.split(FILE_SEQUENCES), strict=True)
        mine = parallel.share([(path, tokens) for path, tokens in parts if not path.exists()])
        with progress("the parent's most likely tokens, part", len(mine)) as ticker:
            for path, tokens in mine:
                rows = [likeliest(parent, row.unsqueeze(0).to(parent.device), top_k) for row in tokens]
                tensors = {name: torch.stack([row[name] for row in rows]) for name in STORED}
                write_whole(path, partial(save_file, tensors))
                ticker.advance()
        if parallel.is_first():
            reference = ParentReference(parent, selection_ST)
            finals = {f"final/{i}": final.cpu().contiguous() for i, final in enumerate(reference.final)}
            head = Anatomy(parent).head
            shape = torch.tensor([head.divisor, head.cap or 0.0], dtype=torch.float64)
            weight = head.weight.detach().cpu().contiguous()
            write_whole(measured, partial(save_file, {"head": weight, "head_shape": shape, **finals}))
        parallel.gathered(())

    def outputs(
        self, tokens_BT: torch.Tensor, blocks_B: torch.Tensor, hidden: bool
    ) -> tuple[ParentTopK, Sequence[torch.Tensor]]:
        """See `ParentOutputs`; hidden states are not stored."""
        if hidden:
            raise ValueError("hidden states are not stored")
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in STORED}
        for block in blocks_B.tolist():
            number, row = divmod(self._place[block], FILE_SEQUENCES)
            with safetensors.safe_open(self.paths[number], "pt") as file:
                for name, found in parts.items():
                    found.append(file.get_slice(name)[row])
        return ParentTopK(*(torch.cat(found).to(self.device) for found in parts.values())), ()

    def reference(self, selection_ST: torch.Tensor) -> ParentReference:
        """See `ParentOutputs`."""
        return ParentReference(self._head, selection_ST, self._final)

    def prepare(self, compiled: bool) -> None:
        """See `ParentOutputs`. Nothing: each process reads from files what it needs."""


@torch.no_grad()
def likeliest(parent: PreTrainedModel, tokens_BT: torch.Tensor, k: int) -> dict[str, torch.Tensor]:
    """The top k next tokens: ids (int32) and log_p (float16), [N, K], and log_rest (float32), [N], on the CPU."""
    head = Anatomy(parent).head
    (final,) = final_states(parent, tokens_BT, len(tokens_BT))
    final_ND = final.flatten(0, 1)
    k = min(k, len(head.weight) - 1)
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in STORED}
    for rows in final_ND.split(MATMUL_ROWS):
        logs = log_softmax(head.matrix(rows), head)
        best = logs.topk(k, dim=-1)
        parts["ids"].append(best.indices.int().cpu())
        parts["log_p"].append(best.values.half().cpu())
        parts["log_rest"].append(logs.scatter_(1, best.indices, -torch.inf).logsumexp(-1).cpu())
    return {name: torch.cat(found) for name, found in parts.items()}
