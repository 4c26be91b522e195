// Arrays of any strides and alignment, as the host describes them, and their tiles in shared
// memory.

enum Access : i64 { kBytes, kElements, kVectors };  // what an address may be loaded by

// One array (..., heads, rows, columns); strides in bytes. The leading axes are one axis `batch`,
// or, where no single stride says where its entries are, a table of their offsets.
struct Array {
  char* data;
  const i64* batches;
  i64 batch, head, row, column, access;

  DEVICE char* at(int b, int h) const {
    return data + (batches ? batches[b] : b * batch) + h * head;
  }
};

// An element at any address.
template <class T>
DEVICE T load(const char* at, i64 access) {
  if (access != kBytes) return *(const T*)at;
  T x;
  for (int i = 0; i < (int)sizeof(T); i++) ((char*)&x)[i] = at[i];
  return x;
}
template <class T>
DEVICE void store(char* at, T x, i64 access) {
  if (access != kBytes) {
    *(T*)at = x;
  } else {
    for (int i = 0; i < (int)sizeof(T); i++) at[i] = ((const char*)&x)[i];
  }
}

// Arrays that may be of any float type: masks, biases and their gradients.
enum Kind : i64 { kBool, kF16, kBf16, kF32, kF64 };

DEVICE Acc load_number(const char* at, i64 access, i64 kind) {
  switch (kind) {
    case kF16: return (Acc)widen(load<f16>(at, access));
    case kBf16: return (Acc)widen(load<bf16>(at, access));
    case kF32: return (Acc)load<float>(at, access);
    default: return (Acc)load<double>(at, access);
  }
}
template <class T>
DEVICE void store_as(char* at, double x, i64 access) {
  T y;
  narrow(y, sizeof(Acc) == 4 ? (double)(float)x : x);
  store(at, y, access);
}
DEVICE void store_number(char* at, double x, i64 access, i64 kind) {
  switch (kind) {
    case kF16: return store_as<f16>(at, x, access);
    case kBf16: return store_as<bf16>(at, x, access);
    case kF32: return store_as<float>(at, x, access);
    default: return store_as<double>(at, x, access);
  }
}

// ---------------------------------------------------------------- tiles

// A tile's rows are 16 bytes (float64: 32) apart from a multiple of 64 bytes, so that eight rows of
// a matrix load lie in different banks.
constexpr int pitch_of(int columns) {
  return columns + (sizeof(Tile) == 8 ? 4 : 16 / (int)sizeof(Tile));
}

// Zeros if not valid, whatever `from` is: a copy of no bytes reads nothing.
DEVICE void copy_16_bytes(void* to, const void* from, bool valid) {
#if kArch >= 80
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"((u32)__cvta_generic_to_shared(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
#else
  *(uint4*)to = valid ? *(const uint4*)from : make_uint4(0, 0, 0, 0);
#endif
}
DEVICE void copy_4_bytes(void* to, const void* from, bool valid) {
#if kArch >= 80
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
               :: "r"((u32)__cvta_generic_to_shared(to)), "l"(from), "r"(valid ? 4 : 0) : "memory");
#else
  *(u32*)to = valid ? *(const u32*)from : 0;
