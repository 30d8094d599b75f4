"""What `make docs` adds to the notebooks on their way to the site; settings.ini names the first two classes.

By itself nbdev runs every cell with an import in it, also one that needs a trained model; links to sources at an empty `git_url`; keeps nothing
but title and description of a page's first cell; and shows the head of a function twice where its source is shown, as it is on all pages here.
Beside mending that, this links the first use of a glossary's term on each page, and fills in two pages that would go stale if they were written by hand:
a cell `<!-- reference -->` becomes the description of all public names, `<!-- changelog -->` the text of CHANGELOG.md."""
import ast, importlib, inspect, io, re, textwrap, tokenize
from functools import cache
from pathlib import Path
from execnb.nbio import mk_cell, read_nb
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.processors import exec_show_docs, _is_showdoc
from nbdev.showdoc import BasicMarkdownRenderer
import links

nbs = Path(__file__).parent.parent/"nbs"

class Links(NbdevLookup):
    "Symbol → page, for the names that have a place on a page. A name that is a link already stays as it is."
    def link_line(self, line): return "".join(part if i % 2 else super(Links, self).link_line(part) for i, part in enumerate(re.split(r"(\[[^\]]*\]\([^)]*\))", line)))
    def __getitem__(self, name): return None if re.search(r"(^|\.)_", name) else super().__getitem__(name)

class Renderer(BasicMarkdownRenderer):
    "A heading to link to, and the way to the source if settings.ini has a `git_url`. The code of an exported cell, with all comments on its arguments, stands below."
    def _repr_markdown_(self): return f"### {_heading(self.nm)}\n\n" + (f"[source]({Links().code(self.nm)})" if get_config().git_url else "")

class show_docs(exec_show_docs):
    "Run the `show_doc` cells, and nothing else, on the module that the notebook exports."
    def __init__(self, nb):
        super().__init__(nb)
        self.module = next((c.directives_["default_exp"][0] for c in nb.cells if "default_exp" in c.directives_), None)
        head = re.match(r"# .+(\n+> .+)?", nb.cells[0].source)
        if head and (rest := nb.cells[0].source[head.end():].strip()):
            nb.cells[0].source = head[0]
            nb.cells.insert(1, mk_cell(rest, "markdown"))
        self.generated = {"<!-- reference -->": reference, "<!-- changelog -->": changelog}
        self.glossary = head and "Glossary" not in head[0] and not any(c.source in self.generated for c in nb.cells)
        self.linked = set()
    def begin(self):
        super().begin()
        if self.module: self.k.run_cell(f"from {get_config().lib_path.name}.{self.module} import *")
    def __call__(self, cell):
        if _is_showdoc(cell): self.k.cell(cell)
        if cell.cell_type == "markdown":
            if cell.source in self.generated: cell.source = self.generated[cell.source]()
            elif self.glossary: cell.source = link_terms(cell.source, terms(), self.linked)
            cell.source = Links().linkify(cell.source)
        for output in cell.get("outputs", []): # given as HTML, a table would make Quarto load jQuery and RequireJS from another host
            if html := output.get("data", {}).pop("text/html", None): output["data"]["text/markdown"] = ["```{=html}\n", tidy("".join(html)), "\n```\n"]
        if self.k.exc: raise RuntimeError(f"The documentation can't be made: {cell.source}") from self.k.exc

def slug(heading):
    "The anchor that Pandoc gives a heading."
    return next(iter(links.Text(f"# {heading}").ids))

def tidy(table):
    "A table of pandas, in HTML, without the row that holds nothing but the name of the index: that goes to the corner above it. A corner without a name gets one for screen readers."
    table = re.sub(r"<th></th>((?:\s*<th>[^<]*</th>)+)\s*</tr>\s*<tr>\s*<th>([^<]+)</th>(?:\s*<th></th>)+(?=\s*</tr>\s*</thead>)", r"<th>\2</th>\1", table)
    return re.sub(r"(<thead>\s*<tr[^>]*>\s*)<th></th>", r'\1<th><span class="visually-hidden">row</span></th>', table)

# The glossary

@cache
def terms(notebook=nbs/"glossary.ipynb"):
    "Name → anchor in the glossary. A heading there has one name or several: `### fine-tuning, fine-tune`."
    headings = re.findall(r"^### (.+)$", "\n".join(c.source for c in read_nb(notebook).cells), re.M)
    return {name: slug(heading) for heading in headings for name in heading.split(", ")}

_not_prose = r"""```.*?(?:```|\Z) | `[^`]*` | \$\$.*?\$\$ | \$\S(?:[^$\n]*\S)?\$ | !?\[[^\]]*\](?:\([^)]*\)|\{[^}]*\}) | https?://\S+ | <summary>.*?</summary> | <[^>\n]*> | ^[ \t]*(?:\#|>|\||:::)[^\n]*"""

def link_terms(
    markdown, # text of a cell
    terms,    # dict: name → anchor, as `terms` gives
    linked,   # set of the anchors that the page links to already; it grows
): # the text with links
    "Link the first use of each term. Code, formulas, links, addresses, headings, quotations and tables stay as they are, and so do names like Task 4."
    def name_of(m): # a name with a capital letter in it is looked for as it is, others also at the start of a sentence, and all in the plural
        said = re.sub(r"\s", " ", m[0])
        return next((n for n in (said, said[:-1], said.lower(), said.lower()[:-1]) if n in terms), None)
    def link(m):
        name = name_of(m) if m["term"] else None
        if not name or terms[name] in linked: return m[0]
        linked.add(terms[name])
        return f"[{m[0]}](glossary.ipynb#{terms[name]}){{.term}}"
    names = "|".join(re.escape(n).replace(r"\ ", r"\s") for n in sorted(terms, key=len, reverse=True))
    return re.sub(rf"(?:{_not_prose}) | (?P<term>(?<![\w\-/.])(?i:{names})s?(?![\w\-]|\s\d))", link, markdown, flags=re.M | re.S | re.X) if terms else markdown

