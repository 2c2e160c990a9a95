#!/usr/bin/env python3
"""lora-switch from Python, with ctypes alone: adapters merged into the weights (switch), added behind the products (apply), and beside them
in the same launch (linear).

    python3 ffi-examples/python/adapters.py [--library PATH] [--bench [FILTER]] [--vllm DIR] [--record FILE]

On the CPU it needs nothing but Python, and checks each result against plain loops. With torch and a GPU it does the same on torch's
tensors (data_ptr, current stream), against torch in float64. --bench measures a pass over Llama-2-7B's matrices, in microseconds of one
CUDA graph after a pass over other memory, all on one card and in turns: torch's products alone (q k v and gate up fused); with our adapters
behind them; of few rows, beside them on a branch of the graph; of many, ahead of products that add to what they find; for one token our
products with adapters and without; and torch's with vLLM's Triton kernels where DIR holds vllm/lora/ops/triton_ops.
LORA_SWITCH_REQUIRE_GPU=1 makes a missing GPU an error.
"""
import ctypes
import json
import os
import random
import sys
import time

from common import BF16, F32, I32, U8, Context, Mat, Matrix, Timer, expect, main


class TargetShape(ctypes.Structure):
    """lsw_target_shape."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("out_features", "in_features", "rank_cap")]


class BankOptions(ctypes.Structure):
    """lsw_bank_options."""

    _fields_ = [("struct_size", ctypes.c_uint64), ("dtype", ctypes.c_int32), ("reserved", ctypes.c_int32), ("slots", ctypes.c_uint64),
                ("memory", ctypes.c_void_p), ("memory_bytes", ctypes.c_uint64)]


class Factor(ctypes.Structure):
    """lsw_factor."""

    _fields_ = [("a", Mat), ("b", Mat), ("scale", ctypes.c_float), ("reserved", ctypes.c_int32)]


class SwitchOptions(ctypes.Structure):
    """lsw_switch_options."""

    _fields_ = [("struct_size", ctypes.c_uint64), ("form", ctypes.c_int32), ("kernels", ctypes.c_int32), ("k_max", ctypes.c_uint64),
                ("memory", ctypes.c_void_p), ("memory_bytes", ctypes.c_uint64)]


class Target(ctypes.Structure):
    """lsw_target."""

    _fields_ = [("weight", Mat), ("base", Mat)]


class Routes(ctypes.Structure):
    """lsw_routes."""

    _fields_ = [("ids", Mat), ("gates", Mat), ("row_map", Mat)]


def plain(context, x):
    """The struct itself, to lie in another one."""
    return context.mat(x)._obj if x is not None else Mat()


def address(x):
    return ctypes.c_void_p(x.array.buffer_info()[0] if isinstance(x, Matrix) else x.data_ptr())


def space(workspace):
    return address(workspace), ctypes.c_uint64(workspace.cols if isinstance(workspace, Matrix) else workspace.numel())


class Bank:
    """A table of adapters over (slot, target), by address: it copies nothing, so it keeps what it was given."""

    def __init__(self, context, dtype, slots, shapes):
        self.context, self.handle, self.kept, self.count = context, ctypes.c_void_p(), {}, len(shapes)
        options = BankOptions(ctypes.sizeof(BankOptions), dtype, 0, slots, None, 0)
        shapes = (TargetShape * len(shapes))(*(TargetShape(*shape) for shape in shapes))
        context.call("lsw_bank_create", context.handle, context.stream(), ctypes.byref(options), shapes, ctypes.c_uint64(self.count),
                     ctypes.byref(self.handle))

    def set_slot(self, slot, factors):
        """`factors`: (A [rank, in], B [out, rank], scale) for every target."""
        c = self.context
        array = (Factor * len(factors))(*(Factor(plain(c, a), plain(c, b), scale, 0) for a, b, scale in factors))
        c.call("lsw_bank_set_slot", self.handle, c.stream(), ctypes.c_uint64(slot), array, ctypes.c_uint64(len(factors)))
        self.kept[slot] = factors

    def workspace(self, operation, groups, rows, k):
        """Room for a call of apply or linear with any of these groups of targets, each (first, count). linear wants zeros at first."""
        most, bytes_needed = 16, ctypes.c_uint64()
        for first, count in groups:
            self.context.call(f"lsw_{operation}_workspace_bytes", self.handle, ctypes.c_uint64(first), ctypes.c_uint64(count),
                              ctypes.c_uint64(rows), ctypes.c_uint64(k), ctypes.byref(bytes_needed))
            most = max(most, bytes_needed.value)
        space = self.context.empty(U8, 1, most)
        return space if isinstance(space, Matrix) else space.zero_()

    def apply(self, first, x, ids, gates, outputs, workspace, into=False):
        """Adds to outputs, for the targets from `first` on, what the adapters of each row's route make of x. `into`: to zeros, whatever
        they hold."""
        c = self.context
        c.call("lsw_apply_into" if into else "lsw_apply", self.handle, c.stream(), ctypes.c_uint64(first), c.mat(x), self.routes(ids, gates),
               *self.outputs(outputs), *space(workspace))

    def begin(self, first, count, x, ids, gates, workspace):
        """What of apply needs no outputs."""
        c = self.context
        c.call("lsw_apply_begin", self.handle, c.stream(), ctypes.c_uint64(first), ctypes.c_uint64(count), c.mat(x), self.routes(ids, gates),
               *space(workspace))

    def finish(self, first, ids, gates, outputs, workspace):
        """The rest of it."""
        c = self.context
        c.call("lsw_apply_finish", self.handle, c.stream(), ctypes.c_uint64(first), self.routes(ids, gates), *self.outputs(outputs),
               *space(workspace))

    def linear(self, first, weights, x, ids, gates, outputs, workspace):
        """outputs = weights x and what apply would add. ids and gates of no columns: without adapters."""
        c = self.context
        c.call("lsw_linear", self.handle, c.stream(), None, ctypes.c_uint64(first), self.mats(weights), c.mat(x), self.routes(ids, gates),
               *self.outputs(outputs), *space(workspace))

    def mats(self, those):
        return (Mat * len(those))(*(plain(self.context, x) for x in those))

    def routes(self, ids, gates):
        return ctypes.byref(Routes(plain(self.context, ids), plain(self.context, gates), Mat()))

    def outputs(self, those):
        return self.mats(those), ctypes.c_uint64(len(those))

    def close(self):
        self.context.library.lsw_bank_destroy.restype = None
        self.context.library.lsw_bank_destroy(self.handle)


class SwitchSet:
    """The adapted weights: `weights` follow the route, `bases` stay."""

    def __init__(self, bank, weights, bases, k_max):
        self.context, self.handle, self.kept = bank.context, ctypes.c_void_p(), (weights, bases)
        c, options = self.context, SwitchOptions(ctypes.sizeof(SwitchOptions), 0, 0, k_max, None, 0)
        targets = (Target * len(weights))(*(Target(plain(c, w), plain(c, base)) for w, base in zip(weights, bases)))
        c.call("lsw_switch_create", bank.handle, c.stream(), ctypes.byref(options), targets, ctypes.c_uint64(len(weights)),
               ctypes.byref(self.handle))

    def to(self, ids, gates):
        """To the route in the first row."""
        cols = ids.cols if isinstance(ids, Matrix) else ids.shape[1]
        self.context.call("lsw_switch_to", self.handle, self.context.stream(), address(ids), address(gates), ctypes.c_uint64(cols))

    def close(self):
        self.context.library.lsw_switch_destroy.restype = None
        self.context.library.lsw_switch_destroy(self.handle)


def on_the_cpu(library):
    """Merge, then multiply; multiply, then apply; or both at once: the same, by plain loops."""
    context, dice = Context(library), random.Random(5)
    out, width, slots, rank, rows, k = 6, 10, 3, 2, 4, 2
    matrix = lambda rows, cols: Matrix(F32, rows, cols, [dice.uniform(-1, 1) for _ in range(rows * cols)])
    product = lambda m, x: [sum(a * b for a, b in zip(m.row(i), x)) for i in range(m.rows)]
    base, merged, x = matrix(out, width), Matrix(F32, out, width), matrix(rows, width)
    adapters = [(matrix(rank, width), matrix(out, rank), 2.0) for _ in range(slots)]
    bank = Bank(context, F32, slots, [(out, width, rank)])
    for slot, adapter in enumerate(adapters):
        bank.set_slot(slot, [adapter])
    ids = Matrix(I32, rows, k, [slot for _ in range(rows) for slot in dice.sample(range(slots), k)])
    gates = Matrix(F32, rows, k, [dice.uniform(0, 1) for _ in range(rows * k)])

    products = [value for row in range(rows) for value in product(base, x.row(row))]
    y, halves, into = Matrix(F32, rows, out, products), Matrix(F32, rows, out, products), Matrix(F32, rows, out)
    workspace = bank.workspace("apply", [(0, 1)], rows, k)
    bank.apply(0, x, ids, gates, [y], workspace)
    bank.begin(0, 1, x, ids, gates, workspace)
    bank.finish(0, ids, gates, [halves], workspace)
    bank.apply(0, x, ids, gates, [into], workspace, into=True)
    both = Matrix(F32, rows, out)
    bank.linear(0, [base], x, ids, gates, [both], bank.workspace("linear", [(0, 1)], rows, k))
    switched = SwitchSet(bank, [merged], [base], k)
    for row in range(rows):
        exact = product(base, x.row(row))
        for slot, gate in zip(ids.row(row), gates.row(row)):
            a, b, scale = adapters[slot]
            exact = [e + gate * scale * p for e, p in zip(exact, product(b, product(a, x.row(row))))]
        expect(all(abs(got - e) < 1e-4 for got, e in zip(y.row(row), exact)), f"apply: row {row}")
        expect(halves.row(row) == y.row(row), f"apply in two halves: row {row}")
        added = [got + value for got, value in zip(into.row(row), products[row * out:])]
        expect(all(abs(got - e) < 1e-4 for got, e in zip(added, exact)), f"apply into: row {row}")
        expect(all(abs(got - e) < 1e-4 for got, e in zip(both.row(row), exact)), f"linear: row {row}")
        switched.to(Matrix(I32, 1, k, ids.row(row)), Matrix(F32, 1, k, gates.row(row)))
        expect(all(abs(got - e) < 1e-4 for got, e in zip(product(merged, x.row(row)), exact)), f"switch: row {row}")
    switched.close()
    bank.close()
    context.close()
    print(f"CPU: {rows} routes merged into the weights, applied behind the products, and beside them: verified")


LAYER = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]  # (out, in) of q, k, v, o, gate, up, down
GROUPS = [(0, 3), (3, 1), (4, 2), (6, 1)]  # first target and number of those that share their input
SCALE = 2.0


class Model:
    """Layers of random bf16 weights, those of a group in one matrix, with adapters in every slot: A [slots, 1, rank, in] and B [slots, 1,
    out, rank] of each target, as vLLM stacks them."""

    def __init__(self, context, layer, groups, layers, slots, rank):
        self.context, self.torch, self.layer, self.groups, self.layers = context, context.torch, layer, groups, layers
        random_of = lambda size, *shape: self.torch.empty(shape, device="cuda", dtype=self.torch.bfloat16).uniform_(-size, size)
        rows = lambda first, count: sum(out for out, _ in layer[first:first + count])
        self.fused = [random_of(0.04, rows(*group), layer[group[0]][1]) for _ in range(layers) for group in groups]
        targets = layer * layers
        self.a = [random_of(0.02, slots, 1, rank, width) for _, width in targets]
        self.b = [random_of(0.02, slots, 1, out, rank) for out, _ in targets]
        self.bank = Bank(context, BF16, slots, [(out, width, rank) for out, width in targets])
        for slot in range(slots):
            self.bank.set_slot(slot, [(a[slot, 0], b[slot, 0], SCALE) for a, b in zip(self.a, self.b)])

    def parts(self, group, whole, dim):
        """A group's targets in its fused output (dim 1) or weight (dim 0)."""
        first, count = self.groups[group]
        return whole.split([out for out, _ in self.layer[first:first + count]], dim)

    def each(self, visit):
        for layer in range(self.layers):
            for group in range(len(self.groups)):
                visit(layer * len(self.groups) + group, layer * len(self.layer) + self.groups[group][0], group)


