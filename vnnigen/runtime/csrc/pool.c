/* The thread pool: one region of parallel work at a time, handed out by an atomic counter.
 *
 * A region is open from vg_pool_run's publication of `gate` until the caller finds no work left. Threads
 * of the pool join while it is open and tickets last; the caller, which works too, then closes the gate
 * and waits only for those that joined. A thread that wakes late therefore costs nothing, which matters
 * on machines with fewer idle cores than threads.
 *
 * gate:  bit 31 OPEN | bit 30 WAITING (the caller sleeps on this word) | bits 16..29 tickets | bits 0..15 running
 * epoch: counts regions; idle threads spin on it, then sleep on it.
 *
 * Joining is a compare-and-swap on `gate`, so whoever joined reads the region that the gate's present
 * value published; a thread that looks at one epoch and joins the next region does no harm.
 */
#define _GNU_SOURCE /* sched_getcpu, CPU_SET */
#include "vg.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define OPEN 0x80000000u
#define WAITING 0x40000000u
#define TICKET 0x00010000u
#define TICKETS 0x3FFF0000u
#define RUNNING 0x0000FFFFu

#define SPIN_NS 40000 /* about the gap between two layers of a network run from Python */
#define STACK_BYTES (1 << 20)

/* Each word that threads fight over has a cache line pair of its own (adjacent-line prefetch). */
static struct {
    _Alignas(128) _Atomic uint32_t gate;
    _Alignas(128) _Atomic uint32_t epoch;
    _Atomic uint32_t sleepers;
    _Alignas(128) _Atomic int64_t next;
    _Alignas(128) vg_region region;
    int64_t chunk;
    _Atomic int cpu; /* where the caller runs */
    _Atomic int stopping;
} pool;

static pthread_mutex_t busy = PTHREAD_MUTEX_INITIALIZER; /* held by the one who uses or changes the pool */
static pthread_t threads[VG_MAX_THREADS];
static _Atomic int size;

/* The only way in which a thread sleeps here. */
static void futex_wait(_Atomic uint32_t *word, uint32_t value) {
    vg_tiles_release();
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word, int how_many) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, how_many, NULL, NULL, 0);
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Spin until (*word & mask) != value; 0 if it took too long. */
static int spin_while(_Atomic uint32_t *word, uint32_t mask, uint32_t value) {
    int64_t start = now_ns();
    do {
        /* The clock is read rarely: a pause takes from a few to 140 cycles, depending on the core. */
        for (int i = 0; i < 16; i++) {
            if ((atomic_load_explicit(word, memory_order_acquire) & mask) != value) return 1;
            vg_pause();
        }
    } while (now_ns() - start < SPIN_NS);
    return 0;
}

/* Take chunks until none is left. */
static void work(void *scratch) {
    const vg_region r = pool.region;
    const int64_t chunk = pool.chunk;
    for (;;) {
        int64_t begin = atomic_fetch_add_explicit(&pool.next, chunk, memory_order_relaxed);
        if (begin >= r.count) return;
        int64_t end = r.count - begin < chunk ? r.count : begin + chunk;
        for (int64_t i = begin; i < end; i++) {
            vg_tiles_enter(r.tile_config);
            r.fn(r.args, i, scratch);
        }
    }
}

static int join_region(void) {
    uint32_t g = atomic_load_explicit(&pool.gate, memory_order_relaxed);
    while ((g & OPEN) && (g & TICKETS))
        if (atomic_compare_exchange_weak_explicit(&pool.gate, &g, g - TICKET + 1, memory_order_acquire,
                                                  memory_order_relaxed))
            return 1;
    return 0;
}

static void leave_region(void) {
    uint32_t before = atomic_fetch_sub_explicit(&pool.gate, 1, memory_order_release);
    if ((before & WAITING) && (before & RUNNING) == 1) futex_wake(&pool.gate, 1);
}

static void help(void) {
    if (!join_region()) return;
    /* Without scratch this thread leaves its share to the others; the caller has scratch for all. */
    void *scratch = vg_scratch_acquire(pool.region.scratch_bytes);
    if (scratch != NULL) {
        work(scratch);
        vg_scratch_release(scratch);
    }
    leave_region();
}

/* A thread that shares the caller's CPU only takes its time, and some schedulers leave the two together for a quarter
 * of a second while other CPUs idle (seen with Linux 6.18 on virtual machines). To leave is to be allowed there no
 * more; then the mask is what it was again. */
