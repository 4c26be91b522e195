// Which pairs (i, j) take part, and what is added to their scores: the one place that knows.
//
// Bounds that move along with i (causal, window) or end an axis (lengths) make whole tiles empty or
// full; only tiles that a bound cuts are masked. The options of kGeneral (masks, bias, ALiBi, segments,
// dropout) become a tile of its own in shared memory, which holds what is added to each score.

constexpr int kFar = 1 << 30;               // beyond any axis
constexpr i64 kFarthest = (i64)1 << 61;     // an offset of the device's may be anything

struct Row { int i, h; };  // a query and its head; i = kFar where there is none

// One batch entry: i and j take part if below <= j - i <= above, i < q_len, j < kv_len.
struct Entry {
  int b, below, above, q_len, kv_len;
  i64 offset;
};

DEVICE int clamp_far(i64 x) { return (int)max_of(min_of(x, (i64)kFar), (i64)-kFar); }

DEVICE Entry entry_of(const Params& p, int b) {
  Entry e;
  e.b = b;
  e.offset = p.causal_offsets ? p.causal_offsets[b] : p.causal_offset;
  e.offset = max_of(min_of(e.offset, kFarthest), -kFarthest);
  e.q_len = p.q_lens ? (int)max_of(min_of(p.q_lens[b], p.Lq), (i64)0) : (int)p.Lq;
  e.kv_len = p.kv_lens ? (int)max_of(min_of(p.kv_lens[b], p.Lk), (i64)0) : (int)p.Lk;
  e.below = p.window_left < 0 ? -kFar : clamp_far(e.offset - p.window_left);
  e.above = p.window_right < 0 ? kFar : clamp_far(e.offset + p.window_right);
  return e;
}

// The keys that some row of [first, last] sees, and whether all of them see all of [j, j + count).
DEVICE int first_key(const Entry& e, int first) { return max_of(0, first + e.below); }
DEVICE int end_of_keys(const Entry& e, int last) { return min_of(e.kv_len, last + e.above + 1); }
DEVICE bool all_pairs(const Entry& e, int first, int last, int j, int count) {
  return j >= last + e.below && j + count - 1 <= first + e.above && j + count <= e.kv_len;
}
// The rows that see some key of [first, last].
DEVICE int first_row(const Entry& e, int first) { return max_of(0, first - e.above); }
DEVICE int end_of_rows(const Entry& e, int last) { return min_of(e.q_len, last - e.below + 1); }

DEVICE bool in_bounds(const Entry& e, int i, int j) {
  return j - i >= e.below && j - i <= e.above && j < e.kv_len && i < e.q_len;
}

// ---------------------------------------------------------------- dropout

// Philox4x32-7 (Salmon et al., 2011): word j % 4 of counter (j / 4, i, h, b) belongs to pair (i, j).
struct Words { u32 x[4]; };

