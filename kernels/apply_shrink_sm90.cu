// The first half of unmerged apply with many rows, on Hopper: one dense product of x and A of all slots,
//
//   products[row][target][slot][depth] = coefficient(row, slot at target) * (A[target, slot] x[row]),
//
// in f32 and then rounded to the adapters' type; and used[target][row], bit s: slot s takes part. What does not take part (not in the row's
// route, a coefficient of zero, a rank past the slot's) is zero, whatever A x is.
//
// A block has 192 rows, 128 columns of the stacked ranks and every kSplit-th 64 of in_features; kSplit blocks are a cluster. Roles:
//
//   producers (128 threads)  A by asynchronous copies, in the copy engine's swizzle, so that each slot may lie where it does; one of them
//                            x, by the copy engine. Operands that are not aligned come through plain loads into the same places. At
//                            last what rows use, each of four blocks for a quarter of them
//   consumers (3 x 128)      64 rows each: first what their rows' routes say, then wgmma, both operands by descriptor
//
// Then the blocks of a cluster hand each other their sums through shared memory: each adds up a part of the columns, slice after slice, so
// that a row's bits depend on nothing but the row. Columns that do not exist multiply whatever lies there, and are not looked at.
//
// What bounds it is the bytes from L2 to the multiprocessors: x once for each 128 columns, and A once for each 192 rows.
//
// The host takes kSplit 4 where 128 columns are all there are, so that 4,096 rows are enough blocks, else 2: never by the rows, on whose
// number their bits would depend. Grid: {ceil(rows / 192) * kSplit, ceil(count * slots * depth / 128)}; rows > 0, at most 32 slots.
#include "common/apply.cuh"
#include "common/ptx_sm90.cuh"

namespace {

constexpr int kConsumers = 3;  // warpgroups
constexpr int kProducers = 128, kThreads = LSW_SHRINK90_THREADS, kWarps = 4 * kConsumers;
constexpr int kConsumerRegisters = 144, kProducerRegisters = 72;
static_assert(128 * kConsumers * kConsumerRegisters + kProducers * kProducerRegisters <= 65536, "registers of a block");
constexpr int kRows = LSW_SHRINK90_ROWS, kColumns = LSW_SHRINK90_COLUMNS;
static_assert(kThreads == kProducers + 128 * kConsumers && kRows == 64 * kConsumers, "64 rows a warpgroup");
static_assert(kColumns == 128, "of an instruction");
constexpr int kStep = 64;  // columns of x a stage: one swizzle atom
constexpr int kTile = kRows * 128, kStageBytes = (kRows + kColumns) * 128, kStages = 5;
constexpr uint32_t kFirst = 3;  // stages whose x is sent for before A
constexpr int kGroups = kColumns / 16;
constexpr int kReported = kRows / 4;  // rows that each of the first four blocks of 192 reports: there are as many at least
constexpr int kMostSlots = 32, kMostFactors = LSW_APPLY_TARGETS * kMostSlots;

// 16 columns of a block: ranks of one slot at a target.
struct Group {
    uint32_t slot;
    uint32_t ranks;  // that exist, 0 to 16
    float scale;
};

template <int kSplit> struct Shared {
    static constexpr int kOwned = kColumns / kSplit;  // columns whose slices a block adds up
    static constexpr int kPitch = 2 * kOwned + 16;    // bytes of a row on its way out: rows begin in different banks
    union {
        unsigned char stages[kStages][kStageBytes];  // x, A
        struct {
            float4 sums[kSplit][kWarps][kOwned / 8][32];  // of each slice and warp, as wgmma lays them out
            unsigned char rows[kWarps][16 * kPitch];      // of each warp
        } out;
    };
    Barrier full[kStages], empty[kStages], sums;
    float gates[kReported][kMostSlots + 1];  // of a row's slots, for who reports
    uint64_t a[kColumns];  // rows of A: address, 1: not aligned; 0: there is none
    Group groups[kGroups];
    float scale[kMostFactors];
    uint32_t ranks[kMostFactors];
    float coefficients[kRows][kOwned / 16 + 1];  // of the owned columns' groups; 0: takes no part
};
static_assert(sizeof(Shared<2>) + 1024 <= LSW_SHRINK90_SHARED, "the host asks for this much shared memory");
static_assert(sizeof(Shared<4>) + 1024 <= LSW_SHRINK90_SHARED, "likewise");

// K-major, rows of 128 bytes with the copy engine's swizzle, eight of them 1,024 bytes from the next.
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
    return static_cast<uint64_t>(1024 >> 4 | 1 << 30) << 32 | 1 << 16 | address >> 4;
}

