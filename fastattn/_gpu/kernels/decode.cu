// Decode: the forward of at most 16 query rows, whose time is that of reading K and V once.
//
// A block takes a split of the keys. Each of its warps walks over tiles of its own, with an online
// softmax as in forward.cu, and has a ring of kRing tiles of K and V to itself: no warp waits for
// another, and while a tile is used, the next ones are on their way. At the end the block merges
// what its warps have, and combine.cu what splits have.
//
// Rows are as in forward.cu. So are the modes, but a warp's own: where it does not end finite, it
// walks again with the first stage alone, for its results so far lie in the second.

constexpr int kN = kBc / 8, kO = kDv / 8;
// Truncated sums of more than 128 products would be felt in lse.
constexpr int kScoreParts = sizeof(Tile) == 2 && kD > 128 ? 8 : kParts;
constexpr int kStage = kBc * (pitch_of(kD) + pitch_of(kDv));  // Tile numbers
constexpr int kRow = kDv + 4;  // Acc numbers from row to row of results

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
decode(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) char shared[];
  __shared__ Acc lse_of[kWarps][16];
  Tile* const sQ = (Tile*)shared;
  Tile* const rings = sQ + kBr * pitch_of(kD);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  Tile* const ring = rings + warp * kRing * kStage;

  const int split = blockIdx.x % (int)p.splits, head = blockIdx.x / (int)p.splits;
  const int heads = (int)(p.packed ? p.Hkv : p.Hq), group = (int)(p.packed ? p.group : 1);
  const int b = head / heads, h = head % heads, rows = (int)p.Lq * group;
  const int kv_head = p.packed ? h : h / (int)p.group;
  const Entry entry = entry_of(p, b);
  auto row_of = [&](int r) {
    if (r >= rows) return Row{kFar, 0};
    return group == 1 ? Row{r, h} : Row{r / group, h * group + r % group};
  };

  const int last = min_of((int)p.Lq, entry.q_len) - 1;
  const int begin = max_of(first_key(entry, 0), split * (int)p.split_keys);
  int end = last < 0 ? 0 : end_of_keys(entry, last);
  if (p.splits > 1) end = min_of(end, (split + 1) * (int)p.split_keys);
  int from = begin / kBc;
  const int to = end > begin ? (end + kBc - 1) / kBc : from;
  from += (warp - from % kWarps + kWarps) % kWarps;

  const char* const of_q = p.q.at(b, 0);
  const char* const of_k = p.k.at(b, kv_head);
  const char* const of_v = p.v.at(b, kv_head);
  auto row_of_q = [&](int r) -> const char* {
    const Row row = row_of(r);
    return row.i == kFar ? nullptr : of_q + row.h * p.q.head + row.i * p.q.row;
  };
  auto load = [&](int n, Tile* stage) {
    if (n < to) {
      const int j = n * kBc, count = entry.kv_len - j;
      Tile* const to_v = stage + kBc * pitch_of(kD);
      load_tile<kBc, kD, 32>(stage, p.k, of_k + j * p.k.row, count, (int)p.D);
      load_tile<kBc, kDv, 32>(to_v, p.v, of_v + j * p.v.row, count, (int)p.Dv);
    }
    copies_commit();
  };
  // Q arrives with the first tile.
  load_rows<kBr, kD>(sQ, p.q, (int)p.D, row_of_q);

  const Acc unit = (Acc)p.scale, log2_unit = (Acc)(p.scale * kLog2e);
  const Acc none = -infinity(Acc());
  Acc* const results = (Acc*)(ring + kStage);

  for (int mode = kUsual, next;; mode = next) {
    const int stages = mode == kUsual ? kRing : 1;
    Acc o[1][kO][4], row_max[2] = {none, none}, row_sum[2] = {};
    clear(o);
#pragma unroll 1
    for (int x = 0; x < stages; x++) load(from + x * kWarps, ring + x * kStage);
    if (mode == kUsual) {
      copies_wait<kRing - 1>();
      __syncthreads();  // Q is everybody's
    }
    int at = 0;
#pragma unroll 1
    for (int n = from; n < to; n += kWarps, at = at + 1 == stages ? 0 : at + 1) {
      Tile* const sK = ring + at * kStage;
      Tile* const sV = sK + kBc * pitch_of(kD);
      Acc s[1][kN][4], scale[1][2];
      clear(s);
      if (mode == kUsual) copies_wait<kRing - 1>();
      else copies_wait<0>();
      __syncwarp();
      multiply_rows<kD / kStep, kScoreParts>(s, sQ, pitch_of(kD), sK, pitch_of(kD));
      auto place = [&](int, int x, int e) {
        return Place{(e >> 1) * 8 + g, x * 8 + 2 * t + (e & 1)};
      };
      if (kSplit && mode != kUsual)
        repair(s, p.q, p.k, p.D, place, [&](Place at) { return row_of_q(at.r); },
               [&](Place at) -> const char* {
                 const int j = n * kBc + at.c;
                 return j < entry.kv_len ? of_k + j * p.k.row : nullptr;
               });
      if (mode != kUsual || !all_pairs(entry, 0, last, n * kBc, kBc)) {
        const Entry again = entry_of(p, hidden(b));  // what else would be kept in registers
        keep_within(s, [&](int, int half) {
          return keys_of_row(again, row_of(hidden(half * 8 + g)).i, n * kBc);
        });
      }

#pragma unroll
      for (int half = 0; half < 2; half++) {
        Acc high = row_max[half];
#pragma unroll
        for (int x = 0; x < kN; x++)
          high = max_of(high, max_of(s[0][x][2 * half], s[0][x][2 * half + 1]));
        high = quad_max(high);
        const Acc safe = high == none ? 0 : high;
        scale[0][half] = exp2_of((row_max[half] - safe) * log2_unit);
        row_max[half] = high;
        Acc sum = 0;
#pragma unroll
        for (int x = 0; x < kN; x++)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; e++) {
            Acc& y = s[0][x][e];
            if (mode < kScaled) y = exp2_of(fma_of(y, log2_unit, -(safe * log2_unit)));
            else y = mode == kScaled ? exp2_of((y - safe) * log2_unit) : y == none ? 0 : 1;
            sum += y;
          }
        row_sum[half] = fma_of(row_sum[half], scale[0][half], sum);
        if (mode == kTaint) scale[0][half] = 1;
      }
      if (mode != kUsual) sanitize<kBc, kDv, 32>(sV, mode);
      multiply_blocks<true>(o, s, sV, pitch_of(kDv), scale);
      __syncwarp();
      load(n + stages * kWarps, sK);
    }

    // Normalise, look for what is not finite, and leave it to the block.
    bool odd = false;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int r = half * 8 + g;
      const Acc sum = quad_sum(row_sum[half]);
      const Acc high = row_max[half] == none ? none : row_max[half] * unit;
      const bool dead = row_of(r).i >= entry.q_len || (high == none && sum == 0);
      const Acc factor = (mode == kScaled ? (Acc)kUp : 1) / sum;
      odd = odd || (!dead && (!finite(sum) || sum == 0));
