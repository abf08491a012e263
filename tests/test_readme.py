"""What README and docs/ say can be done can be done, and their links lead somewhere."""

import importlib
import re
import sys
from functools import cache
from pathlib import Path

import pytest

from dataset import read_image

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
LARGEST_README = 13_000  # bytes: more belongs in docs/
OTHERS_FLAGS = {"nproc_per_node", "scale"}  # of torchrun, and of tests/attack.py
OTHERS_MODULES = {"pip", "pytest", "venv"}
COMMAND = re.compile(r"python(?:3|\.exe)?\s+(?:-m\s+(?P<module>[\w.]+)|(?P<script>[\w/]+\.py))(?P<rest>[^`;#\n]*)")


def text_of(page):
    """Without line ends that a backslash hides."""
    return page.read_text(encoding="utf-8").replace("\\\n", " ")


def every(pattern, group=0):
    """(page, what matches) in all pages."""
    found = [(page, match[group]) for page in PAGES for match in re.finditer(pattern, text_of(page))]
    return sorted(set(found))


def name_of(value):
    return value.name if isinstance(value, Path) else None


def commands():
    """(page, module, what stands behind it) of every command that is ours."""
    for page in PAGES:
        for match in COMMAND.finditer(text_of(page)):
            module = match["module"] or match["script"].removesuffix(".py").replace("/", ".")
            if module not in OTHERS_MODULES:
                yield page, module, match["rest"]


@cache
def help_of(module):
    """What the script prints for --help."""
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr(sys, "argv", [f"{module}.py", "--help"])
        patch.setattr("argparse.ArgumentParser._print_message", lambda _, text, file=None: lines.append(text))
        with pytest.raises(SystemExit):
            importlib.import_module(module).main()
    return "".join(lines)


def flags_of(module):
    return set(re.findall(r"^  (?:-\w, )?--(\w+)", help_of(module), re.MULTILINE)) | {"help"}


def scripts():
    """Modules that are commands with flags."""
    paths = [path for folder in ("", "benchmarks", "tools") for path in (ROOT / folder).glob("*.py")]
    sources = {path: path.read_text(encoding="utf-8") for path in paths}
    found = [p for p, source in sources.items() if "run_script(main)" in source and "arser(" in source]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in found]


def test_the_python_example_works_on_a_new_image(trained):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    image = next((trained.data / "widget" / "test").glob("*/*.png"))
    code = code.replace("saveDir/.../last.pt", str(trained.checkpoint)).replace("image.png", str(image))
    names = {}
    exec(code, names)
    assert names["result"].map.shape == names["result"].mask.shape == read_image(image).shape[:2]
    assert names["result"].defective == (names["result"].score >= names["scorer"].calibration.thresholds().image)


def test_the_readme_is_short():
    assert README.stat().st_size <= LARGEST_README


def test_every_flag_exists():
    flags = {flag for module in scripts() for flag in flags_of(module)}
    assert {"cls", "threshold", "record", "choice"} <= flags  # of four scripts
    for page, flag in every(r"(?<![\w-])--([A-Za-z]\w*)", group=1):
        assert flag in flags | OTHERS_FLAGS, f"{page.name}: --{flag}"


def test_every_command_exists_and_has_its_flags():
    found = list(commands())
    assert len(found) > 20
    for page, module, rest in found:
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), f"{page.name}: {module}"
        behind = rest.partition(" -- ")  # reproduce.py: flags of train.py
        for part, script in ((behind[0], module), (behind[2], "train")):
            for flag in re.findall(r"(?<![\w-])--(\w+)", part):
                assert flag in flags_of(script), f"{page.name}: {script} --{flag}"


@pytest.mark.parametrize(("page", "link"), every(r"\]\(((?!http)[^)]+)\)", group=1), ids=name_of)
def test_every_link_leads_somewhere(page, link):
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    assert target.exists()
    if anchor:
        titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize(("page", "path"), every(r"`([\w/.-]+\.(?:py|sh|txt|lock))`", 1), ids=name_of)
def test_every_file_of_the_repository_exists(page, path):
    if path != "log.txt":  # of a run
        assert (ROOT / path).is_file()
