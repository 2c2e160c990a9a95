// Unmerged adapters of 16 bits for up to 64 rows, each under its own route, the weights left as they are.
//
//   shrink  products[r, e] = A x[r]                          for the slot that entry e of row r's route is the first to name
//   expand  y[r] = round(y[r] + sum over the slots of c B products[r, e])         c = gate * scale, slots ascending
//
// for all targets of a group that share x (q, k, v; gate, up) in one launch each. The products stay in f32: y is rounded once.
// Beside the product that writes y, expand is in two, with the same bits:
//
//   sum     sums[r] = sum over the slots of c B products[r, e], or kUntouched
//   add     y[r] = round(y[r] + sums[r])
//
// More rows: apply_mma.cu; f32, which tensor cores would round: apply_f32.cu.
//
// Floor: each adapter that a route names, read once (Llama-2-7B, rank 16, two of them: 0.16 GB, 35 us of an H200's bandwidth in 128
// groups of targets; eight: 140 us). So latency is what counts: loads that wait for loads (ids -> factor -> A -> products -> y), and
// what a single warp does between them, where each branch, look-up in shared memory or product waits for the one before. Hence:
//
// - Tensor cores, not for their speed but for what they share: a block of shrink has 16 ranks of one slot as M and its rows of the
//   batch, sixteen at a time, as N; one of expand has 32 rows of the batch as M, twice 16, and the outputs as N. So an adapter is read
//   once for all its rows (in expand: of 32). Nobody walks over a route: a block of shrink knows its slot from its number and asks who
//   uses it; expand sorts its entries by comparing each with all others.
// - An element of an mma's result depends on its own row and column alone. So a row's bits are the same in any batch, and what its
//   neighbours hold, NaN included, does not matter; the order of every sum depends on the shape and on the row's own route.
// - x has slices of LSW_FEW_COLUMNS columns, a block each, so that few slots still keep many multiprocessors loading, all at once: a
//   thread sends for all that it has of A and x, and then waits once. expand adds the slices up, in order, as it brings the products
//   to shared memory.
// - expand is a dependent launch. shrink lets it start as soon as shrink itself has passed its own wait: from then on all that came
//   before shrink is complete, and shrink writes the products alone. So expand sorts its entries, reads factors and sends for B while
//   shrink runs, and waits before the first product and y only. Both ask for the same division of a multiprocessor's memory, a half
//   of it as L1: one that has to divide it anew first runs empty, and expand would start when shrink has ended.
// - What waits for y is add alone: one trip for y and the sums. It is a plain launch: behind a product that ends on one stream while
//   sum does on another, a dependent one began later.
// - A, x and B come straight from memory into registers: the order of k within a step is free as long as both agree on it, so a lane
//   takes eight (B: four) consecutive elements of a row where the layout of the mma asks for pairs eight apart. In the same way a lane
//   of expand owns four consecutive outputs of a row: y is read and written 8 or 16 bytes at a time.
// - Arguments, code and memory are cold: each word, each instruction and each trip counts. So grids of three dimensions, where a
//   division would come first; no branch between loads; and loops that turn B through its registers instead of long code.
//
// Where addresses are not multiples of 16 bytes the same packs are gathered element by element: the same bits again. What lies behind
// a row's end or rank is not read, or read and not used.
#include "common/apply.cuh"
#include "common/ptx.cuh"

#include <type_traits>

namespace {

constexpr uint32_t kRanks = LSW_FEW_RANKS;
static_assert(kRanks == 16, "the M of an mma");

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
// Some entries; rows and places in their routes that do not exist have none. Without branches where there is no map, so that all are on
// their way at once.
template <int kCount>
__device__ __forceinline__ void load_entries(const LswApplyArgs& args, const uint32_t (&row)[kCount], const uint32_t (&e)[kCount],
                                             Entry (&entry)[kCount]) {
    int32_t item[kCount];
#pragma unroll
    for (int n = 0; n < kCount; ++n) item[n] = row[n] < args.rows && e[n] < args.k ? static_cast<int32_t>(row[n]) : -1;
    if (args.row_map != 0) {
#pragma unroll
        for (int n = 0; n < kCount; ++n) {
            if (item[n] >= 0) item[n] = known_id(reinterpret_cast<const int32_t*>(args.row_map)[row[n]], args.items);
        }
    }
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
        const uint64_t place = static_cast<uint32_t>(item[n]);
        const bool exists = item[n] >= 0;
        entry[n].given = load_if(exists, reinterpret_cast<const uint32_t*>(args.ids) + place * args.ids_stride + e[n], ~0u);
        entry[n].gate = __uint_as_float(load_if(exists, reinterpret_cast<const uint32_t*>(args.gates) + place * args.gates_stride + e[n], 0));
    }
#pragma unroll
    for (int n = 0; n < kCount; ++n) entry[n].slot = known_id(entry[n].given, args.slots);
}
__device__ __forceinline__ Entry load_entry(const LswApplyArgs& args, uint32_t row, uint32_t e) {
    const uint32_t rows[1] = {row}, es[1] = {e};
    Entry entry[1];
    load_entries(args, rows, es, entry);
    return entry[0];
}

