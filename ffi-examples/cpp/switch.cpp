// Adapters switched for a batch, in C++11: RAII for the library's objects, exceptions for its errors. Tokens are
// routed and grouped by expert and come back combined; then the weights are brought to the first token's route in
// both forms and back. Plain loops check it all. On the CPU, and on the GPU where there is one.
//
//   c++ -std=c++11 -Iinclude -Iffi-examples ffi-examples/cpp/switch.cpp -llora_switch -ldl
#include "lora_switch.h"
#include "machine.h"

#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

void check(lsw_status status) {
    if (status != LSW_OK) {
        throw std::runtime_error(std::string(lsw_status_name(status)) + ": " + lsw_last_error());
    }
}

void expect(bool condition, const std::string &what) {
    if (!condition) {
        throw std::runtime_error("mismatch: " + what);
    }
}

struct Destroy {
    void operator()(lsw_context *context) const { lsw_context_destroy(context); }
    void operator()(lsw_bank *bank) const { lsw_bank_destroy(bank); }
    void operator()(lsw_switch *set) const { lsw_switch_destroy(set); }
};
template <typename T> using Handle = std::unique_ptr<T, Destroy>;

Handle<lsw_context> cpu_context() {
    lsw_context *made = nullptr;
    check(lsw_context_create_cpu(0, &made));
    return Handle<lsw_context>(made);
}

// Null where this machine or this build of the library cannot.
Handle<lsw_context> gpu_context() {
    lsw_context *made = nullptr;
    const lsw_status status = lsw_context_create_cuda(0, &made);
    if (status == LSW_NO_KERNELS || status == LSW_NO_DEVICE) {
        machine_skip_gpu(lsw_last_error());
        return nullptr;
    }
    check(status);
    return Handle<lsw_context>(made);
}

// A CPU or a GPU: its memory, its stream and the library's context on it, which goes first.
class Machine {
public:
    Machine(const machine &from, Handle<lsw_context> context) : machine_(from), context_(std::move(context)) {}
    ~Machine() {
        context_.reset();
        machine_close(&machine_);
    }
    Machine(const Machine &) = delete;
    Machine &operator=(const Machine &) = delete;

    bool on_gpu() const { return machine_.cuda != nullptr; }
    const lsw_context *context() const { return context_.get(); }
    void *stream() const { return machine_.stream; }
    machine *memory() { return &machine_; }

private:
    machine machine_;
    Handle<lsw_context> context_;
};

template <typename T> struct Dtype;
template <> struct Dtype<float> { static constexpr int32_t number = LSW_F32; };
template <> struct Dtype<int32_t> { static constexpr int32_t number = LSW_I32; };

// A dense matrix in a machine's memory, which frees it when it closes.
template <typename T> class Matrix {
public:
    Matrix(Machine &machine, uint64_t rows, uint64_t cols)
        : Matrix(machine, rows, cols, std::vector<T>(rows * cols)) {}
    Matrix(Machine &machine, uint64_t rows, uint64_t cols, const std::vector<T> &values)
        : memory_(machine.memory()), rows_(rows), cols_(cols),
          data_(static_cast<T *>(machine_alloc(memory_, values.size() * sizeof(T) + 1))) {
        machine_upload(memory_, data_, values.data(), values.size() * sizeof(T));
    }

    std::vector<T> read() const {
        std::vector<T> values(rows_ * cols_);
        machine_download(memory_, values.data(), data_, values.size() * sizeof(T));
        return values;
    }
    T *data() const { return data_; }
    lsw_mat in() const { return {data_, rows_, cols_, cols_, Dtype<T>::number, 0}; }
    lsw_mat_mut out() const { return {data_, rows_, cols_, cols_, Dtype<T>::number, 0}; }

private:
    machine *memory_;
    uint64_t rows_, cols_;
    T *data_;
};

std::vector<float> random_values(uint64_t count) {
    static std::mt19937 generator(1);
    std::uniform_real_distribution<float> uniform(-1, 1);
    std::vector<float> values(count);
    for (float &value : values) {
        value = uniform(generator);
    }
    return values;
}

constexpr uint64_t tokens = 37, experts = 6, k = 2, width = 24, rank = 8;

struct Routes {
    Matrix<int32_t> ids;
    Matrix<float> gates;
};

