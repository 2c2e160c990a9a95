/* What C can get wrong, and what it is told: each call must fail with the status and words given here, and leave its
 * outputs as they were. On the CPU backend; nothing here needs a GPU. */
#include "lora_switch.h"

#include <float.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures = 0;

static void expect(int condition, const char *what, int line) {
    if (!condition) {
        fprintf(stderr, "line %d: %s; last error: \"%s\"\n", line, what, lsw_last_error());
        failures++;
    }
}
#define EXPECT(condition) expect(condition, #condition, __LINE__)
#define OK(call) expect((call) == LSW_OK, #call, __LINE__)

/* The call is refused, and the text has these words. */
#define REFUSED(call, words) \
    do { \
        expect((call) == LSW_INVALID_ARGUMENT, #call, __LINE__); \
        expect(strstr(lsw_last_error(), words) != NULL, #call " says \"" words "\"", __LINE__); \
    } while (0)

#define MISALIGNED(type, pointer) ((type *)(void *)((char *)(pointer) + 1))

static lsw_context *context;
static float w[4][8], base[4][8], a[2][8], b[4][2], logits[3][8], gates[3][2];
static int32_t ids[3][2];

static lsw_mat in(const void *data, uint64_t rows, uint64_t cols, int32_t dtype) {
    lsw_mat mat = {data, rows, cols, cols, dtype, 0};
    return mat;
}

static lsw_mat_mut out(void *data, uint64_t rows, uint64_t cols, int32_t dtype) {
    lsw_mat_mut mat = {data, rows, cols, cols, dtype, 0};
    return mat;
}

static void status(void) {
    EXPECT(strcmp(lsw_last_error(), "") == 0);
    EXPECT(lsw_version() == LSW_VERSION);
    EXPECT(strcmp(lsw_status_name(LSW_OK), "LSW_OK") == 0);
    EXPECT(strcmp(lsw_status_name(LSW_PANIC), "LSW_PANIC") == 0);
    EXPECT(strcmp(lsw_status_name(LSW_PANIC + 1), "unknown status") == 0);
    EXPECT(strcmp(lsw_status_name(-1), "unknown status") == 0);
}

static void contexts(void) {
    lsw_context *none = NULL;
    uint32_t odd = 77;
    REFUSED(lsw_context_create_cpu(1, NULL), "context is null; it must be an address");
    REFUSED(lsw_context_create_cpu(100000, &none), "threads is 100000; it must be at most 1024");
    EXPECT(none == NULL);
    REFUSED(lsw_context_warm(NULL, NULL), "context is null");
    REFUSED(lsw_context_warm(MISALIGNED(lsw_context, context), NULL), "a multiple of 8 bytes");
    REFUSED(lsw_context_take_odd(context, NULL, NULL), "odd is null");
    REFUSED(lsw_context_take_odd(NULL, NULL, &odd), "context is null");
    EXPECT(odd == 77);
    /* CUDA may or may not be here: both ways this is no device. */
    EXPECT(lsw_context_create_cuda(1000000, &none) != LSW_OK && none == NULL);
    EXPECT(lsw_context_create_from_cuda(NULL, &none) != LSW_OK && none == NULL);
    lsw_context_destroy(NULL);
    lsw_bank_destroy(NULL);
    lsw_switch_destroy(NULL);
}

static void *in_another_thread(void *unused) {
    (void)unused;
    EXPECT(strcmp(lsw_last_error(), "") == 0);
    REFUSED(lsw_context_warm(NULL, NULL), "context is null");
    return NULL;
}

static void last_error_is_per_thread(void) {
    uint32_t odd;
    pthread_t thread;
    REFUSED(lsw_context_take_odd(context, NULL, NULL), "odd is null");
    pthread_create(&thread, NULL, in_another_thread, NULL);
    pthread_join(thread, NULL);
    EXPECT(strstr(lsw_last_error(), "odd is null") != NULL);
    OK(lsw_context_take_odd(context, NULL, &odd)); /* success keeps it */
    EXPECT(strstr(lsw_last_error(), "odd is null") != NULL);
    EXPECT(lsw_last_cuda_result() == 0);
}

static void matrices(void) {
    lsw_mat l = in(logits, 3, 8, LSW_F32), bad = l;
    lsw_mat_mut i = out(ids, 3, 2, LSW_I32), g = out(gates, 3, 2, LSW_F32), other = i;
    memset(ids, 0x55, sizeof ids);
    memset(gates, 0x55, sizeof gates);
    REFUSED(lsw_route(NULL, NULL, NULL, &l, &i, &g), "context is null");
    REFUSED(lsw_route(context, NULL, NULL, NULL, &i, &g), "logits is null");
    REFUSED(lsw_route(context, NULL, NULL, &l, NULL, &g), "ids is null");
    REFUSED(lsw_route(context, NULL, NULL, &l, &i, NULL), "gates is null");
    REFUSED(lsw_route(context, NULL, NULL, MISALIGNED(lsw_mat, &l), &i, &g), "a multiple of 8 bytes");
    bad.data = NULL;
    REFUSED(lsw_route(context, NULL, NULL, &bad, &i, &g), "logits.data is null");
    bad.data = (const char *)logits + 2;
    REFUSED(lsw_route(context, NULL, NULL, &bad, &i, &g), "a multiple of 4 bytes");
    bad = l, bad.dtype = 5;
    REFUSED(lsw_route(context, NULL, NULL, &bad, &i, &g), "logits.dtype is 5");
    bad.dtype = -1;
    REFUSED(lsw_route(context, NULL, NULL, &bad, &i, &g), "logits.dtype is -1");
    bad.dtype = LSW_I32;
    REFUSED(lsw_route(context, NULL, NULL, &bad, &i, &g), "logits.dtype is i32; it must be f32 or f16 or bf16");
    bad = l, bad.reserved = 1;
    REFUSED(lsw_route(context, NULL, NULL, &bad, &i, &g), "logits.reserved is 1; it must be 0");
    bad = l, bad.stride = 7;
    REFUSED(lsw_route(context, NULL, NULL, &bad, &i, &g), "logits.stride is 7");
    bad.stride = UINT64_MAX;
    REFUSED(lsw_route(context, NULL, NULL, &bad, &i, &g), "logits.shape");
    bad = l, bad.rows = UINT64_MAX;
    REFUSED(lsw_route(context, NULL, NULL, &bad, &i, &g), "logits.rows");
    other.cols = 9;
    REFUSED(lsw_route(context, NULL, NULL, &l, &other, &g), "ids.cols is 9; it must be 1 to 8");
    other = i, other.rows = 2;
    REFUSED(lsw_route(context, NULL, NULL, &l, &other, &g), "ids.rows is 2");
    other = i, other.data = gates;
    REFUSED(lsw_route(context, NULL, NULL, &l, &other, &g), "disjoint from gates");
    other = i, other.data = logits;
    REFUSED(lsw_route(context, NULL, NULL, &l, &other, &g), "disjoint from logits");
    EXPECT(ids[0][0] == 0x55555555 && ids[2][1] == 0x55555555);
    OK(lsw_route(context, NULL, NULL, &l, &i, &g));
    EXPECT(ids[2][1] == 1 && gates[2][1] == 0.5f);
}

/* Options of an older header, of a newer one, and of none. */
static void struct_sizes(void) {
    lsw_mat l = in(logits, 3, 8, LSW_F32);
    lsw_mat_mut i = out(ids, 3, 2, LSW_I32), g = out(gates, 3, 2, LSW_F32);
    struct { lsw_route_options known; uint64_t more; } options = {{.struct_size = sizeof options}, 0};
    OK(lsw_route(context, NULL, &options.known, &l, &i, &g));
    EXPECT(gates[0][0] == 0.125f);
    options.more = (uint64_t)1 << 63;
    REFUSED(lsw_route(context, NULL, &options.known, &l, &i, &g), "options.struct_size is 80");
    options.known.struct_size = 8; /* renormalize takes its default */
    OK(lsw_route(context, NULL, &options.known, &l, &i, &g));
    EXPECT(gates[0][0] == 0.5f);
    const uint64_t wrong[] = {0, 4, 7, 12, 4104, UINT64_MAX};
    for (size_t n = 0; n < sizeof wrong / sizeof *wrong; n++) {
        options.known.struct_size = wrong[n];
        REFUSED(lsw_route(context, NULL, &options.known, &l, &i, &g), "options.struct_size");
    }
    options.known.struct_size = sizeof options.known;
    options.known.renormalize = 2;
    REFUSED(lsw_route(context, NULL, &options.known, &l, &i, &g), "options.renormalize is 2; it must be 0 or 1");
    options.known.renormalize = 1;
    options.known.only_x_is_new = 2;
    REFUSED(lsw_route(context, NULL, &options.known, &l, &i, &g), "options.only_x_is_new is 2");
    options.known.only_x_is_new = 0;
    options.known.score = 3;
    REFUSED(lsw_route(context, NULL, &options.known, &l, &i, &g), "options.score is 3");
    options.known.score = LSW_SIGMOID, options.known.group_score = -1;
    REFUSED(lsw_route(context, NULL, &options.known, &l, &i, &g), "options.group_score is -1");
    options.known.group_score = LSW_GROUP_BEST, options.known.groups = 3;
    REFUSED(lsw_route(context, NULL, &options.known, &l, &i, &g), "options.groups is 3");
    options.known.groups = 0, options.known.bias = &l;
    REFUSED(lsw_route(context, NULL, &options.known, &l, &i, &g), "options.bias.rows is 3");
    REFUSED(lsw_route(context, NULL, MISALIGNED(lsw_route_options, &options), &l, &i, &g), "options is");
}

/* Every option at once, where the result is known: x times the identity chooses by x itself. */
static void gates_and_counts(void) {
    const float x[3][4] = {{3, 1, 2, 9}, {0, 5, 1, 2}, {7, 7, 7, 7}}, eye[4][4] = {{1}, {0, 1}, {0, 0, 1}, {0, 0, 0, 1}};
    const float linear[4] = {0, 0, 0, -100}, bias[4] = {0, 0, 8, 0};
    const int32_t valid = 2;
    const uint8_t mask[3] = {1, 1, 1};
    int32_t counts[4] = {7, 7, 7, 7};
    uint64_t bytes = 77;
    lsw_mat h = in(x, 3, 4, LSW_F32), weight = in(eye, 4, 4, LSW_F32), linear_bias = in(linear, 1, 4, LSW_F32);
    lsw_mat choice_bias = in(bias, 1, 4, LSW_F32), limit = in(&valid, 1, 1, LSW_I32), rows = in(mask, 1, 3, LSW_U8);
    lsw_mat_mut i = out(ids, 3, 2, LSW_I32), g = out(gates, 3, 2, LSW_F32), c = out(counts, 1, 4, LSW_I32);
    lsw_route_options options = {.struct_size = sizeof options, .score = LSW_SIGMOID, .group_score = LSW_GROUP_SUM_OF_TWO, .scale = 4,
                                 .groups = 2, .top_groups = 1, .bias = &choice_bias, .valid = &limit, .mask = &rows};
    OK(lsw_gate_workspace_bytes(context, 3, 4, 4, &bytes));
    EXPECT(bytes == 0);
    OK(lsw_route_workspace_bytes(context, &bytes));
    EXPECT(bytes == 0);
    OK(lsw_gate(context, NULL, &options, &h, &weight, &linear_bias, &i, &g, &c, NULL, 0));
    EXPECT(ids[0][0] == 2 && ids[0][1] == 3 && ids[1][0] == 2 && ids[2][0] == -1 && ids[2][1] == -1);
    EXPECT(fabsf(gates[0][0] - 4 / (1 + expf(-2))) < 1e-5f && gates[0][1] == 0 && gates[2][0] == 0);
    EXPECT(counts[0] == 0 && counts[1] == 0 && counts[2] == 2 && counts[3] == 2);
    OK(lsw_route_counted(context, NULL, NULL, &h, &i, &g, &c, NULL, 0));
    EXPECT(ids[0][0] == 3 && ids[0][1] == 0 && ids[2][0] == 0 && ids[2][1] == 1 && gates[2][1] == 0.5f);
    EXPECT(counts[0] == 2 && counts[1] == 2 && counts[2] == 0 && counts[3] == 2);
    weight.cols = 3;
    REFUSED(lsw_gate(context, NULL, NULL, &h, &weight, NULL, &i, &g, NULL, NULL, 0), "weight.cols is 3; it must be 4");
    REFUSED(lsw_gate(context, NULL, NULL, &h, NULL, NULL, &i, &g, NULL, NULL, 0), "weight is null");
    c.cols = 3;
    REFUSED(lsw_route_counted(context, NULL, NULL, &h, &i, &g, &c, NULL, 0), "counts.cols is 3");
}

static void banks(void) {
    lsw_bank_options options = {sizeof options, LSW_F32, 0, 2, NULL, 0}, bad = options;
    lsw_target_shape shape = {4, 8, 2}, wide = {4, 8, 257}, found = {0, 0, 0};
    lsw_factor factor = {in(a, 2, 8, LSW_F32), in(b, 4, 2, LSW_F32), 1, 0}, other = factor;
    lsw_bank *bank = NULL, *none = NULL;
    uint64_t number = 77;
    int32_t dtype = 77;
    REFUSED(lsw_bank_create(context, NULL, NULL, &shape, 1, &none), "slots is 0; it must be 1 to 65536");
    REFUSED(lsw_bank_create(context, NULL, &options, NULL, 1, &none), "targets is null");
    REFUSED(lsw_bank_create(context, NULL, &options, &shape, UINT64_MAX, &none), "the number of targets");
    REFUSED(lsw_bank_create(context, NULL, &options, &wide, 1, &none), "targets[0].rank_cap is 257");
    REFUSED(lsw_bank_create(context, NULL, &options, &shape, 1, NULL), "bank is null");
    bad.dtype = LSW_I32;
    REFUSED(lsw_bank_create(context, NULL, &bad, &shape, 1, &none), "dtype is i32");
    bad.dtype = 9;
    REFUSED(lsw_bank_create(context, NULL, &bad, &shape, 1, &none), "options.dtype is 9");
    bad = options, bad.memory_bytes = 16;
    REFUSED(lsw_bank_create(context, NULL, &bad, &shape, 1, &none), "memory is null");
    EXPECT(none == NULL);
    REFUSED(lsw_bank_memory_bytes(context, LSW_F32, 0, 1, &number), "slots is 0");
    REFUSED(lsw_bank_memory_bytes(context, LSW_F32, 1, UINT64_MAX, &number), "targets is");
    REFUSED(lsw_bank_memory_bytes(context, 9, 1, 1, &number), "dtype is 9");
    EXPECT(number == 77);
    OK(lsw_bank_memory_bytes(context, LSW_F32, 2, 1, &number));
    EXPECT(number == 0);

    OK(lsw_bank_create(context, NULL, &options, &shape, 1, &bank));
    REFUSED(lsw_bank_set_slot(NULL, NULL, 0, &factor, 1), "bank is null");
    REFUSED(lsw_bank_set_slot(bank, NULL, 2, &factor, 1), "slot is 2; it must be below 2");
    REFUSED(lsw_bank_set_slot(bank, NULL, 0, NULL, 1), "factors is null");
    REFUSED(lsw_bank_set_slot(bank, NULL, 0, &factor, 0), "factors is 0 of them");
    other.a.data = NULL;
    REFUSED(lsw_bank_set_slot(bank, NULL, 0, &other, 1), "factors[0].a.data is null");
    other = factor, other.b.dtype = 7;
    REFUSED(lsw_bank_set_slot(bank, NULL, 0, &other, 1), "factors[0].b.dtype is 7");
    other = factor, other.b.cols = 1;
    REFUSED(lsw_bank_set_slot(bank, NULL, 0, &other, 1), "factors[0].b.cols is 1");
    other = factor, other.reserved = 1;
    REFUSED(lsw_bank_set_slot(bank, NULL, 0, &other, 1), "factors[0].reserved is 1");
    other = factor, other.scale = INFINITY;
    REFUSED(lsw_bank_set_slot(bank, NULL, 0, &other, 1), "factors[0].scale is inf");
    memset(&other, 0xff, sizeof other); /* rank 0: nothing else is read */
    other.a.rows = 0;
    OK(lsw_bank_set_slot(bank, NULL, 1, &other, 1));

    OK(lsw_bank_dtype(bank, &dtype));
    OK(lsw_bank_slots(bank, &number));
    EXPECT(dtype == LSW_F32 && number == 2);
    OK(lsw_bank_count(bank, &number));
    OK(lsw_bank_target(bank, 0, &found));
    EXPECT(number == 1 && memcmp(&found, &shape, sizeof found) == 0);
    REFUSED(lsw_bank_target(bank, 1, &found), "target is 1; it must be below 1");
    REFUSED(lsw_bank_count(NULL, &number), "bank is null");
    lsw_bank_destroy(bank);
}

static void sets(void) {
    lsw_bank_options bank_options = {sizeof bank_options, LSW_F32, 0, 2, NULL, 0};
    lsw_switch_options options = {sizeof options, LSW_FROM_BASE, 0, 2, NULL, 0}, bad = options;
    lsw_target_shape shape = {4, 8, 2};
    lsw_factor factor = {in(a, 2, 8, LSW_F32), in(b, 4, 2, LSW_F32), 1, 0};
    lsw_target target = {out(w, 4, 8, LSW_F32), in(base, 4, 8, LSW_F32)}, other = target;
    int32_t route[2] = {0, -1}, held[2] = {77, 77};
    float route_gates[2] = {1, 0}, coefficients[2] = {77, 77};
    uint64_t count = 77;
    uint32_t odd = 77;
    lsw_mat weight = in(NULL, 0, 0, 77);
    lsw_switch *set = NULL;
    lsw_bank *bank = NULL;
    OK(lsw_bank_create(context, NULL, &bank_options, &shape, 1, &bank));
    OK(lsw_bank_set_slot(bank, NULL, 0, &factor, 1));
    REFUSED(lsw_switch_create(NULL, NULL, &options, &target, 1, &set), "bank is null");
    REFUSED(lsw_switch_create(bank, NULL, &options, NULL, 1, &set), "targets is null");
    REFUSED(lsw_switch_create(bank, NULL, &options, &target, 0, &set), "targets is 0 of them");
    REFUSED(lsw_switch_create(bank, NULL, &options, &target, 1, NULL), "set is null");
    bad.form = 2;
    REFUSED(lsw_switch_create(bank, NULL, &bad, &target, 1, &set), "options.form is 2");
    bad.form = LSW_IN_PLACE;
    REFUSED(lsw_switch_create(bank, NULL, &bad, &target, 1, &set), "targets[0].base is given");
    bad = options, bad.k_max = 33;
    REFUSED(lsw_switch_create(bank, NULL, &bad, &target, 1, &set), "k_max is 33; it must be 1 to 32");
    bad = options, bad.kernels = 3;
    REFUSED(lsw_switch_create(bank, NULL, &bad, &target, 1, &set), "options.kernels is 3; it must be LSW_KERNELS_BEST");
    other.base.data = NULL;
    REFUSED(lsw_switch_create(bank, NULL, &options, &other, 1, &set), "targets[0].base.data is null");
    other.base.data = w;
    REFUSED(lsw_switch_create(bank, NULL, &options, &other, 1, &set), "disjoint from targets[0].");
    other = target, other.weight.dtype = 99;
    REFUSED(lsw_switch_create(bank, NULL, &options, &other, 1, &set), "targets[0].weight.dtype is 99");
    other = target, other.weight.rows = 3;
    REFUSED(lsw_switch_create(bank, NULL, &options, &other, 1, &set), "targets[0].weight.rows is 3");
    EXPECT(set == NULL);
    REFUSED(lsw_switch_memory_bytes(context, 1, 0, &count), "k_max is 0");
    OK(lsw_switch_memory_bytes(context, 1, 2, &count));
    EXPECT(count == 0);

    OK(lsw_switch_create(bank, NULL, &options, &target, 1, &set));
    lsw_bank_destroy(bank); /* the set goes on */
    w[3][7] = 77;
    REFUSED(lsw_switch_to(NULL, NULL, route, route_gates, 2), "set is null");
    REFUSED(lsw_switch_to(set, NULL, NULL, route_gates, 2), "ids.data is null");
    REFUSED(lsw_switch_to(set, NULL, route, NULL, 2), "gates.data is null");
    REFUSED(lsw_switch_to(set, NULL, MISALIGNED(int32_t, route), route_gates, 1), "ids.data is");
    REFUSED(lsw_switch_to(set, NULL, route, route_gates, 3), "ids.cols is 3; it must be at most 2");
    REFUSED(lsw_switch_to(set, NULL, route, route_gates, UINT64_MAX), "ids");
    REFUSED(lsw_switch_to(set, NULL, (int32_t *)(void *)w, route_gates, 2), "disjoint from ids");
    REFUSED(lsw_switch_to_targets(set, NULL, 0, 2, route, route_gates, 2), "targets is 0..2");
    REFUSED(lsw_switch_to_targets(set, NULL, 1, 0, route, route_gates, 2), "targets is 1..0");
    REFUSED(lsw_switch_unmerge(NULL, NULL), "set is null");
    REFUSED(lsw_switch_invalidate(NULL, NULL), "set is null");
    REFUSED(lsw_switch_odd(set, NULL, NULL), "odd is null");
    REFUSED(lsw_switch_current(set, NULL, 1, held, coefficients, 2), "target is 1; it must be below 1");
    REFUSED(lsw_switch_current(set, NULL, 0, NULL, coefficients, 2), "ids.data is null");
    REFUSED(lsw_switch_current(set, NULL, 0, held, coefficients, 1), "ids.cols is 1; it must be 2 (k_max)");
    REFUSED(lsw_switch_current(set, NULL, 0, held, (float *)(void *)held, 2), "disjoint from coefficients");
    REFUSED(lsw_switch_weight(set, 1, &weight), "target is 1");
    EXPECT(w[3][7] == 77 && held[0] == 77 && coefficients[1] == 77 && odd == 77 && weight.dtype == 77);

    OK(lsw_switch_to(set, NULL, route, route_gates, 2));
    OK(lsw_switch_current(set, NULL, 0, held, coefficients, 2));
    EXPECT(held[0] == 0 && held[1] == -1 && coefficients[0] == 1 && coefficients[1] == 0);
    OK(lsw_switch_to(set, NULL, NULL, NULL, 0));
    EXPECT(memcmp(w, base, sizeof w) == 0);
    route[1] = 5;
    OK(lsw_switch_to(set, NULL, route, route_gates, 2));
    OK(lsw_switch_odd(set, NULL, &odd));
    EXPECT(odd == LSW_ODD_ROUTE_ID);
    OK(lsw_switch_invalidate(set, NULL));
    OK(lsw_switch_odd(set, NULL, &odd));
    EXPECT(odd == 0);
    OK(lsw_switch_weight(set, 0, &weight));
    EXPECT(weight.data == w && weight.rows == 4 && weight.cols == 8 && weight.dtype == LSW_F32);
    OK(lsw_switch_count(set, &count));
    EXPECT(count == 1);
    lsw_switch_destroy(set);
}

static void unmerged(void) {
    static float x[3][8], y[3][4], z[3][4], workspace[3 * 2 * 2 * 8];
    static int32_t map[3] = {2, -1, 0};
    lsw_target_shape shapes[3] = {{4, 8, 2}, {4, 8, 2}, {4, 7, 2}};
    lsw_bank_options options = {sizeof options, LSW_F32, 0, 2, NULL, 0};
    lsw_factor factors[3] = {{in(a, 2, 8, LSW_F32), in(b, 4, 2, LSW_F32), 2.0f, 0}, {{0}, {0}, 0, 0}, {{0}, {0}, 0, 0}};
    lsw_routes routes = {in(ids, 3, 2, LSW_I32), in(gates, 3, 2, LSW_F32), {0}}, bad;
    lsw_mat input = in(x, 3, 8, LSW_F32), narrow = in(x, 3, 7, LSW_F32);
    lsw_mat_mut both[2] = {out(y, 3, 4, LSW_F32), out(z, 3, 4, LSW_F32)}, same[2] = {out(y, 3, 4, LSW_F32), out(y, 3, 4, LSW_F32)};
    uint64_t bytes = 77, n = sizeof workspace;
    lsw_bank *bank = NULL;
    OK(lsw_bank_create(context, NULL, &options, shapes, 3, &bank));
    OK(lsw_bank_set_slot(bank, NULL, 1, factors, 3));
    for (int t = 0; t < 3; t++) {
        ids[t][0] = 1, ids[t][1] = t == 2 ? 1 : -1;
        gates[t][0] = 0.25f, gates[t][1] = 0.5f;
        for (int c = 0; c < 8; c++) {
            x[t][c] = (float)(t + 1);
        }
    }
    for (int i = 0; i < 16; i++) {
        a[i / 8][i % 8] = (float)(i / 8 + 1); /* A x = (8, 16) for x of ones */
    }
    for (int i = 0; i < 8; i++) {
        b[i / 2][i % 2] = (float)(i / 2); /* B (A x) = 24 o */
    }
    REFUSED(lsw_apply_workspace_bytes(NULL, 0, 2, 3, 2, &bytes), "bank is null");
    REFUSED(lsw_apply_workspace_bytes(bank, 0, 3, 3, 2, &bytes), "targets[2].in_features is 7");
    REFUSED(lsw_apply_workspace_bytes(bank, 1, UINT64_MAX, 3, 2, &bytes), "targets is");
    REFUSED(lsw_apply_workspace_bytes(bank, 0, 2, 3, 33, &bytes), "k is 33");
    EXPECT(bytes == 77);
    OK(lsw_apply_workspace_bytes(bank, 0, 2, 3, 2, &bytes));
    EXPECT(bytes == n);
    REFUSED(lsw_apply(NULL, NULL, 0, &input, &routes, both, 2, workspace, n), "bank is null");
    REFUSED(lsw_apply(bank, NULL, 0, NULL, &routes, both, 2, workspace, n), "x is null");
    REFUSED(lsw_apply(bank, NULL, 0, &input, NULL, both, 2, workspace, n), "routes is null");
    REFUSED(lsw_apply(bank, NULL, 0, &input, &routes, NULL, 2, workspace, n), "y is null");
    REFUSED(lsw_apply(bank, NULL, 0, &input, &routes, both, UINT64_MAX, workspace, n), "count is");
    REFUSED(lsw_apply(bank, NULL, 0, &input, &routes, both, 0, workspace, n), "targets is 0..0");
    REFUSED(lsw_apply(bank, NULL, 0, &narrow, &routes, both, 2, workspace, n), "x.cols is 7");
    REFUSED(lsw_apply(bank, NULL, 0, &input, &routes, same, 2, workspace, n), "disjoint from y[0]");
    REFUSED(lsw_apply(bank, NULL, 0, &input, &routes, both, 2, workspace, n - 1), "workspace.cols");
    REFUSED(lsw_apply(bank, NULL, 0, &input, &routes, both, 2, NULL, n), "workspace.data is null");
    bad = routes, bad.gates.dtype = LSW_F16;
    REFUSED(lsw_apply_begin(bank, NULL, 0, 2, &input, &bad, workspace, n), "gates.dtype is f16");
    bad = routes, bad.row_map = in(map, 1, 2, LSW_I32);
    REFUSED(lsw_apply_finish(bank, NULL, 0, &bad, both, 2, workspace, n), "row_map.cols is 2");
    OK(lsw_apply(bank, NULL, 0, &input, &routes, both, 2, workspace, n));
    EXPECT(y[0][3] == 36.0f && y[1][1] == 24.0f && y[2][1] == 108.0f && z[0][3] == 0.0f);
    REFUSED(lsw_apply_into(NULL, NULL, 0, &input, &routes, both, 2, workspace, n), "bank is null");
    REFUSED(lsw_apply_into(bank, NULL, 0, &input, &routes, same, 2, workspace, n), "disjoint from y[0]");
    y[0][3] = 7.0f;
    OK(lsw_apply_into(bank, NULL, 0, &input, &routes, both, 2, workspace, n));
    EXPECT(y[0][3] == 36.0f && y[1][1] == 24.0f && y[2][1] == 108.0f && z[0][3] == 0.0f);
    routes.row_map = in(map, 1, 3, LSW_I32); /* rows 0 and 2 change places, row 1 has none */
    OK(lsw_apply_begin(bank, NULL, 0, 2, &input, &routes, workspace, n));
    OK(lsw_apply_finish(bank, NULL, 0, &routes, both, 2, workspace, n));
    EXPECT(y[0][3] == 144.0f && y[1][1] == 24.0f && y[2][1] == 144.0f);

    /* The same adapters on W x; W of ones in the first target, of the adapter's A in the second. */
    static float ones[4][8];
    static float workspace16[4 + 3 * 2 * 2 * 8];
    lsw_mat weights[2] = {in(ones, 4, 8, LSW_F32), in(a, 2, 8, LSW_F32)};
    lsw_linear_options how = {sizeof how, 1, 0}, odd = {sizeof odd, 2, 0};
    for (int i = 0; i < 32; i++) {
        ones[i / 8][i % 8] = 1.0f;
    }
    REFUSED(lsw_linear_workspace_bytes(bank, 0, 2, 9, 2, &bytes), "rows is 9");
    OK(lsw_linear_workspace_bytes(bank, 0, 2, 3, 2, &bytes));
    EXPECT(bytes == sizeof workspace16);
    REFUSED(lsw_linear(bank, NULL, &odd, 0, weights, &input, &routes, both, 2, workspace16, bytes), "options.only_x_is_new is 2");
    REFUSED(lsw_linear(bank, NULL, &how, 0, NULL, &input, &routes, both, 2, workspace16, bytes), "weights is null");
    REFUSED(lsw_linear(bank, NULL, &how, 0, weights, &input, &routes, both, 2, workspace16, bytes), "weights[1].rows is 2");
    weights[1] = weights[0];
    REFUSED(lsw_linear(bank, NULL, &how, 0, weights, &input, &routes, same, 2, workspace16, bytes), "disjoint from y[0]");
    REFUSED(lsw_linear(bank, NULL, &how, 0, weights, &input, &routes, both, 2, workspace16, bytes - 1), "workspace.cols");
    OK(lsw_linear(bank, NULL, NULL, 0, weights, &input, &routes, both, 2, workspace16, bytes));
    EXPECT(y[0][3] == 8.0f + 108.0f && y[1][1] == 16.0f && y[2][1] == 24.0f + 36.0f && z[0][3] == 8.0f);
    lsw_bank_destroy(bank);
}

static void advice(void) {
    lsw_target_shape shapes[2] = {{1000, 500, 8}, {200, 500, 8}};
    uint64_t groups[1] = {2}, ranks[2] = {4, 8};
    lsw_calibration c = {.struct_size = sizeof c}, bad;
    lsw_workload load = {sizeof load, shapes, 2, groups, 1, ranks, 2, LSW_BF16, 0, 1, 1, 1.0}, wrong = load;
    lsw_advice advice = {sizeof advice, 77, 77, 77, 77, 77}, short_one = advice;
    short_one.struct_size = 16;
    REFUSED(lsw_calibrate(context, NULL, NULL), "calibration is null");
    c.struct_size = 12;
    REFUSED(lsw_calibrate(context, NULL, &c), "calibration.struct_size is 12");
    c.struct_size = 24; /* an older header's: no more than that is written */
    OK(lsw_calibrate(context, NULL, &c));
    EXPECT(c.struct_size == 24 && c.read_gb_per_s > 0 && c.copy_gb_per_s > 0 && c.launch_us == 0);
    c.struct_size = sizeof c;
    OK(lsw_calibrate(context, NULL, &c));
    EXPECT(c.launch_us > 0 && c.apply_call_us >= 0 && c.few_rows_gb_per_s > 0 && c.linear_gb_per_s > 0 && c.product_share > 0 && c.product_tflops > 0);
    REFUSED(lsw_calibrate(NULL, NULL, &c), "context is null");

    REFUSED(lsw_advise(&c, NULL, &advice), "workload is null");
    REFUSED(lsw_advise(&c, &load, NULL), "advice is null");
    wrong.struct_size = 4;
    REFUSED(lsw_advise(&c, &wrong, &advice), "workload.struct_size is 4");
    wrong = load, wrong.targets = NULL;
    REFUSED(lsw_advise(&c, &wrong, &advice), "targets is null");
    wrong = load, wrong.dtype = 9;
    REFUSED(lsw_advise(&c, &wrong, &advice), "workload.dtype is 9");
    wrong = load, wrong.slots = 0;
    REFUSED(lsw_advise(&c, &wrong, &advice), "ranks is empty; it must be at least one slot");
    wrong = load, wrong.tokens_per_route = 0.5;
    REFUSED(lsw_advise(&c, &wrong, &advice), "tokens_per_route is 0.5; it must be finite, at least 1");
    bad = c, bad.copy_gb_per_s = 0;
    REFUSED(lsw_advise(&bad, &load, &advice), "calibration.copy_gb_per_s is 0; it must be above 0 and finite");
    advice.struct_size = 0;
    REFUSED(lsw_advise(&c, &load, &advice), "advice.struct_size is 0");
    EXPECT(advice.best == 77 && advice.apply_us == 77);
    advice.struct_size = sizeof advice;
    OK(lsw_advise(NULL, &load, &advice));
    EXPECT(advice.best >= LSW_STRATEGY_SWITCH && advice.reserved == 0 && advice.switch_us > 0 && advice.apply_us > 0 && advice.linear_us > 0);
    OK(lsw_advise(&c, &load, &short_one));
    EXPECT(short_one.struct_size == 16 && short_one.reserved == 0 && short_one.switch_us == 77);
}

static void gather_scatter(void) {
    static int32_t offsets[5], row_map[6], inverse[3][2], padded[16], block_experts[4];
    static float rows[6][8], y[3][8];
    lsw_mat i = in(ids, 3, 2, LSW_I32), x = in(logits, 3, 8, LSW_F32), g = in(gates, 3, 2, LSW_F32), bad = i;
    lsw_mat_mut o = out(offsets, 1, 5, LSW_I32), m = out(row_map, 1, 6, LSW_I32), v = out(inverse, 3, 2, LSW_I32);
    lsw_mat_mut r = out(rows, 6, 8, LSW_F32), sum = out(y, 3, 8, LSW_F32), other = v;
    lsw_mat_mut p = out(padded, 1, 15, LSW_I32), b = out(block_experts, 1, 3, LSW_I32);
    lsw_mat inv = in(inverse, 3, 2, LSW_I32), results = in(rows, 6, 8, LSW_F32), residual = in(y, 3, 8, LSW_F32);
    lsw_permute_options options = {sizeof options, 4, 0, 4, 4, -2, 0};
    lsw_permute_sizes sizes = {77, 77, 77};
    lsw_combine_options with = {sizeof with, &residual, 2.0f, 0};
    uint64_t bytes = 77;
    for (int t = 0; t < 3; t++) {
        ids[t][0] = t, ids[t][1] = 3;
        gates[t][0] = 0.25f, gates[t][1] = 0.75f;
        for (int c = 0; c < 8; c++) {
            logits[t][c] = (float)(10 * t + c);
        }
    }
    REFUSED(lsw_permute_workspace_bytes(context, 6, 0, &bytes), "experts is 0");
    REFUSED(lsw_permute_workspace_bytes(context, UINT64_MAX, 4, &bytes), "items is");
    EXPECT(bytes == 77);
    OK(lsw_permute_workspace_bytes(context, 6, 4, &bytes));
    REFUSED(lsw_permute(context, NULL, 4, NULL, &o, &m, &v, NULL, 0), "ids is null");
    REFUSED(lsw_permute(context, NULL, 3, &i, &o, &m, &v, NULL, 0), "offsets.cols is 5; it must be 4");
    REFUSED(lsw_permute(context, NULL, 65537, &i, &o, &m, &v, NULL, 0), "experts is 65537");
    REFUSED(lsw_permute(context, NULL, 4, &i, &o, &m, &v, NULL, 8), "workspace.data is null");
    other.stride = UINT64_MAX;
    REFUSED(lsw_permute(context, NULL, 4, &i, &o, &m, &other, NULL, 0), "inverse.shape");
    other = v, other.data = ids;
    REFUSED(lsw_permute(context, NULL, 4, &i, &o, &m, &other, NULL, 0), "disjoint from inverse");
    bad.dtype = LSW_F32;
    REFUSED(lsw_permute(context, NULL, 4, &bad, &o, &m, &v, NULL, 0), "ids.dtype is f32");
    OK(lsw_permute(context, NULL, 4, &i, &o, &m, &v, NULL, 0));
    EXPECT(offsets[4] == 6 && row_map[3] == 1 && row_map[5] == 5 && inverse[2][1] == 5);

    REFUSED(lsw_permute_get_sizes(context, NULL, 6, &sizes), "experts is 0");
    options.last = 5;
    REFUSED(lsw_permute_get_sizes(context, &options, 6, &sizes), "local.end is 5; it must be 1 to 4");
    options.last = 4, options.block = 1025;
    REFUSED(lsw_permute_get_sizes(context, &options, 6, &sizes), "block is 1025; it must be 1 to 1024");
    options.block = 4, options.reserved = 1;
    REFUSED(lsw_permute_get_sizes(context, &options, 6, &sizes), "options.reserved is 1");
    options.reserved = 0;
    REFUSED(lsw_permute_get_sizes(context, &options, 6, NULL), "sizes is null");
    EXPECT(sizes.rows == 77 && sizes.blocks == 77 && sizes.workspace_bytes == 77);
    OK(lsw_permute_get_sizes(context, &options, 6, &sizes));
    EXPECT(sizes.rows == 16 && sizes.blocks == 4 && sizes.workspace_bytes == 0); /* 6 + 4 * 3, in whole blocks */
    REFUSED(lsw_permute_with(context, NULL, &options, &i, &o, &p, &v, &b, NULL, 0), "row_map.cols is 15; it must be 16");
    p.cols = 16;
    REFUSED(lsw_permute_with(context, NULL, &options, &i, &o, &p, &v, &b, NULL, 0), "block_experts.cols is 3; it must be 4");
    b.cols = 4;
    OK(lsw_permute_with(context, NULL, &options, &i, &o, &p, &v, &b, NULL, 0)); /* one item for each of 0 to 2, three for 3 */
    EXPECT(offsets[4] == 16 && padded[0] == 0 && padded[1] == -2 && padded[14] == 5 && padded[15] == -2);
    EXPECT(block_experts[0] == 0 && block_experts[3] == 3);
    options.first = 3; /* the others' items are dropped */
    o.cols = 2, p.cols = 8, b.cols = 2;
    OK(lsw_permute_get_sizes(context, &options, 6, &sizes));
    EXPECT(sizes.rows == 8 && sizes.blocks == 2);
    OK(lsw_permute_with(context, NULL, &options, &i, &o, &p, &v, &b, NULL, 0));
    EXPECT(offsets[1] == 4 && padded[2] == 5 && padded[3] == -2 && padded[7] == -2 && block_experts[0] == 0 && block_experts[1] == -1);
    OK(lsw_permute_with(context, NULL, &options, &i, &o, &p, &v, NULL, NULL, 0));

    o.cols = 5;
    OK(lsw_permute(context, NULL, 4, &i, &o, &m, &v, NULL, 0));
    REFUSED(lsw_gather(context, NULL, &x, NULL, &r), "inverse is null");
    REFUSED(lsw_gather(context, NULL, &i, &inv, &r), "rows.dtype is f32");
    REFUSED(lsw_gather(context, NULL, &x, &results, &r), "inverse.dtype is f32");
    other = out(logits, 3, 8, LSW_F32);
    REFUSED(lsw_gather(context, NULL, &x, &inv, &other), "disjoint from x");
    OK(lsw_gather(context, NULL, &x, &inv, &r));
    REFUSED(lsw_combine(context, NULL, &results, &inv, NULL, &sum), "gates is null");
    REFUSED(lsw_combine(context, NULL, &results, &g, &inv, &sum), "inverse.dtype is f32");
    OK(lsw_combine(context, NULL, &results, &inv, &g, &sum));
    EXPECT(memcmp(y, logits, sizeof y) == 0); /* gates that sum to 1, whole numbers: exact */

    with.reserved = 1;
    REFUSED(lsw_combine_with(context, NULL, &with, &results, &inv, &g, &sum), "options.reserved is 1");
    with.reserved = 0, residual.rows = 2;
    REFUSED(lsw_combine_with(context, NULL, &with, &results, &inv, &g, &sum), "residual.rows is 2; it must be 3");
    residual.rows = 3, residual.cols = 7, residual.data = &y[0][1];
    REFUSED(lsw_combine_with(context, NULL, &with, &results, &inv, &g, &sum), "residual.cols is 7; it must be 8");
    residual = in(rows, 3, 8, LSW_F32), residual.data = &rows[3][0];
    OK(lsw_combine_with(context, NULL, &with, &results, &inv, &g, &sum));
    EXPECT(y[2][7] == rows[5][7] + 2 * logits[2][7]);
    sum.data = y, residual = in(&y[1][0], 2, 8, LSW_F32), residual.rows = 3, residual.data = &y[0][0], residual.stride = 9;
    REFUSED(lsw_combine_with(context, NULL, &with, &results, &inv, &g, &sum), "disjoint from residual");
    residual.stride = 8;
    OK(lsw_combine(context, NULL, &results, &inv, &g, &sum));
    OK(lsw_combine_with(context, NULL, &with, &results, &inv, &g, &sum)); /* y itself */
    EXPECT(y[2][7] == 3 * logits[2][7]);
}

static void measure(void) {
    enum { N = 1000 };
    float *data = malloc(3 * N * sizeof *data); /* of 16-byte alignment */
    int32_t sink = 77;
    lsw_mat x = in(data, 1, N, LSW_F32), odd_address = in(data + 1, 1, N, LSW_F32);
    lsw_mat_mut filled = out(data, 1, N, LSW_F32), y = out(data + N, 1, N, LSW_F32), other = y;
    memset(data, 0, 3 * N * sizeof *data);
    REFUSED(lsw_measure_fill_random(NULL, NULL, 5, 2, &filled), "context is null");
    REFUSED(lsw_measure_fill_random(context, NULL, 5, 2, NULL), "y is null");
    other.rows = 2;
    REFUSED(lsw_measure_fill_random(context, NULL, 5, 2, &other), "y.rows is 2");
    OK(lsw_measure_fill_random(context, NULL, 5, 2, &filled));
    EXPECT(fabsf(data[0]) <= 2 && fabsf(data[N - 1]) <= 2 && data[0] != data[N - 1]);
    REFUSED(lsw_measure_scale(context, NULL, 0.5f, NULL, &y), "x is null");
    REFUSED(lsw_measure_scale(context, NULL, 0.5f, &odd_address, &y), "a multiple of 16 bytes");
    REFUSED(lsw_measure_scale(context, NULL, 0.5f, &x, &filled), "disjoint from x");
    EXPECT(data[N] == 0);
    OK(lsw_measure_scale(context, NULL, 0.5f, &x, &y));
    EXPECT(data[N] == data[0] / 2 && data[2 * N - 1] == data[N - 1] / 2 && data[2 * N] == 0);
    REFUSED(lsw_measure_scale_in_place(context, NULL, 2, NULL), "y is null");
    OK(lsw_measure_scale_in_place(context, NULL, 2, &y));
    EXPECT(memcmp(data, data + N, N * sizeof *data) == 0);
    REFUSED(lsw_measure_read(context, NULL, &x, NULL), "sink.data is null");
    REFUSED(lsw_measure_read(context, NULL, &x, (int32_t *)(void *)data), "disjoint from x");
    EXPECT(sink == 77);
    x.cols = 1;
    OK(lsw_measure_read(context, NULL, &x, &sink));
    OK(lsw_measure_read(context, NULL, &x, &sink)); /* an xor: twice is not at all */
    EXPECT(sink == 77);
    free(data);
}

int main(void) {
    status();
    if (lsw_context_create_cpu(1, &context) != LSW_OK) {
        return 1;
    }
    contexts();
    last_error_is_per_thread();
    matrices();
    struct_sizes();
    gates_and_counts();
    banks();
    sets();
    unmerged();
    advice();
    gather_scatter();
    measure();
    lsw_context_destroy(context);
    printf("%d failures\n", failures);
    return failures != 0;
}
