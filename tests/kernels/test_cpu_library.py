"""The compiled library itself: what it writes and reads, how it packs, which instruction set runs, what its absence gives."""

import os
import shutil
import subprocess
import sys
from ctypes import c_int64
from pathlib import Path

import pytest
import torch
from cpu_cases import HALVES, LIBRARY, RUNNABLE, each_instruction_set, threads
from hamming_cases import make_case
from hamming_oracle import pack_by_hand
from torch.utils._python_dispatch import TorchDispatchMode

from hf_binaryformer.kernels import cpu, cpu_library, pack_sign_bits
from hf_binaryformer.kernels.cpu_library import TYPES, Call, Library, LibraryMissingError, Rows

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
DTYPES = [torch.float32, *HALVES]
HEAD_DIMS = [1, 31, 64, 65, 100]
SENTINEL = -12345.0
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}

needs_library = pytest.mark.skipif(LIBRARY is None, reason=f"no compiled library: {cpu_library.MISSING_REASON}")
instruction_set = pytest.fixture(params=RUNNABLE)(each_instruction_set)
on_every_instruction_set = pytest.mark.usefixtures("instruction_set")


@pytest.mark.skipif(COMPILER is None or bool(os.environ.get("HF_BINARYFORMER_NO_KERNEL")), reason="no compiler")
def test_a_compiler_means_a_library() -> None:
    """Without this, a build that fails would only skip every test of the compiled backend."""
    assert LIBRARY is not None, cpu_library.MISSING_REASON
    assert RUNNABLE[-1] == "portable"


class Framed:
    """A tensor in the middle of a larger one that is full of one number; rows with a gap on both sides."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, around: float = SENTINEL) -> None:
        batch, heads, tokens, channels = shape
        self.around = around
        self.whole = torch.full((batch + 2, tokens + 2, heads + 2, channels + 7), around, dtype=dtype)
        self.inside = self.whole[1:-1, 1:-1, 1:-1, 3:-4].transpose(1, 2)

    def is_intact(self) -> bool:
        """Only the tensor itself was written. Overwrites it."""
        self.inside.fill_(self.around)
        return bool((self.whole == self.around).all())


class Flat(Framed):
    """The same for contiguous tensors."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        size = torch.Size(shape).numel()
        self.around = SENTINEL
        self.whole = torch.full((size + 128,), SENTINEL)
        self.inside = self.whole[64:-64].view(shape)


def framed_copy(tensor: torch.Tensor) -> torch.Tensor:
    """An input with NaN between its rows, which must not be read."""
    frame = Framed(tensor.shape, tensor.dtype, torch.nan)
    return frame.inside.copy_(tensor)


@needs_library
@on_every_instruction_set
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("queries", "keys", "head_dim", "value_dim", "planes"),
    [(1, 1, 1, 1, None), (37, 21, 65, 5, None), (17, 300, 64, 16, None), (515, 9, 31, 33, None), (18, 35, 100, 17, 2)],
)
def test_nothing_is_written_outside_the_outputs(queries, keys, head_dim, value_dim, planes, dtype) -> None:
    """Whole vectors stored at the end of a row, a tile, a block or an array show in the frame around it."""
    plain = make_case(queries, keys, head_dim, value_dim, planes=planes, dtype=dtype)
    ternary = planes is None
    case = plain.with_(query_weight=plain.query_weight.float(), key_weight=plain.key_weight.float())
    case = case.with_(value=framed_copy(case.value), output_gradient=framed_copy(case.output_gradient))
    rows, columns = case.query_weight.shape, case.key_weight.shape
    output, d_value = Framed(plain.output_gradient.shape, dtype), Framed(plain.value.shape, dtype)
    logsumexp, d_query_weight, d_key_weight = Flat(rows[:3]), Flat(rows), Flat(columns)
    d_query, d_key = Flat((*rows[:3], head_dim)), Flat((*columns[:3], head_dim))

    call, _held = cpu._prepare(*case.inputs(), head_dim, head_dim**-0.5)
    call.threads = 2
    call.output, call.logsumexp = Rows.of(output.inside), logsumexp.inside.data_ptr()
    LIBRARY.forward(call)
    call.grad_output, call.grad_value = Rows.of(case.output_gradient), Rows.of(d_value.inside)
    call.grad_query_weight, call.grad_key_weight = d_query_weight.inside.data_ptr(), d_key_weight.inside.data_ptr()
    if ternary:
        call.grad_query, call.grad_key, call.seed = d_query.inside.data_ptr(), d_key.inside.data_ptr(), 3
    LIBRARY.backward(call)

    same = plain.with_(query_weight=case.query_weight, key_weight=case.key_weight)
    frames = {"output": output, "value": d_value, "query_weight": d_query_weight, "key_weight": d_key_weight}
    for name, expected in same.run(backend="cpu").items():
        result, largest = frames[name].inside.to(expected.dtype), float(expected.abs().max())
        assert torch.allclose(result, expected, rtol=1e-2, atol=1e-2 * largest), f"{name} by way of strides"
    if ternary:
        frames |= {"query": d_query, "key": d_key}
        assert all(frame.inside.isfinite().all() for frame in (d_query, d_key))
    for name, frame in {**frames, "logsumexp": logsumexp}.items():
        assert frame.is_intact(), name


