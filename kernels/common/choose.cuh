// One token's choice of experts, by one warp: its logits -> ids and gates.
//
//   choice = x; score(x) + bias where there is a bias or groups go by sums; of the best groups only, where experts are grouped
//   ids    = the k largest choices, descending, ties to the lower id
//   gates  = scale * score(x), over their sum if renormalised
//
// The lanes hold the experts in registers: a group of experts belongs to the same `group_lanes` lanes, each of which has a run of
// neighbours (one group: lane l of 256 experts has 8 l to 8 l + 7), so that loads are wide. What lanes compare with each other is an
// unsigned key in the order of floats. Then:
//
//   bound    the k-th largest of the 32 lanes' largest keys: k experts at least reach it, so that nothing below it is chosen. With few
//            tokens, where a chain of instructions is what counts, each lane compares its own with all others; else k warp-wide
//            maxima (redux.sync) find it.
//   collect  what reaches the bound moves to one candidate a lane, its place by ballots: about k + 1 of 256 random logits. Where ties or
//            a large k leave more than 32, a bisection of the keys raises the bound first.
//   rank     each lane counts the candidates before its own; the count is the place in the result. No chain of k dependent steps.
//
// Up to 32 experts each lane ranks its own among all, by shuffles. Ranks are unique, since a candidate's key has the complement of its id
// below it. NaN logits count as -inf and +inf as the largest float, which keeps every score finite: no branch below speaks of either.
// What is no expert is -inf too; only a bound as low as that has to tell them apart.
//
// A launch finds the instruction cache cold: a case costs what is fetched, not what is executed. So each kind and size is a kernel of its
// own (in the gate, plain or not), selects take the place of short branches, and what is rare is a loop.
#pragma once

#include "../args.h"
#include "num.cuh"
#include "ptx.cuh"

static_assert(LSW_MAX_K == 32 && LSW_MAX_GROUPS == 32, "one lane a chosen expert, and one lane a group at least");
static_assert(LSW_MAX_EXPERTS == 1024, "ten bits of a key hold an id");

constexpr float kInfinity = __builtin_inff(), kNaN = __builtin_nanf(""), kLargest = 0x1.fffffep127f;

// Through a shuffle, which tells the compiler that it is the same for all lanes: shuffles under branches on it need no repair code.
__device__ __forceinline__ uint32_t warp_index() { return __shfl_sync(kFullWarp, threadIdx.x / 32, 0); }

// What one warp shares among its lanes: keys of candidates and, below them, the complements of their ids; in no order.
struct ChoiceScratch {
    alignas(16) uint64_t candidates[32];  // read two at a time
    float2 scores[32];                    // in x, as far apart as the candidates that they are of; in the end expert and gate by place
};

// Unsigned order of keys = order of floats, and none is 0; -0 becomes +0, so that the two tie.
__device__ __forceinline__ uint32_t order_key(float x) {
    const uint32_t bits = __float_as_uint(x + 0.0f);
    return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}
constexpr uint32_t kNothing = 0x007fffff;  // the key of -inf: those of numbers are larger
__device__ __forceinline__ float key_value(uint32_t key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, step));
    return x;
}

// Which code serves a route: the scores; before them the softmax over the chosen without any option, and behind them the sigmoids of
// DeepSeek-V3: with a bias, in groups that go by their two best, renormalised; four lanes a group, each with 8 experts by wide loads.
enum class Kind { kPlain, kSoftmax, kSigmoid, kSqrtSoftplus, kGrouped };

// Below 2^-126 it is 0. The power's argument is rounded, which errs by |x| 2^-24 of the result where x < 0.
__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.0f + power_of_two(-1.44269504f * x)); }

// The score of a logit; of a softmax, the numerator, where no logit exceeds `top`. If nothing is above -inf, all are 0.
template <Kind kKind> __device__ __forceinline__ float score(float x, float top) {
    if constexpr (kKind == Kind::kSigmoid || kKind == Kind::kGrouped) return sigmoid(x);
    if constexpr (kKind == Kind::kSqrtSoftplus) return sqrtf(fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))));
    return expf(x - fmaxf(top, -kLargest));
}

