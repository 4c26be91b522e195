"""The ISAs: the environment's choice, the default, use_isa, and that all compute the same."""

import hashlib

import ml_dtypes
import numpy as np
import pytest
from helpers import (
    DTYPES,
    RUNNABLE_ISAS,
    assert_same_bits,
    assert_targets_agree,
    bits,
    cpu_kernels,
    make_case,
    option_case,
    run_python,
)  # fmt: skip

from fastattn import _cpu

NAMES = [row["name"] for row in _cpu.isa_table()]
MISSING = {row["name"]: row["missing"] for row in _cpu.isa_table() if row["missing"]}


@pytest.fixture
def restored():
    before = _cpu.current_isa()
    yield before
    _cpu.use_isa(before)


def digest():
    """A hash of results in two dtypes, which rounding makes another one on each ISA."""
    hashed = hashlib.sha256()
    for dtype in ("bfloat16", "float32"):
        rng = np.random.default_rng(0)
        results = make_case(rng, DTYPES[dtype], Lq=50, Lk=150, D=40, softcap=2.0).run()
        hashed.update(b"".join(map(bits, results.values())))
    return hashed.hexdigest()


# ---------------------------------------------------------------- tables


def test_isa_table():
    order = ["portable", "avx2", "avx512", "avx512_bf16", "amx"]
    assert NAMES == [name for name in order if name in NAMES]
    for row in _cpu.isa_table():
        assert row.keys() == {"name", "requires", "missing", "slow"}
        assert all(isinstance(text, str) for text in row.values())
    portable = _cpu.isa_table()[0]
    assert portable["name"] == "portable"
    assert portable["missing"] == portable["slow"] == ""


def test_kernel_table_has_every_dtype_of_every_isa():
    rows = _cpu.kernel_table()
    assert [(row["isa"], row["dtype"]) for row in rows] == [
        (isa, dtype) for isa in NAMES for dtype in DTYPES
    ]
    for row in rows:
        native = "f64" if row["dtype"] == "float64" else "f32"
        assert row["arithmetic"] in (native, "bf16" if row["dtype"] == "bfloat16" else native)
        sizes = [row[name] for name in ("lanes", "Br", "Bc", "Br_backward", "Bc_backward")]
        assert all(isinstance(size, int) and size > 0 for size in sizes)
        assert all(size % row["lanes"] == 0 for size in sizes)


# ---------------------------------------------------------------- FASTATTN_CPU_ISA


def test_an_unknown_name_is_refused_and_the_names_are_listed():
    """Not by the import, but by every call."""
    names = ["sse2", "AVX2", "avx2 ", "avx10"]
    code = f"""
        import os
        import numpy as np
        import fastattn
        q = np.zeros((1, 2, 3))
        for name in ["sse2", *{names}]:
            os.environ["FASTATTN_CPU_ISA"] = name
            try:
                fastattn.scaled_dot_product_attention(q, q, q)
            except ValueError as error:
                print(error)
    """
    expected = [
        f"FASTATTN_CPU_ISA is {name!r}; expected one of: {', '.join(NAMES)}"
        for name in ["sse2", *names]
    ]
    assert run_python(code, FASTATTN_CPU_ISA="sse2").splitlines() == expected


@pytest.mark.parametrize("name", RUNNABLE_ISAS)
def test_the_name_given_is_the_isa_that_runs(name, restored):
    """Shown by the bits, which are those of use_isa here, and not those of any other ISA."""
    digests = {}
    for isa in RUNNABLE_ISAS:
        _cpu.use_isa(isa)
        digests[isa] = digest()
    assert len(set(digests.values())) == len(digests)
    code = "import test_isa; print(test_isa._cpu.current_isa(), test_isa.digest())"
    assert run_python(code, FASTATTN_CPU_ISA=name).split() == [name, digests[name]]


def test_the_default_is_the_highest_that_runs_and_is_not_slow():
    run = """
        import os
        if os.environ.get("FASTATTN_CPU_ISA"):
            del os.environ["FASTATTN_CPU_ISA"]
        from fastattn import _cpu
        print(_cpu.current_isa())
    """
    good = [row["name"] for row in _cpu.isa_table() if not row["missing"] and not row["slow"]]
    assert run_python(run).split() == [good[-1]]
    assert run_python(run, FASTATTN_CPU_ISA="").split() == [good[-1]]


