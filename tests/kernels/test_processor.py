"""The processor's name in records."""

from hf_binaryformer.kernels.processor import processor_name


def test_family_and_model_are_named(tmp_path) -> None:
    """Vendors sell several generations under one name."""
    file = tmp_path / "cpuinfo"
    first = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\nflags\t\t: fpu"
    file.write_text(f"{first}\n\nprocessor\t: 1\nmodel name\t: other\n")
    assert processor_name(file) == "AMD EPYC (family 25 model 17)"
    file.write_text("processor\t: 0\nmodel name\t: Cortex\n")
    assert processor_name(file) == "Cortex"
    file.write_text("processor\t: 0\nBogoMIPS\t: 50\n")
    assert processor_name(file)
