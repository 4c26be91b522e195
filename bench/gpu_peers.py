"""The candidates on a GPU: ours on CuPy arrays, and PyTorch's backends on the same memory.

Classes as in ``peers.py``; inputs and results are arrays on the device, and everything lives in
one process and on one stream, the default one.  PyTorch's backends are called by the names of their
operators, forward and backward, past the dispatch and the autograd of its public function: what is
timed is the kernel and the least of the host's work around it.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

from cases import Case, numpy_dtype, widen
from peers import ALL_DTYPES, Peer

SHORT_DTYPES = ("float16", "bfloat16")
Calls = list[Callable[[], Any]]


class Fastattn(Peer):
    """This project, as it is by default."""

    name = "fastattn"
    packages = ("fastattn", "cupy")
    forward_dtypes = ALL_DTYPES
    backward_dtypes = ALL_DTYPES
    deterministic = True

    @classmethod
    def version(cls):
        from fastattn import introspect

        return introspect.versions()["fastattn"]

    def configuration(self):
        from fastattn._gpu.device import device_info

        return {"configuration": device_info()}

    @classmethod
    def serves(cls, case):
        return case.dtype in getattr(cls, f"{case.direction}_dtypes")

    def forward(self, case, q, k, v, option):
        from fastattn.attention import attention_forward

        arguments = option.arguments
        return lambda: attention_forward(q, k, v, **arguments).out

    def backward(self, case, q, k, v, dout, option):
        from fastattn.attention import attention_backward, attention_forward

        arguments = option.arguments
        out, lse = attention_forward(q, k, v, **arguments)
        arguments = arguments | {"wrt": option.wrt, "deterministic": self.deterministic}
        return lambda: attention_backward(dout, q, k, v, out, lse, **arguments)

    def to_numpy(self, result):
        """Float64 on the host, of a part of a result."""
        import cupy as cp

        return cp.asnumpy(widen(result))

    def graph(self, calls: Calls) -> Callable[[], None]:
        return capture(calls)


class FastattnFree(Fastattn):
    """The backward that may differ in the last bits from run to run."""

    name = "fastattn_free"
    forward_dtypes = ()
    deterministic = False


def capture(calls: Calls) -> Callable[[], None]:
    """Record calls of CuPy into a graph; the function returned launches it."""
    import cupy as cp

    # Memory of its own: nobody else gets what the graph's kernels write to.
    pool, stream = cp.cuda.MemoryPool(), cp.cuda.Stream(non_blocking=True)
    cp.cuda.get_current_stream().synchronize()
    with cp.cuda.using_allocator(pool.malloc), stream:
        results = [call() for call in calls]  # whatever is compiled and cached once
        stream.synchronize()
        del results
        stream.begin_capture()
        try:
            kept = [call() for call in calls]
        finally:
            graph = stream.end_capture()

    def launch(kept=(kept, pool, stream)):
        graph.launch()

    return launch


class TorchBackend(Peer):
    """One backend of PyTorch's scaled_dot_product_attention; the subclasses say which."""

    packages = ("torch", "cupy")
    forward_dtypes = SHORT_DTYPES
    backward_dtypes = SHORT_DTYPES

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        import torch

        self.torch, self.ops = torch, torch.ops.aten

    @classmethod
    def available(cls):
        return torch_with_cuda() is not None

    def configuration(self):
        torch = self.torch
        return {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}

    def forward(self, case, q, k, v, option):
        q, k, v = (as_tensor(array) for array in (q, k, v))
        return lambda: self._forward(case, q, k, v, False)[0]

    def backward(self, case, q, k, v, dout, option):
        q, k, v, dout = (as_tensor(array) for array in (q, k, v, dout))
        saved = self._forward(case, q, k, v, True)
        return lambda: self._backward(case, dout, q, k, v, saved)[:3]

    def _forward(self, case: Case, q, k, v, training: bool) -> tuple:
        raise NotImplementedError

    def _backward(self, case: Case, dout, q, k, v, saved: tuple) -> tuple:
        raise NotImplementedError

    def to_numpy(self, result):
        return result.double().cpu().numpy()

    def graph(self, calls: Calls) -> Callable[[], None]:
        torch = self.torch
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="relaxed"):
            kept = [call() for call in calls]

        def launch(kept=kept):
            graph.replay()

        return launch


class Flash(TorchBackend):
    """FlashAttention-2, as PyTorch has it."""

    name = "flash"

    def _forward(self, case, q, k, v, training):
        return self.ops._scaled_dot_product_flash_attention(q, k, v, 0.0, case.causal)

    def _backward(self, case, dout, q, k, v, saved):
        out, lse, offsets_q, offsets_k, max_q, max_k, rng, unused = saved[:8]
        return self.ops._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse, offsets_q, offsets_k, max_q, max_k, 0.0, case.causal,
            rng, unused,
        )  # fmt: skip


class Cudnn(TorchBackend):
    """cuDNN's fused attention."""

    name = "cudnn"

    def _forward(self, case, q, k, v, training):
        operator = self.ops._scaled_dot_product_cudnn_attention
        return operator(q, k, v, None, training, 0.0, case.causal)

    def _backward(self, case, dout, q, k, v, saved):
        out, lse, offsets_q, offsets_k, max_q, max_k, seed, offset = saved[:8]
        return self.ops._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse, seed, offset, None, offsets_q, offsets_k, max_q, max_k,
            0.0, case.causal,
        )  # fmt: skip


class Efficient(TorchBackend):
    """The memory-efficient attention of xFormers, as PyTorch has it."""

    name = "efficient"
    forward_dtypes = (*SHORT_DTYPES, "float32")
    backward_dtypes = forward_dtypes
    grouped_heads = False

    def _forward(self, case, q, k, v, training):
        operator = self.ops._scaled_dot_product_efficient_attention
        return operator(q, k, v, None, training, 0.0, case.causal)

    def _backward(self, case, dout, q, k, v, saved):
        out, lse, seed, offset = saved
        return self.ops._scaled_dot_product_efficient_attention_backward(
            dout, q, k, v, None, out, lse, seed, offset, 0.0, [True, True, True, False],
            case.causal,
        )  # fmt: skip


@functools.cache
def torch_with_cuda() -> Any | None:
    """PyTorch, where it is installed and finds a device."""
    if not importlib.util.find_spec("torch"):
        return None
    import torch

    return torch if torch.cuda.is_available() else None


def as_tensor(array: Any) -> Any:
    """A CuPy array as a PyTorch tensor on the same memory; as bits, for bfloat16's sake."""
    import torch

    if array.dtype == numpy_dtype("bfloat16"):
        return torch.from_dlpack(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_dlpack(array)


GPU_PEERS = {peer.name: peer for peer in (Fastattn, FastattnFree, Flash, Cudnn, Efficient)}
