/* Scratch memory: one block per thread, grown on demand, kept, freed when the thread ends. */
#include "vg.h"

#include <pthread.h>
#include <stdlib.h>

static __thread void *block;
static __thread int64_t block_size;
static __thread int in_use;

static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_key_t at_thread_exit;

static void make_key(void) { pthread_key_create(&at_thread_exit, free); }

static void *allocate(int64_t bytes) {
    /* Beyond what any kernel asks for; also keeps the rounding below from overflowing. */
    if (bytes > INT64_MAX / 2) return NULL;
    return aligned_alloc(64, (size_t)(bytes + 4095) / 4096 * 4096);
}

void *vg_scratch_acquire(int64_t bytes) {
    /* A call from inside a running kernel (a host function given as a launch) must not take its
     * caller's scratch away; it is rare enough to allocate. */
    if (in_use) return allocate(bytes > 0 ? bytes : 1);
    if (bytes > block_size || block == NULL) {
        if (bytes < 4096) bytes = 4096;
        void *grown = allocate(bytes);
        if (grown == NULL) return NULL;
        pthread_once(&once, make_key);
        pthread_setspecific(at_thread_exit, grown);
        free(block);
        block = grown;
        block_size = bytes;
    }
    in_use = 1;
    return block;
}

void vg_scratch_release(void *scratch) {
    if (scratch == block)
        in_use = 0;
    else
        free(scratch);
}
