// Unmerged adapters of 16 bits for up to 64 rows, each under its own route, the weights left as they are.
//
//   shrink  products[r, e] = A x[r]                          for the slot that entry e of row r's route is the first to name
//   expand  y[r] = round(y[r] + sum over the slots of c B products[r, e])         c = gate * scale, slots ascending
//
// for all targets of a group that share x (q, k, v; gate, up) in one launch each. The products stay in f32: y is rounded once.
// More rows: apply_mma.cu; f32, which tensor cores would round: apply_f32.cu.
//
// Floor: each adapter that a route names, read once (Llama-2-7B, rank 16, two of them: 0.16 GB, 35 us of an H200's bandwidth in 128
// groups of targets; eight: 140 us). So latency is what counts: loads that wait for loads (ids -> factor -> A -> products -> y), and
// what a single warp does between them, where each branch, look-up in shared memory or product waits for the one before. Hence:
//
// - Tensor cores, not for their speed but for what they share: a block of shrink has 16 ranks of one slot as M and its rows of the
//   batch, eight at a time, as N; one of expand has 16 rows of the batch as M and the outputs as N. So an adapter is read once for
//   all its rows (in expand: of 16). Nobody walks over a route: a block of shrink knows its slot from its number and asks who uses
//   it; expand sorts its entries by comparing each with all others.
// - An element of an mma's result depends on its own row and column alone. So a row's bits are the same in any batch, and what its
//   neighbours hold, NaN included, does not matter; the order of every sum depends on the shape and on the row's own route.
// - x has LSW_FEW_SPLITS slices, a block each, so that few slots still keep many multiprocessors loading, all at once. expand adds
//   the slices up, in order, as it brings the products to shared memory.
// - expand is a dependent launch. shrink lets it start as soon as shrink itself has passed its own wait: from then on all that came
//   before shrink is complete, and shrink writes the products alone. So expand sorts its entries, reads factors and sends for B while
//   shrink runs, and waits before the first product and y only. Both ask for as much shared memory as there is: a multiprocessor
//   that has to divide its memory anew first runs empty, and expand would start when shrink has ended.
// - shrink's operands come straight from memory into registers: the order of k within a step is free as long as both agree on it, so
//   a lane takes eight consecutive elements of a row where the layout of the mma asks for pairs eight apart. In the same way a lane
//   of expand owns eight consecutive outputs of a row: y is read and written 16 bytes at a time.
// - B is exact in tf32, and the products enter as two tf32 of 11 bits each: nothing is lost but the last bits of an f32.
//
// Where addresses are not multiples of 16 bytes the same packs are gathered element by element: the same bits again. What lies behind
// a row's end or rank is not read, or read and not used.
#include "common/apply.cuh"
#include "common/ptx.cuh"

