// The interface between the driver (_cpu.pyx) and the tile kernels.
//
// A kernel set (fa_kernels) is one ISA and one element type: a few functions on tiles and
// the tile sizes that suit them. dispatch.c lists every set that was built; the driver picks
// one, once, and knows nothing else of the machine.
//
// Query rows are the lanes of the vectors. A *panel* is one or two vectors of query rows
// (at most 32), and every tile of scores is stored transposed, [key][panel]:
//
//     S^T[key][lane] = sum_d K[key][d] Q^T[d][lane]       scores:     broadcast K, vector Q^T
//     O[lane][dv]   += sum_key P^T[key][lane] V[key][dv]  accumulate: broadcast P^T, vector V
//
// so the running maximum and sum of a row are lanes too, nothing is reduced across a vector,
// and only Q is ever transposed.
//
// `real` is the accumulation type, float or double. `unit` is what one multiply-add takes
// from memory: a real, or for bf16 dot products a pair of bfloat16 that are neighbours along
// the summed axis (pair = 2). The operand of a product that is broadcast is the "left" one,
// the one loaded as vectors the "right" one.
#pragma once
#include <stddef.h>
#include <stdint.h>

enum { FA_F16, FA_BF16, FA_F32, FA_F64, FA_BOOL, FA_NONE };

#define FA_MAX_PANEL 32

// A row's sum of probabilities is taken in runs of this many keys (a divisor of every tile), and
// the runs' sums added: rounding errors grow with the length of a chain, and are all of one sign
// where scores are alike. A panel's keys start at a multiple of it, so that the runs of a row are
// the same in any company.
#define FA_RUN 32

// Rows of an array in memory: one pointer a row (NULL: the row reads as zeros), and how to
// step along it.
typedef struct {
    const char *const *row;
    ptrdiff_t stride;  // bytes between neighbours of a row
    int32_t rows, cols, dtype;
    int32_t ahead;  // row[r + ahead] is wanted soon after row[r]; 0: none is
} fa_rows;

// Few rows of q take keys as fast as they come from memory, which is as fast as they are asked for:
// rows that many ahead are fetched into the second level of the cache.
#define FA_AHEAD 64

// They are taken FA_FEW_ROWS at a time. While a second group finds v in the cache, nothing is asked of
// memory: strips of so many keys (pairs of keys in bfloat16) keep that short.
#define FA_FEW_ROWS 4
#define FA_STRIP 32

// What turns q.k into a score, in the contract's order. Lane arrays hold a panel of reals.
typedef struct {
    double scale, softcap;  // softcap 0: off
    int32_t terms;          // how many arrays are added: attn_mask, bias
    fa_rows add[2];         // the rows of the panel, from the first key of the tile
    const void *slope;      // lanes: ALiBi slope of each row, or NULL
    const void *centre;     // lanes: i + offset - first key of the tile
    void *gain;             // [key][panel] out: d(softcap)/ds = 1 - tanh^2, or NULL
} fa_adjust;

// The online softmax of a panel. All are lanes.
typedef struct {
    void *row_max;    // largest score so far, -inf at first
    void *row_sum;    // sum of exp(score - row_max) so far, and what its rounding has lost
    void *row_lost;
    void *alpha;      // out: what the row's earlier sums are to be multiplied by
    const void *tile_max;
} fa_softmax_state;

// What an online softmax has come to over some of the keys.
typedef struct {
    void *o;         // [rows][cols], not yet divided by the sum
    void *row_max, *row_sum, *row_lost;  // a real for each row, whole vectors
} fa_partial;

// Rows that are wanted soon.
typedef struct {
    const char *row;
    ptrdiff_t step;
    int32_t rows, bytes;  // rows left; bytes of each
} fa_fetch;

// C[rows][cols] += A[rows][depth] B[depth][cols], after C's rows were multiplied by alpha where
// it is given; strides in units (C's and alpha's in reals).
typedef struct {
    void *c;
    ptrdiff_t ldc;
    const void *a;
    ptrdiff_t a_row, a_depth;
    const void *b;
    ptrdiff_t ldb;
    int32_t rows, cols, depth;  // depth in units; cols a multiple of the vector
    const void *alpha;          // one a row, or NULL
    const int32_t *row_start, *row_end;  // part of each row's depth (the rest is excluded), or NULL
    int32_t raw;                // B's rows are as they lie in memory (fa_kernels.raw), ldb is theirs
    int32_t cold;               // C is likely to be outside the cache
    int32_t fresh;              // accumulate_turned's C is zeros, whatever lies there
    int32_t few;                // few_scores' rows; their chains are the same with and without `raw`
    int32_t strip;              // depth that all rows go through before the next; 0: all
    fa_fetch *fetch;            // of each of these so many rows are fetched for every MR rows of C
    int32_t fetches, fetch_rows;
} fa_product;

