// Halves of all rows of q, dout, k and v, for hopper_halves_q.cu and hopper_halves_kv.cu, which
// meet each of them many times.

extern "C" __global__ void __launch_bounds__(kThreads)
hopper_split(const __grid_constant__ Params p) {
  constexpr int kLanes = kD / 8;  // of a row: a lane has 8 columns
  const i64 index = ((i64)blockIdx.x * kThreads + threadIdx.x) / kLanes, total = split_total(p);
  if (index >= total) return;  // whole warps: a head's rows are padded to more than they take
  const int c = threadIdx.x % kLanes;
  int which = kSplitQ;
  while (index >= split_start(p, which + 1)) which++;
  const Array& array =
      which == kSplitQ ? p.q : which == kSplitO ? p.dout : which == kSplitK ? p.k : p.v;
  const bool of_queries = which < kSplitK;
  const int heads = (int)(of_queries ? p.Hq : p.Hkv), rows = (int)(of_queries ? p.Lq : p.Lk);
  const int width = (int)(which == kSplitQ || which == kSplitK ? p.D : p.Dv);
  const i64 own = index - split_start(p, which), head = own / padded(rows);
  const int i = (int)(own % padded(rows));
  const char* const from =
      array.at((int)(head / heads), (int)(head % heads)) + i * array.row + c * 8 * array.column;

  float x[8] = {};
#pragma unroll
  for (int part = 0; part < 2; part++) {
    if (i >= rows || c * 8 + part * 4 >= width) continue;
    const char* const at = from + part * 4 * array.column;
    if (array.access == kVectors) {
      *(float4*)(x + part * 4) = *(const float4*)at;
    } else {
#pragma unroll
      for (int e = 0; e < 4; e++)
        x[part * 4 + e] = load<float>(at + e * array.column, array.access);
    }
  }
  Sizes sizes;
#pragma unroll
  for (int e = 0; e < 8; e++) sizes.add(x[e]);
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) sizes.join(step);
  const int up = exponent_to_halves(sizes.top);
  const float factor = power(up);
  uint4 hi, lo;
  split(hi.x, lo.x, x[0] * factor, x[1] * factor);
  split(hi.y, lo.y, x[2] * factor, x[3] * factor);
  split(hi.z, lo.z, x[4] * factor, x[5] * factor);
  split(hi.w, lo.w, x[6] * factor, x[7] * factor);
  char* const to = (char*)p.halves + index * kD * 4 + (c >> 3) * 256 + (c & 7) * 16;
  *(uint4*)to = hi;
  *(uint4*)(to + 128) = lo;
  if (c == 0) {
    p.weights[index] = power(254 - up);
    p.weights[total + index] = sizes.spread();
  }
}
