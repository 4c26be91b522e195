// What the backward kernels share: a row's numbers, and the gradient of a score.

// Rows of the workspace: per (batch entry, query head) kRowPad-aligned, so that a tile of them can
// be copied without a look at bounds. lse is +inf in rows that have no pair or do not exist.
constexpr int kRowPad = 128;

DEVICE i64 padded(i64 length) { return (length + kRowPad - 1) / kRowPad * kRowPad; }
DEVICE i64 row_start(const Params& p, int b, int h) { return (b * p.Hq + h) * padded(p.Lq); }

// P and dS of a pair, from its score, z dP and the row's numbers. In kGeneral z_dp has had delta
// taken away, and softcap's slope multiplied. kCareful asks whether the pair takes part at all; the
// usual pass need not: P is 0 where it does not, and a product with 0 that is not 0 makes the block
// be done again.
struct Gradient { Acc p, ds; };

template <bool kCareful>
DEVICE Gradient gradient(const Params& p, Acc s, Acc z_dp, Acc lse, Acc delta, int mode) {
  if (kCareful && (s == -infinity(Acc()) || lse == infinity(Acc()))) return {0, 0};
  if (kCareful && mode == kTaint) return {1, 1};
  Acc probable;
  // Where lse log2(e), rounded, would be felt; and in kernels of which some have numbers added.
  if (sizeof(Elem) > 2 || sizeof(Tile) > 2 || (kGeneral && kArch < 90) || in_natural_units(p)) {
    probable = exp_of(fma_of(s, (Acc)(in_natural_units(p) ? 1.0 : p.scale), -lse));
  } else {
    probable = exp2_of(fma_of(s, (Acc)(p.scale * kLog2e), -lse * (Acc)kLog2e));
  }
  return {probable, probable * (kGeneral ? z_dp : z_dp - delta)};
}
struct Careful { static constexpr bool value = true; };
struct Usual { static constexpr bool value = false; };
struct Rounded { static constexpr bool value = true; };
struct Truncated { static constexpr bool value = false; };

// What comes ahead of apply_options in the backward: products q . k are capped, and dP becomes
// (z dP - delta) d capped / d product, the latter where `slopes` asks for it, without `scale`.
template <int M, int N, class KeptOf, class DeltaOf>
DEVICE void apply_factors(const Params& p, Acc (&s)[M][N][4], Acc (&dp)[M][N][4], bool slopes,
                          const KeptOf& kept, DeltaOf delta) {
  if (asks_dropout(p))
    for_each(dp, [&](Acc& x, int m, int n, int e) { x *= kept(m, n, e) ? (Acc)p.keep_scale : 0; });
  for_each(dp, [&](Acc& x, int m, int n, int e) { x -= delta(m, n, e); });
  if (asks_softcap(p))
    cap(p, s, [&](int m, int n, int e, Acc slope) { dp[m][n][e] *= slopes ? slope : 1; });
}

// The batch entry that stands for entry `x` of dbias, which may lack some of the leading axes.
DEVICE int batch_of(const Params& p, i64 x) { return (int)(p.own_batches ? p.own_batches[x] : x); }
