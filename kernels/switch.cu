// The switch: bring every target of a set to a new route, in one launch.
//
//   from base:  W = round(W_base + sum over the new route of c_j B_j A_j)
//   in place:   W = round(W      + sum over both routes of (c_new - c_old)_j B_j A_j)
//   with c_j = gate_j * scale_j;  A [rank, in], B [out, rank];  products and sums in f32, one rounding at the end
//
// The route is read from device memory and what each target holds merged is kept there, so one captured launch serves every route.
//
// A launch, block by block (persistent blocks, a work queue over tiles):
//   1. canonical_route  ids that name no slot drop out, duplicates add up, entries sort by slot
//   2. produce          one warp: which targets differ from what they hold, 32 at a time; which tile is next; its A and B
//   3. consume          four warps: W of the tile, the product, W back; in f32 one more, which splits A (split_all)
//   4. record           the last block to finish writes down what is merged now and resets the queue
// No block waits for another: step 4 belongs to whichever block comes last, and by then all have read the old record.
//
// A tile is 64 x 128 of W, its sum a sequence of slices: 16 of a term's rank, what one mma takes. Slices of A and of B pass from the
// producer to the consumers through two rings in shared memory, with a barrier a place; the consumers never wait for each other. W needs
// no barrier and no fragment layout: a thread copies to shared memory just the 16-byte packs whose sums it will have, as soon as it has
// stored those of the tile before, so that W is on its way while the product runs. To have whole packs, a thread needs neighbouring
// columns, of which an mma gives it two: so column n of block j is not column 8 j + n of the tile but one that lies among its
// neighbours' (see Sum), which costs nothing but the order in which A is read.
//
// Who copies what is not a matter of taste. Copies by cp.async complete, for their thread, in the order in which they were begun. When
// every thread copied slices as well as W, a sum of more than one panel waited for W, which comes from memory, before its second panel,
// which had long come from L2.
//
// What L2 delivers is the limit beside memory: W crosses it twice, and each tile takes 16 (64 + 128) elements a slice. So a block takes
// a run of tiles, one below the other, whose slices of A stay in their places (where the ring holds them all) while those of B change:
// in a run of eight a slice adds 16 (64 + 16) elements.
//
// Exactness: A and B enter the tensor cores as stored. Each slice has its own accumulators, which join the sum by one fma with the f32
// coefficient; nothing is folded into a 16-bit operand. Additions: 15 a slice, one a slice to the sum, one to W; the bound is
// 2 (rank + 2) u a term at most, u = 2^-24, a tensor core's additions counting twice. Ranks are real: a sum stops at the rank rounded up
// to 16, and what lies beyond the rank is zeros that the loader put there, never memory.
//
// f32 has no tensor core that keeps 24 bits. An element is the sum of three bf16, x = h + m + l, exactly (as long as l does not
// underflow: 2^-133): h is x rounded, m the rest rounded, and what then remains has at most 6 bits. Of the nine products six are added
// up, the smallest first; m l, l m and l l are left out: at most 2 * 2^-8 * 2^-17 = u of the product. (Henry, Tang, Heinecke,
// "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations", ARITH 2019.) An infinity has no such
// parts: in A or B it makes NaN. Plain fma is exact in the products, but at K = 64 it needs every issue slot for as long as memory needs
// for W; two parts of TF32 take as many mmas, 8% less time at that depth, and leave out 2^-21.
//
// Splitting costs more instructions than the products do, unless an element is split once: A, which all warps multiply, and over a run
// all tiles, by a warp of its own, in its place in the ring; B by the one warp that has its rows.
//
// Floor: W is read and written once, 4 bytes an element in 16 bits.
//
// Targets and adapters whose addresses or rows are not multiples of 16 bytes, and the ragged rim of every matrix, take the same road
// with loads and stores element by element (load_chunk, store_chunk), in the same launch.
#include "args.h"
#include "common/num.cuh"
#include "common/pack.cuh"
#include "common/ptx.cuh"
#include "common/switch_plan.cuh"

