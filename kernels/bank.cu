// Writes one slot of an adapter bank's device table.
//
// The entries travel as kernel arguments: stream-ordered, capturable, no staging buffer whose lifetime somebody must know, and the
// host returns at once. A 7B model (224 targets) takes four launches of 19 KB.
#include "args.h"

extern "C" __global__ void __launch_bounds__(LSW_BANK_THREADS) lsw_bank_set(const __grid_constant__ LswBankArgs args) {
    static_assert(LSW_BANK_BATCH <= LSW_BANK_THREADS, "one thread a factor");
    static_assert(sizeof(LswBankArgs) <= 32764, "kernel arguments");
    if (threadIdx.x >= args.count) return;
    const uint64_t target = args.first_target + threadIdx.x;
    const uint64_t entry = target * args.slots + args.slot;
    reinterpret_cast<LswFactor*>(args.table)[entry] = args.factors[threadIdx.x];
    if (args.maps != 0) {
        LswMap* maps = reinterpret_cast<LswMap*>(args.maps) + 2 * entry;
        maps[0] = args.factor_maps[threadIdx.x][0];
        maps[1] = args.factor_maps[threadIdx.x][1];
    }
    __threadfence();  // a dependent launch behind this one looks at the entries before it waits, and must not see one in part
}
