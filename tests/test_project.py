"""What the repository says about itself has to be true: version, stub, documents."""

import ast
import re
import subprocess
import sys
from importlib.metadata import version as package_version
from pathlib import Path

import pytest
from packaging.markers import Marker

import magicpig
from magicpig.config import SAMPLERS, Config
from magicpig.kernels import _native

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SOURCES = sorted(path for path in (ROOT / "src").rglob("*") if path.suffix in {".py", ".cpp", ".h"})


def test_version_is_that_of_the_package():
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    assert magicpig.__version__ == declared[1]
    assert f"## [{declared[1]}]" in (ROOT / "CHANGELOG.md").read_text()


def test_stub_describes_the_compiled_module(tmp_path):
    module = Path(_native.__file__)
    generate = [sys.executable, "-m", "nanobind.stubgen", "-q", "-i", module.parent, "-m", "_native", "-O", tmp_path]
    subprocess.run(generate, check=True)
    ruff = [Path(sys.executable).parent / "ruff", "format", "-q", "--no-cache", "--config", ROOT / "pyproject.toml"]
    subprocess.run([*ruff, tmp_path / "_native.pyi"], check=True)
    assert (tmp_path / "_native.pyi").read_text() == (ROOT / "src/magicpig/kernels/_native.pyi").read_text(), (
        "the bindings changed: run `make stub`"
    )


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_have_at_most_120_characters(document):
    prose = (line for line in document.read_text().splitlines() if not line.startswith(("|", "    ")))
    assert not [line for line in prose if len(line) > 120]


