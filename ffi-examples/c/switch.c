/* Adapters switched from token to token, in C: a router picks two of four LoRA adapters, one call brings three
 * weights to them, and plain loops check the result. On the CPU, and on the GPU where there is one.
 *
 *   cc -std=c99 -Iinclude -Iffi-examples ffi-examples/c/switch.c -llora_switch -lm -ldl */
#include "lora_switch.h"
#include "machine.h"

#include <math.h>

enum { TARGETS = 3, SLOTS = 4, K = 2, MAX_ELEMENTS = 64 * 64 };

/* The last target has rows of 18 or 36 bytes: no multiple of 16, so that the slower path serves it. */
static const lsw_target_shape SHAPES[TARGETS] = {{48, 32, 8}, {24, 64, 16}, {7, 9, 4}};
/* Adapter 2 leaves the second target alone. */
static const uint64_t RANKS[SLOTS][TARGETS] = {{8, 16, 4}, {3, 5, 1}, {4, 0, 2}, {1, 16, 3}};
static const float SCALES[SLOTS] = {0.5f, 2.0f, 1.0f, -0.25f};

/* A matrix in the machine's memory, and its values as stored. */
typedef struct matrix {
    lsw_mat_mut mat;
    double values[MAX_ELEMENTS];
} matrix;

typedef struct model {
    matrix base[TARGETS], weight[TARGETS], a[SLOTS][TARGETS], b[SLOTS][TARGETS];
} model;

static void check(lsw_status status, const char *call) {
    if (status != LSW_OK) {
        fprintf(stderr, "%s: %s: %s\n", call, lsw_status_name(status), lsw_last_error());
        exit(1);
    }
}
#define CHECK(call) check(call, #call)

static void expect(int condition, const char *what) {
    if (!condition) {
        fprintf(stderr, "mismatch: %s\n", what);
        exit(1);
    }
}

/* Uniform in [-1, 1). */
static float random_value(void) {
    static uint64_t state = 1;
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (float)(int32_t)(state >> 32) / 2147483648.0f;
}

static uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16); /* to nearest, ties to even */
}

static float from_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static size_t element_bytes(int32_t dtype) {
    return dtype == LSW_F32 ? 4 : 2;
}

static void read_matrix(const machine *m, const matrix *from, double *values) {
    static union { float f32[MAX_ELEMENTS]; uint16_t bf16[MAX_ELEMENTS]; } stored;
    size_t count = (size_t)(from->mat.rows * from->mat.cols);
    machine_download(m, &stored, from->mat.data, count * element_bytes(from->mat.dtype));
    for (size_t i = 0; i < count; i++) {
        values[i] = from->mat.dtype == LSW_F32 ? stored.f32[i] : from_bf16(stored.bf16[i]);
    }
}

static void make_matrix(machine *m, matrix *to, int32_t dtype, uint64_t rows, uint64_t cols) {
    static union { float f32[MAX_ELEMENTS]; uint16_t bf16[MAX_ELEMENTS]; } stored;
    size_t count = (size_t)(rows * cols), bytes = count * element_bytes(dtype);
    lsw_mat_mut mat = {NULL, rows, cols, cols, dtype, 0};
    mat.data = machine_alloc(m, bytes ? bytes : 1);
    for (size_t i = 0; i < count; i++) {
        float x = random_value();
        if (dtype == LSW_F32) {
            stored.f32[i] = x;
        } else {
            stored.bf16[i] = to_bf16(x);
        }
    }
    machine_upload(m, mat.data, &stored, bytes);
    to->mat = mat;
    read_matrix(m, to, to->values);
}

static lsw_mat readable(const matrix *from) {
    const lsw_mat_mut *m = &from->mat;
    lsw_mat mat = {m->data, m->rows, m->cols, m->stride, m->dtype, 0};
    return mat;
}

static void make_model(machine *m, model *model, int32_t dtype) {
    for (int t = 0; t < TARGETS; t++) {
        uint64_t out = SHAPES[t].out_features, in = SHAPES[t].in_features;
        make_matrix(m, &model->base[t], dtype, out, in);
        make_matrix(m, &model->weight[t], dtype, out, in);
        for (int s = 0; s < SLOTS; s++) {
            make_matrix(m, &model->a[s][t], dtype, RANKS[s][t], in);
            make_matrix(m, &model->b[s][t], dtype, out, RANKS[s][t]);
        }
    }
}

