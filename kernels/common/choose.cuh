// One token's choice of experts, by one warp: its logits -> ids and gates.
//
//   choice = x; score(x) + bias where there is a bias or groups go by sums; of the best groups only, where experts are grouped
//   ids    = the k largest choices, descending, ties to the lower id
//   gates  = scale * score(x), over their sum if renormalised
//
// The lanes hold the experts in registers: a group of experts belongs to the same `group_lanes` lanes, among which its experts take
// turns (one group: lane l holds l, l + 32, ...). Three steps choose:
//
//   bound    the k-th largest of the 32 lanes' maxima: k experts at least reach it, so that nothing below it is chosen. k warp-wide
//            maxima (redux.sync) find it.
//   collect  what reaches the bound moves to one candidate a lane: about k + 1 of 256 random logits. Where ties or a large k leave more
//            than 32, a bisection of the order raises the bound first.
//   rank     each lane counts the candidates before its own; the count is the place in the result. No chain of k dependent steps, and
//            the sums below run in the order of places, whatever the lanes' layout was.
//
// Ranks are unique, since a candidate's key holds its value and, below it, its id. As floats, candidates are never NaN: NaN in `choice`
// marks what is no expert, and every comparison drops it. NaN logits count as -inf and +inf as the largest float, which keeps every
// score finite: no branch below speaks of either.
#pragma once

#include "../args.h"
#include "num.cuh"
#include "ptx.cuh"

static_assert(LSW_MAX_K == 32 && LSW_MAX_GROUPS == 32, "one lane a chosen expert, and one lane a group at least");
static_assert(LSW_MAX_EXPERTS == 1024, "ten bits of a key hold an id");

constexpr float kInfinity = __builtin_inff(), kLargest = 0x1.fffffep127f, kNoExpert = __builtin_nanf("");

// Through a shuffle, which tells the compiler that it is the same for all lanes: shuffles under branches on it need no repair code.
__device__ __forceinline__ uint32_t warp_index() { return __shfl_sync(kFullWarp, threadIdx.x / 32, 0); }

// What one warp shares among its lanes.
struct ChoiceScratch {
    float candidates[2][32];  // choices, and the bits of their experts; in no order
    alignas(16) uint64_t keys[32];  // read two at a time
    uint64_t chosen[LSW_MAX_K];  // in order
};

// Unsigned order of keys = order of floats, and none is 0; -0 becomes +0, so that the two tie.
__device__ __forceinline__ uint32_t order_key(float x) {
    const uint32_t bits = __float_as_uint(x + 0.0f);
    return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}
__device__ __forceinline__ float key_value(uint32_t key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

// The total order of candidates: by value, then the lower id first.
__device__ __forceinline__ uint64_t rank_key(float x, uint32_t expert) {
    return static_cast<uint64_t>(order_key(x)) << 10 | (LSW_MAX_EXPERTS - 1 - expert);
}
__device__ __forceinline__ uint32_t key_expert(uint64_t key) { return LSW_MAX_EXPERTS - 1 - (static_cast<uint32_t>(key) & 1023); }

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

// Which code serves a route: the scores, and before them the softmax over the chosen without any option.
enum class Kind { kPlain, kSoftmax, kSigmoid, kSqrtSoftplus };

// Below 2^-126 it is 0.
__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.0f + expf(-x)); }