namespace {

template <class T> constexpr bool kSplits = sizeof(T) == 4;  // f32: multiplies parts
constexpr int kConsumers = LSW_SWITCH_CONSUMERS;             // threads; behind them the producer's warp and, if any, the splitter's
template <class T> constexpr int kThreads = kSplits<T> ? LSW_SWITCH_THREADS_32BIT : LSW_SWITCH_THREADS_16BIT;
constexpr int kRows = LSW_SWITCH_TILE_ROWS;
constexpr int kCols = LSW_SWITCH_TILE_COLS;
// Of a tile, a warp's. One that splits has few rows, which no other warp splits again.
template <class T> constexpr int kWarpRows = kSplits<T> ? 16 : 32;
template <class T> constexpr int kWarpCols = kSplits<T> ? 128 : 64;
constexpr int kSlice = 16;  // of a rank: what one mma takes
constexpr int kTiles = 4;   // that are known ahead
constexpr int kParts = 3;   // bf16 that make an f32
template <class T> constexpr int kSlicesA = kSplits<T> ? 4 : 8;  // places of the rings
template <class T> constexpr int kSlicesB = kSplits<T> ? 3 : 8;
// Of its warp's part, a thread has every eighth row, and of it every fourth pack of 16 bytes.
template <class T> constexpr int kRowPacks = kWarpCols<T> / (4 * kPack<T>);
template <class T> constexpr int kOwnPacks = kWarpRows<T> / 8 * kRowPacks<T>;
template <class T> constexpr bool kCovers = kConsumers == kRows / kWarpRows<T> * (kCols / kWarpCols<T>) * 32;
static_assert(kCovers<__half> && kCovers<float>, "the warps cover the tile");
static_assert(kConsumers + 32 == kThreads<__half> && kConsumers + 64 == kThreads<float>, "and others move and split");

struct Term {
    const void* a;
    const void* b;
    uint32_t a_stride, b_stride, rank, flags;
    float coefficient;
};

// A target that changes and its sum.
struct Job {
    LswTarget target;
    uint32_t tiles_per_row, tiles_per_col;
    bool is_plain;   // all of it is at multiples of 16 bytes, and so are the ranks
    uint32_t begin;  // its first tile, counted over all changed targets
    uint32_t term_count, slices;
    Term terms[2 * LSW_MAX_K];
};

// What the consumers know of a tile.
struct Tile {
    uint64_t weight, base;  // its first element
    uint64_t weight_stride, base_stride;
    uint32_t rows, cols;  // from there to the end of the matrix; no rows: there is no such tile
    uint32_t slices;      // of its sum
    bool is_plain, is_aligned;
    bool keeps;  // its slices of A, which the next tile needs too
};

// Of 16 of a term's rank. What a warp reads at once falls into different banks: A's rows are padded, and in some of B's the halves are
// exchanged.
template <class T> struct SliceA {
    T at[kSlice][kCols + kPack<T>];
};
template <> struct SliceA<float> {
    union {
        float at[kSlice][kCols + kPack<float>];
        uint4 words[kCols / 16][kParts][32];  // once it is split: of two blocks of columns and a part, what a lane hands to an mma
    };
};
template <class T> struct SliceB {
    T rows[kRows][kSlice];
    static __device__ __forceinline__ uint32_t place_of(uint32_t m, uint32_t k) { return k ^ m / (8 / sizeof(T)) % 2 * 8; }
};

template <class T> struct Shared {
    uint4 weight[kOwnPacks<T>][kConsumers];  // each thread's own
    SliceA<T> a[kSlicesA<T>];
    SliceB<T> b[kSlicesB<T>];
    float coefficients[kSlicesB<T>];
    Tile tiles[kTiles];
    // Full: 32 lanes' copies and the leading one's word. Free: a word of each lane that reads. What is full of B is so of its A; but what
    // is split is raw when it comes, and full when all lanes have split it.
    Barrier a_free[kSlicesA<T>], b_full[kSlicesB<T>], b_free[kSlicesB<T>], tile_full[kTiles], tile_free[kTiles];
    Barrier a_raw[kSplits<T> ? kSlicesA<T> : 1], a_full[kSplits<T> ? kSlicesA<T> : 1];
    uint32_t a_ends[kSlicesA<T>];  // nothing more to split, says this place
    Job jobs[2];
    Route route;
    uint32_t is_last;
    uint32_t any_changed;
};

// The n-th use of a ring of `kCount` places: which one, and the parity of the phase that fills it.
template <int kCount> __device__ __forceinline__ uint32_t place(uint32_t n) { return n % kCount; }
template <int kCount> __device__ __forceinline__ uint32_t parity(uint32_t n) { return n / kCount % 2; }

// The producer's view of 32 targets at a time: lane l has the first + l-th.
struct Plan {
    uint32_t first;
    uint32_t before;  // tiles of the changed targets ahead of them
    uint32_t end;     // of those up to and including the lane's
    __device__ __forceinline__ uint32_t total() const { return __shfl_sync(kFullWarp, end, 31); }
};

__device__ Plan make_plan(const LswSwitchArgs& args, const Route& route, uint32_t first, uint32_t before, uint32_t& any_changed) {
    const uint32_t lane = threadIdx.x % 32;
    uint32_t tiles = 0;
    if (is_changed(args, route, first + lane)) tiles = target_of(args, first + lane).tiles, any_changed = 1;
    for (int step = 1; step < 32; step *= 2) {
        const uint32_t below = __shfl_up_sync(kFullWarp, tiles, step);
        if (lane >= step) tiles += below;
    }
    return {first, before, before + tiles};
}

__device__ __forceinline__ Term make_term(const LswFactor& f, float coefficient) {
    return {reinterpret_cast<const void*>(f.a), reinterpret_cast<const void*>(f.b), f.a_stride, f.b_stride, f.rank, f.flags, coefficient};
}

// One warp. The tables' next entries come to L2 meanwhile, which W has swept clean.
template <class T> __device__ void build(const LswSwitchArgs& args, const Route& route, uint32_t target, uint32_t begin, Job& job) {
    const LaneTerms t = lane_terms(args, route, target);
    const uint32_t lane = threadIdx.x % 32;
    bool is_plain = target_of(args, target).flags & LSW_WEIGHT_ALIGNED;
    const auto put = [&](int slot, uint32_t at, float coefficient) {
        if (slot < 0) return;
        const Term term = make_term(factor(args, target, slot), coefficient);
        is_plain = is_plain && term.flags == (LSW_A_ALIGNED | LSW_B_ALIGNED) && term.rank % kPack<T> == 0;
        job.terms[at] = term;
    };
    put(t.enter_slot, t.enter_at, t.enter);
    put(t.leave_slot, t.leave_at, t.leave);
    is_plain = __all_sync(kFullWarp, is_plain);
    __syncwarp();
    if (target + 1 < args.last) {
        if (t.enter_slot >= 0) prefetch(&factor(args, target + 1, t.enter_slot));
        if (lane == 0) prefetch(&target_of(args, target + 1));
    }
    if (lane == 0) {
        job.target = target_of(args, target);
        job.tiles_per_row = (job.target.cols + kCols - 1) / kCols, job.tiles_per_col = (job.target.rows + kRows - 1) / kRows;
        job.is_plain = is_plain, job.begin = begin, job.term_count = t.count;
        job.slices = 0;
        for (uint32_t i = 0; i < t.count; ++i) job.slices += (job.terms[i].rank + kSlice - 1) / kSlice;
    }
    __syncwarp();
}

// The producer's place: a tile of a job.
struct Step {
    uint32_t job;  // which of the two
    uint32_t row, col;
    bool is_plain, continues;  // the next tile lies below it
};

// Steps to a tile, whose target is that of the step or one behind it. False: there is no such tile.
template <class T> __device__ bool find(const LswSwitchArgs& args, Shared<T>& s, Plan& plan, uint32_t tile, Step& step) {
    if (tile - s.jobs[step.job].begin >= s.jobs[step.job].target.tiles) {
        for (uint32_t total; total = plan.total(), tile >= total;) {
            if (args.last - plan.first <= 32) return false;
            plan = make_plan(args, s.route, plan.first + 32, total, s.any_changed);
        }
        const uint32_t lane = __ffs(__ballot_sync(kFullWarp, plan.end > tile)) - 1;  // the first whose tiles end behind this one
        const uint32_t end_before = __shfl_up_sync(kFullWarp, plan.end, 1);
        const uint32_t begin = lane == 0 ? plan.before : __shfl_sync(kFullWarp, end_before, lane);
        step.job ^= 1;
        build<T>(args, s.route, plan.first + lane, begin, s.jobs[step.job]);
    }
    const Job& job = s.jobs[step.job];
    // Strips of `run` rows of tiles, through which the tiles go column by column.
    const uint32_t index = tile - job.begin, in_strips = args.run * job.tiles_per_row;
    const uint32_t above = index / in_strips * args.run, in_strip = index % in_strips;
    const uint32_t height = min(args.run, job.tiles_per_col - above), down = in_strip % height;
    const uint32_t row = (above + down) * kRows, col = in_strip / height * kCols;
    const bool is_whole = row + kRows <= job.target.rows && col + kCols <= job.target.cols;
    step = {step.job, row, col, job.is_plain && is_whole, down + 1 < height};
    return true;
}

// Tells the consumers of a tile, or that there is none.
template <class T> __device__ __forceinline__ void announce(Shared<T>& s, uint32_t n, const Step& step, bool exists, bool keeps) {
    const uint32_t at = place<kTiles>(n);
    s.tile_free[at].wait(parity<kTiles>(n) ^ 1);
    if (threadIdx.x % 32 == 0) {
        Tile& tile = s.tiles[at];
        const Job& job = s.jobs[step.job];
        const LswTarget& target = job.target;
        tile.weight = target.weight + (step.row * target.weight_stride + step.col) * sizeof(T);
        tile.base = target.base + (step.row * target.base_stride + step.col) * sizeof(T);
        tile.weight_stride = target.weight_stride, tile.base_stride = target.base_stride;
        tile.rows = exists ? target.rows - step.row : 0, tile.cols = target.cols - step.col;
        tile.slices = job.slices, tile.keeps = keeps;
        tile.is_plain = step.is_plain, tile.is_aligned = target.flags & LSW_WEIGHT_ALIGNED;
        s.tile_full[at].arrive();
    }
}

// One pack from global to shared memory, of which `valid` elements exist; the rest becomes zero. In a plain tile all or none do, and in
// a whole slice all.
template <bool kPlain, bool kWhole, class T>
__device__ __forceinline__ void load_chunk(void* shared, const T* global, int valid, bool aligned) {
    if (kPlain && kWhole) return copy16_async(shared, global);
    if (kPlain) return copy16_partly(shared_address(shared), global, valid > 0 ? 16 : 0);
    if (aligned && valid >= kPack<T>) return copy16_async(shared, global);
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
        if (i < valid) pack.lane[i] = global[i];
    }
    store16(static_cast<T*>(shared), pack);
}