template <class T> __device__ __forceinline__ uint32_t word(const Eight<T>& eight, int i) {
    const uint4& bits = eight.part[0].bits;
    return i == 0 ? bits.x : i == 1 ? bits.y : i == 2 ? bits.z : bits.w;
}

// Four elements, as they lie in memory: taken apart at their load, they would be waited for there.
template <class T> struct Four {
    uint32_t words[sizeof(T)];

    __device__ __forceinline__ float4 get() const {
        if constexpr (sizeof(T) == 4) {
            return {__uint_as_float(words[0]), __uint_as_float(words[1]), __uint_as_float(words[2]), __uint_as_float(words[3])};
        } else {
            const float2 a = unpack(words[0], T{}), b = unpack(words[1], T{});
            return {a.x, a.y, b.x, b.y};
        }
    }
    __device__ __forceinline__ void set(const float4& x) {
        if constexpr (sizeof(T) == 4) {
            words[0] = __float_as_uint(x.x), words[1] = __float_as_uint(x.y), words[2] = __float_as_uint(x.z), words[3] = __float_as_uint(x.w);
        } else {
            words[0] = pack(float2{x.x, x.y}, T{}), words[1] = pack(float2{x.z, x.w}, T{});
        }
    }
};
template <class T> using Words = std::conditional_t<sizeof(T) == 4, uint4, uint2>;

// The first `left` of four elements; zeros for the others. Whole aligned fours: no branch.
template <class T> __device__ __forceinline__ Four<T> load_four(const T* p, uint32_t left, bool is_whole) {
    Four<T> four = {};
    if (is_whole) {
        Words<T> words = {};
        if (left > 0) words = *reinterpret_cast<const Words<T>*>(p);
        memcpy(four.words, &words, sizeof(words));
    } else {
        T lanes[4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i < left) lanes[i] = p[i];
        }
        memcpy(four.words, lanes, sizeof(lanes));
    }
    return four;
}
template <class T> __device__ __forceinline__ void store_four(T* p, const Four<T>& four, uint32_t left, bool is_whole) {
    if (is_whole) {
        Words<T> words;
        memcpy(&words, four.words, sizeof(words));
        if (left > 0) *reinterpret_cast<Words<T>*>(p) = words;
    } else {
        T lanes[4];
        memcpy(lanes, four.words, sizeof(lanes));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i < left) p[i] = lanes[i];
        }
    }
}

// A row of the batch that uses a slot, and the entry of its route that is the first to name it.
struct User {
    uint16_t row, entry;
};

// One warp: lists who uses a slot with a gate that is not zero, and counts them. `is_later`: an entry of the batch before `candidate`
// names it too.
__device__ __forceinline__ uint32_t find_users(const LswApplyArgs& args, int slot, uint32_t candidate, User* users, bool& is_later) {
    constexpr uint32_t kAhead = 2;
    const uint32_t bits = entry_bits(args.k), lane = threadIdx.x % 32, before = (1u << lane) - 1;
    const uint32_t begin = lane >> bits << bits, of_row = (bits == 5 ? kFullWarp : (1u << (1u << bits)) - 1) << begin;
    uint32_t count = 0;
    for (uint32_t i0 = 0; i0 < args.rows << bits; i0 += 32 * kAhead) {
        Entry entry[kAhead];
        uint32_t row[kAhead], e[kAhead];
#pragma unroll
        for (uint32_t n = 0; n < kAhead; ++n) row[n] = (i0 + 32 * n + lane) >> bits, e[n] = lane & ((1u << bits) - 1);
        load_entries(args, row, e, entry);
#pragma unroll
        for (uint32_t n = 0; n < kAhead; ++n) {
            const bool names = entry[n].slot == slot;
            const uint32_t same = __ballot_sync(kFullWarp, names) & of_row;
            const uint32_t counted = __ballot_sync(kFullWarp, names && entry[n].gate != 0.0f) & of_row;
            const bool uses = names && (same & before) == 0 && counted != 0;
            const uint32_t all = __ballot_sync(kFullWarp, uses);
            if (uses) users[count + __popc(all & before)] = {static_cast<uint16_t>(row[n]), static_cast<uint16_t>(e[n])};
            count += __popc(all);
            is_later |= names && row[n] * args.k + e[n] < candidate;
        }
    }
    is_later = __any_sync(kFullWarp, is_later);
    return count;
}