// The score of a logit; of a softmax, the numerator, where no logit exceeds `top`. If nothing is above -inf, all are 0.
template <Kind kKind> __device__ __forceinline__ float score(float x, float top) {
    if constexpr (kKind == Kind::kSigmoid) return sigmoid(x);
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

// The experts of a lane: `first`, first + step, ..., below `end`.
template <Kind kKind> struct LaneExperts {
    uint32_t group, first, end, step;
    __device__ __forceinline__ explicit LaneExperts(const LswRouteArgs& args) {
        const uint32_t lane = threadIdx.x % 32;
        if constexpr (kKind == Kind::kPlain) {
            group = 0, first = lane, end = args.experts, step = 32;
        } else {
            step = 1u << args.group_lanes_log2;
            group = lane >> args.group_lanes_log2;
            first = group * args.group_experts + (lane & (step - 1));
            end = group < args.groups ? (group + 1) * args.group_experts : 0;
        }
    }
    __device__ __forceinline__ uint32_t at(int i) const { return first + i * (kKind == Kind::kPlain ? 32 : step); }
    __device__ __forceinline__ bool has(int i) const { return at(i) < end; }
};

// Leaves the experts of the best groups: the others become no experts.
template <int kItems, class Own> __device__ __forceinline__ void keep_best_groups(const LswRouteArgs& args, const Own& own, float (&choice)[kItems]) {
    float best = -kInfinity, second = -kInfinity;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        const float x = fmaxf(choice[i], -kInfinity);
        second = fmaxf(second, fminf(best, x));
        best = fmaxf(best, x);
    }
    for (uint32_t step = 1; step < own.step; step *= 2) {
        const float other = __shfl_xor_sync(kFullWarp, best, step), other_second = __shfl_xor_sync(kFullWarp, second, step);
        second = fmaxf(fmaxf(second, other_second), fminf(best, other));
        best = fmaxf(best, other);
    }
    if (args.flags & LSW_ROUTE_SUM_TWO) best = fmaxf(best + second, -kInfinity);
    uint32_t rank = 0;
#pragma unroll 4
    for (uint32_t group = 0; group < args.groups; ++group) {
        const float other = __shfl_sync(kFullWarp, best, group << args.group_lanes_log2);
        rank += other > best || (other == best && group < own.group);
    }
    if (rank >= args.top_groups) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) choice[i] = kNoExpert;
    }
}

template <int kItems> __device__ __forceinline__ uint32_t count_reaching(const float (&choice)[kItems], float bound) {
    uint32_t count = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) count += choice[i] >= bound;
    return count;
}

// Where more than 32 experts reach `bound`: raises it, and drops of those that then tie for the last places the higher ids, until at
// most 32 are left, among them the k best. `highest` is the key of the largest choice.
template <int kItems, class Own>
__device__ __forceinline__ void raise_bound(const Own& own, uint32_t k, uint32_t highest, float& bound, float (&choice)[kItems]) {
    uint32_t low = order_key(bound), high = highest + 1, count = 33;  // at least k reach `low`, fewer reach `high`
    while (count > 32 && high - low > 1) {
        const uint32_t middle = low + (high - low) / 2;
        const uint32_t reach = __reduce_add_sync(kFullWarp, count_reaching(choice, key_value(middle)));
        if (reach >= k) {
            low = middle, count = reach;
        } else {
            high = middle;
        }
    }
    bound = key_value(low);
    if (count <= 32) return;
    uint32_t few = 0, enough = LSW_MAX_EXPERTS;  // fewer than k are left with ties below id `few` alone, at least k below `enough`
    while (count > 32) {
        const uint32_t middle = few + (enough - few) / 2;
        uint32_t left = 0;
#pragma unroll
        for (int i = 0; i < kItems; ++i) left += choice[i] > bound || (choice[i] == bound && own.at(i) < middle);
        left = __reduce_add_sync(kFullWarp, left);
        if (left >= k) {
            enough = middle, count = left;
        } else {
            few = middle;
        }
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        if (choice[i] == bound && own.at(i) >= enough) choice[i] = kNoExpert;
    }
}

// Where each lane has one expert at most: k rounds of the largest key, ties to the lower lane, which has the lower id. Lane j gets the
// key of the j-th.
template <class Own> __device__ __forceinline__ uint64_t choose_among(const Own& own, uint32_t k, float choice) {
    const uint32_t lane = threadIdx.x % 32;
    uint32_t remaining = choice == choice ? order_key(choice) : 0;
    uint64_t chosen = 0;
#pragma unroll 1
    for (uint32_t j = 0; j < k; ++j) {
        const uint32_t best = __reduce_max_sync(kFullWarp, remaining);
        const uint32_t winner = __ffs(__ballot_sync(kFullWarp, remaining == best)) - 1;
        if (lane == winner) remaining = 0;
        if (lane == j) chosen = static_cast<uint64_t>(best) << 10 | winner;
    }
    const uint32_t expert = __shfl_sync(kFullWarp, own.at(0), static_cast<uint32_t>(chosen) & 31);
    return chosen >> 10 << 10 | (LSW_MAX_EXPERTS - 1 - expert);
}

