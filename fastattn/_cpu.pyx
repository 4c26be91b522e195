"""The CPU backend: from a Problem to tiles, from tiles to kernels.

Data flows one way:

    forward/backward(problem, arrays)   Python objects -> one C struct, Job; threads; workspaces
      forward_block / backward_block    one block of query rows (OpenMP hands these out)
        tile_mask                       which pairs of a tile take part: full, partial or empty
        fa_kernels (kernels.h)          arithmetic on one tile, for the ISA chosen

    forward    parallel over (batch, kv head, block of rows), any order; where a head is one block,
               over chunks of its keys too, whose states are merged in the chunks' order
    backward   parallel over (batch, kv head); heads left over are shared by all threads, block by
               block, each adding to a tile of dK, dV after the block before it has (a wavefront):
               the sums have one order whatever the number of threads

Nothing here or below checks an argument (_problem.py did), and everything between the two
Python-level functions runs without the GIL.
"""
import math
import os

import numpy

cimport openmp
cimport numpy as cnp
from cython.parallel cimport prange
from libc.math cimport ceil, exp, ldexp, log, INFINITY, NAN
from libc.stdint cimport INT64_MAX, SIZE_MAX, int32_t, int64_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

cnp.import_array()


cdef extern from "_cpu_kernels/kernels.h" nogil:
    enum:
        FA_F16, FA_BF16, FA_F32, FA_F64, FA_BOOL, FA_NONE
        FA_RUN, FA_AHEAD, FA_FEW_ROWS, FA_STRIP, FA_MAX_PANEL
    ctypedef struct fa_rows:
        const char *const *row
        ptrdiff_t stride
        int32_t rows, cols, dtype, ahead
    ctypedef struct fa_adjust:
        double scale, softcap
        int32_t terms
        fa_rows add[2]
        const void *slope
        const void *centre
        void *gain
    ctypedef struct fa_softmax_state:
        void *row_max
        void *row_sum
        void *row_lost
        void *alpha
        const void *tile_max
    ctypedef struct fa_partial:
        void *o
        void *row_max
        void *row_sum
        void *row_lost
    ctypedef struct fa_fetch:
        const char *row
        ptrdiff_t step
        int32_t rows, bytes
    ctypedef struct fa_product:
        void *c
        ptrdiff_t ldc
        const void *a
        ptrdiff_t a_row, a_depth
        const void *b
        ptrdiff_t ldb
        int32_t rows, cols, depth
        const void *alpha
        const int32_t *row_start
        const int32_t *row_end
        int32_t raw, cold, fresh, few, strip
        fa_fetch *fetch
        int32_t fetches, fetch_rows
    ctypedef struct fa_selection:
        const uint32_t *keep
        ptrdiff_t ld
        int32_t keys, panel, rows_are_keys
        void *scratch
    ctypedef struct fa_backward_tile:
        void *s
        void *dp
        const uint32_t *keep
        const uint32_t *drop
        double scale, drop_scale
        const void *lse
        const void *shift
        const void *gain
        int32_t rough
        void *p
        void *ds
        void *ds_keys
        ptrdiff_t ld
        const void *k
        const void *q
        ptrdiff_t ldk
        int32_t D
        fa_fetch *fetch
        int32_t fetches, fetch_rows
    ctypedef struct fa_kernels:
        const char *type
        int32_t real_bytes, unit_bytes, pair, lanes, Br, Bc, Br_backward, Bc_backward, MR, NR, raw
        int32_t scores_step
        void (*enter)() noexcept nogil
        void (*leave)() noexcept nogil
        void (*pack_turned)(void *, int, const fa_rows *) noexcept nogil
        void (*accumulate_turned)(const fa_product *) noexcept nogil
        void (*turn_back)(void *, const void *, int, int, int) noexcept nogil
        void (*pack_lanes)(void *, int, const fa_rows *, int) noexcept nogil
        void (*pack_left)(void *, ptrdiff_t, const fa_rows *) noexcept nogil
        void (*pack_right)(void *, ptrdiff_t, const fa_rows *) noexcept nogil
        void (*store_row)(char *, ptrdiff_t, int, const void *, int, double) noexcept nogil
        double (*dot)(const char *, ptrdiff_t, int, const char *, ptrdiff_t, int, int) noexcept nogil
        void (*scores)(void *, int, const void *, ptrdiff_t, int, const void *, int, int, const uint32_t *,
                       const fa_adjust *, void *) noexcept nogil
        void (*few_scores)(void *, int, const void *, ptrdiff_t, const void *, ptrdiff_t, int, int, int,
                           int, int, const uint32_t *, const fa_adjust *, void *) noexcept nogil
        int (*softmax)(void *, void *, int, int, double, const fa_softmax_state *,
                       const uint32_t *, double) noexcept nogil
        void (*accumulate)(const fa_product *) noexcept nogil
        void (*merge)(const fa_partial *, const fa_partial *, int, int, double) noexcept nogil
        void (*accumulate_selected)(const fa_product *, const fa_selection *) noexcept nogil
        int (*right_finite)(const void *, ptrdiff_t, int, int) noexcept nogil
        int (*row_finite)(const void *, int) noexcept nogil
        int (*backward_tile)(const fa_backward_tile *, int, int) noexcept nogil
        int (*backward_plain)(const fa_backward_tile *, int, int) noexcept nogil
        void (*add_tile)(double *, const void *, int64_t) noexcept nogil
        void (*add_distances)(void *, const void *, int, int, const void *) noexcept nogil
        void (*cut_neg_inf)(const fa_rows *, int *, int *) noexcept nogil
        void (*keep_above_neg_inf)(uint32_t *, const void *, int, int) noexcept nogil
        void (*keep_true)(uint32_t *, const fa_rows *) noexcept nogil
        void (*seen_units)(int32_t *, int32_t *, const uint32_t *, int, int) noexcept nogil
        void (*dropout)(uint32_t *, int, int, int64_t, const uint32_t *, const uint32_t *,
                        uint32_t, uint64_t, uint64_t) noexcept nogil
        double (*peak)(int64_t, double *) noexcept nogil
    ctypedef struct fa_isa:
        const char *name
        const char *requires
        const fa_kernels *f32
        const fa_kernels *f64
        const fa_kernels *bf16
    const fa_isa *fa_isas
    int fa_isa_count
    const char *fa_isa_missing(const char *)
    const char *fa_isa_slow(const char *)
    void fa_fetch_to_write(const char *, ptrdiff_t)
    void fa_publish(int64_t *, int64_t)
    void fa_wait_above(const int64_t *, int64_t)
    int64_t fa_next(int64_t *)
    bint POOL_SURVIVES_FORK "FA_POOL_SURVIVES_FORK"