// All threads: what the bank has of the call's factors, and of this block's columns.
template <int kSplit> __device__ __forceinline__ void describe(const LswShrink90Args& args, Shared<kSplit>& s, uint32_t first_column) {
    const LswApplyArgs& a = args.apply;
    const uint32_t factors = a.count * a.slots;
    if (threadIdx.x < kColumns) {
        const uint32_t column = first_column + threadIdx.x, factor = column / args.depth, rank = column % args.depth;
        LswFactor f = {};
        if (factor < factors) f = factor_of(a.targets[factor / a.slots], factor % a.slots);
        const uint64_t address = f.a + 2 * rank * static_cast<uint64_t>(f.a_stride);
        s.a[threadIdx.x] = rank < f.rank ? address | (f.flags & LSW_A_ALIGNED ? 0 : 1) : 0;
        if (threadIdx.x % 16 == 0) s.groups[threadIdx.x / 16] = {factor % a.slots, f.rank > rank ? min(16, f.rank - rank) : 0, f.scale};
    } else if (const uint32_t i = threadIdx.x - kColumns; i < factors) {
        static_assert(kThreads - 32 - kColumns >= kMostFactors, "a factor a thread");
        const LswFactor& f = factor_of(a.targets[i / a.slots], i % a.slots);
        s.scale[i] = f.scale, s.ranks[i] = f.rank;
    }
}

// One thread: the entries of a row's route that name a slot, in order.
template <class Visit> __device__ __forceinline__ void for_each_entry(const LswApplyArgs& a, uint32_t row, bool reports, Visit visit) {
    constexpr uint32_t kAhead = 4;
    const int64_t item = row < a.rows ? item_of(a, row) : -1;
    for (uint32_t e0 = 0; item >= 0 && e0 < a.k; e0 += kAhead) {
        int slot[kAhead];
        float gate[kAhead];
#pragma unroll
        for (uint32_t e = 0; e < kAhead; ++e) slot[e] = id_at(a, item, e0 + e), gate[e] = gate_at(a, item, e0 + e);
#pragma unroll
        for (uint32_t e = 0; e < kAhead; ++e) {
            if (reports) report_id(a, slot[e]);
            if (known_id(slot[e], a.slots) >= 0) visit(static_cast<uint32_t>(slot[e]), gate[e]);
        }
    }
}

// One thread: a row's coefficients of the groups that this block adds up. Gates of a slot that is there twice are added first.
template <int kSplit>
__device__ __forceinline__ void load_coefficients(const LswShrink90Args& args, Shared<kSplit>& s, uint32_t slice, uint32_t i, uint32_t row) {
    constexpr int kOwned = kGroups / kSplit;
    float gates[kOwned];
    uint32_t uses = 0;
    for_each_entry(args.apply, row, false, [&](uint32_t slot, float gate) {
#pragma unroll
        for (int g = 0; g < kOwned; ++g) {
            if (slot != s.groups[slice * kOwned + g].slot) continue;
            gates[g] = uses >> g & 1 ? gates[g] + gate : gate;
            uses |= 1u << g;
        }
    });
#pragma unroll
    for (int g = 0; g < kOwned; ++g) s.coefficients[i][g] = uses >> g & 1 ? gates[g] * s.groups[slice * kOwned + g].scale : 0.0f;
}