// Leaves the candidates' keys in the scratch, 0 in all other places; returns how many there are. Among them are the k best.
template <int kItems, class Own>
__device__ __forceinline__ uint32_t collect(const Own& own, uint32_t k, float (&choice)[kItems], ChoiceScratch& scratch) {
    const uint32_t lane = threadIdx.x % 32;
    float most = -kInfinity;
#pragma unroll
    for (int i = 0; i < kItems; ++i) most = fmaxf(most, choice[i]);
    // Equal maxima leave together, and two rounds go at a time: the bound may lie below the k-th, never above it.
    uint32_t remaining = order_key(most);
    const uint32_t highest = __reduce_max_sync(kFullWarp, remaining);
    uint32_t next = highest;
#pragma unroll 1
    for (uint32_t j = 1; j < k; j += 2) {
#pragma unroll
        for (int round = 0; round < 2; ++round) {
            if (remaining == next) remaining = 0;
            next = __reduce_max_sync(kFullWarp, remaining);
        }
    }
    float bound = next ? key_value(next) : -kInfinity;
    uint32_t mine = count_reaching(choice, bound), count = __reduce_add_sync(kFullWarp, mine);
    if (count > 32) {
        raise_bound(own, k, highest, bound, choice);
        mine = count_reaching(choice, bound), count = __reduce_add_sync(kFullWarp, mine);
    }
    uint32_t at = mine;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const uint32_t before = __shfl_up_sync(kFullWarp, at, step);
        if (lane >= step) at += before;
    }
    float* slot = &scratch.candidates[0][at - mine];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        if (choice[i] >= bound) slot[0] = choice[i], slot[32] = __uint_as_float(own.at(i)), ++slot;
    }
    __syncwarp();
    scratch.keys[lane] = lane < count ? rank_key(scratch.candidates[0][lane], __float_as_uint(scratch.candidates[1][lane])) : 0;
    __syncwarp();
    return count;
}

// Puts each candidate in its place; lane j gets the key of the j-th.
__device__ __forceinline__ uint64_t rank(uint32_t count, uint32_t k, ChoiceScratch& scratch) {
    const uint32_t lane = threadIdx.x % 32;
    const uint64_t key = scratch.keys[lane];
    uint32_t place = 0;
#pragma unroll 1
    for (uint32_t c = 0; c < count; c += 4) {  // four at a time: the places behind the last candidate hold 0
        const ulonglong2 a = *reinterpret_cast<const ulonglong2*>(&scratch.keys[c]), b = *reinterpret_cast<const ulonglong2*>(&scratch.keys[c + 2]);
        place += (a.x > key) + (a.y > key) + (b.x > key) + (b.y > key);
    }
    if (key != 0 && place < k) scratch.chosen[place] = key;
    __syncwarp();
    return scratch.chosen[lane];
}

// Routes one token; at most 32 * kItems experts. `counts`, if the route is counted, gain the chosen ones.
template <Kind kKind, int kItems, class T>
__device__ __forceinline__ void choose(const LswRouteArgs& args, uint32_t token, const T* logits, ChoiceScratch& scratch, uint32_t* counts) {
    constexpr bool kIsPlain = kKind == Kind::kPlain, kIsSoftmax = kIsPlain || kKind == Kind::kSoftmax;
    const uint32_t lane = threadIdx.x % 32;
    const LaneExperts<kKind> own(args);
    const bool renormalize = kIsPlain || args.flags & LSW_ROUTE_RENORMALIZE, by_score = !kIsPlain && args.flags & LSW_ROUTE_BY_SCORE;
    float choice[kItems];
    bool is_odd = false;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        choice[i] = own.has(i) ? to_float(logits[own.at(i)]) : 0.0f;
    }
    // Loaded beside the logits, so that their latencies are one.
    float bias[kItems] = {};
    if (!kIsPlain && args.bias) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) bias[i] = own.has(i) ? reinterpret_cast<const float*>(args.bias)[own.at(i)] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) is_odd |= !(choice[i] <= kLargest);
    is_odd = __any_sync(kFullWarp, is_odd);
    if (is_odd || (!kIsPlain && args.softcap != 0.0f)) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) choice[i] = usable_logit<kKind>(args, choice[i]);
    }
    if (args.experts < 32 * kItems) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            if (!own.has(i)) choice[i] = kNoExpert;
        }
    }

    // Before anything is left out: a softmax over all N, and the scores where they decide.
    float top = 0.0f, sum = 0.0f;
    if constexpr (kKind == Kind::kSoftmax) {
        if (by_score || !renormalize) {
            top = -kInfinity;
#pragma unroll
            for (int i = 0; i < kItems; ++i) top = fmaxf(top, choice[i]);
            top = warp_max(top);
#pragma unroll
            for (int i = 0; i < kItems; ++i) sum += choice[i] == choice[i] ? score<kKind>(choice[i], top) : 0.0f;
            sum = warp_sum(sum);
        }
    }
    if (by_score) {
        const float share = !kIsSoftmax ? 1.0f : sum > 0.0f ? 1.0f / sum : 0.0f;
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            const float by_score = fmaxf(score<kKind>(choice[i], top) * share + bias[i], -kInfinity);
            choice[i] = choice[i] == choice[i] ? by_score : kNoExpert;
        }
    }
    if (!kIsPlain && args.groups > 1) keep_best_groups(args, own, choice);

    const uint64_t chosen = kItems == 1 ? choose_among(own, args.k, choice[0]) : rank(collect(own, args.k, choice, scratch), args.k, scratch);
    int32_t id = 0;
    float x = -kInfinity;
    if (lane < args.k) {
        id = static_cast<int32_t>(key_expert(chosen));
        x = by_score ? usable_logit<kKind>(args, to_float(logits[id])) : key_value(static_cast<uint32_t>(chosen >> 10));
        if (args.flags & LSW_ROUTE_COUNTED) atomicAdd(&counts[id], 1u);
    }
    if (kIsSoftmax && renormalize) top = by_score ? warp_max(x) : __shfl_sync(kFullWarp, x, 0);
    float gate = lane < args.k ? score<kKind>(x, top) : 0.0f;
    if (renormalize) {
        sum = gate;
        for (uint32_t step = 1; step < args.k; step *= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
    }
    if (kIsSoftmax || renormalize) gate = sum > 0.0f ? __fdividef(gate, sum) : 0.0f;
    if (!kIsPlain) gate *= args.scale;
    if (lane < args.k) {
        reinterpret_cast<int32_t*>(args.ids)[token * args.ids_stride + lane] = id;
        reinterpret_cast<float*>(args.gates)[token * args.gates_stride + lane] = gate;
    }
    if ((is_odd || __all_sync(kFullWarp, x == -kInfinity)) && lane == 0) atomicOr(reinterpret_cast<uint32_t*>(args.status), LSW_ODD_LOGITS);
    __syncwarp();  // the scratch is free again
}