#pragma unroll
      for (int x = 0; x < kO; x++)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; e++) {
          if (mode != kTaint) o[0][x][e] = dead ? 0 : o[0][x][e] * factor;
          odd = odd || !finite(o[0][x][e]);
        }
      const Acc lse = dead ? none : high + log_of(sum);
      Acc& to = lse_of[warp][r];
      if (t == 0 && mode != kTaint && (mode != kScaled || !finite(to))) to = lse;
    }
    odd = __any_sync(~0u, odd);
    next = mode == kUsual ? kClean : mode == kClean && odd ? kScaled : kTaint;
    if (mode == kUsual && odd) continue;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int r = half * 8 + g;
      if (r >= rows) continue;
      Acc* const to = results + r * kRow + 2 * t;
#pragma unroll
      for (int x = 0; x < kO; x++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          if (mode <= kClean) to[x * 8 + e] = o[0][x][2 * half + e];
          else write<Acc>((char*)(to + x * 8 + e), o[0][x][2 * half + e], kElements, mode);
        }
    }
    if (mode == kUsual || mode == kTaint) break;
    __syncwarp();
  }
  __syncthreads();

  for (int x = threadIdx.x; x < rows * (kDv / 4); x += kThreads) {
    const int r = x / (kDv / 4), c = x % (kDv / 4) * 4;
    const Row row = row_of(r);
    const bool sinks = p.sinks && p.splits == 1 && row.i < entry.q_len;
    const Acc sink = sinks ? ((const Acc*)p.sinks)[row.h] : none;
    Acc high = sink;
#pragma unroll
    for (int w = 0; w < kWarps; w++) high = max_of(high, lse_of[w][r]);
    Merge merge(high);
    merge.sum = merge.weight(sink);
#pragma unroll
    for (int w = 0; w < kWarps; w++) merge.sum += merge.weight(lse_of[w][r]);
    const Acc factor = merge.factor();
    Four value = {};
#pragma unroll
    for (int w = 0; w < kWarps; w++) {
      const Acc share = merge.weight(lse_of[w][r]) * factor;
      const Four one = *(const Four*)((Acc*)(rings + (w * kRing + 1) * kStage) + r * kRow + c);
#pragma unroll
      for (int e = 0; e < 4; e++) value.x[e] = fma_of(share, one.x[e], value.x[e]);
    }
    const i64 flat = ((b * p.Hq + row.h) * p.Lq + row.i) * p.splits + split;
    if (p.splits == 1) write_out(p, p.out.at(b, row.h) + row.i * p.out.row, c, value);
    else if (c < p.Dv) *(Four*)((Acc*)p.partial_out + flat * partial_pitch(p) + c) = value;
    if (c == 0) {
      if (p.splits == 1) store(p.lse.at(b, row.h) + row.i * p.lse.row, merge.lse(), p.lse.access);
      else ((Acc*)p.partial_lse)[flat] = merge.lse();
    }
  }
}
