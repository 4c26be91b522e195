// What masks and segments leave of tiles of scores, ahead of a kernel that walks over them, for
// `needs_of` in pairs.cuh. A block looks at a tile of attn_mask, tile_rows x tile_keys, or of
// segment ids: first come the masks' blocks, then those of queries' ids, then those of keys'.

DEVICE void survey_mask(const Params& p, i64 index) {
  const i64 keys = p.needs_key ? p.column_tiles : 1, rows = p.needs_row ? p.row_tiles : 1;
  const i64 heads = p.needs_head ? p.Hq : 1;
  const i64 key_tile = index % keys, row_tile = index / keys % rows,
            h = index / keys / rows % heads;
  const i64 b = index / keys / rows / heads;
  const i64 i0 = row_tile * p.tile_rows, j0 = key_tile * p.tile_keys;
  const int height = p.needs_row ? (int)min_of(p.tile_rows, p.Lq - i0) : 1;
  const int width = p.needs_key ? (int)min_of(p.tile_keys, p.Lk - j0) : 1;
  const Array& mask = p.attn_mask;
  const char* const from = mask.at((int)b, (int)h) + i0 * mask.row + j0 * mask.column;
  bool some = false, all = true;
  if (p.attn_mask_kind == kBool && mask.access == kVectors && width % 16 == 0) {
    const int chunks = width / 16;
    for (int x = threadIdx.x; x < height * chunks; x += kThreads) {
      const uint4 y = *(const uint4*)(from + x / chunks * mask.row + x % chunks * 16);
      const u32 parts[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        some = some || parts[i];
        const u32 set =
            (parts[i] & 0x7f7f7f7f) + 0x7f7f7f7f | parts[i];  // in each byte's highest bit
        all = all && (set & 0x80808080) == 0x80808080;
      }
    }
  } else {
    for (int x = threadIdx.x; x < height * width; x += kThreads) {
      const char* const at = from + x / width * mask.row + x % width * mask.column;
      if (p.attn_mask_kind == kBool) {
        some = some || *at;
        all = all && *at;
      } else {
        const Acc number = load_number(at, mask.access, p.attn_mask_kind);
        some = some || number != -infinity(Acc());
        all = all && number == 0;
      }
    }
  }
  some = __syncthreads_or(some);
  all = __syncthreads_and(all);
  const int of_mask = p.bools ? kAddBools : kAddNumbers;
  const int needs = !some ? kEmpty : (all ? 0 : of_mask) | (p.bias.data ? kAddNumbers : 0);
  if (threadIdx.x == 0)
    ((u8*)p.tile_needs)[b * p.needs_batch + h * p.needs_head + row_tile * p.needs_row +
                        key_tile * p.needs_key] = needs;
}

// The least and the greatest id of a tile.
DEVICE void survey_ids(const Params& p, const Array& ids, i64 length, i64 tile, i64 tiles,
                       i64 index, void* to) {
  __shared__ i64 lows[kWarps], highs[kWarps];
  const i64 b = index / tiles, start = index % tiles * tile, end = min_of(start + tile, length);
  i64 low = 0x7fffffffffffffffll, high = -low - 1;
  for (i64 x = start + threadIdx.x; x < end; x += kThreads) {
    const i64 id = load<i64>(ids.at((int)b, 0) + x * ids.row, ids.access);
    low = min_of(low, id);
    high = max_of(high, id);
  }
#pragma unroll
  for (int step = 16; step; step >>= 1) {
    low = min_of(low, (i64)__shfl_xor_sync(~0u, low, step));
    high = max_of(high, (i64)__shfl_xor_sync(~0u, high, step));
  }
  if ((threadIdx.x & 31) == 0) {
    lows[threadIdx.x >> 5] = low;
    highs[threadIdx.x >> 5] = high;
  }
  __syncthreads();
  if (threadIdx.x) return;
  for (int w = 1; w < kWarps; w++) {
    low = min_of(low, lows[w]);
    high = max_of(high, highs[w]);
  }
  ((i64*)to)[2 * index] = low;
  ((i64*)to)[2 * index + 1] = high;
}

extern "C" __global__ void __launch_bounds__(kThreads)
survey(const __grid_constant__ Params p) {
  i64 index = blockIdx.x;
  if (index < p.mask_tiles) return survey_mask(p, index);
  index -= p.mask_tiles;
  if (index < p.batch * p.row_tiles)
    return survey_ids(p, p.q_segment_ids, p.Lq, p.tile_rows, p.row_tiles, index, p.row_ids);
  survey_ids(p, p.kv_segment_ids, p.Lk, p.tile_keys, p.column_tiles, index - p.batch * p.row_tiles,
             p.key_ids);
}
