// Gather-scatter: group the tokens of a batch by expert, and combine the weighted results.
//
//   maps     item (t, j) has expert ids[t, j]; a stable sort of the items by expert gives
//            offsets [n + 1]       where each expert's rows begin: multiples of the block
//            row_map [rows]        row -> item t k + j; the filler where there is none
//            inverse [T, k]        item -> row; -1 for an id that is none of these experts
//            block_experts         the expert of each block of rows; -1 past the last
//   gather   rows[inverse[t, j]] = x[t]
//   combine  y[t] = residual[t] + scale * sum over j of gates[t, j] rows[inverse[t, j]], in f32, j ascending
//
// The sort counts and scatters, and is stable without comparing: each block owns a contiguous run of items, so the row of an item is
//     offsets[e] + items of e in earlier blocks + in earlier tiles and warps of its block + earlier in its own warp,
// and each of these is a plain sum. A tile is kThreads * kRounds items in registers. In a round a warp looks at 32 consecutive items: one
// ballot for each bit of the digit finds the lanes that share it, popc of the lower ones is the rank among them, and the warp's own
// counters in shared memory carry it from round to round. No atomic decides an order, so the maps are the same bits in every run,
// whatever the grid.
//
// Launches. Up to a tile of items one block does all, since its own counts are the totals. More take two: `count` leaves a count for
// each block and expert, `scatter` adds up the columns (blocks x n words from L2 for each block). Above 1,024 experts the counters
// outgrow shared memory: two passes by 8 bits of the expert, the low ones first, as a radix sort does; `scan` between them turns a
// histogram into offsets.
//
// Floors: the maps move little (131,072 items: 1.6 MB, 0.4 us). A launch costs 0.6 us, and every step that depends on L2 or shared memory
// adds to a chain: on an H200 16,384 x 8 ids over 256 experts take 10.7 us, of which the sums are a third, since all blocks together read
// 17 MB of counts. gather and combine move every row once: gather reads a token's row once and writes it to its experts' rows, so that x
// counts once and not k times. Both give a warp a piece of one token: lane j holds the token's j-th row (and gate), so that the indices
// cost one load, and shuffles hand them out. 16 bytes a lane where everything is aligned; else the widest unit that is (gather), or an
// element (combine). combine keeps two rows of two packs a lane in flight: the DRAM likes few rows at a time and long pieces of each
// (eight rows of one pack: 1.40 of the floor; two of two: 1.01).
//
// Tried and dropped (kernels/NOTES.md): match_any for the ballots (0.2 us a round for one digit in a warp, 0.9 us for many), counts read
// one after the other, copies by the bulk engine (no faster than these), programmatic dependent launch (1-2 us less where there are few
// blocks, more where there are many).
#include "args.h"
#include "common/num.cuh"
#include "common/pack.cuh"
#include "common/ptx.cuh"

namespace {

constexpr int kThreads = LSW_PERMUTE_THREADS;
constexpr int kWarps = kThreads / 32;
constexpr int kRounds = LSW_PERMUTE_ROUNDS;
constexpr uint32_t kTile = kThreads * kRounds;
constexpr uint32_t kNone = 0xffffffffu;
static_assert(kTile < 65536, "counters of a tile have 16 bits");
static_assert(LSW_MAX_K <= 32, "a lane holds each of a token's experts");

__device__ __forceinline__ uint32_t lane() { return threadIdx.x % 32; }
__device__ __forceinline__ uint32_t warp() { return threadIdx.x / 32; }

// Where item t k + j stands in a [T, k] matrix.
__device__ __forceinline__ uint64_t place(uint32_t item, uint32_t k, uint64_t stride) {
    return stride == k ? item : item / k * stride + item % k;
}

// What a thread holds of a tile: in round r, lane l of warp w has entry (w * kRounds + r) * 32 + l.
struct Tile {
    uint32_t item[kRounds];    // kNone past the end
    uint32_t expert[kRounds];  // from `first` on
    uint32_t digit[kRounds];   // kNone: dropped
};

__device__ __forceinline__ Tile load_tile(const LswPermuteArgs& args, uint32_t begin, uint32_t end) {
    Tile tile;
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
        const uint32_t i = begin + (warp() * kRounds + r) * 32 + lane();
        tile.item[r] = i >= end ? kNone : args.order ? reinterpret_cast<const uint32_t*>(args.order)[i] : i;
    }
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
        tile.digit[r] = kNone;
        if (tile.item[r] == kNone) continue;
        const int32_t id = reinterpret_cast<const int32_t*>(args.ids)[place(tile.item[r], args.k, args.ids_stride)];
        tile.expert[r] = static_cast<uint32_t>(id) - args.first;  // an id below wraps around, and is past the last too
        if (tile.expert[r] < args.experts) tile.digit[r] = tile.expert[r] >> args.digit_shift & args.digit_mask;
        if (static_cast<uint32_t>(id) + 1 > args.all_experts) atomicOr(reinterpret_cast<uint32_t*>(args.status), LSW_ODD_ID);
    }
    return tile;
}

