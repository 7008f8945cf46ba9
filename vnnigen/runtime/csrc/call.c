/* The way from Python into generated code. */
#include "vg.h"

#include <string.h>

static void run_here(const vg_launch *l, const int64_t *args, void *scratch) {
    for (int64_t i = 0; i < l->count; i++) {
        vg_tiles_enter(l->tile_config);
        l->fn(args, i, scratch);
    }
}

int64_t vg_kernel_scratch(const vg_kernel *k) {
    int64_t bytes = 0;
    for (int64_t i = 0; i < k->n_launch; i++)
        if (k->launch[i].scratch_bytes > bytes) bytes = k->launch[i].scratch_bytes;
    return bytes;
}

void vg_run_launches(const vg_kernel *k, const int64_t *args, void *scratch, int nthreads) {
    for (int64_t i = 0; i < k->n_launch; i++) {
        const vg_launch *l = &k->launch[i];
        if (nthreads > 1 && l->count > 1) {
            vg_region r = {l->fn, args, l->count, l->scratch_bytes, l->tile_config};
            vg_pool_run(&r, scratch, nthreads);
        } else {
            run_here(l, args, scratch);
        }
    }
}

static int run(const vg_kernel *k, const int64_t *args, int nthreads) {
    int parallel = 0;
    for (int64_t i = 0; i < k->n_launch; i++) parallel |= nthreads > 1 && k->launch[i].count > 1;
    void *scratch = vg_scratch_acquire(vg_kernel_scratch(k));
    if (scratch == NULL) return VG_NO_SCRATCH;
    uint32_t mxcsr = vg_mxcsr_enter();
    parallel = parallel && vg_pool_enter();
    vg_run_launches(k, args, scratch, parallel ? nthreads : 1);
    if (parallel) vg_pool_leave();
    vg_tiles_release();
    vg_mxcsr_leave(mxcsr);
    vg_scratch_release(scratch);
    return VG_OK;
}

int vg_kernel_well_formed(const vg_kernel *k, int64_t n_dyn) {
    return k->n_launch >= 0 && k->n_launch <= VG_MAX_LAUNCH && k->n_args >= 0 && k->n_args <= VG_MAX_ARGS &&
           n_dyn >= 0 && n_dyn <= VG_MAX_ARGS;
}

int vg_call(const vg_kernel *k, int64_t n_dyn, const int64_t *dyn, int nthreads) {
    int64_t args[VG_MAX_ARGS];
    if (!vg_kernel_well_formed(k, n_dyn)) return VG_BAD_CALL;
    memcpy(args, k->args, (size_t)k->n_args * sizeof *args);
    memcpy(args, dyn, (size_t)n_dyn * sizeof *args);
    return run(k, args, nthreads);
}

int vg_call2(const vg_kernel *k, const void *src, void *dst, int nthreads) {
    int64_t args[VG_MAX_ARGS];
    if (!vg_kernel_well_formed(k, 2)) return VG_BAD_CALL;
    memcpy(args, k->args, (size_t)k->n_args * sizeof *args);
    args[0] = (int64_t)(intptr_t)src;
    args[1] = (int64_t)(intptr_t)dst;
    return run(k, args, nthreads);
}
