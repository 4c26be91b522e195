"""What the tests of attention share: a Case is one problem, with what its backward needs."""

import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field, replace

import ml_dtypes
import numpy as np
import pytest

from fastattn import _cpu, testing
from fastattn.attention import attention_backward, attention_forward
from fastattn.testing import assert_forward, assert_gradients, live_pairs

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
# Every row of the kernel table, but for those that repeat a row of a lower ISA: the same kernels.
_ROWS = {tuple(row[key] for key in row if key != "isa"): row for row in _cpu.kernel_table()[::-1]}
KERNELS = list(_ROWS.values())[::-1]
RUNNABLE_ISAS = [row["name"] for row in _cpu.isa_table() if not row["missing"]]
GRADIENTS = ("dq", "dk", "dv", "dbias", "dsinks", "dalibi_slopes")
inf, nan = np.inf, np.nan

all_kernels = pytest.mark.parametrize(
    ("isa", "dtype"),
    [(row["isa"], DTYPES[row["dtype"]]) for row in KERNELS],
    ids=["{isa}-{dtype}".format(**row) for row in KERNELS],
    indirect=["isa"],
)


def _remembered(oracle, size=16):
    """The oracle's answers do not depend on the ISA: it is asked once for each problem."""
    answers = {}

    def digest(x):
        if isinstance(x, np.ndarray):
            return x.shape, x.dtype, x.tobytes()
        if isinstance(x, (tuple, list)):
            return tuple(map(digest, x))
        return repr(x)

    def ask(reference, arrays, q, pairs, **given):
        key = reference, digest(arrays), pairs, digest(sorted(given.items()))
        if key not in answers:
            if len(answers) == size:
                del answers[next(iter(answers))]
            answers[key] = oracle(reference, arrays, q, pairs, **given)
        return answers[key]

    return ask


testing._exact_and_plain = _remembered(testing._exact_and_plain)


def acc_of(dtype):
    """The accumulation dtype, which is also that of lse."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


@dataclass(frozen=True)
class Case:
    """One problem: arrays, options, and the gradients of the results."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    dout: np.ndarray
    dlse: np.ndarray | None = None
    options: dict = field(default_factory=dict)

    @property
    def wrt(self):
        given = (name for name in ("bias", "sinks", "alibi_slopes") if name in self.options)
        return ("q", "k", "v", *given)

    def with_(self, **changes):
        """A copy with other arrays; what is no field is an option."""
        fields = {name: changes.pop(name) for name in list(changes) if hasattr(self, name)}
        return replace(self, options={**self.options, **changes}, **fields)

    def forward(self, **kwargs):
        return attention_forward(self.q, self.k, self.v, **self.options, **kwargs)

    def backward(self, out, lse, wrt=None, **kwargs):
        return attention_backward(
            self.dout, self.q, self.k, self.v, out, lse,
            dlse=self.dlse, wrt=self.wrt if wrt is None else wrt, **self.options, **kwargs,
        )  # fmt: skip

    def run(self, **kwargs):
        """Forward and backward: name -> array, of all results there are."""
        out, lse = self.forward(**kwargs)
        grads = self.backward(out, lse, **kwargs)
        named = {"out": out, "lse": lse, **grads._asdict()}
        return {name: x for name, x in named.items() if x is not None}

    def live(self):
        return live_pairs(self.q, self.k, **self.options)

    def check(self):
        """Hold forward and backward against the oracle; returns the results."""
        results = self.run()
        out, lse = results["out"], results["lse"]
        assert_forward(self.q, self.k, self.v, out, lse, **self.options)
        grads = [results.get(name) for name in GRADIENTS]
        assert_gradients(
            self.dout, self.q, self.k, self.v, out, lse, grads,
            dlse=self.dlse, wrt=self.wrt, **self.options,
        )  # fmt: skip
        return results