def test_the_variable_is_read_once_at_the_first_use():
    run_python("""
        import os
        os.environ["FASTATTN_CPU_ISA"] = "no such name"
        from fastattn import _cpu
        os.environ["FASTATTN_CPU_ISA"] = "portable"
        assert _cpu.current_isa() == "portable"
        os.environ["FASTATTN_CPU_ISA"] = "no such name"
        assert _cpu.current_isa() == "portable"
    """)


@pytest.mark.skipif(not MISSING, reason="every ISA that was built can run on this machine")
def test_an_isa_that_cannot_run_is_refused_and_says_what_is_missing():
    for name, missing in MISSING.items():
        message = f"is {name!r}, which cannot run here: this machine lacks {missing}"
        with pytest.raises(RuntimeError, match=f"^name {message}$"):
            _cpu.use_isa(name)
        code = """
            from fastattn import _cpu
            try:
                _cpu.current_isa()
            except RuntimeError as error:
                print(error)
        """
        assert run_python(code, FASTATTN_CPU_ISA=name).strip() == f"FASTATTN_CPU_ISA {message}"


# ---------------------------------------------------------------- use_isa


def test_use_isa_gives_back_the_one_before(restored):
    last = restored
    for name in [*RUNNABLE_ISAS, *RUNNABLE_ISAS[::-1]]:
        assert _cpu.use_isa(name) == last
        assert _cpu.current_isa() == name
        last = name


@pytest.mark.parametrize("name", ["neon", "", None, 3], ids=repr)
def test_use_isa_refuses_unknown_names(name, restored):
    with pytest.raises(ValueError) as error:
        _cpu.use_isa(name)
    assert str(error.value) == f"name is {name!r}; expected one of: {', '.join(NAMES)}"
    assert _cpu.current_isa() == restored


# ---------------------------------------------------------------- all compute the same


@pytest.mark.parametrize("options", ["none", "lower_right", "sinks_of_dead_rows", "everything"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RUNNABLE_ISAS[1:])
def test_isas_agree(name, dtype, options, rng, restored):
    case = option_case(rng, DTYPES[dtype], options)
    _cpu.use_isa("portable")
    expected = case.run()
    _cpu.use_isa(name)
    assert_targets_agree(case.run(), expected)


@cpu_kernels
@pytest.mark.parametrize("overflow", [False, True])
def test_the_short_way_of_the_backward_leaves_no_trace(isa, dtype, overflow, rng):
    """Tiles with nothing excluded, added or dropped go a shorter way; a dropout of next to nothing
    makes them go the other. A score that overflows to -inf excludes its pair on both."""
    case = make_case(rng, dtype, lead=(2,), Hkv=1, Lq=147, Lk=203, D=70, Dv=33)
    if overflow and dtype != np.float16:
        case.q[..., 5, 3] = -ml_dtypes.finfo(dtype).max
        case.k[..., 3] = 0
        case.k[..., 9, 3] = 4
        case.v[..., 9, 0] = np.inf
    results = case.run()
    expected = case.with_(dropout_p=1e-17, seed=1).run()
    finite = {name: np.isfinite(x.astype("d")) for name, x in results.items()}
    assert finite["dq"][..., 5, :].all()
    for name, x in results.items():
        assert bits(x[finite[name]]) == bits(expected[name][finite[name]]), name
        assert not np.isfinite(expected[name].astype("d"))[~finite[name]].any(), name


@cpu_kernels
@pytest.mark.parametrize("Lk", [1, 7, 31, 33, 150])
def test_any_byte_but_zero_in_a_mask_is_true(isa, dtype, Lk, rng):
    """In whatever strides, and where a row ends in the midst of a word of 32 keys or 8 bytes."""
    keep = rng.random((2, 43, Lk)) < 0.7
    case = make_case(rng, dtype, Lq=43, Lk=Lk, D=5, attn_mask=keep)
    expected = case.check()
    truth = rng.choice(np.array([1, 2, 128, 255], np.uint8), keep.shape)
    spread = np.zeros((2, 43, 3 * Lk), np.uint8)
    spread[..., ::3] = truth * keep
    for mask in (truth * keep, spread[..., ::3], (truth * keep)[..., ::-1].copy()[..., ::-1]):
        assert_same_bits(case.with_(attn_mask=mask.view(bool)).run(), expected)