template <class T> __device__ __forceinline__ void store_chunk(T* global, const T* shared, int valid, bool aligned) {
    if (aligned && valid >= kPack<T>) return store16(global, load16(shared));
    for (int i = 0; i < kPack<T>; ++i) {
        if (i < valid) global[i] = shared[i];
    }
}

// Slices of a term, from k on, by one warp: whole rows at a time.
template <bool kPlain, bool kWhole, class T>
__device__ __forceinline__ void load_a(SliceA<T>& slice, const Term& t, uint32_t k, uint32_t col, int cols) {
    constexpr int kChunks = kCols / kPack<T>, kRounds = kSlice * kChunks / 32;
    static_assert(32 % kChunks == 0, "a round is whole rows");
    const int lane = threadIdx.x % 32, kk = lane / kChunks, n = lane % kChunks * kPack<T>;
    const uint64_t stride = t.a_stride;
    const T* a = static_cast<const T*>(t.a) + (k + kk) * stride + col + n;
#pragma unroll(kPlain ? kRounds : 1)
    for (int down = 0; down < kSlice; down += 32 / kChunks) {
        const int left = t.rank - k - kk - down;
        const int valid = kPlain ? left : left > 0 ? cols - n : 0;
        load_chunk<kPlain, kWhole>(&slice.at[kk + down][n], a + down * stride, valid, t.flags & LSW_A_ALIGNED);
    }
}
template <bool kPlain, bool kWhole, class T>
__device__ __forceinline__ void load_b(SliceB<T>& slice, const Term& t, uint32_t k, uint32_t row, int rows) {
    constexpr int kChunks = kSlice / kPack<T>, kRounds = kRows * kChunks / 32;
    const int lane = threadIdx.x % 32, m = lane / kChunks, kk = lane % kChunks * kPack<T>;
    const uint64_t stride = t.b_stride;
    const T* b = static_cast<const T*>(t.b) + (row + m) * stride + k + kk;
#pragma unroll(kPlain ? kRounds : 1)
    for (int down = 0; down < kRows; down += 32 / kChunks) {
        const int valid = kPlain || m + down < rows ? t.rank - k - kk : 0;
        load_chunk<kPlain, kWhole>(&slice.rows[m + down][SliceB<T>::place_of(m, kk)], b + down * stride, valid, t.flags & LSW_B_ALIGNED);
    }
}

