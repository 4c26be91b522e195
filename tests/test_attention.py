"""The forward against the oracle: shapes, head sizes, options, `out=`, on every target."""

import itertools

import numpy as np
import pytest
from helpers import (
    DTYPES,
    GPU_TILES,
    KERNELS,
    OPTIONS,
    Case,
    acc_of,
    all_kernels,
    assert_same_bits,
    beside,
    bits,
    call,
    gpu_rows,
    make_case,
    on_gpu,
    option_case,
    shape_id,
)

import fastattn
from fastattn.attention import attention_forward
from fastattn.testing import assert_forward


def check_forward(case):
    out, lse = case.forward()
    assert_forward(case.q, case.k, case.v, out, lse, **case.options)
    return out, lse


# ---------------------------------------------------------------- shapes

SHAPES = [
    dict(Lq=1, Lk=1, D=1),
    dict(Lq=1, Lk=1, D=64),
    dict(Lq=1, Lk=2, D=5),
    dict(Lq=1, Lk=509, D=64),  # decoding
    dict(Lq=1, Lk=1021, D=128, Hq=8, Hkv=1),
    dict(Lq=3, Lk=67, D=40, Hq=8, Hkv=1),  # rows of many heads in one block
    dict(Lq=5, Lk=131, D=16, Hq=16, Hkv=2),
    dict(Lq=43, Lk=33, D=8, Hq=12, Hkv=4),
    dict(Lq=257, Lk=1, D=16),
    dict(Lq=113, Lk=211, D=23),  # primes
    dict(Lq=239, Lk=113, D=31, Dv=37),
    dict(Lq=400, Lk=7, D=16),  # tall, wide and square
    dict(Lq=7, Lk=400, D=16),
    dict(Lq=200, Lk=200, D=16),
    dict(Lq=0, Lk=5, D=4),  # empty axes
    dict(Lq=5, Lk=0, D=4),
    dict(Lq=0, Lk=0, D=4),
    dict(Lq=5, Lk=7, D=0, Dv=4),
    dict(Lq=5, Lk=7, D=4, Dv=0),
    dict(Lq=5, Lk=7, D=0, Dv=0),
    dict(Lq=5, Lk=7, D=4, lead=(0,)),
    dict(Lq=5, Lk=7, D=4, lead=(2, 0, 3)),
    dict(Lq=5, Lk=7, D=4, Hq=0),
    dict(Lq=33, Lk=17, D=8, lead=(3,)),
    dict(Lq=9, Lk=17, D=8, lead=(2, 3), Hq=4, Hkv=2),
    dict(Lq=9, Lk=17, D=8, lead=(2, 1, 3)),
    dict(Lq=5, Lk=6, D=7, lead=(1, 2, 1, 2)),
    dict(Lq=5, Lk=6, D=7, lead=(2, 1, 2, 1, 2)),
]


@all_kernels
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_shape(target, dtype, shape, rng):
    check_forward(make_case(rng, dtype, **shape))


@all_kernels
@pytest.mark.parametrize("shape", [s for s in SHAPES if 0 not in s.values()], ids=shape_id)
def test_shape_under_a_causal_mask(target, dtype, shape, rng):
    """Lower right with Lq > Lk: the first rows see nothing."""
    check_forward(make_case(rng, dtype, is_causal=True, causal_offset="lower_right", **shape))


def tile_edges():
    """(target, dtype, Lq, Lk) beside the edges of the tiles of every row of the kernel table."""
    for row in KERNELS:
        rows = beside(row["lanes"], 2 * row["lanes"], row["Br"])
        keys = beside(row["Bc"], 2 * row["Bc"], row["lanes"])
        for Lq, Lk in [*zip(rows, keys[::-1]), *zip(keys, keys)]:
            yield row["isa"], row["dtype"], Lq, Lk
    edges = beside(*GPU_TILES)
    yield from gpu_rows(*zip(edges, edges[::-1]), *zip(edges, edges))


