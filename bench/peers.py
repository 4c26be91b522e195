"""The libraries that are compared: one small class each, ours included.

Every class has ``available()``, ``version()``, ``serves(case)`` and

* ``forward(case, q, k, v, option)``        -> a function without arguments that computes ``out``,
* ``backward(case, q, k, v, dout, option)`` -> one that computes ``(dq, dk, dv)``, and only that:
  the forward it needs has been done already,
* ``to_numpy(result)``                      -> the arrays of such a result.

What the returned function does is what gets timed.  Inputs have been converted before; results
are allocated by each library in its own usual way, and inside the timed call.  Each class lives
in a process of its own (``workers.py``), whose environment is ``environment(threads)``.

Threads: all get the same number.  OpenMP threads are bound, since unbound ones may share one core
for hundreds of milliseconds.  Libraries with pools of their own place their threads themselves.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

from cases import Case, numpy_dtype
from options import Option, as_mask

ALL_DTYPES = ("float16", "bfloat16", "float32", "float64")
MASKS = ("kv_lens", "window", "segments", "mask", "bias", "alibi")  # options that are one mask
ALL_OPTIONS = (*MASKS, "lens", "dbias", "softcap", "sinks", "dropout")
MaskType = tuple[np.dtype, tuple[int, ...]]  # dtype and shape


def mask_type(mask: np.ndarray | None) -> MaskType | None:
    return None if mask is None else (mask.dtype, mask.shape)


class Peer:
    """What the candidates have in common."""

    name = ""
    packages: tuple[str, ...] = ()
    forward_dtypes: tuple[str, ...] = ()
    backward_dtypes: tuple[str, ...] = ()
    grouped_heads = True
    options: tuple[str, ...] = ()

    def __init__(self, threads: int) -> None:
        self.threads = threads

    @classmethod
    def available(cls) -> bool:
        return all(importlib.util.find_spec(package) for package in cls.packages)

    @classmethod
    def version(cls) -> str:
        return importlib.metadata.version(cls.packages[0])

    def configuration(self) -> dict[str, Any]:
        """What else there is to know about the candidate, for the JSON file."""
        return {}

    @classmethod
    def serves(cls, case: Case) -> bool:
        dtypes = getattr(cls, f"{case.direction}_dtypes")
        served = case.dtype in dtypes and (cls.grouped_heads or case.Hq == case.Hkv)
        option = case.option.partition("=")[0]
        return served and (not option or option in cls.options)

    @staticmethod
    def environment(threads: int) -> dict[str, str]:
        return {
            "OMP_NUM_THREADS": str(threads),
            "OMP_PROC_BIND": "true",
            "OMP_PLACES": "cores",
            "OPENBLAS_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
        }

    def forward(self, case: Case, q, k, v, option: Option) -> Callable[[], Any]:
        raise NotImplementedError

    def backward(self, case: Case, q, k, v, dout, option: Option) -> Callable[[], Any]:
        raise NotImplementedError

    def to_numpy(self, result: Any) -> list[np.ndarray]:
        return list(result) if isinstance(result, tuple) else [result]


class Fastattn(Peer):
    """This project."""

    name = "fastattn"
    packages = ("fastattn",)
    forward_dtypes = ALL_DTYPES
    backward_dtypes = ALL_DTYPES
    options = ALL_OPTIONS

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        import fastattn

        fastattn.set_num_threads(threads)

    @classmethod
    def version(cls):
        from fastattn import introspect

        return introspect.versions()["fastattn"]

    def configuration(self):
        import fastattn

        return {"configuration": fastattn.show_config("dicts")}

    def forward(self, case, q, k, v, option):
        from fastattn import scaled_dot_product_attention

        arguments = option.arguments | {"enable_gqa": case.Hq != case.Hkv}
        return lambda: scaled_dot_product_attention(q, k, v, **arguments)

    def backward(self, case, q, k, v, dout, option):
        from fastattn.attention import attention_backward, attention_forward

        arguments = option.arguments
        out, lse = attention_forward(q, k, v, **arguments)
        arguments = arguments | {"wrt": option.wrt}
        return lambda: attention_backward(dout, q, k, v, out, lse, **arguments)[:3]


class Numpy(Peer):
    """The materialised computation, written plainly; its matrix products are those of the BLAS.

    16-bit inputs are left out: NumPy has no BLAS for them.
    """

    name = "numpy"
    packages = ("numpy",)
    forward_dtypes = ("float32", "float64")
    backward_dtypes = ("float32", "float64")

    @staticmethod
    def _probabilities(case: Case, q: np.ndarray, k: np.ndarray) -> np.ndarray:
        p = q @ k.swapaxes(-1, -2)
        p *= case.D**-0.5
        if case.causal:
            p += np.triu(np.full((case.Lq, case.Lk), -np.inf, p.dtype), 1)
        p -= p.max(axis=-1, keepdims=True)
        np.exp(p, out=p)
        p /= p.sum(axis=-1, keepdims=True)
        return p

    def forward(self, case, q, k, v, option):
        # The query heads of one kv head are rows of one matrix, where heads are grouped.
        rows = q.reshape(case.B, case.Hkv, -1, case.D)
        return lambda: (self._probabilities(case, rows, k) @ v).reshape(*q.shape[:3], case.Dv)

    def backward(self, case, q, k, v, dout, option):
        p = self._probabilities(case, q, k)
        delta = (dout * (p @ v)).sum(axis=-1, keepdims=True)
        del p

        def gradients():
            p = self._probabilities(case, q, k)
            dv = p.swapaxes(-1, -2) @ dout
            ds = dout @ v.swapaxes(-1, -2)
            ds -= delta
            ds *= p
            ds *= case.D**-0.5
            return ds @ k, ds.swapaxes(-1, -2) @ q, dv

        return gradients

    @classmethod
    def serves(cls, case):
        plain = case.Hq == case.Hkv or not (case.causal or case.direction == "backward")
        return super().serves(case) and plain


class Torch(Peer):
    """PyTorch's scaled_dot_product_attention and autograd's gradients of it."""

    name = "torch"
    packages = ("torch",)
    forward_dtypes = ALL_DTYPES
    backward_dtypes = ALL_DTYPES
    options = MASKS

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        import torch

        torch.set_num_threads(threads)
        self.torch = torch

    def _tensor(self, array: np.ndarray):
        if array.dtype == numpy_dtype("bfloat16"):
            return self.torch.from_numpy(array.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.from_numpy(array)

    def _arguments(self, case: Case, option: Option) -> dict[str, Any]:
        arguments = {"is_causal": case.causal, "enable_gqa": case.Hq != case.Hkv}
        if case.option:
            arguments["attn_mask"] = self._tensor(as_mask(case, option))
        return arguments

    def forward(self, case, q, k, v, option):
        attention = self.torch.nn.functional.scaled_dot_product_attention
        arguments = self._arguments(case, option)
        q, k, v = map(self._tensor, (q, k, v))
        return lambda: attention(q, k, v, **arguments)

    def backward(self, case, q, k, v, dout, option):
        inputs = [self._tensor(array).requires_grad_() for array in (q, k, v)]
        attention = self.torch.nn.functional.scaled_dot_product_attention
        out = attention(*inputs, **self._arguments(case, option))
        dout = self._tensor(dout)
        return lambda: self.torch.autograd.grad(out, inputs, dout, retain_graph=True)

    def to_numpy(self, result):
        tensors = result if isinstance(result, tuple) else (result,)
        return [self._widen(tensor.detach()) for tensor in tensors]

    def _widen(self, tensor) -> np.ndarray:
        if tensor.dtype == self.torch.bfloat16:
            return tensor.view(self.torch.int16).numpy().view(numpy_dtype("bfloat16"))
        return tensor.numpy()


class OnnxRuntime(Peer):
    """ONNX Runtime with a model of one node; the subclasses say which."""

    packages = ("onnxruntime", "onnx")

    def _node(self, case: Case):
        raise NotImplementedError

    def _shapes(self, case: Case) -> dict[str, list[int]]:
        """Shapes of q, k, v and out."""
        raise NotImplementedError

    def _arrange(self, array: np.ndarray) -> np.ndarray:
        return array

    @functools.cache  # noqa: B019  (a peer lives as long as its process)
    def _session(self, case: Case, mask: MaskType | None):
        import onnxruntime
        from onnx import helper

        dtype = numpy_dtype(case.dtype)
        tensors = {name: (dtype, shape) for name, shape in self._shapes(case).items()}
        if mask:
            tensors["attn_mask"] = mask
        *inputs, out = (
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), shape)
            for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: item[0] == "out")
        )
        graph = helper.make_graph([self._node(case)], "attention", inputs, [out])
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def forward(self, case, q, k, v, option):
        from onnxruntime import OrtValue

        mask = as_mask(case, option) if case.option else None
        if mask is not None:  # its rows may not be shared
            mask = np.repeat(mask, case.Lq // mask.shape[2], axis=2)
        session = self._session(case, mask_type(mask))
        binding = session.io_binding()
        arrays = {name: self._arrange(array) for name, array in zip("qkv", (q, k, v), strict=True)}
        if mask is not None:
            arrays["attn_mask"] = mask
        for name, array in arrays.items():
            binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(array))
        binding.bind_output("out", "cpu")

        def run():
            session.run_with_iobinding(binding)
            return binding.get_outputs()[0]

        return run


class OnnxAttention(OnnxRuntime):
    """The ONNX standard's Attention (opset 23)."""

    name = "ort_attention"
    forward_dtypes = ("float16", "float32")
    options = MASKS

    def _node(self, case):
        from onnx import helper

        inputs = ["q", "k", "v", "attn_mask"] if case.option else ["q", "k", "v"]
        return helper.make_node("Attention", inputs, ["out"], is_causal=int(case.causal))

    def _shapes(self, case):
        return {
            "q": [case.B, case.Hq, case.Lq, case.D],
            "k": [case.B, case.Hkv, case.Lk, case.D],
            "v": [case.B, case.Hkv, case.Lk, case.Dv],
            "out": [case.B, case.Hq, case.Lq, case.Dv],
        }

    def to_numpy(self, result):
        return [result.numpy()]