constexpr uint32_t kShrinkWarps = LSW_FEW_THREADS / 32;
constexpr uint32_t kUsers = 16;  // at a time: the N of two mmas
static_assert(LSW_FEW_THREADS == kUsers * kRanks, "a product a thread");

// One warp's part of a slice of A x: this lane's row of A, of which `left` exist from it on (the eighth behind it is the lane's too),
// and its rows of x. kWhole: all are whole aligned packs.
template <bool kWhole, class T>
__device__ __forceinline__ void multiply_slice(const T* a, uint64_t a_stride, uint32_t left, const T* const (&x)[2], const bool (&is_row)[2],
                                               uint32_t split, uint32_t splits, uint32_t end, float (&sum)[2][4]) {
    constexpr uint32_t kAhead = LSW_FEW_COLUMNS / (32 * kShrinkWarps);
    for (uint32_t col0 = split * LSW_FEW_COLUMNS; col0 < end; col0 += splits * LSW_FEW_COLUMNS) {
        Eight<T> a_eight[kAhead][2], x_eight[kAhead][2];
#pragma unroll
        for (int s = 0; s < kAhead; ++s) {
            const uint32_t col = col0 + (kAhead * (threadIdx.x / 32) + s) * 32 + 8 * (threadIdx.x % 4), cols = col < end ? end - col : 0;
#pragma unroll
            for (uint32_t h = 0; h < 2; ++h) {
                const T* p = a + 8 * h * a_stride + col;
                a_eight[s][h] = kWhole ? load_eight_if(cols > 0 && 8 * h < left, p) : load_eight(p, 8 * h < left ? cols : 0, false);
                x_eight[s][h] = kWhole ? load_eight_if(cols > 0 && is_row[h], x[h] + col) : load_eight(x[h] + col, is_row[h] ? cols : 0, false);
            }
        }
#pragma unroll
        for (int s = 0; s < kAhead; ++s) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint32_t m[4] = {word(a_eight[s][0], 2 * i), word(a_eight[s][1], 2 * i), word(a_eight[s][0], 2 * i + 1),
                                       word(a_eight[s][1], 2 * i + 1)};
#pragma unroll
                for (int h = 0; h < 2; ++h) mma16816(sum[h], m, word(x_eight[s][h], 2 * i), word(x_eight[s][h], 2 * i + 1), T{});
            }
        }
    }
}

// A block: 16 ranks of a slot at a target, one slice of x, all rows that use the slot. Its number says the slot, or where the bank has
// more slots than the batch has entries, the entry, which must then be the batch's first to name its slot. Every warp finds the users
// for itself, so that none waits for another.
template <class T> __device__ __forceinline__ void shrink(const LswApplyArgs& args) {
    constexpr uint32_t kRowSum = 20;  // floats of a row's 16 ranks: four rows in different banks
    __shared__ User users_of[kShrinkWarps][LSW_APPLY_MANY];
    __shared__ float sums[kShrinkWarps][kUsers][kRowSum];
    dependency_wait();
    dependency_release();
    const uint32_t split = blockIdx.x, candidate = blockIdx.z;
    uint32_t unit = blockIdx.y;
    const LswApplyTarget& target = target_of(args, unit);
    const bool by_slot = args.candidates == args.slots;
    const int slot = by_slot ? candidate : load_entry(args, candidate / args.k, candidate % args.k).slot;
    if (slot < 0) return;
    const LswFactor f = factor_of(target, slot);
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4;
    User* const users = users_of[warp];
    bool is_later = false;
    const uint32_t count = find_users(args, slot, by_slot ? 0 : candidate, users, is_later);
    if (is_later || count == 0 || kRanks * unit >= f.rank) return;
    __syncwarp();

    const uint32_t rank = kRanks * unit + g, left = rank < f.rank ? f.rank - rank : 0;
    const T* a = reinterpret_cast<const T*>(f.a) + rank * static_cast<uint64_t>(f.a_stride);
    const bool is_whole = args.x_aligned && (f.flags & LSW_A_ALIGNED) && args.in % 8 == 0;
    for (uint32_t user0 = 0; user0 < count; user0 += kUsers) {
        bool is_row[2];
        const T* x[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            is_row[h] = user0 + g + 8 * h < count;
            x[h] = reinterpret_cast<const T*>(args.x) + (is_row[h] ? users[user0 + g + 8 * h].row : 0) * args.x_stride;
        }
        float sum[2][4] = {};
        if (is_whole) multiply_slice<true>(a, f.a_stride, left, x, is_row, split, args.splits, args.in, sum);
        else multiply_slice<false>(a, f.a_stride, left, x, is_row, split, args.splits, args.in, sum);
        if (user0 > 0) __syncthreads();
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[warp][8 * h + 2 * (lane % 4) + i % 2][g + 8 * (i / 2)] = sum[h][i];
        }
        __syncthreads();
        const uint32_t i = threadIdx.x / kRanks, column = kRanks * unit + threadIdx.x % kRanks;
        if (user0 + i < count && column < f.rank) {
            float total = 0.0f;
#pragma unroll
            for (uint32_t w = 0; w < kShrinkWarps; ++w) total += sums[w][i][threadIdx.x % kRanks];
            const User user = users[user0 + i];
            products(args, split * args.rows + user.row, user.entry)[target.column + column] = total;
        }
    }
}

