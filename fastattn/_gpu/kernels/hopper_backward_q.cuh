// What the two kernels of dQ = scale dS K share: a warpgroup owns 64 query rows, a thread g and
// g + 8 of its warp's 16, and walks over blocks of kBc keys from the first to the last.

constexpr int kGroups = kBr / 64;      // warpgroups that compute,
constexpr int kReaders = 4 * kGroups * kLanes;  // their warps, for barriers,
constexpr int kAdders = kAdds ? kGroups * kLanes : 0;  // and those that bring for them
constexpr int kN = kBc / 8, kO = kD / 8;
constexpr int kBytesQ = tile_bytes(kBr, kD), kBytesO = tile_bytes(kBr, kDv);
constexpr int kBytesK = tile_bytes(kBc, kD), kBytesV = tile_bytes(kBc, kDv);

// kBr rows of a query head, and the blocks of keys that they see.
struct Work {
  int b, h, row0;
  int from, to;              // blocks
  int whole_from, whole_to;  // blocks that no bound cuts

  DEVICE bool cut(int n) const { return n < whole_from || n >= whole_to; }
};

DEVICE Work work_of(const Params& p, i64 index) {
  const Turn turn = turn_of(index, p.tiles, p.batch * p.Hq);
  Work w;
  w.b = (int)turn.head / (int)p.Hq;
  w.h = (int)turn.head % (int)p.Hq;
  w.row0 = ((int)p.tiles - 1 - turn.tile) * kBr;
  const Entry entry = entry_of(p, w.b);
  const int last = min_of(w.row0 + kBr, entry.q_len) - 1;
  const int begin = first_key(entry, w.row0);
  const int end = w.row0 < entry.q_len ? end_of_keys(entry, last) : 0;
  w.from = begin / kBc;
  w.to = end > begin ? (end + kBc - 1) / kBc : w.from;
  w.whole_from = (max_of(last + entry.below, 0) + kBc - 1) / kBc;
  w.whole_to = max_of(min_of(w.row0 + entry.above + 1, entry.kv_len), 0) / kBc;
  return w;
}

// A block of keys, what it asks for (Needs), and whether it is the last.
struct alignas(16) Step { int n, needs, last; };

// The first block from n on that is not empty; Work::to or beyond is none.
DEVICE Step seek(const Params& p, const Work& work, int n) {
  const Found found = first_of(
      n, work.to, [&](int n) { return needs_of(p, work.b, work.h, work.row0 / kBr, n); });
  return {found.n, found.needs, false};
}

// A warp brings what there is for kRows rows from i0 on and a block of keys.
template <int kRows>
DEVICE void bring_added(const Params& p, char* to, const Work& work, int i0, int n) {
  const int j0 = n * kBc;
  if constexpr (has(kSegments)) {
    bring_segments<false, kRows, kBc>(p, to, work.b, i0, j0);
  } else if constexpr (has(kBools)) {
    bring_truths_of_queries<kRows, kBc>(p, to, work.b, work.h, i0, j0);
  } else {
    const Array& array = p.attn_mask.data ? p.attn_mask : p.bias;
    const char* const from = array.at(work.b, work.h) + i0 * array.row + j0 * array.column;
    bring_numbers<Elem, kRows>(to, numbers_pitch(p), array, from, (int)p.Lq - i0, (int)p.Lk - j0);
  }
}

// -inf where a bound or `bits`, if there are any, exclude a pair: thread row i, which is row r of
// the bits, and the keys from j on.
DEVICE void exclude(const Params& p, int b, float (&s)[1][kN][4], int i, int j,
                    const char* bits = nullptr, int r = 0, bool cut = true) {
  const Entry entry = entry_of(p, hidden(b));
  exclude_others(s[0], [&](int half) {
    u32 seen = ~0u;
    if constexpr (kBits)
      if (bits) seen = Bits<kBc>::of_row(bits, r + 8 * half);
    if (cut) seen &= bits_within<kN>(keys_of_row(entry, hidden(i) + 8 * half, j));
    return seen;
  });
}

// What changes scores of a block but by factors and bounds; `added` is what there is for the rows of
// the warp.
DEVICE void apply_added(const Params& p, int b, float (&s)[1][kN][4], RowOf row_of, const Step& step,
                        char* added, int mode) {
  // A branch, or distances would be made before scores are there, and kept in registers.
  if (has(kAlibi) && !p.alibi_slopes) return;
  if constexpr (has(kAlibi) || has(kNumbers))
    apply_options<false>(p, entry_of(p, hidden(b)), s, step.needs, mode, added, step.n * kBc,
                         PlaceOf<false>(), row_of);
}

// A thread's two rows.
struct Rows {
  float lse[2], delta[2];

  DEVICE void load(const Params& p, const Work& work, int i) {
    const i64 row = row_start(p, work.b, work.h) + i;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      lse[half] = ((const float*)p.row_lse)[row + 8 * half];
      delta[half] = ((const float*)p.row_delta)[row + 8 * half];
    }
  }
};

// dq += dS K, a batch of products.
DEVICE void add_product(float (&dq)[kO][4], const u32 (&factor)[kN / 2][4], u64 k) {
  products_fence();
  multiply_registers(dq, factor, k, 1);
  products_commit();
}

// Once all is added up; returns whether something is not finite.
DEVICE bool finish(float (&dq)[kO][4], const Rows& rows) {
#pragma unroll
  for (int half = 0; half < 2; half++)
    if (rows.lse[half] == infinity(float())) {  // no pair takes part, whatever the sums say
#pragma unroll
      for (int n = 0; n < kO; n++) dq[n][2 * half] = dq[n][2 * half + 1] = 0;
    }
  return !all_finite(dq);
}

// A warp's rows to memory, through its own rows of Q's tile.
DEVICE void write_rows(const Params& p, const Work& work, const float (&dq)[kO][4], char* tile,
                       int mode) {
  const int r0 = warp_number() % (4 * kGroups) * 16;
  if (!p.dq.data) return;
  round_to_tile<kBr>(shared_address(tile), dq, mode == kTaint ? 1 : (float)p.scale, r0, 0);
  __syncwarp();
  write_tile<kBr, kO>(tile, p.dq, p.dq.at(work.b, work.h) + (work.row0 + r0) * p.dq.row,
                      (int)p.Lq - work.row0 - r0, (int)p.D, r0, 0, mode);
}
