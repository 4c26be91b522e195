// What the backward kernels share: a row's numbers, and the gradient of a score.

// Rows of the workspace: per (batch entry, query head) kRowPad-aligned, so that a tile of them can be
// copied without a look at bounds. lse is +inf in rows that have no pair or do not exist.
constexpr int kRowPad = 128;

DEVICE i64 padded(i64 length) { return (length + kRowPad - 1) / kRowPad * kRowPad; }
DEVICE i64 row_start(const Params& p, int b, int h) { return (b * p.Hq + h) * padded(p.Lq); }

// P and dS of a pair, from a score as `score` leaves it, z dP and the row's numbers. kCareful asks
// whether the pair takes part at all; the usual pass need not: P is 0 where it does not, and a product
// with 0 that is not 0 makes the block be done again.
struct Gradient { Acc p, ds; };

template <bool kCareful>
DEVICE Gradient gradient(const Params& p, Acc s, Acc z_dp, Acc lse, Acc delta, int mode) {
  if (kCareful && (s == -infinity(Acc()) || lse == infinity(Acc()))) return {0, 0};
  if (kCareful && mode == kTaint) return {1, 1};
  Acc probable;
  if (kGeneral || sizeof(Tile) > 2) {  // lse log2(e), rounded, would be felt
    const Acc exponent = kGeneral ? s - lse : fma_of(s, (Acc)p.scale, -lse);
    probable = exp_of(exponent);
  } else {
    probable = exp2_of(fma_of(s, (Acc)(p.scale * kLog2e), -lse * (Acc)kLog2e));
  }
  return {probable, probable * (z_dp - delta)};
}
struct Careful { static constexpr bool value = true; };
struct Usual { static constexpr bool value = false; };

#if kGeneral
// d capped / d product, without scale.
DEVICE Acc slope(const Params& p, Acc product) {
  const Acc y = tanh_of(product * (Acc)p.scale / (Acc)p.softcap);
  return 1 - y * y;
}
#endif

// The batch entry that stands for entry `x` of dbias, which may lack some of the leading axes.
DEVICE int batch_of(const Params& p, i64 x) { return (int)(p.own_batches ? p.own_batches[x] : x); }
