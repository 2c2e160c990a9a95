/* Every argument struct and every geometry constant that host and device share.
 * C99; included by the .cu files and read by bindgen (src/cuda/args.rs).
 * Fixed-width members and explicit padding; addresses are uint64_t, so that the Rust side stays Copy; strides count elements.
 * Constants are anonymous enums, since bindgen drops a #define that holds an expression. */
#ifndef LSW_ARGS_H
#define LSW_ARGS_H

#include <stdint.h>

enum {
    LSW_MAX_EXPERTS = 1024, /* of a router */
    LSW_MAX_K = 32,         /* experts a token; one lane each */
    LSW_MAX_RANK = 256,

    LSW_MAX_GROUPS = 32, /* of a router's experts; one lane each */

    LSW_ROUTE_THREADS = 128, /* one warp a token */
    LSW_ROUTE_FEW = 1024,    /* tokens: up to so many latency counts, beyond them instructions */
    LSW_ROUTE_NARROW = 8,    /* experts a lane that the kernel with few registers serves; the wide one serves 32 */

    LSW_GATE_THREADS = 256,
    LSW_GATE_RANKS = 8,     /* blocks that share a sum over the hidden state: a cluster, where the card has them */
    LSW_GATE_CHAIN = 64,    /* elements of it that a warp multiplies at a time */
    LSW_GATE_EXPERTS = 16,  /* a block computes logits of 16 experts for 8 tokens, ... */
    LSW_GATE_TOKENS = 8,
    LSW_GATE_MANY = 32,     /* ... or of 32 for 32: 16-bit types in clusters, beyond 8 tokens */
    LSW_GATE_FUSED = 64,    /* tokens up to which one launch does everything */
    LSW_GATE_WORDS = 4 * 64 * 8 * 1024, /* bytes of words in its workspace, at most */
    LSW_GATE_SHARED = 46 * 1024, /* bytes a block; asserted by the kernel; with what it has beside, below 48 KB */
    LSW_GATE_SHARED_MANY = 66 * 1024,
    LSW_GATE_PROJECT_TOKENS = 32, /* that a warp multiplies beyond that */
    LSW_GATE_PROJECT_TOKENS_32BIT = 8,
    LSW_GATE_TILE_EXPERTS = 64, /* of a block that does the same by tiles, where rows are aligned */
    LSW_GATE_TILE_TOKENS = 128,
    LSW_GATE_STAGES = 4,
    LSW_GATE_SHARED_TILE = 4 * (64 + 128) * 64 * 2,

    LSW_BANK_THREADS = 64,
    LSW_BANK_BATCH = 64, /* factors that one launch writes: they travel as kernel arguments (19 KB) */

    LSW_SWITCH_CONSUMERS = 128,     /* threads that compute */
    LSW_SWITCH_THREADS_16BIT = 160, /* and a warp that fetches */
    LSW_SWITCH_THREADS_32BIT = 192, /* and in f32 one that splits */
    LSW_SWITCH_TILE_ROWS = 64,
    LSW_SWITCH_TILE_COLS = 128,
    LSW_SWITCH_SHARED_16BIT = 74 * 1024, /* bytes a block; asserted by the kernel */
    LSW_SWITCH_SHARED_32BIT = 98 * 1024,
    LSW_SWITCH_RUN = 8, /* tiles, one below the other, that a block takes at a time where there are many */

    /* The Hopper path. */
    LSW_SWITCH90_THREADS = 512, /* two warpgroups that move data, two that compute */
    LSW_SWITCH90_TILE = 128,
    LSW_SWITCH90_GROUPS = 1024, /* of 32 targets: what one launch can plan */
    LSW_SWITCH90_SHARED = 227 * 1024,

    /* The same for small sets. */
    LSW_SMALL_THREADS = 256,
    LSW_SMALL_SHARED = 40 * 1024,  /* bytes a block, behind the first multiple of 1,024, */
    LSW_SMALL_PANELS = 64 * 1024,  /* and behind them */
    LSW_SMALL_TARGETS = 32,        /* one lane each */
    LSW_SMALL_HELD = 4,            /* products whose panels of B a block keeps for its tiles; */
    LSW_SMALL_LONG = 160 * 1024,   /* bytes in the place of LSW_SMALL_PANELS where they are in registers, and */
    LSW_SMALL_SLOTS = 222,         /* slots that there may be then, one thread each */

