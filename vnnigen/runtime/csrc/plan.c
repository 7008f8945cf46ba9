/* A compiled network: an array of steps that one call walks from the first to the last. */
#include "vg.h"

#include <string.h>
#include <time.h>

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

int vg_plan_check(const vg_plan *p) {
    if (p->n_steps < 0 || p->n_bases < 0) return VG_BAD_CALL;
    for (int64_t i = 0; i < p->n_steps; i++) {
        const vg_step *s = &p->steps[i];
        if (!vg_kernel_well_formed(s->kernel, 0) || s->n_operands < 0) return VG_BAD_CALL;
        for (int64_t j = 0; j < s->n_operands; j++) {
            const vg_operand *o = &s->operands[j];
            if (o->slot < 0 || o->slot >= s->kernel->n_args || o->base < 0 || o->base >= p->n_bases)
                return VG_BAD_CALL;
        }
    }
    return VG_OK;
}

static void run_step(const vg_step *s, void *const *bases, void *scratch, int nthreads) {
    int64_t args[VG_MAX_ARGS];
    memcpy(args, s->kernel->args, (size_t)s->kernel->n_args * sizeof *args);
    for (int64_t j = 0; j < s->n_operands; j++) {
        const vg_operand *o = &s->operands[j];
        args[o->slot] = (int64_t)(intptr_t)((char *)bases[o->base] + o->offset);
    }
    vg_run_launches(s->kernel, args, scratch, s->threads < nthreads ? (int)s->threads : nthreads);
}

int vg_plan_run(const vg_plan *p, int64_t first, int64_t last, void *const *bases, int nthreads, uint64_t *ns) {
    int64_t scratch_bytes = 0;
    if (first < 0 || last > p->n_steps) return VG_BAD_CALL;
    for (int64_t i = first; i < last; i++) {
        int64_t bytes = vg_kernel_scratch(p->steps[i].kernel);
        if (bytes > scratch_bytes) scratch_bytes = bytes;
    }
    void *scratch = vg_scratch_acquire(scratch_bytes);
    if (scratch == NULL) return VG_NO_SCRATCH;
    uint32_t mxcsr = vg_mxcsr_enter();
    int parallel = nthreads > 1 && vg_pool_enter(); /* one caller at a time; the others walk on their own thread */
    for (int64_t i = first; i < last; i++) {
        uint64_t start = ns != NULL ? now_ns() : 0;
        run_step(&p->steps[i], bases, scratch, parallel ? nthreads : 1);
        if (ns != NULL) ns[i] += now_ns() - start;
    }
    if (parallel) vg_pool_leave();
    vg_tiles_release();
    vg_mxcsr_leave(mxcsr);
    vg_scratch_release(scratch);
    return VG_OK;
}
