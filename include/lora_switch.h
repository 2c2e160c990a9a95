/* lora-switch: dynamic LoRA on CUDA, with a CPU backend for the same calls. This header is the manual.
 *
 * An engine makes a context (the backend), a bank (the adapters: a LoRA pair for every slot and target),
 * and a switch set (the adapted weights W). For each token, or whenever the route changes, lsw_route
 * turns router logits into a route, and lsw_switch_to brings every W to it in one launch.
 * lsw_apply leaves W alone and gives every row of a batch a route of its own; lsw_linear does the same
 * beside the product with W, for up to 8 rows.
 * lsw_permute, lsw_gather and lsw_combine group a batch's tokens by expert and add up the results.
 * lsw_advise predicts which of these serves a workload fastest.
 * lsw_measure_... say what the machine allows.
 * ffi-examples/ holds whole programs.
 *
 * Conventions, for every function:
 *
 * Status. A function returns LSW_OK or says why not; lsw_last_error has the words. Everything about a
 * call that the host can see (null, alignment, sizes, strides, dtypes, overlaps, handles' contexts) is
 * checked before anything is done; on an error nothing was done, and no output was touched, except
 * after LSW_CUDA_ERROR. Values in device memory are never errors: each odd one has an effect that is
 * stated with the function, equal on both backends, and sets a bit (LSW_ODD_...) that can be read.
 * Nothing unwinds or throws into the caller.
 *
 * Arguments. A pointer to const is an input, any other an output (handles aside). Outputs on the host
 * (counts, new handles) are written only on success. Arrays of structs and the structs that describe
 * matrices are read during the call and not kept. Enums cross as int32_t, so that a number from a
 * newer header is an error and not undefined behaviour; numbers are never used again for something
 * else. Fields called `reserved` must be 0. Structs of options begin with struct_size, to be set to
 * sizeof: a smaller struct of an older header gets the defaults for what it lacks; a larger one of a
 * newer header is fine if all that this library does not know is 0. NULL options are all defaults.
 * Fields that are there are taken as they are: 0 does not mean the default.
 *
 * Ownership. lsw_..._create gives out an object, lsw_..._destroy ends it (NULL is ignored); the caller
 * destroys each once, and does not use it afterwards. The order does not matter: what a set still needs
 * of its bank and context lives on inside. All memory that is passed in stays the caller's; where an
 * object keeps an address after the call (adapters, weights, tables), the function says for how long.
 *
 * Places and streams. On a CPU context, memory is host memory, `stream` is ignored, and a call returns
 * when its work is done. On a CUDA context, memory is device memory of that context, `stream` is a
 * CUstream or cudaStream_t of it (NULL: CUDA's legacy default stream), and calls enqueue and return,
 * except where it says that one synchronises. Memory that a call reads or writes belongs to it until
 * its work is done; order between streams is the caller's. The calls that enqueue may be captured into
 * a graph unless stated otherwise; call lsw_context_warm first. The current CUDA context is left as
 * it was.
 *
 * Matrices. Outputs share no memory with inputs or other outputs of the call. Addresses need the
 * alignment of an element; multiples of 16 bytes, rows included, are faster on CUDA.
 *
 * Threads. Contexts and banks may be used by several threads at a time, a switch set by one.
 *
 * Same input, same bits, on one kind of card; no atomics on floats.
 */


#ifndef LORA_SWITCH_H
#define LORA_SWITCH_H

/* Generated from src/ffi by cbindgen; `make gen` writes it anew. */

#include <stdint.h>

/* The version of this header; lsw_version says the library's. */
#define LSW_VERSION_MAJOR 0
#define LSW_VERSION_MINOR 1
#define LSW_VERSION_PATCH 0
#define LSW_VERSION (LSW_VERSION_MAJOR << 16 | LSW_VERSION_MINOR << 8 | LSW_VERSION_PATCH)


/**
 * The call did what it says.
 */
#define LSW_OK 0

/**
 * An argument is null, misaligned or out of its bounds. Nothing was done; lsw_last_error names it.
 */
#define LSW_INVALID_ARGUMENT 1

/**
 * The NVIDIA driver, or a device that is good enough, is missing.
 */
#define LSW_NO_DEVICE 2

/**
 * This build holds no CUDA kernels, since no nvcc was found when it was made.
 */
#define LSW_NO_KERNELS 3

/**
 * A driver call failed (lsw_last_cuda_result). Outputs of work that was under way are undefined.
 */
#define LSW_CUDA_ERROR 4

/**
 * Memory could not be had. Nothing was done.
 */
#define LSW_OUT_OF_MEMORY 5

/**
 * A bug in this library. It is not passed on to the caller's stack; destroy the objects of the
 * call.
 */
#define LSW_PANIC 6

/**
 * 32-bit IEEE float.
 */
#define LSW_F32 0

/**
 * 16-bit IEEE float.
 */
#define LSW_F16 1

/**
 * bfloat16.
 */
#define LSW_BF16 2

/**
 * 32-bit signed integer.
 */
#define LSW_I32 3

/**
 * Bytes.
 */
#define LSW_U8 4

/**
 * Bits of what a device found odd in values that it was given. lsw_context_take_odd: lsw_route met
 * a NaN or +inf logit, or a row with nothing finite.
 */
#define LSW_ODD_LOGITS 1

/**
 * lsw_context_take_odd: lsw_permute met an id below -1 or past the last expert.
 */
#define LSW_ODD_ID 2

/**
 * lsw_switch_odd, and lsw_context_take_odd of lsw_apply: an id below -1 or past the last slot.
 */
#define LSW_ODD_ROUTE_ID 4

/**
 * lsw_switch_odd, and lsw_context_take_odd of lsw_apply: a coefficient that is not finite (in
 * place, also one of 2^126 or more in magnitude).
 */
#define LSW_ODD_COEFFICIENT 8

/**
 * lsw_switch_odd: a set in place holds the product of an adapter that has been replaced; its
 * targets were left as they are.
 */
#define LSW_ODD_STALE_MERGE 16

/**
 * W = W_base + the sum of the route, with W_base in a second buffer. The result depends on the
 * current route alone, bit for bit, after any number of switches; the route of nothing copies
 * W_base's bits. Half the arithmetic of the other form, same traffic.
 */
#define LSW_FROM_BASE 0

/**
 * W += new route - old route (LoRA-Switch, arXiv 2405.17741, equation 6). No second buffer; each
 * switch rounds W once, so errors build up.
 */
#define LSW_IN_PLACE 1

/**
 * The fastest kernel that there is for a set; chosen once, by its shapes and the bank's rank_caps and
 * by the card: the same weight may have other bits in another set.
 */
#define LSW_KERNELS_BEST 0

/**
 * The kernel for any card, even where there is a faster one.
 */
#define LSW_KERNELS_PORTABLE 1

/**
 * The kernel for large sets, even if the set is small.
 */
#define LSW_KERNELS_LARGE 2

/**
 * Merge each route into the weights (lsw_switch_to), then multiply by them.
 */
#define LSW_STRATEGY_SWITCH 0

/**
 * Multiply by the base weights, then add what the adapters make of x (lsw_apply).
 */
#define LSW_STRATEGY_APPLY 1

/**
 * Both in one launch, for at most 8 rows (lsw_linear).
 */