// Which pairs of a product take part, for accumulate_selected.
typedef struct {
    const uint32_t *keep;   // bit (lane) of keep[panel number * ld + key]
    ptrdiff_t ld;
    int32_t keys, panel;
    int32_t rows_are_keys;  // the product's rows are keys and its depth queries, or the reverse
    void *scratch;          // depth x cols units
} fa_selection;

// From a tile of scores and of dP = V dO^T to P and dS.
typedef struct {
    void *s, *dp;             // [key][panel] reals; dp becomes t, see below
    const uint32_t *keep;     // excluded pairs give zeros; NULL: none is excluded
    const uint32_t *drop;     // dropout's decisions, NULL: all kept
    double scale, drop_scale; // p = exp(scale s - lse); z = drop_scale where kept
    const void *lse, *shift;  // lanes; shift = D - dlse, so t = p (z dp - shift)
    const void *gain;         // ds = t gain, or NULL
    int32_t rough;            // p and ds, rounded to units, are all that is asked for; backward_plain
                              // takes it so
    void *p, *ds;             // [key][ld units], pairs along the queries
    void *ds_keys;            // [key / pair][ld * pair units], pairs along the keys (pair 2 only)
    ptrdiff_t ld;
    // For backward_plain: the operands of s, D in units.
    const void *k, *q;
    ptrdiff_t ldk;
    int32_t D;
    // backward_plain fetches so many rows of each of these for every few keys.
    fa_fetch *fetch;
    int32_t fetches, fetch_rows;
} fa_backward_tile;

