// What blocks have in common: the order of their work, and their way out to memory.

// The work of block `index`: tiles of a few heads at a time, so that these heads' arrays stay in
// cache.
struct Turn { int head, tile; };

DEVICE Turn turn_of(int index, int tiles, int heads) {
  const int section = index / (4 * tiles) * 4, within = index - section * tiles;
  const int width = min_of(heads - section, 4);
  return {section + within % width, within / width};
}

// One element of a result, where `mode` lets it be written; see forward.cu.
template <class T>
DEVICE void write(char* to, Acc value, i64 access, int mode) {
  if (mode == kTaint && value == 0) return;
  if (mode == kTaint) value = infinity(Acc()) - infinity(Acc());
  if (mode == kScaled && finite(load<T>(to, access))) return;
  T y;
  narrow(y, value);
  store(to, y, access);
}

// A warp writes a row of `columns` results to an array's row.
template <class T>
DEVICE void write_elements(const Array& array, char* to, const Acc* from, int columns, int mode) {
  for (int c = threadIdx.x & 31; c < columns; c += 32)
    write<T>(to + c * array.column, from[c], array.access, mode);
}
// A warp writes its 16 staged rows in the usual case, 16 bytes at a time: row_at(r) is the address
// of a row, or null.
template <int kColumns, class RowAt>
DEVICE void write_chunks(const Acc* stage, int pitch, int columns, RowAt row_at) {
  constexpr int kChunk = 16 / sizeof(Elem), kChunks = kColumns / kChunk;
#pragma unroll
  for (int x = 0; x < 16 * kChunks / 32; x++) {
    const int at = x * 32 + (threadIdx.x & 31), r = at / kChunks, c = at % kChunks * kChunk;
    char* const to = row_at(r);
    if (!to || c >= columns) continue;
    struct alignas(16) Chunk { Elem x[kChunk]; } chunk;
#pragma unroll
    for (int i = 0; i < kChunk; i++) narrow(chunk.x[i], stage[r * pitch + c + i]);
    *(Chunk*)(to + c * (int)sizeof(Elem)) = chunk;
  }
}
DEVICE void write_row(const Params& p, char* to, Acc* partial, const Acc* from, int columns,
                      int mode) {
  if (p.splits > 1) {
    for (int c = threadIdx.x & 31; c < (columns + 3) / 4 * 4; c += 32)
      write<Acc>((char*)(partial + c), from[c], kElements, mode);
  } else if (sizeof(Elem) == 2 && p.out_kind == kF32) {
    write_elements<float>(p.out, to, from, columns, mode);
  } else {
    write_elements<Elem>(p.out, to, from, columns, mode);
  }
}

// c += A B^T over head sizes beyond a tile: load_a(at), load_b(at) bring kColumns columns from `at`
// on.
template <int kColumns, bool kRounded = false, int M, int N, class LoadA, class LoadB>
DEVICE void walk_rows(Acc (&c)[M][N][4], const Tile* warp_a, const Tile* b, int size, LoadA load_a,
                      LoadB load_b) {
  for (int at = 0; at < size; at += kColumns) {
    __syncthreads();
    load_a(at);
    load_b(at);
    copies_commit();
    copies_wait<0>();
    __syncthreads();
    if constexpr (kRounded)
      multiply_rows_rounded<kColumns / kStep>(c, warp_a, pitch_of(kColumns), b, pitch_of(kColumns));
    else
      multiply_rows<kColumns / kStep>(c, warp_a, pitch_of(kColumns), b, pitch_of(kColumns));
  }
}