Routes route_tokens(Machine &machine) {
    Matrix<float> logits(machine, tokens, experts, random_values(tokens * experts));
    Routes routes = {{machine, tokens, k}, {machine, tokens, k}};
    const lsw_mat in = logits.in();
    const lsw_mat_mut ids = routes.ids.out(), gates = routes.gates.out();
    check(lsw_route(machine.context(), machine.stream(), nullptr, &in, &ids, &gates));

    const auto scores = logits.read();
    const auto chosen = routes.ids.read();
    for (uint64_t t = 0; t < tokens; t++) {
        const float *row = &scores[t * experts];
        for (uint64_t e = 0; e < experts; e++) {
            const bool is_chosen = chosen[t * k] == int32_t(e) || chosen[t * k + 1] == int32_t(e);
            expect(is_chosen || row[e] <= row[chosen[t * k + 1]], "the router's choice");
        }
        expect(row[chosen[t * k]] >= row[chosen[t * k + 1]], "the router's order");
    }
    std::printf("  %d tokens routed to %d of %d experts\n", int(tokens), int(k), int(experts));
    return routes;
}

// Groups the tokens' rows by expert, has each "expert" multiply its rows by a number of its own, and combines them.
void gather_and_combine(Machine &machine, const Routes &routes) {
    const lsw_context *context = machine.context();
    void *stream = machine.stream();
    const uint64_t items = tokens * k;
    Matrix<float> x(machine, tokens, width, random_values(tokens * width));
    Matrix<float> rows(machine, items, width), y(machine, tokens, width);
    Matrix<int32_t> offsets(machine, 1, experts + 1), row_map(machine, 1, items), inverse(machine, tokens, k);
    uint64_t bytes = 0;
    check(lsw_permute_workspace_bytes(context, items, experts, &bytes));
    void *workspace = bytes ? machine_alloc(machine.memory(), bytes) : nullptr;

    const lsw_mat ids = routes.ids.in(), x_in = x.in(), inverse_in = inverse.in();
    const lsw_mat_mut offsets_out = offsets.out(), row_map_out = row_map.out(), inverse_out = inverse.out();
    const lsw_mat_mut rows_out = rows.out(), y_out = y.out();
    check(lsw_permute(context, stream, experts, &ids, &offsets_out, &row_map_out, &inverse_out, workspace, bytes));
    check(lsw_gather(context, stream, &x_in, &inverse_in, &rows_out));

    auto work = rows.read();
    const auto first_row = offsets.read();
    for (uint64_t e = 0; e < experts; e++) {
        for (uint64_t i = first_row[e] * width; i < first_row[e + 1] * width; i++) {
            work[i] *= float(e + 1);
        }
    }
    machine_upload(machine.memory(), rows.data(), work.data(), work.size() * sizeof(float));
    const lsw_mat rows_in = rows.in(), gates_in = routes.gates.in();
    check(lsw_combine(context, stream, &rows_in, &inverse_in, &gates_in, &y_out));

    const auto values = x.read(), result = y.read(), gates = routes.gates.read();
    const auto chosen = routes.ids.read();
    for (uint64_t i = 0; i < result.size(); i++) {
        const uint64_t item = i / width * k;
        double scale = 0;
        for (uint64_t j = item; j < item + k; j++) {
            scale += double(gates[j]) * (chosen[j] + 1);
        }
        // One rounding by the expert, one a product, one a sum: four at most, each relative to what is no larger.
        const double bound = std::ldexp(4.0, -24) * scale * std::fabs(values[i]);
        expect(std::fabs(result[i] - scale * values[i]) <= bound, "combine");
    }
    std::printf("  grouped by expert and combined: %d values verified\n", int(result.size()));
}

// One target of the model, and its adapter for every expert.
struct Target {
    uint64_t out, in;
    Matrix<float> base, weight;
    std::vector<Matrix<float>> a, b;

    Target(Machine &machine, uint64_t out_features, uint64_t in_features)
        : out(out_features), in(in_features), base(machine, out, in, random_values(out * in)),
          weight(machine, out, in, base.read()) {
        for (uint64_t e = 0; e < experts; e++) {
            a.emplace_back(machine, rank, in, random_values(rank * in));
            b.emplace_back(machine, out, rank, random_values(out * rank));
        }
    }