static lsw_bank *make_bank(const machine *m, const lsw_context *context, const model *model, int32_t dtype) {
    lsw_bank_options options = {sizeof options, dtype, 0, SLOTS, NULL, 0};
    lsw_bank *bank = NULL;
    CHECK(lsw_bank_create(context, m->stream, &options, SHAPES, TARGETS, &bank));
    for (int s = 0; s < SLOTS; s++) {
        lsw_factor factors[TARGETS];
        for (int t = 0; t < TARGETS; t++) {
            lsw_factor factor = {readable(&model->a[s][t]), readable(&model->b[s][t]), SCALES[s], 0};
            factors[t] = factor;
        }
        CHECK(lsw_bank_set_slot(bank, m->stream, (uint64_t)s, factors, TARGETS));
    }
    return bank;
}

static lsw_switch *make_set(const machine *m, const lsw_bank *bank, const model *model, int32_t form) {
    lsw_switch_options options = {sizeof options, form, 0, K, NULL, 0};
    lsw_target targets[TARGETS];
    lsw_switch *set = NULL;
    memset(targets, 0, sizeof targets); /* in place there is no base */
    for (int t = 0; t < TARGETS; t++) {
        targets[t].weight = model->weight[t].mat;
        if (form == LSW_FROM_BASE) {
            targets[t].base = readable(&model->base[t]);
        }
    }
    CHECK(lsw_switch_create(bank, m->stream, &options, targets, TARGETS, &set));
    return set;
}

/* W = start + the sum over the route, in double, against what the switches left; each of them rounded. */
static void verify(const machine *m, const model *model, const matrix *start, const int32_t *ids,
                   const float *gates, int k, int switches, const char *what) {
    static double stored[MAX_ELEMENTS];
    for (int t = 0; t < TARGETS; t++) {
        const matrix *weight = &model->weight[t];
        read_matrix(m, weight, stored);
        for (uint64_t i = 0; i < weight->mat.rows; i++) {
            for (uint64_t j = 0; j < weight->mat.cols; j++) {
                uint64_t at = i * weight->mat.cols + j, terms = 0;
                double sum = start[t].values[at], size = fabs(sum);
                for (int s = 0; s < SLOTS; s++) {
                    double coefficient = 0;
                    for (int n = 0; n < k; n++) {
                        coefficient += ids[n] == s ? gates[n] * SCALES[s] : 0;
                    }
                    for (uint64_t r = 0; r < RANKS[s][t]; r++) {
                        double product = model->b[s][t].values[i * RANKS[s][t] + r] *
                                         model->a[s][t].values[r * weight->mat.cols + j];
                        sum += coefficient * product;
                        size += fabs(SCALES[s] * product); /* gates are at most 1: bounds all steps on the way */
                        terms++;
                    }
                }
                /* A switch adds at most `terms` products in f32 (twice the unit roundoff each, since tensor cores
                 * truncate), scales and adds them (8 more), and rounds once to the weight's type. */
                double unit = weight->mat.dtype == LSW_F32 ? ldexp(1, -24) : ldexp(1, -8);
                double bound = switches * (unit + (double)(terms + 8) * ldexp(1, -23)) * size;
                if (!(fabs(stored[at] - sum) <= bound)) {
                    fprintf(stderr, "mismatch: %s: target %d [%d, %d] is %.9g, not %.9g +- %.2g\n", what, t,
                            (int)i, (int)j, stored[at], sum, bound);
                    exit(1);
                }
            }
        }
    }
}

/* Logits of one token -> the two best experts; both sides in the machine's memory. */
typedef struct router {
    void *logits;
    int32_t *ids;
    float *gates;
} router;