@needs_library
def test_memory_is_linear_in_the_number_of_tokens() -> None:
    """Forward, backward and draws have a quarter of a byte for each pair of tokens."""
    resource = pytest.importorskip("resource")
    if not Path("/proc/self/statm").is_file():
        pytest.skip("no /proc here to tell the size of this process")
    tokens, spare = 16_384, 2**26
    case = make_case(tokens, tokens, 32, 4, batch=1, heads=1, dtype=torch.float32)
    case.with_(**{n: t[:, :, :600] for n, t in vars(case).items() if n != "head_dim"}).run(backend="cpu")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + spare, limits[1]))
    try:
        with threads(1):
            case.run(bit_gradient="ternary", seed=0, backend="cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


class Recorder(TorchDispatchMode):
    """Names of the tensor operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def every_number(dtype: torch.dtype, head_dim: int) -> torch.Tensor:
    """(rows, head_dim): all 65536 numbers of 16 bits in any order, or as many random bit patterns beside special numbers."""
    if dtype in HALVES:
        numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    else:
        special = [0, -(2**31), 1, -(2**31) + 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000]
        special += [number - 2**31 for number in special[2:]] + [-1, 0x7FFFFFFF]
        patterns = torch.randint(-(2**31), 2**31, (2**16 - len(special),))
        numbers = torch.cat([torch.tensor(special), patterns]).to(torch.int32).view(dtype)
    numbers = numbers[torch.randperm(len(numbers))]
    return torch.cat([numbers, numbers[: -len(numbers) % head_dim]]).view(-1, head_dim)


@needs_library
@on_every_instruction_set
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_bit_pattern_is_packed(head_dim, dtype) -> None:
    """Both zeros, subnormal numbers, infinities and NaN; padding bits, tails, and more rows than one thread takes."""
    x = every_number(dtype, head_dim)
    for number in (1, 3):
        with threads(number):
            assert torch.equal(LIBRARY.pack_sign_bits(x), pack_by_hand(x))


@needs_library
@on_every_instruction_set
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_projections_are_packed_where_they_lie(head_dim) -> None:
    """Heads of a part of a (B, N, 3 H d) projection, in the order of heads, without a copy of the real numbers."""
    heads = 3
    projection = torch.randn(2, 700, 3 * heads * head_dim).bfloat16()
    for x in (
        projection[..., head_dim : (1 + heads) * head_dim].unflatten(-1, (heads, head_dim)).transpose(1, 2),
        projection[:, ::7, :head_dim],
        projection[0, :, -head_dim:],
    ):
        with Recorder() as recorder:
            bits = LIBRARY.pack_sign_bits(x)
        assert not recorder.names & {"clone", "copy_", "_to_copy", "contiguous"}, recorder.names
        assert torch.equal(bits, pack_by_hand(x))


@needs_library
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("shape", [(), (5,), (3, 5), (2, 3, 5), (2, 3, 2, 5), (0, 5), (2, 0, 3)])
@pytest.mark.parametrize("head_dim", [1, 65])
def test_packing_any_number_of_axes(head_dim, shape, dtype) -> None:
    """What the library takes and what it leaves to PyTorch give the same, also where channels are not neighbours."""
    x = torch.randn(*shape, head_dim).to(dtype)
    for view in (
        x,
        torch.stack([x, -x], -1)[..., 0],
        x[..., :1].expand(x.shape),
        x.transpose(0, -1).contiguous().transpose(0, -1),
    ):
        assert torch.equal(pack_sign_bits(view), pack_by_hand(view))


@needs_library
@on_every_instruction_set
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_packing_writes_its_words_only(head_dim) -> None:
    """Guard words before and after; NaN between the rows, whose bits are 0 anyway, so ones: the rows are negative."""
    x, words = torch.ones(5, 3, head_dim + 9)[..., 4:-5].neg_(), -(-head_dim // 64)
    bits = torch.full((15 * words + 20,), -7)
    outer, stride = (c_int64 * 3)(1, 5, 3), (c_int64 * 3)(0, *x.stride()[:2])
    LIBRARY._library.hf_pack_signs(x.data_ptr(), TYPES[x.dtype], outer, stride, head_dim, 1, bits[10:].data_ptr())
    assert bits.tolist() == [-7] * 10 + [0] * 15 * words + [-7] * 10


def run_python(code: str, folder: Path = ROOT, **environment: str) -> str:
    """Output of a new interpreter that finds the package of `folder`."""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env={**os.environ, **environment}
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


REPORT = """
import warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from hf_binaryformer.kernels import backend_report, hamming_attention, pack_sign_bits
print("warnings:", *[str(w.message) for w in caught if "Hamming" in str(w.message)])
print("report:", backend_report()["cpu"])
bits, weight, value = pack_sign_bits(torch.ones(1, 1, 3, 5)), torch.ones(1, 1, 3), torch.ones(1, 1, 3, 2)
print("default:", hamming_attention(bits, bits, weight, weight, value, head_dim=5).sum().item())
try:
    hamming_attention(bits, bits, weight, weight, value, head_dim=5, backend="cpu")
    print("asked: fine")
except RuntimeError as error:
    print("asked:", error)
"""


def report_of(folder: Path = ROOT, **environment: str) -> dict[str, str]:
    lines = run_python(REPORT, folder, **environment).splitlines()
    report = dict(line.split(": ", 1) if ": " in line else (line.rstrip(":"), "") for line in lines)
    assert float(report["default"]) == pytest.approx(6), "attention works all the same"
    return {name: text.strip() for name, text in report.items()}


@needs_library
def test_an_instruction_set_can_be_chosen() -> None:
    """By its variable; the report names it first."""
    report = report_of(**{cpu_library.INSTRUCTION_SET_VARIABLE: "portable"})
    assert report["report"].startswith("available: compiled, portable"), report
    assert (report["warnings"], report["asked"]) == ("", "fine")


@needs_library
def test_an_unknown_instruction_set_is_refused_aloud() -> None:
    """A typing error must not pass for the fastest, nor for the reference, without a word."""
    report = report_of(**{cpu_library.INSTRUCTION_SET_VARIABLE: "abacus"})
    for text in (report["warnings"], report["report"], report["asked"]):
        for word in (cpu_library.INSTRUCTION_SET_VARIABLE, "abacus", "portable", "leave the variable out"):
            assert word in text, text
    assert report["report"].startswith("missing: ")
    with pytest.raises(LibraryMissingError, match="abacus"):
        Library(Path(cpu_library.__file__).with_name("_cpu.so"), "abacus")


@pytest.mark.parametrize(
    ("content", "cure"), [(None, "pip install"), (b"", "pip install"), (b"not a library", "pip install")]
)
def test_a_library_that_is_not_one(content, cure, tmp_path) -> None:
    """None was built, or a file is broken: a reason and the cure, no crash."""
    path = tmp_path / "_cpu.so"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LibraryMissingError, match=cure) as error:
        Library(path)
    assert ("not built" if content is None else path.name) in str(error.value)


@needs_library
def test_a_library_of_other_sources_is_refused(monkeypatch) -> None:
    """Structures of another version would be read at the wrong places."""
    monkeypatch.setattr(cpu_library, "ABI_VERSION", -1)
    with pytest.raises(LibraryMissingError, match="another version"):
        Library(Path(cpu_library.__file__).with_name("_cpu.so"))


def test_the_call_is_laid_out_as_in_the_header() -> None:
    """Field by field in the order of hamming.h: a field added on one side only shifts all that follow."""
    header = (ROOT / "kernels" / "cpu" / "hamming.h").read_text(encoding="utf-8")
    body = header.split("} hf_rows;")[1].split("} hf_attention;")[0].split("typedef struct {")[1]
    lines = [line.split("//")[0].strip().rstrip(";") for line in body.splitlines()]
    names = [
        name.strip(" *") for line in lines if line for name in line.removeprefix("const ").split(" ", 1)[1].split(",")
    ]
    assert [field[0] for field in Call._fields_] == names
    assert f"HF_ABI_VERSION = {cpu_library.ABI_VERSION} " in header


def test_without_a_compiler_it_installs_and_imports(tmp_path) -> None:
    """The build goes on with a warning; the package then imports, computes by the reference and says what is missing."""
    tree = tmp_path / "tree"
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "checkpoints")
    for name in ("hf_binaryformer", "kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    absent = {"CC": "no-such-compiler", "CXX": "no-such-compiler", "HF_BINARYFORMER_NO_KERNEL": ""}
    build = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tree, env={**os.environ, **absent}, capture_output=True, text=True,
    )  # fmt: skip
    assert build.returncode == 0, build.stderr
    assert "no-such-compiler" in build.stdout + build.stderr
    assert "WARNING" in (build.stdout + build.stderr).upper()
    assert not list(tree.rglob("*.so"))
    report = report_of(tree)
    assert report["report"].startswith("missing: it was not built")
    assert report["warnings"] == "", "importing does not complain of what was left out"
    for word in ("not built", "C++ compiler", "pip install", "reference"):
        assert word in report["asked"]
