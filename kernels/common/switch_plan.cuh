// What both switch kernels decide before they touch a weight: the route in canonical form, which targets differ from what they hold,
// and what is written down in the end.
#pragma once

#include "../args.h"
#include "num.cuh"
#include "route.cuh"

struct Route {
    uint32_t count;
    int slot[LSW_MAX_K];
    float gate[LSW_MAX_K];
};

__device__ __forceinline__ LswSwitchState* state(const LswSwitchArgs& args) { return reinterpret_cast<LswSwitchState*>(args.state); }
__device__ __forceinline__ const LswFactor& factor(const LswSwitchArgs& args, uint64_t target, int slot) {
    return reinterpret_cast<const LswFactor*>(args.factors)[target * args.slots + slot];
}
__device__ __forceinline__ LswMerged* merged(const LswSwitchArgs& args, uint64_t target) {
    return reinterpret_cast<LswMerged*>(args.merged) + target * args.k_max;
}
__device__ __forceinline__ uint32_t& merged_count(const LswSwitchArgs& args, uint64_t target) {
    return reinterpret_cast<uint32_t*>(args.merged_count)[target];
}

__device__ __forceinline__ const LswTarget& target_of(const LswSwitchArgs& args, uint64_t target) {
    return reinterpret_cast<const LswTarget*>(args.targets)[target];
}

// Tensor maps of a factor's A and B, and of a target's W and W_base.
__device__ __forceinline__ const LswMap* factor_maps(const LswSwitchArgs& args, uint32_t factor) {
    return reinterpret_cast<const LswMap*>(args.factor_maps) + 2 * static_cast<uint64_t>(factor);
}
__device__ __forceinline__ const LswMap* target_maps(const LswSwitchArgs& args, uint64_t target) {
    return reinterpret_cast<const LswMap*>(args.target_maps) + 2 * target;
}

// Whether this launch serves a target: where two paths share a set, each takes its own.
__device__ __forceinline__ bool serves(const LswSwitchArgs& args, uint64_t target) {
    return args.path == LSW_PATH_ALL || ((target_of(args, target).flags & LSW_WEIGHT_BOXES) != 0) == (args.path == LSW_PATH_BOXES);
}

// In place a coefficient must leave W able to come back: not finite, or so large that the difference of two could overflow, is zero.
__device__ __forceinline__ bool usable(const LswSwitchArgs& args, float c) { return !args.in_place || fabsf(c) < 0x1p126f; }

// Rounded, whatever it is used in: the same bits as those that are held mean that nothing changes.
__device__ __forceinline__ float coefficient_of(const LswFactor& f, float gate) { return __fmul_rn(gate, f.scale); }

// Whether entry e of the route concerns a target, and with which coefficient.
__device__ __forceinline__ bool applies(const LswSwitchArgs& args, const LswFactor& f, float gate, float& c) {
    c = coefficient_of(f, gate);
    return f.rank > 0 && c != 0.0f && usable(args, c);
}

// One warp.
__device__ inline void canonical_route(const LswSwitchArgs& args, Route& route) {
    const uint32_t lane = threadIdx.x;
    int id = -1;
    float gate = 0.0f;
    if (lane < args.k) {
        const int given = reinterpret_cast<const int32_t*>(args.ids)[lane];
        id = known_id(given, args.slots);
        gate = reinterpret_cast<const float*>(args.gates)[lane];
        if (id != given && blockIdx.x == 0) atomicOr(&state(args)->status, LSW_ODD_ROUTE_ID);
    }
    const RouteEntry entry = canonical_entry(id, gate, args.k);
    if (entry.slot >= 0) route.slot[entry.position] = entry.slot, route.gate[entry.position] = entry.gate;
    const uint32_t entries = __ballot_sync(kFullWarp, entry.slot >= 0);
    if (lane == 0) route.count = __popc(entries);
}

enum class Verdict { kSame, kChanged, kStale };