constexpr uint32_t kGroup = LSW_FEW_ROWS;
static_assert(kGroup == 32, "twice the M of an mma");
constexpr uint32_t kMaxEntries = kGroup * LSW_MAX_K;
constexpr uint32_t kSteps = LSW_FEW_STEPS;
constexpr uint32_t kExpandThreads = LSW_FEW_EXPAND_THREADS;
constexpr uint16_t kNone = 0xffff;

// A slot of a group of rows at a target.
struct Term {
    uint64_t b;
    uint32_t b_stride, rank;
};

// The products of four ranks enter the second mma in parts that lose nothing: beside B in bf16 as three of 8 bits, cut and not
// rounded, so that a large number does not become infinite; beside B in f16 as two tf32 of 11 bits (nothing but the last bits of an
// f32), two ranks an mma. What is not finite is in the first part alone.
template <class T> struct Parts;
template <> struct Parts<__nv_bfloat16> {
    static constexpr int kCount = 3;
    uint2 part[kCount];

    __device__ __forceinline__ explicit Parts(const float (&x)[4]) {
        uint32_t bits[kCount][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float rest = x[i];
#pragma unroll
            for (int p = 0; p < kCount; ++p) {
                bits[p][i] = __float_as_uint(rest);
                rest = is_finite(x[i]) ? rest - __uint_as_float(bits[p][i] & 0xffff0000u) : 0.0f;
            }
        }
#pragma unroll
        for (int p = 0; p < kCount; ++p) part[p] = {__byte_perm(bits[p][0], bits[p][1], 0x7632), __byte_perm(bits[p][2], bits[p][3], 0x7632)};
    }
    // d += a part of 16 ranks of rows g and g + 8, times B.
    static __device__ __forceinline__ void multiply(float (&d)[4], int, const uint32_t (&a)[4], const Four<__nv_bfloat16>& b) {
        mma16816(d, a, b.words[0], b.words[1], __nv_bfloat16{});
    }
};
template <> struct Parts<__half> {
    static constexpr int kCount = 4;
    uint2 part[kCount];

    __device__ __forceinline__ explicit Parts(const float (&x)[4]) {
        float high[4], low[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            high[i] = round_tf32(x[i]);
            low[i] = is_finite(high[i]) ? round_tf32(x[i] - high[i]) : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            part[i] = {__float_as_uint(high[2 * i]), __float_as_uint(high[2 * i + 1])};
            part[2 + i] = {__float_as_uint(low[2 * i]), __float_as_uint(low[2 * i + 1])};
        }
    }
    static __device__ __forceinline__ void multiply(float (&d)[4], int p, const uint32_t (&a)[4], const Four<__half>& b) {
        const float2 two = unpack(b.words[p % 2], __half{});
        mma1688(d, {__uint_as_float(a[0]), __uint_as_float(a[1]), __uint_as_float(a[2]), __uint_as_float(a[3])}, two.x, two.y);
    }
};

template <class T> struct ExpandShared {
    union {
        // Of entries, until their terms are known: slots, 16 bytes at a time; slots where no earlier entry has named them, else the
        // largest number; gates.
        struct {
            int4 slots[kMaxEntries / 4], firsts[kMaxEntries / 4];
            float gates[kMaxEntries];
        };
        // Of rows g and g + 8 of each 16, a pair of words in turns: an operand of an mma is one load.
        uint32_t parts[Parts<T>::kCount][kSteps][kGroup / 2][4][4];
    };
    float step_c[kSteps][kGroup];
    uint32_t step_users[kSteps];
    // Of entries that are the first of their row to name their slot: the coefficient and the term. kNone: the entry adds nothing.
    float c[kMaxEntries];
    uint16_t term[kMaxEntries];
    // Ascending by slot; who uses them: bit i, row i of the group.
    Term terms[kMaxEntries];
    uint32_t users[kMaxEntries];
    uint32_t count, rank, rows;  // of terms; the largest rank; rows that anything is added to, a bit each
    uint32_t ragged;             // not 0: some rows of B are not whole aligned fours
};
static_assert(sizeof(ExpandShared<__half>) <= LSW_FEW_SHARED, "shared memory of expand");

