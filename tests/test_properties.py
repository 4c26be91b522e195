"""Problems drawn at random, the oracle judges: forward and every gradient, on any target.

The draws are fixed, here and everywhere: which problems are tried does not change with a library.
"""

import pytest
from helpers import DTYPES, RUNNABLE_ISAS, assert_same_bits, computing_on, draw_case

# A test of "cpu" takes the ISAs in turn.
cpu_and_gpu = pytest.mark.parametrize("unit", ["cpu", pytest.param("cupy", marks=pytest.mark.gpu)])


def draws(start, count):
    """(seed, dtype, ISA) of so many problems: dtypes in turn, and ISAs in turn for each."""
    dtypes = list(DTYPES)
    for seed in range(start, start + count):
        isa = RUNNABLE_ISAS[seed // len(dtypes) % len(RUNNABLE_ISAS)]
        yield seed, dtypes[seed % len(dtypes)], isa


def check(unit, start, count, **shape):
    for seed, dtype, isa in draws(start, count):
        target = isa if unit == "cpu" else unit
        try:
            with computing_on(target):
                draw_case(seed, dtype, **shape).check()
        except Exception as error:
            raise AssertionError(f"draw_case({seed}, {dtype!r}, **{shape}) on {target}") from error


@cpu_and_gpu
def test_any_problem(unit):
    check(unit, 0, 100)


@pytest.mark.slow
@cpu_and_gpu
def test_any_of_many_problems(unit):
    check(unit, 1000, 1500)


@cpu_and_gpu
@pytest.mark.parametrize("Lk", [127, 129, 270])
@pytest.mark.parametrize("Lq", [95, 97, 129])
def test_any_problem_of_several_tiles(unit, Lq, Lk):
    check(unit, 10000 * Lq + 10 * Lk, 4, lead=(), Hkv=1, group=1, Lq=Lq, Lk=Lk, D=8)


@pytest.mark.parametrize("threads", range(1, 10))
def test_any_problem_on_any_number_of_threads(threads):
    for seed, dtype, isa in draws(100 * threads, 4):
        case = draw_case(seed, dtype, Lq=100, Lk=130, D=64)
        with computing_on(isa):
            assert_same_bits(case.run(num_threads=threads), case.run(num_threads=1))
