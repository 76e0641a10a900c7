/* A CUDA driver without a GPU: memory is the process's own, one kernel is built in, and each function
   can be told to fail. FAKE_FAIL=name=code,name=code; FAKE_VERSION, FAKE_COUNT, FAKE_CAPABILITY. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int number(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}

static int fails(const char *name) {
    const char *text = getenv("FAKE_FAIL");
    size_t n = strlen(name);
    while (text && *text) {
        if (strncmp(text, name, n) == 0 && text[n] == '=') return atoi(text + n + 1);
        text = strchr(text, ',');
        if (text) text++;
    }
    return 0;
}

#define FAIL() do { int e_ = fails(__func__); if (e_) return e_; } while (0)

int cuInit(unsigned flags) { FAIL(); return flags != 0; }
int cuDriverGetVersion(int *v) { FAIL(); *v = number("FAKE_VERSION", 12080); return 0; }
int cuDeviceGetCount(int *n) { FAIL(); *n = number("FAKE_COUNT", 1); return 0; }
int cuDeviceGet(int *d, int i) { FAIL(); *d = i; return 0; }
int cuDeviceGetName(char *s, int n, int d) { FAIL(); (void)d; snprintf(s, (size_t)n, "Fake GPU"); return 0; }
int cuDeviceGetAttribute(int *v, int a, int d) {
    FAIL();
    (void)d;
    int c = number("FAKE_CAPABILITY", 90);
    *v = a == 75 ? c / 10 : a == 76 ? c % 10 : 0;
    return 0;
}
int cuDevicePrimaryCtxRetain(void **c, int d) { FAIL(); (void)d; *c = (void *)64; return 0; }
int cuDevicePrimaryCtxRelease_v2(int d) { (void)d; return 0; }
int cuCtxSetCurrent(void *c) { FAIL(); return c == NULL; }
int cuGetErrorName(int e, const char **s) {
    if (e > 1000) { *s = NULL; return 1; }
    *s = e == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : e == 719 ? "CUDA_ERROR_LAUNCH_FAILED" : "CUDA_ERROR_FAKE";
    return 0;
}
int cuModuleLoadDataEx(void **m, const void *image, unsigned n, int *options, void **values) {
    const char *text = image;
    int is_text = strstr(text, ".version") != NULL, e = fails(is_text ? "ptx" : "cubin");
    if (e && n == 2 && options[0] == 5) snprintf(values[0], (size_t)values[1], "line 3: fake complaint");
    if (e) return e;
    *m = (void *)text;
    return 0;
}
int cuModuleUnload(void *m) { (void)m; return 0; }
int cuModuleGetFunction(void **f, void *m, const char *name) { FAIL(); (void)m; *f = strdup(name); return 0; }
int cuFuncSetAttribute(void *f, int a, int v) { FAIL(); printf("attribute %s %d %d\n", (char *)f, a, v); return 0; }
int cuMemAlloc_v2(uint64_t *p, size_t n) { FAIL(); *p = (uint64_t)(uintptr_t)aligned_alloc(256, (n + 255) / 256 * 256); return 0; }
int cuMemFree_v2(uint64_t p) { free((void *)(uintptr_t)p); return 0; }
int cuMemGetInfo_v2(size_t *free_bytes, size_t *total) { *free_bytes = (size_t)5 << 20; *total = (size_t)80 << 20; return 0; }
int cuMemcpyHtoDAsync_v2(uint64_t d, const void *s, size_t n, void *t) { FAIL(); (void)t; memcpy((void *)(uintptr_t)d, s, n); return 0; }
int cuMemcpyDtoHAsync_v2(void *d, uint64_t s, size_t n, void *t) { FAIL(); (void)t; memcpy(d, (void *)(uintptr_t)s, n); return 0; }
int cuMemsetD8Async(uint64_t d, unsigned char v, size_t n, void *t) { FAIL(); (void)t; memset((void *)(uintptr_t)d, v, n); return 0; }
int cuStreamCreate(void **s, unsigned flags) { FAIL(); (void)flags; *s = (void *)128; return 0; }
int cuStreamDestroy_v2(void *s) { (void)s; return 0; }
int cuStreamSynchronize(void *s) { FAIL(); (void)s; return 0; }

static struct { uint64_t args[3]; } captured;
static int capturing;
static void twice(const uint64_t *a) {
    const float *x = (const float *)(uintptr_t)a[0];
    float *y = (float *)(uintptr_t)a[1];
    for (uint64_t i = 0; i < a[2]; i++) y[i] = 2 * x[i];
}
int cuStreamBeginCapture_v2(void *s, int mode) { FAIL(); (void)s; capturing = mode; return 0; }
int cuStreamEndCapture(void *s, void **g) { FAIL(); (void)s; capturing = 0; *g = &captured; return 0; }
int cuGraphInstantiateWithFlags(void **x, void *g, uint64_t flags) { FAIL(); (void)flags; *x = g; return 0; }
int cuGraphLaunch(void *x, void *s) { FAIL(); (void)s; twice(((uint64_t *)x)); return 0; }
int cuGraphDestroy(void *g) { (void)g; return 0; }
int cuGraphExecDestroy(void *x) { (void)x; return 0; }
int cuEventCreate(void **e, unsigned flags) { FAIL(); *e = malloc(8); return (int)flags; }
int cuEventDestroy_v2(void *e) { free(e); return 0; }
int cuEventRecord(void *e, void *s) { FAIL(); (void)e; (void)s; return 0; }
int cuEventSynchronize(void *e) { FAIL(); (void)e; return 0; }
int cuEventElapsedTime(float *ms, void *a, void *b) { FAIL(); (void)a; (void)b; *ms = 0.25f; return 0; }

typedef struct { unsigned id; char pad[4]; unsigned value[16]; } attribute;
typedef struct { unsigned grid[3], block[3], shared; void *stream; attribute *attrs; unsigned count; } config;
int cuLaunchKernelEx(const config *c, void *f, void **params, void **extra) {
    printf("launch %s grid %u %u %u block %u %u %u shared %u", (char *)f, c->grid[0], c->grid[1], c->grid[2],
           c->block[0], c->block[1], c->block[2], c->shared);
    for (unsigned i = 0; i < c->count; i++)
        printf(" attribute %u: %u %u %u", c->attrs[i].id, c->attrs[i].value[0], c->attrs[i].value[1], c->attrs[i].value[2]);
    printf("\n");
    FAIL();
    if (extra) return 1;
    uint64_t args[3];
    for (int i = 0; i < 3; i++) args[i] = *(uint64_t *)params[i];
    if (*(uint64_t *)params[3] != 0x4d41504d41504d41u) return 1;
    if (capturing) memcpy(captured.args, args, sizeof args);
    else twice(args);
    return 0;
}
#ifndef NO_TENSOR_MAPS
int cuTensorMapEncodeTiled(uint64_t *map, int dtype, unsigned rank, void *base, const uint64_t *dims, const uint64_t *strides,
                           const unsigned *box, const unsigned *steps, int interleave, int swizzle, int promotion, int fill) {
    FAIL();
    (void)base; (void)interleave; (void)promotion; (void)fill;
    printf("map %d rank %u dims %lu %lu stride %lu box %u %u steps %u swizzle %d\n", dtype, rank, (unsigned long)dims[0],
           (unsigned long)dims[1], (unsigned long)strides[0], box[0], box[1], steps[1], swizzle);
    if ((uintptr_t)map % 64) return 1;
    map[0] = 0x4d41504d41504d41u;
    return 0;
}
#endif
