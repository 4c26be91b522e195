"""The gradients: against the oracle, against finite differences, and against algebra."""

import itertools

import numpy as np
import pytest
from helpers import (
    DTYPES,
    GPU_TILES,
    GRADIENTS,
    KERNELS,
    OPTIONS,
    Case,
    acc_of,
    all_kernels,
    assert_same_bits,
    beside,
    call,
    gpu_rows,
    make_case,
    on_gpu,
    option_case,
    shape_id,
)
from numpy.testing import assert_allclose

from fastattn import merge_attention_states
from fastattn.testing import assert_gradients, reference_forward

# ---------------------------------------------------------------- against the oracle

SHAPES = [
    dict(Lq=1, Lk=1, D=1),
    dict(Lq=1, Lk=509, D=64, Hq=4, Hkv=1),
    dict(Lq=113, Lk=211, D=23, Dv=19),
    dict(Lq=239, Lk=31, D=8, Dv=40),
    dict(Lq=7, Lk=400, D=16),
    dict(Lq=12, Lk=17, D=300, Dv=256),
    dict(Lq=12, Lk=17, D=80, Dv=96),
    dict(Lq=20, Lk=30, D=16, lead=(2, 3), Hq=4, Hkv=2),
    dict(Lq=20, Lk=30, D=16, Hq=8, Hkv=1),
    dict(Lq=5, Lk=6, D=7, lead=(2, 1, 2, 1, 2)),
    dict(Lq=0, Lk=5, D=4),
    dict(Lq=5, Lk=0, D=4),
    dict(Lq=5, Lk=7, D=0, Dv=4),
    dict(Lq=5, Lk=7, D=4, Dv=0),
    dict(Lq=5, Lk=7, D=4, lead=(2, 0, 3)),
    dict(Lq=5, Lk=7, D=4, Hq=0),
]


@all_kernels
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_shape(target, dtype, shape, rng):
    make_case(rng, dtype, **shape).check()


def tile_edges():
    """(target, dtype, Lq, Lk) beside the edges of the backward's tiles."""
    for row in KERNELS:
        rows = [n + step for n in (row["lanes"], row["Br_backward"]) for step in (-1, 0, 1)]
        keys = [n + step for n in (row["Bc_backward"], row["lanes"]) for step in (-1, 0, 1)]
        for Lq, Lk in zip(rows, keys):
            yield row["isa"], row["dtype"], Lq, Lk
    edges = beside(*GPU_TILES)
    yield from gpu_rows(*zip(edges, edges[::-1]))


@pytest.mark.parametrize(("target", "dtype", "Lq", "Lk"), list(tile_edges()), indirect=["target"])
def test_lengths_beside_the_edges_of_tiles(target, dtype, Lq, Lk, rng):
    case = make_case(rng, DTYPES[dtype], Hq=1, Lq=Lq, Lk=Lk, D=9, Dv=8)
    case.with_(bias=rng.standard_normal((Lq, Lk)).astype(np.float32)).check()
    case.with_(is_causal=True, causal_offset="lower_right", kv_lens=max(0, Lk - 1)).check()


@all_kernels
@pytest.mark.parametrize("name", OPTIONS)
def test_option(target, dtype, name, rng):
    """From the oracle's out and lse, which no forward of ours has touched."""
    case = option_case(rng, dtype, name)
    out, lse = reference_forward(case.q, case.k, case.v, **case.options)
    out, lse = out.astype(dtype), lse.astype(acc_of(dtype))
    assert_gradients(
        case.dout, case.q, case.k, case.v, out, lse, case.backward(out, lse),
        dlse=case.dlse, wrt=case.wrt, **case.options,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [DTYPES["float16"], DTYPES["bfloat16"]], ids=str)
def test_float32_out_of_16_bit_inputs(target, dtype, rng):
    """out may come back as the float32 array that the forward filled."""
    case = option_case(rng, dtype, "causal")
    out = np.empty(case.dout.shape, np.float32)
    _, lse = case.forward(out=out)
    grads = case.backward(out, lse)
    expected = case.backward(*case.forward())
    for name, grad in grads._asdict().items():
        if grad is not None:
            grad, other = (x.astype(np.float64) for x in (grad, getattr(expected, name)))
            assert_allclose(grad, other, atol=0.02 * abs(other).max())


def test_without_dlse_it_is_zero(target, rng):
    case = option_case(rng, np.float32, "causal")
    results = case.forward()
    zeros = case.with_(dlse=np.zeros_like(results.lse)).backward(*results)
    assert_same_bits(case.with_(dlse=None).backward(*results).dq, zeros.dq)


