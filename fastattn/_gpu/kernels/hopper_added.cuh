// What Hopper's kernels have of a tile of scores besides its bounds, which warps of the loader's
// warpgroup bring to shared memory: numbers of a mask or bias as they are, or a bit for each pair,
// set where a bool mask or segments leave it.

constexpr bool kAdds = has(kBools) || has(kNumbers) || has(kSegments);

DEVICE bool asks_added(int needs) {
  return asks_bools(needs) || asks_numbers(needs) || asks_ids(needs);
}

// A thread's elements in its warp's 16 rows of a product, which are queries or keys; and which queries
// these are, i0 being the first.
template <bool kKeysAreRows>
struct PlaceOf {
  DEVICE Place operator()(int, int n, int e) const {
    const int lane = threadIdx.x & 31;
    const int row = (e >> 1) * 8 + (lane >> 2), column = n * 8 + 2 * (lane & 3) + (e & 1);
    return kKeysAreRows ? Place{column, row} : Place{row, column};
  }
};
struct RowOf {
  int i0, h;
  DEVICE Row operator()(int r) const { return {i0 + r, h}; }
};

// Bits of rows of kColumns columns. Those of columns 4 x + k, for x = 0, 1, .., lie side by side,
// first all of k = 0: so a thread has its own by a shift.
template <int kColumns>
struct Bits {
  static constexpr int kEach = kColumns / 4, kWords = kColumns / 32, kRow = kColumns / 8;  // bytes
  static_assert(kColumns == 32 || kColumns == 64 || kColumns == 128, "");

  // Which column the lane's bit of a row's word is: 4 x + k.
  DEVICE static int x_of_lane() { return (threadIdx.x & 31) % kEach; }
  DEVICE static int k_of_lane(int word) { return (32 * word + (int)(threadIdx.x & 31)) / kEach; }
  DEVICE static int column(int word) { return 4 * x_of_lane() + k_of_lane(word); }

  DEVICE static void write(char* to, int r, const u32 (&words)[kWords]) {
    if ((threadIdx.x & 31) != 0) return;
    if constexpr (kWords == 4)
      ((uint4*)to)[r] = make_uint4(words[0], words[1], words[2], words[3]);
    else if constexpr (kWords == 2)
      ((uint2*)to)[r] = make_uint2(words[0], words[1]);
    else
      ((u32*)to)[r] = words[0];
  }
  // A thread's columns of row r: bit 2 n + e is that of column 8 n + 2 t + e.
  DEVICE static u32 of_row(const char* bits, int r) {
    const int t = threadIdx.x & 3;
    const char* const at = bits + r * kRow + (t & 1) * (kRow / 2);
    u32 even, odd;
    if constexpr (kWords == 4) {
      const uint2 both = *(const uint2*)at;
      even = both.x, odd = both.y;
    } else if constexpr (kWords == 2) {
      const u32 both = *(const u32*)at;
      even = both & 0xffff, odd = both >> 16;
    } else {
      const u32 both = *(const u16*)at;
      even = both & 0xff, odd = both >> 8;
    }
    return even >> (t >> 1) & 0x55555555 | (odd >> (t >> 1) & 0x55555555) << 1;
  }
};

// A warp brings which pairs of queries from i0 on and keys from j0 on segments leave. Rows of bits,
// kRows of them, are queries, or keys.
template <bool kKeysAreRows, int kRows, int kColumns>
DEVICE void bring_segments(const Params& p, char* to, int b, int i0, int j0) {
  using Of = Bits<kColumns>;
  const int lane = threadIdx.x & 31;
  auto id = [&](bool of_keys, int at) {
    const Array& of = of_keys ? p.kv_segment_ids : p.q_segment_ids;
    const i64 last = (of_keys ? p.Lk : p.Lq) - 1;
    return load<i64>(of.at(b, 0) + min_of((i64)at, last) * of.row, of.access);
  };
  const int row0 = kKeysAreRows ? j0 : i0, column0 = kKeysAreRows ? i0 : j0;
  i64 of_rows, of_columns[Of::kWords];
#pragma unroll
  for (int w = 0; w < Of::kWords; w++)
    of_columns[w] = id(!kKeysAreRows, column0 + Of::column(w));
#pragma unroll 1
  for (int r = 0; r < kRows; r++) {
    if (r % 32 == 0) of_rows = id(kKeysAreRows, row0 + r + lane);
    const i64 own = __shfl_sync(~0u, of_rows, r % 32);
    u32 words[Of::kWords];
#pragma unroll
    for (int w = 0; w < Of::kWords; w++) words[w] = __ballot_sync(~0u, own == of_columns[w]);
    Of::write(to, r, words);
  }
  __syncwarp();
}