#define LSW_STRATEGY_LINEAR 2

/**
 * exp(x) over the sum of exp(x) of all experts.
 */
#define LSW_SOFTMAX 0

/**
 * 1 / (1 + exp(-x)) (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
 */
#define LSW_SIGMOID 1

/**
 * sqrt(log(1 + exp(x))).
 */
#define LSW_SQRT_SOFTPLUS 2

/**
 * A group is chosen by its best expert (DeepSeek-V2, arXiv 2405.04434, section 2.2.2).
 */
#define LSW_GROUP_BEST 0

/**
 * By the sum of its two best (DeepSeek-V3).
 */
#define LSW_GROUP_SUM_OF_TWO 1

/**
 * A table over (target, slot) of LoRA pairs, by address: it copies no weights, so stacked arrays,
 * paged pools and slices of larger matrices all fit. May be used by several threads at a time, and
 * destroyed before the sets that use it.
 */
typedef struct lsw_bank lsw_bank;

/**
 * A backend, ready: the CPU with a number of threads, or a CUDA context with the kernels loaded.
 * May be used by several threads at a time, and destroyed before the objects that were made on it.
 */
typedef struct lsw_context lsw_context;

/**
 * All adapted weights of a model and the adapters that they may carry.
 *
 * A route is ids[k] and gates[k], as lsw_route writes them. Canonical form: an id outside the
 * bank's slots is none; duplicates add up in f32 in order of appearance; entries sort by id, so a
 * permuted route gives the same bits. The coefficient of a slot at a target is gate * scale, in
 * f32; where it is zero, or the rank is, the adapter is not touched at all.
 *
 * A target whose list of (slot, coefficient, content of the slot) equals what it holds costs no
 * weight traffic. What it holds is kept on the device, so a captured lsw_switch_to serves every
 * route, and a slot that got another adapter is noticed.
 *
 * Numbers: A, B, W enter as stored; products and sums in f32, in a fixed order; one rounding at
 * the end. A coefficient that is not finite propagates from base (and the next route heals it); in
 * place it counts as zero, as does one of 2^126 or more in magnitude, since it would destroy W:
 * lsw_switch_odd tells.
 *
 * On Hopper, the launch of a small set (in 16 bits, aligned, up to 32 targets and some 1,000 tiles of
 * 128 x 128; fewer where ranks may exceed 64) is a dependent one, like that of lsw_route: it starts
 * while the work before it ends, lets dependents start at once, and reads adapters that are in a
 * slot before that work has ended.
 *
 * A set is used by one thread at a time and in flight on one stream at a time, replays of graphs
 * included. A graph that captured its calls holds the addresses of the set, its bank and their
 * memory, and keeps none of them alive: do not replay it once they are destroyed or freed.
 */
typedef struct lsw_switch lsw_switch;

/**
 * The result of a call: LSW_OK to LSW_PANIC.
 */
typedef int32_t lsw_status;

/**
 * What a bank is made with. NULL, or what a smaller struct_size leaves out: LSW_F32, 0, and memory
 * of its own.
 */
typedef struct lsw_bank_options {
    /**
     * sizeof(lsw_bank_options).
     */
    uint64_t struct_size;
    /**
     * Of W, A and B: LSW_F32, LSW_F16 or LSW_BF16.
     */
    int32_t dtype;
    /**
     * 0.
     */
    int32_t reserved;
    /**
     * The number of adapters that each target can hold: 1 to 65536.
     */
    uint64_t slots;
    /**
     * Device memory for the table, aligned to 128 bytes, for as long as the bank and sets over it
     * live; NULL to have it allocated.
     */
    void *memory;
    /**
     * Its size, at least lsw_bank_memory_bytes.
     */
    uint64_t memory_bytes;
} lsw_bank_options;

/**
 * One target's matrix: W is [out_features, in_features].
 */
typedef struct lsw_target_shape {
    /**
     * Rows of W and of B.
     */
    uint64_t out_features;
    /**
     * Columns of W and of A.
     */
    uint64_t in_features;
    /**
     * The largest rank that a slot may bring: 0 to 256. Captured launches are laid out for it;
     * work follows the real rank.
     */
    uint64_t rank_cap;
} lsw_target_shape;

/**
 * A matrix to read: row-major, element (i, j) at data + (i * stride + j) elements. A vector of n
 * elements is a matrix of 1 x n.
 *
 * stride is at least cols where there is more than one row, and does not matter otherwise. Without
 * rows or columns, nor does data. data needs the alignment of an element only, unless a function
 * says more.
 */
typedef struct lsw_mat {
    /**
     * Host memory on a CPU context, device memory on a CUDA context.
     */
    const void *data;
    /**
     * Number of rows.
     */
    uint64_t rows;
    /**
     * Number of columns.
     */
    uint64_t cols;
    /**
     * Elements from one row to the next.
     */
    uint64_t stride;
    /**
     * LSW_F32 to LSW_U8.
     */
    int32_t dtype;
    /**
     * 0.
     */
    int32_t reserved;
} lsw_mat;

/**
 * A LoRA pair as PEFT stores it: the weight's change is scale * B A. The rank is a.rows; where
 * that is 0, the slot leaves the target alone, and nothing else of the struct is read.
 */
typedef struct lsw_factor {
    /**
     * A [rank, in_features], PEFT's lora_A.weight.
     */
    struct lsw_mat a;
    /**
     * B [out_features, rank], PEFT's lora_B.weight.
     */
    struct lsw_mat b;
    /**
     * alpha / rank, or alpha / sqrt(rank) for rsLoRA; finite.
     */
    float scale;
    /**
     * 0.
     */
    int32_t reserved;
} lsw_factor;

/**
 * What a set is made with. NULL, or what a smaller struct_size leaves out: LSW_FROM_BASE, 8, and
 * memory of its own.
 */
typedef struct lsw_switch_options {
    /**
     * sizeof(lsw_switch_options).
     */
    uint64_t struct_size;
    /**
     * LSW_FROM_BASE or LSW_IN_PLACE.
     */
    int32_t form;
    /**
     * LSW_KERNELS_BEST or, for tests and comparisons, another. Their sums are grouped differently,
     * so that bits may differ within the same bound.
     */
    int32_t kernels;
    /**
     * The widest route that the set can be brought to: 1 to 32.
     */
    uint64_t k_max;
    /**
     * Device memory for the tables, aligned to 128 bytes, for as long as the set lives; NULL to
     * have it allocated.
     */
    void *memory;
    /**
     * Its size, at least lsw_switch_memory_bytes.
     */
    uint64_t memory_bytes;
} lsw_switch_options;

/**
 * A matrix to write; all else as for lsw_mat. Bytes between its rows are left alone.
 */
typedef struct lsw_mat_mut {
    /**
     * Host memory on a CPU context, device memory on a CUDA context.
     */
    void *data;
    /**
     * Number of rows.
     */
    uint64_t rows;
    /**
     * Number of columns.
     */
    uint64_t cols;
    /**
     * Elements from one row to the next.
     */
    uint64_t stride;
    /**
     * LSW_F32 to LSW_U8.
     */
    int32_t dtype;
    /**
     * 0.
     */
    int32_t reserved;
} lsw_mat_mut;

/**
 * One adapted matrix: W and W_base, both [out_features, in_features] and of the bank's dtype.
 */
