"The notebooks keep to the bars in style_figures.py, and the bars can be missed."
from types import ModuleType
import nbformat, pytest
import notebooks, style_figures
from nbformat.v4 import new_code_cell, new_markdown_cell as prose, new_notebook, new_output

@pytest.mark.parametrize("path", notebooks.paths, ids=lambda p: p.stem)
def test_notebook_reads_well(path):
    nb = nbformat.read(path, 4)
    _, short = style_figures.figures(nb, style_figures.module_of(nb))
    assert not short, "\n".join(short)

definition = "#| export\ndef double(x): return 2*x"
test = "test_eq(double(2), 4)"
def picture(*said): return new_code_cell("\n".join([*said, "plot()"]), outputs=[new_output("display_data", data={"image/png": ""})])

def faults(*cells, module=None):
    cells = [new_code_cell(c) if isinstance(c, str) else c for c in cells]
    return "\n".join(style_figures.figures(new_notebook(cells=[prose("why") for _ in cells] + cells), module)[1])

@pytest.mark.parametrize("cells, fault", [
    (["\n".join(["a = 1"]*6)], ""), (["\n".join(["a = 1"]*7)], "has 7 lines"), (["#| hide\n\n" + "\n".join(["a = 1"]*5)], ""),
    ([definition, test], ""), ([definition], "not so: double"), ([definition, "a = 1", "a = 1", "a = 1", test], "not so: double"),
    ([definition, "#| export\na = 1", "#| exporti\na = 1", "#| exports\na = 1", test], ""),
    ([definition, "b = double(2)", "assert b == 4"], ""), ([definition, "assert True", "b = double(2)"], "not so: double"),
    ([definition, "try: double([])\nexcept TypeError as e: print(e)"], ""), ([definition, "try: double([])\nexcept TypeError: pass"], "not so: double"),
    ([definition.replace("double", "_double")], ""), ([definition.replace("export", "exporti")], ""), ([definition.replace("def", "@patch\ndef")], ""),
    ([picture()], "without caption"), ([picture('#| fig-cap: "A"')], "without caption"), ([picture('#| fig-cap: "A"', '#| fig-alt: ""')], "without caption"),
    ([picture('#| fig-cap: "A"', "#| fig-alt: B")], ""), (["#| label: fig-late\n#| slow\nplot()"], "without caption")])
def test_each_bar_can_be_missed(cells, fault): assert fault in (found := faults(*cells)) and bool(found) == bool(fault)

def test_prose_can_fall_short(): assert style_figures.figures(new_notebook(cells=[prose("why"), new_code_cell("1"), new_code_cell("2")]))[1] == ["1 prose cells for 2 code cells"]

def test_a_missing_docstring_is_found():
    module = ModuleType("module")
    exec('''__all__ = ["f", "g", "A", "B", "N"]
N = 3
def f(): "Described."
def g(): pass
class A:
    "Described."
    def seen(self): "Described."
    def unseen(self): pass
    @property
    def size(self): pass
    @classmethod
    def make(cls): pass
    def _own(self): pass
class B(A):
    "Described."
    def unseen(self): pass
''', vars(module))
    assert list(style_figures.undocumented(module)) == ["g", "A.unseen", "A.size", "A.make"]
    assert "without a docstring: g" in faults("1", module=module)

def test_the_table_has_a_row_for_each_notebook():
    table = style_figures.table({notebooks.paths[0]: 61.4})
    assert [line.split()[0] for line in table.split("\n")[1:]] == [p.stem for p in notebooks.paths] and "61" in table.split("\n")[1]
