// The table of everything that exists on the CPU, and what this machine can run of it.
// Compiled with baseline flags only. A new ISA: its <isa>_<type>.c files, its flags in
// setup.py, one row here and one line in fa_isa_missing.
#include <sched.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include "kernels.h"

extern const fa_kernels fa_portable_f32, fa_portable_f64, fa_avx2_f32, fa_avx2_f64, fa_avx512_f32,
    fa_avx512_f64, fa_avx512_bf16_bf16, fa_amx_bf16;

const fa_isa fa_isas[] = {
    {"portable", "nothing beyond the baseline", &fa_portable_f32, &fa_portable_f64, 0},
#ifdef FASTATTN_HAVE_AVX2
    {"avx2", "AVX2, FMA, F16C", &fa_avx2_f32, &fa_avx2_f64, 0},
#endif
#ifdef FASTATTN_HAVE_AVX512
    {"avx512", "AVX-512 F, DQ, BW, VL", &fa_avx512_f32, &fa_avx512_f64, 0},
#endif
#ifdef FASTATTN_HAVE_AVX512_BF16
    {"avx512_bf16", "AVX-512 F, DQ, BW, VL, BF16", &fa_avx512_f32, &fa_avx512_f64, &fa_avx512_bf16_bf16},
#endif
#ifdef FASTATTN_HAVE_AMX
    {"amx", "AVX-512 F, DQ, BW, VL, BF16, AMX TILE, BF16", &fa_avx512_f32, &fa_avx512_f64, &fa_amx_bf16},
#endif
};
const int fa_isa_count = sizeof fa_isas / sizeof *fa_isas;

// Linux gives a process the tiles' registers, 8 KiB a thread, when it asks for them (since 5.16).
#if defined(__x86_64__)
static int tiles_permitted(void) {
#ifdef __linux__
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return 0;
#endif
}
#endif

// __builtin_cpu_supports asks the operating system too: a feature whose registers it does
// not save is reported as absent.
const char *fa_isa_missing(const char *name) {
    if (!strcmp(name, "portable")) return "";
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2")) return "AVX2";
    if (!__builtin_cpu_supports("fma")) return "FMA";
    unsigned eax, ebx, ecx, edx;  // __builtin_cpu_supports has not always known F16C
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_F16C)) return "F16C";
    if (!strcmp(name, "avx2")) return "";
    if (!__builtin_cpu_supports("avx512f")) return "AVX-512 F";
    if (!__builtin_cpu_supports("avx512dq")) return "AVX-512 DQ";
    if (!__builtin_cpu_supports("avx512bw")) return "AVX-512 BW";
    if (!__builtin_cpu_supports("avx512vl")) return "AVX-512 VL";
    if (!strcmp(name, "avx512")) return "";
    if (!__builtin_cpu_supports("avx512bf16")) return "AVX-512 BF16";
    if (!strcmp(name, "avx512_bf16")) return "";
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx & bit_AMX_TILE) || !(edx & bit_AMX_BF16))
        return "AMX";
    if (!tiles_permitted()) return "the operating system's permission to use AMX";
    if (!strcmp(name, "amx")) return "";
#endif
    return "a kernel set for this architecture";
}

// Sapphire Rapids issues bf16 dot products at half the rate, in operations, of its float32
// multiply-adds (64 against 134 GFLOP/s a core), so that widening to float32 is 1.1 to 1.8 times
// as fast; Zen 4 and 5 issue them at twice the rate.
const char *fa_isa_slow(const char *name) {
#if defined(__x86_64__)
    if (!strcmp(name, "avx512_bf16") && __builtin_cpu_is("intel"))
        return "bf16 dot products are slower than float32 arithmetic on this processor";
#endif
    (void)name;
    return "";
}

// Spins for about a microsecond at a time: the other thread is a tile away, unless there are
// more threads than cores.
void fa_wait_above(const int64_t *progress, int64_t value) {
    for (int spins = 0; __atomic_load_n(progress, __ATOMIC_ACQUIRE) <= value; spins++)
        if (spins == 1000) {
            sched_yield();
            spins = 0;
        }
}