# The reference

def modules():
    "The package's modules in the order of its pages."
    return [importlib.import_module(f"{get_config().lib_path.name}.{name}") for name in dict.fromkeys(key.split(".")[0] for key in places())]

def comments(thing):
    "The comments in the head of a function or a class: argument → comment; `return` → what it gives."
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(thing)))
    said = {t.start[0]: t.string[1:].strip() for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT}
    node = ast.parse(source).body[0]
    if isinstance(node, ast.ClassDef):
        init = next((n for n in node.body if getattr(n, "name", "") == "__init__"), None)
        if init is None: return {n.target.id: said.get(n.lineno, "") for n in node.body if isinstance(n, ast.AnnAssign)} # a dataclass
        node = init
    a = node.args
    every = [x for x in [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg] if x and x.arg not in ("self", "cls")]
    head = [n for n in range(node.lineno, node.body[0].lineno) if n in said and n not in {x.lineno for x in every}]
    return {x.arg: said.get(x.lineno, "") for x in every} | ({"return": said[head[-1]]} if head else {})

def _name(node): # what a statement defines; a patched function belongs to the class of its first argument
    if isinstance(node, ast.Assign): return getattr(node.targets[0], "id", None)
    if isinstance(node, ast.FunctionDef) and any("patch" in ast.unparse(d) for d in node.decorator_list): return f"{ast.unparse(node.args.args[0].annotation)}.{node.name}"
    return getattr(node, "name", None)

@cache
def places():
    "`module.name` → (page, section) of the notebook where it is built."
    found = {}
    for page in sorted(nbs.glob("[0-9]*.ipynb")):
        module, section = None, None
        for cell in read_nb(page).cells:
            if cell.cell_type == "markdown": section = ([section] + re.findall(r"^##+ (.+)$", cell.source, re.M))[-1]
            elif m := re.search(r"^#\| default_exp (\w+)", cell.source, re.M): module = m[1]
            elif re.search(r"^#\| exports?\b", cell.source, re.M): found |= {f"{module}.{_name(n)}": (page.name, section) for n in ast.parse(cell.source).body}
    return found

def _escaped(text): return re.sub(r"(`[^`]*`)|([<>*_|\[\]])", lambda m: (m[1] or "\\" + m[2]).replace("|", "\\|").replace("\\\\|", "\\|"), text)

def _heading(name): return _escaped(name).replace(".", ".<wbr>") # on a phone a long name goes on below after a dot

def describe(module, name, level=3):
    "One public name as Markdown: heading, signature, docstring, arguments, and where it is built."
    thing, short = module, module.__name__.split(".")[-1]
    for part in name.split("."): thing = getattr(thing, part)
    at, class_at = (places().get(f"{short}.{n}") for n in (name, name.split(".")[0]))
    page, section = at or class_at
    parts = [f"{'#'*level} {_heading(name)} {{#{short}.{name}}}"]
    if callable(thing):
        signature, said = inspect.signature(thing), comments(thing)
        if inspect.isclass(thing): signature = signature.replace(return_annotation=inspect.Signature.empty)
        if "self" in signature.parameters: signature = signature.replace(parameters=list(signature.parameters.values())[1:])
        rows = [f"| {'*gives*' if a == 'return' else f'`{a}`'} | {_escaped(c)} |" for a, c in said.items() if c]
        parts += [f"```python\n{name}{signature}\n```", _escaped(inspect.getdoc(thing))]
        if rows: parts.append("\n".join(["| argument | meaning |", "|:---|:---------|", *rows]))
    else: parts.append(f"```python\n{name} = {thing!r}\n```")
    return "\n\n".join([*parts, f"Built in [{section}]({page}#{slug(section)})."])

def methods(thing):
    "The public methods of a class that the package documents."
    return [n for n in vars(thing) if not n.startswith("_") and callable(getattr(thing, n)) and getattr(thing, n).__doc__] if inspect.isclass(thing) else []

def reference():
    "All public names of all modules as Markdown."
    package = importlib.import_module(get_config().lib_path.name)
    out = [f"What is used most can be imported from `{package.__name__}` itself: {', '.join(f'`{name}`' for name in package.__all__)}. Everything else comes from its module."]
    for module in modules():
        page = next(p for key, (p, _) in places().items() if key.startswith(module.__name__.split(".")[-1] + "."))
        out.append(f"## {module.__name__}\n\nThe page [{read_nb(nbs/page).cells[0].source.splitlines()[0].removeprefix('# ')}]({page}) builds this module.")
        for name in module.__all__:
            out += [describe(module, name), *(describe(module, f"{name}.{m}", 4) for m in methods(getattr(module, name)))]
    return "\n\n".join(out)

def changelog():
    "The text of CHANGELOG.md below its title."
    return (nbs.parent/"CHANGELOG.md").read_text("utf-8").partition("\n")[2].strip()
