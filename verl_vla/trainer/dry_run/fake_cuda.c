/* A CUDA runtime and driver with one device and no kernels.
 *
 * Preloaded, it answers in place of libcudart and libcuda. PyTorch then finds a GPU, and its own
 * caching allocator asks this file for memory: every answer is counted against the size of the
 * device, so an allocation fails where it would fail on a GPU. Device memory is address space of
 * the host that nobody touches. Streams and events are complete at once. A kernel that is launched
 * returns an error, since only tensors without data (FakeTensors) can be computed with.
 *
 * VERL_VLA_FAKE_CUDA_BYTES: size of the device's memory.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <cuda_runtime_api.h>

/* An A100's properties (NVIDIA A100 data sheet and CUDA C++ Programming Guide, table "Technical
 * Specifications per Compute Capability"). PyTorch chooses attention kernels by them. */
enum {
    CAPABILITY_MAJOR = 8,
    CAPABILITY_MINOR = 0,
    MULTIPROCESSORS = 108,
    WARP = 32,
    THREADS_PER_BLOCK = 1024,
    THREADS_PER_MULTIPROCESSOR = 2048,
    REGISTERS = 65536,
    SHARED_BYTES_PER_BLOCK = 49152,
    SHARED_BYTES_PER_BLOCK_OPT_IN = 166912,
    SHARED_BYTES_PER_MULTIPROCESSOR = 167936,
    L2_BYTES = 41943040,
    BUS_BITS = 5120,
    GRID_LIMIT = 65535,
    BLOCK_DEPTH = 64,
    CUDA_VERSION_13 = 13000,
    HIGHEST_PRIORITY = -5,
};
static const size_t PAGE_BYTES = 2 << 20; /* granularity of cuMemCreate, for expandable segments */
static const size_t ALIGNMENT = 512;

/* ---- device memory: address space, and a count ---- */

typedef struct Block {
    void *start;
    size_t bytes;
    struct Block *next;
} Block;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Block *blocks = NULL;
static size_t used_bytes = 0;

static size_t device_bytes(void) {
    static size_t bytes = 0;
    if (bytes == 0) {
        const char *text = getenv("VERL_VLA_FAKE_CUDA_BYTES");
        bytes = text ? strtoull(text, NULL, 10) : 0;
    }
    return bytes;
}

/* Count bytes as used; return 0 where the device has fewer left. */
static int take(size_t bytes) {
    if (used_bytes + bytes > device_bytes()) return 0;
    used_bytes += bytes;
    return 1;
}

static void *address_space(size_t bytes) {
    return mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                -1, 0);
}

cudaError_t cudaMalloc(void **out, size_t bytes) {
    cudaError_t result = cudaErrorMemoryAllocation;
    pthread_mutex_lock(&lock);
    if (take(bytes)) {
        Block *block = malloc(sizeof *block);
        block->start = address_space(bytes);
        block->bytes = bytes;
        block->next = blocks;
        blocks = block;
        *out = block->start;
        result = cudaSuccess;
    }
    pthread_mutex_unlock(&lock);
    return result;
}

cudaError_t cudaFree(void *start) {
    pthread_mutex_lock(&lock);
    for (Block **link = &blocks; *link; link = &(*link)->next) {
        if ((*link)->start != start) continue;
        Block *block = *link;
        *link = block->next;
        munmap(block->start, block->bytes);
        used_bytes -= block->bytes;
        free(block);
        break;
    }
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
    *total_bytes = device_bytes();
    *free_bytes = device_bytes() - used_bytes;
    return cudaSuccess;
}

/* ---- the device ---- */

cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
    return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDA_VERSION_13; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDA_VERSION_13; return cudaSuccess; }

static __thread cudaError_t last_error = cudaSuccess;