@all_kernels
def test_a_gradient_has_the_dtype_and_shape_of_its_argument(target, dtype, rng):
    case = option_case(rng, dtype, "everything")
    bias = case.options["bias"].astype(np.float16)
    sinks, slopes = (rng.random(4).astype(DTYPES[x]) for x in ("bfloat16", "float64"))
    case = case.with_(bias=bias, sinks=sinks, alibi_slopes=slopes)
    results = case.check()
    like = dict(dq=case.q, dk=case.k, dv=case.v, dbias=bias, dsinks=sinks, dalibi_slopes=slopes)
    for name, argument in like.items():
        assert (results[name].shape, results[name].dtype) == (argument.shape, argument.dtype)
        assert type(results[name]) is np.ndarray


ORDERS = list(itertools.permutations(range(4)))


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: "".join(map(str, order)))
def test_gradients_are_laid_out_as_their_arguments(xp, order, rng):
    case = make_case(rng, np.float32, lead=(2,), Lq=5, Lk=6, D=7, bias=rng.random((2, 2, 5, 6)))

    def laid_out(x):
        return np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))

    bias = laid_out(case.options["bias"])
    case = case.with_(q=laid_out(case.q), k=laid_out(case.k), v=laid_out(case.v), bias=bias)
    results = case.run()
    for name, argument in dict(dq=case.q, dk=case.k, dv=case.v, dbias=bias).items():
        assert results[name].strides == argument.strides


# ---------------------------------------------------------------- finite differences


def loss(case):
    """sum(dout out) + sum(dlse lse) over rows whose lse is not -inf: what is differentiated."""
    out, lse = case.forward()
    finite = np.isfinite(lse)
    return float((case.dout * out).sum() + (case.dlse[finite] * lse[finite]).sum())


def numeric_gradient(case, name, h=1e-3):
    """Central differences of order 4, element by element."""
    base = getattr(case, name, None)
    base = case.options[name] if base is None else base
    gradient = np.zeros(base.shape)
    for at in np.ndindex(base.shape):
        if np.isinf(base[at]):
            continue

        def moved(step, at=at):
            x = base.copy()
            x[at] += step
            return loss(case.with_(**{name: x}))

        near, far = moved(h) - moved(-h), moved(2 * h) - moved(-2 * h)
        gradient[at] = (8 * near - far) / (12 * h)
    return gradient