@pytest.mark.parametrize(("target", "dtype", "Lq", "Lk"), list(tile_edges()), indirect=["target"])
def test_lengths_beside_the_edges_of_tiles(target, dtype, Lq, Lk, rng):
    case = make_case(rng, DTYPES[dtype], Hq=1, Lq=Lq, Lk=Lk, D=8, Dv=9)
    check_forward(case)
    check_forward(case.with_(is_causal=True, causal_offset="lower_right", kv_lens=max(0, Lk - 1)))


@all_kernels
@pytest.mark.parametrize("group", [1, 2, 8])
@pytest.mark.parametrize("Lq", [1, 2, 17, 63, 64, 65])
def test_short_rows_of_groups(target, dtype, group, Lq, rng):
    """Heads that share keys may be taken together: their rows keep their own masks."""
    case = make_case(rng, dtype, Hq=2 * group, Hkv=2, Lq=Lq, Lk=40, D=8)
    check_forward(case)
    check_forward(case.with_(attn_mask=rng.random((2 * group, Lq, 40)) < 0.5))
    check_forward(case.with_(is_causal=True, window_size=(5, 5), causal_offset=3))


# ---------------------------------------------------------------- head sizes


@all_kernels
@pytest.mark.parametrize("Lq", [1, 2, 3, 6, 16, 17, 130])
def test_short_rows_against_long_keys(target, dtype, Lq, rng):
    """Keys in chunks, whose results are merged."""
    for Lk in (1023, 1024, 1025, 1600):
        case = make_case(rng, dtype, Hq=2, Hkv=1, Lq=Lq, Lk=Lk, D=24, Dv=16)
        check_forward(case)
    check_forward(case.with_(scale=-0.2, sinks=np.array([1.0, -2.0])))
    check_forward(case.with_(is_causal=True, causal_offset="lower_right", kv_lens=1500))
    check_forward(case.with_(attn_mask=np.arange(1600) % 700 > 600, dropout_p=0.25, seed=5))


HEAD_SIZES = [0, 1, 3, 8, 16, 40, 64, 80, 96, 128, 192, 256, 300]


def head_sizes():
    """(target, dtype, D, Dv), both sizes equal or not.

    The GPU's kernels are compiled for each, so not every pair comes with every dtype there.
    """
    equal = list(zip(HEAD_SIZES, HEAD_SIZES))
    unequal = list(zip(HEAD_SIZES, HEAD_SIZES[3:] + HEAD_SIZES[:3]))
    for row, sizes in itertools.product(KERNELS, equal + unequal):
        yield row["isa"], row["dtype"], *sizes
    yield from gpu_rows(*equal)
    for dtype, sizes in zip(itertools.cycle(DTYPES), unequal):
        yield pytest.param("cupy", dtype, *sizes, marks=pytest.mark.gpu)


@pytest.mark.parametrize(("target", "dtype", "D", "Dv"), list(head_sizes()), indirect=["target"])
def test_head_size(target, dtype, D, Dv, rng):
    check_forward(make_case(rng, DTYPES[dtype], Hq=1, Lq=19, Lk=37, D=D, Dv=Dv))


def vector_edges():
    """(target, dtype, D) beside a few vectors of every row of the kernel table."""
    for row in KERNELS:
        for D in beside(row["lanes"], 2 * row["lanes"], 4 * row["lanes"]):
            yield row["isa"], row["dtype"], D
    yield from gpu_rows(*((D,) for D in beside(8, 16, 32)))


@pytest.mark.parametrize(("target", "dtype", "D"), list(vector_edges()), indirect=["target"])
def test_head_size_beside_vectors(target, dtype, D, rng):
    check_forward(make_case(rng, DTYPES[dtype], Hq=1, Lq=5, Lk=9, D=D, Dv=D + 1))


@pytest.mark.parametrize(("D", "Dv"), [(1000, 3), (3, 1000), (2049, 515)])
def test_very_large_head_size(target, D, Dv, rng):
    check_forward(make_case(rng, np.float32, Hq=1, Lq=130, Lk=140, D=D, Dv=Dv))


# ---------------------------------------------------------------- options


@all_kernels
@pytest.mark.parametrize("name", OPTIONS)
def test_option(target, dtype, name, rng):
    check_forward(option_case(rng, dtype, name))