namespace {

constexpr uint32_t kSplits = LSW_FEW_SPLITS;
constexpr uint32_t kRanks = LSW_FEW_RANKS;
constexpr uint32_t kGroup = LSW_FEW_ROWS;
static_assert(kRanks == 16 && kGroup == 16, "the M of an mma");

// The target of a unit, which becomes the target's own. Compared with all at once: a walk would wait for each.
__device__ __forceinline__ const LswApplyTarget& target_of(const LswApplyArgs& args, uint32_t& unit) {
    uint32_t t = 0;
#pragma unroll
    for (uint32_t i = 1; i < LSW_APPLY_TARGETS; ++i) t += unit >= args.begins[i];
    unit -= args.begins[t];
    return args.targets[t];
}

// Entries of routes lie in rows of 1 << bits, so that nothing divides by k.
__device__ __forceinline__ uint32_t entry_bits(uint32_t k) { return 32 - __clz(k - 1); }

struct Entry {
    int given;  // its id as it stands there
    int slot;   // -1: none
    float gate;
};
__device__ __forceinline__ Entry load_entry(const LswApplyArgs& args, uint32_t row, uint32_t e) {
    const int64_t item = row < args.rows && e < args.k ? item_of(args, row) : -1;
    if (item < 0) return {-1, -1, 0.0f};
    const int given = id_at(args, item, e);
    return {given, known_id(given, args.slots), gate_at(args, item, e)};
}

template <class T> __device__ __forceinline__ uint32_t word(const Eight<T>& eight, int i) {
    const uint4& bits = eight.part[0].bits;
    return i == 0 ? bits.x : i == 1 ? bits.y : i == 2 ? bits.z : bits.w;
}

// One warp's part of a slice of A x: this lane's row of A, of which `left` exist from it on (the eighth behind it is the lane's too),
// and its row of x. kWhole: all are whole aligned packs.
template <bool kWhole, class T>
__device__ __forceinline__ void multiply_slice(const T* a, uint64_t a_stride, uint32_t left, const T* x, bool is_row, uint32_t begin,
                                               uint32_t end, float (&sum)[2][4]) {
    constexpr int kAhead = kWhole ? 3 : 1;
    constexpr uint32_t kStep = LSW_FEW_THREADS;  // 32 columns a warp
    for (uint32_t col0 = begin + threadIdx.x / 32 * 32; col0 < end; col0 += kAhead * kStep) {
        Eight<T> a_eight[kAhead][2], x_eight[kAhead];
#pragma unroll
        for (int s = 0; s < kAhead; ++s) {
            const uint32_t col = col0 + s * kStep + 8 * (threadIdx.x % 4), cols = col < end ? end - col : 0;
#pragma unroll
            for (uint32_t h = 0; h < 2; ++h) {
                const T* p = a + 8 * h * a_stride + col;
                a_eight[s][h] = kWhole ? load_eight_if(cols > 0 && 8 * h < left, p) : load_eight(p, 8 * h < left ? cols : 0, false);
            }
            x_eight[s] = kWhole ? load_eight_if(cols > 0 && is_row, x + col) : load_eight(x + col, is_row ? cols : 0, false);
        }
#pragma unroll
        for (int s = 0; s < kAhead; ++s) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint32_t m[4] = {word(a_eight[s][0], 2 * i), word(a_eight[s][1], 2 * i), word(a_eight[s][0], 2 * i + 1),
                                       word(a_eight[s][1], 2 * i + 1)};
                mma16816(sum[i], m, word(x_eight[s], 2 * i), word(x_eight[s], 2 * i + 1), T{});
            }
        }
    }
}

// A row of the batch that uses a slot, and the entry of its route that is the first to name it.
struct User {
    uint16_t row, entry;
};

// Finds who uses a slot with a coefficient that is not zero. One block; true: an entry of the batch before `candidate` names it too.
__device__ __forceinline__ bool find_users(const LswApplyArgs& args, int slot, float scale, uint32_t candidate, User* users,
                                           uint32_t& count) {
    const uint32_t bits = entry_bits(args.k), lane = threadIdx.x % 32;
    const uint32_t begin = lane >> bits << bits, of_row = (bits == 5 ? kFullWarp : (1u << (1u << bits)) - 1) << begin;
    bool is_later = false;
    for (uint32_t i = threadIdx.x; i - lane < args.rows << bits; i += LSW_FEW_THREADS) {
        const uint32_t row = i >> bits, e = i & ((1u << bits) - 1);
        const Entry entry = load_entry(args, row, e);
        const uint32_t same = __ballot_sync(kFullWarp, entry.slot == slot) & of_row;
        float gate = entry.gate;
        if (__any_sync(kFullWarp, __popc(same) > 1)) {
            for (uint32_t d = 1; d < 1u << bits; ++d) {
                const float other = __shfl_down_sync(kFullWarp, entry.gate, d);
                if (lane + d < 32 && (same >> (lane + d) & 1)) gate += other;
            }
        }
        if (entry.slot != slot) continue;
        if (row * args.k + e < candidate) is_later = true;
        const bool is_first = (same & ((1u << lane) - 1)) == 0;
        // In any order: it decides over columns of an mma.
        if (is_first && gate * scale != 0.0f) users[atomicAdd(&count, 1)] = {static_cast<uint16_t>(row), static_cast<uint16_t>(e)};
    }
    return is_later;
}

