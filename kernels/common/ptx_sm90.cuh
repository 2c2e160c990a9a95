// Inline assembly of the Hopper path: mbarriers, bulk tensor copies, wgmma.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "ptx.cuh"

// Clusters. Whoever touches another block's shared memory waits first until that block has arrived; the arrival orders no memory.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

// Where another block of the cluster has what this one has at `p`.
__device__ __forceinline__ uint32_t address_in(uint32_t rank, const void* p) {
    uint32_t address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(rank));
    return address;
}

// 16 bytes into a block's shared memory; counted by a barrier there, whose waiters see them.
__device__ __forceinline__ void store16_counted(uint32_t address, float4 x, uint32_t barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address), "f"(x.x), "f"(x.y),
                 "f"(x.z), "f"(x.w), "r"(barrier)
                 : "memory");
}

// True in one lane of the warp; the compiler knows that it is one.
__device__ __forceinline__ bool elect_one() {
    uint32_t elected;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
    return elected;
}

// Waits for two barriers: one latency where both are through.
__device__ __forceinline__ void wait_both(Barrier& a, uint32_t a_parity, Barrier& b, uint32_t b_parity) {
    asm volatile(
        "{\n"
        ".reg .pred one, other;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 one, [%0], %1;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 other, [%2], %3;\n"
        "and.pred one, one, other;\n"
        "@one bra.uni finished;\n"
        "bra.uni again;\n"
        "finished:\n"
        "}\n" ::"r"(shared_address(&a.word)),
        "r"(a_parity), "r"(shared_address(&b.word)), "r"(b_parity)
        : "memory");
}

// Whether both are through now.
__device__ __forceinline__ bool test_both(Barrier& a, uint32_t a_parity, Barrier& b, uint32_t b_parity) {
    uint32_t done;
    asm volatile(
        "{\n"
        ".reg .pred one, other;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 one, [%1], %2;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 other, [%3], %4;\n"
        "and.pred one, one, other;\n"
        "selp.u32 %0, 1, 0, one;\n"
        "}\n"
        : "=r"(done)
        : "r"(shared_address(&a.word)), "r"(a_parity), "r"(shared_address(&b.word)), "r"(b_parity)
        : "memory");
    return done;
}

// An arrival at a barrier of sync_some, for who does not wait there.
template <int kBarrier, int kThreads> __device__ __forceinline__ void arrive_some() {
    asm volatile("bar.arrive %0, %1;" ::"n"(kBarrier), "n"(kThreads) : "memory");
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Makes this thread's shared-memory stores visible to the copy engine and the tensor cores.
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// A tensor map in global memory that an earlier kernel wrote.
__device__ __forceinline__ void fence_tensor_map(const void* map) {
    asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" ::"l"(map) : "memory");
}

// How L2 treats what a load brings: as anything, as what will be read again and is evicted last, or as what goes first.
constexpr uint64_t kEvictNormal = 0x1000000000000000, kEvictLast = 0x14f0000000000000, kEvictFirst = 0x12f0000000000000;

// As in ptx.cuh, to an address of shared memory.
__device__ __forceinline__ void copy16_async(uint32_t shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
// As there: the first `bytes` of 16, and zeros.
__device__ __forceinline__ void copy16_partly(uint32_t shared, const void* global, uint32_t bytes, uint64_t policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared), "l"(global), "r"(bytes), "l"(policy)
                 : "memory");
}

// A box of a matrix, global to shared; completes on the barrier. Outside the matrix: zeros.
__device__ __forceinline__ void load_box(void* shared, const void* map, int col, int row, Barrier& full, uint64_t policy = kEvictNormal) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(
            shared_address(shared)),
        "l"(map), "r"(col), "r"(row), "r"(shared_address(&full.word)), "l"(policy)
        : "memory");
}
// The same of three dimensions.
__device__ __forceinline__ void load_cube(void* shared, const void* map, int x, int y, int z, Barrier& full, uint64_t policy = kEvictNormal) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(
            shared_address(shared)),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(shared_address(&full.word)), "l"(policy)
        : "memory");
}
// The same of a matrix seen as blocks of columns: [cols / 64][rows][64].
__device__ __forceinline__ void load_blocks(void* shared, const void* map, int block, int row, Barrier& full, uint64_t policy = kEvictNormal) {
    load_cube(shared, map, 0, row, block, full, policy);
}
__device__ __forceinline__ void store_blocks(const void* map, int block, int row, const void* shared) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(map), "r"(0), "r"(row),
                 "r"(block), "r"(shared_address(shared))
                 : "memory");
}
// A box, shared to global, as part of the thread's current group. Outside the matrix nothing is written.
__device__ __forceinline__ void store_box(const void* map, int col, int row, const void* shared) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(col), "r"(row),
                 "r"(shared_address(shared))
                 : "memory");
}
__device__ __forceinline__ void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Consecutive bytes, global to shared: addresses and their number are multiples of 16.
__device__ __forceinline__ void load_bytes(void* shared, const void* global, uint32_t bytes, Barrier& full) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(shared)), "l"(global),
                 "r"(bytes), "r"(shared_address(&full.word))
                 : "memory");
}
// Until the thread's stores have read shared memory; until they are complete.
__device__ __forceinline__ void store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

