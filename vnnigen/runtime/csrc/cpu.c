/* What this processor can do, and whether the operating system lets us. */
#include "vg.h"

#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <cpuid.h>

#define ARCH_REQ_XCOMP_PERM 0x1023 /* <asm/prctl.h>, absent from older headers */
#define XFEATURE_XTILEDATA 18

int vg_is_x86(void) { return 1; }

void vg_cpuid(uint32_t leaf, uint32_t subleaf, uint32_t out[4]) {
    out[0] = out[1] = out[2] = out[3] = 0;
    /* A leaf beyond the largest answers with another leaf's data on Intel (SDM vol. 2, CPUID). */
    if ((uint32_t)__get_cpuid_max(leaf & 0x80000000u, NULL) < leaf) return;
    __cpuid_count(leaf, subleaf, out[0], out[1], out[2], out[3]);
}

uint64_t vg_xgetbv(uint32_t index) {
    uint32_t r[4], lo, hi;
    vg_cpuid(1, 0, r);
    if (!(r[2] >> 27 & 1)) return 0; /* no OSXSAVE: XGETBV would fault */
    /* By bytes: assemblers and compilers know the mnemonic only with -mxsave. */
    __asm__ volatile(".byte 0x0f, 0x01, 0xd0" : "=a"(lo), "=d"(hi) : "c"(index));
    return (uint64_t)hi << 32 | lo;
}

int vg_amx_permission(void) {
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

uint32_t vg_get_mxcsr(void) { return _mm_getcsr(); }
void vg_set_mxcsr(uint32_t value) { _mm_setcsr(value & 0xFFFFu); /* a reserved bit would fault */ }

#else

int vg_is_x86(void) { return 0; }
void vg_cpuid(uint32_t leaf, uint32_t subleaf, uint32_t out[4]) {
    (void)leaf, (void)subleaf;
    out[0] = out[1] = out[2] = out[3] = 0;
}
uint64_t vg_xgetbv(uint32_t index) { return (void)index, 0; }
int vg_amx_permission(void) { return 0; }
uint32_t vg_get_mxcsr(void) { return 0; }
void vg_set_mxcsr(uint32_t value) { (void)value; }

#endif
