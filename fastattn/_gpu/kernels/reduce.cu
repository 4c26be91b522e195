// Sums that end a backward, in float64 and in a fixed order. A block makes one number:
//   bias:   an element of dbias out of its slices
//   sinks:  sum over a head's rows of exp(sink - lse) (dlse - D)
//   slopes: minus the sum over a head's rows of sum_j dS |i + offset - j|
// `slices` > 0 asks for the first; else p.row_sum, where given, for the third, and the second.

DEVICE double block_sum(double x) {
  __shared__ double parts[kWarps];
#pragma unroll
  for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(~0u, x, step);
  if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = x;
  __syncthreads();
  x = 0;
  for (int w = 0; w < kWarps; w++) x += parts[w];
  return x;
}

extern "C" __global__ void __launch_bounds__(kThreads)
reduce(const __grid_constant__ Params p) {
  Total own;
  if (p.slices > 0) {
    i64 index = blockIdx.x;
    for (int x = threadIdx.x; x < p.slices; x += kThreads)
      own.add(((const double*)p.sums)[index * p.slices + x]);
    const double sum = block_sum(own.sum());
    if (threadIdx.x) return;
    const i64 columns = p.column_sums ? 1 : p.Lk, rows = p.row_sums ? 1 : p.Lq,
              heads = p.head_sums ? 1 : p.Hq;
    const i64 column = index % columns, row = index / columns % rows,
              h = index / columns / rows % heads;
    char* const to = p.dbias.at(batch_of(p, index / columns / rows / heads), (int)h);
    store_number(to + row * p.dbias.row + column * p.dbias.column, sum, p.dbias.access,
                 p.dbias_kind);
    return;
  }
  const int h = blockIdx.x;
  for (i64 x = threadIdx.x; x < p.batch * p.Lq; x += kThreads) {
    const i64 row = row_start(p, (int)(x / p.Lq), h) + x % p.Lq;
    if (p.row_sum) {
      own.add(-((const Acc*)p.row_sum)[row]);
    } else {
      const Acc lse = ((const Acc*)p.row_lse)[row];
      if (lse != infinity(Acc()))
        own.add(-(double)exp_of(((const Acc*)p.sinks)[h] - lse) * ((const Acc*)p.row_delta)[row]);
    }
  }
  const double sum = block_sum(own.sum());
  if (threadIdx.x == 0) ((Acc*)p.sums)[h] = (Acc)sum;
}