cdef extern from "build_info.h":  # written by setup.py
    const char *FASTATTN_COMPILER
    const char *FASTATTN_FLAGS
    const char *FASTATTN_OPENMP

cdef extern from "<stdlib.h>" nogil:
    int posix_memalign(void **, size_t, size_t)


include "_cpu_job.pxi"
include "_cpu_forward.pxi"
include "_cpu_backward.pxi"


# ---- the two functions of a backend --------------------------------------------------------------

def forward(problem, cnp.ndarray out not None, cnp.ndarray lse not None):
    """Fill out, of q's dtype or float32, and lse, of the accumulation dtype; any strides."""
    cdef Job job
    cdef char *memory = NULL
    cdef Team team
    cdef int64_t items
    cdef int t
    fill_job(&job, problem, False)
    set_array(&job.out, out, job.lead_dims)
    set_array(&job.lse, lse, job.lead_dims)
    job.lse.col = 0
    items = job.batch * job.Hkv * job.blocks * job.chunks
    if items == 0:
        return
    team.size = team_size(&job, problem.num_threads, items)
    team.spaces = make_workspaces(&job, team.size, partial_bytes(&job), &memory)
    with nogil:
        for t in range(team.size if job.chunks > 1 else 0):
            progress_of(team.spaces + t)[0] = 0
        run(&job, team.spaces, team.size, items, forward_block, &team)
        free(memory)


