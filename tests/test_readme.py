"""The README's examples, as they are written there, one after the other."""

import re
from pathlib import Path

from peer_imports import peer

README = Path(__file__).resolve().parents[1] / "README.md"


def test_examples():
    peer("torchvision"), peer("timm")
    examples = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.M | re.S)
    names = {}
    for code in examples:
        exec(compile(code, "README.md", "exec"), names)
    assert len(examples) == 2 and names["y"].shape == names["x"].shape