DIFFERENTIATED = {
    "plain": {},
    "causal": dict(is_causal=True, causal_offset=1),
    "lower_right": dict(is_causal=True, causal_offset="lower_right"),
    "dead_rows": dict(is_causal=True, causal_offset=-2, q_lens=4),
    "window": dict(window_size=(1, 2)),
    "lens": dict(kv_lens=4, q_lens=4),
    "scale": dict(scale=-0.8),
    "softcap": dict(softcap=0.7, scale=1.0),
    "dropout": dict(dropout_p=0.4, seed=3),
    "segments": dict(q_segment_ids=[0, 0, 1, 1, 2], kv_segment_ids=[0, 1, 1, 1, 0, 0]),
    "bool_mask": dict(attn_mask=np.arange(30).reshape(5, 6) % 3 > 0),
    "bias": dict(bias=np.sin(np.arange(60.0)).reshape(2, 5, 6)),
    "bias_of_keys": dict(bias=np.sin(np.arange(6.0))),
    "bias_of_rows": dict(bias=np.sin(np.arange(10.0)).reshape(2, 5, 1)),
    "bias_of_heads": dict(bias=np.sin(np.arange(2.0)).reshape(2, 1, 1)),
    "bias_of_all": dict(bias=np.ones(())),
    "bias_with_inf": dict(bias=np.where(np.arange(30) % 4, 0.5, -np.inf).reshape(5, 6)),
    "sinks": dict(sinks=np.array([0.3, -1.0])),
    "sinks_of_dead_rows": dict(sinks=np.array([0.3, -1.0]), is_causal=True, causal_offset=-2),
    "alibi": dict(alibi_slopes=np.array([0.3, -0.1]), causal_offset=2),
    "everything": dict(
        bias=np.sin(np.arange(30.0)).reshape(5, 6), sinks=np.array([0.3, -1.0]),
        alibi_slopes=np.array([0.3, -0.1]), softcap=2.0, is_causal=True, causal_offset=3,
        dropout_p=0.2, seed=8, kv_lens=5, window_size=(4, 4), scale=0.9,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_finite_differences(target, name, rng):
    """Every gradient of float64, with respect to every element."""
    case = make_case(
        rng, np.float64, Hq=2, Hkv=1, Lq=5, Lk=6, D=3, Dv=4, **DIFFERENTIATED[name]
    )  # fmt: skip
    results = case.run()
    for wrt in case.wrt:
        numeric = numeric_gradient(case, wrt)
        assert_allclose(results[f"d{wrt}"], numeric, rtol=0, atol=1e-9, err_msg=f"d{wrt}")


# ---------------------------------------------------------------- wrt


@all_kernels
def test_what_is_not_asked_for_is_none_and_changes_nothing(target, dtype, rng):
    case = option_case(rng, dtype, "everything")
    results = case.forward()
    expected = case.backward(*results)._asdict()
    subsets = itertools.chain(*(itertools.combinations(case.wrt, n) for n in range(7)))
    for wrt in subsets:
        grads = case.backward(*results, wrt=wrt)._asdict()
        for name in GRADIENTS:
            if name.removeprefix("d") in wrt:
                assert_same_bits(grads[name], expected[name], f"{name} of {wrt}")
            else:
                assert grads[name] is None


def test_wrt_does_not_change_what_the_default_gives(target, rng):
    case = option_case(rng, np.float32, "everything")
    results = case.forward()
    default = case.backward(*results, wrt=("q", "k", "v"))
    assert default.dbias is default.dsinks is default.dalibi_slopes is None
    assert_same_bits(case.backward(*results, wrt="k").dk, default.dk)


# ---------------------------------------------------------------- blocks of keys


def key_block(case, keys):
    """The same queries, with some of the keys only."""
    options = dict(case.options)
    for name in ("attn_mask", "bias"):
        if name in options:
            options[name] = options[name][..., keys]
    if "kv_segment_ids" in options:
        options["kv_segment_ids"] = np.asarray(options["kv_segment_ids"])[..., keys]
    if "causal_offset" in options or "is_causal" in options or "window_size" in options:
        options["causal_offset"] = options.get("causal_offset", 0) - keys.start
    k, v = case.k[..., keys, :], case.v[..., keys, :]
    return Case(case.q, k, v, case.dout, case.dlse, options)


BLOCKED = {
    "plain": lambda rng: {},
    "causal": lambda rng: dict(is_causal=True, causal_offset=15),
    "dead_rows": lambda rng: dict(is_causal=True, causal_offset=-20),
    "window": lambda rng: dict(window_size=(20, 10), causal_offset=7),
    "mask": lambda rng: dict(attn_mask=rng.random((50, 90)) < 0.2),
    "bias": lambda rng: dict(bias=rng.standard_normal((4, 50, 90))),
    "segments": lambda rng: dict(
        q_segment_ids=np.arange(50) // 20, kv_segment_ids=np.arange(90) // 30
    ),
    "alibi": lambda rng: dict(alibi_slopes=rng.random(4), causal_offset=30),
    "softcap": lambda rng: dict(softcap=1.0),
}


@pytest.mark.parametrize("cuts", [(0, 90), (0, 1, 90), (0, 30, 33, 90), (0, 45, 45, 90)], ids=str)
@pytest.mark.parametrize("name", BLOCKED)
def test_blocks_of_keys_share_the_gradients(target, name, cuts, rng):
    """Forward each block, merge, backward each with the merged state: the shares add up."""
    options = BLOCKED[name](rng)
    case = make_case(rng, np.float64, lead=(2,), Hq=4, Hkv=2, Lq=50, Lk=90, D=8, **options)
    whole = case.run()
    blocks = [key_block(case, slice(*ends)) for ends in itertools.pairwise(cuts)]
    state = blocks[0].forward()
    for block in blocks[1:]:
        state = call(merge_attention_states, *state, *block.forward())
    close = dict(rtol=1e-12, atol=1e-13)
    assert_allclose(state.out, whole["out"], **close)
    assert_allclose(state.lse, whole["lse"], **close)
    shares = [block.backward(*state) for block in blocks]
    assert_allclose(sum(share.dq for share in shares), whole["dq"], **close)
    for name, axis in [("dk", -2), ("dv", -2), ("dbias", -1)]:
        if name in whole:
            joined = np.concatenate([getattr(share, name) for share in shares], axis)
            assert_allclose(joined, whole[name], **close)
    if "dalibi_slopes" in whole:
        total = sum(share.dalibi_slopes for share in shares)
        assert_allclose(total, whole["dalibi_slopes"], rtol=1e-11, atol=1e-11)


# ---------------------------------------------------------------- algebra


@pytest.mark.parametrize("name", OPTIONS)
def test_twice_the_dout_gives_twice_the_gradients(target, name, rng):
    """To the last bit: a power of two rounds nothing."""
    case = option_case(rng, np.float64, name)
    results = case.forward()
    once = case.backward(*results)
    twice = case.with_(dout=2 * case.dout, dlse=2 * case.dlse).backward(*results)
    for gradient, doubled in zip(once, twice):
        if gradient is not None:
            with np.errstate(all="ignore"):
                assert_same_bits(doubled, gradient * np.asarray(2, gradient.dtype))


@pytest.mark.parametrize("name", ["causal", "softcap", "dropout", "everything"])
def test_linear_in_dout_and_dlse(target, name, rng):
    case = option_case(rng, np.float64, name)
    results = case.forward()
    other_dout, other_dlse = rng.standard_normal(case.dout.shape), rng.standard_normal((2, 4, 37))
    first = case.backward(*results)
    second = case.with_(dout=other_dout, dlse=other_dlse).backward(*results)
    both = case.with_(
        dout=3 * case.dout - other_dout, dlse=3 * case.dlse - other_dlse
    ).backward(*results)  # fmt: skip
    for a, b, c in zip(first, second, both):
        if a is not None:
            close = 1e-11 if a.dtype == np.float64 else 1e-4
            assert_allclose(c, 3 * a - b, rtol=close, atol=close)


@pytest.mark.parametrize("name", ["none", "causal", "window", "kv_lens", "softcap", "bool_mask"])
def test_the_rows_of_ds_sum_to_dlse(target, name, rng):
    """A shift of all scores of a row moves its lse as much and nothing else."""
    case = option_case(rng, np.float64, name).with_(bias=np.zeros((2, 4, 37, 70)))
    lives = case.live().any(axis=-1)
    assert_allclose(
        case.run()["dbias"].sum(axis=-1), np.where(lives, case.dlse, 0), rtol=0, atol=1e-13
    )


def test_shifting_every_key_moves_nothing(target, rng):
    """sum over j of dk_j = sum over i of dlse_i q_i scale, as every row of ds sums to dlse."""
    case = make_case(rng, np.float64, lead=(2,), Hq=3, Lq=40, Lk=50, D=6, scale=0.3)
    expected = 0.3 * (case.dlse[..., None] * case.q).sum(axis=-2)
    assert_allclose(case.run()["dk"].sum(axis=-2), expected, rtol=0, atol=1e-12)


def test_the_keys_share_dout(target, rng):
    """sum over j of dv_j = sum over i of dout_i, as every row of p sums to one."""
    case = make_case(rng, np.float64, Hq=4, Hkv=2, Lq=40, Lk=50, D=6, is_causal=True)
    expected = case.dout.reshape(2, 2, 40, 6).sum(axis=(1, 2))
    assert_allclose(case.run()["dv"].sum(axis=-2), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "shape",
    [(), (1,), (70,), (37, 1), (37, 70), (4, 1, 1), (4, 37, 1), (4, 1, 70), (1, 1, 37, 70),
     (2, 1, 1, 1), (2, 4, 1, 1), (2, 1, 37, 1), (2, 1, 1, 70), (2, 4, 37, 70), (1, 4, 1, 70)],
    ids=str,
)  # fmt: skip
def test_dbias_of_a_broadcast_bias_is_a_sum(target, shape, rng):
    bias = rng.standard_normal(shape)
    case = option_case(rng, np.float64, "causal_offsets")
    full = case.with_(bias=np.broadcast_to(bias, (2, 4, 37, 70)).copy()).run()["dbias"]
    full = full.sum(axis=tuple(range(4 - len(shape))))
    axes = tuple(axis for axis, n in enumerate(shape) if n == 1)
    expected = full.sum(axis=axes, keepdims=True)
    actual = case.with_(bias=bias).run()["dbias"]
    assert actual.shape == shape
    assert_allclose(actual, expected, rtol=0, atol=1e-12)


def test_a_bias_that_is_itself_a_broadcast_view(target, rng):
    """Its gradient has all its elements, none of them shared."""
    row = rng.standard_normal(70)
    case = option_case(rng, np.float64, "causal")
    full = np.broadcast_to(row, (2, 4, 37, 70))
    assert_same_bits(
        case.with_(bias=full).run()["dbias"], case.with_(bias=full.copy()).run()["dbias"]
    )


@all_kernels
def test_grouped_heads_sum_the_gradients_of_repeated_heads(target, dtype, rng):
    case = make_case(rng, dtype, Hq=6, Hkv=2, Lq=20, Lk=30, D=8)
    repeated = case.with_(k=np.repeat(case.k, 3, axis=0), v=np.repeat(case.v, 3, axis=0))
    results, wide = case.run(), repeated.run()
    if not on_gpu():  # there, kernels may be chosen by the size of a group
        assert_same_bits(results["dq"], wide["dq"])
    rounding = 4 * np.finfo(np.float32).eps if dtype.itemsize > 2 else 2**-6
    for name in ("dq", "dk", "dv"):
        expected = wide[name].astype(np.float64)
        if name != "dq":
            expected = expected.reshape(2, 3, 30, 8).sum(axis=1)
        assert_allclose(results[name].astype(np.float64), expected, atol=rounding * 8, rtol=0)