    LSW_PERMUTE_MAX_EXPERTS = 65536, /* adapter x expert pairs */
    LSW_PERMUTE_DIGITS = 1024,       /* experts that one pass sorts by; more take two passes of 8 bits */
    LSW_PERMUTE_THREADS = 512,
    LSW_PERMUTE_ROUNDS = 2,          /* items a thread ranks at a time: a tile is 1,024 items; up to one takes a single launch */
    LSW_PERMUTE_MAX_BLOCKS = 128,    /* above it a block sorts several tiles */
    LSW_MOVE_THREADS = 256,
    LSW_COMBINE_PACKS = 2, /* of 16 bytes a lane, of each of LSW_COMBINE_ROWS rows in flight */
    LSW_COMBINE_ROWS = 2,

    LSW_APPLY_TARGETS = 8,    /* of one call: they share their input */
    LSW_SHRINK_THREADS = 256, /* on the same rows of A */
    LSW_SHRINK_ROWS = 4,      /* of A a block, where there are blocks enough; else one */
    LSW_EXPAND_THREADS = 128, /* a row of B each */
    LSW_EXPAND_CHUNKS = 8,    /* at most as many times LSW_EXPAND_THREADS outputs a block */

    /* Of few rows of 16 bits. */
    LSW_FEW_ROWS = 32,         /* that share B */
    LSW_FEW_THREADS = 256,     /* a block of shrink, */
    LSW_FEW_RANKS = 16,        /* with so many rows of A */
    LSW_FEW_COLUMNS = 1024,    /* and so many columns of x: a slice, which expand adds up, */
    LSW_FEW_SLICES = 32,       /* or a multiple of them, so that there are no more slices than these */
    LSW_FEW_EXPAND_THREADS = 256,
    LSW_FEW_OUTPUTS = 128,     /* a block of expand */
    LSW_FEW_STEPS = 8,         /* expand: of 16 ranks, in registers at a time */
    LSW_FEW_SHARED = 64 * 1024,
    LSW_ADD_THREADS = 128,     /* each adds to four outputs */

    /* Of many rows of 16 bits, on the tensor cores. */
    LSW_APPLY_MANY = 64,   /* there are more */
    LSW_MANY_SHRINK_THREADS = 256, /* a warp for each slice of in_features */
    LSW_MANY_SHRINK_ROWS = 32,     /* a block */
    LSW_MANY_EXPAND_THREADS = 128,
    LSW_MANY_EXPAND_ROWS = 64,     /* a block, 16 a warp */
    LSW_MANY_OUTPUTS = 64,         /* that a block does at a time */
    LSW_MANY_CHUNKS = 8,           /* at most as many times that many outputs a block */
    LSW_MANY_SPLITS = 8,           /* at most as many blocks share the ranks of their rows */
    LSW_STRIP_THREADS = 192,       /* expand where B fits into shared memory */
    LSW_STRIP_BLOCKS = 2,          /* so many run on a multiprocessor, if its memory is enough */
    LSW_STRIP_OUTPUTS = 128,       /* of which a block has B at a time */
    LSW_STRIP_SLOTS = 32,          /* at most so many */
    LSW_STRIP_STEP_BYTES = 4096,   /* of B: 16 ranks of a slot */
    LSW_STRIP_WARP_BYTES = 8192,   /* of y: two tiles a warp */
    LSW_STRIP_ROWS = 16,           /* a warp, at a time */
    LSW_ORDER_THREADS = 1024,
    LSW_ORDER_BUCKETS = 4096,

    /* The same on Hopper: one dense product with all slots. */
    LSW_DENSE_RANKS = 128,      /* of all slots together, at most */
    LSW_DENSE_STEP = 16,        /* each slot has a multiple of so many */
    LSW_SHRINK90_THREADS = 512, /* a warpgroup that moves data, three that compute */
    LSW_SHRINK90_ROWS = 192,    /* a block */
    LSW_SHRINK90_COLUMNS = 128, /* of the products, a block */
    LSW_SHRINK90_SHARED = 227 * 1024,
    LSW_EXPAND90_THREADS = 512, /* expand on Hopper: two warpgroups that move data, two that compute */
    LSW_EXPAND90_SLOTS = LSW_DENSE_RANKS / LSW_DENSE_STEP,
    LSW_EXPAND90_SHARED = 227 * 1024,