class Batch:
    """Rows, a route for each, and what they become in each group."""

    def __init__(self, model, rows, k):
        self.model, self.torch, self.k, c = model, model.torch, k, model.context
        slots = model.a[0].shape[0]
        random_of = lambda *shape: self.torch.empty(shape, device="cuda", dtype=self.torch.bfloat16).uniform_(-1, 1)
        widths = {model.layer[first][1] for first, _ in model.groups}
        inputs = {width: random_of(rows, width) for width in sorted(widths)}
        self.x = [inputs[model.layer[first][1]] for first, _ in model.groups]
        self.y = [c.empty(BF16, rows, sum(out for out, _ in model.layer[first:first + count])) for first, count in model.groups]
        self.ids, self.gates = c.empty(I32, rows, k), c.empty(F32, rows, k)
        c.route(self.torch.randn(rows, slots, device="cuda"), self.ids, self.gates)
        self.workspace = model.bank.workspace("apply", model.groups, rows, k)
        self.side = self.torch.cuda.Stream(priority=-1)
        if rows <= 8:
            self.zeros = model.bank.workspace("linear", model.groups, rows, k)

    def product(self, weight, group):
        self.torch.mm(self.x[group], weight.t(), out=self.y[group])

    def apply(self, first, group, into=False):
        outputs = self.model.parts(group, self.y[group], 1)
        self.model.bank.apply(first, self.x[group], self.ids, self.gates, outputs, self.workspace, into)

    def apply_beside(self, work, first, group):
        """apply in two halves, the first of them on another stream than `work`."""
        bank, here = self.model.bank, self.torch.cuda.current_stream()
        self.side.wait_stream(here)
        with self.torch.cuda.stream(self.side):
            bank.begin(first, self.model.groups[group][1], self.x[group], self.ids, self.gates, self.workspace)
        work()
        here.wait_stream(self.side)
        bank.finish(first, self.ids, self.gates, self.model.parts(group, self.y[group], 1), self.workspace)

    def linear(self, i, first, group, k):
        model = self.model
        model.bank.linear(first, model.parts(group, model.fused[i], 0), self.x[group], self.ids[:, :k], self.gates[:, :k],
                          model.parts(group, self.y[group], 1), self.zeros)

    def base(self):
        self.model.each(lambda i, _, group: self.product(self.model.fused[i], group))

    def with_apply(self):
        def visit(i, first, group):
            self.product(self.model.fused[i], group)
            self.apply(first, group)

        self.model.each(visit)

    def with_apply_beside(self):
        self.model.each(lambda i, first, group: self.apply_beside(lambda: self.product(self.model.fused[i], group), first, group))

    def with_apply_into(self):
        def visit(i, first, group):
            self.apply(first, group, into=True)
            self.y[group].addmm_(self.x[group], self.model.fused[i].t())

        self.model.each(visit)

    def is_applied(self, first, group, before, magnitude, additions):
        """Each y = before + sum of gate * scale * B (A x) in float64, as near as one rounding to bf16 and sums in f32 allow: of so many
        magnitudes where `before` is a product too, and those of the adapters. Of many rows and few ranks A x may be rounded to bf16."""
        x, gates, model, good = self.x[group].double(), self.gates.double() * SCALE, self.model, True
        slots, _, rank, _ = model.a[0].shape
        rounding = 2.0**-8 if x.shape[0] > 64 and slots * (-(-rank // 16) * 16) <= 128 else 0.0
        parts = zip(*(model.parts(group, whole, 1) for whole in (self.y[group], before, magnitude)))
        for target, (y, exact, size) in enumerate(parts, first):
            exact, rounded, a, b = exact.double(), 0.0, model.a[target][:, 0].double(), model.b[target][:, 0].double()
            for slot in range(a.shape[0]):
                gate = (gates * (self.ids == slot)).sum(1, keepdim=True)
                product = gate * (x @ a[slot].t())
                exact = exact + product @ b[slot].t()
                rounded = rounded + product.abs() @ b[slot].abs().t()
                size = size + gate.abs() * (x.abs() @ a[slot].abs().t() @ b[slot].abs().t())
            allowed = exact.abs() * 2.0**-8 + rounded * rounding + size * (additions + a.shape[2] + a.shape[1] * self.k) * 2.0**-23
            good &= ((y.double() - exact).abs() <= allowed).all().item()
        return good

    def check(self, i, first, group):
        """apply behind torch's product, in one call and in two halves, and alone; linear for few rows: without adapters, then with them."""
        self.product(self.model.fused[i], group)
        before = self.y[group].clone()
        self.apply(first, group)
        good, whole = self.is_applied(first, group, before, before.double().abs(), 0), self.y[group].clone()
        self.apply_beside(lambda: self.y[group].copy_(before), first, group)
        good &= self.torch.equal(self.y[group], whole)
        self.y[group].fill_(float("nan"))
        self.apply(first, group, into=True)
        nothing = self.torch.zeros_like(before)
        good &= self.is_applied(first, group, nothing, nothing.double(), 0)
        if self.ids.shape[0] <= 8:
            x, weight = self.x[group].double(), self.model.fused[i].double()
            exact, size = x @ weight.t(), x.abs() @ weight.abs().t()
            self.y[group].fill_(float("nan"))
            self.linear(i, first, group, 0)
            allowed = exact.abs() * 2.0**-8 + size * x.shape[1] * 2.0**-23
            good &= ((self.y[group].double() - exact).abs() <= allowed).all().item()
            self.linear(i, first, group, self.k)
            good &= self.is_applied(first, group, exact, size, x.shape[1])
        return good


def check_switch(model, ids, gates):
    """Every weight of every target, from base, against float64."""
    torch = model.torch
    merged = [torch.full_like(weight, float("nan")) for weight in model.fused]
    pieces = lambda whole: [part for i, weight in enumerate(whole) for part in model.parts(i % len(model.groups), weight, 0)]
    switched = SwitchSet(model.bank, pieces(merged), pieces(model.fused), ids.shape[1])
    switched.to(ids, gates)
    for target, (got, base) in enumerate(zip(pieces(merged), pieces(model.fused))):
        exact = base.double()
        size = exact.abs()
        for slot, gate in zip(ids[0].tolist(), gates[0].double().tolist()):
            a, b = model.a[target][slot, 0].double(), model.b[target][slot, 0].double()
            exact, size = exact + gate * SCALE * (b @ a), size + abs(gate) * SCALE * (b.abs() @ a.abs())
        allowed = exact.abs() * 2.0**-8 + size * (a.shape[0] * ids.shape[1] + 2) * 2.0**-22
        expect(((got.double() - exact).abs() <= allowed).all().item(), f"the switched weight of target {target}")
    torch.cuda.synchronize()
    switched.close()


class Peer:
    """vLLM's kernels: one adapter a row and call, so k calls of shrink and expand a group. Its kernels know no gates."""

    def __init__(self, folder, batch):
        sys.path.insert(0, folder)
        from vllm.lora.ops.triton_ops.lora_expand_op import _lora_expand
        from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
        from vllm.lora.ops.triton_ops.lora_shrink_op import _lora_shrink
        self.batch, self.shrink, self.expand, t = batch, _lora_shrink, _lora_expand, batch.torch
        (slots, _, self.rank, _), self.rows = batch.model.a[0].shape, batch.ids.shape[0]
        self.metas = [LoRAKernelMeta.make(slots, self.rows, "cuda") for _ in range(batch.k)]
        self.hidden = {count: t.empty(count, self.rows, self.rank, device="cuda") for _, count in batch.model.groups}
        self.new_route()

    def new_route(self):
        """What a new route costs its host, in microseconds an adapter of k."""
        start = time.perf_counter()
        for j, meta in enumerate(self.metas):
            meta.prepare_tensors(self.batch.ids[:, j].contiguous())
        self.batch.torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e6 / len(self.metas)

    def __call__(self):
        batch, model = self.batch, self.batch.model

        def visit(i, first, group):
            batch.product(model.fused[i], group)
            count = model.groups[group][1]
            for meta in self.metas:
                arguments = meta.meta_args(self.rows, False)
                self.shrink(batch.x[group], model.a[first:first + count], self.hidden[count], *arguments, SCALE)
                self.expand(self.hidden[count], model.b[first:first + count], batch.y[group], *arguments, 0, True)

        model.each(visit)


class Bench:
    """Passes as CUDA graphs, in turns."""

    def __init__(self, context, vllm, record, wanted):
        self.context, self.torch, self.vllm, self.record, self.wanted = context, context.torch, vllm, record, wanted
        self.timer = Timer(self.torch)

    def case(self, model, rows, rank, k, turns):
        name = f"apply/7b/T{rows}/r{rank}/k{k}"
        batch = Batch(model, rows, k)
        elsewhere, there = ("beside", batch.with_apply_beside) if rows <= 64 else ("into", batch.with_apply_into)
        works = {"torch": batch.base, "ours": batch.with_apply, elsewhere: there}
        peer = Peer(self.vllm, batch) if self.vllm else None
        if peer:
            works["vllm"] = peer
        if rows <= 8:
            works["linear"] = lambda: model.each(lambda i, first, group: batch.linear(i, first, group, k))
            works["linear, no adapters"] = lambda: model.each(lambda i, first, group: batch.linear(i, first, group, 0))
        us = self.timer.microseconds(works, turns)
        last = model.layers - 1
        checked = all(batch.check(last * len(GROUPS) + g, last * len(LAYER) + GROUPS[g][0], g) for g in range(len(GROUPS)))
        expect(checked, name)
        over = lambda which: f"{us[which]:10.1f} us ({us[which] / us['torch']:.3f})" if which in us else "-"
        print(f"{name:24} torch {us['torch']:10.1f} us   ours {over('ours')}, {elsewhere} {over(elsewhere)}   vLLM {over('vllm')}", flush=True)
        if rows <= 8:
            print(f"{'':24} linear {over('linear')}, without adapters {over('linear, no adapters')}", flush=True)
        if peer:
            peer.new_route()
            print(f"{'':24} a new route on the host: ours 0, vLLM {peer.new_route():.0f} us for each adapter of k", flush=True)
        for case, which in ((name, "ours"), (f"{name}/{elsewhere}", elsewhere)):
            row = {"case": case, "mode": "token", "us": us[which], "base_us": us["torch"], "peer": "vLLM 0.24 Triton" if peer else None,
                   "peer_us": us.get("vllm"), "checked": checked, "gpu": self.torch.cuda.get_device_name(),
                   "commit": os.environ.get("LORA_SWITCH_COMMIT", "unknown")}
            self.record.write(json.dumps({key: value for key, value in row.items() if value is not None}) + "\n")

    def run(self):
        cases = [(1, 16, 15), (32, 16, 15), (4096, 16, 3), (1, 64, 15)]
        model = None
        for rows, rank, turns in cases:
            if any(part in f"apply/7b/T{rows}/r{rank}/k2" for part in self.wanted):
                if model is None or model.a[0].shape[2] != rank:
                    model = None  # its memory, before the next one asks for as much
                    model = Model(self.context, LAYER, GROUPS, 32, 8, rank)
                self.case(model, rows, rank, 2, turns)


def on_the_gpu(context):
    model = Model(context, [(256, 512), (264, 512), (512, 256)], [(0, 2), (2, 1)], 2, 5, 16)
    for rows in (1, 9, 100):
        batch = Batch(model, rows, 2)
        model.each(lambda i, first, group: expect(batch.check(i, first, group), f"{rows} rows, target {first}"))
    check_switch(model, batch.ids, batch.gates)
    print("GPU: merged into the weights, applied behind the products, and beside them: verified against torch")
    model.bank.close()


def bench(context, arguments, record):
    Bench(context, arguments.vllm, record, arguments.bench or [""]).run()


if __name__ == "__main__":
    main(__doc__, "vllm/lora/ops/triton_ops is here", Context, on_the_cpu, on_the_gpu, bench)