def make_case(rng, dtype, *, lead=(), Hq=2, Hkv=None, Lq, Lk, D, Dv=None, dlse=True, **options):
    """Draw a Case from the standard normal distribution."""
    Hkv, Dv, dtype = Hkv or Hq, D if Dv is None else Dv, np.dtype(dtype)

    def normal(*shape, dtype=dtype):
        return np.asarray(rng.standard_normal(shape)).astype(dtype)

    return Case(
        q=normal(*lead, Hq, Lq, D),
        k=normal(*lead, Hkv, Lk, D),
        v=normal(*lead, Hkv, Lk, Dv),
        dout=normal(*lead, Hq, Lq, Dv),
        dlse=normal(*lead, Hq, Lq, dtype=acc_of(dtype)) if dlse else None,
        options=options,
    )


def shape_id(shape):
    """The id of a test whose parameter is a dict of sizes."""
    sizes = (f"{k}{'x'.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in shape.items())
    return "-".join(sizes)


def bits(x):
    """The bytes of the elements in C order."""
    return np.ascontiguousarray(x).tobytes()


def assert_same_bits(actual, expected, what=""):
    """Assert that two arrays, or two dicts of arrays, are equal to the last bit."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for name in expected:
            assert_same_bits(actual[name], expected[name], f"{what} {name}".strip())
        return
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), what
    if bits(actual) != bits(expected):
        words = [np.ascontiguousarray(x).view(f"u{x.itemsize}") for x in (actual, expected)]
        differ = words[0] != words[1]
        at = tuple(map(int, np.argwhere(differ)[0]))
        raise AssertionError(
            f"{what}: {differ.sum()} of {differ.size} elements differ in their bits, the first at"
            f" {at}: {actual[at]!r}, expected {expected[at]!r}"
        )


def run_python(code, *, timeout=120, **environment):
    """Run code in a fresh interpreter; returns what it printed. It may import these helpers."""
    path = os.pathsep.join(filter(None, [os.path.dirname(__file__), *sys.path]))
    env = {**os.environ, "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(code)],
        capture_output=True, text=True, timeout=timeout, env=env,
    )  # fmt: skip
    assert done.returncode == 0, (
        f"exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    )
    return done.stdout


# ---------------------------------------------------------------- options to try

LEAD, HQ, HKV, LQ, LK, D, DV = (2,), 4, 2, 37, 70, 24, 20


def _float_mask(rng, *shape, dtype=np.float32):
    mask = rng.standard_normal(shape).astype(dtype)
    mask[rng.random(shape) < 0.3] = -inf
    return mask


def _segments(rng, length):
    return np.sort(rng.integers(0, 5, (*LEAD, length)))


# Each option alone, and some that only mean something together, for arrays of the sizes above.
OPTIONS = {
    "none": lambda rng: {},
    "bool_mask": lambda rng: dict(attn_mask=rng.random((*LEAD, HQ, LQ, LK)) < 0.6),
    "bool_mask_of_keys": lambda rng: dict(attn_mask=rng.random((2, 1, 1, LK)) < 0.6),
    "bool_mask_of_rows": lambda rng: dict(attn_mask=rng.random((LQ, 1)) < 0.6),
    "float_mask": lambda rng: dict(attn_mask=_float_mask(rng, HQ, LQ, LK)),
    "float64_mask": lambda rng: dict(attn_mask=_float_mask(rng, LQ, LK, dtype=np.float64)),
    "float16_mask": lambda rng: dict(attn_mask=_float_mask(rng, LQ, LK, dtype=np.float16)),
    "finfo_min_mask": lambda rng: dict(
        attn_mask=np.where(rng.random((LQ, LK)) < 0.5, 0, np.finfo(np.float32).min)
    ),
    "bias": lambda rng: dict(bias=_float_mask(rng, *LEAD, HQ, LQ, LK)),
    "bias_of_keys": lambda rng: dict(bias=_float_mask(rng, 2, 1, 1, LK)),
    "bias_of_rows": lambda rng: dict(bias=_float_mask(rng, HQ, LQ, 1)),
    "bias_of_heads": lambda rng: dict(bias=rng.standard_normal((HQ, 1, 1)).astype(np.float32)),
    "bias_of_batch": lambda rng: dict(bias=rng.standard_normal((2, 1, LQ, LK))),
    "bias_bfloat16": lambda rng: dict(bias=_float_mask(rng, HQ, 1, LK, dtype=DTYPES["bfloat16"])),
    "bias_float64": lambda rng: dict(bias=_float_mask(rng, LQ, LK, dtype=np.float64)),
    "mask_and_bias": lambda rng: dict(
        attn_mask=_float_mask(rng, LQ, LK), bias=_float_mask(rng, HQ, 1, LK)
    ),
    "causal": lambda rng: dict(is_causal=True),
    "lower_right": lambda rng: dict(is_causal=True, causal_offset="lower_right"),
    "causal_offsets": lambda rng: dict(is_causal=True, causal_offset=[-5, 40]),
    "far_offset": lambda rng: dict(is_causal=True, causal_offset=2**61),
    "window": lambda rng: dict(window_size=(7, 3)),
    "window_left": lambda rng: dict(window_size=(7, None), causal_offset=10),
    "window_right": lambda rng: dict(window_size=(None, 0), causal_offset=[-3, 3]),
    "widest_window": lambda rng: dict(window_size=(2**80, 2**80), causal_offset=-(2**61)),
    "q_lens": lambda rng: dict(q_lens=[LQ, 17]),
    "kv_lens": lambda rng: dict(kv_lens=[33, 0]),
    "all_lens": lambda rng: dict(
        q_lens=[30, 0], kv_lens=[LK, 41], is_causal=True, causal_offset="lower_right"
    ),
    "segments": lambda rng: dict(
        q_segment_ids=_segments(rng, LQ), kv_segment_ids=_segments(rng, LK)
    ),
    "segments_shuffled": lambda rng: dict(
        q_segment_ids=rng.integers(-(2**63), 2**63 - 1, LQ) // 2**62,
        kv_segment_ids=rng.integers(-(2**63), 2**63 - 1, LK) // 2**62,
    ),
    "scale": lambda rng: dict(scale=0.7),
    "scale_negative": lambda rng: dict(scale=-0.4),
    "scale_zero": lambda rng: dict(scale=0.0),
    "scale_tiny": lambda rng: dict(scale=1e-35),
    "softcap": lambda rng: dict(softcap=0.8),
    "softcap_large": lambda rng: dict(softcap=1e6, scale=2.0),
    "alibi": lambda rng: dict(alibi_slopes=rng.standard_normal(HQ).astype(np.float32)),
    "alibi_offsets": lambda rng: dict(
        alibi_slopes=rng.random(HQ) / 8, causal_offset=[33, -4], is_causal=True
    ),
    "sinks": lambda rng: dict(sinks=rng.standard_normal(HQ).astype(np.float32)),
    "sinks_of_dead_rows": lambda rng: dict(
        sinks=rng.standard_normal(HQ), kv_lens=[5, 0], q_lens=[LQ, 9]
    ),
    "sinks_bfloat16": lambda rng: dict(sinks=rng.standard_normal(HQ).astype(DTYPES["bfloat16"])),
    "dropout": lambda rng: dict(dropout_p=0.3, seed=2**64 - 1),
    "dropout_all": lambda rng: dict(dropout_p=1.0, seed=5),
    "dropout_window": lambda rng: dict(dropout_p=0.1, seed=1 << 33, window_size=(9, 9)),
    "everything": lambda rng: dict(
        attn_mask=rng.random((2, 1, LQ, LK)) < 0.9,
        bias=_float_mask(rng, HQ, 1, LK),
        is_causal=True,
        causal_offset=[20, 33],
        window_size=(30, 4),
        q_lens=[LQ, 30],
        kv_lens=[60, LK],
        scale=0.3,
        softcap=5.0,
        dropout_p=0.2,
        seed=7,
        q_segment_ids=np.arange(LQ) // 30,
        kv_segment_ids=np.arange(LK) // 60,
        alibi_slopes=rng.random(HQ).astype(np.float32),
        sinks=rng.standard_normal(HQ),
    ),  # fmt: skip
}


def option_case(rng, dtype, name):
    """A Case with one entry of OPTIONS."""
    options = OPTIONS[name](rng)
    return make_case(
        rng, dtype, lead=LEAD, Hq=HQ, Hkv=HKV, Lq=LQ, Lk=LK, D=D, Dv=DV, **options
    )  # fmt: skip