// Likewise what a bool mask leaves; beyond it, nothing. The number of keys is a multiple of 4.
template <int kRows, int kColumns>
DEVICE void bring_truths_of_queries(const Params& p, char* to, int b, int h, int i0, int j0) {
  using Of = Bits<kColumns>;
  constexpr int kAtOnce = 16;
  const Array& mask = p.attn_mask;
  const int c = 4 * Of::x_of_lane();
  const char* from = mask.at(b, h) + i0 * mask.row + (j0 + c) * mask.column;
  const int rows = j0 + c < p.Lk ? (int)p.Lq - i0 : 0;
  auto write = [&](int r, u32 four) {
    u32 words[Of::kWords];
#pragma unroll
    for (int w = 0; w < Of::kWords; w++)
      words[w] = __ballot_sync(~0u, four & 0xffu << 8 * Of::k_of_lane(w));
    Of::write(to, r, words);
  };
  if (mask.column == 1 && ((i64)from | mask.row) % 4 == 0) {
#pragma unroll 1
    for (int r0 = 0; r0 < kRows; r0 += kAtOnce) {
      u32 fours[kAtOnce];
#pragma unroll
      for (int r = 0; r < kAtOnce; r++, from += mask.row)
        fours[r] = r0 + r < rows ? *(const u32*)from : 0;
#pragma unroll
      for (int r = 0; r < kAtOnce; r++) write(r0 + r, fours[r]);
    }
  } else {
#pragma unroll 1
    for (int r = 0; r < kRows; r++, from += mask.row) {
      u32 four = 0;
#pragma unroll
      for (int k = 0; k < 4; k++)
        if (r < rows) four |= (u32)*(const u8*)(from + k * mask.column) << 8 * k;
      write(r, four);
    }
  }
  __syncwarp();
}
template <int kRows, int kColumns>
DEVICE void bring_truths_of_keys(const Params& p, char* to, int b, int h, int i0, int j0) {
  using Of = Bits<kColumns>;
  const Array& mask = p.attn_mask;
  const char* const from = mask.at(b, h) + i0 * mask.row + j0 * mask.column;
  const int rows = (int)p.Lq - i0, keys = (int)p.Lk - j0;
  u32 words[Of::kWords];
  if (mask.access == kVectors) {
    const char* of_row[Of::kWords];
#pragma unroll
    for (int w = 0; w < Of::kWords; w++) of_row[w] = from + Of::column(w) * mask.row;
#pragma unroll 1
    for (int c = 0; c < kRows; c += 16) {
      uint4 of[Of::kWords];
#pragma unroll
      for (int w = 0; w < Of::kWords; w++) {
        const bool valid = Of::column(w) < rows && c < keys;
        of[w] = valid ? *(const uint4*)(of_row[w] + c) : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int x = 0; x < 16; x++) {
#pragma unroll
        for (int w = 0; w < Of::kWords; w++) {
          const u32 four = x < 4 ? of[w].x : x < 8 ? of[w].y : x < 12 ? of[w].z : of[w].w;
          words[w] = __ballot_sync(~0u, four & 0xffu << x % 4 * 8);
        }
        Of::write(to, c + x, words);
      }
    }
  } else {
#pragma unroll 1
    for (int c = 0; c < kRows; c++) {
#pragma unroll
      for (int w = 0; w < Of::kWords; w++) {
        const int i = Of::column(w);
        const bool valid = i < rows && c < keys;
        words[w] = __ballot_sync(~0u, valid && from[i * mask.row + c * mask.column]);
      }
      Of::write(to, c, words);
    }
  }
  __syncwarp();
}

// A warp brings numbers of a mask or bias, kRows rows of kColumns, in chunks as large as its address
// and strides allow; `from` is the first, of which rows x columns exist.
template <class T, int kRows, int kColumns = kBc>
DEVICE void bring_numbers(char* to, int pitch, const Array& array, const char* from, int rows,
                          int columns) {
  constexpr int kSize = sizeof(T);
  if (array.access == kVectors) {
    copy_tile<kSize, kRows, 32, 16, kColumns>(to, pitch, from, array.row, rows, columns);
  } else if (array.column == kSize && ((i64)from | array.row) % 4 == 0) {
    copy_tile<kSize, kRows, 32, 4, kColumns>(to, pitch, from, array.row, rows, columns);
  } else {
#pragma unroll 4
    for (int x = threadIdx.x & 31; x < (pitch ? kRows : 1) * kColumns; x += 32) {
      const int r = x / kColumns, c = x % kColumns;
      T y = {};
      if (r < rows && c < columns)
        y = load<T>(from + r * array.row + c * array.column, array.access);
      ((T*)(to + r * pitch))[c] = y;
    }
  }
  copies_commit();
  copies_wait<0>();
  __syncwarp();
}
