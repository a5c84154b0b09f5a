"""A captured CUDA graph, and what it takes to end a capture that broke."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from hwexec.device import Stream
from hwexec.driver import captured_nodes
from hwexec.nodes import to_kernels

_cuda: Any = torch.cuda  # much of it has no types
_C: Any = torch._C
_EDITED = hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph")
"""Whether PyTorch lets a captured graph be changed before it is made ready, as it does since 2.8."""


def _new() -> Any:
    return _cuda.CUDAGraph(keep_graph=True) if _EDITED else _cuda.CUDAGraph()


class CudaGraph:
    """A torch.cuda.CUDAGraph of one stream's work, or several of them, one after another."""

    def __init__(
        self, stream: Stream, arenas: Sequence[torch.Tensor] | None = None, beside: CudaGraph | None = None
    ) -> None:
        self.parts: list[Any] = [_new()]
        self.stream = stream
        self._arenas = arenas
        self._earlier: int | None = 0
        """Nodes of the parts before the last."""
        self.pool: Any = _cuda.graph_pool_handle() if beside is None else beside.pool
        """PyTorch's memory pool. It takes segments of 2 and 20 MiB, however little is needed."""
        self.capturing = True

    def nodes(self) -> int | None:
        now = captured_nodes(self.stream.raw.cuda_stream) if self.capturing else None
        return None if now is None or self._earlier is None else self._earlier + now

    def cut(self) -> None:
        self._earlier = self.nodes()
        self._end()
        self._make_ready()
        self.parts.append(_new())
        self.begin()  # in the same pool: what one part leaves the next one reads

    def replay(self, part: int = 0) -> None:
        self.parts[part].replay()

    def close(self) -> None:
        for part in self.parts:
            part.reset()

    def begin(self) -> None:
        # thread_local: another thread that allocates must not break this capture
        self.parts[-1].capture_begin(pool=self.pool, capture_error_mode="thread_local")

    def end(self) -> None:
        self._end()
        self.capturing = False
        self._make_ready()

    def _make_ready(self) -> None:
        if _EDITED:
            part = self.parts[-1]
            to_kernels(part.raw_cuda_graph(), self.stream.gpu, self._arenas)
            part.instantiate()

    def _end(self) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*CUDA Graph is empty")
            self.parts[-1].capture_end()

    def abandon(self) -> None:
        """Of a capture that broke: end it, and let the allocator and the random generator know that it is over."""
        if not self.capturing:
            self.close()
            return
        try:
            self._end()
            self.capturing = False
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
            # until 2.7 PyTorch called it otherwise
            end = getattr(_C, "_cuda_endAllocateToPool", None) or _C._cuda_endAllocateCurrentStreamToPool
            end(gpu, self.pool)
            _C._cuda_releasePool(gpu, self.pool)
        with suppress(RuntimeError), torch.cuda.device(gpu):
            number, spare = torch.zeros(1, device="cuda"), torch.cuda.CUDAGraph()
            with torch.cuda.graph(spare, stream=self.stream.raw, capture_error_mode="thread_local"):
                number.add_(1)
        for part in self.parts:
            with suppress(RuntimeError):
                part.reset()
