"""What the README says can be done can be done."""

import re
from pathlib import Path

import pytest
import torch

from dataset import MASK_SIZE

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_works_on_a_new_image(trained):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    image = next((trained.data / "widget" / "test").glob("*/*.png"))
    code = code.replace("saveDir/.../last.pt", str(trained.checkpoint)).replace("image.png", str(image))
    names = {}
    exec(code, names)
    assert names["maps"].shape == (1, *MASK_SIZE)
    assert names["image_is_defective"].dtype == names["defective_pixels"].dtype == torch.bool


def test_every_flag_exists():
    sources = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("*.py"))
    for flag in set(re.findall(r"(?<![\w-])--([a-z]\w*)", README)) - {"help", "nproc_per_node"}:
        assert f'"--{flag}"' in sources or re.search(
            rf"^    {flag}: .*_flag\(", sources, re.MULTILINE
        ), flag


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(((?!http)[^)]+)\)", README))))
def test_every_link_leads_somewhere(link):
    path, _, anchor = link.partition("#")
    assert not path or (ROOT / path).exists()
    headings = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
                for title in re.findall(r"^#+ (.*)$", README, re.MULTILINE)]  # fmt: skip
    assert not anchor or anchor in headings
