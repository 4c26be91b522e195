// The results of split keys, merged; sinks join here. A block takes a row; its warps share out the
// splits, a lane has four columns of them at a time.

constexpr int kMost = 256;  // splits

extern "C" __global__ void __launch_bounds__(kThreads)
combine(const __grid_constant__ Params p) {
  __shared__ Acc weights[kMost], of_warps[2][kWarps];
  __shared__ Four sums[kThreads];
  const i64 row = blockIdx.x;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, splits = (int)p.splits;
  const int i = (int)(row % p.Lq), h = (int)(row / p.Lq % p.Hq), b = (int)(row / p.Lq / p.Hq);
  const Acc none = -infinity(Acc());
  const Acc* const part_lse = (const Acc*)p.partial_lse + row * splits;
  const Acc* const part = (const Acc*)p.partial_out + row * splits * partial_pitch(p);
  const bool exists = i < entry_of(p, b).q_len;
  const Acc sink = p.sinks && exists ? ((const Acc*)p.sinks)[h] : none;

  constexpr int kEach = (kMost + kThreads - 1) / kThreads;  // splits of a thread
  Acc lse[kEach], high = sink;
#pragma unroll
  for (int x = 0; x < kEach; x++) {
    const int s = x * kThreads + threadIdx.x;
    lse[x] = s < splits ? part_lse[s] : none;
    high = max_of(high, lse[x]);
  }
  high = warp_max(high);
  if (lane == 0) of_warps[0][warp] = high;
  __syncthreads();
  for (int w = 0; w < kWarps; w++) high = max_of(high, of_warps[0][w]);
  Merge merge(high);
  Acc sum = 0;
#pragma unroll
  for (int x = 0; x < kEach; x++) {
    const int s = x * kThreads + threadIdx.x;
    const Acc weight = merge.weight(lse[x]);
    if (s < splits) weights[s] = weight;
    sum += weight;
  }
  sum = warp_sum(sum);
  if (lane == 0) of_warps[1][warp] = sum;
  __syncthreads();
  merge.sum = merge.weight(sink);
  for (int w = 0; w < kWarps; w++) merge.sum += of_warps[1][w];
  const Acc factor = merge.factor();
  if (threadIdx.x == 0) store(p.lse.at(b, h) + i * p.lse.row, merge.lse(), p.lse.access);

  for (int c0 = 0; c0 < p.Dv; c0 += 128) {
    const int c = c0 + lane * 4;
    Four value = {};
    if (c < p.Dv)
#pragma unroll 8
      for (int s = warp; s < splits; s += kWarps) {
        const Four one = *(const Four*)(part + s * partial_pitch(p) + c);
        const Acc share = weights[s] * factor;
#pragma unroll
        for (int e = 0; e < 4; e++) value.x[e] = fma_of(share, one.x[e], value.x[e]);
      }
    __syncthreads();
    sums[threadIdx.x] = value;
    __syncthreads();
    if (warp || c >= p.Dv) continue;
    for (int w = 1; w < kWarps; w++)
#pragma unroll
      for (int e = 0; e < 4; e++) value.x[e] += sums[w * 32 + lane].x[e];
    write_out(p, p.out.at(b, h) + i * p.out.row, c, value);
  }
}