// A block: 16 ranks of a slot at a target, one slice of x, all rows that use the slot. Its number says the slot, or where the bank has
// more slots than the batch has entries, the entry, which must then be the batch's first to name its slot.
template <class T> __device__ __forceinline__ void shrink(const LswApplyArgs& args) {
    constexpr uint32_t kWarps = LSW_FEW_THREADS / 32;
    constexpr uint32_t kRowSum = 20;  // floats of a row's 16 ranks: four rows in different banks
    __shared__ User users[LSW_APPLY_MANY];
    __shared__ uint32_t count;
    __shared__ float sums[kWarps][8][kRowSum];
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    dependency_wait();
    dependency_release();
    const uint32_t split = blockIdx.x % kSplits, candidate = blockIdx.x / kSplits / args.units;
    uint32_t unit = blockIdx.x / kSplits - candidate * args.units;
    const LswApplyTarget& target = target_of(args, unit);
    const bool by_slot = args.candidates == args.slots;
    const int slot = by_slot ? candidate : load_entry(args, candidate / args.k, candidate % args.k).slot;
    if (slot < 0) return;
    const LswFactor f = factor_of(target, slot);
    const bool is_later = find_users(args, slot, f.scale, by_slot ? 0 : candidate, users, count);
    if (__syncthreads_or(is_later || kRanks * unit >= f.rank)) return;

    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4;
    const uint32_t length = (args.in + 32 * kSplits - 1) / (32 * kSplits) * 32;
    const uint32_t begin = split * length, end = min(args.in, begin + length);
    const uint32_t rank = kRanks * unit + g, left = rank < f.rank ? f.rank - rank : 0;
    const T* a = reinterpret_cast<const T*>(f.a) + rank * static_cast<uint64_t>(f.a_stride);
    const bool is_whole = args.x_aligned && (f.flags & LSW_A_ALIGNED) && args.in % 8 == 0;
    for (uint32_t user0 = 0; user0 < count; user0 += 8) {
        const bool is_row = user0 + g < count;
        const T* x = reinterpret_cast<const T*>(args.x) + (is_row ? users[user0 + g].row : 0) * args.x_stride;
        float sum[2][4] = {};
        if (is_whole) multiply_slice<true>(a, f.a_stride, left, x, is_row, begin, end, sum);
        else multiply_slice<false>(a, f.a_stride, left, x, is_row, begin, end, sum);
        if (user0 > 0) __syncthreads();
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[warp][2 * (lane % 4) + i % 2][g + 8 * (i / 2)] = sum[0][i] + sum[1][i];
        __syncthreads();
        const uint32_t i = threadIdx.x / 16, column = kRanks * unit + threadIdx.x % 16;
        if (i < 8 && user0 + i < count && column < f.rank) {
            float total = 0.0f;
#pragma unroll
            for (uint32_t w = 0; w < kWarps; ++w) total += sums[w][i][threadIdx.x % 16];
            const User user = users[user0 + i];
            products(args, split * args.rows + user.row, user.entry)[target.column + column] = total;
        }
    }
}

constexpr uint32_t kMaxEntries = kGroup * LSW_MAX_K;
constexpr uint32_t kSteps = LSW_FEW_STEPS;
constexpr uint16_t kNone = 0xffff;

// A slot of a group of rows at a target.
struct Term {
    uint64_t b;
    uint32_t b_stride, rank;
};

