"""A training step as a CUDA graph: a GPU needs less time for a small product than the CPU needs to start it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


class StepGraph:
    """What one step does, captured without being done, and from then on started as a whole.

    Nothing in it may wait for the GPU, and everything must have been done once before: kernels are compiled and
    optimisers make their moments the first time.

    Args:
        compute: the step, of the learning rate, scalar, and its inputs.
        inputs: on the GPU; every step's inputs are copied to where these lie.
    """

    def __init__(self, compute: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor]):
        self.inputs = inputs
        self.rate = torch.zeros((), device=inputs[0].device)
        # The graph has memory of its own; what the step took before would lie idle.
        torch.cuda.empty_cache()
        self.graph = torch.cuda.CUDAGraph()
        stream, here = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            self.graph.capture_begin()
            self.result = compute(self.rate, *inputs)
            self.graph.capture_end()
        here.wait_stream(stream)

    def step(self, rate: float, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Do it at a learning rate; what `compute` returned."""
        self.rate.fill_(rate)
        for buffer, values in zip(self.inputs, inputs, strict=True):
            buffer.copy_(values)
        self.graph.replay()
        return self.result.clone()


def side_by_side(works: Sequence[Callable[[], torch.Tensor]]) -> list[torch.Tensor]:
    """What independent pieces of work return, which a GPU may do at the same time where each leaves room."""
    here = torch.cuda.current_stream()
    results = []
    streams = [torch.cuda.Stream() for _ in works]
    for work, stream in zip(works, streams, strict=True):
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            results.append(work())
    for stream in streams:
        here.wait_stream(stream)
    return results
