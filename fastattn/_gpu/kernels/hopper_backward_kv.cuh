// What the kernels of dK = scale dS^T Q and dV = P^T dO share. A block owns kBc keys of a key head
// and walks over blocks of kBr rows that see them, of each query head in turn. Keys are the rows of
// the products.
//
// Up to 128 columns a warpgroup owns 64 keys, and P^T and dS^T are factors as they lie in
// registers. Sums of wider heads do not fit there: the warpgroups share 64 keys, of S^T and dP^T
// each makes the columns of its share of the rows, of dK and dV its share of the columns, and P^T
// and dS^T go through shared memory.

constexpr int kGroups = 2;             // warpgroups that compute,
constexpr int kReaders = 4 * kGroups * kLanes;  // their warps, for barriers,
constexpr int kAdders = kAdds ? kGroups * kLanes : 0;  // and those that bring for them
constexpr bool kShare = kD > 128;
static_assert(kD == kDv && kBc == (kShare ? 64 : 128), "");
constexpr int kRowsOf = kShare ? kBr / kGroups : kBr, kOut = kShare ? kD / kGroups : kD;
constexpr int kN = kRowsOf / 8, kO = kOut / 8;
constexpr int kBytesK = tile_bytes(kBc, kD), kBytesV = tile_bytes(kBc, kDv);
constexpr int kBytesQ = tile_bytes(kBr, kD), kBytesO = tile_bytes(kBr, kDv), kBytesRows = kBr * 4;
constexpr int kBytesP = kShare * tile_bytes(kBc, kBr);  // that of P^T, and of dS^T

// kBc keys of a key head, and the blocks of rows that see them.
struct Work {
  int b, kv_head, key0;
  int from, to;              // blocks
  int whole_from, whole_to;  // blocks that no bound cuts

  DEVICE bool cut(int n) const { return n < whole_from || n >= whole_to; }
};

DEVICE Work work_of(const Params& p, i64 index) {
  const Turn turn = turn_of(index, p.tiles, p.batch * p.Hkv);
  Work w;
  w.b = (int)turn.head / (int)p.Hkv;
  w.kv_head = (int)turn.head % (int)p.Hkv;
  w.key0 = turn.tile * kBc;
  const Entry entry = entry_of(p, w.b);
  const int last = min_of(w.key0 + kBc, entry.kv_len) - 1;
  const int begin = first_row(entry, w.key0);
  const int end = w.key0 < entry.kv_len ? end_of_rows(entry, last) : 0;
  w.from = begin / kBr;
  w.to = end > begin ? (end + kBr - 1) / kBr : w.from;
  w.whole_from = (max_of(w.key0 + kBc - 1 - entry.above, 0) + kBr - 1) / kBr;
  w.whole_to = w.key0 + kBc <= entry.kv_len ? max_of(w.key0 - entry.below + 1, 0) / kBr : 0;
  return w;
}

// Steps of the walk: a block of rows of one query head, what it asks for (Needs), and whether it is
// the last; heads come one after the other.
struct alignas(16) Step {
  int h, n, needs, last;

  DEVICE void next(const Work& work) {
    if (++n < work.to) return;
    n = work.from;
    h++;
  }
};
DEVICE Step first_step(const Params& p, const Work& work) {
  return {work.kv_head * (int)p.group, work.from};
}
DEVICE int steps_of(const Params& p, const Work& work) {
  return (work.to - work.from) * (int)p.group;
}

// The first step from this one on that is not empty; where there is none, one of a head beyond the
// key head's.
DEVICE bool exists(const Params& p, const Work& work, const Step& step) {
  return work.from < work.to && step.h < (work.kv_head + 1) * (int)p.group;
}
DEVICE Step seek(const Params& p, const Work& work, Step step) {
  if constexpr (kAdds) {
    for (; exists(p, work, step); step.h++, step.n = work.from) {
      const Found found = first_of(step.n, work.to, [&](int n) {
        return needs_of(p, work.b, step.h, n, work.key0 / kBc);
      });
      step.n = found.n;
      step.needs = found.needs;
      if (found.n < work.to) break;
    }
  }
  return step;
}
DEVICE Step seek_after(const Params& p, const Work& work, Step& step) {
  Step next = step;
  next.next(work);
  next = seek(p, work, next);
  step.last = !exists(p, work, next);
  return next;
}

