/* The native runtime's interface, the only copy of it: C includes this file through vg.h and build.py hands
 * the same text to cffi, so it holds plain declarations and no preprocessor conditionals. */

/* Results of the int functions below; codes below zero are a negated errno. */
#define VG_OK 0
#define VG_NO_SCRATCH 1 /* the caller's scratch could not be allocated */
#define VG_BAD_CALL 2   /* a count in the vg_kernel, or n_dyn, is out of range */

#define VG_MAX_LAUNCH 4
#define VG_MAX_ARGS 64
#define VG_MAX_THREADS 1024
#define VG_TILE_CONFIG_BYTES 64

/* Generated code. `args` is the caller's argument block, `index` the unit of work, `scratch` 64-byte
 * aligned memory of the executing thread. */
typedef void (*vg_fn)(const int64_t *args, int64_t index, void *scratch);

/* `tile_config`: NULL, or the AMX configuration (VG_TILE_CONFIG_BYTES as LDTILECFG reads them, palette 1) that is
 * loaded on the executing thread whenever `fn` is entered. What the tiles contain then is undefined, and `fn` must
 * not change the configuration. It is loaded only if the thread has another one, and released before the thread
 * sleeps and before vg_call returns. The caller must have asked for vg_amx_permission() once in this process. */
typedef struct {
    vg_fn fn;
    int64_t count;
    int64_t scratch_bytes;
    const void *tile_config;
} vg_launch;

typedef struct {
    int64_t n_launch;
    vg_launch launch[4];
    int64_t n_args;
    int64_t args[64]; /* template of the argument block; the first n_dyn words are given at each call */
} vg_kernel;

/* Run all launches of `k` in order, each over indices 0..count-1 on at most `nthreads` threads. */
int vg_call(const vg_kernel *k, int64_t n_dyn, const int64_t *dyn, int nthreads);
/* The same for the common case of two dynamic words: a source and a destination pointer. */
int vg_call2(const vg_kernel *k, const void *src, void *dst, int nthreads);

/* One step of a plan: the kernel, and where the operands are of which the template knows nothing. */
typedef struct {
    int64_t slot; /* of the argument block */
    int64_t base; /* index into the bases of a run */
    int64_t offset;
} vg_operand;

typedef struct {
    const vg_kernel *kernel;
    const vg_operand *operands;
    int64_t n_operands;
    int64_t threads; /* at most so many: a small step costs less on one than it takes to wake others */
} vg_step;

typedef struct {
    const vg_step *steps;
    int64_t n_steps;
    int64_t n_bases;
} vg_plan;

/* VG_OK if every slot, base and count of `p` is in range; to be asked once, before the first run. */
int vg_plan_check(const vg_plan *p);
/* Run steps first..last-1 in order. `bases` are the addresses that operands count from. `ns`: NULL, or one number per
 * step of the plan to which the step's nanoseconds are added. */
int vg_plan_run(const vg_plan *p, int64_t first, int64_t last, void *const *bases, int nthreads, uint64_t *ns);

/* End the pool's threads beyond `nthreads` - 1 (the caller counts as one); they start again on demand. */
void vg_pool_trim(int nthreads);
/* Threads that the pool has now, without the caller. */
int vg_pool_size(void);

/* Copy `n` bytes of code into pages of their own that are readable and executable, never writable again. */
int vg_code_new(const void *data, size_t n, void **addr);
int vg_code_free(void *addr, size_t n);

int vg_is_x86(void);
/* All zeros on other machines. */
void vg_cpuid(uint32_t leaf, uint32_t subleaf, uint32_t out[4]);
uint64_t vg_xgetbv(uint32_t index);
/* Ask the kernel for the right to use AMX tiles in this process, in all its threads; 1 if granted. Without it the
 * first tile instruction is an illegal one. */
int vg_amx_permission(void);
/* The calling thread's SSE control and status register; 0 on other machines. */
uint32_t vg_get_mxcsr(void);
void vg_set_mxcsr(uint32_t value);