class OnnxMultiHead(OnnxRuntime):
    """ONNX Runtime's own MultiHeadAttention, whose arrays are (B, L, H * D)."""

    name = "ort_mha"
    forward_dtypes = ("float16", "float32")
    grouped_heads = False

    def _node(self, case):
        from onnx import helper

        self.heads = case.Hq
        return helper.make_node(
            "MultiHeadAttention",
            ["q", "k", "v"],
            ["out"],
            domain="com.microsoft",
            num_heads=case.Hq,
            unidirectional=int(case.causal),
        )

    def _shapes(self, case):
        return {
            "q": [case.B, case.Lq, case.Hq * case.D],
            "k": [case.B, case.Lk, case.Hq * case.D],
            "v": [case.B, case.Lk, case.Hq * case.Dv],
            "out": [case.B, case.Lq, case.Hq * case.Dv],
        }

    def _arrange(self, array):
        B, H, L, D = array.shape
        return np.ascontiguousarray(array.swapaxes(1, 2)).reshape(B, L, H * D)

    def to_numpy(self, result):
        out = result.numpy()
        return [out.reshape(*out.shape[:2], self.heads, -1).swapaxes(1, 2)]


class OpenVino(Peer):
    """OpenVINO's scaled_dot_product_attention (opset 13), computed in the precision of the inputs.

    16-bit floats: bfloat16 natively; float16 is widened, as it is by OpenVINO itself on a CPU
    without float16 arithmetic.
    """

    name = "openvino"
    packages = ("openvino",)
    forward_dtypes = ("float16", "bfloat16", "float32")
    grouped_heads = False
    options = MASKS

    @functools.cache  # noqa: B019  (a peer lives as long as its process)
    def _model(self, case: Case, mask: MaskType | None):
        import openvino
        from openvino import opset13

        elements = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}
        element = getattr(openvino.Type, elements[case.dtype])
        q = opset13.parameter([case.B, case.Hq, case.Lq, case.D], element, "q")
        k = opset13.parameter([case.B, case.Hkv, case.Lk, case.D], element, "k")
        v = opset13.parameter([case.B, case.Hkv, case.Lk, case.Dv], element, "v")
        inputs = [q, k, v]
        if mask:
            dtype, shape = mask
            kind = openvino.Type.boolean if dtype.kind == "b" else element
            inputs.append(opset13.parameter(shape, kind, "attn_mask"))
        out = opset13.scaled_dot_product_attention(*inputs, causal=case.causal)
        settings = {
            "INFERENCE_NUM_THREADS": self.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16" if case.dtype == "bfloat16" else "f32",
        }
        model = openvino.Model([out], inputs, "attention")
        return openvino.Core().compile_model(model, "CPU", settings), element

    def forward(self, case, q, k, v, option):
        import openvino

        mask = as_mask(case, option) if case.option else None
        model, element = self._model(case, mask_type(mask))
        request = model.create_infer_request()
        arrays = (q, k, v) if mask is None else (q, k, v, mask)
        tensors = []
        for index, array in enumerate(arrays):
            if array.dtype == numpy_dtype("bfloat16"):
                tensors.append(openvino.Tensor(array.view(np.uint16), array.shape, element))
            else:
                tensors.append(openvino.Tensor(array, shared_memory=True))
            request.set_input_tensor(index, tensors[-1])

        def run(inputs=(arrays, tensors)):  # their memory is shared, not owned, by the request
            request.infer()
            return request.get_output_tensor(0)

        return run

    def to_numpy(self, result):
        data = result.data  # OpenVINO shows bfloat16 as float16
        is_bfloat16 = result.element_type.get_type_name() == "bf16"
        return [data.view(numpy_dtype("bfloat16")) if is_bfloat16 else data.copy()]


PEERS = {
    peer.name: peer for peer in (Fastattn, Torch, OpenVino, OnnxMultiHead, OnnxAttention, Numpy)
}