@pytest.mark.parametrize("name", OPTIONS)
def test_array_library(xp, name, rng):
    """What another library's arrays give is what NumPy's give, in that library."""
    case = option_case(rng, np.float32, name)
    q, k, v = (xp.asarray(x) for x in (case.q, case.k, case.v))
    options = {
        key: xp.asarray(x) if isinstance(x, np.ndarray) else x for key, x in case.options.items()
    }
    out, lse = attention_forward(q, k, v, **options)
    assert type(out) is type(lse) is xp.ndarray
    out, lse = (x.get() if hasattr(x, "get") else x for x in (out, lse))
    assert_forward(case.q, case.k, case.v, out, lse, **case.options)


def test_lse_is_that_before_dropout(target, rng):
    # The GPU has other kernels for options of single pairs, such as masks and dropout.
    case = option_case(rng, np.float32, "bool_mask" if on_gpu() else "causal")
    assert_same_bits(case.with_(dropout_p=0.5, seed=1).forward().lse, case.forward().lse)


def test_every_bit_of_the_seed_counts(target, rng):
    case = option_case(rng, np.float32, "dropout")
    seeds = [0, *(2**n for n in range(64))]
    outs = {bits(case.with_(seed=seed).forward().out) for seed in seeds}
    assert len(outs) == len(seeds)


# ---------------------------------------------------------------- results


@all_kernels
def test_results_have_the_documented_dtype_and_shape(target, dtype, rng):
    out, lse = make_case(rng, dtype, lead=(2, 3), Hq=4, Hkv=2, Lq=5, Lk=6, D=7, Dv=8).forward()
    assert (out.shape, out.dtype, type(out)) == ((2, 3, 4, 5, 8), dtype, np.ndarray)
    assert (lse.shape, lse.dtype, type(lse)) == ((2, 3, 4, 5), acc_of(dtype), np.ndarray)


ORDERS = [*itertools.permutations(range(4))]


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: "".join(map(str, order)))
def test_out_is_laid_out_as_q(xp, order, rng):
    case = make_case(rng, np.float32, lead=(2,), Lq=5, Lk=6, D=7, Dv=7)
    q = np.ascontiguousarray(case.q.transpose(order)).transpose(np.argsort(order))
    out = case.with_(q=q).forward().out
    assert out.strides == np.empty_like(q).strides == q.strides


class Sub(np.ndarray):
    pass


def test_subclasses_give_plain_arrays(tmp_path, rng):
    case = make_case(rng, np.float32, Lq=5, Lk=6, D=7)
    on_disk = np.memmap(tmp_path / "k", np.float32, "w+", shape=case.k.shape)
    on_disk[:] = case.k
    out, lse = case.with_(q=case.q.view(Sub), k=on_disk).forward()
    assert type(out) is type(lse) is np.ndarray
    assert_same_bits(out, case.forward().out)


def outs(dtype, shape):
    """name -> a function of zeros: places for a result of this dtype and shape."""

    def packed():
        return np.zeros((*shape[:2], 3, *shape[2:]), dtype)[:, :, 1]

    def unaligned():
        buffer = np.zeros(np.prod(shape) * dtype.itemsize + 1, np.uint8)
        return buffer[1:].view(dtype).reshape(shape)

    return {
        "contiguous": np.zeros(shape, dtype),
        "fortran": np.zeros(shape, dtype, order="F"),
        "heads_last": np.zeros((shape[0], shape[2], shape[1], *shape[3:]), dtype).swapaxes(1, 2),
        "slot": packed(),
        "backwards": np.zeros(shape, dtype)[::-1, ::-1, ::-1],
        "every_second": np.zeros([2 * n for n in shape], dtype)[(slice(1, None, 2),) * len(shape)],
        "unaligned": unaligned(),
    }  # fmt: skip


OUT_NAMES = list(outs(np.dtype("f4"), (1, 1, 1, 1)))