// One thread: what a row uses, and what is odd about it.
template <int kSplit> __device__ __forceinline__ void report(const LswShrink90Args& args, Shared<kSplit>& s, uint32_t i, uint32_t row) {
    const LswApplyArgs& a = args.apply;
    uint32_t route = 0;
    for_each_entry(a, row, true, [&](uint32_t slot, float gate) {
        float& sum = s.gates[i][slot];
        sum = route >> slot & 1 ? sum + gate : gate;
        route |= 1u << slot;
    });
    for (uint32_t t = 0; t < a.count; ++t) {
        uint32_t used = 0;
        for (uint32_t left = route; left != 0; left &= left - 1) {
            const uint32_t slot = __ffs(left) - 1;
            const float c = s.gates[i][slot] * s.scale[t * a.slots + slot];
            report_coefficient(a, s.ranks[t * a.slots + slot], c);
            if (s.ranks[t * a.slots + slot] > 0 && c != 0.0f) used |= 1u << slot;
        }
        reinterpret_cast<uint32_t*>(args.used)[t * static_cast<uint64_t>(args.used_stride) + row] = used;
    }
}

// A producer thread: its 16 bytes of each 16th row of A, block of 64 columns after block.
struct Copies {
    uint64_t rows[kGroups];  // where its part of a row begins; of one that is not there to be copied, that of one that is
    bool any = false, is_slow = false;

    __device__ __forceinline__ static uint32_t chunk() { return threadIdx.x % 8; }
    __device__ __forceinline__ static uint32_t row() { return threadIdx.x / 8; }

    __device__ __forceinline__ explicit Copies(const uint64_t (&a)[kColumns]) {
        uint64_t other = 0;
#pragma unroll
        for (int pass = 0; pass < 2; ++pass) {
#pragma unroll
            for (int g = 0; g < kGroups; ++g) {
                const uint64_t address = a[16 * g + row()];
                is_slow |= address & 1;
                if (address != 0 && !(address & 1)) other = address, any = true;
                rows[g] = other + 16 * chunk();
            }
        }
    }
    __device__ __forceinline__ void issue(uint32_t tile, uint32_t column, uint32_t in) const {
        if (!any) return;
        const uint32_t to = tile + row() * 128 + (chunk() ^ row() % 8) * 16, mine = column + 8 * chunk();
        if (column + kStep <= in) {
#pragma unroll
            for (int g = 0; g < kGroups; ++g) copy16_async(to + 2048 * g, reinterpret_cast<const void*>(rows[g] + 2 * column));
        } else {
            const uint32_t bytes = mine < in ? min(16u, 2 * (in - mine)) : 0;
#pragma unroll
            for (int g = 0; g < kGroups; ++g) copy16_partly(to + 2048 * g, reinterpret_cast<const void*>(rows[g] + 2 * column), bytes);
        }
    }
};

// All producers: rows that are not aligned, by plain loads into the same places. `row_at(i)`: where row i begins, 0: there is nothing to do.
template <class T, class RowAt>
__device__ __forceinline__ void load_slowly(unsigned char* tile, int rows, uint32_t column, uint32_t in, RowAt row_at) {
    const uint32_t chunk = threadIdx.x % 8, mine = column + 8 * chunk;
#pragma unroll 1
    for (int i = threadIdx.x / 8; i < rows; i += 16) {
        const uint64_t row = row_at(i);
        if (row == 0) continue;
        const Eight<T> eight = load_eight(reinterpret_cast<const T*>(row) + mine, mine < in ? in - mine : 0, false);
        *reinterpret_cast<uint4*>(tile + i * 128 + (chunk ^ i % 8) * 16) = eight.part[0].bits;
    }
}

