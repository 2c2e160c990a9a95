"""What both examples stand on: the library's context and matrices through ctypes, times of CUDA graphs, and the command line."""
import argparse
import array
import ctypes
import os
import pathlib
import sys

F32, F16, BF16, I32, U8 = range(5)  # LSW_F32 ...


class Mat(ctypes.Structure):
    """lsw_mat and lsw_mat_mut."""

    _fields_ = [("data", ctypes.c_void_p), ("rows", ctypes.c_uint64), ("cols", ctypes.c_uint64), ("stride", ctypes.c_uint64),
                ("dtype", ctypes.c_int32), ("reserved", ctypes.c_int32)]


class Matrix:
    """Rows of one dtype in host memory: what a torch tensor is on the GPU."""

    CODES = {F32: "f", I32: "i", U8: "B"}

    def __init__(self, dtype, rows, cols, values=None):
        self.dtype, self.rows, self.cols = dtype, rows, cols
        self.array = array.array(self.CODES[dtype], values if values is not None else [0] * (rows * cols))
        assert len(self.array) == rows * cols

    def row(self, i):
        return self.array[i * self.cols:(i + 1) * self.cols]


class Context:
    """A backend of the library. Calls take a Matrix on the CPU, torch tensors of two dimensions on the GPU."""

    def __init__(self, library, torch=None):
        self.library, self.torch, self.handle = library, torch, ctypes.c_void_p()
        for name in ("lsw_last_error", "lsw_status_name"):
            getattr(library, name).restype = ctypes.c_char_p
        library.lsw_context_destroy.restype = None
        if torch is None:
            self.call("lsw_context_create_cpu", 1, ctypes.byref(self.handle))
        else:
            self.call("lsw_context_create_cuda", torch.cuda.current_device(), ctypes.byref(self.handle))
            self.call("lsw_context_warm", self.handle, self.stream())

    def close(self):
        self.library.lsw_context_destroy(self.handle)

    def call(self, name, *arguments):
        """Raises what the library has to say about a failure. ctypes passes an int as 32 bits: 64-bit ones come wrapped."""
        status = getattr(self.library, name)(*arguments)
        if status != 0:
            raise RuntimeError(f"{name}: {self.library.lsw_last_error().decode()} ({self.library.lsw_status_name(status).decode()})")

    def stream(self):
        """torch's current stream; 0 is CUDA's default stream, as it is for the library."""
        return ctypes.c_void_p(self.torch.cuda.current_stream().cuda_stream if self.torch else None)

    def described(self, x):
        if isinstance(x, Matrix):
            return Mat(x.array.buffer_info()[0], x.rows, x.cols, x.cols, x.dtype, 0)
        t = self.torch
        dtypes = {t.float32: F32, t.float16: F16, t.bfloat16: BF16, t.int32: I32, t.uint8: U8}
        assert x.dim() == 2 and (x.shape[1] < 2 or x.stride(1) == 1)
        return Mat(x.data_ptr(), x.shape[0], x.shape[1], x.stride(0), dtypes[x.dtype], 0)

    def mat(self, x):
        return None if x is None else ctypes.byref(self.described(x))

    def empty(self, dtype, rows, cols):
        if self.torch is None:
            return Matrix(dtype, rows, cols)
        t = self.torch
        return t.empty(rows, cols, device="cuda", dtype={F32: t.float32, F16: t.float16, BF16: t.bfloat16, I32: t.int32, U8: t.uint8}[dtype])

    def route(self, logits, ids, gates, options=None):
        options = None if options is None else ctypes.byref(options)
        self.call("lsw_route", self.handle, self.stream(), options, self.mat(logits), self.mat(ids), self.mat(gates))


def expect(condition, what):
    if not condition:
        sys.exit(f"wrong: {what}")


class Timer:
    """Times works as CUDA graphs, in turns."""

    def __init__(self, torch):
        self.torch = torch
        self.other = torch.zeros(1 << 28, dtype=torch.int32, device="cuda")  # 1 GB: no cache keeps anything beside it

    def microseconds(self, works, turns, nodes=1):
        """The median of each work, a node of a graph of so many; the first turn does not count. Each replay follows one of the same work, so
        that no work profits from a card that its neighbour has let cool."""
        torch, graphs, times = self.torch, {}, {name: [] for name in works}
        for name, work in works.items():
            work()
            graphs[name] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[name]):
                for _ in range(nodes):
                    work()
        for turn in range(turns + 1):
            for name, graph in graphs.items():
                graph.replay()
                self.other.add_(1)
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                graph.replay()
                end.record()
                torch.cuda.synchronize()
                if turn > 0:
                    times[name].append(start.elapsed_time(end) * 1e3 / nodes)
        return {name: sorted(t)[len(t) // 2] for name, t in times.items()}


def on_the_gpu(kind, library, arguments, check, bench):
    """check(context), and bench(context, arguments, record) if it was asked for; the context is of this kind."""
    try:
        import torch
    except ImportError:
        print("skipped: GPU: there is no torch")
        return
    if not torch.cuda.is_available():
        print("skipped: GPU: torch finds none")
        expect(os.environ.get("LORA_SWITCH_REQUIRE_GPU") != "1", "LORA_SWITCH_REQUIRE_GPU=1 and no run on the GPU")
        return
    torch.manual_seed(3)
    context = kind(library, torch)
    check(context)
    if arguments.bench is not None:
        with open(arguments.record or os.devnull, "a") as record:
            bench(context, arguments, record)
    torch.cuda.synchronize()
    context.close()


def main(description, vllm, kind, on_the_cpu, check, bench):
    """`vllm`: what --vllm's DIR holds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    built = pathlib.Path(__file__).resolve().parents[2] / "target/release/liblora_switch.so"
    parser.add_argument("--library", default=os.environ.get("LORA_SWITCH_LIBRARY", str(built)), help="liblora_switch.so (%(default)s)")
    parser.add_argument("--bench", nargs="*", metavar="FILTER", help="measure cases whose name contains a FILTER; all without one")
    parser.add_argument("--vllm", metavar="DIR", help=vllm)
    parser.add_argument("--record", metavar="FILE", help="append JSON lines")
    arguments = parser.parse_args()
    library = ctypes.CDLL(arguments.library)
    on_the_cpu(library)
    on_the_gpu(kind, library, arguments, check, bench)