struct ExpandShared {
    union {
        // Of entries, until their terms are known: slots, 16 bytes at a time; slots where no earlier entry has named them, else the
        // largest number; gates.
        struct {
            int4 slots[kMaxEntries / 4], firsts[kMaxEntries / 4];
            float gates[kMaxEntries];
        };
        uint4 b[kSteps][LSW_EXPAND_THREADS][2];
    };
    // In two parts that an mma takes as they are, and that lose nothing but the last bits of an f32.
    float high[kSteps][kGroup][16], low[kSteps][kGroup][16];
    float step_c[kSteps][kGroup];
    // Of entries that are the first of their row to name their slot: the coefficient and the term. kNone: the entry adds nothing.
    float c[kMaxEntries];
    uint16_t term[kMaxEntries];
    // Ascending by slot; who uses them: bit i, row i of the group.
    Term terms[kMaxEntries];
    uint32_t users[kMaxEntries];
    uint32_t count, rank, rows;  // of terms; the largest rank; rows that anything is added to, a bit each
    uint32_t ragged;             // not 0: some rows of B are not whole aligned packs
};
static_assert(sizeof(ExpandShared) <= LSW_FEW_SHARED, "shared memory of expand");

// The terms of a group of rows at a target. One block. Each entry is compared with all others: there are few.
__device__ __forceinline__ void load_terms(const LswApplyArgs& args, const LswApplyTarget& target, uint32_t row0, uint32_t entries,
                                           bool reports, ExpandShared& shared) {
    const uint32_t bits = entry_bits(args.k), fours = (entries + 3) / 4;
    int* slots = reinterpret_cast<int*>(shared.slots);
    int* firsts = reinterpret_cast<int*>(shared.firsts);
    // What a slot's factor waits for is the slot: bring all of few closer meanwhile.
    if (threadIdx.x < args.slots) prefetch(&factor_of(target, threadIdx.x));
    if (threadIdx.x == 0) shared.count = shared.rank = shared.rows = shared.ragged = 0;
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < 4 * fours; i += LSW_EXPAND_THREADS) {
        const Entry entry = load_entry(args, row0 + (i >> bits), i < entries ? i & ((1u << bits) - 1) : args.k);
        slots[i] = entry.slot;
        shared.gates[i] = entry.gate;
        shared.users[i] = 0;
        if (reports) report_id(args, entry.given);
    }
    __syncthreads();
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < 4 * fours; i += LSW_EXPAND_THREADS) {
        const int slot = slots[i];
        bool is_first = slot >= 0;
#pragma unroll 1
        for (uint32_t n = 0; 4 * n < i; ++n) {
            const int4 other = shared.slots[n];
            if (other.x == slot || (other.y == slot && 4 * n + 1 < i) || (other.z == slot && 4 * n + 2 < i) ||
                (other.w == slot && 4 * n + 3 < i))
                is_first = false;
        }
        firsts[i] = is_first ? slot : INT32_MAX;
        if (is_first) atomicAdd(&shared.count, 1);
    }
    __syncthreads();
    uint32_t rank = 0, rows = 0;
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < entries; i += LSW_EXPAND_THREADS) {
        const int slot = slots[i];
        shared.term[i] = kNone;
        if (slot < 0) continue;
        const LswFactor f = factor_of(target, slot);
        uint32_t term = 0;
#pragma unroll 1
        for (uint32_t n = 0; n < fours; ++n) {
            const int4 other = shared.firsts[n];
            term += (other.x < slot) + (other.y < slot) + (other.z < slot) + (other.w < slot);
        }
        const uint32_t row = i >> bits;
        bool is_first = true;
        float gate = shared.gates[i];
#pragma unroll 1
        for (uint32_t other = row << bits; other < (row + 1) << bits; ++other) {
            if (other == i || slots[other] != slot) continue;
            if (other < i) is_first = false;
            gate += shared.gates[other];
        }
        if (!is_first) continue;
        if (firsts[i] == slot) {
            shared.terms[term] = {f.b, f.b_stride, f.rank};
            if (!(f.flags & LSW_B_ALIGNED) || f.rank % 8 != 0) atomicOr(&shared.ragged, 1u);
        }
        const float c = gate * f.scale;
        if (reports) report_coefficient(args, f.rank, c);
        if (c == 0.0f || f.rank == 0) continue;
        shared.c[i] = c;
        shared.term[i] = term;
        atomicOr(&shared.users[term], 1u << row);
        rank = max(rank, f.rank);
        rows |= 1u << row;
    }
    // A warp first: atomics on one word take turns.
    rank = __reduce_max_sync(kFullWarp, rank);
    rows = __reduce_or_sync(kFullWarp, rows);
    if (threadIdx.x % 32 == 0 && rank > 0) {
        atomicMax(&shared.rank, rank);
        atomicOr(&shared.rows, rows);
    }
    __syncthreads();
}