// softcap tanh(x / softcap). Keeps -inf, which says that an expert is not to be had.
__device__ __forceinline__ float capped(float softcap, float x) { return x == -kInfinity ? x : softcap * tanhf(x / softcap); }

// A logit as the rest knows it.
template <Kind kKind> __device__ __forceinline__ float usable_logit(const LswRouteArgs& args, float x) {
    x = fminf(fmaxf(x, -kInfinity), kLargest);
    return kKind != Kind::kPlain && args.softcap != 0.0f ? capped(args.softcap, x) : x;
}

// The experts of a lane: from `first` on, below `end`. A group's lanes take runs of `lane_experts` neighbours.
struct LaneExperts {
    uint32_t group, first, end;
    __device__ __forceinline__ LaneExperts(const LswRouteArgs& args, Kind kind) {
        const uint32_t lane = threadIdx.x % 32;
        if (kind == Kind::kPlain) {
            group = 0, first = lane * args.lane_experts, end = min(first + args.lane_experts, args.group_experts);
        } else if (kind == Kind::kGrouped) {
            group = lane / 4, first = lane * 8, end = first < args.experts ? first + 8 : 0;
        } else {
            group = lane >> args.group_lanes_log2;
            first = group * args.group_experts + (lane - (group << args.group_lanes_log2)) * args.lane_experts;
            end = group < args.groups ? min(first + args.lane_experts, (group + 1) * args.group_experts) : 0;
        }
    }
    __device__ __forceinline__ uint32_t at(int i) const { return first + i; }
    __device__ __forceinline__ bool has(int i) const { return at(i) < end; }
};

// A lane's row of `values`, by the widest loads where it is whole and aligned; `none` where the lane has no expert.
template <int kItems, class T>
__device__ __forceinline__ void load_run(const LaneExperts& own, bool is_packed, const T* values, T none, float (&x)[kItems]) {
    constexpr int kRun = kItems * sizeof(T) < 16 ? kItems : 16 / sizeof(T);
    struct alignas(kRun * sizeof(T)) Run {
        T lane[kRun];
    };
    if (kItems > 1 && is_packed) {
        Run runs[kItems / kRun];
#pragma unroll
        for (int i = 0; i < kItems; ++i) runs[i / kRun].lane[i % kRun] = none;
#pragma unroll
        for (int r = 0; r < kItems / kRun; ++r) {
            if (own.has(0)) runs[r] = reinterpret_cast<const Run*>(values + own.first)[r];
        }
#pragma unroll
        for (int i = 0; i < kItems; ++i) x[i] = to_float(runs[i / kRun].lane[i % kRun]);
    } else {
#pragma unroll
        for (int i = 0; i < kItems; ++i) x[i] = to_float(own.has(i) ? values[own.at(i)] : none);
    }
}

// n += a >= b and n += a > b, in assembly since C++ becomes an addition and a move that takes it back.
__device__ __forceinline__ void count_if_reaching(uint32_t& n, uint32_t a, uint32_t b) {
    asm("{\n.reg .pred p;\nsetp.ge.u32 p, %1, %2;\n@p add.u32 %0, %0, 1;\n}" : "+r"(n) : "r"(a), "r"(b));
}
__device__ __forceinline__ void count_if_reaching(uint32_t& n, float a, float b) {
    asm("{\n.reg .pred p;\nsetp.ge.f32 p, %1, %2;\n@p add.u32 %0, %0, 1;\n}" : "+r"(n) : "f"(a), "f"(b));
}
__device__ __forceinline__ void count_if_above(uint32_t& n, uint64_t a, uint64_t b) {
    asm("{\n.reg .pred p;\nsetp.gt.u64 p, %1, %2;\n@p add.u32 %0, %0, 1;\n}" : "+r"(n) : "l"(a), "l"(b));
}

