"""The Hub kernel: assembled, loaded where hf_binaryformer cannot be imported, and compared with it."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import textwrap
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from alone import WITHOUT_PACKAGE
from kernels import get_local_kernel
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata
from safetensors.torch import load_file

import hf_binaryformer.kernels as ours
from hf_binaryformer.kernels import cpu_library

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "hf_binaryformer" / "kernels" / "_cpu.so"
spec = spec_from_file_location("assemble", ROOT / "kernels" / "assemble.py")
assembler = module_from_spec(spec)
spec.loader.exec_module(assembler)

# What a process runs first: it loads the kernel, and has no hf_binaryformer.
ALONE = (
    WITHOUT_PACKAGE
    + """
from pathlib import Path
from kernels import get_local_kernel
kernel = get_local_kernel(Path("project"), backend="cpu")
"""
)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    assembler.assemble(tmp_path / "project")
    return tmp_path / "project"


def run(code: str, folder: Path, **environment: str) -> str:
    """Standard output of a fresh Python process that has loaded the kernel."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    warnings = ["-W", "error", "-W", "ignore:Guards may run slower on Python:RuntimeWarning"]  # of Python 3.13.0 alone
    words = [sys.executable, *warnings, "-P", "-c", ALONE + textwrap.dedent(code)]
    done = subprocess.run(words, cwd=folder, env={**kept, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def results(module: ModuleType, backend: str | None) -> dict[str, torch.Tensor]:
    """Output and gradients of sign bits with ternary gradients, and of weighted bits of two planes."""
    generator = torch.Generator().manual_seed(5)
    query, key = (torch.randn(2, 3, n, 70, generator=generator).requires_grad_() for n in (65, 90))
    value = torch.randn(2, 3, 90, 20, generator=generator).requires_grad_()
    out = module.sign_attention(query, key, value, bit_gradient="ternary", seed=11, backend=backend)
    grads = torch.autograd.grad(out.square().sum(), (query, key, value))
    bits = [module.pack_sign_bits(torch.randn(2, 3, n, 2, 70, generator=generator)) for n in (65, 90)]
    weights = [torch.rand(2, 3, n, 2, generator=generator) for n in (65, 90)]
    weighted = module.hamming_attention(*bits, *weights, value, head_dim=70, backend=backend)
    return dict(zip(("out", "query", "key", "value", "weighted"), (out, *grads, weighted), strict=True))


@pytest.mark.parametrize("backend", ["reference", "triton", "cpu"])
def test_alone_it_computes_what_the_package_computes(tmp_path, backend):
    if backend == "cpu" and cpu_library.LIBRARY is None:
        pytest.skip(f"no compiled library here: {cpu_library.MISSING_REASON}")
    assembler.assemble(tmp_path / "project", LIBRARY if backend == "cpu" else None)
    code = f"""
    import torch
    from types import ModuleType
    from safetensors.torch import save_file
    {textwrap.indent(inspect.getsource(results), "    ").lstrip()}
    assert "{backend}" in kernel.available_backends(), kernel.backend_report()
    save_file({{k: t.contiguous() for k, t in results(kernel, "{backend}").items()}}, "found.safetensors")
    print(Path(kernel.__file__).parent.name, "hf_binaryformer" in sys.modules)
    """
    printed = run(code, tmp_path, TRITON_INTERPRET="1" if backend == "triton" else "0")
    variant = assembler.compiled_variant() if backend == "cpu" else "torch-cpu"
    assert printed.split() == [variant, "False"]
    found, expected = load_file(tmp_path / "found.safetensors"), results(ours, "reference")
    for name, one in expected.items():
        # Rounding may tip a draw in query and key.
        drawn = backend != "reference" and name in ("query", "key")
        torch.testing.assert_close(
            found[name], one, rtol=1e-4, atol=1e-2 if drawn else 1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_its_own_test_and_its_card(tmp_path, project):
    snippet = re.search(r"```python\n(.*?)```", (project / "CARD.md").read_text(encoding="utf-8"), re.DOTALL).group(1)
    (tmp_path / "card.py").write_text(snippet, encoding="utf-8")
    code = """
    import kernels
    asked = []
    kernels.get_kernel = lambda name, **options: asked.append(name) or kernel
    exec(Path("card.py").read_text())
    assert asked == ["hf-binaryformer/hamming-attention"]
    names = [one for one in dir(kernel) if not one.startswith("_")]
    assert set(kernel.__all__) <= set(names)
    assert all(f"`{name}" in Path("project/CARD.md").read_text() for name in kernel.__all__)

    sys.modules["hamming_attention"] = kernel
    import pytest
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestUnknownMarkWarning", "project/tests"]))
    """
    printed = run(code, tmp_path)
    assert "torch.Size([1, 6, 100, 64])" in printed and "3 passed" in printed


def test_it_compiles_in_one_graph(tmp_path, project):
    code = """
    import torch
    query, key, value = (torch.randn(1, 2, 9, 32, requires_grad=True) for _ in range(3))
    attend = lambda q, k, v: kernel.sign_attention(q, k, v, bit_gradient="ste")
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")(query, key, value)
    torch.testing.assert_close(compiled, attend(query, key, value))
    print("done")
    """
    assert run(code, tmp_path).split() == ["done"]


def test_beside_the_package_and_another_version(tmp_path, project):
    """Each has its own operators and backends."""
    before = results(ours, "reference")
    first = get_local_kernel(project, backend="cpu")
    second_project = tmp_path / "second"
    assembler.assemble(second_project)
    # Two versions differ somewhere, and with it in their names.
    general = {"name": "hamming-attention", "version": 1, "license": "Apache-2.0"}
    other = second_project / "other"
    modules = {path.name: path.read_text(encoding="utf-8") for path in (second_project / "torch-ext").rglob("*.py")}
    modules["bits.py"] += "\n# Another version.\n"
    assembler.write_variant(other, modules, general, "cpu", None)
    second = get_local_kernel(other, backend="cpu")
    assert first.__name__ != second.__name__ != ours.__name__
    for module in (first, second, ours):
        for name, one in results(module, "reference").items():
            assert torch.equal(one, before[name]), name
    for module in (first, second):
        assert hasattr(getattr(torch.ops, module.__name__), "hamming_attention")


def test_its_files_are_what_kernels_expects(project):
    Build.open(project)  # raises for a key that is unknown or missing
    backends = {str(backend).lower() for backend in Build.open(project).general.backends}
    assert {path.name for path in (project / "build").iterdir()} == {f"torch-{name}" for name in backends}
    modules = {path.name for path in (project / "torch-ext" / "hamming_attention").iterdir()}
    assert modules == {path.name for path in assembler.SOURCE.glob("*.py")}
    for variant in (project / "build").iterdir():
        metadata = Metadata.read_from_file(variant / "metadata.json")
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
        assert str(metadata.name) == "hamming-attention" and str(metadata.backend.backend_type).lower() in variant.name
        assert metadata.id.isidentifier()


def test_what_a_hub_kernel_cannot_import_is_refused(tmp_path):
    module = tmp_path / "module.py"
    for line, message in (
        ("import numpy", "imports numpy"),
        ("def f():\n    from safetensors.torch import save_file", "imports safetensors"),
        ("from hf_binaryformer.modeling import x", "imports hf_binaryformer"),
        ("NAME = 'hf_binaryformer.modeling'", "still names hf_binaryformer"),
    ):
        module.write_text(line, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            assembler.relative(module, "hamming_attention")


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(FileExistsError, match="is not empty"):
        assembler.assemble(tmp_path)
    with pytest.raises(FileNotFoundError, match="no library"):
        assembler.assemble(tmp_path / "new", tmp_path / "absent.so")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
