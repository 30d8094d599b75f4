"""README.md says what the home page says: it is made from nbs/index.ipynb. `python tests/readme.py` writes it."""
import base64, re
from pathlib import Path
import nbformat

root = Path(__file__).parent.parent
images = root/"nbs"/"images"

def _outputs(cell, picture):
    for o in cell.outputs:
        data = o.get("data", {})
        if "image/png" in data:
            alt = re.search(r'fig-alt: "(.*)"', cell.source)
            yield f"![{alt[1] if alt else ''}](nbs/images/{picture})"
        elif text := "".join(o.get("text") or data.get("text/plain", "")).strip("\n"): yield f"```\n{text}\n```"

def build(notebook=root/"nbs"/"index.ipynb"):
    "The text of README.md, and a dict of the pictures that it shows: file name → bytes."
    parts, pictures = [], {}
    for cell in nbformat.read(notebook, 4).cells:
        hidden = re.search(r"^#\|\s*(hide|echo:\s*false)", cell.source, re.M)
        if cell.cell_type == "markdown": parts.append(re.sub(r"\]\((?!https?:|#)([^)]+)\)", r"](nbs/\1)", cell.source))
        elif not re.search(r"^#\|\s*hide\s*$", cell.source, re.M):
            if not hidden: parts.append("```python\n" + re.sub(r"^#\|.*\n", "", cell.source, flags=re.M).strip("\n") + "\n```")
            name = f"index_{len(pictures)}.png"
            for o in cell.outputs:
                if "image/png" in o.get("data", {}): pictures[name] = base64.b64decode(o["data"]["image/png"])
            parts += _outputs(cell, name)
    return "\n\n".join(p.strip("\n") for p in parts) + "\n", pictures

if __name__ == "__main__":
    text, pictures = build()
    (root/"README.md").write_text(text, "utf-8")
    images.mkdir(exist_ok=True)
    for name, data in pictures.items(): (images/name).write_bytes(data)