// Whether sums of two levels (mma.cuh) begin a part with this step.
DEVICE bool begins_part(const Work& work, const Step& step) {
  return step.n == work.from || step.n % (kRowsOfPart / kBr) == 0;
}

// Where a warpgroup's part is: of the keys, of a step's rows, of the panels of results.
struct Part {
  int key, row, panel;

  DEVICE explicit Part(int group)
      : key(kShare ? 0 : group * 64),
        row(kShare ? group * kRowsOf : 0),
        panel(kShare ? group * kOut / kPanel : 0) {}
};

// A warp brings what there is for kKeys keys from j0 on and a part's rows from i0 on: bits of keys, or
// numbers, a row of them being that of a query. In a tile, those for the keys from `key` on lie
// added_before(key) bytes from its start.
constexpr int added_before(int key) { return key * (kBits ? kRowsOf / 8 : 2); }
template <int kKeys>
DEVICE void bring_added(const Params& p, char* to, int b, int h, int i0, int j0) {
  if constexpr (has(kSegments)) {
    bring_segments<true, kKeys, kRowsOf>(p, to, b, i0, j0);
  } else if constexpr (has(kBools)) {
    bring_truths_of_keys<kKeys, kRowsOf>(p, to, b, h, i0, j0);
  } else {
    const Array& array = p.attn_mask.data ? p.attn_mask : p.bias;
    const char* const from = array.at(b, h) + i0 * array.row + j0 * array.column;
    bring_numbers<Elem, kRowsOf, kKeys>(to, numbers_pitch(p), array, from, (int)p.Lq - i0,
                                        (int)p.Lk - j0);
  }
}

// -inf where a bound or `bits`, if there are any, exclude a pair: thread key j, which is row r of
// the bits, and the rows from i on.
DEVICE void exclude(const Params& p, int b, float (&s)[1][kN][4], int j, int i,
                    const char* bits = nullptr, int r = 0, bool cut = true) {
  const Entry entry = entry_of(p, hidden(b));
  exclude_others(s[0], [&](int half) {
    u32 seen = ~0u;
    if constexpr (kBits)
      if (bits) seen = Bits<kRowsOf>::of_row(bits, r + 8 * half);
    if (cut) seen &= bits_within<kN>(rows_of_key(entry, hidden(j) + 8 * half, i));
    return seen;
  });
}

// What changes scores of a step but by factors and bounds; `added` is what there is for the keys of
// the warp, from j0 on.
DEVICE void apply_added(const Params& p, int b, float (&s)[1][kN][4], RowOf row_of, int needs, int j0,
                        char* added, int mode) {
  // A branch, or distances would be made before scores are there, and kept in registers.
  if (has(kAlibi) && !p.alibi_slopes) return;
  if constexpr (has(kAlibi) || has(kNumbers))
    apply_options<true>(p, entry_of(p, hidden(b)), s, needs, mode, added, j0, PlaceOf<true>(), row_of);
}

// Numbers of the two rows that a thread's columns 2 n and 2 n + 1 stand for; `rows` are its part's.
struct alignas(8) Pair { float x[2]; };
DEVICE Pair pair_of(const float* rows, int n) {
  return *(const Pair*)(rows + n * 8 + 2 * (threadIdx.x & 3));
}