// The terms of a group of rows at a target. One block. Each entry is compared with all others: there are few.
template <class T>
__device__ __forceinline__ void load_terms(const LswApplyArgs& args, const LswApplyTarget& target, uint32_t row0, uint32_t entries,
                                           bool reports, ExpandShared<T>& shared) {
    constexpr uint32_t kEach = 4;  // threads that compare an entry, with a fourth of the others each
    const uint32_t bits = entry_bits(args.k), fours = (entries + 4 * kEach - 1) / (4 * kEach) * kEach, part = threadIdx.x % kEach;
    int* slots = reinterpret_cast<int*>(shared.slots);
    int* firsts = reinterpret_cast<int*>(shared.firsts);
    // What a slot's factor waits for is the slot: bring all of few closer meanwhile.
    if (threadIdx.x < args.slots) prefetch(&factor_of(target, threadIdx.x));
    if (threadIdx.x == 0) shared.count = shared.rank = shared.rows = shared.ragged = 0;
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < 4 * fours; i += kExpandThreads) {
        const Entry entry = load_entry(args, row0 + (i >> bits), i < entries ? i & ((1u << bits) - 1) : args.k);
        slots[i] = entry.slot;
        shared.gates[i] = entry.gate;
        shared.users[i] = 0;
        if (reports) report_id(args, entry.given);
    }
    __syncthreads();
#pragma unroll 1
    for (uint32_t i = threadIdx.x / kEach; i < 4 * fours; i += kExpandThreads / kEach) {
        const int slot = slots[i];
        bool is_first = slot >= 0;
#pragma unroll 4
        for (uint32_t n = part; n < fours; n += kEach) {
            const int4 other = shared.slots[n];
            is_first &= (other.x != slot || 4 * n >= i) & (other.y != slot || 4 * n + 1 >= i) & (other.z != slot || 4 * n + 2 >= i) &
                        (other.w != slot || 4 * n + 3 >= i);
        }
        is_first &= __shfl_xor_sync(kFullWarp, is_first, 1);
        is_first &= __shfl_xor_sync(kFullWarp, is_first, 2);
        if (part != 0) continue;
        firsts[i] = is_first ? slot : INT32_MAX;
        if (is_first) atomicAdd(&shared.count, 1);
    }
    __syncthreads();
    uint32_t rank = 0, rows = 0;