cudaError_t cudaPeekAtLastError(void) { return last_error; }
cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
cudaError_t cudaDeviceSynchronize(void) { return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    (void)device, (void)peer;
    *can = 0;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    (void)device;
    *value = attribute == cudaDevAttrComputeCapabilityMajor   ? CAPABILITY_MAJOR
             : attribute == cudaDevAttrComputeCapabilityMinor ? CAPABILITY_MINOR
             : attribute == cudaDevAttrMultiProcessorCount    ? MULTIPROCESSORS
                                                              : 0;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    (void)device;
    memset(p, 0, sizeof *p);
    strcpy(p->name, "no GPU (dry run)");
    p->major = CAPABILITY_MAJOR;
    p->minor = CAPABILITY_MINOR;
    p->totalGlobalMem = device_bytes();
    p->multiProcessorCount = MULTIPROCESSORS;
    p->warpSize = WARP;
    p->maxThreadsPerBlock = THREADS_PER_BLOCK;
    p->maxThreadsPerMultiProcessor = THREADS_PER_MULTIPROCESSOR;
    p->regsPerMultiprocessor = REGISTERS;
    p->sharedMemPerBlock = SHARED_BYTES_PER_BLOCK;
    p->sharedMemPerBlockOptin = SHARED_BYTES_PER_BLOCK_OPT_IN;
    p->sharedMemPerMultiprocessor = SHARED_BYTES_PER_MULTIPROCESSOR;
    p->l2CacheSize = L2_BYTES;
    p->memoryBusWidth = BUS_BITS;
    p->maxGridSize[0] = p->maxGridSize[1] = p->maxGridSize[2] = GRID_LIMIT;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = THREADS_PER_BLOCK;
    p->maxThreadsDim[2] = BLOCK_DEPTH;
    return cudaSuccess;
}
const char *cudaGetErrorName(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaError";
}
const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory"
                                              : "not possible in a dry run, which has no GPU";
}

/* ---- streams and events: handles that differ, and nothing to wait for ---- */

static cudaError_t new_handle(void **out) {
    *out = malloc(1);
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) {
    (void)flags, (void)priority;
    return new_handle((void **)s);
}
cudaError_t cudaStreamCreate(cudaStream_t *s) { return new_handle((void **)s); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) {
    (void)flags;
    return new_handle((void **)s);
}
cudaError_t cudaStreamDestroy(cudaStream_t s) { free(s); return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t s) { (void)s; return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t s) { (void)s; return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned flags) {
    (void)s, (void)e, (void)flags;
    return cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *priority) {
    (void)s;
    *priority = 0;
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) {
    (void)s;
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    (void)mode;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *lowest, int *highest) {
    *lowest = 0;
    *highest = HIGHEST_PRIORITY;
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *e) { return new_handle((void **)e); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) {
    (void)flags;
    return new_handle((void **)e);
}
cudaError_t cudaEventDestroy(cudaEvent_t e) { free(e); return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t e) { (void)e; return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
    (void)e, (void)s;
    return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned flags) {
    (void)e, (void)s, (void)flags;
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t e) { (void)e; return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) {
    (void)start, (void)end;
    *ms = 0;
    return cudaSuccess;
}

/* ---- host memory and copies: device addresses are the host's ---- */

cudaError_t cudaHostAlloc(void **out, size_t bytes, unsigned flags) {
    (void)flags;
    return posix_memalign(out, ALIGNMENT, bytes) ? cudaErrorMemoryAllocation : cudaSuccess;
}
cudaError_t cudaFreeHost(void *start) { free(start); return cudaSuccess; }
cudaError_t cudaHostRegister(void *start, size_t bytes, unsigned flags) {
    (void)start, (void)bytes, (void)flags;
    return cudaSuccess;
}
cudaError_t cudaHostUnregister(void *start) { (void)start; return cudaSuccess; }
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    (void)kind;
    memmove(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t s) {
    (void)s;
    return cudaMemcpy(to, from, bytes, kind);
}
cudaError_t cudaMemset(void *to, int value, size_t bytes) {
    memset(to, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t s) {
    (void)s;
    return cudaMemset(to, value, bytes);
}

/* ---- kernels: there are none; callers look at the last error ---- */

static cudaError_t refuse(void) { return last_error = cudaErrorNotSupported; }

cudaError_t cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **args, size_t shared,
                             cudaStream_t s) {
    (void)f, (void)grid, (void)block, (void)args, (void)shared, (void)s;
    return refuse();
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *f, void **args) {
    (void)config, (void)f, (void)args;
    return refuse();
}
/* what a compiled launch calls since CUDA 13 */
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *f) {
    *kernel = (cudaKernel_t)f;
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **args,
                               size_t shared, cudaStream_t s) {
    (void)kernel, (void)grid, (void)block, (void)args, (void)shared, (void)s;
    return refuse();
}

