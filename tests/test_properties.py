"""Hypothesis draws problems, the oracle judges: forward and every gradient, on any ISA."""

import numpy as np
import pytest
from helpers import DTYPES, RUNNABLE_ISAS, Case, acc_of, assert_same_bits
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fastattn import _cpu
from fastattn.testing import live_pairs, random_problem

# A seed does not shrink to anything simpler.
settings.register_profile(
    "fastattn", derandomize=True, deadline=None, database=None,
    phases=[Phase.explicit, Phase.generate],
)  # fmt: skip
profile = settings.get_profile("fastattn")

seeds = st.integers(0, 2**63 - 1)
dtypes = st.sampled_from(list(DTYPES))
isas = st.sampled_from(RUNNABLE_ISAS)


def draw_case(seed, dtype, **fixed):
    """A Case from a drawn problem: dlse or not, NaN in dout where no pair is live."""
    rng = np.random.default_rng(seed)
    dtype = DTYPES[dtype]
    problem = random_problem(rng, dtype=dtype, **fixed)
    q, k, v, options = (problem[name] for name in ("q", "k", "v", "options"))
    dout = np.asarray(rng.standard_normal((*q.shape[:-1], v.shape[-1]))).astype(dtype)
    dlse = np.asarray(rng.standard_normal(q.shape[:-1])).astype(acc_of(dtype))
    dead = ~live_pairs(q, k, **options).any(axis=-1)
    if options.get("sinks") is None:  # else lse is not -inf, and the row counts for dsinks
        dout[dead] = np.nan
        dlse[dead] = np.inf
    return Case(q, k, v, dout, dlse if rng.random() < 0.5 else None, options)


def run_on(isa, function, *args, **kwargs):
    before = _cpu.use_isa(isa)
    try:
        return function(*args, **kwargs)
    finally:
        _cpu.use_isa(before)


@settings(profile, max_examples=100)
@given(seeds, dtypes, isas)
def test_any_problem(seed, dtype, isa):
    run_on(isa, draw_case(seed, dtype).check)


@pytest.mark.slow
@settings(profile, max_examples=1500)
@given(seeds, dtypes, isas)
def test_any_of_many_problems(seed, dtype, isa):
    run_on(isa, draw_case(seed, dtype).check)


@settings(profile, max_examples=16)
@given(seeds, dtypes, isas, st.sampled_from([95, 97, 129]), st.sampled_from([127, 129, 270]))
def test_any_problem_of_several_tiles(seed, dtype, isa, Lq, Lk):
    sizes = dict(lead=(), Hkv=1, group=1, Lq=Lq, Lk=Lk, D=8)
    run_on(isa, draw_case(seed, dtype, **sizes).check)


@settings(profile, max_examples=30)
@given(seeds, dtypes, isas, st.integers(1, 9))
def test_any_problem_on_any_number_of_threads(seed, dtype, isa, threads):
    case = draw_case(seed, dtype, Lq=100, Lk=130, D=64)
    expected = run_on(isa, case.run, num_threads=1)
    assert_same_bits(run_on(isa, case.run, num_threads=threads), expected)
