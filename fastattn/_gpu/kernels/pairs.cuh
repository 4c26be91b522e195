// Which pairs (i, j) take part, and what is added to their scores: the one place that knows.
//
// Bounds that move along with i (causal, window) or end an axis (lengths) make whole tiles empty or
// full; only tiles that a bound cuts are masked. So do masks and segments, by what survey.cu has
// found in a tile; where a tile is mixed, segment ids are compared, and the numbers of a mask or
// bias come through shared memory. These, ALiBi, softcap and dropout are the options of kGeneral:
// each is a step over a warp's blocks, which is left out where it is not asked for.

constexpr int kFar = 1 << 30;               // beyond any axis
constexpr i64 kFarthest = (i64)1 << 61;     // an offset of the device's may be anything

// The element-wise options. A kernel is compiled with kOptions: none, one of them, or all, of which
// a problem then has some. Masks and biases come as truths or as numbers.
enum Option {
  kSoftcap = 1, kAlibi = 2, kDropout = 4, kBools = 8, kNumbers = 16, kSegments = 32, kAll = 63
};

constexpr bool kGeneral = kOptions != 0;
constexpr bool has(Option option) { return (kOptions & option) != 0; }
DEVICE bool asks_softcap(const Params& p) {
  return has(kSoftcap) && (kOptions != kAll || p.softcap != 0);
}
DEVICE bool asks_alibi(const Params& p) {
  return has(kAlibi) && (kOptions != kAll || p.alibi_slopes);
}
DEVICE bool asks_dropout(const Params& p) {
  return has(kDropout) && (kOptions != kAll || p.dropout_threshold);
}

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

// ---------------------------------------------------------------- dropout

// Philox4x32-7 (Salmon et al., 2011): word j % 4 of counter (j / 4, i, h, b) belongs to pair
// (i, j).
struct Words { u32 x[4]; };
struct Keys { u32 x[7][2]; };  // of its rounds

DEVICE Keys keys_of(u64 seed) {
  Keys keys;
#pragma unroll
  for (int round = 0; round < 7; round++) {
    keys.x[round][0] = hidden((u32)seed + round * 0x9E3779B9u);  // or each call would add anew
    keys.x[round][1] = hidden((u32)(seed >> 32) + round * 0xBB67AE85u);
  }
  return keys;
}
DEVICE Words philox(const Keys& keys, u32 j4, u32 i, u32 h, u32 b) {
  u32 c0 = j4, c1 = i, c2 = h, c3 = b;
#pragma unroll
  for (int round = 0; round < 7; round++) {
    const u64 x = (u64)c0 * 0xD2511F53u, y = (u64)c2 * 0xCD9E8D57u;
    c0 = (u32)(y >> 32) ^ c1 ^ keys.x[round][0];
    c1 = (u32)y;
    c2 = (u32)(x >> 32) ^ c3 ^ keys.x[round][1];
    c3 = (u32)x;
  }
  return {{c0, c1, c2, c3}};
}

// A bit for each element of a lane's blocks, in the order of accumulators: whether it stays.
template <int M, int N>
struct Kept {
  static constexpr int kEach = 8, kWords = (M * N + kEach - 1) / kEach;  // blocks of a word
  u32 x[kWords];
  DEVICE bool operator()(int m, int n, int e) const {
    return x[(m * N + n) / kEach] >> ((m * N + n) % kEach * 4 + e) & 1;
  }
};