static void route(const machine *m, const lsw_context *context, const router *r, const float *logits,
                  int32_t *ids, float *gates) {
    lsw_mat in = {NULL, 1, SLOTS, SLOTS, LSW_F32, 0};
    lsw_mat_mut ids_out = {NULL, 1, K, K, LSW_I32, 0}, gates_out = {NULL, 1, K, K, LSW_F32, 0};
    in.data = r->logits;
    ids_out.data = r->ids;
    gates_out.data = r->gates;
    machine_upload(m, r->logits, logits, SLOTS * sizeof *logits);
    CHECK(lsw_route(context, m->stream, NULL, &in, &ids_out, &gates_out));
    /* For the check alone: the switch reads them where they are. */
    machine_download(m, ids, r->ids, K * sizeof *ids);
    machine_download(m, gates, r->gates, K * sizeof *gates);
    double other = exp((double)logits[ids[1]] - logits[ids[0]]);
    expect(fabs(gates[0] - 1 / (1 + other)) < 1e-6 && fabs(gates[1] - other / (1 + other)) < 1e-6, "gates");
}

static void switch_through(machine *m, const lsw_context *context, const model *model, const lsw_bank *bank,
                           int32_t form) {
    static const float first[SLOTS] = {0.25f, 2, -1, 1.5f}, second[SLOTS] = {1, 0.5f, 3, -2};
    static matrix start[TARGETS];
    const char *name = form == LSW_FROM_BASE ? "from base" : "in place";
    router r = {machine_alloc(m, SLOTS * 4), machine_alloc(m, K * 4), machine_alloc(m, K * 4)};
    lsw_switch *set = make_set(m, bank, model, form);
    int in_place = form == LSW_IN_PLACE;
    int32_t ids[K];
    float gates[K];
    uint32_t odd = 0;

    for (int t = 0; t < TARGETS; t++) {
        start[t] = in_place ? model->weight[t] : model->base[t];
        read_matrix(m, &start[t], start[t].values);
    }
    route(m, context, &r, first, ids, gates);
    expect(ids[0] == 1 && ids[1] == 3, "the first token's experts");
    CHECK(lsw_switch_to(set, m->stream, r.ids, r.gates, K));
    verify(m, model, start, ids, gates, K, 1, "after the first token");

    route(m, context, &r, second, ids, gates);
    expect(ids[0] == 2 && ids[1] == 0, "the second token's experts");
    CHECK(lsw_switch_to(set, m->stream, r.ids, r.gates, K));
    verify(m, model, start, ids, gates, K, in_place ? 2 : 1, "after the second token");

    CHECK(lsw_switch_unmerge(set, m->stream));
    verify(m, model, start, NULL, NULL, 0, in_place ? 3 : 1, "unmerged");
    CHECK(lsw_switch_odd(set, m->stream, &odd));
    expect(odd == 0, "nothing odd");
    lsw_switch_destroy(set);
    printf("  %s: two routes and back, %d weights verified\n", name, TARGETS);
}

static void run(machine *m, const lsw_context *context) {
    static model model;
    for (int32_t dtype = LSW_F32; dtype <= LSW_BF16; dtype += LSW_BF16 - LSW_F32) {
        printf(" %s\n", dtype == LSW_F32 ? "f32" : "bf16");
        make_model(m, &model, dtype);
        lsw_bank *bank = make_bank(m, context, &model, dtype);
        switch_through(m, context, &model, bank, LSW_FROM_BASE);
        switch_through(m, context, &model, bank, LSW_IN_PLACE);
        lsw_bank_destroy(bank);
    }
}

int main(void) {
    lsw_context *context = NULL;
    machine m = machine_cpu();
    expect(lsw_version() == LSW_VERSION, "library and header are of one version");
    printf("CPU\n");
    CHECK(lsw_context_create_cpu(1, &context));
    run(&m, context);
    lsw_context_destroy(context);
    machine_close(&m);

    if (machine_gpu(&m)) {
        lsw_status status = lsw_context_create_from_cuda(m.cuda_context, &context);
        if (status == LSW_NO_KERNELS || status == LSW_NO_DEVICE) {
            machine_skip_gpu(lsw_last_error());
        } else {
            check(status, "lsw_context_create_from_cuda");
            printf("GPU\n");
            CHECK(lsw_context_warm(context, m.stream));
            run(&m, context);
            lsw_context_destroy(context);
        }
        machine_close(&m);
    }
    return 0;
}