template <int kSplit, class T> __device__ __forceinline__ void shrink(const LswShrink90Args& args) {
    extern __shared__ unsigned char memory[];
    Shared<kSplit>& s = *reinterpret_cast<Shared<kSplit>*>(memory + (-shared_address(memory) & 1023));
    const LswApplyArgs& a = args.apply;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t slice = blockIdx.x % kSplit, first_row = blockIdx.x / kSplit * kRows, first_column = blockIdx.y * kColumns;
    // Slices take turns: the blocks of a cluster read neighbouring columns at a time.
    const uint32_t all_steps = (a.in + kStep - 1) / kStep, steps = (all_steps + kSplit - 1 - slice) / kSplit;
    const uint32_t ahead = min(steps, static_cast<uint32_t>(kStages));
    const auto column_of = [&](uint32_t step) { return kStep * (step * kSplit + slice); };
    const auto bring_x = [&](uint32_t step) {
        Barrier& full = s.full[step % kStages];
        full.arrive_expecting(kTile);
        load_box(s.stages[step % kStages], &args.x, column_of(step), first_row, full, kEvictFirst);
    };

    dependency_wait();
    dependency_release();
    if (warp == kThreads / 32 - 1) {
        // The first of x, while the others look at the bank.
        if (lane == 0) {
            for (int i = 0; i < kStages; ++i) s.full[i].init(kProducers + 1), s.empty[i].init(kWarps);
            s.sums.init(1);
            fence_barrier_init();
            s.sums.arrive_expecting((kSplit - 1) * kRows * s.kOwned * 4);
        }
        __syncwarp();
        arrive_some<1, kThreads>();
        for (uint32_t step = 0; lane == 0 && a.x_aligned && step < min(ahead, kFirst); ++step) bring_x(step);
        __syncwarp();
    } else {
        describe(args, s, first_column);
        sync_some<1, kThreads>();
    }

    if (warp < kProducers / 32) {
        give_registers<kProducerRegisters>();
        const Copies copies(s.a);
        const auto bring_a = [&](uint32_t step) {
            const uint32_t stage = step % kStages, column = column_of(step);
            unsigned char *x = s.stages[stage], *adapters = x + kTile;
            copies.issue(shared_address(adapters), column, a.in);
            if (!copies.is_slow && a.x_aligned) {
                s.full[stage].arrive_after_copies();
                return;
            }
            // Some copies went to places of rows that are not aligned.
            copy_commit();
            copy_wait<0>();
            load_slowly<T>(adapters, kColumns, column, a.in, [&](int i) { return s.a[i] & 1 ? s.a[i] - 1 : 0; });
            if (!a.x_aligned) {
                load_slowly<T>(x, kRows, column, a.in, [&](int i) {
                    const uint64_t row = first_row + i;
                    return row < a.rows ? a.x + 2 * row * a.x_stride : 0;
                });
                if (threadIdx.x == 0) s.full[stage].arrive();
            }
            s.full[stage].arrive();
        };
        for (uint32_t step = 0; step < ahead; ++step) bring_a(step);
        for (uint32_t step = kFirst; threadIdx.x == 0 && a.x_aligned && step < ahead; ++step) bring_x(step);
        __syncwarp();
        for (uint32_t step = ahead; step < steps; ++step) {
            s.empty[step % kStages].wait((step / kStages & 1) ^ 1);
            if (threadIdx.x == 0 && a.x_aligned) bring_x(step);
            __syncwarp();
            bring_a(step);
        }
        // While the last products run.
        const uint32_t part = blockIdx.y * kSplit + slice, row = first_row + part * kReported + threadIdx.x;
        if (part < 4 && threadIdx.x < kReported && row < a.rows) report(args, s, threadIdx.x, row);
        __syncwarp();
        // The sums take the stages' place.
        copy_commit();
        copy_wait<0>();
        __syncthreads();
        cluster_arrive();
        cluster_wait();
        return;
    }

    take_registers<kConsumerRegisters>();
    const uint32_t thread = threadIdx.x - kProducers, mine = warp - kProducers / 32;
    if (thread < kRows) load_coefficients(args, s, slice, thread, first_row + thread);
    float sum[kColumns / 2];
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) sum[i] = 0.0f;
    for (uint32_t step = 0; step < steps; ++step) {
        const uint32_t stage = step % kStages;
        s.full[stage].wait(step / kStages & 1);
        fence_async_shared();
        const uint64_t x = descriptor(shared_address(s.stages[stage]) + thread / 128 * 8192);
        const uint64_t adapters = descriptor(shared_address(s.stages[stage]) + kTile);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kStep / 16; ++k) wgmma_k_major(sum, x + 2 * k, adapters + 2 * k, true, T{});
        wgmma_commit();
        if (step > 0) {
            wgmma_wait<1>();
            s.empty[(step - 1) % kStages].arrive_if(lane == 0);
        }
    }
    wgmma_wait<0>(sum);

    // To each other block its columns. Its pipeline must have come to rest first.
    __syncthreads();
    cluster_arrive();
    cluster_wait();
    constexpr int kEighths = s.kOwned / 8, kOwnedGroups = kEighths / 2, kPitch = s.kPitch;
    float4 own[kEighths];