def _named(line: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; #]", line.strip(), maxsplit=1)[0]).lower()


def test_everything_that_make_installs_has_an_exact_version():
    pinned = [line for line in (ROOT / "requirements/constraints.txt").read_text().splitlines() if line[:1] != "#"]
    assert [line for line in pinned if not re.fullmatch(r"[\w.-]+==[\w.+]+( ; [^/]+)?", line)] == []
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"]]
    for extra in ("dev", "serve", "studies"):
        wanted += project["optional-dependencies"][extra]
    wanted += [line for line in (ROOT / "requirements/build.in").read_text().splitlines() if line[:1] not in ("#", "")]
    assert {_named(line) for line in wanted} - {_named(line) for line in pinned} == set()


def test_dependencies_that_come_as_source_find_what_builds_them():
    """rouge-score has no wheel, nothing is fetched while it is built, and an old pip wants both of these for it."""
    tools = (ROOT / "requirements/build.in").read_text().splitlines()
    assert {"setuptools", "wheel"} <= {_named(line) for line in tools}


def test_what_is_installed_here_is_what_is_pinned():
    """Only where `make` installed it so: whoever tests the newest versions has others."""
    made = Path(sys.prefix, ".stamps/constraints.txt")
    if not made.exists() or made.stat().st_size == 0:
        pytest.skip("this environment was not made with the constraints")
    for line in (ROOT / "requirements/constraints.txt").read_text().splitlines():
        name, _, rest = line.partition("==")
        if name in ("torch", "transformers", "numpy", "pytest", "ruff"):
            version, _, marker = rest.partition(" ; ")
            if not marker or Marker(marker).evaluate():
                assert package_version(name).split("+")[0] == version, f"run `make setup`: {line}"


def test_environment_variables_are_documented():
    read = r'(?:getenv|environ\.get)\("(MAGICPIG_\w+)"'
    used = {name for path in SOURCES for name in re.findall(read, path.read_text())}
    documented = set(re.findall(r"^\| `(MAGICPIG_\w+)`", (ROOT / "docs/environment.md").read_text(), re.MULTILINE))
    assert used == documented
    assert "MAGICPIG_ISA" in used


def test_symbol_table_names_what_exists():
    rows = re.findall(r"^\|(.+)\|(.+)\|(.+)\|(.+)\|$", (ROOT / "docs/algorithm.md").read_text(), re.MULTILINE)
    checked = 0
    for _, _, identifiers, places in rows:
        files = [path for place in re.findall(r"`(.+?)`", places) for path in _files(ROOT / "src/magicpig" / place)]
        text = "".join(path.read_text() for path in files)
        for identifier in re.findall(r"`(.+?)`", identifiers):
            for part in identifier.split("."):
                assert not files or re.search(rf"\b{part}\b", text), f"{part} is not in {places}"
                checked += bool(files)
    assert checked > 20


def test_readme_file_tree_names_what_exists():
    tree = re.search(r"```text\n(src/magicpig/.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert tree is not None
    folders: list[str] = []
    for line in tree[1].splitlines():
        names = line.strip().split("   ")[0].split()
        folders = folders[: (len(line) - len(line.lstrip())) // 2]
        for name in names:
            assert Path(ROOT, *folders, name).exists(), "/".join([*folders, name])
        folders.append(names[0])


def test_the_tables_of_layers_are_those_that_lint_checks():
    tomllib = pytest.importorskip("tomllib")
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    tables = re.findall(
        r"^\| (?:layer|study) \| knows \|\n.*\n((?:\|.*\n)+)", (ROOT / "docs/structure.md").read_text(), re.M
    )
    written = [[set(re.findall(r"`(\w+)`", row.split("|")[1])) for row in table.splitlines()] for table in tables]
    checked = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    assert written == [[set(re.findall(r"\w+", layer)) for layer in layers] for layers in checked]


def _files(place: Path) -> list[Path]:
    assert place.exists(), place
    return [path for path in place.rglob("*") if path in SOURCES] if place.is_dir() else [place]


# Factories of torch that take the caller's default dtype or device where none is given.
FACTORIES = {
    "arange", "as_tensor", "asarray", "bartlett_window", "blackman_window", "complex", "empty", "empty_permuted",
    "empty_strided", "eye", "full", "hamming_window", "hann_window", "kaiser_window", "linspace",
    "logspace", "normal", "ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor",
    "tril_indices", "triu_indices", "zeros",
}  # fmt: skip


def without_dtype_or_device(source: str) -> list[str]:
    """The calls of such factories that leave one of the two to the caller's defaults."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    found = []
    for call in calls:
        name = ast.unparse(call.func)
        named = {keyword.arg for keyword in call.keywords}
        # None: keywords in a dictionary.
        if name.removeprefix("torch.") in FACTORIES and name.startswith("torch.") and None not in named:
            found += [f"line {call.lineno}: {name} without {missing}" for missing in {"dtype", "device"} - named]
    return sorted(found)


@pytest.mark.parametrize("path", [p for p in SOURCES if p.suffix == ".py"], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_allocation_says_dtype_and_device(path):
    # torch.set_default_dtype and set_default_device are common first lines: kernels would write past what they get.
    assert without_dtype_or_device(path.read_text()) == []


def test_allocations_that_leave_something_to_defaults_are_found():
    assert without_dtype_or_device("torch.zeros(3, dtype=torch.int64)") == ["line 1: torch.zeros without device"]
    assert len(without_dtype_or_device("x = [torch.arange(n) for n in y]")) == 2
    assert without_dtype_or_device("torch.zeros_like(x); torch.ones(2, dtype=d, device=e); torch.eye(3, **F)") == []


def compared_names(source: str) -> list[str]:
    """The comparisons with a sampler's name. A layer is of the kind "window", too, so there the other side decides."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            names = {each.value for each in ast.walk(node) if isinstance(each, ast.Constant)} & set(SAMPLERS)
            if names - {"window"} or (names and re.search("sampler|method", ast.unparse(node))):
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.MatchValue) and isinstance(node.value, ast.Constant) and node.value.value in SAMPLERS:
            found.append(f"line {node.value.lineno}: case {node.value.value!r}")
    return found


HOMES = ("config.py", "samplers/")


@pytest.mark.parametrize("path", [p for p in SOURCES if p.suffix == ".py"], ids=lambda p: str(p.relative_to(ROOT)))
def test_names_of_samplers_are_compared_in_their_homes_only(path):
    if not str(path.relative_to(ROOT / "src/magicpig")).startswith(HOMES):
        assert compared_names(path.read_text()) == []


def test_comparisons_of_names_are_found():
    assert len(compared_names("a = x.sampler == 'lsh' or y in ('quest', 'other')")) == 2
    assert compared_names("sampler != 'window'") == ["line 1: sampler != 'window'"]
    assert compared_names("match x:\n    case 'topk': pass") == ["line 2: case 'topk'"]
    assert compared_names("kind == 'window'; Config(sampler='lsh'); looks['topk']; 'lsh_law' == x") == []


def test_the_table_of_settings_in_the_readme_has_all_of_them():
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ([^|]*) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    defaults: dict[str, str] = {}
    for names, values in rows:
        named = re.findall(r"\w+", names)
        shown = values.split(", ") if len(named) > 1 else [values]
        defaults |= dict(zip(named, shown, strict=True))
    assert set(defaults) == set(Config.model_fields)
    for name, field in Config.model_fields.items():
        if isinstance(field.default, (bool, int, str)):
            assert defaults[name].strip('`"') == str(field.default).lower(), name
