// A CUDA runtime without a GPU: kernels do nothing, device memory reads as zero, and everything is counted.
//
// Preloaded in front of torch's CUDA build it lets the code for GPUs run on any machine, as far as the host's part of it
// goes: which kernels are started, when the host waits, what a graph's capture would refuse, how long starting it all
// takes. Results mean nothing. What is not written out here returns 0; build.py adds those functions.

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#define API extern "C" __attribute__((visibility("default")))

// Counters, read by host_time.py through null_gpu_counts() ----------------------------------------------------------

static std::atomic<long> launches{0}, waits{0}, copies{0}, replays{0}, captured{0}, illegal{0};
static bool capturing = false, broken = false;  // broken: the capture has asked for what it may not
static cudaStream_t capture_stream = nullptr;
static unsigned long long capture_id = 0;

API void null_gpu_counts(long* out) {
    const long now[] = {launches, waits, copies, replays, captured, illegal};
    memcpy(out, now, sizeof now);
}

static void refuse(const char* what) {
    illegal++;
    broken = true;
    fprintf(stderr, "[null gpu] not allowed in a capture: %s\n", what);
}

static cudaError_t wait(const char* what) {
    waits++;
    if (getenv("NULL_GPU_TRACE")) fprintf(stderr, "[null gpu] %s\n", what);
    if (!capturing) return cudaSuccess;
    refuse(what);
    return cudaErrorStreamCaptureUnsupported;
}

static cudaError_t start(cudaStream_t stream) {
    launches++;
    if (capturing) {
        captured++;
        if (stream != capture_stream) refuse("a kernel on another stream");
    }
    return cudaSuccess;
}

API int null_gpu_library_call() {  // a kernel of cuBLAS or cuDNN, on whatever stream its handle has
    launches++;
    captured += capturing;
    return 0;
}

template <class T>
static int make(T* handle) {
    *handle = (T)calloc(1, 256);
    return 0;
}

// Memory: the host's, never written ---------------------------------------------------------------------------------

static std::mutex mutex;
static std::map<char*, size_t> device_blocks, pinned_blocks;
static size_t used = 0;
static const size_t TOTAL = size_t(80) << 30;

static size_t pages(size_t bytes) { return bytes ? (bytes + 4095) & ~size_t(4095) : 4096; }

static bool within(const std::map<char*, size_t>& blocks, const void* p) {
    auto next = blocks.upper_bound((char*)p);
    return next != blocks.begin() && (char*)p < (--next)->first + next->second;
}

API cudaError_t cudaMalloc(void** p, size_t bytes) {
    bytes = pages(bytes);
    *p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    std::lock_guard<std::mutex> guard(mutex);
    device_blocks[(char*)*p] = bytes;
    used += bytes;
    return cudaSuccess;
}
API cudaError_t cudaFree(void* p) {
    std::lock_guard<std::mutex> guard(mutex);
    auto block = device_blocks.find((char*)p);
    if (block == device_blocks.end()) return cudaSuccess;
    munmap(p, block->second);
    used -= block->second;
    device_blocks.erase(block);
    return cudaSuccess;
}
API cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) {
    *p = aligned_alloc(4096, pages(bytes));
    std::lock_guard<std::mutex> guard(mutex);
    pinned_blocks[(char*)*p] = bytes;
    return cudaSuccess;
}
API cudaError_t cudaFreeHost(void* p) {
    std::lock_guard<std::mutex> guard(mutex);
    pinned_blocks.erase((char*)p);
    free(p);
    return cudaSuccess;
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* out, const void* p) {
    std::lock_guard<std::mutex> guard(mutex);
    memset(out, 0, sizeof *out);
    const bool device = within(device_blocks, p);
    out->type = device ? cudaMemoryTypeDevice : within(pinned_blocks, p) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    (device ? out->devicePointer : out->hostPointer) = (void*)p;
    return cudaSuccess;
}
API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    *total = TOTAL;
    *free = TOTAL - used;
    return cudaSuccess;
}
static void copy(void* target, size_t bytes, cudaMemcpyKind kind) {
    copies++;
    captured += capturing;
    if (kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyHostToHost) memset(target, 0, bytes);
}
API cudaError_t cudaMemcpyAsync(void* target, const void*, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
    copy(target, bytes, kind);
    return cudaSuccess;
}
API cudaError_t cudaMemcpy(void* target, const void*, size_t bytes, cudaMemcpyKind kind) {
    copy(target, bytes, kind);
    return wait("cudaMemcpy");
}
API cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t stream) { return start(stream); }

// The device --------------------------------------------------------------------------------------------------------

API cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
API cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
API cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {  // of the size of an H100
    memset(p, 0, sizeof *p);
    strcpy(p->name, "null GPU");
    p->major = 9;
    p->multiProcessorCount = 132;
    p->totalGlobalMem = TOTAL;
    p->warpSize = 32;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = 232448;
    p->sharedMemPerMultiprocessor = 233472;
    p->textureAlignment = 512;
    return cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount       ? 132
             : attribute == cudaDevAttrMaxThreadsPerBlock      ? 1024
             : attribute == cudaDevAttrWarpSize                ? 32
             : attribute == cudaDevAttrComputeCapabilityMajor  ? 9
             : attribute == cudaDevAttrComputeCapabilityMinor  ? 0
             : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 232448
                                                               : 1;
    return cudaSuccess;
}
API cudaError_t cudaDeviceGetPCIBusId(char* id, int size, int) { return snprintf(id, size, "0000:00:00.0"), cudaSuccess; }
API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* most) { return *least = 0, *most = -5, cudaSuccess; }
API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
API cudaError_t cudaDeviceSynchronize() { return wait("cudaDeviceSynchronize"); }
API const char* cudaGetErrorName(cudaError_t) { return "null GPU"; }
API const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorStreamCaptureUnsupported   ? "operation not permitted when stream is capturing"
           : error == cudaErrorStreamCaptureInvalidated ? "operation failed due to a previous error during capture"
                                                        : "null GPU";
}
static CUresult driver_text(CUresult, const char** text) { return *text = "null GPU", CUDA_SUCCESS; }
static CUresult driver_attribute(int* value, CUdevice_attribute, CUdevice) { return *value = 1, CUDA_SUCCESS; }
static CUresult driver_context(CUdevice, unsigned* flags, int* active) { return *flags = 0, *active = 1, CUDA_SUCCESS; }
static CUresult driver_other() { return CUDA_SUCCESS; }
API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                 cudaDriverEntryPointQueryResult* result) {
    const std::string wanted(name);
    *function = wanted == "cuGetErrorString" || wanted == "cuGetErrorName" ? (void*)driver_text
                : wanted == "cuDevicePrimaryCtxGetState"                  ? (void*)driver_context
                : wanted == "cuDeviceGetAttribute"                        ? (void*)driver_attribute
                                                                          : (void*)driver_other;
    if (result) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

// Streams, events, graphs ---------------------------------------------------------------------------------------------

API cudaError_t cudaStreamCreate(cudaStream_t* s) { return make(s), cudaSuccess; }
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) { return make(s), cudaSuccess; }
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int) { return make(s), cudaSuccess; }
API cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { return *priority = 0, cudaSuccess; }
API cudaError_t cudaStreamSynchronize(cudaStream_t) { return wait("cudaStreamSynchronize"); }
API cudaError_t cudaEventCreate(cudaEvent_t* e) { return make(e), cudaSuccess; }
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { return make(e), cudaSuccess; }
API cudaError_t cudaEventSynchronize(cudaEvent_t) { return wait("cudaEventSynchronize"); }
API cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) { return *ms = 1, cudaSuccess; }

static cudaError_t begin(cudaStream_t stream) {
    capturing = true;
    broken = false;
    capture_stream = stream;
    capture_id++;
    return cudaSuccess;
}
static cudaStreamCaptureStatus status(cudaStream_t stream) {
    return capturing && stream == capture_stream ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
}
API cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) { return begin(stream); }
API cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t stream, cudaGraph_t, const cudaGraphNode_t*,
                                              const cudaGraphEdgeData*, size_t, cudaStreamCaptureMode) {
    return begin(stream);
}
API cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
    capturing = false;
    if (broken) return *graph = nullptr, cudaErrorStreamCaptureInvalidated;
    return make(graph), cudaSuccess;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* out) {
    return *out = status(stream), cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* out, unsigned long long* id,
                                         cudaGraph_t* graph, const cudaGraphNode_t** nodes,
                                         const cudaGraphEdgeData** edges, size_t* n) {
    *out = status(stream);
    if (id) *id = capture_id;
    if (graph) *graph = nullptr;
    if (nodes) *nodes = nullptr;
    if (edges) *edges = nullptr;
    if (n) *n = 0;
    return cudaSuccess;
}
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    static thread_local cudaStreamCaptureMode current = cudaStreamCaptureModeGlobal;
    std::swap(current, *mode);
    return cudaSuccess;
}
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* e, cudaGraph_t, unsigned long long) {
    return make(e), cudaSuccess;
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) { return replays++, cudaSuccess; }
API cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* n) { return *n = 1, cudaSuccess; }
API cudaError_t cudaUserObjectCreate(cudaUserObject_t* o, void*, cudaHostFn_t, unsigned, unsigned) {
    return make(o), cudaSuccess;
}

// Kernels -------------------------------------------------------------------------------------------------------------

static thread_local struct {
    dim3 grid, block;
    size_t shared;
    void* stream;
} call;

API void** __cudaRegisterFatBinary(void*) { return (void**)calloc(1, 64); }
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
    call = {grid, block, shared, stream};
    return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = call.grid;
    *block = call.block;
    *shared = call.shared;
    *(void**)stream = call.stream;
    return cudaSuccess;
}
API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
    return *kernel = (cudaKernel_t)function, cudaSuccess;
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t stream) { return start(stream); }
API cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t stream) { return start(stream); }
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void*, void**) { return start(c->stream); }
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void*) {
    memset(out, 0, sizeof *out);
    out->maxThreadsPerBlock = 1024;
    out->numRegs = 32;
    out->binaryVersion = out->ptxVersion = 90;
    return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) {
    return *n = 2, cudaSuccess;
}
API cudaError_t cudaGetSymbolAddress(void** p, const void*) { return cudaMalloc(p, 4096); }

// cuBLAS (its headers ask for more than torch's packages hold, so its handles are plain pointers here) -------------------

struct Heuristic {  // cublasLtMatmulHeuristicResult_t
    unsigned long long algorithm[8];
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

API int cublasCreate_v2(void** handle) { return make(handle); }
API int cublasGetMathMode(void*, int* mode) { return *mode = 0; }
API int cublasGetPointerMode_v2(void*, int* mode) { return *mode = 0; }
API size_t cublasLtGetVersion() { return 10 * CUDART_VERSION; }
API int cublasLtMatmulDescCreate(void** made, int, int) { return make(made); }
API int cublasLtMatmulPreferenceCreate(void** made) { return make(made); }
API int cublasLtMatrixLayoutCreate(void** made, int, uint64_t, uint64_t, int64_t) { return make(made); }
API int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int n, Heuristic* results,
                                       int* found) {
    memset(results, 0, n * sizeof *results);
    *found = 1;
    return 0;
}