#pragma unroll 1
    for (uint32_t i = threadIdx.x / kEach; i < 4 * fours; i += kExpandThreads / kEach) {
        const int slot = slots[i];
        LswFactor f = {};
        if (slot >= 0 && part == 0) f = factor_of(target, slot);
        uint32_t term = 0;
#pragma unroll 4
        for (uint32_t n = part; n < fours; n += kEach) {
            const int4 other = shared.firsts[n];
            term += (other.x < slot) + (other.y < slot) + (other.z < slot) + (other.w < slot);
        }
        term += __shfl_xor_sync(kFullWarp, term, 1);
        term += __shfl_xor_sync(kFullWarp, term, 2);
        if (part != 0) continue;
        shared.term[i] = kNone;
        if (slot < 0) continue;
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
            if (!(f.flags & LSW_B_ALIGNED) || f.rank % 4 != 0) atomicOr(&shared.ragged, 1u);
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

// One warp: some steps of its 16 outputs of B. A lane has four ranks of two outputs. Where all are whole aligned fours, terms are
// looked up before the first load and nothing is decided between loads.
template <class T>
__device__ __forceinline__ void load_b(uint32_t step0, uint32_t steps, uint32_t step_bits, uint32_t first, uint32_t out,
                                       const ExpandShared<T>& shared, Four<T> (&b)[kSteps][2]) {
    const uint32_t lane = threadIdx.x % 32, o = first + lane / 8 * 4 + lane / 4 % 2;
    const auto rank_at = [&](uint32_t s) { return 16 * ((step0 + s) & ((1u << step_bits) - 1)) + 4 * (lane % 4); };
    const auto load = [&](uint32_t s, const Term& term, bool is_whole, Four<T> (&two)[2]) {
        const uint32_t left = s < steps && rank_at(s) < term.rank ? term.rank - rank_at(s) : 0;
        const T* p = reinterpret_cast<const T*>(term.b) + o * static_cast<uint64_t>(term.b_stride) + rank_at(s);
        two[0] = load_four(p, o < out ? left : 0, is_whole);
        two[1] = load_four(p + 2 * static_cast<uint64_t>(term.b_stride), o + 2 < out ? left : 0, is_whole);
    };
    const auto term_at = [&](uint32_t s) -> const Term& { return shared.terms[min(step0 + s, step0 + steps - 1) >> step_bits]; };
    if (shared.ragged == 0) {
        Term terms[kSteps];
#pragma unroll
        for (uint32_t s = 0; s < kSteps; ++s) terms[s] = term_at(s);
#pragma unroll
        for (uint32_t s = 0; s < kSteps; ++s) load(s, terms[s], true, b[s]);
    } else {
        // Turned through the registers: once in the code.
#pragma unroll 1
        for (uint32_t s = 0; s < kSteps; ++s) {
#pragma unroll
            for (uint32_t i = 0; i < kSteps - 1; ++i) b[i][0] = b[i + 1][0], b[i][1] = b[i + 1][1];
            load(s, term_at(s), false, b[kSteps - 1]);
        }
    }
}

// Four ranks of the products of an entry.
struct Item {
    uint64_t from;       // its place in the first slice
    uint32_t left;       // ranks from there on
    uint32_t row, step;  // of the group; kSteps: there is no such item
};

// The products of some steps, a four at a time.
template <class T>
__device__ __forceinline__ Item find_item(const LswApplyArgs& args, const LswApplyTarget& target, uint32_t row0, uint32_t i, uint32_t count,
                                          uint32_t step0, uint32_t step_bits, uint32_t each_bits, ExpandShared<T>& shared) {
    const uint32_t bits = entry_bits(args.k), step_mask = (1u << step_bits) - 1, entry = i >> (each_bits + 2);
    Item item = {0, 0, 0, kSteps};
    if (i >= count) return item;
    const uint32_t term = shared.term[entry];
    const uint32_t step = (term << step_bits) + (step0 & step_mask) + (i >> 2 & ((1u << each_bits) - 1));
    if (term == kNone || step - step0 >= kSteps) return item;
    item.row = entry >> bits, item.step = step - step0;
    const uint32_t rank = 16 * (step & step_mask) + 4 * (i % 4), max_rank = shared.terms[term].rank;
    item.left = rank < max_rank ? max_rank - rank : 0;
    item.from = (static_cast<uint64_t>(row0 + item.row) * args.k + (entry & ((1u << bits) - 1))) * args.width + target.column + rank;
    if (i % 4 == 0) shared.step_c[item.step][item.row] = shared.c[entry];
    return item;
}

// Brings a four of the products to shared memory, its slices added up, zeros behind the rank.
template <class T>
__device__ __forceinline__ void load_products(const LswApplyArgs& args, const Item& item, uint32_t four, ExpandShared<T>& shared) {
    constexpr uint32_t kAhead = 12;
    const uint64_t slice = static_cast<uint64_t>(args.rows) * args.k * args.width;
    const float* from = reinterpret_cast<const float*>(args.products) + item.from;
    float sum[4] = {};
    if (item.left > 0) {
        // The workspace goes on to the next multiple of eight ranks, with anything.
        for (uint32_t n0 = 0; n0 < args.splits; n0 += kAhead) {
            float4 part[kAhead];
#pragma unroll
            for (uint32_t n = 0; n < kAhead; ++n) {
                part[n] = {0.0f, 0.0f, 0.0f, 0.0f};
                if (n0 + n < args.splits) part[n] = *reinterpret_cast<const float4*>(from);
                from += slice;
            }
#pragma unroll
            for (uint32_t n = 0; n < kAhead; ++n) sum[0] += part[n].x, sum[1] += part[n].y, sum[2] += part[n].z, sum[3] += part[n].w;
        }
#pragma unroll
        for (uint32_t i = 1; i < 4; ++i) {
            if (i >= item.left) sum[i] = 0.0f;
        }
    }
    if (item.step == kSteps) return;
    const Parts<T> parts(sum);
#pragma unroll
    for (int p = 0; p < Parts<T>::kCount; ++p) {
        uint32_t* const words = &shared.parts[p][item.step][item.row / 16 * 8 + item.row % 8][four][item.row / 8 % 2];
        words[0] = parts.part[p].x, words[2] = parts.part[p].y;
    }
}

// One warp: total += c B products, of the first two steps of b and 16 rows. A row that does not use a step takes nothing of it, NaN included.
template <class T>
__device__ __forceinline__ void multiply(const ExpandShared<T>& shared, uint32_t s, uint32_t row0, const Four<T> (&b)[kSteps][2],
                                         float (&low_total)[4], float (&high_total)[4]) {
    constexpr int kParts = Parts<T>::kCount;
    const uint32_t g = threadIdx.x % 32 / 4, q = threadIdx.x % 4, row = row0 + g;
    float d[2][2][4] = {};
    // Four sums take turns: an mma that needs the one before would wait for it. Small parts first.
#pragma unroll
    for (int p = kParts - 1; p >= 0; --p) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const uint4 a = *reinterpret_cast<const uint4*>(shared.parts[p][s + e][row0 / 2 + g][q]);
#pragma unroll
            for (int j = 0; j < 2; ++j) Parts<T>::multiply(d[e][j], p, {a.x, a.y, a.z, a.w}, b[e][j]);
        }
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const uint32_t users = shared.step_users[s + e] >> row;
        const float low_c = shared.step_c[s + e][row], high_c = shared.step_c[s + e][row + 8];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (users & 1) low_total[i] = fmaf(low_c, d[e][i / 2][i % 2], low_total[i]);
            if (users >> 8 & 1) high_total[i] = fmaf(high_c, d[e][i / 2][2 + i % 2], high_total[i]);
        }
    }
}

