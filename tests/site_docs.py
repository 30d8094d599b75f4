"""How nbdev_docs documents what a notebook exports; settings.ini names both classes.

By itself nbdev runs every cell with an import in it, also one that needs a trained model; links to sources at an empty `git_url`; keeps nothing
but title and description of a page's first cell; and shows the head of a function twice where its source is shown, as it is on all pages here."""
import re
from execnb.nbio import mk_cell
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.processors import exec_show_docs, _is_showdoc
from nbdev.showdoc import BasicMarkdownRenderer

class Links(NbdevLookup):
    "Symbol → page, for the names that have a place on a page."
    def __getitem__(self, name): return None if re.search(r"(^|\.)_", name) else super().__getitem__(name)

class Renderer(BasicMarkdownRenderer):
    "A heading to link to, and the way to the source if settings.ini has a `git_url`. The code of an exported cell, with all comments on its arguments, stands below."
    def _repr_markdown_(self): return f"### {self.nm}\n\n" + (f"[source]({Links().code(self.nm)})" if get_config().git_url else "")

class show_docs(exec_show_docs):
    "Run the `show_doc` cells, and nothing else, on the module that the notebook exports."
    def __init__(self, nb):
        super().__init__(nb)
        self.module = next((c.directives_["default_exp"][0] for c in nb.cells if "default_exp" in c.directives_), None)
        head = re.match(r"# .+(\n+> .+)?", nb.cells[0].source)
        if head and (rest := nb.cells[0].source[head.end():].strip()):
            nb.cells[0].source = head[0]
            nb.cells.insert(1, mk_cell(rest, "markdown"))
    def begin(self):
        super().begin()
        if self.module: self.k.run_cell(f"from {get_config().lib_path.name}.{self.module} import *")
    def __call__(self, cell):
        if _is_showdoc(cell): self.k.cell(cell)
        if cell.cell_type == "markdown": cell.source = Links().linkify(cell.source)
        for output in cell.get("outputs", []): # given as HTML, a table would make Quarto load jQuery and RequireJS from another host
            if html := output.get("data", {}).pop("text/html", None): output["data"]["text/markdown"] = ["```{=html}\n", *html, "\n```\n"]
        if self.k.exc: raise RuntimeError(f"The documentation can't be made: {cell.source}") from self.k.exc
