// dbias = sum of t = P (z dP - delta) over the axes along which bias is broadcast. A block owns a
// tile of dbias, kBr rows and kBc columns of one (batch entry, head) of its own, walks over the
// tiles of scores that it is the sum of, and adds them up in registers; rows and columns that are
// summed too are added at the end, in float64. Where whole rows or columns are summed, `slices`
// blocks share the walk, and reduce.cu adds up their parts.
//
// What does not take part is selected away pair by pair, so nothing is ever done again.

constexpr int kM = kBr / (16 * kWarps), kN = kBc / 8, kPitch = kBc + 1;

template <int kRows, int kColumns>
struct Size { static constexpr int rows = kRows, columns = kColumns; };

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
backward_bias(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) char shared[];
  Tile* const sQ = (Tile*)shared;
  Tile* const sO = sQ + kBr * pitch_of(kD);
  Tile* const sK = sO + kBr * pitch_of(kDv);
  Tile* const sV = sK + kBc * pitch_of(kD);
  char* const added = (char*)(sV + kBc * pitch_of(kDv));
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;

  // This block's tile of dbias; an axis that is summed over has one entry.
  const i64 own_heads = p.head_sums ? 1 : p.Hq;
  const i64 own_rows = p.row_sums ? 1 : p.row_tiles,
            own_columns = p.column_sums ? 1 : p.column_tiles;
  i64 index = blockIdx.x;
  const int slice = (int)(index % p.slices);
  index /= p.slices;
  const int own_column = (int)(index % own_columns);
  index /= own_columns;
  const int own_row = (int)(index % own_rows);
  index /= own_rows;
  const int own_h = (int)(index % own_heads), own_b = batch_of(p, index / own_heads);

  // The tiles of scores it sums, in a fixed order, and this slice's share of them.
  const i64 columns = p.column_sums ? p.column_tiles : 1, rows = p.row_sums ? p.row_tiles : 1;
  const i64 heads = p.head_sums ? p.Hq : 1, all = columns * rows * heads * p.batch_sums;
  const i64 from = all * slice / p.slices, to = all * (slice + 1) / p.slices;

  Acc sum[kM][kN][4];
  clear(sum);
  const Tile* const warp_q = sQ + warp * kM * 16 * pitch_of(kD);
  const Tile* const warp_o = sO + warp * kM * 16 * pitch_of(kDv);