DEVICE Words philox(u64 seed, u32 j4, u32 i, u32 h, u32 b) {
  u32 c0 = j4, c1 = i, c2 = h, c3 = b, k0 = (u32)seed, k1 = (u32)(seed >> 32);
#pragma unroll
  for (int round = 0; round < 7; round++) {
    const u32 high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const u32 high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// ---------------------------------------------------------------- tiles of scores

constexpr int kAddedPitch = kBc + 4;

#if kGeneral
// What is added to the scores of a tile of kBr rows and kBc keys from `j0` on, -inf where a pair is
// excluded, and a bit for each pair that dropout keeps. row_at(r) gives a row. These options are read
// here and nowhere else.
template <class RowAt>
DEVICE void fill_added(const Params& p, const Entry& entry, Acc* added, u8* kept, int j0, RowAt row_at) {
  const char* const mask = p.attn_mask.data ? p.attn_mask.at(entry.b, 0) : nullptr;
  const char* const bias = p.bias.data ? p.bias.at(entry.b, 0) : nullptr;
  const char* const q_ids = p.q_segment_ids.data ? p.q_segment_ids.at(entry.b, 0) : nullptr;
  const char* const k_ids = p.kv_segment_ids.data ? p.kv_segment_ids.at(entry.b, 0) : nullptr;
  const u64 seed = p.seed_at ? *(const u64*)p.seed_at : (u64)p.seed;
#pragma unroll 1
  for (int x = threadIdx.x; x < kBr * kBc / 4; x += kThreads) {
    const int r = x / (kBc / 4), c = x % (kBc / 4) * 4;
    const Row row = row_at(r);
    const int i = row.i;
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int j = j0 + c + e;
      Acc sum = 0;
      bool excluded = !in_bounds(entry, i, j);
      if (!excluded) {
        if (p.alibi_slopes) {
          const i64 distance = i + entry.offset - j;
          sum = -((const Acc*)p.alibi_slopes)[row.h] * (Acc)(distance < 0 ? -distance : distance);
        }
        if (mask) {
          const char* at = mask + row.h * p.attn_mask.head + i * p.attn_mask.row + j * p.attn_mask.column;
          if (p.attn_mask_kind == kBool) {
            excluded = !*at;
          } else {
            const Acc number = load_number(at, p.attn_mask.access, p.attn_mask_kind);
            excluded = number == -infinity(Acc());
            sum += number;
          }
        }
        if (bias) {
          const char* at = bias + row.h * p.bias.head + i * p.bias.row + j * p.bias.column;
          const Acc number = load_number(at, p.bias.access, p.bias_kind);
          excluded = excluded || number == -infinity(Acc());
          sum += number;
        }
        if (q_ids)
          excluded = excluded || load<i64>(q_ids + i * p.q_segment_ids.row, p.q_segment_ids.access) !=
                                     load<i64>(k_ids + j * p.kv_segment_ids.row, p.kv_segment_ids.access);
      }
      added[r * kAddedPitch + c + e] = excluded ? -infinity(Acc()) : sum;
    }
    if (p.dropout_threshold) {
      const Words words = philox(seed, (u32)(j0 + c) >> 2, i, row.h, entry.b);
      u32 bits = 0;
#pragma unroll
      for (int e = 0; e < 4; e++) bits |= ((u64)words.x[e] >= (u64)p.dropout_threshold ? 1 : 0) << e;
      kept[x] = bits;
    }
  }
}

// A score in natural units of a product q . k.
DEVICE Acc capped(const Params& p, Acc product) {
  const Acc s = product * (Acc)p.scale;
  return p.softcap == 0 ? s : (Acc)p.softcap * tanh_of(s / (Acc)p.softcap);
}
#endif

// An element's place in its tile: row r, key column c.
struct Place { int r, c; };

template <int M, int N, class Visit>
DEVICE void for_each(Acc (&s)[M][N][4], Visit visit) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) visit(s[m][n][e], m, n, e);
}

// The columns of a warp's blocks, from `begin` to before `end`, that a row of them takes part with.
struct Limits { int begin, end; };

DEVICE Limits keys_of_row(const Entry& e, int i, int j0) {
  if (i >= e.q_len) return {0, 0};
  return {i + e.below - j0, min_of(e.kv_len, i + e.above + 1) - j0};
}
DEVICE Limits rows_of_key(const Entry& e, int j, int i0) {
  if (j >= e.kv_len) return {0, 0};
  return {j - e.above - i0, min_of(e.q_len, j - e.below + 1) - i0};
}

// Products q . k of a warp's blocks become scores, -inf where a pair is excluded: in natural units in
// kGeneral, else in units of 1 / scale. place(m, n, e) says where in the tile an element is,
// limits(m, half) what a row of the blocks may see. `whole` promises that no bound cuts the tile.
template <int M, int N, class PlaceOf, class LimitsOf>
DEVICE void score(const Params& p, Acc (&s)[M][N][4], const Acc* added, bool whole, PlaceOf place,
                  LimitsOf limits) {
  const Acc none = -infinity(Acc());
#if kGeneral
  if (p.softcap == 0) for_each(s, [&](Acc& x, int, int, int) { x *= (Acc)p.scale; });
  else for_each(s, [&](Acc& x, int, int, int) { x = capped(p, x); });
  for_each(s, [&](Acc& x, int m, int n, int e) {
    const Place at = place(m, n, e);
    const Acc more = added[at.r * kAddedPitch + at.c];
    x = more == none ? none : x + more;
  });
#else
  if (whole) return;
  const int t = threadIdx.x & 3;
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const Limits seen = limits(m, half);
      const int begin = seen.begin - 2 * t, end = seen.end - 2 * t;
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 2; e++)
          if (n * 8 + e < begin || n * 8 + e >= end) s[m][n][2 * half + e] = none;
    }
#endif
}

// Whether dropout keeps an element.
DEVICE bool is_kept(const u8* kept, Place at) {
  return kept[at.r * (kBc / 4) + (at.c >> 2)] >> (at.c & 3) & 1;
}