def backward(problem, cnp.ndarray dout not None, cnp.ndarray out not None,
             cnp.ndarray lse not None, dlse, dq, dk, dv, dbias, dsinks, dalibi_slopes):
    """Fill the gradients that are not None; see fastattn._backends.Backend."""
    cdef Job job
    fill_job(&job, problem, True)
    set_array(&job.dout, dout, job.lead_dims)
    set_array(&job.out, out, job.lead_dims)
    set_array(&job.lse, lse, job.lead_dims)
    set_optional(&job.dlse, dlse, job.lead_dims)
    set_optional(&job.dq, dq, job.lead_dims)
    set_optional(&job.dk, dk, job.lead_dims)
    set_optional(&job.dv, dv, job.lead_dims)
    rows_shape = job.Hq, job.batch * job.Lq  # a row of sums for each head: one order, whatever Hq
    sink_sums = slope_sums = None
    if dsinks is not None:
        sink_sums = numpy.zeros(rows_shape)
        job.dsink_rows = <double *> cnp.PyArray_DATA(<cnp.ndarray> sink_sums)
    if dalibi_slopes is not None:
        slope_sums = numpy.zeros(rows_shape)
        job.dslope_rows = <double *> cnp.PyArray_DATA(<cnp.ndarray> slope_sums)
    if any(gradient is not None for gradient in (dq, dk, dv, dsinks, dalibi_slopes)):
        backward_heads(&job, problem.num_threads)
    with numpy.errstate(all="ignore"):  # a NaN or an infinity is a result, not news
        if dsinks is not None:
            dsinks[...] = sink_sums.sum(axis=1)
        if dalibi_slopes is not None:
            dalibi_slopes[...] = slope_sums.sum(axis=1)
    if dbias is not None:
        set_array(&job.dbias, dbias, job.lead_dims)
        axes = list(zip(dbias.shape, dbias.strides))[:dbias.ndim - 2]
        backward_bias(&job, problem.num_threads, axes)


# ---- which kernels, how many threads -------------------------------------------------------------

cdef const fa_isa *isa_in_use = NULL

cdef const fa_isa *find_isa(name, who) except NULL:
    cdef int i
    for i in range(fa_isa_count):
        if fa_isas[i].name.decode() == name:
            missing = fa_isa_missing(fa_isas[i].name).decode()
            if missing:
                raise RuntimeError(
                    f"{who} is {name!r}, which cannot run here: this machine lacks {missing}")
            return &fa_isas[i]
    names = ", ".join(row["name"] for row in isa_table())
    raise ValueError(f"{who} is {name!r}; expected one of: {names}")

cdef const fa_isa *isa() except NULL:
    """FASTATTN_CPU_ISA, else the highest that runs here and is not slow; looked up once."""
    global isa_in_use
    cdef int i
    if isa_in_use == NULL:
        forced = os.environ.get("FASTATTN_CPU_ISA")
        if forced:
            isa_in_use = find_isa(forced, "FASTATTN_CPU_ISA")
        else:
            for i in range(fa_isa_count):
                if fa_isa_missing(fa_isas[i].name)[0] == 0 and fa_isa_slow(fa_isas[i].name)[0] == 0:
                    isa_in_use = &fa_isas[i]
    return isa_in_use

cdef const fa_kernels *kernels_for(str dtype) except NULL:
    cdef const fa_isa *chosen = isa()
    if dtype == "float64":
        return chosen.f64
    if dtype == "bfloat16" and chosen.bf16 != NULL:
        return chosen.bf16
    return chosen.f32

def current_isa():
    """The name of the ISA whose kernels run; an error for a FASTATTN_CPU_ISA that cannot be."""
    return isa().name.decode()

def use_isa(name):
    """Run the kernels of another ISA from now on; returns the name of the one before."""
    global isa_in_use
    before = current_isa()
    isa_in_use = find_isa(name, "name")
    return before

def isa_table():
    """Every ISA that was built, lowest rank first: name, requires, missing ("" if it runs here),
    slow (why it is not chosen by itself, or "")."""
    return [dict(name=fa_isas[i].name.decode(), requires=fa_isas[i].requires.decode(),
                 missing=fa_isa_missing(fa_isas[i].name).decode(),
                 slow=fa_isa_slow(fa_isas[i].name).decode()) for i in range(fa_isa_count)]