typedef struct lsw_target {
    /**
     * Written by the switches. In place it holds the base weight at first; from base its content
     * does not matter.
     */
    struct lsw_mat_mut weight;
    /**
     * W_base, from base only, where targets and sets may share it. In place: data NULL, and
     * nothing else of it is read.
     */
    struct lsw_mat base;
} lsw_target;

/**
 * Which adapters each row of a batch gets, and how much of them.
 *
 * A row's route is taken in canonical form, as a switch takes it: an id outside the bank's slots
 * is none; duplicates add up in f32 in order of appearance; entries sort by id, so a permuted
 * route gives the same bits. The coefficient of a slot at a target is gate * scale, in f32; where
 * it is zero, or the rank is, the adapter is not touched at all.
 */
typedef struct lsw_routes {
    /**
     * LSW_I32 [items, k], as lsw_route writes them; k from 0 to 32. Slots of the bank; -1: none.
     */
    struct lsw_mat ids;
    /**
     * LSW_F32 [items, k].
     */
    struct lsw_mat gates;
    /**
     * LSW_I32, one element a row of the batch: the item whose route the row has; rows whose entry
     * names no item (-1) are left alone. With data NULL nothing of it is read, and row r has the
     * route of item r. With the map of lsw_permute and one route for each of its items, adapters
     * serve the experts of a mixture: a slot is then an adapter of an expert.
     */
    struct lsw_mat row_map;
} lsw_routes;

/**
 * How an lsw_linear is ordered after what comes before it. NULL, or what a smaller struct_size
 * leaves out: 0.
 */
typedef struct lsw_linear_options {
    /**
     * sizeof(lsw_linear_options).
     */
    uint64_t struct_size;
    /**
     * 0 or 1: of all that the call reads, the work directly before it on the stream (its last
     * kernel launch, say) writes x alone; weights, adapters, the bank's slots, ids, gates and
     * row_map are older. Then, on CUDA, they are read while that work still runs, which hides the
     * start of the launch. Where that work starts early itself, as a dependent launch, like lsw_route,
     * lsw_gate and, of a small set on Hopper, lsw_switch_to, the same is asked of what comes before
     * it. With 0, nothing but prefetches into the L2 cache comes early.
     */
    int32_t only_x_is_new;
    /**
     * 0 or 1: blocks do not wait for each other's part of A x, but each computes all of it, as they
     * do where others do not come to run: for tests. The bits are the same.
     */
    int32_t alone;
} lsw_linear_options;

/**
 * What a machine does, and the engine's product on it: measured by lsw_calibrate, or written by
 * hand. All are positive and finite, but that times may be 0 and product_tflops infinite. GB are
 * 10^9 bytes. NULL, or what a smaller struct_size leaves out: those of an NVIDIA H200.
 */
typedef struct lsw_calibration {
    /**
     * sizeof(lsw_calibration).
     */
    uint64_t struct_size;
    /**
     * Memory is read at this rate.
     */
    double read_gb_per_s;
    /**
     * Memory is read and written at this rate, both counted.
     */
    double copy_gb_per_s;
    /**
     * A launch that does next to nothing, as a node of a graph.
     */
    double launch_us;
    /**
     * A switch from base passes over W and W_base at this rate, both and the adapters counted.
     */
    double switch_gb_per_s;
    /**
     * A call of lsw_apply, bytes aside.
     */
    double apply_call_us;
    /**
     * lsw_apply to up to 64 rows, and in LSW_F32: the bytes of a row's adapters pass at this rate,
     * for each row.
     */
    double few_rows_gb_per_s;
    /**
     * The same above 64 rows in 16 bits. Measured of a bank that takes the dense path, where the card
     * has one: other banks cost more, and the more the higher their ranks.
     */
    double many_rows_gb_per_s;
    /**
     * A call of lsw_linear without adapters, bytes aside.
     */
    double linear_call_us;
    /**
     * What adapters add to that, bytes aside.
     */
    double linear_adapters_us;
    /**
     * lsw_linear streams weights at this rate.
     */
    double linear_gb_per_s;
    /**
     * The part of read_gb_per_s that the engine's base product reaches with few rows.
     */
    double product_share;
    /**
     * 10^12 operations a second of the engine's base product with many rows; an addition and a
     * multiplication are two.
     */
    double product_tflops;
} lsw_calibration;

/**
 * What is to be served. What a smaller struct_size leaves out is 0.
 */
typedef struct lsw_workload {
    /**
     * sizeof(lsw_workload).
     */
    uint64_t struct_size;
    /**
     * The adapted matrices, in a bank's order. Where rank_cap is below a slot's rank, the slot's
     * adapter has that rank there; 0: none.
     */
    const struct lsw_target_shape *targets;
    /**
     * Their number.
     */
    uint64_t count;
    /**
     * How many consecutive targets share each input, and so a call: 3, 1, 2, 1 for each layer of a
     * Llama. Each at most 8, in sum count.
     */
    const uint64_t *groups;
    /**
     * Their number.
     */
    uint64_t group_count;
    /**
     * The rank of each slot's adapter: 0 to 256.
     */
    const uint64_t *ranks;
    /**
     * Their number, at least 1.
     */
    uint64_t slots;
    /**
     * Of W, A and B: LSW_F32, LSW_F16 or LSW_BF16.
     */
    int32_t dtype;
    /**
     * 0.
     */
    int32_t reserved;
    /**
     * Adapters a token: 0 to 32.
     */
    uint64_t k;
    /**
     * Tokens that are multiplied at a time, at least 1: sequences in a decode step, or tokens of a
     * prompt.
     */
    uint64_t batch;
    /**
     * How many tokens, on average, a route serves before another is needed, at least 1. 1: a router
     * decides anew for every token of every sequence.
     */
    double tokens_per_route;
} lsw_workload;

/**
 * What each strategy costs, in microseconds a token. struct_size is set by the caller; fields that
 * it leaves out are not written.
 */
typedef struct lsw_advice {
    /**
     * sizeof(lsw_advice), set before the call.
     */
    uint64_t struct_size;
    /**
     * The cheapest: LSW_STRATEGY_... Of equal ones, the lowest number.
     */
    int32_t best;
    /**
     * 0.
     */
    int32_t reserved;
    /**
     * Switch for every route, then multiply the tokens that it serves, at most a batch at a time.
     */
    double switch_us;
    /**
     * Multiply the whole batch, then add the adapters.
     */
    double apply_us;
    /**
     * Both in one launch a group; infinite for batches above 8.
     */
    double linear_us;
} lsw_advice;

/**
 * How experts are chosen, and how scores become gates. NULL: renormalize 1. Every other member's
 * default is 0, which is also what a smaller struct_size leaves out.
 */