// The largest of a lane; NaN if there is one.
template <int kItems> __device__ __forceinline__ float largest(const float (&x)[kItems]) {
    float most = x[0];
#pragma unroll
    for (int i = 1; i < kItems; ++i) asm("max.NaN.f32 %0, %0, %1;" : "+f"(most) : "f"(x[i]));
    return most;
}

// Whether this lane's group is one of the best. `choice` is -inf where the lane has no expert; `most`, its largest.
template <Kind kKind, int kItems>
__device__ __forceinline__ bool is_best_group(const LswRouteArgs& args, const LaneExperts& own, const float (&choice)[kItems], float& most) {
    constexpr bool kIsGrouped = kKind == Kind::kGrouped;
    float best[kItems], second[kItems];
#pragma unroll
    for (int i = 0; i < kItems; i += 2) {
        const float other = kItems > 1 ? choice[(i + 1) % kItems] : -kInfinity;
        best[i] = fmaxf(choice[i], other), second[i] = fminf(choice[i], other);
    }
    const auto merge = [](float& best, float& second, float other, float other_second) {
        second = fmaxf(fmaxf(second, other_second), fminf(best, other));
        best = fmaxf(best, other);
    };
#pragma unroll
    for (int step = 2; step < kItems; step *= 2) {
#pragma unroll
        for (int i = 0; i < kItems; i += 2 * step) merge(best[i], second[i], best[i + step], second[i + step]);
    }
    most = best[0];
    const uint32_t lanes_log2 = kIsGrouped ? 2 : args.group_lanes_log2;
    for (uint32_t step = 1; step >> lanes_log2 == 0; step *= 2) {
        const float other = __shfl_xor_sync(kFullWarp, best[0], step), other_second = __shfl_xor_sync(kFullWarp, second[0], step);
        merge(best[0], second[0], other, other_second);
    }
    const float score = kIsGrouped || args.flags & LSW_ROUTE_SUM_TWO ? fmaxf(best[0] + second[0], -kInfinity) : best[0];
    const uint32_t key = own.group < args.groups ? order_key(score) : 0;
    uint32_t left = key, bound = __reduce_max_sync(kFullWarp, left);
#pragma unroll 1
    for (uint32_t g = 1; g < args.top_groups; ++g) {
        if (left == bound) left = 0;
        bound = __reduce_max_sync(kFullWarp, left);
    }
    bool is_best = key >= bound;
    if (__popc(__ballot_sync(kFullWarp, is_best)) > args.top_groups << lanes_log2) [[unlikely]] {
        // Equal ones left together: those of lower numbers are better.
        uint32_t rank = 0;
#pragma unroll 1
        for (uint32_t g = 0; g < args.groups; ++g) {
            const uint32_t other = __shfl_sync(kFullWarp, key, g << lanes_log2);
            rank += other > key || (other == key && g < own.group);
        }
        is_best = rank < args.top_groups;
    }
    return is_best;
}

// How many of a lane's experts reach `bound`.
template <int kItems, class T> __device__ __forceinline__ uint32_t count_reaching(const T (&keys)[kItems], T bound) {
    uint32_t count = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) count_if_reaching(count, keys[i], bound);
    return count;
}

