#!/usr/bin/env python3
"""lora-switch from Python, with ctypes alone: tokens are routed, grouped by expert, moved to their experts' rows and combined again.

    python3 ffi-examples/python/route_and_permute.py [--library PATH] [--bench [FILTER]] [--vllm DIR] [--record FILE]

On the CPU it needs nothing but Python, and checks each result against plain loops. With torch and a GPU it does the same on torch's
tensors (data_ptr, current stream), against torch. --bench measures each call beside what torch, and vLLM where DIR holds its compiled
kernels, take for the same work: microseconds a node of one CUDA graph, all on one card, in turns. LORA_SWITCH_REQUIRE_GPU=1 makes a
missing GPU an error.
"""
import ctypes
import json
import math
import os
import random
import sys

from common import BF16, F32, I32, U8, Context, Mat, Matrix, Timer, expect, main

SIGMOID, SUM_OF_TWO = 1, 1  # LSW_SIGMOID, LSW_GROUP_SUM_OF_TWO


class RouteOptions(ctypes.Structure):
    """lsw_route_options; zeros mean none of it."""

    _fields_ = [("struct_size", ctypes.c_uint64), ("renormalize", ctypes.c_int32), ("only_x_is_new", ctypes.c_int32),
                ("score", ctypes.c_int32), ("group_score", ctypes.c_int32), ("scale", ctypes.c_float), ("softcap", ctypes.c_float),
                ("groups", ctypes.c_uint64), ("top_groups", ctypes.c_uint64)] + [
                    (name, ctypes.POINTER(Mat)) for name in ("bias", "valid", "mask")]

    @classmethod
    def deepseek_v3(cls, bias):
        """Sigmoids; of 8 groups the 4 with the largest sums of two; `bias`, a Mat, for the choice only."""
        return cls(struct_size=ctypes.sizeof(cls), renormalize=1, score=SIGMOID, group_score=SUM_OF_TWO, groups=8, top_groups=4,
                   bias=ctypes.pointer(bias))


class PermuteOptions(ctypes.Structure):
    """lsw_permute_options."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("struct_size", "experts", "first", "last", "block")] + [
        ("filler", ctypes.c_int32), ("reserved", ctypes.c_int32)]

    @classmethod
    def all_of(cls, experts, block=1):
        return cls(ctypes.sizeof(cls), experts, 0, experts, block, -1, 0)


class PermuteSizes(ctypes.Structure):
    """lsw_permute_sizes."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("rows", "blocks", "workspace_bytes")]


class Tokens(Context):
    """A context with the calls of this example."""

    def gate_workspace(self, tokens, experts, hidden):
        """Zeros, once: every call leaves it ready for the next."""
        size = ctypes.c_uint64()
        self.call("lsw_gate_workspace_bytes", self.handle, *map(ctypes.c_uint64, (tokens, experts, hidden)), ctypes.byref(size))
        return self.empty(U8, 1, size.value).zero_()

    def gate(self, x, weight, ids, gates, workspace):
        """Of a weight that the launch before does not write: a layer's."""
        options = RouteOptions(struct_size=ctypes.sizeof(RouteOptions), renormalize=1, only_x_is_new=1)
        self.call("lsw_gate", self.handle, self.stream(), ctypes.byref(options), self.mat(x), self.mat(weight), None, self.mat(ids),
                  self.mat(gates), None, ctypes.c_void_p(workspace.data_ptr()), ctypes.c_uint64(workspace.numel()))

    def gather(self, x, inverse, rows):
        self.call("lsw_gather", self.handle, self.stream(), self.mat(x), self.mat(inverse), self.mat(rows))

    def combine(self, rows, inverse, gates, y):
        self.call("lsw_combine", self.handle, self.stream(), self.mat(rows), self.mat(inverse), self.mat(gates), self.mat(y))