template <int kRegisters> __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters> __device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most kPending groups are in flight.
template <int kPending> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The same for whoever reads `d` next: nothing in a wait says to the compiler that it is about d, and it may move the reads in front of it.
template <int kPending, int kSize> __device__ __forceinline__ void wgmma_wait(float (&d)[kSize]) {
    wgmma_wait<kPending>();
#pragma unroll
    for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// d (f32, of 64 rows) = or += a (64 x 16) b, of 16 rows: `AB` names the operands, `MAJORS` says of those in shared memory, by descriptor, which
// are M-major and N-major and not K-major.
#define LSW_D32                                                                                                                          \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, "                \
    "%25, %26, %27, %28, %29, %30, %31"
#define LSW_D64                                                                                                                          \
    LSW_D32 ", "                                                                                                                         \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, "                \
    "%55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LSW_SUMS_32                                                                                                                      \
    "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]),              \
    "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]),                 \
    "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),                 \
    "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define LSW_SUMS_64                                                                                                                      \
    LSW_SUMS_32,                                                                                                                         \
    "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),                 \
    "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]),                 \
    "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]),                 \
    "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define LSW_WGMMA(N, D, TYPE, AB, ADD, MAJORS)                                                                                            \
    "{\n.reg .pred add;\nsetp.ne.b32 add, " ADD ", 0;\n"                                                                                  \
    "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" D "}, " AB ", add, 1, 1, " MAJORS ";\n}\n"

// Of b's 128 columns, both in shared memory.
#define LSW_WGMMA_SHARED(NAME, T, TYPE, MAJORS)                                                                                           \
    __device__ __forceinline__ void NAME(float (&d)[64], uint64_t a, uint64_t b, int add, T) {                                            \
        asm volatile(LSW_WGMMA("128", LSW_D64, TYPE, "%64, %65", "%66", MAJORS) : LSW_SUMS_64 : "l"(a), "l"(b), "r"(add));                \
    }
LSW_WGMMA_SHARED(wgmma, __nv_bfloat16, "bf16", "0, 1")
LSW_WGMMA_SHARED(wgmma, __half, "f16", "0, 1")
LSW_WGMMA_SHARED(wgmma_k_major, __nv_bfloat16, "bf16", "0, 0")
LSW_WGMMA_SHARED(wgmma_m_major, __nv_bfloat16, "bf16", "1, 0")
LSW_WGMMA_SHARED(wgmma_m_major, __half, "f16", "1, 0")
// Of its 64 columns.
#define LSW_WGMMA_SHARED_HALF(T, TYPE)                                                                                                    \
    __device__ __forceinline__ void wgmma(float (&d)[32], uint64_t a, uint64_t b, int add, T) {                                           \
        asm volatile(LSW_WGMMA("64", LSW_D32, TYPE, "%32, %33", "%34", "0, 1") : LSW_SUMS_32 : "l"(a), "l"(b), "r"(add));                 \
    }
LSW_WGMMA_SHARED_HALF(__nv_bfloat16, "bf16")
LSW_WGMMA_SHARED_HALF(__half, "f16")

// a in registers, of warp w's 16 rows what ldmatrix4 gives of [16, 16]. Of b's 64 columns.
#define LSW_WGMMA_HELD(NAME, T, TYPE, N_MAJOR)                                                                                            \
    __device__ __forceinline__ void NAME(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int add, T) {                                \
        asm volatile(LSW_WGMMA("64", LSW_D32, TYPE, "{%32, %33, %34, %35}, %36", "%37", N_MAJOR)                                          \
                     : LSW_SUMS_32                                                                                                        \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                                                     \
    }
LSW_WGMMA_HELD(wgmma, __nv_bfloat16, "bf16", "1")
LSW_WGMMA_HELD(wgmma, __half, "f16", "1")
LSW_WGMMA_HELD(wgmma_k_major, __nv_bfloat16, "bf16", "0")
LSW_WGMMA_HELD(wgmma_k_major, __half, "f16", "0")
// Of its 128 columns.
#define LSW_WGMMA_HELD_WIDE(T, TYPE)                                                                                                      \
    __device__ __forceinline__ void wgmma_k_major(float (&d)[64], const uint32_t (&a)[4], uint64_t b, int add, T) {                       \
        asm volatile(LSW_WGMMA("128", LSW_D64, TYPE, "{%64, %65, %66, %67}, %68", "%69", "0")                                             \
                     : LSW_SUMS_64                                                                                                        \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                                                     \
    }
LSW_WGMMA_HELD_WIDE(__nv_bfloat16, "bf16")
LSW_WGMMA_HELD_WIDE(__half, "f16")

// Four 8x8 matrices of 16-bit elements, registers to shared memory; addresses as for ldmatrix4.
__device__ __forceinline__ void stmatrix4(void* row, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3])
                 : "memory");
}
// The same of their transposes; addresses as for ldmatrix4_transposed.
__device__ __forceinline__ void stmatrix4_transposed(void* row, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3])
                 : "memory");
}
