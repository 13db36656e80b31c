/* Stands in for NVIDIA's driver libraries where there is none: libcuda.so.1 (built with -DLIBCUDA) and
   libnvidia-encode.so.1. There is no device, unless STUB_GPUS=1: then there is one, without any memory and without
   NVENC. With STUB_NVENC=1 as well, its memory is the host's, and its NVENC writes to standard output what it is told
   and gives, for each picture, one that is its number. Numbers are those of cuda.h and nvEncodeAPI.h. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int has_nvenc(void) { return getenv("STUB_NVENC") != NULL; }

#ifdef LIBCUDA

enum { SUCCESS = 0, OUT_OF_MEMORY = 2, NO_DEVICE = 100 };

static int gpus(void) {
    const char *count = getenv("STUB_GPUS");
    return count ? atoi(count) : 0;
}

static int there(void) { return gpus() ? SUCCESS : NO_DEVICE; }

#define SAYS_WHETHER_THERE(name) \
    int name(void) { return there(); }
#define GIVES_A_HANDLE(name) \
    int name(void **handle) { \
        if (handle) *handle = (void *)1; \
        return there(); \
    }
#define HAS_NO_MEMORY(name) \
    int name(void) { return gpus() ? OUT_OF_MEMORY : NO_DEVICE; }
#define ALLOCATES(name, bytes, ...) \
    int name(void **memory, __VA_ARGS__) { \
        if (!has_nvenc()) return gpus() ? OUT_OF_MEMORY : NO_DEVICE; \
        *memory = malloc(bytes); \
        return SUCCESS; \
    }

SAYS_WHETHER_THERE(cuInit)
SAYS_WHETHER_THERE(cuCtxDestroy_v2)
SAYS_WHETHER_THERE(cuDevicePrimaryCtxRelease_v2)
SAYS_WHETHER_THERE(cuEventDestroy_v2)
SAYS_WHETHER_THERE(cuEventRecord)
SAYS_WHETHER_THERE(cuEventSynchronize)
SAYS_WHETHER_THERE(cuStreamDestroy_v2)
SAYS_WHETHER_THERE(cuStreamSynchronize)
SAYS_WHETHER_THERE(cuStreamWaitEvent)
GIVES_A_HANDLE(cuDevicePrimaryCtxRetain)
GIVES_A_HANDLE(cuEventCreate)
GIVES_A_HANDLE(cuStreamCreate)
ALLOCATES(cuMemAlloc_v2, bytes, size_t bytes)
ALLOCATES(cuMemAllocAsync, bytes, size_t bytes, void *stream)
HAS_NO_MEMORY(cuMemcpyDtoH_v2)
HAS_NO_MEMORY(cuMemcpyDtoHAsync_v2)
HAS_NO_MEMORY(cuMemcpyHtoD_v2)

/* Of contexts, each thread has a stack. */
static __thread void *contexts[64];
static __thread int depth = 0;

int cuCtxGetCurrent(void **context) {
    *context = depth ? contexts[depth - 1] : NULL;
    return there();
}

int cuCtxSetCurrent(void *context) {
    if (!depth) depth = 1;
    contexts[depth - 1] = context;
    return there();
}

int cuCtxPushCurrent_v2(void *context) {
    contexts[depth++] = context;
    return there();
}

int cuCtxPopCurrent_v2(void **context) {
    if (context) *context = depth ? contexts[depth - 1] : NULL;
    if (depth) depth--;
    return there();
}

int cuCtxCreate_v2(void **context, unsigned flags, int device) {
    *context = (void *)1;
    return cuCtxPushCurrent_v2(*context);
}

int cuMemAllocPitch_v2(void **memory, size_t *pitch, size_t width, size_t height, unsigned element) {
    *pitch = (width + 511) / 512 * 512;
    return cuMemAlloc_v2(memory, *pitch * height);
}

int cuMemFree_v2(void *memory) {
    free(memory);
    return there();
}

int cuMemFreeAsync(void *memory, void *stream) { return cuMemFree_v2(memory); }

struct end {
    size_t x, y;
    unsigned type;
    void *host, *device, *array;
    size_t pitch;
};

struct copy {
    struct end from, to;
    size_t width, height;
};

int cuMemcpy2DAsync_v2(const struct copy *copy, void *stream) {
    if (!has_nvenc()) return gpus() ? OUT_OF_MEMORY : NO_DEVICE;
    const char *from = copy->from.type == 1 ? copy->from.host : copy->from.device;
    char *to = copy->to.type == 1 ? copy->to.host : copy->to.device;
    for (size_t row = 0; row < copy->height; row++)
        memcpy(to + (copy->to.y + row) * copy->to.pitch + copy->to.x,
               from + (copy->from.y + row) * copy->from.pitch + copy->from.x, copy->width);
    printf("copy %zux%zu on stream %zu\n", copy->width, copy->height, (size_t)stream);
    return SUCCESS;
}

int cuMemcpy2D_v2(const struct copy *copy) { return cuMemcpy2DAsync_v2(copy, NULL); }

int cuPointerGetAttribute(void *answer, int question, void *pointer) {
    enum { CONTEXT = 1, MEMORY_TYPE = 2, DEVICE_MEMORY = 2 };
    if (question == CONTEXT) *(void **)answer = (void *)1;
    if (question == MEMORY_TYPE) *(unsigned *)answer = DEVICE_MEMORY;
    return there();
}