    LSW_LINEAR_TOKENS = 8,    /* of one call: the columns of a product of tensor cores */
    LSW_LINEAR_STREAMERS = 8, /* warps that stream weights */
    LSW_LINEAR_ADDERS = 4,    /* warps that see to the adapters */
    LSW_LINEAR_THREADS = 32 * (LSW_LINEAR_STREAMERS + LSW_LINEAR_ADDERS),
    LSW_LINEAR_BLOCKS = 2,    /* a multiprocessor */
    LSW_LINEAR_TILE = 16,     /* rows of the weights that a block's streamers share */
    LSW_LINEAR_LINE = 128,    /* bytes of each that a warp takes at a time */
    LSW_LINEAR_DEPTH = 3,     /* of those in a warp's ring */
    LSW_LINEAR_ONE_DEPTH = 6, /* the same for one token, whose lines are shorter */
    LSW_LINEAR_PATIENCE = 2000000, /* cycles: about a millisecond */
    LSW_LINEAR_TERMS = 64,    /* entries of routes that a block has at hand */
    /* Bytes of shared memory a block, asserted by the kernel; and LSW_LINEAR_OUTPUT for each token and row on top. */
    LSW_LINEAR_SHARED = 78384,
    LSW_LINEAR_ONE_SHARED = 109104,
    LSW_LINEAR_OUTPUT = 4 * (LSW_LINEAR_STREAMERS + 1),
    LSW_LINEAR_SHARED_MAX = 112 * 1024, /* so that LSW_LINEAR_BLOCKS fit where there are 227 KB */

    LSW_MEASURE_THREADS = 1024,
    LSW_READ_THREADS = 512,
    LSW_READ_BLOCKS = 4, /* a multiprocessor */
    LSW_READ_PACKS = 4,  /* of 16 bytes, in flight a thread */
    LSW_RUN_PACKS = 512  /* a thread each: what repeat and fold keep together */
};

/* Bits of a status word: what was odd in device memory. Sticky; never an error. */
enum {
    LSW_ODD_LOGITS = 1,      /* route: NaN or +inf, or a row with nothing finite */
    LSW_ODD_ID = 2,          /* permute: an id below -1 or past the last expert */
    LSW_ODD_ROUTE_ID = 4,    /* switch, apply: the same for slots */
    LSW_ODD_COEFFICIENT = 8, /* switch, apply: not finite; in place it counted as zero */
    LSW_STALE_MERGE = 16     /* switch in place: a merged slot was given another adapter; its targets were left as they are */
};

/* taken[0] = word[0] and word[0] = 0, in one step. Word 0: nothing. */
typedef struct LswTakeArgs {
    uint64_t word, taken;
} LswTakeArgs;

/* The score of an expert. */
enum { LSW_SCORE_SOFTMAX = 0, LSW_SCORE_SIGMOID = 1, LSW_SCORE_SQRT_SOFTPLUS = 2 };

/* What blocks hand to each other. All zero before a launch and after it. */
typedef struct LswRouteWorkspace {
    uint32_t counts[LSW_MAX_EXPERTS];
    uint32_t counted;     /* blocks that have added their counts */
    uint32_t tickets[71]; /* of a gate: blocks that have begun, by who adds up */
} LswRouteWorkspace;

/* Flags of a route. */
enum {
    LSW_ROUTE_RENORMALIZE = 1,
    LSW_ROUTE_BY_SCORE = 2, /* scores decide, not logits: there is a bias, or groups are summed */
    LSW_ROUTE_SUM_TWO = 4,  /* a group's score is the sum of its two best, not its best */
    LSW_ROUTE_PADDED = 8,   /* there are valid or mask */
    LSW_ROUTE_COUNTED = 16, /* there are counts */
    LSW_ROUTE_ONLY_X_IS_NEW = 64, /* a gate: all but x was written before the launch before this one */
    LSW_ROUTE_PACKED = 32   /* a lane's experts are all there or none is, and 16-byte loads serve them: rows and bias are aligned */
};

/* What every launch needs comes first: a kernel's arguments are read through a cache that is cold. */
typedef struct LswRouteArgs {
    uint64_t logits, ids, gates;
    uint64_t logits_stride, ids_stride, gates_stride;
    uint32_t tokens, experts, k, flags;
    uint64_t status;
    float scale, softcap; /* softcap 0: none */
    uint32_t score;
    uint32_t groups, top_groups, group_experts;
    uint32_t group_lanes_log2; /* of 32 / groups, rounded down to a power of two */
    uint32_t lane_experts;     /* experts of a group over its lanes, rounded up */
    uint64_t bias;             /* float [experts], or 0 */
    uint64_t valid, mask;      /* int32_t [1], uint8_t [tokens], or 0 */
    uint64_t counts;           /* int32_t [experts], or 0 */
    uint64_t workspace;        /* LswRouteWorkspace, where counts or a gate's blocks meet */
} LswRouteArgs;