// One warp: some steps of its 32 outputs of B, on their way to shared memory. Where all are whole aligned packs, terms are looked up
// before the first copy and nothing is decided between copies: in a single warp every branch and every look-up is a wait.
template <class T>
__device__ __forceinline__ void copy_b(uint32_t step0, uint32_t steps, uint32_t step_bits, uint32_t first, uint32_t out,
                                       ExpandShared& shared) {
    const uint32_t lane = threadIdx.x % 32, row = threadIdx.x / 32 * 32 + lane / 2, o = first + lane / 2;
    const auto rank_at = [&](uint32_t s) { return 16 * ((step0 + s) & ((1u << step_bits) - 1)) + 8 * (lane % 2); };
    if (shared.ragged == 0) {
        Term terms[kSteps];
#pragma unroll
        for (uint32_t s = 0; s < kSteps; ++s) terms[s] = shared.terms[min(step0 + s, step0 + steps - 1) >> step_bits];
#pragma unroll
        for (uint32_t s = 0; s < kSteps; ++s) {
            if (s >= steps) break;
            const T* p = reinterpret_cast<const T*>(terms[s].b) + o * static_cast<uint64_t>(terms[s].b_stride) + rank_at(s);
            const uint32_t bytes = rank_at(s) < terms[s].rank ? 16 : 0;
            copy16_partly(shared_address(&shared.b[s][row][lane % 2]), p, o < out ? bytes : 0);
            copy16_partly(shared_address(&shared.b[s][row + 16][lane % 2]), p + 16 * static_cast<uint64_t>(terms[s].b_stride),
                          o + 16 < out ? bytes : 0);
        }
        return;
    }
#pragma unroll 1
    for (uint32_t i = 0; i < 2 * steps; ++i) {
        const uint32_t s = i / 2, half = 16 * (i % 2);
        const Term& term = shared.terms[(step0 + s) >> step_bits];
        const T* p = reinterpret_cast<const T*>(term.b) + (o + half) * static_cast<uint64_t>(term.b_stride) + rank_at(s);
        const uint32_t left = o + half < out && rank_at(s) < term.rank ? term.rank - rank_at(s) : 0;
        shared.b[s][row + half][lane % 2] = load_eight(p, left, false).part[0].bits;
    }
}

// What the high part leaves of x, rounded as it is.
__device__ __forceinline__ float rest(float x, float high) { return is_finite(high) ? round_tf32(x - high) : 0.0f; }

