#ifndef VG_H
#define VG_H

#if !defined(__linux__)
#error "the vnnigen runtime needs Linux (futex, mmap, pthreads)"
#endif

#include <stddef.h>
#include <stdint.h>

#include "api.h"

/* Scratch of the calling thread, see scratch.c. NULL only when memory is short. */
void *vg_scratch_acquire(int64_t bytes);
void vg_scratch_release(void *scratch);

/* What one region of parallel work does: fn(args, i, scratch) for i in [0, count). */
typedef struct {
    vg_fn fn;
    const int64_t *args;
    int64_t count;
    int64_t scratch_bytes;
    const void *tile_config;
} vg_region;

/* 1: this caller has the pool until vg_pool_leave(); 0: somebody else has it. */
int vg_pool_enter(void);
void vg_pool_leave(void);
/* Run `r` on the caller (which brings its own scratch) and up to nthreads - 1 threads of the pool. */
void vg_pool_run(const vg_region *r, void *scratch, int nthreads);

/* Parts of a call, see call.c: a caller holds `scratch` of vg_kernel_scratch() bytes, the native MXCSR and, for more
 * than one thread, the pool. */
int vg_kernel_well_formed(const vg_kernel *k, int64_t n_dyn);
int64_t vg_kernel_scratch(const vg_kernel *k);
void vg_run_launches(const vg_kernel *k, const int64_t *args, void *scratch, int nthreads);

/* Tiles of the calling thread, see tiles.c. Load a configuration (64 bytes), if it is another than the present. */
void vg_tiles_load(const void *config);
void vg_tiles_release(void);
/* Before each unit of a launch; before each, as a nested call in the unit before may have released the tiles. */
static inline void vg_tiles_enter(const void *config) {
    if (config != NULL) vg_tiles_load(config);
}

/* Round to nearest, all exceptions masked, no flush to zero: what generated code expects. */
#define VG_MXCSR 0x1F80u

#if defined(__x86_64__)
#include <xmmintrin.h>
static inline uint32_t vg_mxcsr_enter(void) {
    uint32_t saved = _mm_getcsr();
    if (saved != VG_MXCSR) _mm_setcsr(VG_MXCSR);
    return saved;
}
/* Always written back: kernels raise sticky flags that the caller must not see. */
static inline void vg_mxcsr_leave(uint32_t saved) { _mm_setcsr(saved); }
static inline void vg_pause(void) { _mm_pause(); }
#else
static inline uint32_t vg_mxcsr_enter(void) { return 0; }
static inline void vg_mxcsr_leave(uint32_t saved) { (void)saved; }
#if defined(__aarch64__)
static inline void vg_pause(void) { __asm__ volatile("isb" ::: "memory"); }
#else
static inline void vg_pause(void) { __asm__ volatile("" ::: "memory"); }
#endif
#endif

#endif