class Maps:
    """The maps of a batch, in buffers that are made once."""

    def __init__(self, context, tokens, k, experts, block=1):
        self.context, self.options, sizes = context, PermuteOptions.all_of(experts, block), PermuteSizes()
        context.call("lsw_permute_get_sizes", context.handle, ctypes.byref(self.options), ctypes.c_uint64(tokens * k), ctypes.byref(sizes))
        self.offsets, self.inverse = context.empty(I32, 1, experts + 1), context.empty(I32, tokens, k)
        self.row_map, self.block_experts = context.empty(I32, 1, sizes.rows), context.empty(I32, 1, sizes.blocks)
        self.workspace, self.bytes = context.empty(U8, 1, sizes.workspace_bytes), sizes.workspace_bytes

    def sort(self, ids):
        c, mat = self.context, self.context.mat
        workspace = ctypes.c_void_p(self.workspace.data_ptr() if self.bytes else None)
        c.call("lsw_permute_with", c.handle, c.stream(), ctypes.byref(self.options), mat(ids), mat(self.offsets), mat(self.row_map),
               mat(self.inverse), mat(self.block_experts), workspace, ctypes.c_uint64(self.bytes))


def on_the_cpu(library):
    """A batch from logits to the combined rows; each step against plain Python."""
    context, dice = Tokens(library), random.Random(5)
    tokens, k, experts, width, block = 37, 3, 8, 20, 4
    logits = Matrix(F32, tokens, experts, [dice.uniform(-3, 3) for _ in range(tokens * experts)])
    ids, gates = Matrix(I32, tokens, k), Matrix(F32, tokens, k)
    context.route(logits, ids, gates)
    for t in range(tokens):
        order = sorted(range(experts), key=lambda e: (-logits.row(t)[e], e))[:k]
        expect(list(ids.row(t)) == order, f"experts of token {t}")
        scores = [math.exp(logits.row(t)[e] - logits.row(t)[order[0]]) for e in order]
        expect(all(abs(g - s / sum(scores)) < 1e-6 for g, s in zip(gates.row(t), scores)), f"gates of token {t}")

    maps = Maps(context, tokens, k, experts, block)
    maps.sort(ids)
    rows = []
    for e in range(experts):
        expect(maps.offsets.array[e] == len(rows), f"where expert {e} begins")
        rows += [i for i in range(tokens * k) if ids.array[i] == e]
        rows += [-1] * (-len(rows) % block)
        expect(set(maps.block_experts.array[maps.offsets.array[e] // block:len(rows) // block]) <= {e}, f"blocks of expert {e}")
    expect(list(maps.row_map.array[:len(rows)]) == rows and set(maps.row_map.array[len(rows):]) <= {-1}, "the order of rows")
    expect(all(rows[row] == i for i, row in enumerate(maps.inverse.array)), "the inverse map")

    x = Matrix(F32, tokens, width, [dice.uniform(-1, 1) for _ in range(tokens * width)])
    moved, y = Matrix(F32, len(rows), width), Matrix(F32, tokens, width)
    context.gather(x, maps.inverse, moved)
    expect(all(moved.row(row) == x.row(i // k) for row, i in enumerate(rows) if i >= 0), "the moved rows")
    context.combine(moved, maps.inverse, gates, y)
    # Equal rows and gates that sum to one: the token, but for the roundings of k products and sums.
    expect(all(abs(a - b) < 1e-6 for a, b in zip(y.array, x.array)), "the combined rows")
    context.close()
    print(f"CPU: {tokens} tokens routed, grouped by expert and combined: verified")


def batch(context, tokens, k, experts, width):
    """Logits, hidden states and routes on the GPU, made by the library's router."""
    t = context.torch
    logits, x = t.randn(tokens, experts, device="cuda"), t.randn(tokens, width, device="cuda").bfloat16()
    ids, gates = context.empty(I32, tokens, k), context.empty(F32, tokens, k)
    context.route(logits, ids, gates)
    return logits, x, ids, gates


def check_maps(torch, maps, ids, experts, block):
    """Against a stable sort of torch's."""
    flat, device = ids.flatten().long(), ids.device
    order, counts = flat.argsort(stable=True), flat.bincount(minlength=experts)
    padded, zero = (counts + block - 1) // block * block, torch.zeros(1, dtype=torch.long, device=device)
    offsets, begin = torch.cat([zero, padded.cumsum(0)]), torch.cat([zero, counts.cumsum(0)])
    row = offsets[flat[order]] + torch.arange(len(flat), device=device) - begin[flat[order]]
    row_map = torch.full((maps.row_map.shape[1],), -1, device=device)
    row_map[row] = order
    inverse = torch.empty_like(flat)
    inverse[order] = row
    return ((maps.offsets[0] == offsets).all() and (maps.row_map[0] == row_map).all() and (maps.inverse.flatten() == inverse).all()).item()


def are_best(logits, ids):
    """Whether ids name k of the best experts of each token: equal logits may come in any order from torch's topk."""
    return (logits.gather(1, ids.long()) == logits.topk(ids.shape[1]).values).all().item()


def check_batch(context, tokens, k, experts, width, block):
    """All calls, against torch."""
    torch = context.torch
    logits, x, ids, gates = batch(context, tokens, k, experts, width)
    best = logits.softmax(-1).topk(k)
    expect(are_best(logits, ids), "the router's experts")
    expect((gates - best.values / best.values.sum(-1, keepdim=True)).abs().max().item() < 1e-5, "the router's gates")
    maps = Maps(context, tokens, k, experts, block)
    maps.sort(ids)
    expect(check_maps(torch, maps, ids, experts, block), "the maps")
    rows, y = context.empty(BF16, maps.row_map.shape[1], width), context.empty(BF16, tokens, width)
    context.gather(x, maps.inverse, rows)
    expect((rows[maps.inverse.flatten().long()] == x.repeat_interleave(k, 0)).all().item(), "the moved rows")
    context.combine(rows, maps.inverse, gates, y)
    exact = x.double() * gates.double().sum(-1, keepdim=True)
    expect(((y.double() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-6).all().item(), "the combined rows")


class Bench:
    """Times calls as nodes of CUDA graphs, in turns, and checks what ours left behind."""

    def __init__(self, context, vllm, record, wanted):
        self.context, self.torch, self.record, self.wanted = context, context.torch, record, wanted
        self.vllm = self.load(vllm) if vllm else None
        self.timer = Timer(self.torch)

    def load(self, folder):
        sys.path.insert(0, folder)
        self.torch.ops.load_library(os.path.join(folder, "vllm/_moe_C_stable_libtorch.abi3.so"))
        return self.torch.ops._moe_C

    def case(self, name, nodes, works, check=None):
        """`works`: "ours" (left out where the library has no such call) and the peers by name."""
        if not any(part in name for part in self.wanted):
            return
        us = self.timer.microseconds(works, 9, nodes)
        checked = None
        if check is not None and "ours" in works:
            works["ours"]()
            checked = bool(check())
            expect(checked, name)
        ours = us.pop("ours", None)
        line = "  ".join(f"{peer} {t:.2f}" + (f" ({t / ours:.2f}x)" if ours else "") for peer, t in us.items())
        print(f"{name:40} {'-' if ours is None else f'{ours:.2f}':>9} us   {line}", flush=True)
        for peer, t in us.items():
            row = {"case": name, "mode": "loop", "us": ours, "peer": peer, "peer_us": t, "checked": checked,
                   "gpu": self.torch.cuda.get_device_name()}
            if self.record:
                self.record.write(json.dumps({key: value for key, value in row.items() if value is not None}) + "\n")

    def route(self, tokens, experts, k):
        torch, (logits, _, ids, gates) = self.torch, batch(self.context, tokens, k, experts, 8)

        def peer():
            best = logits.softmax(-1).topk(k)
            return best.values / best.values.sum(-1, keepdim=True)

        works = {"ours": lambda: self.context.route(logits, ids, gates), "torch": peer}
        if self.vllm:
            w, i, s = torch.empty_like(gates), torch.empty_like(ids), torch.empty_like(ids)
            works["vllm topk_softmax"] = lambda: self.vllm.topk_softmax(w, i, s, logits, True, None)
        self.case(f"route/T{tokens}/N{experts}/k{k}/f32", 64, works, lambda: are_best(logits, ids))

    def grouped(self, tokens, experts, k):
        torch = self.torch
        scores, bias = torch.randn(tokens, experts, device="cuda"), torch.randn(experts, device="cuda")

        def peer():
            s = scores.sigmoid()
            groups = (s + bias).view(tokens, 8, -1)
            best = groups.topk(2, -1).values.sum(-1).topk(4).indices
            mask = torch.zeros(tokens, 8, device="cuda").scatter_(1, best, 1.0)
            chosen = groups.masked_fill(mask.unsqueeze(-1) == 0, float("-inf")).flatten(1).topk(k).indices
            w = s.gather(1, chosen)
            return w / w.sum(-1, keepdim=True)

        gates, ids = self.context.empty(F32, tokens, k), self.context.empty(I32, tokens, k)
        options = RouteOptions.deepseek_v3(self.context.described(bias.unsqueeze(0)))
        works = {"ours": lambda: self.context.route(scores, ids, gates, options), "torch": peer}
        if self.vllm:
            works["vllm grouped_topk"] = lambda: self.vllm.grouped_topk(scores, 8, 4, k, True, 1.0, bias, 1)
        self.case(f"route/T{tokens}/N{experts}/k{k}/grouped", 64, works, lambda: ((gates - peer()).abs() < 1e-5).float().mean() > 0.999)

    def gate(self, tokens, width, experts, k):
        torch = self.torch
        x, w = torch.randn(tokens, width, device="cuda").bfloat16(), torch.randn(experts, width, device="cuda").bfloat16()
        gates, ids = self.context.empty(F32, tokens, k), self.context.empty(I32, tokens, k)
        scratch, linear = torch.empty_like(ids), torch.nn.functional.linear
        workspace = self.context.gate_workspace(tokens, experts, width)
        works = {"ours": lambda: self.context.gate(x, w, ids, gates, workspace),
                 "torch linear, softmax, topk": lambda: linear(x, w).float().softmax(-1).topk(k)}
        if self.vllm:
            peer_gates, peer_ids = torch.empty_like(gates), torch.empty_like(ids)
            works["torch linear, vllm topk_softmax"] = lambda: self.vllm.topk_softmax(peer_gates, peer_ids, scratch, linear(x, w), True, None)
        logits = x.double() @ w.double().T

        def near():  # of logits in float64: sums in f32 may swap what is closer than this
            return (logits.gather(1, ids.long()) >= logits.topk(k).values[:, -1:] - 1e-2).all()

        self.case(f"gate/T{tokens}/H{width}/N{experts}/k{k}/bf16", 64, works, near)

    def maps(self, tokens, experts, k, block):
        torch, (_, _, ids, _) = self.torch, batch(self.context, tokens, k, experts, 8)
        maps = Maps(self.context, tokens, k, experts, block)

        edges = torch.arange(experts + 1, dtype=torch.int32, device="cuda")

        def peer():
            experts_in_order, order = ids.flatten().sort(stable=True)
            return order, torch.searchsorted(experts_in_order, edges)

        works = {"ours": lambda: maps.sort(ids), "torch sort, searchsorted": peer}
        if self.vllm:
            out = self.context.empty(I32, 1, tokens * k + experts * (block - 1))[0]
            blocks, total = self.context.empty(I32, 1, -(-out.numel() // block))[0], self.context.empty(I32, 1, 1)[0]
            works["vllm moe_align_block_size"] = lambda: self.vllm.moe_align_block_size(ids, experts, block, out, blocks, total, None)
        self.case(f"maps/T{tokens}/N{experts}/k{k}/b{block}", 64, works, lambda: check_maps(torch, maps, ids, experts, block))

    def permute(self, tokens, experts, k, width, nodes):
        """Maps and gather, then combine, on the same batch."""
        torch, (_, x, ids, gates) = self.torch, batch(self.context, tokens, k, experts, width)
        maps = Maps(self.context, tokens, k, experts)
        rows, y = self.context.empty(BF16, tokens * k, width), self.context.empty(BF16, tokens, width)

        def ours():
            maps.sort(ids)
            self.context.gather(x, maps.inverse, rows)

        works = {"ours": ours, "torch argsort, index_select": lambda: x.index_select(0, ids.flatten().argsort(stable=True) // k)}
        if self.vllm:
            from vllm.moe_permute_unpermute import MoEPermuteScratch, moe_permute, moe_unpermute
            scratch = MoEPermuteScratch(tokens, k, experts, experts, torch.device("cuda"), width, torch.bfloat16)
            works["vllm moe_permute"] = lambda: moe_permute(x, None, ids, experts, scratch=scratch)

        def moved():
            return (rows[maps.inverse.flatten().long()] == x.repeat_interleave(k, 0)).all()

        self.case(f"permute/T{tokens}/N{experts}/k{k}/D{width}/bf16", nodes, works, moved)

        ours()
        flat = maps.inverse.flatten().long()
        works = {"ours": lambda: self.context.combine(rows, maps.inverse, gates, y),
                 "torch gather, multiply, sum": lambda: (rows[flat].view(tokens, k, width) * gates.unsqueeze(-1)).sum(1)}
        if self.vllm:
            out, inverse = torch.empty_like(y), maps.inverse.flatten()
            first = torch.zeros(experts + 1, dtype=torch.int64, device="cuda")
            first.copy_(maps.offsets[0])
            works["vllm moe_unpermute"] = lambda: moe_unpermute(out, rows, gates, inverse, first)
        exact = x.float() * gates.sum(-1, keepdim=True)

        def close():
            return ((y.float() - exact).abs() <= exact.abs() * 2.0**-7 + 1e-6).all()

        self.case(f"combine/T{tokens}/k{k}/D{width}/bf16", nodes, works, close)

    def run(self):
        print(f"{self.torch.cuda.get_device_name()}: microseconds a node, and how much longer the peers take")
        for tokens, experts, k in [(1, 8, 2), (1, 64, 8), (1, 256, 8), (256, 64, 8), (256, 256, 8), (16384, 256, 8)]:
            self.route(tokens, experts, k)
        for tokens in (1, 16384):
            self.grouped(tokens, 256, 8)
        for tokens, experts, k in [(1, 8, 2), (1, 256, 8), (64, 256, 8), (4096, 256, 8)]:
            self.gate(tokens, 4096, experts, k)
        for tokens, experts in [(64, 64), (4096, 64), (16384, 256)]:
            self.maps(tokens, experts, 8, 64)
        self.permute(256, 64, 2, 4096, 64)
        self.permute(16384, 256, 8, 4096, 4)


def on_the_gpu(context):
    for shape in [(1, 2, 8, 512, 1), (100, 8, 64, 1032, 16), (5000, 8, 256, 64, 64)]:
        check_batch(context, *shape)
    print("GPU: routed, grouped by expert and combined: verified against torch")


def bench(context, arguments, record):
    Bench(context, arguments.vllm, record, arguments.bench or [""]).run()


if __name__ == "__main__":
    main(__doc__, "vllm/_moe_C_stable_libtorch.abi3.so and vllm/moe_permute_unpermute.py are here", Tokens, on_the_cpu, on_the_gpu, bench)