// The sum's slices: of B all, of A those that are not there already.
template <class T>
__device__ __forceinline__ void load_slices(Shared<T>& s, uint32_t a, uint32_t b, const Step& step, bool needs_a) {
    const Job& job = s.jobs[step.job];
    const int rows = job.target.rows - step.row, cols = job.target.cols - step.col;
    for (uint32_t term = 0; term < job.term_count; ++term) {
        const Term t = job.terms[term];
        for (uint32_t k = 0; k < t.rank; k += kSlice, ++a, ++b) {
            const bool is_whole = t.rank - k >= kSlice;
            if (needs_a) {
                const uint32_t at = place<kSlicesA<T>>(a);
                s.a_free[at].wait(parity<kSlicesA<T>>(a) ^ 1);
                if (!step.is_plain) {
                    load_a<false, false>(s.a[at], t, k, step.col, cols);
                } else if (is_whole) {
                    load_a<true, true>(s.a[at], t, k, step.col, cols);
                } else {
                    load_a<true, false>(s.a[at], t, k, step.col, cols);
                }
                if (kSplits<T>) s.a_raw[at].arrive_after_copies(), s.a_raw[at].arrive();
            }
            const uint32_t at = place<kSlicesB<T>>(b);
            s.b_free[at].wait(parity<kSlicesB<T>>(b) ^ 1);
            if (!step.is_plain) {
                load_b<false, false>(s.b[at], t, k, step.row, rows);
            } else if (is_whole) {
                load_b<true, true>(s.b[at], t, k, step.row, rows);
            } else {
                load_b<true, false>(s.b[at], t, k, step.row, rows);
            }
            s.b_full[at].arrive_after_copies();  // of A, too
            if (threadIdx.x % 32 == 0) s.coefficients[at] = t.coefficient;
            __syncwarp();
            if (threadIdx.x % 32 == 0) s.b_full[at].arrive();
        }
    }
}