static void leave_callers_cpu(void) {
    int cpu = atomic_load_explicit(&pool.cpu, memory_order_relaxed);
    cpu_set_t allowed, others;
    if (cpu < 0 || cpu >= CPU_SETSIZE || cpu != sched_getcpu()) return;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
    others = allowed;
    CPU_CLR(cpu, &others);
    if (CPU_COUNT(&others) == 0) return;
    sched_setaffinity(0, sizeof others, &others);
    sched_setaffinity(0, sizeof allowed, &allowed);
}

static void wait_for_epoch(uint32_t seen) {
    if (spin_while(&pool.epoch, UINT32_MAX, seen)) return;
    /* Sequentially consistent against vg_pool_run: either it sees the sleeper or we see the epoch. */
    atomic_fetch_add(&pool.sleepers, 1);
    while (atomic_load(&pool.epoch) == seen) futex_wait(&pool.epoch, seen);
    atomic_fetch_sub(&pool.sleepers, 1);
}

static void *thread_main(void *unused) {
    (void)unused;
    vg_mxcsr_enter(); /* for life: nothing but kernels runs here */
    uint32_t seen = atomic_load(&pool.epoch);
    while (!atomic_load(&pool.stopping)) {
        leave_callers_cpu();
        help();
        wait_for_epoch(seen);
        seen = atomic_load(&pool.epoch);
    }
    vg_tiles_release();
    return NULL;
}

/* Have n threads, or as many as the system gives. */
static void grow(int n) {
    sigset_t all, old;
    pthread_attr_t attr;
    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, STACK_BYTES);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old); /* inherited: signals stay the application's */
    while (size < n && pthread_create(&threads[size], &attr, thread_main, NULL) == 0) size++;
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&attr);
}

/* Wait until every thread that joined has left; the gate is closed. */
static void wait_for_helpers(void) {
    for (;;) {
        uint32_t g = atomic_load_explicit(&pool.gate, memory_order_acquire);
        if ((g & RUNNING) == 0) return;
        if (!(g & WAITING)) {
            if (spin_while(&pool.gate, UINT32_MAX, g)) continue;
            if (!atomic_compare_exchange_strong(&pool.gate, &g, g | WAITING)) continue;
            g |= WAITING;
        }
        futex_wait(&pool.gate, g);
    }
}

void vg_pool_run(const vg_region *r, void *scratch, int nthreads) {
    if (nthreads > VG_MAX_THREADS) nthreads = VG_MAX_THREADS;
    if (nthreads > r->count) nthreads = (int)r->count;
    if (size < nthreads - 1) grow(nthreads - 1);
    int helpers = size < nthreads - 1 ? size : nthreads - 1;

    /* About four chunks per thread: few enough to keep neighbours together, enough to even out. */
    int64_t chunk = r->count / (4 * (int64_t)nthreads);
    pool.region = *r;
    atomic_store_explicit(&pool.cpu, sched_getcpu(), memory_order_relaxed);
    pool.chunk = chunk > 0 ? chunk : 1;
    atomic_store_explicit(&pool.next, 0, memory_order_relaxed);
    atomic_store_explicit(&pool.gate, OPEN | (uint32_t)helpers * TICKET, memory_order_release);
    atomic_fetch_add(&pool.epoch, 1);
    if (atomic_load(&pool.sleepers)) futex_wake(&pool.epoch, helpers);

    work(scratch);
    atomic_fetch_and(&pool.gate, ~(OPEN | TICKETS));
    wait_for_helpers();
}

int vg_pool_size(void) { return size; }

void vg_pool_trim(int nthreads) {
    pthread_mutex_lock(&busy);
    if (size > nthreads - 1) {
        /* All of them end: the threads have no numbers that would tell who is one too many. */
        atomic_store(&pool.stopping, 1);
        atomic_fetch_add(&pool.epoch, 1);
        futex_wake(&pool.epoch, INT_MAX);
        while (size > 0) pthread_join(threads[--size], NULL);
        atomic_store(&pool.stopping, 0);
    }
    pthread_mutex_unlock(&busy);
}

/* Only the forking thread lives on in the child: forget the others and whatever they were doing. */
static void forget_after_fork(void) {
    pthread_mutex_init(&busy, NULL);
    size = 0;
    atomic_store(&pool.gate, 0);
    atomic_store(&pool.sleepers, 0);
    atomic_store(&pool.stopping, 0);
}

__attribute__((constructor)) static void install_fork_handler(void) {
    pthread_atfork(NULL, NULL, forget_after_fork);
}

int vg_pool_enter(void) { return pthread_mutex_trylock(&busy) == 0; }
void vg_pool_leave(void) { pthread_mutex_unlock(&busy); }
