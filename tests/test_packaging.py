"""Requirements files, pyproject.toml and lock agree with each other and with what is imported."""

import ast
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
DISTRIBUTIONS = {"PIL": "pillow", "cv2": "opencv-python-headless", "skimage": "scikit-image",
                 "sklearn": "scikit-learn", "yaml": "pyyaml"}  # fmt: skip
FILES_OF_EXTRAS = {
    "requirements-optional.txt": ["export", "reproduce", "tensorboard"],
    "requirements-dev.txt": ["dev"],
    "requirements-bench.txt": ["bench"],
}


def lines_of(name):
    """The file's own requirements; files it includes by -r are not followed."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [line for line in lines if line and not line.startswith("-r ")]


def parse(lines):
    """A dictionary from the normalized name of a distribution to its Requirement."""
    requirements = [Requirement(line) for line in lines]
    names = {canonicalize_name(requirement.name): requirement for requirement in requirements}
    assert len(names) == len(requirements), "a distribution is named twice"
    return names


def imported(path):
    """(names imported when the module is, names imported later by a function), third-party ones only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.Lambda)]
    within = {id(node) for function in functions for node in ast.walk(function)}
    at_once, later = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module]
        else:
            continue
        (later if id(node) in within else at_once).update(name.partition(".")[0] for name in modules)
    ours = {path.stem for path in ROOT.glob("*.py")} | {path.name for path in ROOT.iterdir() if path.is_dir()}
    return tuple(names - ours - sys.stdlib_module_names for names in (at_once, later))


def distributions(modules):
    return {canonicalize_name(DISTRIBUTIONS.get(module, module)) for module in modules}


RUN_TIME = parse(PROJECT["dependencies"])
ANY = RUN_TIME | {name: requirement for extra in EXTRAS.values() for name, requirement in parse(extra).items()}


def test_requirements_are_those_of_the_project():
    assert parse(lines_of("requirements.txt")) == RUN_TIME


@pytest.mark.parametrize("name", FILES_OF_EXTRAS)
def test_requirements_of_extras_are_those_of_the_project(name):
    listed = parse(line for extra in FILES_OF_EXTRAS[name] for line in EXTRAS[extra])
    others = listed.pop(PROJECT["name"], None)  # dev includes extras, requirements-dev.txt their file
    assert parse(lines_of(name)) == listed
    if others:
        assert others.extras == set(FILES_OF_EXTRAS["requirements-optional.txt"])
        assert "-r requirements-optional.txt" in (ROOT / name).read_text()


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_what_is_imported_is_required(path):
    at_once, later = imported(path)
    assert distributions(at_once) <= set(RUN_TIME)
    assert distributions(later) <= set(ANY)


def test_lock_satisfies_the_requirements():
    locked = parse(lines_of("requirements.lock"))
    for name in ("requirements.txt", "requirements-optional.txt", "requirements-dev.txt"):
        for distribution, requirement in parse(lines_of(name)).items():
            if requirement.marker and not requirement.marker.evaluate({"python_version": "3.11"}):
                continue
            (pin,) = locked[distribution].specifier
            assert pin.operator == "=="
            assert requirement.specifier.contains(pin.version), f"{requirement}, locked {pin}"