template <class T> __device__ void produce(const LswSwitchArgs& args, Shared<T>& s) {
    const bool leads = threadIdx.x % 32 == 0;
    Plan plan = make_plan(args, s.route, args.first, 0, s.any_changed);
    uint32_t taken = 0, tile = blockIdx.x * args.run, a = 0, b = 0, n = 0;
    bool needs_a = true, keeps = false;
    Step next{};
    const auto step_to = [&] {
        const bool exists = find(args, s, plan, tile, next);
        if (tile % args.run == 0 && exists && leads) taken = gridDim.x + atomicAdd(&state(args)->next_tile, 1);
        tile = ++tile % args.run ? tile : __shfl_sync(kFullWarp, taken, 0) * args.run;
        keeps = next.continues && tile % args.run && s.jobs[next.job].slices <= kSlicesA<T>;
        announce(s, n++, next, exists, keeps);
        return exists;
    };
    for (bool exists = step_to(); exists;) {
        const Step now = next;
        const bool now_keeps = keeps;
        const uint32_t slices = s.jobs[now.job].slices;
        exists = step_to();
        load_slices(s, a, b, now, needs_a);
        if (!now_keeps) a += slices;
        b += slices;
        needs_a = !now_keeps;
    }
    if (kSplits<T>) {
        const uint32_t at = place<kSlicesA<T>>(a);
        s.a_free[at].wait(parity<kSlicesA<T>>(a) ^ 1);
        if (leads) s.a_ends[at] = 1;
        s.a_raw[at].arrive_after_copies(), s.a_raw[at].arrive();
    }
}

// x and y in parts, each of which is what those before left, rounded.
struct Parts {
    uint32_t of[kParts];
};
__device__ __forceinline__ Parts split(float x, float y) {
    Parts parts;
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
        parts.of[p] = pack({x, y}, __nv_bfloat16{});
        const float2 rounded = unpack(parts.of[p], __nv_bfloat16{});
        x -= rounded.x, y -= rounded.y;
    }
    return parts;
}

// One warp: A in parts, in its place, for all warps and all tiles that need it.
__device__ void split_all(Shared<float>& s) {
    constexpr int kBlocks = kCols / 16;
    const int lane = threadIdx.x % 32;
    for (uint32_t a = 0;; ++a) {
        const uint32_t at = place<kSlicesA<float>>(a);
        s.a_raw[at].wait(parity<kSlicesA<float>>(a));
        if (s.a_ends[at]) return;
        SliceA<float>& slice = s.a[at];
        float2 raw[kBlocks][4];
#pragma unroll
        for (int i = 0; i < 4 * kBlocks; ++i) {
            const int row = i % 4 / 2 * 8 + lane % 4 * 2 + i % 2, n = i / 4 * 16 + lane / 4 * 2;
            raw[i / 4][i % 4] = *reinterpret_cast<const float2*>(&slice.at[row][n]);
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
            const float2(&x)[4] = raw[i];
            const Parts words[4] = {split(x[0].x, x[1].x), split(x[2].x, x[3].x), split(x[0].y, x[1].y), split(x[2].y, x[3].y)};
#pragma unroll
            for (int p = 0; p < kParts; ++p) slice.words[i][p][lane] = {words[0].of[p], words[1].of[p], words[2].of[p], words[3].of[p]};
        }
        s.a_full[at].arrive();
    }
}