    // W against W_base + sum of gate * B A in double. The bound: each of k ranks' products and sums in f32, at most
    // two units of roundoff each (tensor cores truncate), 8 more for scaling and adding; once a switch.
    void verify(const std::vector<int32_t> &ids, const std::vector<float> &gates, int switches) const {
        const auto stored = weight.read(), start = base.read();
        std::vector<double> sum(start.begin(), start.end()), size(sum.size());
        for (uint64_t e = 0; e < experts; e++) {
            const auto a_values = a[e].read(), b_values = b[e].read();
            double gate = 0;
            for (uint64_t j = 0; j < ids.size(); j++) {
                gate += ids[j] == int32_t(e) ? gates[j] : 0;
            }
            for (uint64_t i = 0; i < sum.size(); i++) {
                for (uint64_t r = 0; r < rank; r++) {
                    const double product = double(b_values[i / in * rank + r]) * a_values[r * in + i % in];
                    sum[i] += gate * product;
                    size[i] += std::fabs(product);
                }
            }
        }
        for (uint64_t i = 0; i < sum.size(); i++) {
            const double units = switches * 2.0 * (experts * rank + 8);
            const double bound = units * std::ldexp(1, -24) * (std::fabs(start[i]) + size[i]);
            expect(std::fabs(stored[i] - sum[i]) <= bound, "weight " + std::to_string(i));
        }
    }
};

Handle<lsw_bank> make_bank(Machine &machine, const std::vector<Target> &targets) {
    std::vector<lsw_target_shape> shapes;
    for (const Target &target : targets) {
        shapes.push_back({target.out, target.in, rank});
    }
    lsw_bank_options options = {sizeof options, LSW_F32, 0, experts, nullptr, 0};
    lsw_bank *made = nullptr;
    void *stream = machine.stream();
    check(lsw_bank_create(machine.context(), stream, &options, shapes.data(), shapes.size(), &made));
    Handle<lsw_bank> bank(made);
    for (uint64_t e = 0; e < experts; e++) {
        std::vector<lsw_factor> factors;
        for (const Target &target : targets) {
            factors.push_back({target.a[e].in(), target.b[e].in(), 1, 0});
        }
        check(lsw_bank_set_slot(bank.get(), stream, e, factors.data(), factors.size()));
    }
    return bank;
}

void switch_weights(Machine &machine, const std::vector<Target> &targets, const Routes &routes, int32_t form) {
    void *stream = machine.stream();
    const bool from_base = form == LSW_FROM_BASE;
    std::vector<lsw_target> all;
    for (const Target &target : targets) {
        all.push_back({target.weight.out(), from_base ? target.base.in() : lsw_mat()});
    }
    lsw_switch_options options = {sizeof options, form, 0, k, nullptr, 0};
    lsw_switch *made = nullptr;
    // The bank's handle ends with this block; the set keeps of the bank what it needs.
    {
        const Handle<lsw_bank> bank = make_bank(machine, targets);
        check(lsw_switch_create(bank.get(), stream, &options, all.data(), all.size(), &made));
    }
    const Handle<lsw_switch> set(made);

    const auto verify = [&](std::vector<int32_t> ids, std::vector<float> gates, int switches) {
        ids.resize(ids.empty() ? 0 : k);
        for (const Target &target : targets) {
            target.verify(ids, gates, from_base ? 1 : switches);
        }
    };
    // The first token's route, where the router put it; one layer first, then the rest.
    check(lsw_switch_to_targets(set.get(), stream, 0, 1, routes.ids.data(), routes.gates.data(), k));
    check(lsw_switch_to(set.get(), stream, routes.ids.data(), routes.gates.data(), k));
    verify(routes.ids.read(), routes.gates.read(), 1);
    check(lsw_switch_unmerge(set.get(), stream));
    verify({}, {}, 2);
    const char *name = from_base ? "from base" : "in place";
    std::printf("  %s: switched and back, %d weights verified\n", name, int(targets.size()));
}

void run(Machine &&machine) {
    std::printf("%s\n", machine.on_gpu() ? "GPU" : "CPU");
    check(lsw_context_warm(machine.context(), machine.stream()));
    const Routes routes = route_tokens(machine);
    gather_and_combine(machine, routes);
    std::vector<Target> targets;
    targets.emplace_back(machine, 48, 32);
    targets.emplace_back(machine, 20, 72);
    targets.emplace_back(machine, 5, 11); // rows of 44 bytes: the path without alignment
    switch_weights(machine, targets, routes, LSW_FROM_BASE);
    switch_weights(machine, targets, routes, LSW_IN_PLACE);
}

} // namespace

int main() {
    try {
        expect(lsw_version() == LSW_VERSION, "library and header are of one version");
        run({machine_cpu(), cpu_context()});
        if (Handle<lsw_context> context = gpu_context()) {
            machine gpu;
            if (machine_gpu(&gpu)) {
                run({gpu, std::move(context)});
            }
        }
    } catch (const std::exception &error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
    return 0;
}
