/* Where an example runs: host memory, or the memory and a stream of a GPU. Real engines have this already.
 * The CUDA driver is loaded at run time, so that one program runs with and without it. */
#ifndef MACHINE_H
#define MACHINE_H

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t device_address;

/* Driver calls return 0 for success; contexts and streams are pointers to something opaque. */
typedef struct cuda_driver {
    int (*init)(unsigned flags);
    int (*device_get)(int *device, int ordinal);
    int (*context_retain)(void **context, int device);
    int (*context_set)(void *context);
    int (*stream_create)(void **stream, unsigned flags);
    int (*stream_synchronize)(void *stream);
    int (*stream_destroy)(void *stream);
    int (*allocate)(device_address *address, size_t bytes);
    int (*release)(device_address address);
    int (*to_device)(device_address to, const void *from, size_t bytes, void *stream);
    int (*to_host)(void *to, device_address from, size_t bytes, void *stream);
} cuda_driver;

enum { MACHINE_BLOCKS = 256 };

typedef struct machine {
    const cuda_driver *cuda; /* NULL: the CPU */
    void *cuda_context;      /* of device 0: its primary one, which the CUDA runtime uses too */
    void *stream;
    void *blocks[MACHINE_BLOCKS]; /* all memory, freed by machine_close */
    int block_count;
} machine;

static inline void machine_check(int failed, const char *what) {
    if (failed) {
        fprintf(stderr, "%s failed (%d)\n", what, failed);
        exit(1);
    }
}

static inline int cuda_symbol(void *library, const char *name, void *function) {
    void *symbol = dlsym(library, name);
    memcpy(function, &symbol, sizeof symbol); /* ISO C has no cast from a data pointer to a function */
    return symbol != NULL;
}

static inline int cuda_load(cuda_driver *cuda) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    return library && cuda_symbol(library, "cuInit", &cuda->init) &&
           cuda_symbol(library, "cuDeviceGet", &cuda->device_get) &&
           cuda_symbol(library, "cuDevicePrimaryCtxRetain", &cuda->context_retain) &&
           cuda_symbol(library, "cuCtxSetCurrent", &cuda->context_set) &&
           cuda_symbol(library, "cuStreamCreate", &cuda->stream_create) &&
           cuda_symbol(library, "cuStreamSynchronize", &cuda->stream_synchronize) &&
           cuda_symbol(library, "cuStreamDestroy_v2", &cuda->stream_destroy) &&
           cuda_symbol(library, "cuMemAlloc_v2", &cuda->allocate) &&
           cuda_symbol(library, "cuMemFree_v2", &cuda->release) &&
           cuda_symbol(library, "cuMemcpyHtoDAsync_v2", &cuda->to_device) &&
           cuda_symbol(library, "cuMemcpyDtoHAsync_v2", &cuda->to_host);
}

static inline machine machine_cpu(void) {
    machine m;
    memset(&m, 0, sizeof m);
    return m;
}

/* Says aloud why there is no run on the GPU; an error under LORA_SWITCH_REQUIRE_GPU=1. */
static inline void machine_skip_gpu(const char *why) {
    const char *required = getenv("LORA_SWITCH_REQUIRE_GPU");
    printf("skipped: GPU: %s\n", why);
    machine_check(required && strcmp(required, "1") == 0, "LORA_SWITCH_REQUIRE_GPU=1: the run on the GPU");
}

/* Device 0 with a stream of its own; 0 where there is none. */
static inline int machine_gpu(machine *m) {
    static cuda_driver cuda;
    int device = 0;
    *m = machine_cpu();
    if (!cuda_load(&cuda) || cuda.init(0) != 0 || cuda.device_get(&device, 0) != 0) {
        machine_skip_gpu("no driver or no device");
        return 0;
    }
    m->cuda = &cuda;
    machine_check(cuda.context_retain(&m->cuda_context, device), "cuDevicePrimaryCtxRetain");
    machine_check(cuda.context_set(m->cuda_context), "cuCtxSetCurrent");
    machine_check(cuda.stream_create(&m->stream, 1 /* CU_STREAM_NON_BLOCKING */), "cuStreamCreate");
    return 1;
}

static inline void machine_synchronize(const machine *m) {
    if (m->cuda) {
        machine_check(m->cuda->stream_synchronize(m->stream), "cuStreamSynchronize");
    }
}

static inline void *machine_alloc(machine *m, size_t bytes) {
    device_address address = 0;
    void *block = NULL;
    machine_check(m->block_count == MACHINE_BLOCKS, "too many blocks: allocation");
    if (m->cuda) {
        machine_check(m->cuda->allocate(&address, bytes), "cuMemAlloc");
        block = (void *)(uintptr_t)address;
    } else {
        block = malloc(bytes);
        machine_check(block == NULL, "malloc");
    }
    m->blocks[m->block_count++] = block;
    return block;
}

/* Both copies wait, so that the host's memory is free again. */
static inline void machine_upload(const machine *m, void *to, const void *from, size_t bytes) {
    if (m->cuda) {
        machine_check(m->cuda->to_device((uintptr_t)to, from, bytes, m->stream), "cuMemcpyHtoDAsync");
        machine_synchronize(m);
    } else {
        memcpy(to, from, bytes);
    }
}

static inline void machine_download(const machine *m, void *to, const void *from, size_t bytes) {
    if (m->cuda) {
        machine_check(m->cuda->to_host(to, (uintptr_t)from, bytes, m->stream), "cuMemcpyDtoHAsync");
        machine_synchronize(m);
    } else {
        memcpy(to, from, bytes);
    }
}

static inline void machine_close(machine *m) {
    machine_synchronize(m);
    while (m->block_count > 0) {
        void *block = m->blocks[--m->block_count];
        if (m->cuda) {
            machine_check(m->cuda->release((uintptr_t)block), "cuMemFree");
        } else {
            free(block);
        }
    }
    if (m->cuda) {
        machine_check(m->cuda->stream_destroy(m->stream), "cuStreamDestroy");
    }
}

#endif
