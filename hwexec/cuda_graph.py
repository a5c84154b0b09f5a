"""A captured CUDA graph, and what it takes to end a capture that broke."""

from __future__ import annotations

import warnings
from contextlib import suppress
from typing import Any

import torch

from hwexec.device import Stream
from hwexec.driver import captured_nodes

_cuda: Any = torch.cuda  # much of it has no types


class CudaGraph:
    """A torch.cuda.CUDAGraph of one stream's work."""

    def __init__(self, stream: Stream) -> None:
        self.raw: Any = torch.cuda.CUDAGraph()
        self.stream = stream
        # a pool of its own: captures that shared one would overwrite each other's outputs
        self.pool: Any = _cuda.graph_pool_handle()
        self.capturing = True

    def nodes(self) -> int | None:
        return captured_nodes(self.stream.raw.cuda_stream) if self.capturing else None

    def replay(self) -> None:
        self.raw.replay()

    def close(self) -> None:
        self.raw.reset()

    def begin(self) -> None:
        # thread_local: another thread that allocates must not break this capture
        self.raw.capture_begin(pool=self.pool, capture_error_mode="thread_local")

    def end(self) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*CUDA Graph is empty")
            self.raw.capture_end()
        self.capturing = False

    def abandon(self) -> None:
        """Of a capture that broke: end it, and let the allocator and the random generator know that it is over."""
        if not self.capturing:
            self.close()
            return
        try:
            self.end()
        except RuntimeError:
            self._clean_up()
        else:
            self.close()

    def _clean_up(self) -> None:
        gpu = self.stream.gpu
        self.capturing = False
        with suppress(RuntimeError):
            torch.cuda.synchronize(gpu)
        with suppress(RuntimeError, AttributeError):
            # raises where the capture had ended after all, and then reset gives back this graph's share of the pool
            torch._C._cuda_endAllocateToPool(gpu, self.pool)
            torch._C._cuda_releasePool(gpu, self.pool)
        with suppress(RuntimeError), torch.cuda.device(gpu):
            number, spare = torch.zeros(1, device="cuda"), torch.cuda.CUDAGraph()
            with torch.cuda.graph(spare, stream=self.stream.raw, capture_error_mode="thread_local"):
                number.add_(1)
        with suppress(RuntimeError):
            self.raw.reset()