// A thread's place in its warp, and the warp's in a tile.
template <class T> struct Own {
    int group, in_group, row, col;
    __device__ Own() {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        group = lane / 4, in_group = lane % 4;
        constexpr int kAcross = kCols / kWarpCols<T>;
        row = warp / kAcross * kWarpRows<T>, col = warp % kAcross * kWarpCols<T>;
    }
};

// Where in a tile a thread's packs begin.
template <class T> __device__ __forceinline__ int row_of(const Own<T>& own, int pack) {
    return own.row + own.group + pack / kRowPacks<T> * 8;
}
template <class T> __device__ __forceinline__ int col_of(const Own<T>& own, int pack) {
    return own.col + (pack % kRowPacks<T> * 4 + own.in_group) * kPack<T>;
}

// Of rows x cols, how many elements there are from a place on, in its row.
__device__ __forceinline__ int valid_at(uint32_t rows, uint32_t cols, uint32_t row, uint32_t col) {
    return row < rows ? static_cast<int>(cols - col) : 0;
}

template <bool kPlain, class T>
__device__ __forceinline__ void load_weight(uint4 (&own_packs)[kOwnPacks<T>][kConsumers], const Tile& tile) {
    const Own<T> own;
    const uint64_t stride = tile.base_stride;
    const uint32_t rows = tile.rows, cols = tile.cols;
    const bool aligned = tile.is_aligned;
    const T* base = reinterpret_cast<const T*>(tile.base);
#pragma unroll(kPlain ? kOwnPacks<T> : 1)
    for (int pack = 0; pack < kOwnPacks<T>; ++pack) {
        const int m = row_of<T>(own, pack), n = col_of<T>(own, pack);
        const int valid = kPlain ? kPack<T> : valid_at(rows, cols, m, n);
        load_chunk<kPlain, true>(&own_packs[pack][threadIdx.x], base + m * stride + n, valid, aligned);
    }
}

// A warp's part of the sum: accumulators of mmas, by blocks of 16 rows and of 8 columns. Of a block, lane 4 g + t has columns 2 t and
// 2 t + 1. Blocks whose columns take turns make these neighbours: with kBlocks of them, column n of the j-th is kBlocks n + j, so that
// the lane's own are kPack in a row, from kPack t on.
template <class T> using Sum = float[kWarpRows<T> / 16][kWarpCols<T> / 8][4];
template <class T> constexpr int kBlocks = kPack<T> / 2;

// Adds mmas of a row block.
template <int kCount>
__device__ __forceinline__ void add_product(float (*sum)[4], const float (&product)[kCount][4], float coefficient) {
#pragma unroll
    for (int i = 0; i < 4 * kCount; ++i) sum[i / 4][i % 4] = fmaf(coefficient, product[i / 4][i % 4], sum[i / 4][i % 4]);
}

// One slice: sum += coefficient * b a.
template <class T>
__device__ __forceinline__ void multiply(Sum<T>& sum, float coefficient, const SliceA<T>& slice_a, const SliceB<T>& slice_b) {
    const Own<T> own;
    const int lane = threadIdx.x % 32;
    uint32_t b[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        ldmatrix4(b[i], &slice_b.rows[own.row + 16 * i + lane % 16][SliceB<T>::place_of(lane % 16, lane / 16 * 8)]);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        uint32_t a[4][2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const T* p = &slice_a.at[8 * half + 2 * own.in_group][own.col + kWarpCols<T> / 2 * h + 4 * own.group];
            const uint2 even = *reinterpret_cast<const uint2*>(p), odd = *reinterpret_cast<const uint2*>(p + kCols + kPack<T>);
            a[0][half] = __byte_perm(even.x, odd.x, 0x5410), a[1][half] = __byte_perm(even.x, odd.x, 0x7632);
            a[2][half] = __byte_perm(even.y, odd.y, 0x5410), a[3][half] = __byte_perm(even.y, odd.y, 0x7632);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float product[4][4] = {};
#pragma unroll
            for (int j = 0; j < 4; ++j) mma16816(product[j], b[i], a[j][0], a[j][1], T{});
            add_product(&sum[i][4 * h], product, coefficient);
        }
    }
}

