/* Code memory: pages of their own for each batch, written once, then executable for life. */
#include "vg.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static size_t whole_pages(size_t n) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    return (n + page - 1) / page * page;
}

int vg_code_new(const void *data, size_t n, void **addr) {
    size_t size = whole_pages(n);
    *addr = NULL;
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return -errno;
    memcpy(p, data, n);
#if defined(__x86_64__)
    memset((char *)p + n, 0xCC, size - n); /* INT3: running off the end stops at once */
#endif
    if (mprotect(p, size, PROT_READ | PROT_EXEC) != 0) {
        int error = errno;
        munmap(p, size);
        return -error;
    }
    __builtin___clear_cache((char *)p, (char *)p + n); /* nothing to do on x86, needed on Arm */
    *addr = p;
    return VG_OK;
}

int vg_code_free(void *addr, size_t n) { return munmap(addr, whole_pages(n)) == 0 ? VG_OK : -errno; }