int cuStreamGetCtx(void *stream, void **context) {
    *context = (void *)1;
    return there();
}

int cuDriverGetVersion(int *version) {
    const char *told = getenv("STUB_CUDA_VERSION");
    *version = told ? atoi(told) : 99000;
    return SUCCESS;
}

int cuDeviceGetCount(int *count) {
    *count = gpus();
    return there();
}

int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return there();
}

int cuCtxGetDevice(int *device) {
    *device = 0;
    return there();
}

int cuGetErrorName(int error, const char **name) {
    *name = error == NO_DEVICE ? "CUDA_ERROR_NO_DEVICE" : error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "?";
    return SUCCESS;
}

int cuGetErrorString(int error, const char **text) { return cuGetErrorName(error, text); }

#else

enum { SUCCESS = 0, UNSUPPORTED_DEVICE = 2, VERSION = 13 << 4, FUNCTIONS = 40 };

static int has_no_encoder(void) { return has_nvenc() ? SUCCESS : UNSUPPORTED_DEVICE; }

int NvEncodeAPIGetMaxSupportedVersion(uint32_t *version) {
    *version = VERSION;
    return SUCCESS;
}

/* Fields of the API's structures, by their offsets. */
#define U32(structure, offset) (*(uint32_t *)((char *)(structure) + (offset)))
#define U64(structure, offset) (*(uint64_t *)((char *)(structure) + (offset)))
#define POINTER(structure, offset) (*(void **)((char *)(structure) + (offset)))

static const unsigned char GUIDS[3][16] = {
    {0x62, 0x27, 0xc8, 0x6b, 0x63, 0x4e, 0xa4, 0x4c, 0xaa, 0x85, 0x1e, 0x50, 0xf3, 0x21, 0xf6, 0xbf},
    {0x88, 0xdc, 0x0c, 0x79, 0x22, 0x45, 0x7b, 0x4d, 0x94, 0x25, 0xbd, 0xa9, 0x97, 0x5f, 0x76, 0x03},
    {0x89, 0x22, 0x35, 0x0a, 0xa7, 0x0a, 0x59, 0x47, 0x86, 0x2d, 0x5d, 0x15, 0xcd, 0x16, 0xd2, 0x54},
};
static uint64_t stamps[256];
static int pushed, given;

static int open_session(void *parameters, void **session) {
    *session = (void *)1;
    return has_no_encoder();
}

static int count_codecs(void *session, uint32_t *count) {
    *count = 3;
    return has_no_encoder();
}

static int list_codecs(void *session, void *guids, uint32_t room, uint32_t *count) {
    *count = room < 3 ? room : 3;
    memcpy(guids, GUIDS, 16 * *count);
    return has_no_encoder();
}

static int tell_ability(void *session, uint64_t guid_low, uint64_t guid_high, void *question, int *answer) {
    enum { B_FRAMES = 0, WIDTH_MAX = 16, HEIGHT_MAX = 17 };
    uint32_t asked = U32(question, 4);
    *answer = asked == B_FRAMES ? 3 : asked == WIDTH_MAX || asked == HEIGHT_MAX ? 4096 : 1;
    return has_no_encoder();
}

static int initialize(void *session, void *parameters) {
    void *config = POINTER(parameters, 88), *rate_control = (char *)config + 40;
    printf("session %ux%u, %u/%u a second, gop %u, interval of P %u, rate control %u, bitrate %u, at most %u, quality %u\n",
           U32(parameters, 36), U32(parameters, 40), U32(parameters, 52), U32(parameters, 56), U32(config, 20),
           U32(config, 24), U32(rate_control, 4), U32(rate_control, 20), U32(rate_control, 24),
           *((unsigned char *)rate_control + 88));
    return SUCCESS;
}

static int make_output(void *session, void *parameters) {
    POINTER(parameters, 16) = malloc(64);
    return SUCCESS;
}

static int register_input(void *session, void *parameters) {
    POINTER(parameters, 32) = POINTER(parameters, 24);
    return SUCCESS;
}

static int map_input(void *session, void *parameters) {
    POINTER(parameters, 24) = POINTER(parameters, 16);
    return SUCCESS;
}

static int encode(void *session, void *picture) {
    enum { END = 8 };
    if (!(U32(picture, 16) & END)) stamps[pushed++] = U64(picture, 24);
    return SUCCESS;
}

static int lock_output(void *session, void *parameters) {
    static char data[16];
    snprintf(data, sizeof data, "picture %d", given);
    U32(parameters, 36) = (uint32_t)strlen(data);
    U64(parameters, 40) = stamps[given++];
    POINTER(parameters, 56) = data;
    return SUCCESS;
}

struct api {
    uint32_t version, reserved;
    void *functions[FUNCTIONS];
};

int NvEncodeAPICreateInstance(struct api *api) {
    for (int i = 0; i < FUNCTIONS; i++) api->functions[i] = has_no_encoder;
    api->functions[1] = count_codecs;
    api->functions[4] = list_codecs;
    api->functions[7] = tell_ability;
    api->functions[11] = initialize;
    api->functions[14] = make_output;
    api->functions[16] = encode;
    api->functions[17] = lock_output;
    api->functions[25] = map_input;
    api->functions[29] = open_session;
    api->functions[30] = register_input;
    return SUCCESS;
}

#endif
