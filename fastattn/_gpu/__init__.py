"""Attention on CuPy arrays: CUDA kernels that are compiled when they are first needed.

    driver.py   the backend's two functions: a Problem becomes launches
    config.py   the table of kernels, and the choice among them
    device.py   a device, its compiled kernels, launching
    params.py   the kernels' one argument, declared for both sides
    source.py   the text of a kernel, assembled from kernels/

Importing this package imports CuPy.
"""

from fastattn._gpu.device import device_info
from fastattn._gpu.driver import backward, forward

__all__ = ["backward", "device_info", "forward"]
