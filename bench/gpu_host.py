"""What a call on a GPU costs the host, and what the first one costs.

python bench/gpu_host.py float32      # seconds of first calls, as JSON
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

from cases import numpy_dtype

CALLS = 1000
CALLS_IN_FLIGHT = 20  # few enough that no call waits for the device
SMALL = (1, 8, 128, 64)
FIRST = (1, 8, 1024, 128)
FIRST_DTYPES = ("bfloat16", "float32")
FIRST_SECONDS = 120


def host_times(torch: Any | None) -> dict[str, float]:
    """Median seconds until a call on small bfloat16 arrays returns, its results unfinished."""
    import cupy as cp

    import fastattn
    from fastattn.attention import attention_backward, attention_forward

    q, k, v, dout = _arrays("bfloat16", SMALL)
    out, lse = attention_forward(q, k, v)
    floats = cp.zeros(SMALL, cp.float32)
    times = {
        "attention_forward": _host_time(lambda: attention_forward(q, k, v)),
        "attention_forward, out given": _host_time(
            lambda: attention_forward(q, k, v, out=(out, lse))
        ),
        "scaled_dot_product_attention": _host_time(
            lambda: fastattn.scaled_dot_product_attention(q, k, v)
        ),
        "attention_backward": _host_time(lambda: attention_backward(dout, q, k, v, out, lse)),
        "cupy.add": _host_time(lambda: cp.add(floats, floats)),
    }
    if torch is not None:
        from gpu_peers import as_tensor

        tensors = [as_tensor(array) for array in (q, k, v)]
        attention = torch.nn.functional.scaled_dot_product_attention
        times["torch's scaled_dot_product_attention"] = _host_time(lambda: attention(*tensors))
    return times


def _host_time(call: Callable[[], Any]) -> float:
    import cupy as cp

    call()
    seconds = []
    for number in range(CALLS):
        if number % CALLS_IN_FLIGHT == 0:
            cp.cuda.get_current_stream().synchronize()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    cp.cuda.get_current_stream().synchronize()
    return median(seconds)


def first_call_times() -> dict[str, float]:
    """Seconds of the first calls of a process, its kernels compiled or in CuPy's disk cache."""
    times = {}
    for dtype in FIRST_DTYPES:
        with tempfile.TemporaryDirectory() as cache:
            for state in ("compiled", "from the cache"):
                done = subprocess.run(
                    [sys.executable, __file__, dtype],
                    env=os.environ | {"CUPY_CACHE_DIR": cache},
                    capture_output=True,
                    text=True,
                    timeout=FIRST_SECONDS,
                )
                if done.returncode:
                    raise RuntimeError(done.stderr[-300:])
                for name, seconds in json.loads(done.stdout.splitlines()[-1]).items():
                    times[f"{dtype} {name}, {state}"] = seconds
    return times


def _print_first_calls(dtype: str) -> None:
    import cupy as cp

    from fastattn.attention import attention_backward, attention_forward

    q, k, v, dout = _arrays(dtype, FIRST)
    times = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        cp.cuda.Device().synchronize()
        start = time.perf_counter()
        result = call()
        cp.cuda.Device().synchronize()
        times[name] = time.perf_counter() - start
        return result

    out, lse = timed("forward", lambda: attention_forward(q, k, v))
    timed("backward", lambda: attention_backward(dout, q, k, v, out, lse))
    timed("second forward", lambda: attention_forward(q, k, v))
    print(json.dumps(times))


def _arrays(dtype: str, shape: tuple[int, ...]) -> list[Any]:
    """q, k, v, dout, made on the host: CuPy's own kernels are not to be compiled meanwhile."""
    import cupy as cp

    rng, element = np.random.default_rng(0), numpy_dtype(dtype)
    normal = (rng.standard_normal(shape, dtype=np.float32).astype(element) for _ in range(4))
    return [cp.asarray(x.view(f"u{element.itemsize}")).view(element) for x in normal]


if __name__ == "__main__":
    _print_first_calls(sys.argv[1])