// Where more than 32 experts reach `bound`: raises it, and drops of those that then tie for the last places the higher ids, until at
// most 32 are left, among them the k best. `highest` is the largest key.
template <int kItems>
__device__ __forceinline__ void raise_bound(const LaneExperts& own, uint32_t k, uint32_t highest, uint32_t& bound, uint32_t (&keys)[kItems]) {
    uint32_t low = bound, high = highest + 1, count = 33;  // at least k reach `low`, fewer reach `high`
    while (count > 32 && high - low > 1) {
        const uint32_t middle = low + (high - low) / 2;
        const uint32_t reach = __reduce_add_sync(kFullWarp, count_reaching(keys, middle));
        if (reach >= k) {
            low = middle, count = reach;
        } else {
            high = middle;
        }
    }
    bound = low;
    if (count <= 32) return;
    uint32_t few = 0, enough = LSW_MAX_EXPERTS;  // fewer than k are left with ties below id `few` alone, at least k below `enough`
    while (count > 32) {
        const uint32_t middle = few + (enough - few) / 2;
        uint32_t left = 0;
#pragma unroll
        for (int i = 0; i < kItems; ++i) left += keys[i] > bound || (keys[i] == bound && own.at(i) < middle);
        left = __reduce_add_sync(kFullWarp, left);
        if (left >= k) {
            enough = middle, count = left;
        } else {
            few = middle;
        }
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        if (keys[i] == bound && own.at(i) >= enough) keys[i] = 0;
    }
}

// What a lane contends with: a key, 0 for none, its expert, how many are before it, and its score where the kind keeps scores.
struct Candidate {
    uint32_t key, expert, place;
    float score;
};

// Where each lane has one expert at most, in the order of lanes.
__device__ __forceinline__ Candidate rank_lanes(const LswRouteArgs& args, const LaneExperts& own, uint32_t key, float score) {
    const uint32_t lane = threadIdx.x % 32, lanes = args.groups > 1 ? 32 : args.experts;
    uint32_t place = 0;
#pragma unroll 1
    for (uint32_t first = 0; first < lanes; first += 8) {
#pragma unroll
        for (uint32_t c = first; c < first + 8; ++c) {
            const uint32_t other = __shfl_sync(kFullWarp, key, c);
            place += (other > key) | ((other == key) & (c < lane));
        }
    }
    return {key, own.first, place, score};
}