typedef struct lsw_route_options {
    /**
     * sizeof(lsw_route_options).
     */
    uint64_t struct_size;
    /**
     * 1: gates are scores over the sum of the chosen scores; of a softmax, that is the softmax
     * over the chosen k. 0: they are the scores.
     */
    int32_t renormalize;
    /**
     * 0 or 1, for lsw_gate up to 64 tokens. 1: the work directly before it on the stream (its last
     * kernel launch, say) does not write the weight. Then, on CUDA, the weight is read while that
     * work still runs. Where that work starts early itself, as a dependent launch, like lsw_route,
     * lsw_gate and, of a small set on Hopper, lsw_switch_to, the same is asked of what comes before
     * it. 0: nothing is read early.
     */
    int32_t only_x_is_new;
    /**
     * LSW_SOFTMAX to LSW_SQRT_SOFTPLUS: what a logit x becomes.
     */
    int32_t score;
    /**
     * LSW_GROUP_BEST or LSW_GROUP_SUM_OF_TWO.
     */
    int32_t group_score;
    /**
     * A factor of every gate, in the end; finite. 0 counts as 1.
     */
    float scale;
    /**
     * c from 2^-126 to 2^126: a logit x counts as c tanh(x / c), in f32, for the choice too; -inf
     * stays. 0: as x.
     */
    float softcap;
    /**
     * The experts form groups of N / groups neighbours, of which only the best top_groups are
     * chosen from; ties to the lower group. 1 to 32, a divisor of N; what is no power of two
     * serves up to 512 experts. 0 counts as 1: no groups.
     */
    uint64_t groups;
    /**
     * 1 to groups; 0 counts as 1.
     */
    uint64_t top_groups;
    /**
     * [1, N] LSW_F32, added to the scores for the choice only, not for the gates. A choice score
     * that is NaN counts as -inf. NULL: none.
     */
    const struct lsw_mat *bias;
    /**
     * [1, 1] LSW_I32 in the context's memory: tokens from this one on are padding. NULL: none are.
     */
    const struct lsw_mat *valid;
    /**
     * [1, T] LSW_U8 in the context's memory: tokens whose byte is 0 are padding. NULL: none are.
     */
    const struct lsw_mat *mask;
} lsw_route_options;

/**
 * Which items lsw_permute_with sorts, and how it lays out their rows. What a smaller struct_size
 * leaves out: block 1, filler -1. There is no default for the experts.
 */
typedef struct lsw_permute_options {
    /**
     * sizeof(lsw_permute_options).
     */
    uint64_t struct_size;
    /**
     * N: ids are 0 to N - 1. 1 to 65536 (pairs of adapter and expert, say).
     */
    uint64_t experts;
    /**
     * The experts of this call begin here: the items of others are dropped, as each rank does
     * under expert parallelism. 0 for all.
     */
    uint64_t first;
    /**
     * And end before this one. N for all.
     */
    uint64_t last;
    /**
     * Each expert's rows are padded to a multiple of this, 1 to 1024: the tile of a grouped GEMM.
     */
    uint64_t block;
    /**
     * What row_map holds for rows without an item: -1, or T k for engines that mask by item < T k.
     */
    int32_t filler;
    /**
     * 0.
     */
    int32_t reserved;
} lsw_permute_options;

/**
 * What lsw_permute_with needs.
 */
typedef struct lsw_permute_sizes {
    /**
     * Elements of row_map: the most rows that the items can take, padding included.
     */
    uint64_t rows;
    /**
     * Elements of block_experts: rows / block.
     */
    uint64_t blocks;
    /**
     * Of the workspace: 0 on a CPU context.
     */
    uint64_t workspace_bytes;
} lsw_permute_sizes;

/**
 * What lsw_combine_with does to the sums. NULL, or what a smaller struct_size leaves out: scale 1, no
 * residual.
 */
typedef struct lsw_combine_options {
    /**
     * sizeof(lsw_combine_options).
     */
    uint64_t struct_size;
    /**
     * [T, D], added to the scaled sum: of y's type, and disjoint from y or y itself (the same
     * address, shape and stride). NULL: none.
     */
    const struct lsw_mat *residual;
    /**
     * Multiplies each sum.
     */
    float scale;
    /**
     * 0.
     */
    int32_t reserved;
} lsw_combine_options;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * The version of the library that runs, as LSW_VERSION packs it: that macro is the header's.
 */
uint32_t lsw_version(void);

/**
 * The name of a status, "LSW_OK" say; "unknown status" for a number that is none. The text lives
 * forever.
 */
const char *lsw_status_name(lsw_status status);

/**
 * What the last failure on the calling thread was, in words: the argument's name, its value and
 * its bound, or the driver call. Empty before the first failure; calls that succeed do not change
 * it. The text is valid until the next failure on this thread.
 */
const char *lsw_last_error(void);

/**
 * The CUresult of the last failure on the calling thread; 0 if that was not LSW_CUDA_ERROR.
 */
uint32_t lsw_last_cuda_result(void);

/**
 * The CPU backend with this many threads, at most 1024: 0 = one a core, 1 = the calling thread
 * alone. Calls return when the work is done.
 */
lsw_status lsw_context_create_cpu(uint32_t threads, struct lsw_context **context);

/**
 * The CUDA backend on a device's primary context, which the CUDA runtime and PyTorch use too.
 * Loads the kernels; synchronises the context.
 *
 * LSW_NO_KERNELS in a build without nvcc, LSW_NO_DEVICE without a driver or a device of compute
 * capability 8.0.
 */
lsw_status lsw_context_create_cuda(uint32_t ordinal, struct lsw_context **context);

/**
 * The CUDA backend on the caller's own CUcontext, which must outlive this context and all that is
 * made on it. Else as lsw_context_create_cuda.
 */
lsw_status lsw_context_create_from_cuda(void *cu_context, struct lsw_context **context);

/**
 * Launches every kernel once with nothing to do, so that no later launch is a first one. Call it
 * before capturing a graph. Enqueued.
 */
lsw_status lsw_context_warm(const struct lsw_context *context, void *stream);

/**
 * Reads and clears what lsw_route, lsw_permute and lsw_apply found odd on this context: LSW_ODD_
 * bits, 0 for nothing. Synchronises the stream.
 */
lsw_status lsw_context_take_odd(const struct lsw_context *context, void *stream, uint32_t *odd);

/**
 * Ends a context; NULL is ignored. Objects made on it live on.
 */
void lsw_context_destroy(struct lsw_context *context);

/**
 * Bytes of memory for the table of a bank of this dtype: 0 on a CPU context.
 */
lsw_status lsw_bank_memory_bytes(const struct lsw_context *context,
                                 int32_t dtype,
                                 uint64_t slots,
                                 uint64_t targets,
                                 uint64_t *bytes);

/**
 * An empty bank over `count` targets, at most 2^20. Synchronises the stream.
 */
lsw_status lsw_bank_create(const struct lsw_context *context,
                           void *stream,
                           const struct lsw_bank_options *options,
                           const struct lsw_target_shape *targets,
                           uint64_t count,
                           struct lsw_bank **bank);

/**
 * Gives a slot another adapter: one factor a target, in the order of the targets; count must be
 * their number.
 *
 * Enqueued, without synchronisation, and seen by all work that follows on the stream, replays of
 * graphs captured earlier too. (Do not capture this call itself.) The memory of A and B stays the
 * caller's: it must live, and nobody may write it, until the slot gets another adapter, or the bank
 * and all sets over it are destroyed, and the work enqueued before that is done: a switch or an
 * lsw_apply_finish may read A and B before the work before it on the stream has ended. To change what a slot holds, write,
 * then call this again, with the same addresses if you like. They may not lie in a W of a set over
 * the bank. A and B with addresses and rows (stride included) of multiples of 16 bytes take the
 * fast path on CUDA.
 *
 * A set from base that holds the slot merged heals at its next lsw_switch_to. A set in place must
 * be unmerged before: LSW_ODD_STALE_MERGE tells when it was not.
 */
