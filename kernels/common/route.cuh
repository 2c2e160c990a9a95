// A route in canonical form: duplicates added up in order of appearance, entries sorted by slot. A permuted route gives the same bits.
#pragma once

#include "../args.h"
#include "num.cuh"
#include "ptx.cuh"

static_assert(LSW_MAX_K <= 32, "one lane an entry of the route");

struct RouteEntry {
    int slot;  // -1: this lane owns none
    float gate;
    uint32_t position;
};

// One warp. Lane e brings the e-th entry, id -1 for none; the first of several equal ids collects their gates.
__device__ __forceinline__ RouteEntry canonical_entry(int id, float gate, uint32_t k) {
    const uint32_t lane = threadIdx.x % 32;
    bool is_first = id >= 0;
    float sum = gate;
    for (uint32_t e = 0; e < k; ++e) {
        const int other = __shfl_sync(kFullWarp, id, e);
        const float other_gate = __shfl_sync(kFullWarp, gate, e);
        if (other == id && e < lane) is_first = false;
        if (other == id && e > lane) sum += other_gate;
    }
    const uint32_t firsts = __ballot_sync(kFullWarp, is_first);
    uint32_t position = 0;
    for (uint32_t e = 0; e < k; ++e) {
        const int other = __shfl_sync(kFullWarp, id, e);
        if ((firsts >> e & 1) && other < id) ++position;
    }
    return {is_first ? id : -1, sum, position};
}
