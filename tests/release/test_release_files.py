"""What a release is made of agrees: versions, bounds, the Pythons that are tested, and what workflows call."""

from __future__ import annotations

import json
import re
import runpy
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def load(path: Path) -> dict[str, Any]:
    """A workflow; YAML 1.1 takes its key `on` for the value true."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {("on" if key is True else key): value for key, value in content.items()}


def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job.get("steps", [])]


def bounds(requirements: list[str]) -> dict[str, str]:
    """Name and lower bound of each requirement, as numbers without zeros at the end."""
    found = {}
    for one in requirements:
        name, version = re.fullmatch(r"([\w-]+)(?:\[\w+\])?[>=]=([\d.]+)", one).groups()
        found[name.lower()] = re.sub(r"(\.0)+$", "", version)
    return found


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_is_whole_and_calls_what_there_is(path: Path) -> None:
    workflow = load(path)
    assert workflow["on"] and workflow["permissions"] == {"contents": "read"}, "more is given to single jobs"
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for job in workflow["jobs"].values():
        assert "uses" in job or (job["runs-on"] and job["steps"])
        assert {*([job["needs"]] if "needs" in job else [])} <= workflow["jobs"].keys()
    for step in steps(workflow):
        assert ("uses" in step) != ("run" in step)
        assert "@" in step.get("uses", "@"), "a version"
        words = step.get("run", "").split()
        for word in words[1:] if words[:1] == ["make"] else []:
            assert "=" in word or word in targets, word
        for script in re.findall(r"scripts/\S+\.py", step.get("run", "")):
            assert (ROOT / script).is_file(), script


def test_the_pythons_that_are_named_are_tested() -> None:
    matrix = load(ROOT / ".github" / "workflows" / "tests.yml")["jobs"]["test"]["strategy"]["matrix"]
    named = [one.rpartition(" ")[2] for one in PROJECT["project"]["classifiers"] if re.search(r":: 3\.\d+$", one)]
    assert named == matrix["python"]
    assert PROJECT["project"]["requires-python"] == f">={named[0]}"


def test_the_lowest_versions_are_those_of_the_project() -> None:
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    lowest = bounds([line for line in lines if line and not line.startswith("#")])
    assert lowest == bounds([*project["dependencies"], *extras["demo"], *extras["dicom"]])


def test_wheels_have_the_kernel_and_are_tried() -> None:
    settings = PROJECT["tool"]["cibuildwheel"]
    for system in (settings, settings["macos"]):
        assert system["environment"]["HF_BINARYFORMER_REQUIRE_KERNEL"] == "1"
    script = settings["test-command"].split()[1].removeprefix("{project}/")
    assert (ROOT / script).is_file()


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_forms_for_issues(path: Path) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.stem != "config":
        assert {"name", "description", "body"} <= content.keys()
        assert any(field.get("validations", {}).get("required") for field in content["body"])


@pytest.mark.parametrize(
    ("tag", "changelog", "count"),
    [("v1.2.0", "## 1.2.0\n", 0), ("v1.2.0", "## Unreleased\n", 1), ("v1.2", "## 1.2\n", 1), ("v2", "## 1.2.0\n", 2)],
)
def test_a_tag_that_does_not_agree_is_seen(tag: str, changelog: str, count: int) -> None:
    problems = runpy.run_path(str(ROOT / "scripts" / "release" / "check_version.py"))["problems"]
    assert len(problems(tag, '__version__ = "1.2.0"\n', changelog)) == count


def test_every_system_is_told_why_there_is_no_kernel() -> None:
    from hf_binaryformer.kernels.cpu_library import not_built

    assert "none for Windows" in not_built("win32") and "WSL" in not_built("win32")
    for system in ("linux", "darwin"):
        assert "g++ or clang++" in not_built(system) and "pip install" in not_built(system)


@pytest.mark.parametrize(
    ("system", "variables", "expected"),
    [
        ("win32", {}, "compilers of Windows"),
        ("linux", {"HF_BINARYFORMER_NO_KERNEL": "1"}, "HF_BINARYFORMER_NO_KERNEL is set"),
        ("linux", {}, None),
        ("win32", {"HF_BINARYFORMER_REQUIRE_KERNEL": "1"}, "REQUIRE_KERNEL is set, but the kernel is left out"),
    ],
)
def test_where_the_build_leaves_the_kernel_out_it_says_so(system, variables, expected, monkeypatch, capsys) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("setuptools.setup", lambda **words: given.update(words))
    monkeypatch.setattr("sys.platform", system)
    for name in ("HF_BINARYFORMER_NO_KERNEL", "HF_BINARYFORMER_REQUIRE_KERNEL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if "HF_BINARYFORMER_REQUIRE_KERNEL" in variables:
        with pytest.raises(SystemExit, match=expected):
            runpy.run_path(str(ROOT / "setup.py"))
        return
    runpy.run_path(str(ROOT / "setup.py"))
    said = capsys.readouterr().err
    assert len(given["ext_modules"]) == (expected is None)
    assert (expected in said and "WARNING" in said and "reference" in said) if expected else said == ""


def test_the_page_says_what_was_measured() -> None:
    record = json.loads((ROOT / "model_cards/evidence/installation/record.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/reference/installation.md").read_text(encoding="utf-8")
    sizes = [record[key] for key in ("wheel_mb", "package_mb", "environment_mb")]
    for size in (*sizes, record["largest_mb"]["nvidia"], record["largest_mb"]["triton"]):
        assert f"{size} MB" in page
    assert f"takes {record['seconds']['import hf_binaryformer']['median']:.2f} s" in page
    assert record["loaded_machine"] == ("to be measured again" in page)
    assert record["processor"].partition(" (")[0] in page
