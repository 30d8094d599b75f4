"""How the notebooks read, in numbers: `python tests/style_figures.py` prints a table, and what falls short of the bars below.

A line is one that isn't empty; directives and comments count, since a reader in JupyterLab has them before the eyes. A cell has a test if it asserts, calls
a `test_…` or `assert_…` function, or prints an error that has to come (`except ValueError as e: print(e)`: the stored output holds the message, and is compared).
An exported function or class is tested near its definition if, of the three next code cells that define nothing for the package, one uses it and that one or
a later one has a test. A method belongs to its class. One that a base class has too (`call`, `get_config`) is described there."""
import ast, inspect, re, statistics
from importlib import import_module
import nbformat, pandas as pd
import notebooks

MOST_LINES, LEAST_PROSE, LEAST_TESTED = 6, 1, 0.9 # lines of the median code cell; prose cells to a code cell; share of names with a test nearby

def directive(cell, name): return re.search(rf"^#\|\s*{name}\b", cell.source, re.M)

def lines(cell): return sum(bool(line.strip()) for line in cell.source.split("\n"))

def has_test(cell):
    return bool(re.search(r"^\s*assert\b|\b(?:test|assert)_\w+\(|^\s*except \w+.* as (\w+): print\(.*\b\1\b", cell.source, re.M)) and not exports(cell)

def exports(cell): return bool(directive(cell, "exports?i?"))

def patched(node): return any("patch" in ast.unparse(d) for d in node.decorator_list)

def public_names(cell):
    "The functions and classes that a cell adds to the package."
    if not directive(cell, "exports?"): return []
    return [n.name for n in ast.parse(cell.source).body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0] != "_" and not patched(n)]

def untested(code):
    "The exported names without a test nearby."
    for i, cell in enumerate(code):
        near = [c for c in code[i+1:] if not exports(c)][:3]
        for name in public_names(cell):
            used = next((j for j, c in enumerate(near) if re.search(rf"\b{name}\b", c.source)), len(near))
            if not any(map(has_test, near[used:])): yield name

def undocumented(module):
    "The public functions, classes and methods of a module that nobody described."
    for name in module.__all__:
        thing = getattr(module, name)
        if not callable(thing): continue
        if not (thing.__doc__ or "").strip(): yield name
        for method, f in vars(thing).items() if inspect.isclass(thing) else ():
            there, inherited = getattr(thing, method), any(hasattr(base, method) for base in thing.__bases__)
            if method[0] != "_" and (callable(there) or hasattr(f, "__get__")) and not inherited and not there.__doc__: yield f"{name}.{method}"

def bare_pictures(code):
    "Pictures without caption or alternative text, each by the first line of its code."
    for cell in code:
        if is_picture(cell) and not all(re.search(rf"^#\|\s*{said}:\s*[\"']?[^\"'\s]", cell.source, re.M) for said in ("fig-cap", "fig-alt")):
            yield next((line for line in cell.source.split("\n") if line[:2] != "#|"), "")

def is_picture(cell): return any(k.startswith("image/") for o in cell.outputs for k in o.get("data", {})) or bool(re.search(r"^#\|\s*label:\s*fig-", cell.source, re.M))

def module_of(nb):
    found = re.search(r"^#\|\s*default_exp\s+(\w+)", "\n".join(c.source for c in nb.cells if c.cell_type == "code"), re.M)
    return found and import_module(f"mtst.{found[1]}")

def figures(nb, module=None):
    "The figures of a notebook, and a list of what falls short."
    code = [c for c in nb.cells if c.cell_type == "code" and c.source.strip()]
    prose = sum(c.cell_type == "markdown" and bool(c.source.strip()) for c in nb.cells)
    n, names = sorted(map(lines, code)) or [0], [name for c in code for name in public_names(c)]
    bare, plain, silent = list(untested(code)), list(bare_pictures(code)), list(undocumented(module)) if module else []
    median, tested, pictures = statistics.median(n), 1 - len(bare)/max(1, len(names)), sum(map(is_picture, code))
    row = {"code": len(code), "prose": prose, "prose/code": f"{prose/max(1, len(code)):.2f}", "median": f"{median:g}", "p90": n[int(0.9*len(n))], "max": n[-1],
        "with a test": f"{sum(map(has_test, code))/max(1, len(code)):.0%}", "names tested": f"{len(names) - len(bare)}/{len(names)}",
        "undocumented": len(silent), "pictures described": f"{pictures - len(plain)}/{pictures}"}
    short = [median > MOST_LINES and f"the median code cell has {median:g} lines, more than {MOST_LINES}",
        prose < LEAST_PROSE*len(code) and f"{prose} prose cells for {len(code)} code cells",
        tested < LEAST_TESTED and f"{tested:.0%} of the exported names have a test within three cells; not so: {', '.join(bare)}",
        silent and f"without a docstring: {', '.join(silent)}", plain and f"pictures without caption or alternative text: {' · '.join(plain)}"]
    return row, [s for s in short if s]

def table(seconds={}):
    "All notebooks as a table; `seconds` says how long those took that were run."
    rows = {}
    for path in notebooks.paths:
        nb = nbformat.read(path, 4)
        rows[path.stem] = figures(nb, module_of(nb))[0] | ({"seconds": f"{seconds[path]:.0f}" if path in seconds else ""} if seconds else {})
    return pd.DataFrame(rows).T.to_string()

if __name__ == "__main__":
    print(table(), "\n")
    for path in notebooks.paths:
        nb = nbformat.read(path, 4)
        for fault in figures(nb, module_of(nb))[1]: print(f"{path.stem}: {fault}")