lsw_status lsw_bank_set_slot(struct lsw_bank *bank,
                             void *stream,
                             uint64_t slot,
                             const struct lsw_factor *factors,
                             uint64_t count);

/**
 * The element type of W, A and B.
 */
lsw_status lsw_bank_dtype(const struct lsw_bank *bank, int32_t *dtype);

/**
 * The number of slots.
 */
lsw_status lsw_bank_slots(const struct lsw_bank *bank, uint64_t *slots);

/**
 * The number of targets.
 */
lsw_status lsw_bank_count(const struct lsw_bank *bank, uint64_t *count);

/**
 * A target's shape, as given.
 */
lsw_status lsw_bank_target(const struct lsw_bank *bank,
                           uint64_t target,
                           struct lsw_target_shape *shape);

/**
 * Ends a bank; NULL is ignored. Sets over it live on, and the table with them. The last of them
 * frees a table that was allocated, which synchronises the device; memory of the caller's must
 * outlive the work that uses it.
 */
void lsw_bank_destroy(struct lsw_bank *bank);

/**
 * Bytes of memory for the tables of a set: 0 on a CPU context.
 */
lsw_status lsw_switch_memory_bytes(const struct lsw_context *context,
                                   uint64_t targets,
                                   uint64_t k_max,
                                   uint64_t *bytes);

/**
 * A set over `count` targets, which are the bank's, in its order. Synchronises the stream.
 *
 * Weights may not share memory with each other or with a base; the test is exact at equal strides,
 * and refuses overlapping spans otherwise. Weights and bases with addresses and rows (stride
 * included) of multiples of 16 bytes take the fast path on CUDA.
 *
 * The memory of weights and bases stays the caller's, until the set is destroyed and its work is
 * done. Others read and write it in stream order with the set's work, and say so after writing
 * (lsw_switch_invalidate).
 *
 * Nothing is written yet: from base, the first lsw_switch_to writes every W; in place, W is taken
 * as it is, with nothing merged.
 */
lsw_status lsw_switch_create(const struct lsw_bank *bank,
                             void *stream,
                             const struct lsw_switch_options *options,
                             const struct lsw_target *targets,
                             uint64_t count,
                             struct lsw_switch **set);

/**
 * Brings all targets to a route: ids [k] and gates [k] in the context's memory, k at most k_max.
 * One launch on CUDA; enqueued, and may be captured. k = 0 is lsw_switch_unmerge. ids and gates
 * may not lie in a weight.
 *
 * Same input, same bits, within one path (fast or not, see lsw_switch_create) on one kind of card.
 */
lsw_status lsw_switch_to(struct lsw_switch *set,
                         void *stream,
                         const int32_t *ids,
                         const float *gates,
                         uint64_t k);

/**
 * Like lsw_switch_to for the targets first <= i < last (a pipeline stage, the next layer); the
 * others keep what they hold.
 */
lsw_status lsw_switch_to_targets(struct lsw_switch *set,
                                 void *stream,
                                 uint64_t first,
                                 uint64_t last,
                                 const int32_t *ids,
                                 const float *gates,
                                 uint64_t k);

/**
 * Brings all targets to the route of nothing: from base, W has W_base's bits. Enqueued; may be
 * captured.
 */
lsw_status lsw_switch_unmerge(struct lsw_switch *set, void *stream);

/**
 * Says that W or W_base was written by somebody else. From base, the next lsw_switch_to writes
 * every target; in place, what W holds now counts as base, with nothing merged. Clears what was
 * odd. Enqueued.
 */
lsw_status lsw_switch_invalidate(struct lsw_switch *set, void *stream);

/**
 * What the set's switches found odd since its creation or the last lsw_switch_invalidate: LSW_ODD_
 * bits, 0 for nothing. Synchronises the stream.
 */
lsw_status lsw_switch_odd(const struct lsw_switch *set, void *stream, uint32_t *odd);

/**
 * Copies what a target holds into the context's memory: ids [k_max] ascending and coefficients
 * [k_max], padded with -1 and 0; k_max must be the set's. Before the first lsw_switch_to, nothing
 * is held. Enqueued; may be captured.
 */
lsw_status lsw_switch_current(const struct lsw_switch *set,
                              void *stream,
                              uint64_t target,
                              int32_t *ids,
                              float *coefficients,
                              uint64_t k_max);

/**
 * A target's weight, as given at creation.
 */
lsw_status lsw_switch_weight(const struct lsw_switch *set, uint64_t target, struct lsw_mat *weight);

/**
 * The number of targets.
 */
lsw_status lsw_switch_count(const struct lsw_switch *set, uint64_t *count);

/**
 * Ends a set; NULL is ignored. W keeps what it holds. Tables that were allocated are freed, which
 * synchronises the device; memory of the caller's must outlive the work that uses it.
 */
void lsw_switch_destroy(struct lsw_switch *set);

/**
 * Bytes of workspace that lsw_apply needs for the bank's targets first <= i < first + count, which
 * share their input, and for this many rows with routes of k.
 */
lsw_status lsw_apply_workspace_bytes(const struct lsw_bank *bank,
                                     uint64_t first,
                                     uint64_t count,
                                     uint64_t rows,
                                     uint64_t k,
                                     uint64_t *bytes);

/**
 * Adds to each row what its adapters make of its input, for a group of targets that share it (q,
 * k, v; gate, up): y[i][r] += sum over the entries (id, gate) of row r's route of gate * scale * B
 * (A x[r]), with A, B and scale of slot id and target first + i of the bank.
 *
 * - x [rows, in_features]: the bank's dtype.
 * - y, count matrices [rows, out_features], 1 to 8, for the bank's targets from first on, whose
 *   in_features are equal: LSW_F32, LSW_F16 or LSW_BF16, all of one dtype. Each is read and
 *   written once; a row that no adapter touches keeps its bits.
 * - workspace, at least lsw_apply_workspace_bytes, aligned to 16 bytes; its content does not
 *   matter, and it is free again when the work is done. NULL where 0 bytes are needed.
 *
 * Row strides are free everywhere, so that a slice of a fused output works; 16-byte accesses serve
 * where addresses and rows (stride included) of x, A and B are multiples of 16 bytes. The y share
 * no memory with each other nor with anything else of the call.
 *
 * Numbers: x, A and B enter as stored. Both products and the sum over the route are in f32, in a
 * fixed order; A x stays f32 (tensor cores take it in two parts, to 2^-22); y is rounded once. A
 * coefficient that is not finite propagates into its own row alone. Deterministic, and a row's
 * bits do not depend on the other rows; nor on their number, but that a bank of 16 bits on CUDA
 * takes another path above 64 rows. On Hopper that is a dense path where the bank is LSW_BF16 and
 * its slots together may have at most 128 ranks (each the targets' largest rank_cap, in steps of
 * 16): A x, scaled, is rounded to bf16 there, as B is already. It reads the adapters of all slots,
 * and no row sees those that are not in its route (but that the last bits may differ where B of one
 * of them is not finite: the row's sum is then made anew, in another order).
 *
 * Two launches on CUDA, three above 64 rows in 16 bits but on the dense path; enqueued, and may be
 * captured: one graph serves every route and every refill of a slot. Up to 64 rows, and in f32,
 * the adapters are read again for each row. lsw_context_take_odd tells of ids out of range (but -1)
 * and of coefficients that are not finite.
 */
