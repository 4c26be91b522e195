// The rows of q, dout, k and v as halves in memory, for the float32 backward on Hopper: those of
// all heads one below the other, a head's padded as in gradient.cuh; panels of hi and lo in turn,
// so that a row has as many bytes as kD numbers of float32. Of each row a weight, and behind all
// of them its spread.

enum Split { kSplitQ, kSplitO, kSplitK, kSplitV };

DEVICE i64 split_rows(const Params& p, int which) {
  return which < kSplitK ? p.batch * p.Hq * padded(p.Lq) : p.batch * p.Hkv * padded(p.Lk);
}
DEVICE i64 split_start(const Params& p, int which) {
  i64 rows = 0;
  for (int x = 0; x < which; x++) rows += split_rows(p, x);
  return rows;
}
DEVICE i64 split_total(const Params& p) { return split_start(p, kSplitV + 1); }

// The weights, and spreads, of a head's rows.
struct Numbers {
  const float* weights;
  i64 total;

  DEVICE Numbers(const Params& p, int which, int b, int h)
      : weights(p.weights + split_start(p, which) +
                (which < kSplitK ? (b * p.Hq + h) * padded(p.Lq) : (b * p.Hkv + h) * padded(p.Lk))),
        total(split_total(p)) {}
  // Those of a tile, the spreads kRows behind the weights.
  template <int kRows, bool kSpreads>
  DEVICE void load(const float* to, int row, u32 barrier) const {
    load_bytes(shared_address(to), weights + row, kRows * 4, barrier);
    if (kSpreads)
      load_bytes(shared_address(to + kRows), weights + total + row, kRows * 4, barrier);
  }
};