// Leaves one candidate a lane, among them the k best, and ranks them. `most`: the largest key of the lane, `highest`: of all.
template <bool kKeepsScores, int kItems>
__device__ __forceinline__ Candidate rank_runs(const LswRouteArgs& args, const LaneExperts& own, bool is_few, bool is_best, uint32_t most,
                                               uint32_t highest, float (&choice)[kItems], const float (&scores)[kItems], ChoiceScratch& scratch) {
    const uint32_t lane = threadIdx.x % 32;
    uint32_t bound;
    if (is_few) {
        // Of the lanes' largest that fewer than k exceed, the smallest: more instructions, but no chain of them.
        uint32_t* all = reinterpret_cast<uint32_t*>(scratch.candidates);
        all[lane] = most;
        __syncwarp();
        uint32_t larger = 0;
#pragma unroll
        for (int c = 0; c < 32; c += 4) {
            const uint4 next = *reinterpret_cast<const uint4*>(&all[c]);
            count_if_reaching(larger, next.x, most + 1), count_if_reaching(larger, next.y, most + 1);
            count_if_reaching(larger, next.z, most + 1), count_if_reaching(larger, next.w, most + 1);
        }
        bound = __reduce_min_sync(kFullWarp, larger < args.k ? most : ~0u);
        __syncwarp();  // candidates come where the largest were
    } else {
        // Equal ones leave together, and two rounds go at a time: the bound may lie below the k-th, never above it.
        bound = highest;
#pragma unroll 1
        for (uint32_t j = 1; j < args.k; j += 2) {
#pragma unroll
            for (int round = 0; round < 2; ++round) {
                if (most == bound) most = 0;
                bound = __reduce_max_sync(kFullWarp, most);
            }
        }
    }
    float own_bound = is_best ? key_value(bound) : kNaN;  // which nothing reaches
    uint32_t own_count = count_reaching(choice, own_bound), count = __reduce_add_sync(kFullWarp, own_count);
    if (bound <= kNothing || count > 32) [[unlikely]] {
        // What is no expert, or of another group, must not be taken for an expert at -inf.
        bound = max(bound, 1u);
        uint32_t keys[kItems];
#pragma unroll
        for (int i = 0; i < kItems; ++i) keys[i] = own.has(i) && is_best ? order_key(choice[i]) : 0;
        if (__reduce_add_sync(kFullWarp, count_reaching(keys, bound)) > 32) raise_bound(own, args.k, highest, bound, keys);
#pragma unroll
        for (int i = 0; i < kItems; ++i) choice[i] = keys[i] >= bound ? choice[i] : kNaN;
        own_bound = -kInfinity, own_count = count_reaching(choice, own_bound), count = __reduce_add_sync(kFullWarp, own_count);
    }
    uint32_t before = 0;  // of the lanes below, a ballot for each bit of their counts
#pragma unroll
    for (int bit = 0; 1 << bit <= kItems; ++bit) {
        before += __popc(__ballot_sync(kFullWarp, own_count >> bit & 1) & ((1u << lane) - 1)) << bit;
    }
    uint32_t slot = shared_address(&scratch.candidates[before]);
    static_assert(offsetof(ChoiceScratch, scores) == 256);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        const uint32_t complement = LSW_MAX_EXPERTS - 1 - own.at(i);
        if constexpr (kKeepsScores) {
            asm volatile(
                "{\n.reg .pred p;\nsetp.ge.f32 p, %1, %2;\n@p st.shared.v2.b32 [%0], {%3, %1};\n@p st.shared.f32 [%0 + 256], %4;\n"
                "@p add.u32 %0, %0, 8;\n}"
                : "+r"(slot)
                : "f"(choice[i]), "f"(own_bound), "r"(complement), "f"(scores[i])
                : "memory");
        } else {
            asm volatile("{\n.reg .pred p;\nsetp.ge.f32 p, %1, %2;\n@p st.shared.v2.b32 [%0], {%3, %1};\n@p add.u32 %0, %0, 8;\n}"
                         : "+r"(slot)
                         : "f"(choice[i]), "f"(own_bound), "r"(complement)
                         : "memory");
        }
    }
    __syncwarp();
    uint64_t mine = scratch.candidates[lane];  // a choice, still, and no candidate behind the last
    mine = lane < count ? static_cast<uint64_t>(order_key(__uint_as_float(mine >> 32))) << 32 | static_cast<uint32_t>(mine) : 0;
    scratch.candidates[lane] = mine;
    __syncwarp();
    uint32_t place = 0;
#pragma unroll 1
    for (uint32_t c = 0; c < count; c += 4) {  // four at a time: the places behind the last candidate hold 0
        const ulonglong2* next = reinterpret_cast<const ulonglong2*>(&scratch.candidates[c]);
        const ulonglong2 a = next[0], b = next[1];
        count_if_above(place, a.x, mine), count_if_above(place, a.y, mine);
        count_if_above(place, b.x, mine), count_if_above(place, b.y, mine);
    }
    const float score = kKeepsScores ? scratch.scores[lane].x : 0.0f;
    return {static_cast<uint32_t>(mine >> 32), LSW_MAX_EXPERTS - 1 - static_cast<uint32_t>(mine), place, score};
}