/* ---- the driver: what PyTorch asks for by name ---- */

enum { DRIVER_SUCCESS = 0, DRIVER_OUT_OF_MEMORY = 2 };

static int reserve_addresses(uint64_t *out, size_t bytes, size_t align, uint64_t at,
                             uint64_t flags) {
    (void)align, (void)at, (void)flags;
    void *start = address_space(bytes);
    if (start == MAP_FAILED) return DRIVER_OUT_OF_MEMORY;
    *out = (uint64_t)start;
    return DRIVER_SUCCESS;
}
static int free_addresses(uint64_t start, size_t bytes) {
    munmap((void *)start, bytes);
    return DRIVER_SUCCESS;
}
static int create_page(uint64_t *handle, size_t bytes, const void *properties, uint64_t flags) {
    (void)properties, (void)flags;
    pthread_mutex_lock(&lock);
    int has_room = take(bytes);
    pthread_mutex_unlock(&lock);
    if (!has_room) return DRIVER_OUT_OF_MEMORY;
    size_t *page = malloc(sizeof *page);
    *page = bytes;
    *handle = (uint64_t)page;
    return DRIVER_SUCCESS;
}
static int release_page(uint64_t handle) {
    size_t *page = (size_t *)handle;
    pthread_mutex_lock(&lock);
    used_bytes -= *page;
    pthread_mutex_unlock(&lock);
    free(page);
    return DRIVER_SUCCESS;
}
static int granularity(size_t *bytes, const void *properties, int option) {
    (void)properties, (void)option;
    *bytes = PAGE_BYTES;
    return DRIVER_SUCCESS;
}
static int driver_attribute(int *value, int attribute, int device) {
    (void)attribute, (void)device;
    *value = 0;
    return DRIVER_SUCCESS;
}
static int driver_error(int error, const char **text) {
    *text = error == DRIVER_OUT_OF_MEMORY ? "out of memory" : "error of the dry run's driver";
    return DRIVER_SUCCESS;
}
static int nothing(void) { return DRIVER_SUCCESS; }

static const struct {
    const char *name;
    void *function;
} driver[] = {
    {"cuMemAddressReserve", reserve_addresses},
    {"cuMemAddressFree", free_addresses},
    {"cuMemCreate", create_page},
    {"cuMemRelease", release_page},
    {"cuMemGetAllocationGranularity", granularity},
    {"cuDeviceGetAttribute", driver_attribute},
    {"cuGetErrorString", driver_error},
};

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **out, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *status) {
    (void)version, (void)flags;
    *out = nothing; /* cuMemMap and others, which have nothing to do here */
    for (size_t i = 0; i < sizeof driver / sizeof *driver; i++)
        if (strcmp(name, driver[i].name) == 0) *out = driver[i].function;
    if (status) *status = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

/* what libcaffe2_nvrtc.so asks libcuda.so.1 for, whose name this library has too */
int cuInit(unsigned flags) { (void)flags; return DRIVER_SUCCESS; }
int cuDeviceGetCount(int *count) { *count = 1; return DRIVER_SUCCESS; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    (void)device;
    *flags = 0;
    *active = 0;
    return DRIVER_SUCCESS;
}
int cuGetErrorString(int error, const char **text) { return driver_error(error, text); }
