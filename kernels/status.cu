// Takes a sticky status word: what it holds goes out and zero comes in, in one step, so that nothing is lost that a kernel on another
// stream reports meanwhile.
#include "args.h"

extern "C" __global__ void lsw_status_take(const __grid_constant__ LswTakeArgs args) {
    if (args.word != 0) *reinterpret_cast<uint32_t*>(args.taken) = atomicExch(reinterpret_cast<uint32_t*>(args.word), 0);
}