// Routes one token; at most 32 * kItems experts. `is_few`: fast for few tokens rather than for many, with the same bits.
// `counts`, if the route is counted, gain the chosen ones.
template <Kind kKind, int kItems, class T>
__device__ __forceinline__ void choose(const LswRouteArgs& args, bool is_few, uint32_t token, const T* logits, ChoiceScratch& scratch,
                                       uint32_t* counts) {
    constexpr bool kIsPlain = kKind == Kind::kPlain, kIsGrouped = kKind == Kind::kGrouped;
    constexpr bool kIsSoftmax = kIsPlain || kKind == Kind::kSoftmax, kKeepsScores = !kIsSoftmax;
    const uint32_t lane = threadIdx.x % 32;
    const LaneExperts own(args, kKind);
    const bool renormalize = kIsPlain || kIsGrouped || args.flags & LSW_ROUTE_RENORMALIZE;
    const bool by_score = kIsGrouped || (!kIsPlain && args.flags & LSW_ROUTE_BY_SCORE);
    const bool is_packed = kIsGrouped || (args.flags & LSW_ROUTE_PACKED && args.lane_experts == kItems);
    const bool is_biased = kIsGrouped || (!kIsPlain && args.bias != 0), is_capped = !kIsPlain && !kIsGrouped && args.softcap != 0.0f;
    float choice[kItems], bias[kItems], scores[kItems] = {};
    load_run(own, is_packed, logits, from_float<T>(-kInfinity), choice);
    // Loaded beside the logits, so that their latencies are one.
    if (is_biased) load_run(own, is_packed, reinterpret_cast<const float*>(args.bias), -kInfinity, bias);
    float most = largest(choice);
    const bool is_odd = __any_sync(kFullWarp, !(most <= kLargest));
    if (is_odd || is_capped) [[unlikely]] {
        // One after the other, by turning the row: what is rare must not stand in the way of what is not, and code does.
        most = -kInfinity;
#pragma unroll 1
        for (int turn = 0; turn < kItems; ++turn) {
            const float x = usable_logit<kKind>(args, choice[0]);
            most = fmaxf(most, x);
#pragma unroll
            for (int i = 0; i + 1 < kItems; ++i) choice[i] = choice[i + 1];
            choice[kItems - 1] = x;
        }
    }

    // Before anything is left out: a softmax over all N, and the scores where they decide.
    float top = 0.0f, sum = 0.0f;
    if constexpr (kKind == Kind::kSoftmax) {
        if (by_score || !renormalize) {
            top = warp_max(most);
#pragma unroll
            for (int i = 0; i < kItems; ++i) sum += score<kKind>(choice[i], top);
            sum = warp_sum(sum);
        }
    }
    if (by_score) {
        const float share = !kIsSoftmax ? 1.0f : sum > 0.0f ? 1.0f / sum : 0.0f;
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            scores[i] = score<kKind>(choice[i], top);
            choice[i] = scores[i] * share;
        }
        // What is no expert goes back to -inf.
        if (is_biased) {
#pragma unroll
            for (int i = 0; i < kItems; ++i) choice[i] = fmaxf(choice[i] + bias[i], -kInfinity);
        } else {
#pragma unroll
            for (int i = 0; i < kItems; ++i) choice[i] = own.has(i) ? choice[i] : -kInfinity;
        }
    }
    bool is_best = true;
    if (kIsGrouped || (!kIsPlain && args.groups > 1)) {
        is_best = is_best_group<kKind>(args, own, choice, most);
    } else if (by_score) {
        most = largest(choice);
    }
    const uint32_t key = is_best && (kItems > 1 || own.has(0)) ? order_key(most) : 0;
    const uint32_t highest = __reduce_max_sync(kFullWarp, key);

    const Candidate candidate = kItems == 1 ? rank_lanes(args, own, key, scores[0])
                                            : rank_runs<kKeepsScores>(args, own, is_few, is_best, key, highest, choice, scores, scratch);
    const bool is_chosen = candidate.key != 0 && candidate.place < args.k;
    float x = -kInfinity, gate = 0.0f;
    if (is_chosen && args.flags & LSW_ROUTE_COUNTED) [[unlikely]] atomicAdd(&counts[candidate.expert], 1u);
    bool is_nothing;  // all chosen logits are -inf
    if (kKeepsScores && by_score) {
        if (is_chosen) gate = candidate.score;
        is_nothing = __all_sync(kFullWarp, gate == 0.0f);
        if (is_nothing) [[unlikely]] {  // or far below 0
            if (is_chosen) x = to_float(logits[candidate.expert]);
            is_nothing = __all_sync(kFullWarp, !(x > -kInfinity));
        }
    } else {
        if (is_chosen) x = by_score ? usable_logit<kKind>(args, to_float(logits[candidate.expert])) : key_value(candidate.key);
        if (kIsSoftmax && renormalize) top = by_score ? warp_max(x) : key_value(highest);
        if (is_chosen) gate = score<kKind>(x, top);
        is_nothing = __all_sync(kFullWarp, x == -kInfinity);
    }
    uint32_t expert = candidate.expert, place = candidate.place;
    bool has_place = is_chosen;
    if constexpr (kItems > 1) {
        // From here on lane j has the j-th: where a candidate was, which the bound decides, must not decide the order of a sum.
        __syncwarp();
        if (is_chosen) scratch.scores[place] = {__uint_as_float(expert), gate};
        __syncwarp();
        const float2 chosen = scratch.scores[lane];
        expert = __float_as_uint(chosen.x), place = lane, has_place = lane < args.k;
        gate = has_place ? chosen.y : 0.0f;
    }
    if (renormalize) sum = warp_sum(gate);
    if (kIsSoftmax || renormalize) gate = sum > 0.0f ? __fdividef(gate, sum) : 0.0f;
    if (!kIsPlain) gate *= args.scale;
    if (has_place) {
        reinterpret_cast<int32_t*>(args.ids)[token * args.ids_stride + place] = static_cast<int32_t>(expert);
        reinterpret_cast<float*>(args.gates)[token * args.gates_stride + place] = gate;
    }
    if ((is_odd || is_nothing) && lane == 0) [[unlikely]] atomicOr(reinterpret_cast<uint32_t*>(args.status), LSW_ODD_LOGITS);
    __syncwarp();  // the scratch is free again
}