struct Run {
    uint32_t begin, end;
};

__device__ __forceinline__ Run own_run(const LswPermuteArgs& args) {
    const uint32_t length = args.order ? *reinterpret_cast<const uint32_t*>(args.order_count) : args.items;
    const uint32_t begin = blockIdx.x * args.run;
    return {begin, min(length, begin + args.run)};
}

// The items of this block's run, by digit. Ends with a barrier.
__device__ void count_run(const LswPermuteArgs& args, uint32_t* counts) {
    for (uint32_t d = threadIdx.x; d < args.digits; d += kThreads) counts[d] = 0;
    __syncthreads();
    const Run run = own_run(args);
    for (uint32_t begin = run.begin; begin < run.end; begin += kTile) {
        const Tile tile = load_tile(args, begin, run.end);
#pragma unroll
        for (int r = 0; r < kRounds; ++r) {
            if (tile.digit[r] == kNone) continue;
            atomicAdd(&counts[tile.digit[r]], 1);
            if (args.histogram && !args.order) atomicAdd(reinterpret_cast<uint32_t*>(args.histogram) + tile.expert[r], 1);
        }
    }
    __syncthreads();
}

// Adds up the items of all blocks (totals), and to `next` those of the blocks before this one. Ends with a barrier.
__device__ void sum_counts(const LswPermuteArgs& args, uint32_t* totals, uint32_t* next) {
    for (uint32_t d = threadIdx.x; d < args.digits; d += kThreads) totals[d] = 0;
    __syncthreads();
    constexpr int kFlight = 16;                               // loads; one after the other they would take most of the kernel
    const uint32_t groups = max(kThreads / args.digits, 1u);  // of threads, which share the blocks of a column
    for (uint32_t i = threadIdx.x; i < args.digits * groups; i += kThreads) {
        const uint32_t d = i % args.digits;
        uint32_t total = 0, earlier = 0;
        for (uint32_t first = i / args.digits; first < args.blocks; first += kFlight * groups) {
            uint32_t count[kFlight];
#pragma unroll
            for (int f = 0; f < kFlight; ++f) {
                const uint32_t b = first + f * groups;
                count[f] = b < args.blocks ? reinterpret_cast<const uint32_t*>(args.counts)[b * args.digits + d] : 0;
            }
#pragma unroll
            for (int f = 0; f < kFlight; ++f) {
                total += count[f];
                if (first + f * groups < blockIdx.x) earlier += count[f];
            }
        }
        atomicAdd(&totals[d], total);
        atomicAdd(&next[d], earlier);
    }
    __syncthreads();
}

__device__ __forceinline__ uint32_t padded(uint32_t size, uint32_t block) { return (size + block - 1) / block * block; }

