"""Where the links of README.md, CONTRIBUTING.md and the pages lead, without Quarto: `python tests/links.py` lists those that lead nowhere.

The notebooks are taken as nbdev hands them to Quarto: without hidden cells, with a heading for each exported name and links to them. An anchor is a heading
(under the identifier that Pandoc gives it), a labelled cell, or an id in the text; `@fig-…` and its kin name a label on the same page."""
import os, re, shutil, subprocess, sys, tempfile
from pathlib import Path
from urllib.parse import unquote, urlsplit
import nbformat
from markdown_it import MarkdownIt

root = Path(__file__).parent.parent
markdown = MarkdownIt("commonmark").enable("table")
markdown.validateLink = lambda target: True # else an odd one would pass for text
reference = re.compile(r"(?<![\w@./])@((?:fig|tbl|sec|eq|lst)-[\w-]+)")

def processed(folder):
    "Process a copy of the notebooks in a folder; gives the folder of the pages."
    for name in ("nbs", "mtst"): shutil.copytree(root/name, folder/name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    shutil.copy(root/"settings.ini", folder/"settings.ini")
    done = subprocess.run([sys.executable, "-c", "from nbdev.serve import proc_nbs; proc_nbs(n_workers=0)"], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(root/"tests")})
    if done.returncode: raise RuntimeError(done.stderr)
    return folder/"_proc"

def pandoc_id(heading): return re.sub(r"^[\W\d_]*", "", "-".join(re.sub(r"[^\w\s.-]", "", heading).lower().split())) or "section"

def github_id(heading): return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")

class Text:
    "What links to what in a text in Markdown."
    def __init__(self, text="", identifier=pandoc_id):
        self.ids, self.links, self.files, self.references, self.identifier = set(), [], [], [], identifier
        self.add(text)

    def add(self, text):
        tokens = markdown.parse(text)
        for before, token in zip([None, *tokens], tokens):
            if token.type == "inline": self._inline(token.children, heading=before.type == "heading_open")
            elif token.type == "html_block":
                self._html(token.content)
                if (inside := re.sub(r"<[^>]+>", "", token.content)) != token.content: self.add(inside) # Pandoc reads it as Markdown

    def _inline(self, tokens, heading):
        plain = "".join(" " if t.type.endswith("break") else t.content for t in tokens if t.type in ("text", "code_inline", "softbreak", "hardbreak"))
        self.ids |= set(named := re.findall(r"\{[^{}]*#([\w:.-]+)[^{}]*\}", plain))
        if heading and not named:
            name = self.identifier(plain)
            self.ids.add(next(n for n in [name, *(f"{name}-{i}" for i in range(1, 999))] if n not in self.ids))
        for t in tokens:
            if t.type == "link_open": self.links.append(t.attrs["href"])
            elif t.type == "image": self.files.append(t.attrs["src"])
            elif t.type == "html_inline": self._html(t.content)
            elif t.type == "text": self.references += reference.findall(t.content)

    def _html(self, html):
        self.ids |= set(re.findall(r"""\bid=["']([^"']+)""", html))
        self.links += re.findall(r"""<a\b[^>]*\bhref=["']([^"']+)""", html)
        self.files += re.findall(r"""<\w+\b[^>]*\bsrc=["']([^"']+)""", html)

def page(path):
    "What links to what on the page of a processed notebook; and the name of the page on the site."
    text, name = Text(), path.with_suffix(".html").name
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "raw": name = (re.findall(r"^output-file: (\S+)", cell.source, re.M) or [name])[0]
        elif cell.cell_type == "markdown": text.add(cell.source)
        else:
            for output in cell.get("outputs", []): text.add("".join(output.get("data", {}).get("text/markdown", "")))
            label = re.search(r"^#\|\s*label:\s*(\S+)", cell.source, re.M)
            picture = any(k.startswith("image/") for o in cell.get("outputs", []) for k in o.get("data", {}))
            if label and (picture or not label[1].startswith("fig-")): text.ids.add(label[1])
    return text, name

def problems(folder):
    "Yield what is wrong with the links between the processed notebooks in a folder, a line each."
    pages = {path.resolve(): page(path) for path in sorted(Path(folder).glob("*.ipynb"))}
    names = {path.with_name(name): path for path, (_, name) in pages.items()} # the page on the site → its notebook
    for path, (text, _) in pages.items():
        for label in text.references:
            if label not in text.ids: yield f"{path.name}: there is no @{label} on this page"
        for target in text.links + text.files:
            if fault := _fault(target, path, folder, {p: t.ids for p, (t, _) in pages.items()}, names): yield f"{path.name}: {fault}: {target}"

def _fault(target, path, folder, ids, names={}): # why a link from this file leads nowhere; None if it doesn't
    url = urlsplit(target)
    if url.scheme or url.netloc: return None if url.scheme in ("http", "https", "mailto", "data") else "a link of an odd kind"
    goal = (Path(folder)/url.path.lstrip("/") if url.path.startswith("/") else path.parent/unquote(url.path)).resolve() if url.path else path
    goal = names.get(goal, goal)
    if not goal.is_relative_to(Path(folder).resolve()): return "leads out of the folder"
    if not goal.exists(): return "leads nowhere"
    if url.fragment and goal in ids and unquote(url.fragment) not in ids[goal]: return "no such place on the page"

def problems_of_texts(paths, folder):
    "The same for the files in Markdown that stand beside the notebooks. GitHub, which shows them, has its own rule for identifiers."
    texts = {p.resolve(): Text(p.read_text("utf-8"), github_id) for p in paths}
    pages = {p.resolve(): page(p)[0].ids for p in (Path(folder)/"nbs").glob("*.ipynb")}
    for path, text in texts.items():
        for target in text.links + text.files:
            if fault := _fault(target, path, folder, {p: t.ids for p, t in texts.items()} | pages): yield f"{path.name}: {fault}: {target}"

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder: found = [*problems(processed(Path(folder))), *problems_of_texts(sorted(root.glob("*.md")), root)]
    print(*found or ["All links lead somewhere."], sep="\n")
    sys.exit(bool(found))