// f32: products of parts, six for one.
template <>
__device__ __forceinline__ void multiply(Sum<float>& sum, float coefficient, const SliceA<float>& slice_a, const SliceB<float>& slice_b) {
    const Own<float> own;
    Parts b[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int m = own.row + 8 * (i % 2) + own.group, k = 8 * (i / 2) + 2 * own.in_group;
        const float2 pair = *reinterpret_cast<const float2*>(&slice_b.rows[m][SliceB<float>::place_of(own.group, k)]);
        b[i] = split(pair.x, pair.y);
    }
    constexpr int kOrder[6][2] = {{2, 0}, {0, 2}, {1, 1}, {1, 0}, {0, 1}, {0, 0}};
#pragma unroll
    for (int first = 0; first < kCols / 16; first += 2) {  // pairs of blocks of columns, two at a time
        if (first > 0) __syncwarp();                       // or the compiler would begin too many, and spill
        uint4 a[2][kParts];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int p = 0; p < kParts; ++p) a[j][p] = slice_a.words[first + j][p][threadIdx.x % 32];
        }
        float product[4][4] = {};
#pragma unroll
        for (int o = 0; o < 6; ++o) {
            const int p = kOrder[o][0], q = kOrder[o][1];
            const uint32_t part[4] = {b[0].of[p], b[1].of[p], b[2].of[p], b[3].of[p]};
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                mma16816(product[2 * j], part, a[j][q].x, a[j][q].y, __nv_bfloat16{});
                mma16816(product[2 * j + 1], part, a[j][q].z, a[j][q].w, __nv_bfloat16{});
            }
        }
        add_product(&sum[0][2 * first], product, coefficient);
    }
}

__device__ __forceinline__ void add(Pack<float>& w, const float (&x)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) w.lane[i] += x[i];
}
template <class T> __device__ __forceinline__ void add(Pack<T>& w, const float (&x)[8]) {
    uint32_t words[4] = {w.bits.x, w.bits.y, w.bits.z, w.bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 old = unpack(words[i], T{});
        words[i] = pack({old.x + x[2 * i], old.y + x[2 * i + 1]}, T{});
    }
    w.bits = {words[0], words[1], words[2], words[3]};
}

// An empty sum copies bits.
template <bool kPlain, class T>
__device__ __forceinline__ void store_weight(uint4 (&own_packs)[kOwnPacks<T>][kConsumers], const Tile& tile, const Sum<T>& sum) {
    const Own<T> own;
    const uint64_t stride = tile.weight_stride;
    const uint32_t rows = tile.rows, cols = tile.cols;
    const bool aligned = tile.is_aligned, is_sum = tile.slices > 0;
    T* weight = reinterpret_cast<T*>(tile.weight);
    constexpr int kTogether = sizeof(T) == 2 ? 2 : 4;
#pragma unroll
    for (int first = 0; first < kOwnPacks<T>; first += kTogether) {
        Pack<T> w[kTogether];
#pragma unroll
        for (int p = 0; p < kTogether; ++p) w[p].bits = own_packs[first + p][threadIdx.x];
        if (is_sum) {
#pragma unroll
            for (int p = 0; p < kTogether; ++p) {
                const int pack = first + p;
                const int i = pack / kRowPacks<T>, j = pack % kRowPacks<T> * kBlocks<T>;
                float x[kPack<T>];
#pragma unroll
                for (int e = 0; e < kPack<T>; ++e) x[e] = sum[i / 2][j + e % kBlocks<T>][i % 2 * 2 + e / kBlocks<T>];
                add(w[p], x);
            }
        }
#pragma unroll
        for (int p = 0; p < kTogether; ++p) {
            const int pack = first + p;
            if (kPlain) {
                store16(weight + row_of<T>(own, pack) * stride + col_of<T>(own, pack), w[p]);
            } else {
                own_packs[pack][threadIdx.x] = w[p].bits;
            }
        }
    }
#pragma unroll 1
    for (int pack = kPlain ? kOwnPacks<T> : 0; pack < kOwnPacks<T>; ++pack) {
        const int m = row_of<T>(own, pack), n = col_of<T>(own, pack);
        const T* from = reinterpret_cast<const T*>(&own_packs[pack][threadIdx.x]);
        store_chunk(weight + m * stride + n, from, valid_at(rows, cols, m, n), aligned);
    }
}

// Once the producer has told of the n-th tile: W's packs of it.
template <class T> __device__ __forceinline__ void fetch(Shared<T>& s, uint32_t n) {
    const uint32_t at = place<kTiles>(n);
    s.tile_full[at].wait(parity<kTiles>(n));
    const Tile& tile = s.tiles[at];
    if (tile.rows > 0) tile.is_plain ? load_weight<true, T>(s.weight, tile) : load_weight<false, T>(s.weight, tile);
    copy_commit();
}