// Compares a target's new list of (slot, coefficient, generation) with the one it holds.
__device__ inline Verdict judge(const LswSwitchArgs& args, const Route& route, uint32_t target) {
    const LswMerged* held = merged(args, target);
    const uint32_t held_count = merged_count(args, target);
    uint32_t count = 0;
    bool same = true;
    for (uint32_t e = 0; e < route.count; ++e) {
        const LswFactor& f = factor(args, target, route.slot[e]);
        float c;
        if (!applies(args, f, route.gate[e], c)) continue;
        same = same && count < held_count && held[count].slot == route.slot[e] && held[count].generation == f.generation &&
               __float_as_uint(held[count].coefficient) == __float_as_uint(c);
        ++count;
    }
    if (same && count == held_count) return Verdict::kSame;
    // In place, the product of an adapter that has left the bank cannot be taken out again.
    for (uint32_t e = 0; args.in_place && e < held_count; ++e) {
        if (factor(args, target, held[e].slot).generation != held[e].generation) return Verdict::kStale;
    }
    return Verdict::kChanged;
}

// Says what is odd about a target under the new route. One block's task: the word is sticky.
__device__ inline void report_odd(const LswSwitchArgs& args, const Route& route, uint32_t target, Verdict verdict) {
    uint32_t odd = verdict == Verdict::kStale ? LSW_STALE_MERGE : 0;
    for (uint32_t e = 0; e < route.count; ++e) {
        const LswFactor& f = factor(args, target, route.slot[e]);
        const float c = coefficient_of(f, route.gate[e]);
        if (f.rank > 0 && !(is_finite(c) && usable(args, c))) odd |= LSW_ODD_COEFFICIENT;
    }
    if (odd) atomicOr(&state(args)->status, odd);
}

// Whether a target is this launch's and needs work under the new route.
__device__ __forceinline__ bool is_changed(const LswSwitchArgs& args, const Route& route, uint32_t target) {
    if (target >= args.last || !serves(args, target)) return false;
    const Verdict verdict = judge(args, route, target);
    if (blockIdx.x == 0) report_odd(args, route, target, verdict);
    return verdict == Verdict::kChanged;
}

// A lane's terms of a target's sum: what of the new route enters and, in place, what of the old one leaves. Slot -1: none.
struct LaneTerms {
    int enter_slot, leave_slot;
    float enter, leave;  // coefficients
    uint32_t enter_at, leave_at;
    uint32_t count;  // of all lanes
};

// One warp: lane e looks at entry e of both routes. An adapter in both enters once, by the difference of its coefficients.
__device__ inline LaneTerms lane_terms(const LswSwitchArgs& args, const Route& route, uint32_t target) {
    const uint32_t lane = threadIdx.x % 32;
    int slot = -1;
    float c = 0.0f;
    if (lane < route.count && applies(args, factor(args, target, route.slot[lane]), route.gate[lane], c)) slot = route.slot[lane];

    const uint32_t held_count = args.in_place ? merged_count(args, target) : 0;
    LswMerged held{-1, 0.0f, 0};
    if (lane < held_count) held = merged(args, target)[lane];
    bool leaves = held.slot >= 0;
    const uint32_t entries = max(route.count, held_count);
    for (uint32_t e = 0; e < entries; ++e) {
        const int held_slot = __shfl_sync(kFullWarp, held.slot, e), new_slot = __shfl_sync(kFullWarp, slot, e);
        const float held_coefficient = __shfl_sync(kFullWarp, held.coefficient, e);
        if (slot >= 0 && held_slot == slot) c -= held_coefficient;
        if (new_slot >= 0 && new_slot == held.slot) leaves = false;
    }
    const bool enters = slot >= 0 && c != 0.0f;
    const uint32_t before = (1u << lane) - 1;
    const uint32_t entering = __ballot_sync(kFullWarp, enters), leaving = __ballot_sync(kFullWarp, leaves);
    LaneTerms t;
    t.enter_slot = enters ? slot : -1;
    t.leave_slot = leaves ? held.slot : -1;
    t.enter = c;
    t.leave = -held.coefficient;
    t.enter_at = __popc(entering & before);
    t.leave_at = __popc(entering) + __popc(leaving & before);
    t.count = __popc(entering) + __popc(leaving);
    return t;
}

// Writes down what a target holds now.
__device__ inline void record(const LswSwitchArgs& args, const Route& route, uint32_t target) {
    if (!is_changed(args, route, target)) return;
    uint32_t count = 0;
    for (uint32_t e = 0; e < route.count; ++e) {
        const LswFactor& f = factor(args, target, route.slot[e]);
        float c;
        if (applies(args, f, route.gate[e], c)) merged(args, target)[count++] = {route.slot[e], c, f.generation};
    }
    merged_count(args, target) = count;
}