def kernel_table():
    """Every kernel set: isa, dtype, and its tile sizes."""
    rows = []
    cdef int i
    for i in range(fa_isa_count):
        for dtype in ("float16", "bfloat16", "float32", "float64"):
            name = fa_isas[i].name.decode()
            rows.append(dict(isa=name, dtype=dtype, **kernel_row(&fa_isas[i], dtype)))
    return rows

cdef dict kernel_row(const fa_isa *of, dtype):
    cdef const fa_kernels *kr = of.f64 if dtype == "float64" else of.f32
    if dtype == "bfloat16" and of.bf16 != NULL:
        kr = of.bf16
    return dict(arithmetic=kr.type.decode(), lanes=kr.lanes, Br=kr.Br, Bc=kr.Bc,
                Br_backward=kr.Br_backward, Bc_backward=kr.Bc_backward, MR=kr.MR, NR=kr.NR)

def build_info():
    """The compiler, its flags for each ISA, and those for OpenMP ("": built without)."""
    return dict(compiler=FASTATTN_COMPILER.decode(), openmp=FASTATTN_OPENMP.decode(),
                flags=dict(line.split(": ", 1) for line in FASTATTN_FLAGS.decode().split("\n")))


cdef int threads_set = 0
cdef bint in_forked_child = False

def _after_fork_in_child():
    # libgomp's threads are not there any more, and it would wait for them for ever.
    global in_forked_child
    in_forked_child = not POOL_SURVIVES_FORK

os.register_at_fork(after_in_child=_after_fork_in_child)

def forked():
    """Whether this process was forked from one that had loaded the package: it has one thread."""
    return in_forked_child

def _quota():
    """CPUs that the container's quota (cgroup v2 or v1) allows, or infinity."""
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
    except (OSError, ValueError):
        try:
            with open("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") as file:
                quota = file.read().strip()
            with open("/sys/fs/cgroup/cpu/cpu.cfs_period_us") as file:
                period = file.read()
        except OSError:
            return math.inf
    if quota in ("max", "-1"):
        return math.inf
    return max(1, math.ceil(int(quota) / int(period)))

cdef double quota_at_import = _quota()

cdef int num_threads_for(requested) except -1:
    if in_forked_child:
        return 1
    if requested is not None:
        return requested
    return get_num_threads()

cpdef int get_num_threads() except -1:
    """The number of threads of a call that does not say: set_num_threads, else OpenMP's maximum
    now, capped by the process's affinity and the container's quota."""
    if in_forked_child:
        return 1
    if threads_set:
        return threads_set
    cdef double cpus = min(openmp.omp_get_num_procs(), quota_at_import)
    return <int> max(1, min(openmp.omp_get_max_threads(), cpus))

def thread_limits():
    """What get_num_threads goes by: set (0: nothing), openmp, affinity, quota (may be infinity)."""
    return dict(set=threads_set, openmp=openmp.omp_get_max_threads(),
                affinity=openmp.omp_get_num_procs(), quota=quota_at_import)

def set_num_threads(int n):
    """Threads of the calls to come; 0 goes back to OpenMP's own number."""
    global threads_set
    threads_set = n


def peak_flops(str dtype, int num_threads, double seconds):
    """Floating point operations per second of multiply-adds (dot products for "bfloat16" where the
    ISA in use has them) on registers alone, all threads together."""
    cdef const fa_kernels *kr = kernels_for(dtype)
    cdef int64_t iterations = 200000
    cdef double flops = 0, start, end, sink = 0
    cdef int t
    num_threads = num_threads_for(num_threads)
    with nogil:
        start = openmp.omp_get_wtime()
        end = start
        while end - start < seconds:
            for t in prange(num_threads, num_threads=num_threads, schedule="static", chunksize=1):
                flops += peak_once(kr, iterations)
            end = openmp.omp_get_wtime()
    return flops / (end - start)

cdef double peak_once(const fa_kernels *kr, int64_t iterations) noexcept nogil:
    cdef double sink = 0
    return kr.peak(iterations, &sink) + 0 * sink