// A call of Philox makes the words of four neighbouring keys. Lanes that share them take a call
// each and exchange what came of it: two lanes where keys are the columns of blocks, of which one
// makes row g, the other row g + 8; four lanes where keys are the rows. row_of(r) is the query of
// tile row r.
template <bool kKeysAreRows, int M, int N, class PlaceOf, class RowOf>
DEVICE Kept<M, N> draw(const Params& p, int b, int j0, PlaceOf place, RowOf row_of) {
  using Bits = Kept<M, N>;
  const int lane = threadIdx.x & 31;
  const Keys keys = keys_of(p.seed_at ? *(const u64*)p.seed_at : (u64)p.seed);
  const u32 kept_carry = (u32)-p.dropout_threshold;  // a word carries over it where it is kept
  const int own = kKeysAreRows ? lane >> 2 & 3 : lane & 1;  // which of the calls
  Row rows[kKeysAreRows ? N : M];
#pragma unroll
  for (int x = 0; x < (kKeysAreRows ? N : M); x++)
    rows[x] = row_of(kKeysAreRows ? place(0, x, 0).r + (own & 1) : place(x, 0, 0).r + own * 8);
  Bits kept;
#pragma unroll
  for (int w = 0; w < Bits::kWords; w++) {
    u32 drawn = 0;
#pragma unroll
    for (int y = 0; y < Bits::kEach; y++) {
      const int m = (w * Bits::kEach + y) / N, n = (w * Bits::kEach + y) % N;
      if (m >= M) break;
      const Row row = rows[kKeysAreRows ? n : m];
      const int j = j0 + place(m, n, 0).c + (kKeysAreRows ? (own >> 1) * 8 : 0);
      const Words words = philox(keys, (u32)j >> 2, row.i, row.h, b);
      u32 bits = 0;
#pragma unroll
      for (int e = 3; e >= 0; e--)
        asm("{ .reg .u32 x; add.cc.u32 x, %1, %2; addc.u32 %0, %0, %0; }"
            : "+r"(bits) : "r"(words.x[e]), "r"(kept_carry));
      drawn |= bits << y * 4;
    }
    if (kKeysAreRows) {
      u32 all = 0;
#pragma unroll
      for (int e = 0; e < 4; e++)
        all |= (__shfl_sync(~0u, drawn, (lane & ~12) | e * 4) >> (lane >> 2 & 3) & 0x11111111) << e;
      kept.x[w] = all;
    } else {
      const u32 others = __shfl_xor_sync(~0u, drawn, 1);
      const u32 upper = (own ? others >> 2 : drawn) & 0x33333333;
      kept.x[w] = upper | ((own ? drawn >> 2 : others) & 0x33333333) << 2;
    }
  }
  return kept;
}

// ---------------------------------------------------------------- tiles of scores

// What a tile of scores asks for beyond its bounds.
enum Needs { kAddBools = 1, kAddNumbers = 2, kCompareIds = 4, kEmpty = 8 };

DEVICE bool asks_bools(int needs) { return has(kBools) && needs & kAddBools; }
DEVICE bool asks_numbers(int needs) { return has(kNumbers) && needs & kAddNumbers; }
DEVICE bool asks_ids(int needs) { return has(kSegments) && needs & kCompareIds; }

DEVICE int needs_of(const Params& p, int b, int h, int row_tile, int key_tile) {
  int needs = 0;
  if (has(kBools) && p.bools) needs |= kAddBools;
  if (has(kNumbers) && p.numbers_size) needs |= kAddNumbers;
  // All that there is, or what survey.cu has found.
  if ((has(kBools) || has(kNumbers)) && p.tile_needs)
    needs = ((const u8*)p.tile_needs)[b * p.needs_batch + h * p.needs_head +
                                      row_tile * p.needs_row + key_tile * p.needs_key];
  if (has(kSegments) && p.q_segment_ids.data) {
    if (p.row_ids) {
      const i64* const row = (const i64*)p.row_ids + 2 * (b * p.row_tiles + row_tile);
      const i64* const key = (const i64*)p.key_ids + 2 * (b * p.column_tiles + key_tile);
      const i64 low = row[0], high = row[1], key_low = key[0], key_high = key[1];
      if (high < key_low || key_high < low) needs |= kEmpty;
      else if (low != high || key_low != key_high || low != key_low) needs |= kCompareIds;
    } else {
      needs |= kCompareIds;
    }
  }
  return needs;
}

// Tiles of a mask and bias in shared memory: truths as they are, then numbers, of 16 bits as they
// are, else Acc. A tile has a single row where all its rows are alike.
DEVICE int bools_pitch(const Params& p) { return p.bools_one_row ? 0 : kBc + 16; }
DEVICE int numbers_pitch(const Params& p) {
  return p.numbers_one_row ? 0 : (kBc + 8) * (int)p.numbers_size;
}
DEVICE char* numbers_at(const Params& p, char* added) {
  return added + (has(kBools) && p.bools ? (p.bools_one_row ? 1 : kBr) * (kBc + 16) : 0);
}