#pragma unroll
    for (int p = 0; p < kSplit; ++p) {
        const uint32_t to = address_in(p, &s.out.sums[slice][mine][0][lane]), barrier = address_in(p, &s.sums);
#pragma unroll
        for (int j = 0; j < kEighths; ++j) {
            const float* d = sum + 4 * (p * kEighths + j);
            const float4 four = {d[0], d[1], d[2], d[3]};
            if (p == slice) own[j] = four;
            else store16_counted(to + j * 512, four, barrier);
        }
    }
    const uint32_t base = mine * 16;
    float coefficients[kOwnedGroups][2];
    uint32_t ranks[kOwnedGroups];
#pragma unroll
    for (int g = 0; g < kOwnedGroups; ++g) {
        ranks[g] = s.groups[slice * kOwnedGroups + g].ranks;
        for (int h = 0; h < 2; ++h) coefficients[g][h] = s.coefficients[base + lane / 4 + 8 * h][g];
    }
    s.sums.wait(0);
    uint32_t words[kOwnedGroups][4];
#pragma unroll
    for (int g = 0; g < kOwnedGroups; ++g) {
        float4 total[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
#pragma unroll
            for (int p = 0; p < kSplit; ++p) {
                const float4 part = p == slice ? own[2 * g + e] : s.out.sums[p][mine][2 * g + e][lane];
                total[e] = p == 0 ? part : float4{total[e].x + part.x, total[e].y + part.y, total[e].z + part.z, total[e].w + part.w};
            }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float c = coefficients[g][h];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const uint32_t rank = 8 * e + 2 * (lane % 4);
                const float2 two = h == 0 ? float2{total[e].x, total[e].y} : float2{total[e].z, total[e].w};
                words[g][2 * e + h] =
                    pack({c != 0.0f && rank < ranks[g] ? c * two.x : 0.0f, c != 0.0f && rank + 1 < ranks[g] ? c * two.y : 0.0f}, T{});
            }
        }
    }
    // Out by whole 16 bytes of a row.
    unsigned char* rows = s.out.rows[mine];
#pragma unroll
    for (int g = 0; g < kOwnedGroups; ++g) stmatrix4(rows + lane % 16 * kPitch + (2 * g + lane / 16) * 16, words[g]);
    __syncwarp();
    const uint32_t columns = a.count * a.slots * args.depth;
#pragma unroll
    for (int i = lane; i < 16 * kEighths; i += 32) {
        const uint32_t r = i / kEighths, j = i % kEighths;
        const uint32_t row = first_row + base + r, column = first_column + slice * s.kOwned + 8 * j;
        if (row >= a.rows || column >= columns) continue;
        store16_whole(reinterpret_cast<T*>(args.products) + static_cast<uint64_t>(row) * columns + column,
                      *reinterpret_cast<const uint4*>(rows + r * kPitch + j * 16));
    }
}

}  // namespace

// The copy engine wants its map at a multiple of 64 bytes.
struct alignas(64) Args : LswShrink90Args {};
static_assert(sizeof(Args) == sizeof(LswShrink90Args), "what the host passes");

#define LSW_SHRINK(split, T, suffix)                                                        \
    extern "C" __global__ void __cluster_dims__(split, 1, 1) __launch_bounds__(kThreads, 1) \
        lsw_apply_shrink_##split##_##suffix##_sm90(const __grid_constant__ Args args) {     \
        if (args.apply.rows > 0) shrink<split, T>(args);                                    \
        else dependency_wait();                                                             \
    }
LSW_SHRINK(2, __nv_bfloat16, bf16)
LSW_SHRINK(4, __nv_bfloat16, bf16)