template <class T> __device__ void consume(Shared<T>& s) {
    fetch(s, 0);
    uint32_t a = 0, b = 0;
    for (uint32_t n = 0; s.tiles[place<kTiles>(n)].rows > 0; ++n) {
        const Tile& tile = s.tiles[place<kTiles>(n)];
        Sum<T> sum = {};
        const bool keeps = tile.keeps;
        const uint32_t first = a;
#pragma unroll 1
        for (const uint32_t end = b + tile.slices; b < end; ++a, ++b) {
            const uint32_t at = place<kSlicesB<T>>(b), at_a = place<kSlicesA<T>>(a);
            s.b_full[at].wait(parity<kSlicesB<T>>(b));
            if (kSplits<T>) s.a_full[at_a].wait(parity<kSlicesA<T>>(a));
            multiply(sum, s.coefficients[at], s.a[at_a], s.b[at]);
            s.b_free[at].arrive();
            s.a_free[at_a].arrive_if(!keeps);
        }
        // f32 has no register for `first`, without which 16 bits take 1% longer.
        if (keeps) a = kSplits<T> ? a - tile.slices : first;
        copy_wait<0>();
        tile.is_plain ? store_weight<true, T>(s.weight, tile, sum) : store_weight<false, T>(s.weight, tile, sum);
        s.tile_free[place<kTiles>(n)].arrive();
        fetch(s, n + 1);
    }
}

template <class T> __device__ void switch_all(const LswSwitchArgs& args) {
    if (args.first >= args.last) return;
    extern __shared__ __align__(16) unsigned char raw[];
    Shared<T>& s = *reinterpret_cast<Shared<T>*>(raw);
    if (threadIdx.x < 32) canonical_route(args, s.route);
    if (threadIdx.x == 32) {
        s.any_changed = 0, s.jobs[0].begin = 0, s.jobs[0].target.tiles = 0;  // no target yet
        s.jobs[0].slices = 0;
        for (int i = 0; i < kSlicesA<T>; ++i) s.a_free[i].init(kConsumers);
        for (int i = 0; i < kSlicesB<T>; ++i) s.b_full[i].init(32 + 1), s.b_free[i].init(kConsumers);
        for (int i = 0; i < (kSplits<T> ? kSlicesA<T> : 0); ++i) s.a_raw[i].init(64), s.a_full[i].init(32), s.a_ends[i] = 0;
        for (int i = 0; i < kTiles; ++i) s.tile_full[i].init(1), s.tile_free[i].init(kConsumers);
    }
    __syncthreads();
    if (threadIdx.x < kConsumers) {
        consume(s);
    } else if (threadIdx.x < kConsumers + 32) {
        produce(args, s);
    } else if constexpr (kSplits<T>) {
        split_all(s);
    }
    __syncthreads();

    // Nothing to do: every block finds the same, so there is no queue to reset and nothing to record.
    if (!s.any_changed) return;
    if (threadIdx.x == 0) {
        __threadfence();
        s.is_last = atomicAdd(&state(args)->blocks_done, 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!s.is_last) return;
    __threadfence();
    for (uint32_t target = args.first + threadIdx.x; target < args.last; target += kThreads<T>) record(args, s.route, target);
    if (threadIdx.x == 0) state(args)->next_tile = 0, state(args)->blocks_done = 0;
}

}  // namespace

#define LSW_SWITCH(suffix, T, blocks)                                                                                    \
    extern "C" __global__ void __launch_bounds__(kThreads<T>, blocks)                                                 \
        lsw_switch_##suffix(const __grid_constant__ LswSwitchArgs args) {                                        \
        static_assert(sizeof(Shared<T>) <= (sizeof(T) == 2 ? LSW_SWITCH_SHARED_16BIT : LSW_SWITCH_SHARED_32BIT), \
                      "the host asks for this much shared memory");                                              \
        switch_all<T>(args);                                                                                     \
    }
LSW_SWITCH(f32, float, 2)
LSW_SWITCH(f16, __half, 3)
LSW_SWITCH(bf16, __nv_bfloat16, 3)

extern "C" __global__ void __launch_bounds__(LSW_MAX_K) lsw_switch_current(const __grid_constant__ LswCurrentArgs args) {
    if (threadIdx.x >= args.k_max) return;
    const uint32_t count = reinterpret_cast<const uint32_t*>(args.merged_count)[args.target];
    const bool holds = count != LSW_UNKNOWN && threadIdx.x < count;
    const LswMerged entry = reinterpret_cast<const LswMerged*>(args.merged)[static_cast<uint64_t>(args.target) * args.k_max + threadIdx.x];
    reinterpret_cast<int32_t*>(args.ids)[threadIdx.x] = holds ? entry.slot : -1;
    reinterpret_cast<float*>(args.coefficients)[threadIdx.x] = holds ? entry.coefficient : 0.0f;
}