lsw_status lsw_apply(const struct lsw_bank *bank,
                     void *stream,
                     uint64_t first,
                     const struct lsw_mat *x,
                     const struct lsw_routes *routes,
                     const struct lsw_mat_mut *y,
                     uint64_t count,
                     void *workspace,
                     uint64_t workspace_bytes);

/**
 * lsw_apply to zeros: y[i][r] = sum over the entries ..., whatever y held, and zeros for a row that
 * no adapter touches. For a base product behind it that adds to what it finds (beta = 1). y then
 * need not wait for that product, but is written before it; many rows of y are not read here, and
 * the product reads them while it multiplies. Two roundings, as with lsw_apply, but that of a small
 * sum in the place of that of the product. All else is as for lsw_apply. On CUDA each y is a memset
 * more, but on the dense path.
 */
lsw_status lsw_apply_into(const struct lsw_bank *bank,
                          void *stream,
                          uint64_t first,
                          const struct lsw_mat *x,
                          const struct lsw_routes *routes,
                          const struct lsw_mat_mut *y,
                          uint64_t count,
                          void *workspace,
                          uint64_t workspace_bytes);

/**
 * The first half of lsw_apply, into the workspace, for the targets first <= i < first + count: all
 * that does not need y, so that it may run beside the base product that writes y, on another
 * stream; one of high priority, since its few blocks would otherwise wait behind the product's. Of
 * up to 64 rows in 16 bits that is everything but the addition to y; of others, A x of all
 * adapters in the rows' routes.
 *
 * The second half, lsw_apply_finish, is ordered after both and gets the same targets, routes and
 * workspace. In between nobody writes the workspace, ids, gates and row_map, nor any slot of the
 * bank. Together they give the bits of lsw_apply; what is odd is known after both. Two launches on
 * CUDA, in f32 and on the dense path one; enqueued, and may be captured.
 */
lsw_status lsw_apply_begin(const struct lsw_bank *bank,
                           void *stream,
                           uint64_t first,
                           uint64_t count,
                           const struct lsw_mat *x,
                           const struct lsw_routes *routes,
                           void *workspace,
                           uint64_t workspace_bytes);

/**
 * The second half of lsw_apply: adds to y what the first has left in the workspace. See
 * lsw_apply_begin. One launch; enqueued, and may be captured.
 */
lsw_status lsw_apply_finish(const struct lsw_bank *bank,
                            void *stream,
                            uint64_t first,
                            const struct lsw_routes *routes,
                            const struct lsw_mat_mut *y,
                            uint64_t count,
                            const void *workspace,
                            uint64_t workspace_bytes);

/**
 * Bytes of workspace that lsw_linear needs for the bank's targets first <= i < first + count,
 * which share their input, and for this many rows with routes of k.
 */
lsw_status lsw_linear_workspace_bytes(const struct lsw_bank *bank,
                                      uint64_t first,
                                      uint64_t count,
                                      uint64_t rows,
                                      uint64_t k,
                                      uint64_t *bytes);

/**
 * The product of 1 to 8 rows with the weights of a group of targets that share their input (q, k,
 * v; gate, up), and what lsw_apply would add: y[i][r] = W[i] x[r] + sum over the entries (id, gate)
 * of row r's route of gate * scale * B (A x[r]), with A, B and scale of slot id and target first +
 * i of the bank. One launch streams the weights, and does the adapters' work beside that.
 *
 * - weights, count matrices [out_features, in_features], 1 to 8, for the bank's targets from first
 *   on, whose in_features are equal; the bank's dtype. A set's merged weights serve as well as its
 *   base: then the adapters come on top.
 * - x [rows, in_features]: the bank's dtype; 0 to 8 rows.
 * - routes: as for lsw_apply; k = 0 for the product alone. A row of no item has no adapters.
 * - y, count matrices [rows, out_features]: LSW_F32, LSW_F16 or LSW_BF16, all of one dtype.
 *   Written only.
 * - workspace, at least lsw_linear_workspace_bytes, aligned to 16 bytes: its first 16 bytes are
 *   zeros before the first call. Every call leaves zeros there, so nobody clears them between
 *   calls or replays. Calls that share a workspace are ordered one after the other.
 *
 * Row strides are free everywhere; full speed needs addresses and rows (stride included) of
 * weights and x that are multiples of 16 bytes. The y share no memory with each other nor with
 * anything else of the call.
 *
 * Numbers: all operands enter as stored. The products and the sum over the route are in f32, in a
 * fixed order, on tensor cores for 16 bits; W x and what the adapters add are each such a sum, and
 * their sum is rounded once to y. A coefficient that is not finite propagates into its own row
 * alone. Deterministic, and a row's bits depend neither on the other rows nor on their number.
 *
 * One launch on CUDA, as a dependent of the one before where the card knows that (9.0 and newer);
 * its blocks wait for each other, but none for longer than a millisecond. Enqueued, and may be captured: one graph serves every route and every refill of a slot. The
 * weights are read once for all rows, and the adapters once for each row. lsw_context_take_odd
 * tells of ids out of range (but -1) and of coefficients that are not finite.
 */
lsw_status lsw_linear(const struct lsw_bank *bank,
                      void *stream,
                      const struct lsw_linear_options *options,
                      uint64_t first,
                      const struct lsw_mat *weights,
                      const struct lsw_mat *x,
                      const struct lsw_routes *routes,
                      const struct lsw_mat_mut *y,
                      uint64_t count,
                      void *workspace,
                      uint64_t workspace_bytes);

/**
 * Measures all of calibration but its last two fields on the stream's device, in LSW_BF16: reading
 * and copying a large vector, an empty launch, a switch of large matrices, lsw_apply to one row and
 * to more, and lsw_linear at matrices of two sizes; with 8 adapters of rank 16 at matrices of 4096
 * columns (512 on the CPU). calibration->struct_size is set by the caller; what it leaves out is
 * not written.
 *
 * The base product is the engine's, so its two figures are not measured: on CUDA they are set to
 * what cuBLAS reaches on an H200 (0.79 of Llama-2-7B's, q k v and gate up fused, and 750 in 16
 * bits), on the CPU to 1 and 0.1. An engine that knows better overwrites them.
 *
 * To be called once, cold, while nothing else runs: it allocates 1 GiB (64 MiB on the CPU) and
 * frees it, and takes about 0.1 s. On CUDA it works on a stream of its own, synchronises, and cannot
 * be captured.
 */
lsw_status lsw_calibrate(const struct lsw_context *context,
                         void *stream,
                         struct lsw_calibration *calibration);

