"The repository agrees with itself: modules and notebooks, outputs and code, README and home page, names and versions."
import configparser, json, re, shutil, subprocess, sys, time
from pathlib import Path
import nbformat, pytest
import mtst, notebooks, readme, yaml
from conftest import seconds

root = Path(__file__).parent.parent

@pytest.fixture(scope="session")
def fresh(): return {} # path → the notebook as it runs today

def rerun(path, fresh):
    began = time.perf_counter()
    if path not in fresh: fresh[path], seconds[path] = notebooks.run(path), time.perf_counter() - began
    return fresh[path]

@pytest.mark.parametrize("path", notebooks.paths, ids=lambda p: p.stem)
def test_notebook_runs(path, fresh): rerun(path, fresh)

@pytest.mark.parametrize("path", notebooks.paths, ids=lambda p: p.stem)
def test_stored_outputs_are_those_of_the_present_code(path, fresh):
    wrong = notebooks.differences(nbformat.read(path, 4), rerun(path, fresh))
    assert not wrong, "Run `make notebooks`.\n" + "\n".join(wrong)

def _cell(text, tags=()): # a code cell that printed `text`
    return nbformat.v4.new_code_cell("f()", outputs=[nbformat.v4.new_output("stream", name="stdout", text=text)], metadata={"tags": list(tags)})

@pytest.mark.parametrize("stored, fresh, tags, same", [
    ("3", "3", (), True), ("3", "999", (), False), ("0.912 right", "0.913 right", (), True), ("movie 0.4", "product 0.5", ["free"], True), ("movie 0.4", "movie 0.4\nand more", ["free"], False), ("0.912", "0.95", (), False),
    ("took 3.1 s", "took 9.9 s", ["varies"], True), ("took 3.1 s", "failed after 3.1 s", ["varies"], False), ("all well", "", (), False)])
def test_the_check_of_outputs_can_fail(stored, fresh, tags, same):
    assert (notebooks.difference(_cell(stored, tags), _cell(fresh, tags)) is None) == same

@pytest.mark.parametrize("name, same", [("stdout", True), ("stderr", False)])
def test_a_text_that_comes_in_parts_is_one_text(name, same):
    whole, parts = _cell("one\ntwo\n"), _cell("one\n")
    parts.outputs.append(nbformat.v4.new_output("stream", name=name, text="two\n"))
    assert (notebooks.difference(whole, parts) is None) == same and notebooks.lines(whole) == notebooks.lines(parts) == 2

@pytest.mark.parametrize("path", notebooks.paths, ids=lambda p: p.stem)
def test_notebook_is_fit_to_be_read(path):
    "No warnings, errors, widgets or paths of a machine are stored."
    for i, cell in enumerate(nbformat.read(path, 4).cells):
        if cell.cell_type != "code": continue
        shown = json.dumps(cell.outputs)
        assert not any(o.output_type == "error" or o.get("name") == "stderr" for o in cell.outputs), f"cell {i}: an error or a warning is stored"
        assert not re.search(r"/tmp/|/root/|/home/|widget-view|" + re.escape(str(root)), shown + cell.source), f"cell {i}: a path of a machine, or a widget"

@pytest.fixture(scope="module")
def work(tmp_path_factory):
    "A copy of what nbdev reads and writes."
    copy = tmp_path_factory.mktemp("copy")
    for name in ("nbs", "mtst"): shutil.copytree(root/name, copy/name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "pyproject.toml", "setup.py", "README.md"): shutil.copy(root/name, copy/name)
    return copy

def nbdev(command, cwd):
    done = subprocess.run([str(Path(sys.executable).parent/command)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

def test_modules_are_those_of_the_notebooks(work):
    for module in (work/"mtst").glob("*.py"):
        if module.name != "__init__.py": module.unlink()
    nbdev("nbdev_export", work)
    here, there = ({p.name: p.read_text("utf-8") for p in (folder/"mtst").glob("*.py")} for folder in (root, work))
    assert here.keys() == there.keys()
    for name in here: assert here[name] == there[name], f"mtst/{name} is not what its notebook says. Run `.venv/bin/nbdev_export`."

def test_notebooks_are_clean(work):
    nbdev("nbdev_clean", work)
    for path in notebooks.paths: assert path.read_text("utf-8") == (work/"nbs"/path.name).read_text("utf-8"), f"{path.name}: run `.venv/bin/nbdev_clean`."

def test_readme_says_what_the_home_page_says():
    text, pictures = readme.build()
    assert (root/"README.md").read_text("utf-8") == text, "Run `.venv/bin/python tests/readme.py`."
    for name, data in pictures.items(): assert (readme.images/name).read_bytes() == data

def test_one_place_for_name_and_version():
    settings = configparser.ConfigParser(delimiters=["="], interpolation=None)
    settings.read(root/"settings.ini")
    assert mtst.__version__ == settings["DEFAULT"]["version"]
    assert 'name = "mtst"' in (root/"pyproject.toml").read_text() and settings["DEFAULT"]["lib_name"] == "mtst"

def test_every_name_that_the_package_offers_is_there():
    for name in mtst.__all__: assert getattr(mtst, name).__doc__, f"mtst.{name} has no docstring"
    with pytest.raises(AttributeError, match="no attribute"): mtst.nothing

def test_exported_names_have_docstrings_and_the_modules_build_a_staircase():
    "A module imports only what stands before it."
    there = {p.stem for p in (root/"mtst").glob("*.py")} - {"__init__", "_modidx"}
    order = [m for m in ["checkpoint", "data", "sentence_transformer", "multitask", "freezing", "layerwise", "cli"] if m in there]
    assert set(order) == there, f"say where in the staircase {there - set(order)} stands"
    for i, name in enumerate(order):
        text = (root/"mtst"/f"{name}.py").read_text("utf-8")
        above = set(re.findall(r"from (?:mtst)?\.(\w+) import", text)) & set(order[i:])
        assert not above, f"mtst/{name}.py imports {above}, which stands after it"
        assert "import *" not in text
        module = __import__(f"mtst.{name}", fromlist=["x"])
        for public in module.__all__:
            thing = getattr(module, public)
            if callable(thing): assert (thing.__doc__ or "").strip(), f"mtst.{name}.{public} has no docstring"

def test_workflows_do_what_the_makefile_can():
    "Each `make` target of a workflow is there, each action has a version, and none is nbdev's, which installs nbdev without its companions."
    targets = set(re.findall(r"^([\w./-]+):", (root/"Makefile").read_text("utf-8"), re.M))
    paths = sorted((root/".github"/"workflows").glob("*.yml"))
    for path in paths:
        steps = [step for job in yaml.safe_load(path.read_text("utf-8"))["jobs"].values() for step in job["steps"]]
        for run in (step["run"] for step in steps if "run" in step): assert set(re.findall(r"\bmake ([\w-]+)", run)) <= targets, f"{path.name}: {run}"
        for action in (step["uses"] for step in steps if "uses" in step): assert "@v" in action and "nbdev" not in action, f"{path.name}: {action}"
    assert {"test", "docs", "browser"} <= set(re.findall(r"\bmake ([\w-]+)", "".join(p.read_text("utf-8") for p in paths)))