typedef struct {
    const char *type;  // "f32", "f64", "bf16"
    int32_t real_bytes, unit_bytes, pair, lanes;
    int32_t Br, Bc, Br_backward, Bc_backward;  // query rows and keys of a tile
    int32_t MR, NR;                            // register tile of accumulate
    int32_t scores_step;                       // the summed axis of scores is a multiple of it, in units
    int32_t raw;  // the dtype whose rows few rows of q take as they lie, without a copy, or FA_NONE

    // Each thread calls enter before any of the others (but peak), and leave after them; NULL: nothing
    // is to be done.
    void (*enter)(void);
    void (*leave)(void);

    // [cols / pair][panel] units, transposed, padded to scores_step; rows past the given ones are zeros.
    void (*pack_lanes)(void *dst, int panel, const fa_rows *src, int negate);
    // [rows][ld] units, padded with zeros to ld.
    void (*pack_left)(void *dst, ptrdiff_t ld, const fa_rows *src);
    // [rows / pair][ld] units, columns padded with zeros to ld, rows to whole units.
    void (*pack_right)(void *dst, ptrdiff_t ld, const fa_rows *src);
    // dst[i] = src[i] * factor, rounded once to dtype; an exact zero is +0.
    void (*store_row)(char *dst, ptrdiff_t stride, int dtype, const void *src, int n, double factor);
    // a . b, of two rows.
    double (*dot)(const char *a, ptrdiff_t a_stride, int a_dtype,
                  const char *b, ptrdiff_t b_stride, int b_dtype, int n);

    // Scores as `how` finishes them (NULL: the products themselves); -inf where a term is -inf or keep
    // (NULL: nowhere) excludes the pair. tile_max, lanes, out: the largest. in_place: k is no copy, and
    // may have to come from memory.
    void (*scores)(void *s, int panel, const void *k, ptrdiff_t ldk, int in_place, const void *q, int keys,
                   int depth, const uint32_t *keep, const fa_adjust *how, void *tile_max);
    // The same for a few rows of q, half a vector of lanes at most, with the lanes along the summed
    // axis: q as it lies, padded with zeros to whole vectors as k is, which may be raw. Lanes past the
    // rows are zeros.
    void (*few_scores)(void *s, int panel, const void *k, ptrdiff_t ldk, const void *q, ptrdiff_t ldq,
                       int rows, int keys, int depth, int negate, int raw, const uint32_t *keep,
                       const fa_adjust *how, void *tile_max);
    // s -> p = exp(scale (s - row_max)), times z under dropout; returns whether a row_max moved.
    int (*softmax)(void *p, void *s, int panel, int keys, double scale, const fa_softmax_state *st,
                   const uint32_t *drop, double drop_scale);
    void (*accumulate)(const fa_product *x);
    // Sums that are kept turned, [cols][panel = a_depth], and their rows; NULL: none are. pack_turned
    // packs the right operand of so many columns for them, from a multiple of FA_RUN rows on.
    void (*pack_turned)(void *dst, int cols, const fa_rows *src);
    void (*accumulate_turned)(const fa_product *x);
    void (*turn_back)(void *dst, const void *src, int panel, int rows, int cols);
    // x becomes the state over the keys of both; row_max is in units of scale.
    void (*merge)(const fa_partial *x, const fa_partial *y, int rows, int cols, double scale);
    // The same bits where all is finite, but an excluded pair's right operand is not read.
    void (*accumulate_selected)(const fa_product *x, const fa_selection *which);
    // Whether a right operand / a row of reals holds no NaN and no infinity.
    int (*right_finite)(const void *b, ptrdiff_t ld, int rows, int cols);
    int (*row_finite)(const void *x, int n);
    // Returns whether a score was -inf: such a pair is excluded too, though keep does not say so.
    int (*backward_tile)(const fa_backward_tile *x, int panel, int keys);
    // scores(s) and backward_tile in one, without keep, drop and gain; t is not left in dp.
    int (*backward_plain)(const fa_backward_tile *x, int panel, int keys);
    // sum[i] += x[i], in float64: a bias of few elements is the sum of very many
    void (*add_tile)(double *sum, const void *x, int64_t n);
    // sum[lane] += sum over the keys of t |centre - key|
    void (*add_distances)(void *sum, const void *t, int panel, int keys, const void *centre);

    // Cuts keys [start, end) by the runs of FA_RUN at both ends where all is -inf.
    void (*cut_neg_inf)(const fa_rows *x, int *start, int *end);
    // Clears the bits of pairs where a tile of scores is -inf / a bool mask is False.
    void (*keep_above_neg_inf)(uint32_t *keep, const void *tile, int panel, int keys);
    void (*keep_true)(uint32_t *keep, const fa_rows *mask);
    // The keys, in units, that each of FA_MAX_PANEL rows sees lie within [start, end); end is 0 where it
    // sees none.
    void (*seen_units)(int32_t *start, int32_t *end, const uint32_t *keep, int keys, int rows);
    // Dropout's decisions for keys [key0, key0 + keys), key0 % 4 == 0.
    void (*dropout)(uint32_t *bits, int panel, int keys, int64_t key0, const uint32_t *row,
                    const uint32_t *head, uint32_t batch, uint64_t seed, uint64_t threshold);

    // Multiply-adds on registers alone, for the peak that benchmarks are held against;
    // returns the floating point operations done.
    double (*peak)(int64_t iterations, double *sink);
} fa_kernels;

// What one machine can run: a kernel set for each element type.
typedef struct {
    const char *name, *requires;
    const fa_kernels *f32, *f64, *bf16;  // bf16 NULL: bfloat16 is widened to f32
} fa_isa;

// Every ISA that was built, lowest rank first.
extern const fa_isa fa_isas[];
extern const int fa_isa_count;
// What this machine lacks for it; "" if it can run here.
const char *fa_isa_missing(const char *name);
// Why it is not to be chosen by itself though it can run here; "" if it may.
const char *fa_isa_slow(const char *name);

// The n bytes at p are about to be written: a store that misses the cache holds up those behind it.
static inline void fa_fetch_to_write(const char *p, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i += 64) __builtin_prefetch(p + i, 1);
}

// One thread tells the others how far it is, and they wait for it.
static inline void fa_publish(int64_t *progress, int64_t value) {
    __atomic_store_n(progress, value, __ATOMIC_RELEASE);
}
void fa_wait_above(const int64_t *progress, int64_t value);
// The next item of a list that several threads work off, in order.
static inline int64_t fa_next(int64_t *following) {
    return __atomic_fetch_add(following, 1, __ATOMIC_RELAXED);
}

// Whether a forked child can use OpenMP's threads. LLVM's runtime starts new ones; GCC's waits
// for the old.
#ifdef __clang__
#define FA_POOL_SURVIVES_FORK 1
#else
#define FA_POOL_SURVIVES_FORK 0
#endif
