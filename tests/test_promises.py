"""The contract's promises, one class each; every test would fail if its promise were broken.

Memory (promise 5 and parts of 7) and processes and threads (8) have modules of their own.
"""

import ctypes
import mmap

import numpy as np
import pytest
from helpers import (
    DTYPES,
    OPTIONS,
    Case,
    acc_of,
    all_kernels,
    assert_same_bits,
    bits,
    cpu_kernels,
    inf,
    make_case,
    nan,
    on_gpu,
    option_case,
)

from fastattn.testing import (
    assert_forward,
    excluded_pairs,
    reference_backward,
    reference_forward,
)

# ---------------------------------------------------------------- ways to exclude pairs

# Sizes of (B, Hq, Hkv, Lq, Lk): rows of one block and of several, keys of one tile and of several.
SIZES = {
    "decode": (2, 8, 1, 1, 130), "chunks": (2, 2, 1, 3, 1100), "small": (2, 2, 2, 5, 9),
    "tiles": (1, 2, 1, 139, 150),
}  # fmt: skip


def _segments(length, cuts):
    return np.searchsorted(np.asarray(cuts) * length // 10, np.arange(length), "right")


# name -> options of B, H, Lq, Lk and rng, under which some rows and keys do not see one another.
EXCLUSIONS = {
    "causal": lambda B, H, Lq, Lk, rng: dict(is_causal=True, causal_offset="lower_right"),
    "causal_upper_left": lambda B, H, Lq, Lk, rng: dict(is_causal=True),
    "window": lambda B, H, Lq, Lk, rng: dict(
        window_size=(Lk // 3, Lk // 4), causal_offset=Lk // 3
    ),
    "kv_lens": lambda B, H, Lq, Lk, rng: dict(kv_lens=[Lk // 2 + 1, Lk - 1][:B]),
    "q_lens": lambda B, H, Lq, Lk, rng: dict(q_lens=[Lq // 2, Lq][:B]),
    "segments": lambda B, H, Lq, Lk, rng: dict(
        q_segment_ids=_segments(Lq, [3, 6]), kv_segment_ids=_segments(Lk, [2, 5])
    ),
    "bool_mask": lambda B, H, Lq, Lk, rng: dict(attn_mask=rng.random((B, H, Lq, Lk)) < 0.5),
    "bool_mask_of_keys": lambda B, H, Lq, Lk, rng: dict(attn_mask=np.arange(Lk) % 5 > 1),
    "float_mask": lambda B, H, Lq, Lk, rng: dict(
        attn_mask=np.where(rng.random((Lq, Lk)) < 0.5, np.float32(-inf), np.float32(0.5))
    ),
    "bias": lambda B, H, Lq, Lk, rng: dict(
        bias=np.where(rng.random((H, Lq, Lk)) < 0.5, -inf, rng.standard_normal((H, Lq, Lk)))
    ),
    "all": lambda B, H, Lq, Lk, rng: dict(
        is_causal=True, causal_offset=Lk // 2, kv_lens=Lk - 1, softcap=3.0, dropout_p=0.2, seed=1,
        attn_mask=rng.random((Lq, Lk)) < 0.8, alibi_slopes=rng.random(H), sinks=rng.random(H),
        bias=np.where(rng.random((H, 1, Lk)) < 0.2, -inf, rng.standard_normal((H, 1, Lk))),
    ),
}  # fmt: skip


def exclusion_case(rng, dtype, name, size):
    B, H, Hkv, Lq, Lk = SIZES[size]
    options = EXCLUSIONS[name](B, H, Lq, Lk, rng)
    return make_case(
        rng, dtype, lead=(B,), Hq=H, Hkv=Hkv, Lq=Lq, Lk=Lk, D=20, Dv=12, **options
    )  # fmt: skip


def huge(dtype):
    return {"float16": 6e4, "bfloat16": 3e38, "float32": 3e38, "float64": 1e308}[dtype.name]


def poisoned(x, where, value):
    x = x.copy()
    x[where] = value
    return x


def of_kv_heads(live, Hkv):
    """Pairs of query heads -> pairs of kv heads: live in any query head of the group."""
    *lead, Hq, Lq, Lk = live.shape
    return live.reshape(*lead, Hkv, Hq // Hkv, Lq, Lk).any(axis=-3)


def assert_rows_untouched(results, expected, untouched, names):
    for name in names:
        assert_same_bits(results[name][untouched], expected[name][untouched], name)


# ---------------------------------------------------------------- 1


def ways_to_die(B, H, Lq, Lk):
    """name -> options under which rows 2 and 4 of the last batch entry, or more, are dead."""
    rows = np.isin(np.arange(Lq), [2, 4])[:, None]
    last = np.zeros((B, 1, Lq, 1), bool)
    last[-1, :, [2, 4]] = True
    half = np.arange(Lk) < Lk // 2
    near = abs(np.arange(Lq)[:, None] - np.arange(Lk)) < 5
    return {
        "bool_mask": dict(attn_mask=~last),
        "bool_mask_full": dict(attn_mask=np.broadcast_to(~last, (B, H, Lq, Lk)).copy()),
        "float_mask": dict(attn_mask=np.where(last, np.float32(-inf), np.float32(0))),
        "bias": dict(bias=np.where(np.broadcast_to(last, (B, H, Lq, Lk)), -inf, 0.5)),
        "mask_and_bias": dict(
            attn_mask=~(rows & half), bias=np.where(rows & ~half, -inf, 0.5).astype("f")
        ),
        "overflow_of_additions": dict(
            attn_mask=np.where(rows, np.finfo("d").min, 0.0),
            bias=np.where(rows, np.finfo("d").min, 0.0),
        ),
        "causal": dict(is_causal=True, causal_offset=-5),
        "lower_right": dict(is_causal=True, causal_offset="lower_right", kv_lens=[Lk, 0][-B:]),
        "window_beyond": dict(window_size=(3, 3), causal_offset=Lk + 10),
        "window_before": dict(window_size=(0, 0), causal_offset=-(2**61)),
        "kv_lens": dict(kv_lens=[Lk, 0][-B:]),
        "kv_lens_all": dict(kv_lens=0),
        "q_lens": dict(q_lens=[Lq, 2][-B:]),
        "q_lens_and_sinks": dict(q_lens=[Lq, 2][-B:], sinks=np.ones(H)),
        "empty_segment": dict(
            q_segment_ids=np.where(rows[:, 0], 7, 0), kv_segment_ids=np.zeros(Lk, int)
        ),
        "window_and_mask": dict(window_size=(4, 4), attn_mask=~(rows & near)),
        "mask_and_softcap": dict(attn_mask=~last, softcap=2.0),
        "mask_and_alibi": dict(attn_mask=~last, alibi_slopes=np.ones(H, "f")),
        "mask_and_dropout": dict(attn_mask=~last, dropout_p=0.5, seed=9),
        "mask_and_sinks": dict(attn_mask=~last, sinks=np.ones(H, "f")),
    }


WAYS = list(ways_to_die(2, 2, 6, 8))
DYING = {"small": (2, 2, 2, 6, 9), "tiles": (2, 2, 1, 140, 150)}


def dying_case(rng, dtype, way, size):
    B, H, Hkv, Lq, Lk = DYING[size]
    options = ways_to_die(B, H, Lq, Lk)[way]
    return make_case(rng, dtype, lead=(B,), Hq=H, Hkv=Hkv, Lq=Lq, Lk=Lk, D=9, Dv=7, **options)


class TestDeadRowsAreZero:
    @all_kernels
    @pytest.mark.parametrize("size", DYING)
    @pytest.mark.parametrize("way", WAYS)
    def test_in_out_and_in_every_gradient(self, target, dtype, way, size, rng):
        case = dying_case(rng, dtype, way, size)
        dead = ~case.live().any(axis=-1)
        assert dead[-1, :, [2, 4]].all()
        results = case.run()
        assert (results["out"][dead] == 0).all()
        assert (results["dq"][dead] == 0).all()
        sinks = case.options.get("sinks")
        lse = -inf if sinks is None or "q_lens" in case.options else 1
        assert (results["lse"][dead] == lse).all()
        assert all(np.isfinite(x[x != -inf]).all() for x in results.values())
        unseen = ~of_kv_heads(case.live(), case.k.shape[-3]).any(axis=-2)
        assert (results["dk"][unseen] == 0).all() and (results["dv"][unseen] == 0).all()
        if "bias" in case.options:
            assert case.options["bias"].ndim < 4 or (results["dbias"][dead] == 0).all()

    @all_kernels
    @pytest.mark.parametrize("way", WAYS)
    def test_whatever_they_hold(self, target, dtype, way, rng):
        """q, dout, out and dlse of a dead row are not read, and add nothing to anything."""
        case = dying_case(rng, dtype, way, "tiles")
        excluded = excluded_pairs(case.q.shape, case.k.shape, acc=acc_of(dtype), **case.options)
        dead = np.broadcast_to(excluded, (2, 2, 140, 150)).all(axis=-1)
        out, lse = case.forward()
        expected = case.backward(out, lse)
        unread = dead & (lse == -inf)
        garbage = case.with_(
            q=poisoned(case.q, dead, nan), dout=poisoned(case.dout, unread, inf),
            dlse=poisoned(case.dlse, unread, nan),
        )  # fmt: skip
        assert_same_bits(garbage.forward().out, out)
        assert_same_bits(garbage.forward().lse, lse)
        grads = garbage.backward(poisoned(out, unread, nan), lse)
        for gradient, other in zip(grads, expected):
            assert gradient is other is None or bits(gradient) == bits(other)

    @all_kernels
    def test_a_whole_batch_of_garbage(self, target, dtype, rng):
        case = make_case(rng, dtype, lead=(2,), Lq=20, Lk=30, D=8, kv_lens=0)
        garbage = (np.full_like(x, nan) for x in (case.q, case.k, case.v))
        case = case.with_(**dict(zip("qkv", garbage)))
        results = case.run()
        assert (results.pop("lse") == -inf).all()
        assert all((x == 0).all() for x in results.values())

    @all_kernels
    @pytest.mark.parametrize("zero_axis", ["Lk", "Lq", "D", "Dv"])
    def test_sums_over_nothing(self, target, dtype, zero_axis, rng):
        sizes = dict(Lq=20, Lk=30, D=8, Dv=5) | {zero_axis: 0}
        shape = (2, sizes["Lq"], sizes["Lk"])
        case = make_case(
            rng, dtype, Hq=2, bias=rng.random(shape), sinks=rng.random(2),
            alibi_slopes=rng.random(2), **sizes,
        )  # fmt: skip
        results = case.check()
        if zero_axis in ("Lk", "Lq"):
            results = {name: x for name, x in results.items() if name not in ("lse", "dsinks")}
            assert all((x == 0).all() for x in results.values())
        broadcast = case.with_(bias=np.ones((2, 1, 1))).run()["dbias"]
        assert np.isfinite(broadcast).all() and (zero_axis[0] != "L" or (broadcast == 0).all())

    @all_kernels
    @pytest.mark.parametrize("size", DYING)
    def test_a_row_of_nan_is_not_dead(self, target, dtype, size, rng):
        case = dying_case(rng, dtype, "bool_mask", size)
        q = poisoned(case.q, np.s_[0, :, 3, 0], nan)
        results = case.with_(q=q).check()
        assert np.isnan(results["out"][0, :, 3]).all() and np.isnan(results["lse"][0, :, 3]).all()
        assert np.isnan(results["dq"][0, :, 3]).all()
        assert np.isfinite(results["out"][0, :, 4:]).all()

    @all_kernels
    def test_a_row_masked_by_the_lowest_number_is_not_dead(self, target, dtype, rng):
        """Its scores are equal: the mean of v, and finite gradients."""
        case = make_case(rng, dtype, Lq=20, Lk=200, D=8, Dv=9)
        lowest = np.finfo(acc_of(dtype)).min
        mask = np.where(np.arange(20) == 3, lowest, 0.0)[:, None].astype(acc_of(dtype))
        results = case.with_(attn_mask=mask).check()
        mean = case.v.astype(np.float64).mean(axis=-2)
        error = abs(results["out"][:, 3].astype(np.float64) - mean)
        assert (error < {2: 0.01, 4: 1e-6, 8: 1e-15}[dtype.itemsize]).all()
        assert (results["lse"][:, 3] == lowest).all()


# ---------------------------------------------------------------- 2


class TestExcludedMeansWithoutInfluence:
    @all_kernels
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("name", EXCLUSIONS)
    def test_of_k_and_v(self, target, dtype, name, size, rng):
        """Poison in one key: rows that do not see it keep every bit, the others show it."""
        case = exclusion_case(rng, dtype, name, size)
        live, expected = case.live(), case.run()
        Lk = case.k.shape[-2]
        for j, value in zip((Lk // 2, Lk - 2, Lk - 1), [nan, huge(dtype), inf]):
            sees = live[..., j]
            k = poisoned(case.k, np.s_[..., j, :], value)
            v = poisoned(case.v, np.s_[..., j, 3], value)
            results = case.with_(k=k, v=v).run()
            assert_rows_untouched(results, expected, ~sees, ["out", "lse", "dq"])
            if value is not nan:
                continue
            assert np.isnan(results["lse"][sees]).all()
            # dk, dv: keys that no poisoned row sees keep every bit
            tainted = of_kv_heads(live & sees[..., None], case.k.shape[-3]).any(axis=-2)
            assert_rows_untouched(results, expected, ~tainted, ["dk", "dv"])
            assert np.isnan(results["dv"][tainted]).all()
            results = case.with_(v=v).run()
            assert_same_bits(results["lse"], expected["lse"])
            assert_rows_untouched(results, expected, ~sees, ["out", "dq"])
            assert np.isnan(results["out"][..., 3][sees]).all()
            assert np.isfinite(results["out"][..., :3]).all()

    @all_kernels
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("name", EXCLUSIONS)
    def test_of_q_and_dout(self, target, dtype, name, size, rng):
        """Poison in one row: keys that it does not see keep every bit of dk and dv."""
        case = exclusion_case(rng, dtype, name, size)
        live, expected = case.live(), case.run()
        Lq = case.q.shape[-2]
        for i, value in zip((Lq // 2, Lq - 1), (nan, huge(dtype))):
            at = np.zeros(live.shape[:-1], bool)
            at[..., 0, i] = True  # of one head; its group's other heads see the same keys
            seen = of_kv_heads(live & at[..., None], case.k.shape[-3]).any(axis=-2)
            alive = live.any(axis=-1) & at
            for changed in (
                case.with_(q=poisoned(case.q, at, value)),
                case.with_(dout=poisoned(case.dout, at, value)),
            ):
                results = changed.run()
                assert_rows_untouched(results, expected, ~seen, ["dk", "dv"])
                assert_rows_untouched(results, expected, ~at, ["out", "lse", "dq"])
                assert_rows_untouched(results, expected, at & ~alive, ["out", "dq"])
                if not np.isfinite(value):
                    assert not np.isfinite(results["dq"][alive]).any()
                    assert not np.isfinite(results["dv"][seen]).any()
            nothing = poisoned(case.dlse, at & ~alive & (expected["lse"] == -inf), nan)
            assert_same_bits(case.with_(dlse=nothing).run(), expected)

    @all_kernels
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("name", EXCLUSIONS)
    def test_of_everything_that_nothing_reads(self, target, dtype, name, size, rng):
        """All dead rows and keys at once, each with another poison: nothing changes at all."""
        case = exclusion_case(rng, dtype, name, size)
        live, expected = case.live(), case.run()
        rows, keys = ~live.any(axis=-1), ~of_kv_heads(live, case.k.shape[-3]).any(axis=-2)
        for value in (nan, inf, huge(dtype)):
            garbage = case.with_(
                q=poisoned(case.q, rows, value),
                k=poisoned(case.k, keys, value),
                v=poisoned(case.v, keys, -value),
                dout=poisoned(case.dout, rows & (expected["lse"] == -inf), value),
            )
            assert_same_bits(garbage.run(), expected, str(value))

    @all_kernels
    @pytest.mark.parametrize("name", [n for n in EXCLUSIONS if n not in ("bias", "all")])
    @pytest.mark.parametrize("size", SIZES)
    def test_of_masks_and_biases(self, target, dtype, name, size, rng):
        """Whatever a bias or a float mask holds where something else excludes the pair."""
        case = exclusion_case(rng, dtype, name, size)
        live = case.live()
        added = rng.standard_normal(live.shape).astype(np.float32)
        case = case.with_(bias=added)
        expected = case.run()
        for value in (nan, -inf, 3e38):
            garbage = case.with_(bias=np.where(live, added, np.float32(value)))
            assert_same_bits(garbage.run(), expected, f"bias {value}")
        if "attn_mask" not in case.options:
            case = case.with_(attn_mask=added)
            expected = case.run()
            for value in (nan, -inf, 3e38):
                garbage = case.with_(attn_mask=np.where(live, added, np.float32(value)))
                assert_same_bits(garbage.run(), expected, f"attn_mask {value}")

    @all_kernels
    @pytest.mark.parametrize("other", [nan, inf, 1e30, -inf])
    def test_minus_inf_excludes_whatever_the_other_holds(self, target, dtype, other, rng):
        case = make_case(rng, dtype, Lq=40, Lk=70, D=8)
        off = rng.random((40, 70)) < 0.4
        expected = case.with_(attn_mask=~off).run()
        minus_inf, rest = np.where(off, -inf, 0.0), np.where(off, other, 0.0)
        for masks in (
            dict(attn_mask=minus_inf, bias=rest),
            dict(attn_mask=rest, bias=minus_inf),
            dict(attn_mask=~off, bias=rest),
        ):
            results = case.with_(**masks).run()
            live = case.with_(**masks).live()
            assert (live == ~off).all()
            assert (results.pop("dbias")[off] == 0).all()
            for name in ("out", "lse"):
                np.testing.assert_allclose(
                    results[name].astype(np.float64), expected[name].astype(np.float64),
                    rtol=0, atol={2: 2**-6, 4: 1e-5, 8: 1e-13}[dtype.itemsize],
                )  # fmt: skip

    @all_kernels
    def test_on_the_causal_diagonal(self, target, dtype, rng):
        """NaN in v[5] leaves rows 0 to 4 as they were and shows in rows 5 and up."""
        case = make_case(rng, dtype, Lq=140, Lk=140, D=16, is_causal=True)
        expected = case.forward().out
        for j in (0, 5, 15, 16, 31, 63, 64, 127, 128, 139):
            out = case.with_(v=poisoned(case.v, np.s_[:, j], nan)).forward().out
            assert_same_bits(out[:, :j], expected[:, :j])
            assert np.isnan(out[:, j:]).all()

    @all_kernels
    @pytest.mark.parametrize("power", [-30, -8, 8, 30])
    def test_of_rows_of_other_sizes(self, target, dtype, power, rng):
        """Finite numbers too: a key much larger or smaller than its neighbours."""
        case = make_case(rng, dtype, Lq=70, Lk=70, D=16, is_causal=True)
        expected = case.forward()
        factor = np.asarray(2.0 ** (power if dtype != np.float16 else power / 4), dtype)
        for j in (5, 37):
            for name in ("k", "v"):
                array = getattr(case, name).copy()
                array[:, j] *= factor
                result = case.with_(**{name: array}).forward()
                assert_same_bits(result.out[:, :j], expected.out[:, :j])
                assert_same_bits(result.lse[:, :j], expected.lse[:, :j])
                assert (result.out[:, j] != expected.out[:, j]).any()

    @all_kernels
    def test_of_a_score_of_minus_inf(self, target, dtype, rng):
        """A key whose scores are -inf because of data is excluded: so is its v."""
        case = make_case(rng, dtype, Lq=20, Lk=150, D=1, Dv=8)
        case = case.with_(q=abs(case.q) + np.ones((), dtype))
        for j in (0, 77, 149):
            k = poisoned(case.k, np.s_[:, j], -inf)
            assert not case.with_(k=k).live()[..., j].any()
            clean = case.with_(k=k, v=poisoned(case.v, np.s_[:, j], 0)).run()
            results = case.with_(k=k, v=poisoned(case.v, np.s_[:, j], nan)).run()
            assert_same_bits(results, clean)
            assert np.isfinite(results["out"]).all() and np.isfinite(results["dq"]).all()
            assert (results["dv"][:, j] == 0).all() and (results["dk"][:, j] == 0).all()

    @all_kernels
    def test_of_rows_that_share_a_vector(self, target, dtype, rng):
        """NaN in q of one row, next to rows of another head that are taken with it."""
        case = make_case(rng, dtype, Hq=8, Hkv=1, Lq=3, Lk=40, D=8)
        expected = case.run()
        for h in range(8):
            results = case.with_(q=poisoned(case.q, np.s_[h, 1], nan)).run()
            others = np.ones((8, 3), bool)
            others[h, 1] = False
            assert_rows_untouched(results, expected, others, ["out", "lse", "dq"])
            assert np.isnan(results["out"][h, 1]).all()


# ---------------------------------------------------------------- 3


def check_what_is_finite(case):
    """Compare where results are finite, but for what only the narrower arithmetic overflows."""
    results, acc, dtype = case.run(), acc_of(case.q.dtype), case.q.dtype
    inputs, state = (case.q, case.k, case.v), (results["out"], results["lse"])
    plain = []
    for compute_dtype in (np.float64, acc):
        given = dict(compute_dtype=compute_dtype, **case.options)
        out, lse = reference_forward(*inputs, **given)
        grads = reference_backward(
            case.dout, *inputs, *state, dlse=case.dlse, wrt=case.wrt, **given
        )
        plain.append({"out": out, "lse": lse, **grads._asdict()})
    with np.errstate(all="ignore"):
        for name, x in results.items():
            expected, narrow = (np.isfinite(p[name].astype(x.dtype)) for p in plain)
            agreed = expected == narrow
            assert agreed.mean() > 0.9 or dtype == np.float16, f"{name}: this tests nothing"
            np.testing.assert_array_equal(np.isfinite(x)[agreed], expected[agreed], name)
    return results


class TestNothingIsLaundered:
    """What is not finite in the plain computation is not finite here, and nothing else."""

    @all_kernels
    @pytest.mark.parametrize("name", ["none", "causal", "bool_mask", "softcap", "sinks", "dropout"])
    @pytest.mark.parametrize("argument", ["q", "k", "v", "dout", "dlse"])
    def test_one_element(self, target, dtype, argument, name, rng):
        case = option_case(rng, dtype, name)
        for value in (nan, inf, -inf):
            at = tuple(rng.integers(n) for n in getattr(case, argument).shape)
            changed = case.with_(**{argument: poisoned(getattr(case, argument), at, value)})
            check_what_is_finite(changed)

    @all_kernels
    @pytest.mark.parametrize("value", [nan, inf])
    def test_one_element_of_a_mask(self, target, dtype, value, rng):
        case = option_case(rng, dtype, "float_mask")
        for argument in ("attn_mask", "bias"):
            added = poisoned(np.zeros((37, 70), np.float32), np.s_[11, 60], value)
            results = check_what_is_finite(case.with_(**{argument: added}))
            live = case.with_(**{argument: added}).live()[:, :, 11, 60]
            assert not np.isfinite(results["out"][:, :, 11][live]).any()

    @all_kernels
    @pytest.mark.parametrize("value", [nan, inf])
    @pytest.mark.parametrize("argument", ["sinks", "alibi_slopes"])
    def test_of_one_head(self, target, dtype, argument, value, rng):
        values = poisoned(np.ones(4), 2, value)
        case = option_case(rng, dtype, "causal_offsets").with_(**{argument: values})
        results = check_what_is_finite(case)
        assert np.isfinite(results["out"][:, [0, 1, 3]]).all()

    def test_a_maximum_does_not_lose_nan(self, target, rng):
        """NaN in any one key of a row, wherever the row's largest score is."""
        case = make_case(rng, np.float32, Hq=1, Lq=1, Lk=300, D=4)
        for j in range(300):
            out, lse = case.with_(k=poisoned(case.k, np.s_[:, j], nan)).forward()
            assert np.isnan(out).all() and np.isnan(lse).all(), j

    @all_kernels
    def test_scores_beyond_the_largest_number(self, target, dtype, rng):
        """q . k = inf: inf - inf is NaN in the plain computation."""
        case = make_case(rng, dtype, Lq=20, Lk=150, D=2)
        results = check_what_is_finite(case.with_(k=poisoned(abs(case.k), np.s_[:, 3], inf)))
        assert not np.isfinite(results["out"]).all()

    def test_gradients_of_nan_rows_reach_every_key_they_see(self, target, rng):
        case = make_case(rng, np.float32, Hq=2, Lq=140, Lk=150, D=4, is_causal=True)
        results = check_what_is_finite(case.with_(q=poisoned(case.q, np.s_[:, 70], nan)))
        assert np.isnan(results["dk"][:, :71]).all() and np.isfinite(results["dk"][:, 71:]).all()


# ---------------------------------------------------------------- 4


def large_case(rng, dtype, name="everything", heads=(4, 2), lead=(2,)):
    """Enough work for eight threads, and more than one block of rows and tile of keys."""
    (Hq, Hkv), Lq, Lk = heads, 300, 280
    options = {
        "plain": dict(),
        "causal": dict(is_causal=True),
        "everything": dict(
            bias=np.where(rng.random((Lq, Lk)) < 0.1, -inf, rng.standard_normal((Lq, Lk))),
            attn_mask=rng.random((Hq, 1, Lk)) < 0.9, window_size=(200, 20), softcap=3.0,
            alibi_slopes=rng.random(Hq) / 50, sinks=rng.random(Hq), dropout_p=0.1, seed=4,
        ),
        "bias_of_keys": dict(bias=rng.standard_normal((Hq, 1, Lk)), kv_lens=Lk - 3),
        "bias_of_all": dict(bias=rng.standard_normal(())),
    }[name]  # fmt: skip
    return make_case(rng, dtype, lead=lead, Hq=Hq, Hkv=Hkv, Lq=Lq, Lk=Lk, D=40, Dv=24, **options)


LARGE = ["plain", "causal", "everything", "bias_of_keys", "bias_of_all"]


def layouts(x, rng):
    """name -> an array of the same elements, otherwise laid out in memory."""
    n = x.ndim
    padded = np.full([s + 3 for s in x.shape], 7).astype(x.dtype)
    padded[(slice(1, -2),) * n] = x
    strided = np.full([2 * s for s in x.shape], 7).astype(x.dtype)
    strided[(slice(1, None, 2),) * n] = x
    memory = np.empty(x.nbytes + 1, np.uint8)
    unaligned = memory[1:].view(x.dtype).reshape(x.shape)
    unaligned[...] = x
    flipped = np.flip(np.flip(x).copy())
    swapped = x.copy()
    if n > 2:
        swapped = np.ascontiguousarray(x.swapaxes(-2, -3)).swapaxes(-2, -3)
    transposed = x.copy()
    if n > 1:
        transposed = np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2)
    return {
        "fortran": np.asfortranarray(x), "padded": padded[(slice(1, -2),) * n],
        "strided": strided[(slice(1, None, 2),) * n], "unaligned": unaligned,
        "backwards": flipped, "heads_inside": swapped, "columns_first": transposed,
    }  # fmt: skip


LAYOUTS = list(layouts(np.zeros((1, 1)), None))


class TestTheSameBits:
    @cpu_kernels
    @pytest.mark.parametrize("name", LARGE)
    def test_for_any_number_of_threads(self, isa, dtype, name, rng):
        case = large_case(rng, dtype, name)
        expected = case.run(num_threads=1)
        for num_threads in (2, 3, 5, 8):
            assert_same_bits(case.run(num_threads=num_threads), expected, f"{num_threads} threads")

    @cpu_kernels
    @pytest.mark.parametrize("heads", [(1, 1), (2, 1), (3, 3)], ids=str)
    def test_with_fewer_heads_than_threads(self, isa, dtype, heads, rng):
        """Threads that share the keys of one head add to dk and dv in one order."""
        case = large_case(rng, dtype, "causal", heads=heads, lead=())
        expected = case.run(num_threads=1)
        for num_threads in (2, 3, 4, 5, 8):
            assert_same_bits(case.run(num_threads=num_threads), expected, f"{num_threads} threads")

    @all_kernels
    def test_from_run_to_run(self, target, dtype, rng):
        case = large_case(rng, dtype)
        expected = case.run(num_threads=4)
        for _ in range(10):
            assert_same_bits(case.run(num_threads=4), expected)
        if not on_gpu():  # there, `deterministic=False` may give this up
            nondeterministic = case.backward(
                expected["out"], expected["lse"], deterministic=False, num_threads=3
            )
            assert_same_bits(nondeterministic.dk, expected["dk"])

    @all_kernels
    @pytest.mark.parametrize("shape", [(1, 130), (2, 1100), (5, 9), (150, 300)], ids=str)
    def test_whatever_else_is_in_the_batch(self, target, dtype, shape, rng):
        """Other entries gone, in another order, full of NaN; each has its lengths and offset."""
        Lq, Lk = shape
        case = make_case(rng, dtype, lead=(3,), Hq=4, Hkv=2, Lq=Lq, Lk=Lk, D=20, Dv=12)
        per_entry = dict(
            kv_lens=np.array([Lk, Lk // 2, 3]), q_lens=np.array([Lq, Lq, max(1, Lq - 2)]),
            causal_offset=np.array([0, Lk, Lk // 3]), bias=rng.standard_normal((3, 4, Lq, Lk)),
        )  # fmt: skip
        case = case.with_(is_causal=True, **per_entry)

        def only(entries):
            arrays = (x[entries] for x in (case.q, case.k, case.v, case.dout, case.dlse))
            options = {name: x[entries] for name, x in per_entry.items()}
            return Case(*arrays, options=dict(is_causal=True, **options))

        expected = case.run()
        for entries in ([0], [1], [2], [2, 0, 1], [1, 1, 1, 1, 1]):
            results = only(entries).run()
            for name in expected:
                assert_same_bits(results[name], expected[name][entries], name)
        garbage = case.with_(
            q=poisoned(case.q, 1, nan), k=poisoned(case.k, 1, inf), dout=poisoned(case.dout, 1, nan)
        ).run()
        for name in expected:
            assert_same_bits(garbage[name][::2], expected[name][::2], name)

    @all_kernels
    @pytest.mark.parametrize("shape", [(1, 130), (2, 1100), (37, 70), (150, 300)], ids=str)
    def test_whatever_the_other_heads_are(self, target, dtype, shape, rng):
        """kv heads (and their query heads) alone, fewer, in another order; per-head gradients."""
        Lq, Lk = shape
        case = make_case(
            rng, dtype, lead=(3,), Hq=6, Hkv=3, Lq=Lq, Lk=Lk, D=12, Dv=20, is_causal=True,
            causal_offset=Lk // 2, bias=rng.standard_normal((6, 1, Lk)),
            sinks=rng.standard_normal(6), alibi_slopes=rng.random(6) / 9,
        )  # fmt: skip

        def only(kv_heads):
            q_heads = [2 * h + g for h in kv_heads for g in (0, 1)]
            per_head = {n: case.options[n][q_heads] for n in ("bias", "sinks", "alibi_slopes")}
            return q_heads, Case(
                case.q[:, q_heads], case.k[:, kv_heads], case.v[:, kv_heads],
                case.dout[:, q_heads], case.dlse[:, q_heads], {**case.options, **per_head},
            )  # fmt: skip

        expected = case.run()
        for kv_heads in ([0], [1], [2], [1, 2], [2, 0, 1]):
            q_heads, part = only(kv_heads)
            results = part.run()
            for name in ("out", "lse", "dq"):
                assert_same_bits(results[name], expected[name][:, q_heads], name)
            for name in ("dk", "dv"):
                assert_same_bits(results[name], expected[name][:, kv_heads], name)
            for name in ("dbias", "dsinks", "dalibi_slopes"):
                assert_same_bits(results[name], expected[name][q_heads], name)

    @all_kernels
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("name", ["none", "everything"])
    @pytest.mark.parametrize("size", [(24, 20), (32, 64)], ids=str)
    def test_for_any_layout_in_memory(self, target, dtype, layout, name, size, rng):
        options = {"none": dict, "everything": lambda: OPTIONS["everything"](rng)}[name]()
        case = make_case(
            rng, dtype, lead=(2,), Hq=4, Hkv=2, Lq=37, Lk=70, D=size[0], Dv=size[1], **options
        )
        expected = case.run()
        state = [layouts(expected[key], rng)[layout] for key in ("out", "lse")]

        def laid_out(x):
            return layouts(x, rng)[layout] if isinstance(x, np.ndarray) else x

        moved = Case(
            *map(laid_out, (case.q, case.k, case.v, case.dout, case.dlse)),
            options={key: laid_out(x) for key, x in case.options.items()},
        )
        assert_same_bits(moved.run(), expected)
        assert_same_bits(moved.backward(*state).dk, expected["dk"])

    @all_kernels
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize(
        "size", [(3, 1051, 24, 20), (3, 1050, 96, 176), (1, 1050, 96, 176)], ids=str
    )
    def test_of_few_rows_for_any_layout_in_memory(self, target, dtype, layout, size, rng):
        Lq, Lk, D, Dv = size
        case = make_case(rng, dtype, lead=(2,), Hq=4, Hkv=2, Lq=Lq, Lk=Lk, D=D, Dv=Dv)
        arrays = (layouts(x, rng)[layout] for x in (case.q, case.k, case.v))
        moved = case.with_(**dict(zip("qkv", arrays)))
        expected, results = case.forward(), moved.forward()
        assert_same_bits(results.out, expected.out)
        assert_same_bits(results.lse, expected.lse)

    @all_kernels
    @pytest.mark.parametrize("axis", range(4))
    def test_for_broadcast_arrays(self, target, dtype, axis, rng):
        """Stride 0 along any axis, of any input, is a copy without the copying."""
        case = make_case(rng, dtype, lead=(2,), Lq=37, Lk=65, D=16, Dv=16, is_causal=True)

        def spread(x):
            return np.broadcast_to(np.take(x, [0], axis), x.shape)

        inputs = (case.q, case.k, case.v, case.dout)
        views = Case(*map(spread, inputs), dlse=case.dlse, options=case.options)
        copies = Case(*(spread(x).copy() for x in inputs), dlse=case.dlse, options=case.options)
        assert_same_bits(views.run(), copies.run())

    @all_kernels
    @pytest.mark.parametrize("rest", [0, 1, 8, 16, 31, 32, 64, 127])
    def test_for_broadcast_masks(self, target, dtype, rest, rng):
        Lk = 128 + rest
        case = make_case(rng, dtype, lead=(2,), Lq=20, Lk=Lk, D=8)
        for shape in [(Lk,), (20, 1), (2, 1, 1, Lk), (2, 1, 1, 1), (1, 2, 1, 1)]:
            keep = rng.random(shape) < 0.7
            for mask in (keep, np.where(keep, np.float32(0.3), np.float32(-inf))):
                view = case.with_(attn_mask=mask).run()
                full = np.broadcast_to(mask, (2, 2, 20, Lk)).copy()
                assert_same_bits(view, case.with_(attn_mask=full).run())

    @all_kernels
    def test_whatever_the_lengths_of_the_other_entries(self, target, dtype, rng):
        case = make_case(rng, dtype, lead=(2,), Lq=150, Lk=300, D=16)
        expected = case.with_(kv_lens=[140, 300], q_lens=[100, 150]).run()
        for other in (0, 1, 150, 299):
            results = case.with_(kv_lens=[140, other], q_lens=[100, other // 2]).run()
            for name in expected:
                assert_same_bits(results[name][0], expected[name][0], name)

    def test_for_calls_that_use_the_same_memory(self, target, rng):
        """q is k is v is dout."""
        x = rng.standard_normal((2, 3, 50, 16)).astype(np.float32)
        same = Case(x, x, x, x, options=dict(is_causal=True)).run()
        copies = Case(*(x.copy() for _ in range(4)), options=dict(is_causal=True)).run()
        assert_same_bits(same, copies)


# ---------------------------------------------------------------- 6


class TestAccuracy:
    @all_kernels
    @pytest.mark.parametrize("size", [3.0, 30.0, 300.0])
    def test_of_scores_whose_exponential_overflows(self, target, dtype, size, rng):
        """exp(s) overflows where exp(s - max) does not; lse stays below 1000."""
        case = make_case(rng, dtype, Lq=70, Lk=200, D=4, scale=1.0)
        factor = np.asarray(np.sqrt(size), dtype)
        case = case.with_(q=case.q * factor, k=case.k * factor)
        largest = abs(case.forward().lse).max()
        assert largest > 3 * size
        case.with_(scale=min(1.0, float(900 / largest))).check()

    @all_kernels
    @pytest.mark.parametrize("shift", [-900.0, 900.0, -1e5, 1e5])
    def test_of_large_lse(self, target, dtype, shift, rng):
        """Up to 1000 gradients are as exact as ever; beyond, finite."""
        bias = (rng.standard_normal((50, 70)) + shift).astype(np.float32)
        make_case(rng, dtype, Lq=50, Lk=70, D=8, bias=bias).check()

    @all_kernels
    def test_of_long_rows(self, target, dtype, rng):
        make_case(rng, dtype, Hq=1, Lq=16, Lk=20000, D=8, Dv=5).check()

    @all_kernels
    def test_of_long_rows_of_more_queries(self, target, dtype, rng):
        """Of few, keys may be split."""
        make_case(rng, dtype, Hq=1, Lq=70, Lk=20000, D=8, Dv=5).check()

    @pytest.mark.parametrize(
        "dtype", [np.float16, np.float32, np.float64], ids=lambda x: x.__name__
    )
    def test_of_long_columns(self, target, dtype, rng):
        """Sums over 20000 rows: dk, dv, and a bias of every broadcast kind."""
        for shape in [(1, 8), (1, 1), (20000, 1)]:
            bias = rng.standard_normal(shape).astype(np.float32)
            case = make_case(
                rng, dtype, Hq=1, Lq=20000, Lk=8, D=4, bias=bias, sinks=np.ones(1),
                alibi_slopes=np.full(1, 1e-4), causal_offset=-10000,
            )  # fmt: skip
            case.with_(dout=case.dout + np.ones((), dtype)).check()

    def test_of_sums_over_a_large_batch(self, target, rng):
        bias = rng.standard_normal((1, 8)).astype(np.float32)
        case = make_case(rng, np.float32, lead=(100,), Lq=40, Lk=8, D=4, bias=bias)
        case.with_(dout=case.dout + np.float32(1)).check()

    @all_kernels
    def test_of_equal_scores(self, target, dtype, rng):
        """lse is log Lk, out the mean."""
        case = make_case(rng, dtype, Lq=20, Lk=777, D=8)
        case.with_(q=case.q * 0).check()
        case.with_(k=np.broadcast_to(case.k[:, :1], case.k.shape)).check()

    @all_kernels
    @pytest.mark.parametrize("Lk", [64, 128, 130, 256, 1000])
    def test_of_rows_that_are_equal_but_for_one(self, target, dtype, Lk, rng):
        """A sum of equal terms drifts: every addition rounds the same way."""
        scores = np.repeat(np.log(rng.uniform(0.2, 1, (64, 1))), Lk, axis=1)
        scores[:, 0] = 0
        scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True)) + rng.uniform(-1, 1, (64, 1))
        bias = scores.astype(acc_of(dtype))
        case = make_case(rng, dtype, Hq=1, Lq=64, Lk=Lk, D=1, Dv=8, bias=bias)
        case.with_(q=case.q * 0).check()

    @all_kernels
    @pytest.mark.parametrize("size", [1e4, 0.25, 0.7, 1.0])
    def test_of_rows_partly_masked_by_a_low_number(self, target, dtype, size, rng):
        """Down to the lowest there is, whose product with log2(e) overflows."""
        low = size if size > 1 else size * np.finfo(acc_of(dtype)).max
        mask = np.where(rng.random((40, 150)) < 0.5, 0, -low).astype(acc_of(dtype))
        make_case(rng, dtype, Lq=40, Lk=150, D=8, attn_mask=mask).check()

    @all_kernels
    @pytest.mark.parametrize("j", [0, 130, 299])
    def test_of_one_outlier(self, target, dtype, j, rng):
        """A late maximum rescales all that was summed before."""
        bias = np.zeros((1, 300), np.float32)
        bias[0, j] = 60
        results = make_case(rng, dtype, Lq=40, Lk=300, D=8, bias=bias).check()
        assert np.isfinite(results["out"]).all()

    @all_kernels
    def test_of_rising_scores(self, target, dtype, rng):
        """Every key is a new maximum."""
        bias = np.arange(300, dtype=np.float32) * 0.5
        make_case(rng, dtype, Lq=40, Lk=300, D=8, bias=bias).check()

    @all_kernels
    @pytest.mark.parametrize("softcap", [1e-3, 0.5, 20.0, 1e4])
    def test_of_softcap(self, target, dtype, softcap, rng):
        """From the flat ends of tanh to where it is the identity."""
        case = make_case(rng, dtype, Lq=40, Lk=100, D=8, softcap=softcap, scale=2.0)
        case.check()
        case.with_(q=case.q * np.asarray(0.001, dtype)).check()

    @all_kernels
    def test_of_values_near_the_largest_number(self, target, dtype, rng):
        """p @ v is in range where the sum of exp(s) v is not."""
        case = make_case(rng, dtype, Lq=20, Lk=150, D=8)
        v = (np.abs(rng.standard_normal(case.v.shape)) * 0 + huge(dtype)).astype(dtype)
        out, lse = case.with_(v=v).forward()
        assert np.isfinite(out).all()
        assert_forward(case.q, case.k, v, out, lse)

    @all_kernels
    def test_of_small_values(self, target, dtype, rng):
        case = make_case(rng, dtype, Lq=20, Lk=150, D=8)
        tiny = np.asarray({"float16": 1e-3}.get(dtype.name, 1e-30), dtype)
        case.with_(v=case.v * tiny, dout=case.dout * tiny, dlse=case.dlse * tiny).check()
        case.with_(k=case.k * tiny, q=case.q * tiny).check()

    @pytest.mark.parametrize("D", [16, 64, 128])
    def test_of_columns_of_different_sizes(self, target, D, rng):
        """What is small in a key's row may be what counts, since its factor is large."""
        case = make_case(rng, np.float32, Lq=40, Lk=70, D=D, is_causal=True)
        size = (10.0 ** rng.uniform(-6, 6, D)).astype(np.float32)
        q, k = case.q / size, case.k * size
        assert_forward(q, k, case.v, *case.with_(q=q, k=k).forward(), is_causal=True)

    @pytest.mark.parametrize("spread", [2, 30])
    def test_of_rows_of_different_sizes(self, target, spread, rng):
        """The first row of a causal problem sees one key, the last all of them."""
        case = make_case(rng, np.float32, Lq=70, Lk=70, D=64, is_causal=True)
        v = case.v * (10.0 ** rng.uniform(-spread, spread, (70, 1))).astype(np.float32)
        out, lse = case.with_(v=v).forward()
        assert_forward(case.q, case.k, v, out, lse, is_causal=True)
        for i in (0, 1, 7):
            assert_forward(case.q[:, : i + 1], case.k[:, : i + 1], v[:, : i + 1],
                           out[:, : i + 1], lse[:, : i + 1], is_causal=True)  # fmt: skip

    @all_kernels
    @pytest.mark.parametrize("D", [128, 256])
    def test_of_long_dot_products(self, target, dtype, D, rng):
        """Of numbers with a mean: partial sums grow, and with them what each addition rounds."""
        case = make_case(rng, dtype, Hq=1, Lq=20, Lk=60, D=D, Dv=64)
        case.with_(q=case.q + np.ones((), dtype), k=case.k + np.ones((), dtype)).check()


# ---------------------------------------------------------------- 7


def read_only(x):
    """The array in pages that the machine itself protects: a write ends the process."""
    memory = mmap.mmap(-1, max(x.nbytes, 1))
    copy = np.frombuffer(memory, x.dtype, x.size).reshape(x.shape)
    copy[...] = x
    address, size = ctypes.c_void_p(copy.ctypes.data), ctypes.c_size_t(len(memory))
    assert ctypes.CDLL(None, use_errno=True).mprotect(address, size, mmap.PROT_READ) == 0
    copy.flags.writeable = False
    return copy


class TestInputsAreNeverWritten:
    @all_kernels
    @pytest.mark.parametrize("name", ["none", "everything", "bias", "all_lens", "float_mask"])
    def test_in_read_only_memory(self, target, dtype, name, rng):
        case = option_case(rng, dtype, name)

        def protect(x):
            return read_only(np.asarray(x)) if isinstance(x, (np.ndarray, list)) else x

        arrays = map(protect, (case.q, case.k, case.v, case.dout, case.dlse))
        options = {key: protect(x) for key, x in case.options.items()}
        protected = Case(*arrays, options=options)
        assert_same_bits(protected.run(), case.run())
        protected.backward(*map(read_only, protected.forward()))

    def test_nor_garbage_repaired_in_place(self, target, rng):
        case = option_case(rng, np.float32, "kv_lens")
        v = poisoned(case.v, np.s_[1], nan)
        before = bits(v)
        case.with_(v=v).run()
        assert bits(v) == before


def test_the_exclusions_of_these_tests_exclude(rng):
    """Something, and not everything, or they would test nothing."""
    for name in EXCLUSIONS:
        for size in SIZES:
            case = exclusion_case(rng, DTYPES["float32"], name, size)
            live = case.live()
            assert not live.all() or SIZES[size][3] == 1, (name, size)
            assert live.any(), (name, size)