// Where segments of these sizes, each rounded up to whole blocks, begin if the first begins at `start`: offsets [count + 1]. Ends with a
// barrier.
__device__ void scan(const uint32_t* sizes, uint32_t count, uint32_t block, uint32_t start, uint32_t* offsets) {
    __shared__ uint32_t warp_sums[kWarps];
    if (threadIdx.x == 0) offsets[0] = start;
    for (uint32_t first = 0; first < count; first += kThreads) {
        const uint32_t i = first + threadIdx.x;
        uint32_t sum = i < count ? padded(sizes[i], block) : 0;
        for (int step = 1; step < 32; step *= 2) {
            const uint32_t below = __shfl_up_sync(kFullWarp, sum, step);
            if (lane() >= step) sum += below;
        }
        if (lane() == 31) warp_sums[warp()] = sum;
        __syncthreads();
        const uint32_t other = lane() < kWarps ? warp_sums[lane()] : 0;
        const uint32_t before = start + __reduce_add_sync(kFullWarp, lane() < warp() ? other : 0);
        start += __reduce_add_sync(kFullWarp, other);
        if (i < count) offsets[i + 1] = before + sum;
        __syncthreads();
    }
}

// The expert that a row below the last offset belongs to: the last that begins at or before it.
__device__ __forceinline__ int32_t owner(const uint32_t* offsets, uint32_t experts, uint32_t row) {
    uint32_t low = 0, high = experts;
    while (high - low > 1) {
        const uint32_t middle = (low + high) / 2;
        (offsets[middle] <= row ? low : high) = middle;
    }
    return static_cast<int32_t>(low);
}

// What no item writes: the rows that pad an expert's segment, those past the last one, and the experts of the blocks.
__device__ void fill(const LswPermuteArgs& args, const uint32_t* offsets, const uint32_t* sizes, uint32_t count) {
    const uint32_t thread = blockIdx.x * kThreads + threadIdx.x, threads = args.blocks * kThreads;
    int32_t* row_map = reinterpret_cast<int32_t*>(args.row_map);
    // A warp an expert. Where there are more experts than warps, a lane looks one up for its warp.
    for (uint32_t first = thread / 32; first < count; first += threads) {
        const uint32_t e = first + lane() * (threads / 32);
        const uint32_t from = e < count ? offsets[e] + sizes[e] : 0, to = e < count ? offsets[e + 1] : 0;
        for (uint32_t left = __ballot_sync(kFullWarp, from < to); left != 0; left &= left - 1) {
            const uint32_t begin = __shfl_sync(kFullWarp, from, __ffs(left) - 1), end = __shfl_sync(kFullWarp, to, __ffs(left) - 1);
#pragma unroll 1
            for (uint32_t row = begin + lane(); row < end; row += 32) row_map[row] = args.filler;
        }
    }
    const uint32_t end = offsets[count];
#pragma unroll 1
    for (uint32_t row = end + thread; row < args.rows; row += threads) row_map[row] = args.filler;
#pragma unroll 1
    for (uint32_t b = thread; b < args.row_blocks; b += threads) {
        const uint32_t row = b * args.block;
        reinterpret_cast<int32_t*>(args.block_experts)[b] = row < end ? owner(offsets, count, row) : -1;
    }
}

// Ranks of a tile's entries within it: `rank` among its warp's, and in ranks [kWarps, pitch], for each warp and digit, how many of the
// tile are left where that warp begins. `next[d]` moves past the tile. Ends with a barrier.
__device__ void rank_tile(const LswPermuteArgs& args, const Tile& tile, uint32_t (&rank)[kRounds], uint32_t* next, uint16_t* ranks, uint32_t pitch) {
    uint16_t* mine = ranks + warp() * pitch;
    __syncwarp();  // the warp has written the tile before
    for (uint32_t d = lane(); d < pitch / 2; d += 32) reinterpret_cast<uint32_t*>(mine)[d] = 0;
    uint32_t same[kRounds];  // the lanes that share a lane's digit
#pragma unroll
    for (int r = 0; r < kRounds; ++r) same[r] = __ballot_sync(kFullWarp, tile.digit[r] != kNone);
    for (uint32_t bit = 0; bit < args.digit_bits; ++bit) {
#pragma unroll
        for (int r = 0; r < kRounds; ++r) {
            const uint32_t own = tile.digit[r] >> bit & 1;
            same[r] &= __ballot_sync(kFullWarp, own) ^ (own - 1);  // the lanes with a one, or all others
        }
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
        const uint32_t d = tile.digit[r];
        const uint32_t below = __popc(same[r] & ((1u << lane()) - 1));
        if (d != kNone) rank[r] = mine[d] + below;
        __syncwarp();
        if (d != kNone && below == 0) mine[d] += __popc(same[r]);
        __syncwarp();
    }
    __syncthreads();
    for (uint32_t d = threadIdx.x; d < args.digits; d += kThreads) {
        uint32_t count[kWarps], sum = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) count[w] = ranks[w * pitch + d];
#pragma unroll
        for (int w = kWarps - 1; w >= 0; --w) ranks[w * pitch + d] = sum += count[w];
        next[d] += sum;
    }
    __syncthreads();
}

