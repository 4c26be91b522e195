"""Hypothesis draws problems, the oracle judges: forward and every gradient, on any target."""

import pytest
from helpers import DTYPES, RUNNABLE_ISAS, assert_same_bits, computing_on, draw_case
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

# A seed does not shrink to anything simpler.
settings.register_profile(
    "fastattn", derandomize=True, deadline=None, database=None,
    phases=[Phase.explicit, Phase.generate],
)  # fmt: skip
profile = settings.get_profile("fastattn")

seeds = st.integers(0, 2**63 - 1)
dtypes = st.sampled_from(list(DTYPES))
isas = st.sampled_from(RUNNABLE_ISAS)
# A test of "cpu" draws one of the CPU's ISAs for each problem.
cpu_and_gpu = pytest.mark.parametrize("unit", ["cpu", pytest.param("cupy", marks=pytest.mark.gpu)])


def check(unit, isa, case):
    with computing_on(isa if unit == "cpu" else unit):
        case.check()


@cpu_and_gpu
@settings(profile, max_examples=100)
@given(seed=seeds, dtype=dtypes, isa=isas)
def test_any_problem(unit, seed, dtype, isa):
    check(unit, isa, draw_case(seed, dtype))


@pytest.mark.slow
@cpu_and_gpu
@settings(profile, max_examples=1500)
@given(seed=seeds, dtype=dtypes, isa=isas)
def test_any_of_many_problems(unit, seed, dtype, isa):
    check(unit, isa, draw_case(seed, dtype))


@cpu_and_gpu
@settings(profile, max_examples=16)
@given(
    seed=seeds, dtype=dtypes, isa=isas,
    Lq=st.sampled_from([95, 97, 129]), Lk=st.sampled_from([127, 129, 270]),
)  # fmt: skip
def test_any_problem_of_several_tiles(unit, seed, dtype, isa, Lq, Lk):
    check(unit, isa, draw_case(seed, dtype, lead=(), Hkv=1, group=1, Lq=Lq, Lk=Lk, D=8))


@settings(profile, max_examples=30)
@given(seeds, dtypes, isas, st.integers(1, 9))
def test_any_problem_on_any_number_of_threads(seed, dtype, isa, threads):
    case = draw_case(seed, dtype, Lq=100, Lk=130, D=64)
    with computing_on(isa):
        expected = case.run(num_threads=1)
        assert_same_bits(case.run(num_threads=threads), expected)