// In place of a sum, where nothing is added to a row of a target and y keeps its bits: a NaN that is no sum, since those of the
// arithmetic are 0x7fffffff.
constexpr uint32_t kUntouched = 0xffffffffu;

// A block: a group of rows and LSW_FEW_OUTPUTS outputs of one target. A warp does 16 outputs; a lane owns four of them in rows g,
// g + 8, g + 16 and g + 24. kAdds: y += sum. Otherwise y is where the sums wait for it.
template <class T, class Y, bool kAdds> __device__ __forceinline__ void expand(const LswApplyArgs& args, ExpandShared<T>& shared) {
    static_assert(LSW_FEW_OUTPUTS == kExpandThreads / 2, "16 outputs a warp");
    uint32_t unit = blockIdx.x;
    const uint32_t row0 = blockIdx.y * kGroup, lane = threadIdx.x % 32, g = lane / 4;
    const LswApplyTarget& target = target_of(args, unit);
    const uint32_t rows = min(kGroup, args.rows - row0), entries = rows << entry_bits(args.k);
    load_terms(args, target, row0, entries, unit == 0, shared);
    if (shared.rank == 0) {
        dependency_wait();
        if (kAdds) return;
    }

    // A term takes as many steps as the largest needs, to a power of two.
    const uint32_t step_bits = shared.rank <= 16 ? 0 : 32 - __clz((shared.rank - 1) / 16), step_mask = (1u << step_bits) - 1;
    const uint32_t steps = shared.rank == 0 ? 0 : shared.count << step_bits;
    const uint32_t each_bits = min(step_bits, 31 - __clz(kSteps));  // steps of an entry that may be among kSteps
    const uint32_t items = entries << (each_bits + 2);
    const uint32_t first = unit * LSW_FEW_OUTPUTS + threadIdx.x / 32 * 16;
    const uint32_t mine = first + 4 * (lane % 4), outs = mine < target.out ? target.out - mine : 0;
    Y* const to = reinterpret_cast<Y*>(target.y) + (row0 + g) * target.y_stride + mine;
    const uint32_t touched = shared.rows >> g;
    const bool is_whole = !kAdds || target.y_aligned && target.out % 4 == 0;
    float total[4][4] = {};
    Four<Y> y[4];
    for (uint32_t step0 = 0; step0 < steps; step0 += kSteps) {
        const uint32_t here = min(kSteps, steps - step0);
        if (step0 > 0) __syncthreads();
        Four<T> b[kSteps][2] = {};
        if (threadIdx.x < kSteps) {
            const uint32_t step = step0 + threadIdx.x, term = step >> step_bits;
            const bool exists = threadIdx.x < here && 16 * (step & step_mask) < shared.terms[term].rank;
            shared.step_users[threadIdx.x] = exists ? shared.users[term] : 0;
        }
        Item item = find_item(args, target, row0, threadIdx.x, items, step0, step_bits, each_bits, shared);
        load_b(step0, here, step_bits, first, target.out, shared, b);
        if (step0 == 0) {
            // Of what came before, nothing but the products and y is still being written.
            dependency_wait();
            const auto load = [&](bool is_whole) {
#pragma unroll
                for (uint32_t h = 0; h < 4; ++h) y[h] = load_four(to + 8 * h * target.y_stride, touched >> (8 * h) & 1 ? outs : 0, is_whole);
            };
            if constexpr (kAdds) {
                if (is_whole) load(true);
                else load(false);
            }
        }
        for (uint32_t i = threadIdx.x;;) {
            load_products(args, item, i % 4, shared);
            if ((i += kExpandThreads) >= items) break;
            item = find_item(args, target, row0, i, items, step0, step_bits, each_bits, shared);
        }
        __syncthreads();
        // B moves up, so that the code is there once: it has to be fetched.
#pragma unroll 1
        for (uint32_t s = 0; s < here; s += 2) {
            multiply<T>(shared, s, 0, b, total[0], total[1]);
            if (rows > 16) multiply<T>(shared, s, 16, b, total[2], total[3]);
#pragma unroll
            for (uint32_t i = 0; i < kSteps - 2; ++i) b[i][0] = b[i + 2][0], b[i][1] = b[i + 2][1];
        }
    }
#pragma unroll
    for (uint32_t h = 0; h < 4; ++h) {
        const bool is_touched = touched >> (8 * h) & 1;
        if constexpr (kAdds) {
            const float4 old = y[h].get();
            y[h].set({old.x + total[h][0], old.y + total[h][1], old.z + total[h][2], old.w + total[h][3]});
            store_four(to + 8 * h * target.y_stride, y[h], is_touched ? outs : 0, is_whole);
        } else if (g + 8 * h < rows && outs > 0) {
            uint4 words = {kUntouched, kUntouched, kUntouched, kUntouched};
            if (is_touched) memcpy(&words, total[h], sizeof(words));
            store16_whole(to + 8 * h * target.y_stride, words);
        }
    }
}