// S^T to P^T, and dP^T to dS^T, by these numbers of a step's rows.
DEVICE void to_probabilities(const Params& p, float (&s)[kN][4], const float* lse_rows,
                             float log2_unit) {
#pragma unroll
  for (int n = 0; n < kN; n++) {
    const Pair lse = pair_of(lse_rows, n);
#pragma unroll
    for (int e = 0; e < 4; e++) s[n][e] = probable(p, s[n][e], log2_unit, lse.x[e & 1]);
  }
}
DEVICE void to_gradients(float (&dp)[kN][4], const float (&probabilities)[kN][4],
                         const float* delta_rows) {
#pragma unroll
  for (int n = 0; n < kN; n++) {
    const Pair delta = pair_of(delta_rows, n);
#pragma unroll
    for (int e = 0; e < 4; e++)
      dp[n][e] = probabilities[n][e] * (kFactors ? dp[n][e] : dp[n][e] - delta.x[e & 1]);
  }
}
// What dropout leaves of P^T, as a factor; NaN stays.
DEVICE void to_factor_of_kept(u32 (&factor)[kN / 2][4], const float (&s)[kN][4],
                              const Kept<1, kN>& kept) {
  float left[kN][4];
#pragma unroll
  for (int n = 0; n < kN; n++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      left[n][e] = !has(kDropout) || kept(0, n, e) ? s[n][e] : s[n][e] * 0;
  to_factor(factor, left);
}

// A thread's results in the making.
struct Results {
  float dk[kO][4], dv[kO][4];

  DEVICE void clear() {
    ::clear(dk);
    ::clear(dv);
  }
  // dv += P^T dO, dk += dS^T Q, a batch each.
  DEVICE static void add(float (&sum)[kO][4], const u32 (&factor)[kN / 2][4], u64 rows) {
    products_fence();
    multiply_registers(sum, factor, rows, 1);
    products_commit();
  }
  DEVICE static void add(float (&sum)[kO][4], u64 factor, u64 rows) {
    products_fence();
#pragma unroll
    for (int k = 0; k < kBr / 16; k++)
      wgmma<false, true>(sum, factor + row_step<kBc>(k), rows + column_step(k), 1);
    products_commit();
  }
  DEVICE bool odd() const { return !(all_finite(dk) & all_finite(dv)); }

  // A warp's part to memory, through that of the tiles of K and V.
  DEVICE void write(const Params& p, const Work& work, const Part& part, char* tile_k, char* tile_v,
                    int mode) const {
    const int r0 = part.key + warp_number() % 4 * 16, key = work.key0 + r0,
              rows = (int)p.Lk - key;
    const int chunk0 = part.panel * 8;
    if (p.dk.data) {
      round_to_tile<kBc>(shared_address(tile_k), dk, mode == kTaint ? 1 : (float)p.scale, r0,
                         chunk0);
      __syncwarp();
      write_tile<kBc, kO>(tile_k, p.dk, p.dk.at(work.b, work.kv_head) + key * p.dk.row, rows,
                          (int)p.D, r0, chunk0, mode);
    }
    if (p.dv.data) {
      round_to_tile<kBc>(shared_address(tile_v), dv,
                         has(kDropout) && mode != kTaint ? (float)p.keep_scale : 1, r0, chunk0);
      __syncwarp();
      write_tile<kBc, kO>(tile_v, p.dv, p.dv.at(work.b, work.kv_head) + key * p.dv.row, rows,
                          (int)p.Dv, r0, chunk0, mode);
    }
  }
};

// P^T or dS^T of a warp's 16 keys to the tile that the warpgroups share.
DEVICE void store_shared(u32 tile, const u32 (&factor)[kN / 2][4], const Part& part) {
  const int lane = threadIdx.x & 31, r = part.key + warp_number() % 4 * 16 + (lane & 15);
#pragma unroll
  for (int k = 0; k < kN / 2; k++)
    store_blocks(chunk_at<kBc>(tile, r, part.row / 8 + 2 * k + (lane >> 4)), factor[k][0],
                 factor[k][1], factor[k][2], factor[k][3]);
}

// The fast kernels' barriers, and their loading thread: for each tile K and V, then Q and dO block
// by block with their rows' numbers. Where results take the place of K and V, so do the zeros of
// tiles without steps: then kEveryTile waits for its turn.
template <int kStages, bool kEveryTile>
struct Loader {
  u32 k, v, q, o, lse, delta;  // buffers
  Step* steps;                 // of what is in Q's buffers
  u32 k_full, v_full, kv_free, q_full, q_free, o_full, o_free, step_full;

  static constexpr int kBytesSteps = kAdds ? kStages * 16 : 0;
  static constexpr int kBytes = kBytesSteps + (3 + (kAdds ? 5 : 4) * kStages) * 8;

  // `at` is where steps and barriers lie.
  DEVICE Loader(u32 of_k, u32 of_q, u32 of_lse, char* at)
      : k(of_k), v(k + kBytesK), q(of_q), o(q + kStages * kBytesQ), lse(of_lse),
        delta(lse + kStages * kBytesRows), steps((Step*)at),
        k_full(shared_address(at) + kBytesSteps), v_full(k_full + 8), kv_free(v_full + 8),
        q_full(kv_free + 8), q_free(q_full + 8 * kStages), o_full(q_free + 8 * kStages),
        o_free(o_full + 8 * kStages), step_full(o_free + 8 * kStages) {}
  DEVICE void init() const {
    barrier_init(k_full, 1);
    barrier_init(v_full, 1);
    barrier_init(kv_free, kReaders);
    for (int x = 0; x < kStages; x++) {
      barrier_init(q_full + 8 * x, 2);  // a tile and its rows' numbers
      barrier_init(q_free + 8 * x, kReaders + kAdders);
      barrier_init(o_full + 8 * x, 2);
      barrier_init(o_free + 8 * x, kReaders);
      if (kAdds) barrier_init(step_full + 8 * x, 1);
    }
  }
  DEVICE void load(const Params& p, const Queue<kReaders + kAdders>& queue, const TensorMap& map_q,
                   const TensorMap& map_o, const TensorMap& map_k, const TensorMap& map_v) const {
    const int total = (int)(p.tiles * p.Hkv * p.batch);
    int tiles = 0, loaded = 0;
    for (int turn = 0, index = blockIdx.x;; turn++) {
      Work work = {};
      Step step = {};
      if (index < total) {
        work = work_of(p, index);
        step = seek(p, work, first_step(p, work));
      }
      const bool any = exists(p, work, step);
      if (!queue.hand_on(turn, index, total, any)) break;
      if (kEveryTile || any) {
        barrier_wait(kv_free, (tiles & 1) ^ 1);
        tiles++;
      }
      if (!leads()) {
      } else if (any) {
        load_map<kBc, kD>(k, map_k, k_full, work.key0, work.kv_head, work.b);
      } else if (kEveryTile) {
        barrier_arrive(k_full);
        barrier_arrive(v_full);
      }
      bool first = true;
#pragma unroll 1
      for (bool more = any; more; loaded++, first = false) {
        const Step next = seek_after(p, work, step);
        more = !step.last;
        const int stage = loaded % kStages, free = (loaded / kStages & 1) ^ 1;
        const int row0 = step.n * kBr;
        const i64 row = row_start(p, work.b, step.h) + row0;
        barrier_wait(q_free + 8 * stage, free);
        if (leads()) {
          if (kAdds) {
            steps[stage] = step;
            barrier_arrive(step_full + 8 * stage);
          }
          load_map<kBr, kD>(q + stage * kBytesQ, map_q, q_full + 8 * stage, row0, step.h, work.b);
          load_bytes(lse + stage * kBytesRows, (const float*)p.row_lse + row, kBytesRows,
                     q_full + 8 * stage);
          if (first) load_map<kBc, kDv>(v, map_v, v_full, work.key0, work.kv_head, work.b);
        }
        barrier_wait(o_free + 8 * stage, free);
        if (leads()) {
          load_map<kBr, kDv>(o + stage * kBytesO, map_o, o_full + 8 * stage, row0, step.h, work.b);
          load_bytes(delta + stage * kBytesRows, (const float*)p.row_delta + row, kBytesRows,
                     o_full + 8 * stage);
        }
        step = next;
      }
      index = queue.next(p, total);
    }
  }
};
