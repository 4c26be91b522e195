"""Exact flash attention for NumPy and CuPy arrays, forward and backward, on CPU and GPU.

A map of the package::

    scaled_dot_product_attention     PyTorch's function, for NumPy and CuPy arrays
    attention.attention_forward      out and log-sum-exp, all options       -> AttentionResult
    attention.attention_backward     their gradients                        -> AttentionGradients
    merge_attention_states           two results over two sets of keys, as one
    safe_softmax, safe_softmax_backward      softmax whose rows may be fully masked
    set_num_threads, get_num_threads         how many threads a call takes
    show_config                      what was built, what runs here and why

    testing                          the oracle: plain attention, error bounds, assert helpers
    introspect                       what show_config shows, as values

A call walks one way: `attention` checks and normalises its arguments into one `_problem.Problem`
(arrays of other libraries come in through `_dlpack`), `_backends` picks the backend by the type of
the arrays, and the backend fills the results: `_cpu` with the kernels of `_cpu_kernels`, `_gpu`
with those in its folder `kernels`, which CuPy compiles when they are first needed.

Importing the package imports NumPy and nothing else; `_gpu` is imported at the first CuPy array.
"""

try:
    from fastattn import attention
except ImportError:
    from importlib.util import find_spec

    if find_spec("fastattn._cpu") is not None:
        raise
    raise ImportError(
        f"fastattn is not built in {__path__[0]}. If it is installed elsewhere, start Python in "
        "another folder than this clone, else build it here: pip install -e ."
    ) from None

from fastattn.attention import scaled_dot_product_attention
from fastattn.introspect import show_config
from fastattn.softmax import safe_softmax, safe_softmax_backward
from fastattn.states import merge_attention_states
from fastattn.threads import get_num_threads, set_num_threads

__all__ = [
    "attention",
    "get_num_threads",
    "merge_attention_states",
    "safe_softmax",
    "safe_softmax_backward",
    "scaled_dot_product_attention",
    "set_num_threads",
    "show_config",
]