/* logits = x [tokens, hidden] weight^T [hidden, experts] + weight_bias, then the route. */
typedef struct LswGateArgs {
    LswRouteArgs route;
    uint64_t x, weight, weight_bias; /* weight_bias [experts], of weight's type, or 0 */
    uint64_t parts;                  /* fused: words [tokens, ranks, parts_stride], 0 before and after; else the logits, float [tokens, parts_stride] */
    uint64_t x_stride, weight_stride, hidden, parts_stride;
    uint32_t chains; /* of LSW_GATE_CHAIN elements, that a warp adds up in a row: LSW_GATE_RANKS blocks of its 8 make the hidden state */
    uint32_t tiles;  /* of the experts */
    uint32_t aligned;                /* x and weight: addresses and rows are multiples of 16 bytes */
    uint32_t clustered;              /* the blocks of a sum are a cluster */
} LswGateArgs;

enum { LSW_A_ALIGNED = 1, LSW_B_ALIGNED = 2 }; /* address and row bytes are multiples of 16 */

/* One adapter of one target: A [rank, in], B [out, rank]. Rank 0: there is none. */
typedef struct LswFactor {
    uint64_t a, b;
    uint32_t a_stride, b_stride;
    uint32_t rank;
    float scale;
    uint32_t generation; /* of the slot's content: differs after each refill */
    uint32_t flags;
} LswFactor;

/* A CUtensorMap. */
typedef struct LswMap {
    uint64_t opaque[16];
} LswMap;

/* Writes table[target * slots + slot] for `count` targets, and the maps of A and B beside it where maps != 0. */
typedef struct LswBankArgs {
    uint64_t table, maps;
    uint32_t slots, slot, first_target, count;
    LswFactor factors[LSW_BANK_BATCH];
    LswMap factor_maps[LSW_BANK_BATCH][2];
} LswBankArgs;

enum {
    LSW_WEIGHT_ALIGNED = 1, /* W and base: address and row stride are multiples of 16 bytes */
    LSW_WEIGHT_BOXES = 2,   /* so are the bytes of a row: the copy engine stores whole 16 bytes */
    LSW_WEIGHT_BLOCKS = 4   /* its columns are whole blocks of 64: maps of W, W_base and A are [cols / 64][rows][64] */
};

typedef struct LswTarget {
    uint64_t weight, base; /* base == weight: in place */
    uint64_t weight_stride, base_stride;
    uint32_t rows, cols;
    uint32_t flags;
    uint32_t tiles;
} LswTarget;

/* One entry of the route that a target holds merged. */
typedef struct LswMerged {
    int32_t slot;
    float coefficient;
    uint32_t generation;
} LswMerged;

enum { LSW_UNKNOWN = 0x7fffffff }; /* a merged count that equals none: the first call writes everything */

typedef struct LswSwitchState {
    uint32_t next_tile;   /* work queue over the tiles of all changed targets; the last block resets it */
    uint32_t blocks_done; /* likewise */
    uint32_t status;
    uint32_t padding;
} LswSwitchState;

/* Which targets a launch serves. */
enum { LSW_PATH_ALL = 0, LSW_PATH_BOXES = 1, LSW_PATH_OTHERS = 2 };

typedef struct LswSwitchArgs {
    uint64_t targets;      /* LswTarget [all targets] */
    uint64_t factors;      /* LswFactor [all targets, slots] */
    uint64_t merged;       /* LswMerged [all targets, k_max] */
    uint64_t merged_count; /* uint32_t [all targets] */
    uint64_t state;        /* LswSwitchState */
    uint64_t ids, gates;   /* int32_t [k], float [k] */
    uint32_t first, last;  /* the targets of this call */
    uint32_t slots, k, k_max;
    uint32_t in_place;
    uint64_t factor_maps; /* LswMap [all targets, slots, 2], of A and B; Hopper path */
    uint64_t target_maps; /* LswMap [all targets, 2], of W and W_base */
    uint32_t path;
    uint32_t run; /* portable path: tiles, one below the other, that a block takes at a time; small sets: tiles beyond its first whose W it
                     brings to L2 in advance */
    uint64_t arrivals;    /* of a small set, uint32_t [all targets]: blocks that have begun; zero before and after */
    uint32_t panel_depth; /* of a small set: 16, 32 or 64 of a rank, the most that a panel can have */
    uint32_t padding;
} LswSwitchArgs;