// A tile of an array as it is, `from` being its first element, of which rows x columns exist.
template <int kSize, int kRows = kBr, int kBy = kThreads, int kChunk = 16, int kColumns = kBc>
DEVICE void copy_tile(char* to, int pitch, const char* from, i64 stride, int rows, int columns) {
  constexpr int kChunks = kColumns * kSize / kChunk;
  const int count = pitch ? kRows : 1;
#pragma unroll 2
  for (int x = thread_of<kBy>(); x < count * kChunks; x += kBy) {
    const int r = x / kChunks, c = x % kChunks * kChunk;
    const bool valid = r < rows && c / kSize < columns;
    if constexpr (kChunk == 16) copy_16_bytes(to + r * pitch + c, from + r * stride + c, valid);
    else copy_4_bytes(to + r * pitch + c, from + r * stride + c, valid);
  }
}

// Eight neighbouring numbers of a mask or bias, of which `count` exist, are added to x; -inf and
// False make it -inf whatever else is added.
DEVICE void add_eight(Acc (&x)[8], const Array& array, i64 kind, const char* at, int count) {
  const Acc none = -infinity(Acc());
  Acc y[8] = {};
  if (count >= 8 && array.access == kVectors && kind != kF64) {
    struct alignas(8) Bytes { u8 x[8]; };
    struct alignas(16) Halves { u16 x[8]; };
    struct alignas(16) Floats { float x[4]; };
    if (kind == kBool) {
      const Bytes from = *(const Bytes*)at;
#pragma unroll
      for (int e = 0; e < 8; e++) y[e] = from.x[e] ? 0 : none;
    } else if (kind == kF32) {
#pragma unroll
      for (int e = 0; e < 8; e++) y[e] = ((const Floats*)at)[e / 4].x[e % 4];
    } else {
      const Halves from = *(const Halves*)at;
#pragma unroll
      for (int e = 0; e < 8; e++)
        y[e] = kind == kF16 ? (Acc)widen(f16{from.x[e]}) : (Acc)widen(bf16{from.x[e]});
    }
  } else {
#pragma unroll
    for (int e = 0; e < 8; e++) {
      if (e >= count) break;
      const char* const from = at + e * array.column;
      y[e] = kind == kBool ? (*from ? 0 : none) : load_number(from, array.access, kind);
    }
  }
#pragma unroll
  for (int e = 0; e < 8; e++) x[e] = y[e] == none || x[e] == none ? none : x[e] + y[e];
}

// Bring the tiles of a mask and bias for a tile of scores to shared memory, as far as it asks for
// them. Its first row is row0 of head h, its first key j0; row_of(r) is its row r.
template <class RowOf>
DEVICE void load_added(const Params& p, int needs, char* added, int b, int h, int row0, int j0,
                       RowOf row_of) {
  const int rows = (int)p.Lq - row0, columns = (int)p.Lk - j0;
  if (asks_bools(needs)) {
    const Array& array = p.attn_mask;
    copy_tile<1>(added, bools_pitch(p), array.at(b, h) + row0 * array.row + j0, array.row, rows,
                 columns);
  }
  if (!asks_numbers(needs)) return;
  char* const to = numbers_at(p, added);
  const int pitch = numbers_pitch(p);
  if (kOptions == kNumbers || p.numbers_copied) {
    const Array& array = p.attn_mask.data && !p.bools ? p.attn_mask : p.bias;
    const char* const from = array.at(b, h) + row0 * array.row + j0 * array.column;
    if (kOptions == kNumbers) copy_tile<sizeof(Elem)>(to, pitch, from, array.row, rows, columns);
    else if (p.numbers_size == 2) copy_tile<2>(to, pitch, from, array.row, rows, columns);
    else copy_tile<sizeof(Acc)>(to, pitch, from, array.row, rows, columns);
  } else {
#pragma unroll 1
    for (int x = threadIdx.x; x < (pitch ? kBr : 1) * kBc / 8; x += kThreads) {
      const int r = x / (kBc / 8), c = x % (kBc / 8) * 8;
      const Row row = row_of(r);
      Acc sum[8] = {};
#pragma unroll 1
      for (int k = p.bools ? 1 : 0; k < 2; k++) {
        const Array& of = k ? p.bias : p.attn_mask;
        if (of.data && row.i < p.Lq)
          add_eight(sum, of, k ? p.bias_kind : p.attn_mask_kind,
                    of.at(b, row.h) + row.i * of.row + (j0 + c) * of.column, columns - c);
      }
#pragma unroll
      for (int e = 0; e < 8; e++) ((Acc*)(to + r * pitch))[c + e] = sum[e];
    }
  }
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

// Scores outside of their row's limits become -inf.
template <int M, int N, class LimitsOf>
DEVICE void keep_within(Acc (&s)[M][N][4], LimitsOf limits) {
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
          if (n * 8 + e < begin || n * 8 + e >= end) s[m][n][2 * half + e] = -infinity(Acc());
    }
}