#endif
}
DEVICE void copies_commit() {
#if kArch >= 80
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int kPending>
DEVICE void copies_wait() {
#if kArch >= 80
  asm volatile("cp.async.wait_group %0;" :: "n"(kPending) : "memory");
#endif
}

// Tiles are loaded by kBy threads: those of the block, or of each warp for a tile of its own.
template <int kBy>
DEVICE int thread_of() { return kBy == kThreads ? threadIdx.x : threadIdx.x % kBy; }
template <int kBy>
DEVICE void wait_for_threads() {
  if (kBy == 32) __syncwarp();
  else __syncthreads();
}

// A thread loads what it may later split on its own.
constexpr int kCopies = kInHalves ? 2 : 1;

// kRows rows of `width` columns of an array; everything else in the tile becomes zero. row_at(r)
// gives the address of row r's first column, or null.
template <int kRows, int kColumns, int kBy = kThreads, class RowAt>
DEVICE void load_rows(Tile* tile, const Array& array, int width, RowAt row_at) {
  constexpr int kChunk = kCopies * 16 / sizeof(Tile), kChunks = kColumns / kChunk;
  const bool copies = sizeof(Elem) == sizeof(Tile) && array.access == kVectors;
#pragma unroll 1
  for (int x = thread_of<kBy>(); x < kRows * kChunks; x += kBy) {
    const int r = x / kChunks, c = x % kChunks * kChunk;
    const char* const row = row_at(r);
    Tile* const to = tile + r * pitch_of(kColumns) + c;
    if (copies) {
#pragma unroll
      for (int i = 0; i < kChunk; i += kChunk / kCopies)
        copy_16_bytes(to + i, row + (c + i) * (int)sizeof(Elem), row && c + i < width);
    } else {
#pragma unroll 1
      for (int i = 0; i < kChunk; i++) {
        Elem value = {};
        if (row && c + i < width) value = load<Elem>(row + (c + i) * array.column, array.access);
        to[i] = convert<Tile>(value);
      }
    }
  }
}

// The same of rows that are a stride apart, `row` being the first and `rows` how many there are.
template <int kRows, int kColumns, int kBy = kThreads>
DEVICE void load_tile(Tile* tile, const Array& array, const char* row, int rows, int width) {
  constexpr int kChunk = kCopies * 16 / sizeof(Tile), kChunks = kColumns / kChunk;
  if constexpr (sizeof(Elem) == sizeof(Tile) && kBy % kChunks == 0 && kRows * kChunks % kBy == 0) {
    if (array.access == kVectors) {  // a thread's chunks are one below the other
      constexpr int kStride = kBy / kChunks;
      const int r = thread_of<kBy>() / kChunks, c = thread_of<kBy>() % kChunks * kChunk;
      const char* from = row + r * array.row + c * (int)sizeof(Elem);
      Tile* const to = tile + r * pitch_of(kColumns) + c;
      const int limit = c < width ? rows - r : 0, limit2 = c + kChunk / kCopies < width ? limit : 0;
#pragma unroll
      for (int x = 0; x < kRows / kStride; x++) {
        Tile* const chunk = to + x * kStride * pitch_of(kColumns);
        copy_16_bytes(chunk, from, x * kStride < limit);
        if (kCopies == 2) copy_16_bytes(chunk + kChunk / 2, from + 16, x * kStride < limit2);
        from += kStride * array.row;
      }
      return;
    }
  }
  load_rows<kRows, kColumns, kBy>(
      tile, array, width, [&](int r) { return r < rows ? row + r * array.row : nullptr; });
}

// What a tile's numbers become where a block is computed again; see forward.cu.
enum Mode { kUsual, kClean, kScaled, kTaint };

// kScaled: room for sums of the largest numbers; those of float16 never need any.
template <class T> constexpr float kUpOf = 0x1p40f;
template <> constexpr float kUpOf<f16> = 1;
constexpr float kUp = kUpOf<Elem>, kDown = 1 / kUp;

// Take what is not finite out of a tile, or (kTaint) leave 1 where it was and 0 elsewhere.
template <class T>
DEVICE void sanitize(T& x, int mode) {
  const auto value = widen(x);
  const bool is_finite = finite(x);
  narrow(x, mode == kTaint ? (is_finite ? 0 : 1)
            : is_finite    ? value * (mode == kScaled ? kDown : 1)
                           : 0);
}
template <int kRows, int kColumns, int kBy = kThreads>
DEVICE void sanitize(Tile* tile, int mode) {
  wait_for_threads<kBy>();
#pragma unroll 1
  for (int x = thread_of<kBy>(); x < kRows * kColumns; x += kBy)
    sanitize(tile[x / kColumns * pitch_of(kColumns) + x % kColumns], mode);
  wait_for_threads<kBy>();
}