__device__ void write_tile(const LswPermuteArgs& args, const Tile& tile, const uint32_t (&rank)[kRounds], const uint32_t* next, const uint16_t* ranks,
                           uint32_t pitch) {
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
        if (tile.item[r] == kNone) continue;
        int32_t row = -1;
        if (tile.digit[r] != kNone) {
            const uint32_t d = tile.digit[r];
            row = next[d] - ranks[warp() * pitch + d] + rank[r];
            if (args.order) {
                const uint32_t e = tile.expert[r];
                row += reinterpret_cast<const uint32_t*>(args.offsets)[e] - reinterpret_cast<const uint32_t*>(args.begin)[e];
            }
            reinterpret_cast<uint32_t*>(args.row_map)[row] = tile.item[r];
        }
        reinterpret_cast<int32_t*>(args.inverse)[place(tile.item[r], args.k, args.inverse_stride)] = row;
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(LSW_PERMUTE_THREADS) lsw_permute_count(const __grid_constant__ LswPermuteArgs args) {
    if (blockIdx.x >= args.blocks) return;
    extern __shared__ uint32_t counts[];
    count_run(args, counts);
    uint32_t* own = reinterpret_cast<uint32_t*>(args.counts) + blockIdx.x * args.digits;
    for (uint32_t d = threadIdx.x; d < args.digits; d += kThreads) own[d] = counts[d];
}

// Offsets with and without padding, from the histogram. A block serves kThreads experts, and adds up those before them itself.
extern "C" __global__ void __launch_bounds__(LSW_PERMUTE_THREADS) lsw_permute_scan(const __grid_constant__ LswPermuteArgs args) {
    const uint32_t first = blockIdx.x * kThreads;
    if (first >= args.experts) return;
    const uint32_t* sizes = reinterpret_cast<const uint32_t*>(args.histogram);
    __shared__ uint32_t rows_before, items_before;
    if (threadIdx.x == 0) rows_before = items_before = 0;
    __syncthreads();
    uint32_t rows = 0, items = 0;
#pragma unroll 8
    for (uint32_t e = threadIdx.x; e < first; e += kThreads) {
        items += sizes[e];
        rows += padded(sizes[e], args.block);
    }
    atomicAdd(&rows_before, rows);
    atomicAdd(&items_before, items);
    __syncthreads();
    const uint32_t count = min(args.experts - first, static_cast<uint32_t>(kThreads));
    scan(sizes + first, count, args.block, rows_before, reinterpret_cast<uint32_t*>(args.offsets) + first);
    scan(sizes + first, count, 1, items_before, reinterpret_cast<uint32_t*>(args.begin) + first);
}

extern "C" __global__ void __launch_bounds__(LSW_PERMUTE_THREADS) lsw_permute_scatter(const __grid_constant__ LswPermuteArgs args) {
    if (blockIdx.x >= args.blocks) return;
    extern __shared__ uint32_t shared[];
    uint32_t* totals = shared;                                                 // [digits]
    uint32_t* next = totals + args.digits;                                     // [digits]
    uint32_t* offsets = next + args.digits;                                    // [digits + 1]
    uint16_t* ranks = reinterpret_cast<uint16_t*>(offsets + args.digits + 1);  // [kWarps, pitch]
    const uint32_t pitch = (args.digits + 1) / 2 * 2;
    for (uint32_t d = threadIdx.x; d < args.digits; d += kThreads) next[d] = 0;
    const Run run = own_run(args);
    uint32_t begin = run.begin;
    do {
        const Tile tile = load_tile(args, begin, run.end);
        uint32_t rank[kRounds];
        rank_tile(args, tile, rank, next, ranks, pitch);
        const bool is_first = begin == run.begin;
        if (is_first) {
            if (args.blocks == 1) {  // one tile, whose own counts are the totals
                for (uint32_t d = threadIdx.x; d < args.digits; d += kThreads) totals[d] = next[d];
                __syncthreads();
            } else {
                sum_counts(args, totals, next);
            }
            scan(totals, args.digits, args.order ? 1 : args.block, 0, offsets);
            for (uint32_t d = threadIdx.x; d < args.digits; d += kThreads) next[d] += offsets[d];
            __syncthreads();
        }
        write_tile(args, tile, rank, next, ranks, pitch);
        if (is_first && args.order) {  // the offsets are known
            fill(args, reinterpret_cast<const uint32_t*>(args.offsets), reinterpret_cast<const uint32_t*>(args.histogram), args.experts);
        } else if (is_first) {
            if (blockIdx.x == 0) {
                for (uint32_t d = threadIdx.x; d <= args.digits; d += kThreads) reinterpret_cast<uint32_t*>(args.offsets)[d] = offsets[d];
            }
            fill(args, offsets, totals, args.digits);
        }
        begin += kTile;
    } while (begin < run.end);
}

namespace {

// The warps of a grid, in order, each with its share of one token.
struct Piece {
    uint32_t token, index;
    bool exists;

    __device__ __forceinline__ Piece(uint32_t warps, uint32_t pieces) {
        const uint32_t number = blockIdx.x * (LSW_MOVE_THREADS / 32) + warp();
        exists = number < warps;
        token = exists ? number / pieces : 0;
        index = exists ? number % pieces : 0;
    }
};

// In lane j, the row that a token's j-th expert has; -1 where there is none.
__device__ __forceinline__ int32_t row_of_lane(uint64_t inverse, uint64_t stride, uint32_t token, uint32_t k, uint32_t row_count) {
    if (lane() >= k) return -1;
    const int32_t row = reinterpret_cast<const int32_t*>(inverse)[token * stride + lane()];
    return static_cast<uint32_t>(row) < row_count ? row : -1;
}

template <class Unit> __device__ __forceinline__ void gather(const LswGatherArgs& args) {
    const Piece piece(args.warps, args.pieces);
    if (!piece.exists) return;
    const int32_t row_of = row_of_lane(args.inverse, args.inverse_stride, piece.token, args.k, args.row_count);
    const uint32_t named = __ballot_sync(kFullWarp, row_of >= 0);
    if (named == 0) return;
    const Unit* x = reinterpret_cast<const Unit*>(args.x) + piece.token * args.x_stride;
    // All lanes stay, since each holds a row.
    for (uint64_t first = static_cast<uint64_t>(piece.index) * 32; first < args.units; first += static_cast<uint64_t>(args.pieces) * 32) {
        const uint64_t at = first + lane();
        const bool is_inside = at < args.units;
        Unit unit{};
        if (is_inside) unit = x[at];
        for (uint32_t left = named; left != 0; left &= left - 1) {
            const uint64_t r = __shfl_sync(kFullWarp, row_of, __ffs(left) - 1);
            // Streamed: whoever reads it comes much later.
            if (is_inside) __stcs(reinterpret_cast<Unit*>(args.rows) + r * args.rows_stride + at, unit);
        }
    }
}

// kWidth elements a lane: a pack, or one where something is not aligned.
template <int kWidth, class T> union Lanes {
    T lane[kWidth];
    uint4 bits;  // only of a pack
    __device__ Lanes() : bits{0, 0, 0, 0} {}

    __device__ __forceinline__ void load(const T* p) {
        if constexpr (kWidth == 1) {
            lane[0] = *p;
        } else {
            bits = *reinterpret_cast<const uint4*>(p);
        }
    }
    __device__ __forceinline__ void store(T* p) const {
        if constexpr (kWidth == 1) {
            *p = lane[0];
        } else {
            *reinterpret_cast<uint4*>(p) = bits;
        }
    }
};

template <int kWidth, class T> __device__ __forceinline__ void combine(const LswCombineArgs& args) {
    constexpr int kPacks = LSW_COMBINE_PACKS, kRows = LSW_COMBINE_ROWS;
    static_assert(32 % kRows == 0, "the last rows of 32 experts end with lane 31");
    const Piece piece(args.warps, args.pieces);
    if (!piece.exists) return;
    const int32_t row_of = row_of_lane(args.inverse, args.inverse_stride, piece.token, args.k, args.row_count);
    const float gate_of = row_of >= 0 ? reinterpret_cast<const float*>(args.gates)[piece.token * args.gates_stride + lane()] : 0.0f;
    const T* residual = reinterpret_cast<const T*>(args.residual) + piece.token * args.residual_stride;
    T* y = reinterpret_cast<T*>(args.y) + piece.token * args.y_stride;
    constexpr uint64_t kStep = 32 * kWidth;  // elements of a pack of all lanes
    for (uint64_t first = piece.index * (kPacks * kStep); first < args.cols; first += args.pieces * (kPacks * kStep)) {
        const uint64_t at = first + lane() * kWidth;  // and kPacks - 1 more, kStep apart
        float sum[kPacks][kWidth] = {};
#pragma unroll 1
        for (uint32_t j = 0; j < args.k; j += kRows) {
            Lanes<kWidth, T> part[kRows][kPacks];  // zeros, with a gate of zero, where there is none: they change no sum
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
                const int32_t r = __shfl_sync(kFullWarp, row_of, j + i);
                const T* row = reinterpret_cast<const T*>(args.rows) + r * args.rows_stride;
#pragma unroll
                for (int p = 0; p < kPacks; ++p) {
                    if (r >= 0 && at + p * kStep < args.cols) part[i][p].load(row + at + p * kStep);
                }
            }
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
                const float gate = __shfl_sync(kFullWarp, gate_of, j + i);
#pragma unroll
                for (int p = 0; p < kPacks; ++p) {
#pragma unroll
                    for (int c = 0; c < kWidth; ++c) sum[p][c] = fmaf(gate, to_float(part[i][p].lane[c]), sum[p][c]);
                }
            }
        }
#pragma unroll
        for (int p = 0; p < kPacks; ++p) {
            if (at + p * kStep >= args.cols) continue;
            Lanes<kWidth, T> out;
            if (args.residual) out.load(residual + at + p * kStep);
#pragma unroll
            for (int c = 0; c < kWidth; ++c) {
                out.lane[c] = from_float<T>(fmaf(args.scale, sum[p][c], args.residual ? to_float(out.lane[c]) : 0.0f));
            }
            out.store(y + at + p * kStep);
        }
    }
}

}  // namespace

#define LSW_GATHER(bytes, Unit)                                                                                           \
    extern "C" __global__ void __launch_bounds__(LSW_MOVE_THREADS) lsw_gather_##bytes(const __grid_constant__ LswGatherArgs args) { \
        gather<Unit>(args);                                                                                               \
    }
LSW_GATHER(16, uint4)
LSW_GATHER(4, uint32_t)
LSW_GATHER(2, uint16_t)
LSW_GATHER(1, uint8_t)

// Three blocks an SM at least: without it ptxas spills the bf16 kernel of sm_120 for a fourth.
#define LSW_COMBINE(suffix, T)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(LSW_MOVE_THREADS, 3) lsw_combine_##suffix(const __grid_constant__ LswCombineArgs args) { \
        if (args.aligned) return combine<kPack<T>, T>(args);                                                                   \
        combine<1, T>(args);                                                                                                   \
    }
LSW_COMBINE(f32, float)
LSW_COMBINE(f16, __half)
LSW_COMBINE(bf16, __nv_bfloat16)
