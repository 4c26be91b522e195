"""Attention on CuPy arrays: CUDA kernels that are compiled when they are first needed.

    driver.py   the backend: its two functions turn a Problem into launches
    config.py   the table of kernels, and the choice among them
    device.py   a device, its compiled kernels, launching
    params.py   the kernels' one argument, declared for both sides
    source.py   the text of a kernel, assembled from kernels/
    wgmma.py, tensor_maps.py   what Hopper's kernels need besides

`driver` and `device` import CuPy; the others, and this package, do not.
"""