// Whether a token is none, behind the valid ones or masked out. Then its outputs say so.
__device__ __forceinline__ bool is_padding(const LswRouteArgs& args, uint32_t token) {
    if (!(args.flags & LSW_ROUTE_PADDED)) [[likely]] return false;
    const bool is_behind = args.valid && static_cast<int64_t>(token) >= *reinterpret_cast<const int32_t*>(args.valid);
    if (!__any_sync(kFullWarp, is_behind || (args.mask && reinterpret_cast<const uint8_t*>(args.mask)[token] == 0))) return false;
    const uint32_t lane = threadIdx.x % 32;
    if (lane < args.k) {
        reinterpret_cast<int32_t*>(args.ids)[token * args.ids_stride + lane] = -1;
        reinterpret_cast<float*>(args.gates)[token * args.gates_stride + lane] = 0.0f;
    }
    return true;
}

// The last of `blocks` blocks to come here sees all that the others wrote before; the counter is then back at zero. All threads call.
__device__ __forceinline__ bool is_last_block(uint32_t* arrived, uint32_t blocks) {
    __shared__ bool is_last;
    __syncthreads();
    if (threadIdx.x == 0) is_last = count_acq_rel(arrived, blocks - 1) == blocks - 1;
    __syncthreads();
    return is_last;
}

// Adds the counts of a block to those of the others; the last of `blocks` blocks writes the sums and leaves zeros behind. Integer sums
// do not depend on their order.
__device__ inline void publish_counts(const LswRouteArgs& args, const uint32_t* own, uint32_t blocks) {
    LswRouteWorkspace& workspace = *reinterpret_cast<LswRouteWorkspace*>(args.workspace);
    int32_t* counts = reinterpret_cast<int32_t*>(args.counts);
    __syncthreads();
    if (blocks == 1) {
        for (uint32_t e = threadIdx.x; e < args.experts; e += blockDim.x) counts[e] = static_cast<int32_t>(own[e]);
        return;
    }
    for (uint32_t e = threadIdx.x; e < args.experts; e += blockDim.x) {
        if (own[e]) atomicAdd(&workspace.counts[e], own[e]);
    }
    if (!is_last_block(&workspace.counted, blocks)) return;
    for (uint32_t e = threadIdx.x; e < args.experts; e += blockDim.x) counts[e] = static_cast<int32_t>(atomicExch(&workspace.counts[e], 0u));
}
