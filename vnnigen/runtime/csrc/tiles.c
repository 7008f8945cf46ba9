/* AMX tiles: which configuration the calling thread has loaded. LDTILECFG takes some hundred cycles and clears
 * all tiles, so it is done only when the configuration changes; and live tiles are 8 KiB more for the kernel to
 * save at every switch of threads and keep the core from its deeper sleep states, so nobody sleeps with them. */
#include "vg.h"

#include <string.h>

#define PALETTE(config) (((const uint8_t *)(config))[0])

#if defined(VG_FAKE_TILES)
/* The tests' build, for machines without AMX: what would be executed is reported instead. */
void vg_fake_ldtilecfg(const void *config);
void vg_fake_tilerelease(void);
#define ldtilecfg vg_fake_ldtilecfg
#define tilerelease vg_fake_tilerelease
#elif defined(__x86_64__)
/* By bytes: assemblers and compilers older than AMX do not know the mnemonics. */
static inline void ldtilecfg(const void *config) {
    __asm__ volatile(".byte 0xc4, 0xe2, 0x78, 0x49, 0x00" : : "a"(config) : "memory"); /* ldtilecfg [rax] */
}
static inline void tilerelease(void) {
    __asm__ volatile(".byte 0xc4, 0xe2, 0x78, 0x49, 0xc0" : : : "memory"); /* tilerelease */
}
#else
static inline void ldtilecfg(const void *config) { (void)config; }
static inline void tilerelease(void) {}
#endif

/* A copy, for the kernel whose configuration it was may be gone. Palette 0: nothing is loaded. */
static __thread uint8_t loaded[VG_TILE_CONFIG_BYTES];

void vg_tiles_load(const void *config) {
    if (memcmp(loaded, config, sizeof loaded) == 0) return;
    ldtilecfg(config);
    memcpy(loaded, config, sizeof loaded);
}

void vg_tiles_release(void) {
    if (PALETTE(loaded) == 0) return;
    tilerelease();
    memset(loaded, 0, sizeof loaded);
}