// A warp's blocks of results, through shared memory, to rows of an array: row_at(r) is the address
// of tile row r, or null. `columns` of the kN x 8 are written.
template <int M, int N, class RowAt>
DEVICE void write_blocks(const Acc (&c)[M][N][4], Acc factor, char* shared, const Array& array,
                         int columns, int mode, RowAt row_at) {
  constexpr int kPitch = N * 8 + 4;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  Acc* const stage = (Acc*)shared + warp * 16 * kPitch;
#pragma unroll
  for (int m = 0; m < M; m++) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        stage[(g + (e >> 1) * 8) * kPitch + n * 8 + 2 * t + (e & 1)] = c[m][n][e] * factor;
    __syncwarp();
    if (mode == kUsual && array.access == kVectors) {
      write_chunks<N * 8>(stage, kPitch, columns,
                          [&](int r) { return row_at((warp * M + m) * 16 + r); });
    } else {
#pragma unroll 1
      for (int r = 0; r < 16; r++) {
        char* const to = row_at((warp * M + m) * 16 + r);
        if (to) write_elements<Elem>(array, to, stage + r * kPitch, columns, mode);
      }
    }
    __syncwarp();
  }
}

template <int M, int N>
DEVICE bool any_odd(const Acc (&c)[M][N][4]) {
  bool odd = false;
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) odd = odd || !finite(c[m][n][e]);
  return odd;
}

// Split float32 factors turn an infinite product, or one near it, to NaN. Where a block is computed
// again such products are made anew, one by one. a_of(place) and b_of(place) are the addresses of
// the two rows that an element is the product of, null where there is none.
__device__ __noinline__ Acc exact_product(const char* a, i64 a_column, i64 a_access, const char* b,
                                          i64 b_column, i64 b_access, int size) {
  Acc sum = 0;
  for (int c = 0; c < size; c++)
    sum = fma_of((Acc)widen(load<Elem>(a + c * a_column, a_access)),
                 (Acc)widen(load<Elem>(b + c * b_column, b_access)), sum);
  return sum;
}
template <int M, int N, class PlaceOf, class AOf, class BOf>
DEVICE void repair(Acc (&c)[M][N][4], const Array& a, const Array& b, i64 size, PlaceOf place,
                   AOf a_of, BOf b_of) {
  for_each(c, [&](Acc& x, int m, int n, int e) {
    if (finite(x)) return;
    const char* const from_a = a_of(place(m, n, e));
    const char* const from_b = b_of(place(m, n, e));
    if (from_a && from_b)
      x = exact_product(from_a, a.column, a.access, from_b, b.column, b.access, (int)size);
  });
}

// ---------------------------------------------------------------- parts of a row's keys

// Partial results, one row of Acc for each row and split, are whole chunks of 16 bytes at least.
struct alignas(16) Four { Acc x[4]; };
DEVICE i64 partial_pitch(const Params& p) { return (p.Dv + 3) / 4 * 4; }

// out = sum w_s out_s, w_s = exp(lse_s - lse), as merge_attention_states does it. The highest lse_s
// is `high`, and `sum` that of exp(lse_s - high), which weight() gives. An empty part (lse_s
// = -inf, out_s = 0) has no weight; where all are, `safe` stands for high.
struct Merge {
  Acc high, safe, sum = 0;

  DEVICE explicit Merge(Acc highest)
      : high(highest), safe(highest == -infinity(Acc()) ? 0 : highest) {}
  DEVICE Acc weight(Acc part_lse) const {
    return part_lse == -infinity(Acc()) ? 0 : exp2_of((part_lse - safe) * (Acc)kLog2e);
  }
  DEVICE Acc factor() const { return high == -infinity(Acc()) && sum == 0 ? 0 : 1 / sum; }
  DEVICE Acc lse() const {
    return high == -infinity(Acc()) && sum == 0 ? -infinity(Acc()) : high + log_of(sum);
  }
};

// Four numbers of a row of out, from column c on.
DEVICE void write_out(const Params& p, char* row, int c, const Four& from) {
#pragma unroll
  for (int e = 0; e < 4; e++) {
    if (c + e >= p.Dv) return;
    char* const to = row + (c + e) * p.out.column;
    if (sizeof(Elem) == 2 && p.out_kind == kF32) write<float>(to, from.x[e], p.out.access, kUsual);
    else write<Elem>(to, from.x[e], p.out.access, kUsual);
  }
}