// Scores are in natural units where something is added to them, else in units of 1 / scale.
DEVICE bool in_natural_units(const Params& p) {
  return kOptions == kSoftcap || kOptions == kAlibi || kOptions == kNumbers ||
      (kOptions == kAll && p.natural);
}

// |i + offset - j| of each element is told to visit(x, m, n, e, distance).
template <bool kKeysAreRows, int M, int N, class PlaceOf, class RowOf, class Visit>
DEVICE void with_distances(const Entry& entry, Acc (&s)[M][N][4], int j0, PlaceOf place,
                           RowOf row_of, Visit visit) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const Place at = place(m, 0, 2 * half);
      const Acc start = (Acc)(row_of(at.r).i + entry.offset - (j0 + at.c));
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; e++) {
          const Acc step = (Acc)(n * 8 + (e & 1));
          visit(s[m][n][e], m, n, e, abs_of(kKeysAreRows ? start + step : start - step));
        }
    }
}

// combine(x, y) of each element and what a tile of a mask or bias holds for it.
template <bool kKeysAreRows, class T, int M, int N, class PlaceOf, class Combine>
DEVICE void with_added(Acc (&s)[M][N][4], const char* added, int pitch, PlaceOf place,
                       Combine combine) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const Place at = place(m, n, 2 * half);
        const T* const from = (const T*)(added + at.r * pitch) + at.c;
        Acc& x = s[m][n][2 * half];
        Acc& y = s[m][n][2 * half + 1];
        if constexpr (kKeysAreRows) {
          combine(x, *from);
          combine(y, *(const T*)((const char*)from + pitch));
        } else if constexpr (sizeof(T) == 1) {  // truths, tested where they lie
          const u32 both = *(const u16*)from;
          combine(x, both & 0xff);
          combine(y, both & 0xff00);
        } else {
          struct alignas(2 * sizeof(T)) Pair { T x[2]; };
          const Pair both = *(const Pair*)from;
          combine(x, both.x[0]);
          combine(y, both.x[1]);
        }
      }
}

// Numbers of a mask or bias are added to scores, which are still to be multiplied by `factor`. -inf
// excludes a pair whatever its score is; in the usual mode, scores that are not finite show in the
// result, and the block is done again.
template <bool kKeysAreRows, class T, int M, int N, class PlaceOf>
DEVICE void add_numbers(Acc (&s)[M][N][4], Acc factor, const char* numbers, int pitch, int mode,
                        PlaceOf place) {
  with_added<kKeysAreRows, T>(s, numbers, pitch, place,
                              [&](Acc& x, T y) { x = fma_of(x, factor, (Acc)widen(y)); });
  if (mode == kUsual) return;
  const Acc none = -infinity(Acc());
  with_added<kKeysAreRows, T>(s, numbers, pitch, place,
                              [&](Acc& x, T y) { x = (Acc)widen(y) == none ? none : x; });
}

// Softcap, cap tanh(s / cap) of products q . k, whose derivative without `scale` is told to
// visit(m, n, e, slope). tanh(y) = y + y t; where no y of the warp is large, t is a short
// polynomial.
constexpr float kSmall = 0.6f;