// Brings the products of some steps to shared memory, their slices added up, zeros behind the rank. One block.
__device__ __forceinline__ void load_products(const LswApplyArgs& args, const LswApplyTarget& target, uint32_t row0, uint32_t entries,
                                              uint32_t step0, uint32_t step_bits, ExpandShared& shared) {
    const uint32_t bits = entry_bits(args.k), step_mask = (1u << step_bits) - 1;
    const uint32_t each_bits = min(step_bits, 31 - __clz(kSteps));  // steps of an entry that may be among them
    const uint64_t slice = static_cast<uint64_t>(args.rows) * args.k * args.width;
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < entries << (each_bits + 2); i += LSW_EXPAND_THREADS) {
        const uint32_t entry = i >> (each_bits + 2), term = shared.term[entry], row = entry >> bits;
        const uint32_t step = (term << step_bits) + (step0 & step_mask) + (i >> 2 & ((1u << each_bits) - 1)), s = step - step0;
        if (term == kNone || s >= kSteps) continue;
        const uint32_t rank = 16 * (step & step_mask) + 4 * (i % 4), max_rank = shared.terms[term].rank;
        float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
        if (rank < max_rank) {
            // The workspace goes on to the next multiple of eight ranks, with anything.
            const float* p = products(args, row0 + row, entry & ((1u << bits) - 1)) + target.column + rank;
            float4 part[kSplits];
#pragma unroll
            for (uint32_t n = 0; n < kSplits; ++n) part[n] = *reinterpret_cast<const float4*>(p + n * slice);
#pragma unroll
            for (uint32_t n = 0; n < kSplits; ++n) sum.x += part[n].x, sum.y += part[n].y, sum.z += part[n].z, sum.w += part[n].w;
            if (rank + 1 >= max_rank) sum.y = 0.0f;
            if (rank + 2 >= max_rank) sum.z = 0.0f;
            if (rank + 3 >= max_rank) sum.w = 0.0f;
        }
        const float4 high = {round_tf32(sum.x), round_tf32(sum.y), round_tf32(sum.z), round_tf32(sum.w)};
        *reinterpret_cast<float4*>(&shared.high[s][row][4 * (i % 4)]) = high;
        *reinterpret_cast<float4*>(&shared.low[s][row][4 * (i % 4)]) = {rest(sum.x, high.x), rest(sum.y, high.y), rest(sum.z, high.z),
                                                                        rest(sum.w, high.w)};
        if (i % 4 == 0) shared.step_c[s][row] = shared.c[entry];
    }
}

// One warp: sum += B products, of 16 ranks.
template <class T> __device__ __forceinline__ void multiply(const ExpandShared& shared, uint32_t s, float (&sum)[4][4]) {
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    float4 high[2], low[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        high[h] = *reinterpret_cast<const float4*>(&shared.high[s][g + 8 * h][4 * q]);
        low[h] = *reinterpret_cast<const float4*>(&shared.low[s][g + 8 * h][4 * q]);
    }
    float2 b01[4], b23[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const uint4* row = shared.b[s][threadIdx.x / 32 * 32 + 8 * (g / 2) + 2 * j + g % 2];
        const uint2 four = reinterpret_cast<const uint2*>(row)[q];
        b01[j] = unpack(four.x, T{}), b23[j] = unpack(four.y, T{});
    }
    // Four sums take turns: an mma that needs the one before would wait for it.
#pragma unroll
    for (int j = 0; j < 4; ++j) mma1688(sum[j], {low[0].x, low[1].x, low[0].y, low[1].y}, b01[j].x, b01[j].y);
#pragma unroll
    for (int j = 0; j < 4; ++j) mma1688(sum[j], {low[0].z, low[1].z, low[0].w, low[1].w}, b23[j].x, b23[j].y);
#pragma unroll
    for (int j = 0; j < 4; ++j) mma1688(sum[j], {high[0].x, high[1].x, high[0].y, high[1].y}, b01[j].x, b01[j].y);
#pragma unroll
    for (int j = 0; j < 4; ++j) mma1688(sum[j], {high[0].z, high[1].z, high[0].w, high[1].w}, b23[j].x, b23[j].y);
}

