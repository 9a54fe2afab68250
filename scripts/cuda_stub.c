/* What torch and Triton ask of the CUDA runtime and the driver before they launch anything: one H100, on which
   nothing runs. scripts/dry_run.py preloads this library where there is no GPU. */
#include <driver_types.h>
#include <stdlib.h>
#include <string.h>

#define SUCCEEDS(name) int name() { return 0; }
#define SHARED_MEMORY 232448 /* bytes a block can have */

/* runtime: the device */
SUCCEEDS(cudaDeviceGetStreamPriorityRange)
SUCCEEDS(cudaGetLastError)
SUCCEEDS(cudaSetDevice)
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }

int cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
    memset(properties, 0, sizeof *properties);
    strcpy(properties->name, "stub of an H100");
    properties->major = 9;
    properties->totalGlobalMem = 79ull << 30;
    properties->multiProcessorCount = 132;
    properties->warpSize = 32;
    properties->maxThreadsPerBlock = 1024;
    properties->maxThreadsPerMultiProcessor = 2048;
    properties->regsPerBlock = 65536;
    properties->regsPerMultiprocessor = 65536;
    properties->sharedMemPerBlock = 49152;
    properties->sharedMemPerBlockOptin = SHARED_MEMORY;
    properties->sharedMemPerMultiprocessor = 233472;
    properties->l2CacheSize = 50 << 20;
    return 0;
}

/* runtime: memory, which stays as it is, since no kernel runs */
SUCCEEDS(cudaLaunchKernel)
SUCCEEDS(cudaStreamSynchronize)
int cudaMalloc(void **memory, size_t bytes) { *memory = malloc(bytes); return *memory == NULL; }
int cudaMemcpyAsync(void *to, void *from, size_t bytes) { memcpy(to, from, bytes); return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaStreamGetCaptureInfo(void *stream, int *status) { *status = 0; return 0; }

/* driver: what torch's autograd asks */
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }

/* driver: loading the kernels that Triton has compiled, and what Triton's extension module links to */
SUCCEEDS(cuCtxGetCurrent)
SUCCEEDS(cuCtxGetLimit)
SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuCtxSetLimit)
SUCCEEDS(cuDeviceGet)
SUCCEEDS(cuDevicePrimaryCtxRetain)
SUCCEEDS(cuDriverGetVersion)
SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS(cuGetErrorString)
SUCCEEDS(cuModuleGetFunction)
SUCCEEDS(cuModuleLoad)
SUCCEEDS(cuModuleLoadData)
SUCCEEDS(cuPointerGetAttribute)
int cuDeviceGetAttribute(int *value) { *value = SHARED_MEMORY; return 0; }
int cuFuncGetAttribute(int *value, int attribute) { *value = attribute ? 0 : 1024; return 0; } /* 0: threads */