#pragma unroll 1
  for (i64 x = from; x < to; x++) {
    const int key0 = (int)(p.column_sums ? x % columns : own_column) * kBc;
    const int row0 = (int)(p.row_sums ? x / columns % rows : own_row) * kBr;
    const int h = (int)(p.head_sums ? x / columns / rows % heads : own_h);
    const i64 at_batch = x / columns / rows / heads;
    const int b = own_b + (int)(p.sum_batches ? p.sum_batches[at_batch] : at_batch);
    const int kv_head = h / (int)p.group;
    const Entry entry = entry_of(p, b);
    const int last = min_of(row0 + kBr, entry.q_len) - 1;
    if (row0 > last ||
        max_of(first_key(entry, row0), key0) >= min_of(end_of_keys(entry, last), key0 + kBc))
      continue;
    const int needs = needs_of(p, b, h, row0 / kBr, key0 / kBc);
    if (needs & kEmpty) continue;
    auto row_of = [&](int r) { return row0 + r < p.Lq ? Row{row0 + r, h} : Row{kFar, 0}; };
    auto load = [&](auto size, Tile* to, const Array& array, int head, int row, int end, int at,
                    int width) {
      load_tile<decltype(size)::rows, decltype(size)::columns>(
          to, array, array.at(b, head) + row * array.row + at * array.column, end - row,
          width - at);
    };

    Acc s[kM][kN][4], dp[kM][kN][4];
    clear(s);
    clear(dp);
    __syncthreads();
    load_added(p, needs, added, b, h, row0, key0, row_of);
    copies_commit();
    walk_rows<kD>(
        s, warp_q, sK, (int)p.D,
        [&](int at) { load(Size<kBr, kD>(), sQ, p.q, h, row0, entry.q_len, at, (int)p.D); },
        [&](int at) { load(Size<kBc, kD>(), sK, p.k, kv_head, key0, entry.kv_len, at, (int)p.D); });
    walk_rows<kDv>(
        dp, warp_o, sV, (int)p.Dv,
        [&](int at) { load(Size<kBr, kDv>(), sO, p.dout, h, row0, entry.q_len, at, (int)p.Dv); },
        [&](int at) {
          load(Size<kBc, kDv>(), sV, p.v, kv_head, key0, entry.kv_len, at, (int)p.Dv);
        });
    copies_wait<0>();
    __syncthreads();
    auto place = [&](int m, int y, int e) {
      return Place{(warp * kM + m) * 16 + (e >> 1) * 8 + g, y * 8 + 2 * t + (e & 1)};
    };
    if (kSplit) {
      auto row = [&](const char* of, const Array& array, int r) {
        return row0 + r < entry.q_len ? of + (row0 + r) * array.row : nullptr;
      };
      auto key = [&](const char* of, const Array& array, int c) {
        return key0 + c < entry.kv_len ? of + (key0 + c) * array.row : nullptr;
      };
      repair(s, p.q, p.k, p.D, place, [&](Place at) { return row(p.q.at(b, h), p.q, at.r); },
             [&](Place at) { return key(p.k.at(b, kv_head), p.k, at.c); });
      repair(
          dp, p.dout, p.v, p.Dv, place,
          [&](Place at) { return row(p.dout.at(b, h), p.dout, at.r); },
          [&](Place at) { return key(p.v.at(b, kv_head), p.v, at.c); });
    }
    const Acc* const row_lse = (const Acc*)p.row_lse + row_start(p, b, h) + row0;
    const Acc* const row_delta = (const Acc*)p.row_delta + row_start(p, b, h) + row0;
    Kept<kM, kN> kept;
    if (asks_dropout(p)) kept = draw<false, kM, kN>(p, b, key0, place, row_of);
    apply_factors(p, s, dp, false, kept,
                  [&](int m, int n, int e) { return row_delta[place(m, n, e).r]; });
    apply_options<false>(p, entry, s, needs, kClean, added, key0, place, row_of);
    keep_within(s, [&](int m, int half) {
      return keys_of_row(entry, row0 + place(m, 0, 2 * half).r, key0);
    });
    for_each(s, [&](Acc& y, int m, int n, int e) {
      sum[m][n][e] += gradient<true>(p, y, dp[m][n][e], row_lse[place(m, n, e).r], 0, kUsual).ds;
    });
  }

  // Through shared memory to rows and columns.
  __syncthreads();
  Acc* const tile = (Acc*)shared;
  for_each(sum, [&](Acc& y, int m, int n, int e) {
    tile[((warp * kM + m) * 16 + (e >> 1) * 8 + g) * kPitch + n * 8 + 2 * t + (e & 1)] = y;
  });
  __syncthreads();
  const int height = p.row_sums ? 1 : min_of((int)p.Lq - own_row * kBr, kBr);
  const int width = p.column_sums ? 1 : min_of((int)p.Lk - own_column * kBc, kBc);
  for (int x = threadIdx.x; x < height * width; x += kThreads) {
    const int r = x / width, c = x % width;
    double total = 0;
    for (int i = r; i < (p.row_sums ? kBr : r + 1); i++)
      for (int j = c; j < (p.column_sums ? kBc : c + 1); j++) total += tile[i * kPitch + j];
    const i64 row = p.row_sums ? 0 : own_row * kBr + r,
              column = p.column_sums ? 0 : own_column * kBc + c;
    if (p.slices > 1) {
      const i64 all_rows = p.row_sums ? 1 : p.Lq, all_columns = p.column_sums ? 1 : p.Lk;
      const i64 flat = (index * all_rows + row) * all_columns + column;  // index: batch entry, head
      ((double*)p.sums)[flat * p.slices + slice] = total;
    } else {
      char* const to = p.dbias.at(own_b, own_h) + row * p.dbias.row + column * p.dbias.column;
      store_number(to, total, p.dbias.access, p.dbias_kind);
    }
  }
}
