// The part of OpenMP that _cpu.pyx calls, for a build without it (FASTATTN_NO_OPENMP=1): there is
// one thread.
#pragma once
#include <time.h>

static inline int omp_get_max_threads(void) { return 1; }
static inline int omp_get_num_procs(void) { return 1; }
static inline int omp_get_thread_num(void) { return 0; }
static inline double omp_get_wtime(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + 1e-9 * now.tv_nsec;
}