/* Copies what a target holds merged: ids and coefficients [k_max], padded with -1 and 0. */
typedef struct LswCurrentArgs {
    uint64_t merged, merged_count;
    uint64_t ids, coefficients;
    uint32_t target, k_max;
} LswCurrentArgs;

/* One pass: a stable sort of items by a digit of their experts, which count from `first` on. Zero: an address that there is none of. */
typedef struct LswPermuteArgs {
    uint64_t ids, offsets, row_map, inverse, block_experts, status;
    uint64_t counts;             /* uint32_t [blocks, digits] */
    uint64_t histogram;          /* uint32_t [experts]: items of each; of a sort in two passes, as are the next three */
    uint64_t begin;              /* uint32_t [experts + 1]: where they begin without padding */
    uint64_t order, order_count; /* uint32_t [items], [1]: the items as the first pass left them */
    uint64_t ids_stride, inverse_stride;
    uint32_t items, k;
    uint32_t all_experts, first, experts;
    uint32_t digits, digit_bits, digit_shift, digit_mask;
    uint32_t block, rows, row_blocks; /* rows: of row_map; in blocks: of block_experts */
    int32_t filler;
    uint32_t blocks, run; /* a block sorts `run` items; one that is alone at most a tile */
    uint32_t padding;
} LswPermuteArgs;

/* rows[inverse[t, j]] = x[t], in units of 1, 2, 4 or 16 bytes; entries that name no row are skipped. */
typedef struct LswGatherArgs {
    uint64_t x, inverse, rows;
    uint64_t x_stride, rows_stride, units; /* in units */
    uint64_t inverse_stride;
    uint32_t k, row_count;
    uint32_t warps, pieces; /* warps = tokens * pieces */
} LswGatherArgs;

/* y[t] = residual[t] + scale * sum_j gates[t, j] * rows[inverse[t, j]]; residual 0: there is none */
typedef struct LswCombineArgs {
    uint64_t rows, inverse, gates, residual, y;
    uint64_t rows_stride, inverse_stride, gates_stride, residual_stride, y_stride, cols;
    uint32_t k, row_count;
    uint32_t warps, pieces; /* as above */
    float scale;
    uint32_t aligned;
} LswCombineArgs;

/* A target of a call that leaves its weight as it is. */
typedef struct LswApplyTarget {
    uint64_t factors; /* LswFactor [slots] */
    uint64_t y, y_stride;
    uint32_t out, rank_cap;
    uint32_t column;    /* where its ranks begin in a row of the products: a multiple of 8 */
    uint32_t y_aligned; /* address and row bytes are multiples of 16 */
} LswApplyTarget;

/* y[r] += sum over p of c B (A x[r]); products[r, p] = A x[r] between the two halves. */
typedef struct LswApplyArgs {
    uint64_t x, ids, gates;
    uint64_t row_map;  /* int32_t [rows], or 0: row r has the route of item r */
    uint64_t order;    /* many rows of 16 bits: uint32_t [rows], rows of like routes behind each other; padded to 16 bytes; then canonical
                          routes, uint32_t slot and float gate [rows, k] */
    uint64_t products; /* float [rows, k, width] */
    uint64_t status;
    uint64_t x_stride, ids_stride, gates_stride;
    uint32_t rows, items, in, k, slots;
    uint32_t count;       /* of targets */
    uint32_t width;       /* a multiple of 8 */
    uint32_t units;       /* blocks of all targets for a row, an entry of its route, or a group of rows */
    uint32_t shrink_rows; /* 1 or LSW_SHRINK_ROWS */
    uint32_t splits;      /* of few rows of 16 bits, slices of x; of many, shrink: blocks that share the ranks of their rows */
    uint32_t chunks;      /* expand: of LSW_EXPAND_THREADS outputs a block; of many rows, of LSW_MANY_OUTPUTS */
    uint32_t y_type;      /* 0 f32, 1 f16, 2 bf16 */
    uint32_t x_aligned;   /* address and row bytes are multiples of 16 */
    uint32_t candidates;  /* few rows of 16 bits, shrink: all slots, or the entries of all routes if they are fewer */
    uint32_t begins[LSW_APPLY_TARGETS]; /* few rows of 16 bits: units before each target; behind the last, all ones */
    LswApplyTarget targets[LSW_APPLY_TARGETS];
} LswApplyArgs;