@all_kernels
@pytest.mark.parametrize("name", OUT_NAMES)
@pytest.mark.parametrize("with_lse", [False, True])
def test_out(target, dtype, name, with_lse, rng):
    case = option_case(rng, dtype, "causal")
    expected = case.forward()
    out = outs(dtype, expected.out.shape)[name]
    lse = outs(acc_of(dtype), expected.lse.shape)[name] if with_lse else None
    result = case.forward(out=(out, lse) if with_lse else out)
    assert result.out is out
    assert lse is None or result.lse is lse
    assert_same_bits(out, expected.out)
    assert_same_bits(result.lse, expected.lse)


@pytest.mark.parametrize("name", OUT_NAMES)
@pytest.mark.parametrize("dtype", [DTYPES["float16"], DTYPES["bfloat16"]], ids=str)
def test_float32_out_of_16_bit_inputs(target, dtype, name, rng):
    case = option_case(rng, dtype, "causal")
    shape = case.forward().out.shape
    out, lse = case.forward(out=outs(np.dtype(np.float32), shape)[name])
    assert_forward(case.q, case.k, case.v, out, lse, **case.options)
    assert_same_bits(out.astype(dtype), case.forward().out)


def test_out_writes_nothing_beside_its_slot(target, rng):
    case = make_case(rng, np.float32, lead=(2,), Hq=3, Lq=33, Lk=20, D=5, Dv=6)
    packed = np.full((2, 3, 33, 20), 7, np.float32)
    slot = packed[..., 3:15:2]
    case.forward(out=slot)
    assert_same_bits(slot, case.forward().out)
    slot[...] = 7
    assert (packed == 7).all()


def test_out_in_the_packed_buffer_of_the_inputs(target, rng):
    """q, k, v and the result are slots of one array, whose bounds overlap."""
    packed = rng.standard_normal((2, 40, 4, 3, 16)).astype(np.float32)
    q, k, v, slot = packed.transpose(2, 0, 3, 1, 4)
    expected = call(attention_forward, q.copy(), k.copy(), v.copy()).out
    before = packed[:, :, :3].copy()
    call(attention_forward, q, k, v, out=slot)
    assert_same_bits(slot, expected)
    assert_same_bits(packed[:, :, :3], before)


def test_no_query_heads_write_nothing(target):
    """Hq = 0 with keys that have heads: the results are empty, and nothing lies behind them."""
    out, lse = np.full((2, 300, 8), 7, np.float32), np.full((2, 300), 7, np.float32)
    q, k = np.ones((0, 300, 8), np.float32), np.ones((2, 5, 8), np.float32)
    call(attention_forward, q, k, k, out=(out[:0], lse[:0]))
    assert (out == 7).all() and (lse == 7).all()


# ---------------------------------------------------------------- PyTorch's function


@pytest.mark.parametrize("Hkv", [1, 4])
def test_scaled_dot_product_attention_is_the_same_attention(target, Hkv, rng):
    case = make_case(rng, np.float32, lead=(2,), Hq=4, Hkv=Hkv, Lq=9, Lk=12, D=16)
    mask = rng.random((9, 12)) < 0.7
    for args, options in [
        ((), {}),
        ((mask,), dict(attn_mask=mask)),
        ((None, 0.0, True), dict(is_causal=True)),
    ]:
        out = call(fastattn.scaled_dot_product_attention, case.q, case.k, case.v, *args)
        assert_same_bits(out, case.with_(**options).forward().out)


def test_scaled_dot_product_attention_without_a_head_axis(target, rng):
    q, k, v = (rng.standard_normal((n, 8)).astype(np.float32) for n in (5, 7, 7))
    out = call(fastattn.scaled_dot_product_attention, q, k, v)
    assert_same_bits(out, call(attention_forward, q[None], k[None], v[None]).out[0])


def test_5d_inputs_are_as_good_as_4d(target, rng):
    case = make_case(rng, np.float32, lead=(2, 3), Lq=9, Lk=12, D=16)
    flat = Case(*(x.reshape(6, *x.shape[2:]) for x in (case.q, case.k, case.v, case.dout)))
    assert_same_bits(case.forward().out.reshape(6, 2, 9, 16), flat.forward().out)
