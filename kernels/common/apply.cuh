// What the kernels of unmerged adapters share: where things lie, and loads of eight elements.
#pragma once

#include "../args.h"
#include "num.cuh"
#include "pack.cuh"
#include "ptx.cuh"

// Eight elements: of 16 bits a pack, of 32 bits two.
template <class T> struct Eight {
    Pack<T> part[8 / kPack<T>];
    __device__ __forceinline__ float at(int i) const { return to_float(part[i / kPack<T>].lane[i % kPack<T>]); }
    __device__ __forceinline__ void set(int i, float x) { part[i / kPack<T>].lane[i % kPack<T>] = from_float<T>(x); }
};

// The first `left` of eight elements; zeros for the others.
template <class T> __device__ __forceinline__ Eight<T> load_eight(const T* p, uint32_t left, bool aligned) {
    Eight<T> eight;
    if (aligned && left >= 8) {
#pragma unroll
        for (int i = 0; i < 8 / kPack<T>; ++i) eight.part[i] = load16(p + i * kPack<T>);
    } else if (left > 0) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (i < left) eight.part[i / kPack<T>].lane[i % kPack<T>] = p[i];
        }
    }
    return eight;
}

// The same where everything is whole packs, so that nothing is left to decide but whether to load: the compiler can keep many in
// flight, which it does not across branches.
template <class T> __device__ __forceinline__ Eight<T> load_eight_if(bool exists, const T* p) {
    Eight<T> eight;
#pragma unroll
    for (int i = 0; i < 8 / kPack<T>; ++i) {
        if (exists) eight.part[i] = load16(p + i * kPack<T>);
    }
    return eight;
}

template <class T> __device__ __forceinline__ void store_eight(T* p, const Eight<T>& eight, uint32_t left, bool aligned) {
    if (aligned && left >= 8) {
#pragma unroll
        for (int i = 0; i < 8 / kPack<T>; ++i) store16_whole(p + i * kPack<T>, eight.part[i].bits);
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (i < left) p[i] = eight.part[i / kPack<T>].lane[i % kPack<T>];
        }
    }
}

// The item whose route a row has; -1: none.
__device__ __forceinline__ int64_t item_of(const LswApplyArgs& args, uint32_t row) {
    if (args.row_map == 0) return row;
    return known_id(reinterpret_cast<const int32_t*>(args.row_map)[row], args.items);
}

// An entry of an item's route, as it was given; -1 behind the last.
__device__ __forceinline__ int id_at(const LswApplyArgs& args, uint64_t item, uint32_t e) {
    return e < args.k ? reinterpret_cast<const int32_t*>(args.ids)[item * args.ids_stride + e] : -1;
}
__device__ __forceinline__ float gate_at(const LswApplyArgs& args, uint64_t item, uint32_t e) {
    return e < args.k ? reinterpret_cast<const float*>(args.gates)[item * args.gates_stride + e] : 0.0f;
}

__device__ __forceinline__ void report_id(const LswApplyArgs& args, int given) {
    if (given != -1 && known_id(given, args.slots) == -1) atomicOr(reinterpret_cast<uint32_t*>(args.status), LSW_ODD_ROUTE_ID);
}

__device__ __forceinline__ void report_coefficient(const LswApplyArgs& args, uint32_t rank, float c) {
    if (rank > 0 && !is_finite(c)) atomicOr(reinterpret_cast<uint32_t*>(args.status), LSW_ODD_COEFFICIENT);
}

__device__ __forceinline__ const LswFactor& factor_of(const LswApplyTarget& target, int slot) {
    return reinterpret_cast<const LswFactor*>(target.factors)[slot];
}

__device__ __forceinline__ float* products(const LswApplyArgs& args, uint32_t row, uint32_t position) {
    return reinterpret_cast<float*>(args.products) + (static_cast<uint64_t>(row) * args.k + position) * args.width;
}

// Takes a unit's target off the front: units of earlier targets come first.
__device__ __forceinline__ const LswApplyTarget& target_of(const LswApplyArgs& args, uint32_t& unit, uint32_t LswApplyTarget::*size,
                                                           uint32_t step) {
    const LswApplyTarget* target = args.targets;
    for (uint32_t units; unit >= (units = (target->*size + step - 1) / step); ++target) unit -= units;
    return *target;
}