template <int M, int N, class Visit>
DEVICE void cap(const Params& p, Acc (&s)[M][N][4], Visit visit) {
  const Acc inner = (Acc)p.cap_scale, outer = (Acc)p.softcap, scale = (Acc)p.scale;
  if constexpr (sizeof(Acc) == 4) {
    Acc most[4] = {};
    for_each(s, [&](Acc& x, int, int, int e) { most[e] = max_of(most[e], abs_of(x)); });
    const Acc high = max_of(max_of(most[0], most[1]), max_of(most[2], most[3])) * abs_of(inner);
    auto small = [&](Acc& x, int m, int n, int e) {
      const Acc y = x * inner, t = tanh_rest(y), natural = x * scale;
      const Acc z = fma_of(y, t, y);
      visit(m, n, e, fma_of(-z, z, 1));
      return fma_of(natural, t, natural);
    };
    if (!__any_sync(~0u, high > kSmall)) {
      for_each(s, [&](Acc& x, int m, int n, int e) { x = small(x, m, n, e); });
      return;
    }
    for_each(s, [&](Acc& x, int m, int n, int e) {
      if (abs_of(x * inner) > kSmall) {
        const Acc y = tanh_of(x * inner);
        visit(m, n, e, fma_of(-y, y, 1));
        x = outer * y;
      } else {
        x = small(x, m, n, e);
      }
    });
  } else {
    for_each(s, [&](Acc& x, int m, int n, int e) {
      const Acc y = tanh_of(x * inner);
      visit(m, n, e, fma_of(-y, y, 1));
      x = outer * y;
    });
  }
}

// Products q . k, capped where that is asked for, become scores by all other options but bounds.
template <bool kKeysAreRows, int M, int N, class PlaceOf, class RowOf>
DEVICE void apply_options(const Params& p, const Entry& entry, Acc (&s)[M][N][4], int needs,
                          int mode, char* added, int j0, PlaceOf place, RowOf row_of) {
  const Acc none = -infinity(Acc());
  Acc factor = (Acc)(in_natural_units(p) && !asks_softcap(p) ? p.scale : 1);  // still to come
  if (asks_alibi(p)) {
    Acc slopes[M][2];
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        slopes[m][half] = -((const Acc*)p.alibi_slopes)[row_of(place(m, 0, 2 * half).r).h];
    with_distances<kKeysAreRows>(entry, s, j0, place, row_of,
                                 [&](Acc& x, int m, int, int e, Acc distance) {
                                   x = fma_of(x, factor, slopes[m][e >> 1] * distance);
                                 });
    factor = 1;
  }
  if (asks_numbers(needs)) {
    char* const numbers = numbers_at(p, added);
    const int pitch = numbers_pitch(p);
    if constexpr (kOptions == kNumbers) {
      add_numbers<kKeysAreRows, Elem>(s, factor, numbers, pitch, mode, place);
    } else {
      if (p.numbers_size > 2)
        add_numbers<kKeysAreRows, Acc>(s, factor, numbers, pitch, mode, place);
      else if (p.numbers_kind == kF16)
        add_numbers<kKeysAreRows, f16>(s, factor, numbers, pitch, mode, place);
      else add_numbers<kKeysAreRows, bf16>(s, factor, numbers, pitch, mode, place);
    }
    factor = 1;
  }
  if (factor != 1) for_each(s, [&](Acc& x, int, int, int) { x *= factor; });
  if (asks_bools(needs))
    with_added<kKeysAreRows, u8>(s, added, bools_pitch(p), place,
                                 [&](Acc& x, u32 y) { x = y ? x : none; });
  if (asks_ids(needs)) {
    auto id = [&](const Array& of, int at, i64 end) {
      return load<i64>(of.at(entry.b, 0) + min_of((i64)at, end - 1) * of.row, of.access);
    };
    auto q_id = [&](int r) { return id(p.q_segment_ids, row_of(r).i, p.Lq); };
    auto k_id = [&](int c) { return id(p.kv_segment_ids, j0 + c, p.Lk); };
    i64 ids[M][2];
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const Place at = place(m, 0, 2 * half);
        ids[m][half] = kKeysAreRows ? k_id(at.c) : q_id(at.r);
      }
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const Place at = place(0, n, e);
        const i64 other = kKeysAreRows ? q_id(at.r) : k_id(at.c);
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
          for (int half = 0; half < 2; half++)
            if (ids[m][half] != other) s[m][n][2 * half + e] = none;
      }
  }
}