// A block: a group of rows and LSW_EXPAND_THREADS outputs of one target. A warp does 32 outputs; a lane owns eight of them in rows g
// and g + 8.
template <class T, class Y> __device__ __forceinline__ void expand(const LswApplyArgs& args, ExpandShared& shared) {
    uint32_t unit = blockIdx.x % args.units;
    const uint32_t row0 = blockIdx.x / args.units * kGroup, lane = threadIdx.x % 32, g = lane / 4;
    const LswApplyTarget& target = target_of(args, unit);
    const uint32_t entries = min(kGroup, args.rows - row0) << entry_bits(args.k);
    load_terms(args, target, row0, entries, unit == 0, shared);
    if (shared.rank == 0) return dependency_wait();

    // A term takes as many steps as the largest needs, to a power of two.
    const uint32_t step_bits = shared.rank <= 16 ? 0 : 32 - __clz((shared.rank - 1) / 16), step_mask = (1u << step_bits) - 1;
    const uint32_t steps = shared.count << step_bits;
    const uint32_t first = unit * LSW_EXPAND_THREADS + threadIdx.x / 32 * 32;
    const uint32_t mine = first + 8 * (lane % 4), outs = mine < target.out ? target.out - mine : 0;
    Y* const to = reinterpret_cast<Y*>(target.y) + (row0 + g) * target.y_stride + mine;
    float total[2][8] = {}, sum[4][4] = {};
    Eight<Y> y[2];
    for (uint32_t step0 = 0; step0 < steps; step0 += kSteps) {
        const uint32_t here = min(kSteps, steps - step0);
        if (step0 > 0) __syncthreads();
        copy_b<T>(step0, here, step_bits, first, target.out, shared);
        copy_commit();
        if (step0 == 0) {
            // Of what came before, nothing but the products and y is still being written.
            dependency_wait();
#pragma unroll
            for (uint32_t h = 0; h < 2; ++h) {
                y[h] = load_eight(to + 8 * h * target.y_stride, shared.rows >> (g + 8 * h) & 1 ? outs : 0, target.y_aligned);
            }
        }
        load_products(args, target, row0, entries, step0, step_bits, shared);
        copy_wait<0>();
        __syncthreads();
#pragma unroll 1
        for (uint32_t s = 0; s < here; ++s) {
            const uint32_t term = (step0 + s) >> step_bits;
            if (16 * ((step0 + s) & step_mask) < shared.terms[term].rank) multiply<T>(shared, s, sum);
            if (((step0 + s) & step_mask) != step_mask) continue;
#pragma unroll
            for (uint32_t h = 0; h < 2; ++h) {
                // A row that does not use the term takes nothing of it, NaN included.
                const bool uses = shared.users[term] >> (g + 8 * h) & 1;
                const float c = shared.step_c[s][g + 8 * h];
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    float& part = sum[i / 2][2 * h + i % 2];
                    if (uses) total[h][i] = fmaf(c, part, total[h][i]);
                    part = 0.0f;
                }
            }
        }
    }
#pragma unroll
    for (uint32_t h = 0; h < 2; ++h) {
        if (outs == 0 || !(shared.rows >> (g + 8 * h) & 1)) continue;
#pragma unroll
        for (int i = 0; i < 8; ++i) y[h].set(i, y[h].at(i) + total[h][i]);
        store_eight(to + 8 * h * target.y_stride, y[h], outs, target.y_aligned);
    }
}

template <class T> __device__ __forceinline__ void expand(const LswApplyArgs& args) {
    extern __shared__ __align__(16) unsigned char memory[];
    ExpandShared& shared = *reinterpret_cast<ExpandShared*>(memory);
    if (args.y_type == 0) return expand<T, float>(args, shared);
    if (args.y_type == 1) return expand<T, __half>(args, shared);
    expand<T, __nv_bfloat16>(args, shared);
}

}  // namespace

// Without rows there may be no units to divide by.
#define LSW_APPLY(suffix, T)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(LSW_FEW_THREADS)                                                            \
        lsw_apply_shrink_##suffix(const __grid_constant__ LswApplyArgs args) {                                               \
        if (args.rows > 0) shrink<T>(args);                                                                                  \
    }                                                                                                                        \
    extern "C" __global__ void __launch_bounds__(LSW_EXPAND_THREADS, 4)                                                      \
        lsw_apply_expand_##suffix(const __grid_constant__ LswApplyArgs args) {                                               \
        if (args.rows > 0) expand<T>(args);                                                                                  \
    }
LSW_APPLY(f16, __half)
LSW_APPLY(bf16, __nv_bfloat16)