/* The first half on Hopper: A x of all slots, scaled; zeros for those that a row does not use. */
typedef struct LswShrink90Args {
    LswMap x;          /* [rows, in], boxes of LSW_SHRINK90_ROWS x 64 columns; not where x is not aligned. At a multiple of 64 bytes */
    uint64_t products; /* of the adapters' type, [rows, count, slots, depth] */
    uint64_t used;     /* uint32_t [count, used_stride]: bit i: the row uses slot i at the target; undefined past the last row */
    uint32_t depth;    /* of a slot: a multiple of 16 */
    uint32_t used_stride; /* a multiple of 128, at least rows */
    LswApplyArgs apply;
} LswShrink90Args;

/* A target of expand on Hopper. */
typedef struct LswExpand90Target {
    uint64_t factors; /* LswFactor [slots] */
    uint64_t maps;    /* LswMap [slots, 2], of A and B */
    uint64_t y, y_stride;
    uint32_t out;
    uint32_t begin; /* tiles of earlier targets */
} LswExpand90Target;

/* y[r] += sum of products[r] B, over all slots: a row has zeros for those that it does not use. */
typedef struct LswExpand90Args {
    LswMap maps[LSW_APPLY_TARGETS]; /* of y: boxes of 64 rows x 64 columns, swizzled over 128 bytes; not where y is changed in place */
    LswMap products_map; /* [rows, count, slots * depth]: boxes of 128 x 1 x 64, swizzled over 128 bytes */
    LswExpand90Target targets[LSW_APPLY_TARGETS];
    uint64_t products; /* bf16 [rows, count, slots, depth]; address a multiple of 16 */
    uint64_t used;     /* as above; address a multiple of 16 */
    uint32_t rows, slots;
    uint32_t count; /* of targets */
    uint32_t depth; /* of a slot: a multiple of 16; slots * depth is at most 128 */
    uint32_t y_type; /* 1 f16, 2 bf16; where y is changed in place also 0, f32 */
    uint32_t tiles;  /* of 128 rows x 128 outputs, a block; the first `longer` blocks have one more */
    uint32_t longer;
    uint32_t overwrites; /* y counts as zero, whatever it holds, and all of it is written */
    uint32_t used_stride; /* as above */
    uint32_t padding[3];  /* to a multiple of 64 bytes */
} LswExpand90Args;

/* A target of y[r] = round(y[r] + sums[r]). All zero: there is none. */
typedef struct LswAddTarget {
    uint64_t y, y_stride;
    uint64_t sums, sums_stride; /* float [rows, out]; address and row bytes are multiples of 16 */
    uint32_t out;
    uint32_t y_aligned; /* address and row bytes are multiples of 16 */
} LswAddTarget;

typedef struct LswAddArgs {
    LswAddTarget targets[LSW_APPLY_TARGETS];
} LswAddArgs;

/* What the blocks of a linear hand to each other. All zero before a launch and after it. */
typedef struct LswLinearHandOver {
    uint32_t ready; /* blocks whose part of A x is written */
    uint32_t done;  /* blocks that need no more of it */
    uint32_t padding[2];
} LswLinearHandOver;

/* y[r] = W x[r] + what `apply` would add, for the targets of `apply`, whose rows count through in order. */
typedef struct LswLinearArgs {
    LswApplyArgs apply;
    uint64_t hand_over; /* LswLinearHandOver */
    uint64_t weights[LSW_APPLY_TARGETS], weight_strides[LSW_APPLY_TARGETS];
    uint32_t blocks;        /* that compute A x: so many run at a time */
    uint32_t rounds;        /* tiles of a block: tile i is block i % blocks' */
    uint32_t tile_rows;     /* of a tile; the first `longer` tiles have one more */
    uint32_t longer;
    uint32_t whole;         /* weights and x: addresses and rows are multiples of 16 bytes */
    uint32_t only_x_is_new; /* all else was written before the launch before this one */
    uint32_t patience;      /* cycles that a block waits for the others before it does their part itself */
    uint32_t padding;
} LswLinearArgs;

/* Over `count` elements: y = factor * x, or y = factor * uniform(-1, 1). Over `count` bytes: y[0] ^= the words of x.
 * Over `count` packs of 16 bytes, in whole runs: each run of x `times` times to y, or the xor of each `times` runs of x to y. */
typedef struct LswMeasureArgs {
    uint64_t x, y, count, seed;
    float factor;
    uint32_t times;
} LswMeasureArgs;

#endif