template <class T> __device__ __forceinline__ void expand(const LswApplyArgs& args) {
    extern __shared__ __align__(16) unsigned char memory[];
    ExpandShared<T>& shared = *reinterpret_cast<ExpandShared<T>*>(memory);
    if (args.y_type == 0) return expand<T, float, true>(args, shared);
    if (args.y_type == 1) return expand<T, __half, true>(args, shared);
    expand<T, __nv_bfloat16, true>(args, shared);
}
template <class T> __device__ __forceinline__ void sum(const LswApplyArgs& args) {
    extern __shared__ __align__(16) unsigned char memory[];
    expand<T, float, false>(args, *reinterpret_cast<ExpandShared<T>*>(memory));
}

// A thread: four outputs of a row. Both loads are on their way at once.
template <class Y> __device__ __forceinline__ void add(const LswAddTarget& target) {
    const uint32_t col = 4 * (blockIdx.x * LSW_ADD_THREADS + threadIdx.x), left = col < target.out ? target.out - col : 0;
    Y* const y = reinterpret_cast<Y*>(target.y) + blockIdx.y * target.y_stride + col;
    const float* const sums = reinterpret_cast<const float*>(target.sums) + blockIdx.y * target.sums_stride + col;
    const auto add_four = [&](bool is_whole) {
        Four<Y> four = load_four(y, left, is_whole);
        const Four<float> sum = load_four(sums, left, true);
        const float4 old = four.get(), more = sum.get();
        four.set({old.x + more.x, old.y + more.y, old.z + more.z, old.w + more.w});
        store_four(y, four, sum.words[0] == kUntouched ? 0 : left, is_whole);
    };
    if (target.y_aligned && target.out % 4 == 0) add_four(true);
    else add_four(false);
}

}  // namespace

// Without rows there may be no units to divide by.
#define LSW_APPLY(suffix, T)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(LSW_FEW_THREADS, 1)                                                          \
        lsw_apply_shrink_##suffix(const __grid_constant__ LswApplyArgs args) {                                               \
        if (args.rows > 0) shrink<T>(args);                                                                                  \
    }                                                                                                                        \
    extern "C" __global__ void __launch_bounds__(LSW_FEW_EXPAND_THREADS, 2)                                                      \
        lsw_apply_expand_##suffix(const __grid_constant__ LswApplyArgs args) {                                               \
        if (args.rows > 0) expand<T>(args);                                                                                  \
    }                                                                                                                        \
    extern "C" __global__ void __launch_bounds__(LSW_FEW_EXPAND_THREADS, 2)                                                      \
        lsw_apply_sum_##suffix(const __grid_constant__ LswApplyArgs args) {                                               \
        if (args.rows > 0) sum<T>(args);                                                                                  \
    }
LSW_APPLY(f16, __half)
LSW_APPLY(bf16, __nv_bfloat16)

#define LSW_ADD(suffix, Y)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(LSW_ADD_THREADS) lsw_apply_add_##suffix(const __grid_constant__ LswAddArgs args) { \
        add<Y>(args.targets[blockIdx.z]);                                                                                    \
    }
LSW_ADD(f32, float)
LSW_ADD(f16, __half)
LSW_ADD(bf16, __nv_bfloat16)
