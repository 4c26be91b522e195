"""Every GPU kernel under NVIDIA's compute-sanitizer.

Run as a program, this file calls every kernel of a dtype: head sizes of each tile, with and without
element-wise options, split keys, and blocks that are computed again. CuPy's pool is off, so that
memory ends where its array does. `pytest -m slow` runs it so once per tool and dtype.
"""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import DTYPES, make_case, nan

from fastattn.attention import attention_backward, attention_forward

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

SIZES = ((64, 64), (128, 128), (192, 128), (256, 256), (300, 270))  # the last in pieces


def cases(rng, dtype):
    """Small problems that between them need every kernel."""
    for D, Dv in SIZES:
        shape = dict(lead=(2,), Hq=2, Hkv=1, Lq=131, Lk=150, D=D, Dv=Dv)
        plain = make_case(rng, dtype, is_causal=True, kv_lens=[149, 70], q_lens=[131, 9], **shape)
        yield plain
        poisoned = plain.with_(k=plain.k.copy(), v=plain.v.copy())
        poisoned.k[1, :, 70:] = poisoned.v[1, :, 70:] = nan
        poisoned.v[0, :, 140:] = nan
        yield poisoned
        yield make_case(
            rng, dtype, attn_mask=rng.random((131, 150)) < 0.7, softcap=20.0,
            alibi_slopes=np.array([0.1, 0.2]), bias=rng.standard_normal((2, 1, 150)),
            dropout_p=0.2, seed=3, sinks=np.array([0.5, -0.5]),
            q_segment_ids=np.arange(131) // 50,
            kv_segment_ids=np.arange(150) // 50, **shape,
        )  # fmt: skip
    few = make_case(rng, dtype, lead=(1,), Hq=8, Hkv=2, Lq=1, Lk=1100, D=128, kv_lens=1090)
    yield few
    poisoned = few.with_(v=few.v.copy())
    poisoned.v[..., 1085:, :] = nan
    yield poisoned


# In these, racecheck reports reads of lse and delta by lanes other than 0.
ONE_LANE_ARRIVES = {"hopper_backward_kv", "hopper_backward_qkv"}


def all_lanes_arrive(text):
    """The source of such a kernel, with every lane telling the loader that it has read.

    There lane 0 does so for its warp, once all lanes have met. racecheck reports the others' reads
    of lse and delta as races with the next copy to the same place. Where it reports none for this
    source, the arrival of lane 0 alone is all that it misses.
    """
    for old, new in (
        ("constexpr int kReaders = 4 * kGroups;", "constexpr int kReaders = 128 * kGroups;"),
        ("      if (lane == 0) {\n        barrier_arrive(", "      {\n        barrier_arrive("),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def run_cases(dtype, source="as_it_is"):
    import cupy

    from fastattn._gpu import config, device

    if source == "all_lanes_arrive":
        assemble = device.assemble

        def assemble_with_all(config):
            text = assemble(config)
            return all_lanes_arrive(text) if config.kernel in ONE_LANE_ARRIVES else text

        device.assemble = assemble_with_all

    def copy(x):  # CuPy takes no bfloat16 from the host
        if not isinstance(x, np.ndarray):
            return x
        raw = x.view(np.uint16) if x.dtype == DTYPES["bfloat16"] else x
        return cupy.asarray(raw).view(x.dtype)

    cupy.cuda.set_allocator(None)
    for case in cases(np.random.default_rng(0), DTYPES[dtype]):
        q, k, v, dout, dlse = map(copy, (case.q, case.k, case.v, case.dout, case.dlse))
        options = {name: copy(x) for name, x in case.options.items()}
        out, lse = attention_forward(q, k, v, **options)
        for ordered in (True, False):
            attention_backward(
                dout, q, k, v, out, lse, dlse=dlse, wrt=case.wrt, deterministic=ordered, **options
            )
    cupy.cuda.Device().synchronize()
    ran = {key[1].kernel for key in device._kernels}
    expected = set(config.KERNELS)
    if dtype != "float64":
        expected.add(config.DECODE)
    if device.device_of(cupy.cuda.Device().id).family == "sm_90a" and config.DTYPES[dtype] == 2:
        expected |= set(config.HOPPER_KERNELS)
    assert ran == expected, expected ^ ran


def sanitized(tool, *arguments):
    """What a tool makes of `run_cases`: whether nothing is wrong, and what it says."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer, which the CUDA toolkit has")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, __file__]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=1800)
    told = "ERROR SUMMARY: 0 errors" in done.stdout or "0 hazards" in done.stdout
    return done.returncode == 0 and told, done.stdout + done.stderr


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kernel_is_clean(tool, dtype):
    clean, text = sanitized(tool, dtype)
    reported = set(re.findall(r"Thread \(.*\) at (\w+)\+0x", text))
    if tool == "racecheck" and reported and reported <= ONE_LANE_ARRIVES:
        pytest.xfail("reads of lse and delta are reported: see all_lanes_arrive")
    assert clean, text[-8000:]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_racecheck_misses_the_arrival_of_one_lane_alone(dtype):
    clean, text = sanitized("racecheck", dtype, "all_lanes_arrive")
    assert clean, text[-8000:]


if __name__ == "__main__":
    run_cases(*sys.argv[1:])