// Whether a token is none, behind the valid ones or masked out. Then its outputs say so.
__device__ __forceinline__ bool is_padding(const LswRouteArgs& args, uint32_t token) {
    if (!(args.flags & LSW_ROUTE_PADDED)) return false;
    const bool is_behind = args.valid && static_cast<int64_t>(token) >= *reinterpret_cast<const int32_t*>(args.valid);
    if (!__any_sync(kFullWarp, is_behind || (args.mask && reinterpret_cast<const uint8_t*>(args.mask)[token] == 0))) return false;
    const uint32_t lane = threadIdx.x % 32;
    if (lane < args.k) {
        reinterpret_cast<int32_t*>(args.ids)[token * args.ids_stride + lane] = -1;
        reinterpret_cast<float*>(args.gates)[token * args.gates_stride + lane] = 0.0f;
    }
    return true;
}

// The first of these sizes, in experts a lane, that serves.
template <Kind kKind, int kItems, int... kMore, class T>
__device__ __forceinline__ void choose_sized(const LswRouteArgs& args, uint32_t token, const T* logits, ChoiceScratch& scratch, uint32_t* counts) {
    if constexpr (sizeof...(kMore) > 0) {
        if (args.lane_experts > kItems) return choose_sized<kKind, kMore...>(args, token, logits, scratch, counts);
    }
    choose<kKind, kItems>(args, token, logits, scratch, counts);
}

// Each case is code of its own, without branches on what it does not need.
template <int... kItems, class T>
__device__ __forceinline__ void choose_plain(const LswRouteArgs& args, uint32_t token, const T* logits, ChoiceScratch& scratch, uint32_t* counts) {
    choose_sized<Kind::kPlain, kItems...>(args, token, logits, scratch, counts);
}
template <int... kItems, class T>
__device__ __forceinline__ void choose_scored(const LswRouteArgs& args, uint32_t token, const T* logits, ChoiceScratch& scratch, uint32_t* counts) {
    if (args.score == LSW_SCORE_SOFTMAX) return choose_sized<Kind::kSoftmax, kItems...>(args, token, logits, scratch, counts);
    if (args.score == LSW_SCORE_SIGMOID) return choose_sized<Kind::kSigmoid, kItems...>(args, token, logits, scratch, counts);
    choose_sized<Kind::kSqrtSoftplus, kItems...>(args, token, logits, scratch, counts);
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