/**
 * Predicts what each strategy costs, in microseconds a token. Pure arithmetic on the host, which
 * needs no device.
 *
 * With W the bytes of all matrices, E those of one token's k adapters (the mean over the slots), Y
 * those of a row's inputs and twice its outputs, C the number of groups, B the batch, R the tokens
 * per route, and the figures of the calibration:
 *
 * - product(n) = max(W / (product_share * read), 2 n * weights / product_tflops): the engine's own
 *   product of n rows; or, if that is less, lsw_linear without adapters for every 8 of them:
 *   n / min(n, 8) * (C * linear_call + W / linear_rate);
 * - switch = (launch + (2 W + E) / switch_rate) / R + product(m) / m, with m = min(B, R): merged weights
 *   serve one route at a time, so a batch of more routes falls apart;
 * - apply = (product(B) + C * apply_call + D / read + B (E / rows + Y / copy)) / B, where D is what
 *   the batch's adapters come to if each is read once: N (1 - (1 - k/N)^(B/R)) of N slots for B/R
 *   random routes, and rows is few_rows up to 64 rows and in LSW_F32, many_rows above;
 * - linear = (C * (linear_call + linear_adapters) + W / linear_rate + D / read + B E / few_rows)
 *   / B, up to 8 rows.
 *
 * So a switch is right from R = (launch + (2 W + E) / switch_rate) / (min(apply, linear) -
 * product(B) / B) on, where that is at least B.
 */
lsw_status lsw_advise(const struct lsw_calibration *calibration,
                      const struct lsw_workload *workload,
                      struct lsw_advice *advice);

/**
 * Routes each token to its k best experts (LoRA-Switch, arXiv 2405.17741, section 4.1, and the
 * options' sources).
 *
 * - logits [T, N] of LSW_F32, LSW_F16 or LSW_BF16; N from 1 to 1024.
 * - ids [T, k] LSW_I32 and gates [T, k] LSW_F32, both written; k is their width, at most 32 and
 *   the experts that there are to choose from. Outputs share no memory with anything else.
 *
 * The k largest choice scores win, descending, ties to the lower id. The choice score is the logit
 * itself, since every score grows with it; with a bias it is score + bias, and where groups are
 * summed it is the score, both in f32, which may tie or swap what differs by less than the
 * rounding of scores.
 *
 * Padding tokens get the ids -1 and the gates 0; their logits are not read, so a CUDA graph that
 * was captured for T tokens serves fewer. A valid count that is negative counts as 0.
 *
 * Odd values: NaN counts as -inf, +inf as the largest f32. So a softmax is shared equally by
 * logits of +inf, and gates are never NaN. In a row with nothing above -inf all scores are 0,
 * hence all gates, and ids are chosen by bias and id alone. Ids of a token that is no padding are
 * always distinct and in range. Where the sum of the chosen scores underflows to 0, as sigmoids of
 * logits below -88 do, the gates are 0. lsw_context_take_odd tells that a NaN, a +inf or such a
 * row was met.
 *
 * Deterministic, and a token's bits depend neither on the other tokens nor on their number. One
 * launch, no workspace; enqueued, and may be captured.
 */
lsw_status lsw_route(const struct lsw_context *context,
                     void *stream,
                     const struct lsw_route_options *options,
                     const struct lsw_mat *logits,
                     const struct lsw_mat_mut *ids,
                     const struct lsw_mat_mut *gates);

/**
 * Bytes of workspace that lsw_route_counted needs: 0 on a CPU context.
 */
lsw_status lsw_route_workspace_bytes(const struct lsw_context *context, uint64_t *bytes);

/**
 * Like lsw_route, and counts the tokens of each expert: counts [1, N] LSW_I32, overwritten;
 * padding counts for none. One launch.
 *
 * workspace: at least lsw_route_workspace_bytes, aligned to 16 bytes; zeros before the first call.
 * Every call leaves its zeros behind, whatever else it was called for, so nobody clears it between
 * calls or replays; calls that share a workspace, those of lsw_gate included, are in flight on one
 * stream at a time. After a failed launch it must be zeroed again. NULL where 0 bytes are needed.
 */
lsw_status lsw_route_counted(const struct lsw_context *context,
                             void *stream,
                             const struct lsw_route_options *options,
                             const struct lsw_mat *logits,
                             const struct lsw_mat_mut *ids,
                             const struct lsw_mat_mut *gates,
                             const struct lsw_mat_mut *counts,
                             void *workspace,
                             uint64_t workspace_bytes);

/**
 * Bytes of workspace that lsw_gate needs for tokens T, experts N and hidden H: 0 on a CPU context.
 * It never falls where T, N or H grow up to T = 64; beyond, logits [T, N] are kept there.
 */
lsw_status lsw_gate_workspace_bytes(const struct lsw_context *context,
                                    uint64_t tokens,
                                    uint64_t experts,
                                    uint64_t hidden,
                                    uint64_t *bytes);

/**
 * Projects hidden states to logits and routes them, logits = x weight^T + weight_bias: the router
 * of LoRA-Switch (arXiv 2405.17741, section 4.1) as one operation.
 *
 * - x [T, H] and weight [N, H] (as torch.nn.Linear keeps it) of LSW_F32, LSW_F16 or LSW_BF16, the
 *   same for both; H is anything, N from 1 to 1024. Loads are of 16 bytes where addresses and row
 *   bytes (stride included) of both are multiples of 16.
 * - weight_bias [1, N] of the same type; NULL: none.
 * - ids, gates, the options and odd values: as for lsw_route; the logits are those of f32, never
 *   rounded. Padding tokens do not influence others.
 * - counts [1, N] LSW_I32: as for lsw_route_counted; NULL: none.
 * - workspace: at least lsw_gate_workspace_bytes, aligned to 16 bytes. Zeros before the first
 *   call; every call leaves it ready for the next, of whatever shape, if it is large enough for
 *   that: nobody else writes to it. As for lsw_route_counted, calls that share one are in flight
 *   on one stream at a time, and after a failed launch it must be zeroed again. NULL where 0
 *   bytes are needed.
 *
 * Products and sums are in f32 in an order that H alone decides: a token's bits depend neither on
 * T nor on the other tokens. One launch up to 64 tokens, two beyond; enqueued, and may be captured.
 */
lsw_status lsw_gate(const struct lsw_context *context,
                    void *stream,
                    const struct lsw_route_options *options,
                    const struct lsw_mat *x,
                    const struct lsw_mat *weight,
                    const struct lsw_mat *weight_bias,
                    const struct lsw_mat_mut *ids,
                    const struct lsw_mat_mut *gates,
                    const struct lsw_mat_mut *counts,
                    void *workspace,
                    uint64_t workspace_bytes);

/**
 * Bytes of workspace that lsw_permute needs for items = T k ids over this many experts: 0 on a CPU
 * context.
 */
lsw_status lsw_permute_workspace_bytes(const struct lsw_context *context,
                                       uint64_t items,
                                       uint64_t experts,
                                       uint64_t *bytes);

/**
 * Sorts the items (t, j) of ids by expert, stably: items of one expert keep their order t k + j.
 *
 * - ids [T, k], k at most 32; -1, or any id outside 0 to experts - 1, drops the item
 *   (lsw_context_take_odd reports ids but for -1).
 * - offsets, experts + 1 elements: expert e has the rows from offsets[e] on, before offsets[e +
 *   1]; the last is the number R of rows.
 * - row_map, T k elements: row -> item t k + j; -1 from R on.
 * - inverse [T, k]: item -> row; -1 for one that was dropped.
 * - workspace, at least lsw_permute_workspace_bytes, aligned to 4 bytes; its content does not
 *   matter, and it is free again when the work is done. NULL where 0 bytes are needed.
 *
 * All matrices are LSW_I32, none shares memory with another. experts from 1 to 65536, T k below
 * 2^31. Exact and deterministic. On CUDA one launch for up to 1024 items, else two; above 1024
 * experts six (one of them clears a histogram). Enqueued, and may be captured.
 */
