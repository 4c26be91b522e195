// Forward on Hopper, the careful way: what hopper_forward.cu computes, in the same arithmetic and
// to the same bits, one thing after the other and loaded by ordinary loads.
//
// Tiles whose flag is set, which did not all end finite, are computed again in the modes kClean,
// kScaled and kTaint of forward.cu. Without flags, for arrays that tensor maps cannot take, all
// tiles are computed here, first in the usual mode.

template <Whose kWhose, int kRows, int kColumns>
DEVICE void load_factor(char* tile, float* weights, const Array& array, const char* row, int rows,
                        int width, int mode) {
  if constexpr (kHalves == 1)
    load_tile_carefully<kRows, kColumns>(tile, array, row, rows, width, mode);
  else
    load_halves_carefully<kWhose, kRows, kColumns>(tile, weights, array, row, rows, width, mode);
}

constexpr int kBytesOfRows = 4 * (kBr + 2 * kBc);  // weights
constexpr int kBytesWeights = kHalves == 2 ? kBytesOfRows : 0;

static_assert(kThreads == 128 * kGroups, "");
static_assert(kThreads / 32 * kStage <= tile_bytes(kBc, kD) + tile_bytes(kBc, kDv), "");

extern "C" __global__ void __launch_bounds__(kThreads, 1)
hopper_careful(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) char shared[];
  char* const sQ = shared;
  char* const sK = sQ + tile_bytes(kBr, kD);
  char* const sV = sK + tile_bytes(kBc, kD);
  float* const weights_q = (float*)(sV + tile_bytes(kBc, kDv));  // of float32
  float* const weights_k = weights_q + kBr;
  float* const weights_v = weights_k + kBc;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  char* const added = (char*)weights_q + kBytesWeights + warp * 16 * kAddedRow;  // of the warp
  const int total = (int)(p.tiles * p.Hq * p.batch), step = (int)gridDim.x;
  const u32* const flags = (const u32*)p.flags;  // four warps' flags in each
  auto flagged = [&](int index) {
    u32 any = 0;
    for (int x = 0; x < kGroups; x++) any |= flags[(i64)index * kGroups + x];
    return any != 0;
  };
  if (flags) {
    bool any = false;
    for (i64 index = blockIdx.x + (i64)threadIdx.x * step; index < total;
         index += (i64)step * kThreads)
      any = any || flagged((int)index);
    if (!__syncthreads_or(any)) return;
  }

  const u64 of_q = along_rows(shared_address(sQ) + (warp >> 2) * 64 * 128);
  const u64 of_k = along_rows(shared_address(sK)), of_v = along_columns<kBc>(shared_address(sV));
  const float log2_unit = (float)(unit_of(p) * kLog2e);
  for (i64 index = blockIdx.x; index < total; index += step) {
    if (flags && !flagged((int)index)) continue;
    const Turn turn = turn_of(index, p.tiles, p.Hq * p.batch);
    const int b = (int)(turn.head / p.Hq), h = (int)(turn.head % p.Hq), kv_head = h / (int)p.group;
    const int tile = (int)p.tiles - 1 - turn.tile;
    const Work work = work_of_tile(p, b, tile), own = work_of_group(p, b, tile, warp >> 2);
    const RowOf row_of = {work.row0 + warp * 16, h};
    const int i = work.row0 + warp * 16 + (lane >> 2), kv_len = entry_of(p, b).kv_len;
    __syncthreads();
    load_factor<kOfQ, kBr, kD>(sQ, weights_q, p.q, p.q.at(b, h) + work.row0 * p.q.row,
                               (int)p.Lq - work.row0, (int)p.D, kUsual);

    for (int mode = flags ? kClean : kUsual, next;; mode = next) {
      Results results;
      Rows rows;
      results.clear();
      rows.clear();
#pragma unroll 1
      for (int n = work.to - 1;; n--) {
        const Step step = seek(p, b, h, tile, work.from, n);
        n = step.n;
        if (n < work.from) break;
        const int j = n * kBc;
        load_factor<kOfK, kBc, kD>(sK, weights_k, p.k, p.k.at(b, kv_head) + j * p.k.row,
                                   kv_len - j, (int)p.D, kUsual);
        load_factor<kOfV, kBc, kDv>(sV, weights_v, p.v, p.v.at(b, kv_head) + j * p.v.row,
                                    kv_len - j, (int)p.Dv, mode);
        const bool adds = asks_added(step.needs), cut = mode != kUsual || own.cut(n);
        if (adds) load_added_of<16>(p, added, b, h, row_of.i0, j);
        writes_to_async();
        __syncthreads();
        if (own.has(n)) {
          Scores scores;
          Factor factor;
          float scale[2];
          scores.start(of_q, of_k);
          products_wait<0>();
          scores.finish();
          if constexpr (kHalves == 2) {
            weigh_scores(scores.s[0], weights_q + warp * 16 + (lane >> 2), weights_k, log2_unit);
            const int j0 = j + 2 * (lane & 3);
            const char* const of_row0 = p.q.at(b, h);
            const char* const of_key0 = p.k.at(b, kv_head);
            auto place = [&](int, int n, int e) {
              return Place{i + (e >> 1) * 8, j0 + n * 8 + (e & 1)};
            };
            if (mode != kUsual)
              repair(scores.s, p.q, p.k, p.D, place,
                     [&](Place at) { return at.r < p.Lq ? of_row0 + at.r * p.q.row : nullptr; },
                     [&](Place at) { return at.c < kv_len ? of_key0 + at.c * p.k.row : nullptr; });
          }
          scores.apply(p, b, row_of, step, added, mode);
          if (cut || (kBits && adds)) scores.exclude(p, b, i, j, adds ? added : nullptr, cut);
          rows.add(p, scores, scale, log2_unit, mode);
          if constexpr (has(kDropout))
            if (mode != kTaint) scores.drop(draw<false, 1, kN>(p, b, j, PlaceOf<false>(), row_of));
          results.factor_of(factor, scores, weights_v);
          results.rescale(scale);
          results.add(factor, of_v);
        }
        __syncthreads();
      }
      const bool odd = __syncthreads_or(results.finish(p, rows, b, h, i, mode));
      next = mode == kUsual ? kClean : mode == kClean && odd ? kScaled : kTaint;
      if (mode == kUsual && odd) continue;
      results.write_lse(p, b, h, i, mode);
      results.write_out(p, b, h, work.row0 + warp * 16, (float*)(sK + warp * kStage), mode);
      __syncthreads();
      if (mode == kUsual || mode == kTaint) break;
    }
  }
}
