// 16-byte packs: loads and stores, and how many elements one holds.
#pragma once

#include <stdint.h>

template <class T> constexpr int kPack = 16 / sizeof(T);

template <class T> union Pack {
    uint4 bits;
    T lane[kPack<T>];
    __device__ Pack() : bits{0, 0, 0, 0} {}
};

template <class T> __device__ __forceinline__ Pack<T> load16(const T* p) {
    Pack<T> pack;
    pack.bits = *reinterpret_cast<const uint4*>(p);
    return pack;
}

template <class T> __device__ __forceinline__ void store16(T* p, const Pack<T>& pack) { *reinterpret_cast<uint4*>(p) = pack.bits; }
