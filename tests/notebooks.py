"""Run the notebooks, and compare what they print with what is stored in them.

`python tests/notebooks.py` runs all notebooks in place, so that the stored outputs are those of the present code.
A cell that takes long or needs a network says so with `#| slow` or `#| online` and is left out, unless MTST_FLAGS names its flag.
A cell tagged `varies` (times, versions, results of training) may print other numbers on another machine, but no other words; one tagged `free`
(answers of a trained model to texts that it is unsure about) may print other words too, but as many lines."""
import os, re, sys, time
from pathlib import Path
import nbformat
from nbclient import NotebookClient

nbs = Path(__file__).parent.parent/"nbs"
paths = sorted(nbs.glob("*.ipynb"), key=lambda p: (not p.stem[0].isdigit(), p.stem == "index", p.stem)) # those with a number, the others, the home page
flags = {"slow", "online"} - set(os.environ.get("MTST_FLAGS", "").split())

def skipped(cell):
    said = set(re.findall(r"^#\|\s*(\w+)\s*$", cell.source, re.M))
    return bool(said & flags) or bool(re.search(r"^#\|\s*eval:\s*false", cell.source, re.M)) or not cell.source.strip()

def run(path):
    "Run a notebook from top to bottom in a fresh kernel; gives the notebook with its new outputs. A failing cell raises."
    nb = nbformat.read(path, 4)
    os.environ["PYTHONHASHSEED"] = "0"
    client = NotebookClient(nb, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(nbs)}})
    with client.setup_kernel():
        for i, cell in enumerate(nb.cells):
            if cell.cell_type != "code" or skipped(cell): continue
            cell.outputs = []
            client.execute_cell(cell, i)
    for i, cell in enumerate(c for c in nb.cells if c.cell_type == "code"): cell.execution_count = None
    return nb

def shown(cell):
    "What a reader sees below a cell: its texts, and a word for each picture."
    out, stream = [], None
    for o in cell.outputs:
        data = o.get("data", {})
        if any(k.startswith("image/") for k in data): out.append("[picture]")
        elif "text" in o: out.append(("" if o["name"] == stream else o["name"] + ": ") + "".join(o["text"])) # a kernel may send one text in several parts
        elif data: out.append("".join(data.get("text/plain", data.get("text/html", ""))))
        stream = o.get("name")
    return re.sub(r"[\s─│━-]+", " ", re.sub(r"0x[0-9a-f]+", "0x", "\n".join(out))).strip()

def lines(cell): return sum(len("".join(o.get("text") or o.get("data", {}).get("text/plain", "")).splitlines()) for o in cell.outputs)

number = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")

def difference(stored, fresh, rtol=0.01, atol=0.012):
    "Why the fresh output of a cell is not the stored one; None if it is. Decimals may differ by a little: processors round differently, and training adds it up."
    a, b = shown(stored), shown(fresh)
    if "free" in stored.metadata.get("tags", []): return None if lines(stored) == lines(fresh) else f"stored: {lines(stored)} lines\nfresh:  {lines(fresh)} lines"
    if number.sub("#", a) != number.sub("#", b): return f"stored: {a[:300]}\nfresh:  {b[:300]}"
    if "varies" in stored.metadata.get("tags", []): return None
    for x, y in zip(number.findall(a), number.findall(b)):
        x_, y_ = float(x.replace(",", "")), float(y.replace(",", ""))
        exact = "." not in x + y and "e" not in x + y
        if abs(x_ - y_) > (0 if exact else atol + rtol*abs(x_)): return f"stored {x}, fresh {y} in: {b[:300]}"

def differences(stored, fresh):
    return [f"cell {i}: {d}" for i, (s, f) in enumerate(zip(stored.cells, fresh.cells)) if s.cell_type == "code" and not skipped(s) and (d := difference(s, f))]

if __name__ == "__main__":
    chosen = [nbs/Path(a).name for a in sys.argv[1:]] or paths
    for path in chosen:
        print(f"running {path.name}", end=" … ", flush=True)
        began = time.perf_counter()
        nbformat.write(run(path), path)
        print(f"{time.perf_counter() - began:.0f} s")