lsw_status lsw_permute(const struct lsw_context *context,
                       void *stream,
                       uint64_t experts,
                       const struct lsw_mat *ids,
                       const struct lsw_mat_mut *offsets,
                       const struct lsw_mat_mut *row_map,
                       const struct lsw_mat_mut *inverse,
                       void *workspace,
                       uint64_t workspace_bytes);

/**
 * The sizes for this many items, T k.
 */
lsw_status lsw_permute_get_sizes(const struct lsw_context *context,
                                 const struct lsw_permute_options *options,
                                 uint64_t items,
                                 struct lsw_permute_sizes *sizes);

/**
 * lsw_permute for some of the experts, with rows padded to blocks. What differs:
 *
 * - Experts count from options->first on in offsets (last - first + 1 elements) and block_experts.
 *   Ids of the others drop the item, and are not reported.
 * - offsets: multiples of the block; an expert's items come first in its segment, and the last
 *   offset is the padded total.
 * - row_map, as long as lsw_permute_get_sizes says: rows that pad, and all from the last offset on, hold
 *   the filler.
 * - block_experts [blocks] LSW_I32, or NULL: the expert of each block of rows; -1 from the last
 *   offset on. With row_map and the last offset it is what vLLM's moe_align_block_size gives, in a
 *   stable order.
 *
 * options may not be NULL: nothing stands for the number of experts.
 */
lsw_status lsw_permute_with(const struct lsw_context *context,
                            void *stream,
                            const struct lsw_permute_options *options,
                            const struct lsw_mat *ids,
                            const struct lsw_mat_mut *offsets,
                            const struct lsw_mat_mut *row_map,
                            const struct lsw_mat_mut *inverse,
                            const struct lsw_mat_mut *block_experts,
                            void *workspace,
                            uint64_t workspace_bytes);

/**
 * Copies each token's row to the rows of its experts: rows[inverse[t, j]] = x[t].
 *
 * - x [T, D], rows [R, D]: any dtype, the same for both; bytes are moved as they are. Rows of 1-byte
 *   elements (fp8) are LSW_U8, and another call with the same map moves their scales.
 * - inverse [T, k] LSW_I32 from lsw_permute; R may be anything. Entries that name no row (-1, or R
 *   and above) are skipped; rows that no entry names (padding) are left alone. Of a row that several
 *   entries name, which lsw_permute never makes, each element is from one of those tokens.
 *
 * Every D, stride and offset works; 16-byte accesses serve where addresses and rows (stride
 * included) are multiples of 16 bytes. rows shares no memory with the others. Reads each row of x
 * once, and none of a token without rows. One launch; enqueued, and may be captured.
 */
lsw_status lsw_gather(const struct lsw_context *context,
                      void *stream,
                      const struct lsw_mat *x,
                      const struct lsw_mat *inverse,
                      const struct lsw_mat_mut *rows);

/**
 * Adds up each token's weighted results: y[t] = sum over j of gates[t, j] * rows[inverse[t, j]].
 *
 * - rows [R, D] and y [T, D]: LSW_F32, LSW_F16 or LSW_BF16, the same for both. inverse [T, k]
 *   LSW_I32, gates [T, k] LSW_F32, k at most 32.
 * - Entries of inverse that name no row (-1) add nothing, whatever their gate; a token with none
 *   gets zeros.
 *
 * Every D, stride and offset works; 16-byte accesses serve where addresses and rows (stride
 * included) are multiples of 16 bytes. Sums in f32, j ascending, one rounding: deterministic, no
 * atomics, and a token's bits do not depend on the other tokens. y shares no memory with the
 * others. One launch; enqueued, and may be captured.
 */
lsw_status lsw_combine(const struct lsw_context *context,
                       void *stream,
                       const struct lsw_mat *rows,
                       const struct lsw_mat *inverse,
                       const struct lsw_mat *gates,
                       const struct lsw_mat_mut *y);

/**
 * lsw_combine with y[t] = residual[t] + scale * sum, in f32 as well: still one rounding.
 */
lsw_status lsw_combine_with(const struct lsw_context *context,
                            void *stream,
                            const struct lsw_combine_options *options,
                            const struct lsw_mat *rows,
                            const struct lsw_mat *inverse,
                            const struct lsw_mat *gates,
                            const struct lsw_mat_mut *y);

/**
 * y = factor * x: reads and writes every element once, as fast as a kernel without an adapter can.
 * A switch moves the same bytes, so the ratio of the two in one run is what the adapters cost.
 *
 * x and y are vectors [1, n] of LSW_F32, LSW_F16 or LSW_BF16, the same for both, with addresses
 * that are multiples of 16 bytes. One launch; enqueued, and may be captured.
 */
lsw_status lsw_measure_scale(const struct lsw_context *context,
                             void *stream,
                             float factor,
                             const struct lsw_mat *x,
                             const struct lsw_mat_mut *y);

/**
 * y = factor * y; all else as for lsw_measure_scale.
 */
lsw_status lsw_measure_scale_in_place(const struct lsw_context *context,
                                      void *stream,
                                      float factor,
                                      const struct lsw_mat_mut *y);

/**
 * Fills a vector y with size * uniform(-1, 1): element i depends on the seed and i alone, and is
 * the same on both backends. All else as for lsw_measure_scale.
 */
lsw_status lsw_measure_fill_random(const struct lsw_context *context,
                                   void *stream,
                                   uint64_t seed,
                                   float size,
                                   const struct lsw_mat_mut *y);

/**
 * Reads a vector x once, as a pass over a model's weights does: *sink ^= the xor of its bytes taken
 * as little-endian 32-bit words, the last one filled up with zeros. The sink is one word in the
 * context's memory, there so that no load can be left out. All else as for lsw_measure_scale.
 */
lsw_status lsw_measure_read(const struct lsw_context *context,
                            void *stream,
                            const struct lsw_mat *x,
                            int32_t *sink);

/**
 * Writes each run of x, 8 KB, `times` times to y: the bytes of a gather in its mix of reads and
 * writes, without indices.
 *
 * x [1, n] and y [1, n * times] are vectors of LSW_F32, LSW_F16 or LSW_BF16, the same for both, with
 * addresses that are multiples of 16 bytes; n in whole runs, times at most 32. One launch; enqueued,
 * and may be captured.
 */
lsw_status lsw_measure_repeat(const struct lsw_context *context,
                              void *stream,
                              uint64_t times,
                              const struct lsw_mat *x,
                              const struct lsw_mat_mut *y);

/**
 * Writes the xor of each `times` runs of x, 8 KB, to a run of y: the bytes of a combine in its mix
 * of reads and writes, without indices. As lsw_measure_repeat, with x and y the other way round.
 */
lsw_status lsw_measure_fold(const struct lsw_context *context,
                            void *stream,
                            uint64_t times,
                            const struct lsw_mat *x,
                            const struct lsw_mat_mut *y);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* LORA_SWITCH_H */
