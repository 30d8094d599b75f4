"The pages beside the tasks: claims, glossary, API reference, changelog; and what the site adds to all pages."
import configparser, inspect, json, os, re, subprocess, sys
from pathlib import Path
import nbformat, pandas as pd, pytest, yaml
import site_docs

root = Path(__file__).parent.parent
nbs = root/"nbs"
def cells(name, kind="markdown"): return [c for c in nbformat.read(nbs/f"{name}.ipynb", 4).cells if c.cell_type == kind]
def sidebar():
    for entry in yaml.safe_load((root/"_quarto.yml").read_text("utf-8"))["website"]["sidebar"]["contents"]:
        if isinstance(entry, dict) and "auto" in entry: yield from sorted(p.name for p in nbs.glob(entry["auto"]))
        else: yield entry if isinstance(entry, str) else entry["href"]

# The site

def test_every_page_stands_in_the_sidebar_once_and_in_order():
    pages = list(sidebar())
    assert sorted(pages) == sorted(p.name for p in [*nbs.glob("*.ipynb"), *nbs.glob("*.qmd")])
    assert pages[0] == "index.ipynb" and pages[-5:] == ["claims.ipynb", "speed.ipynb", "glossary.ipynb", "api.ipynb", "changelog.ipynb"]

@pytest.mark.parametrize("page", sorted(nbs.glob("*.ipynb")), ids=lambda p: p.stem)
def test_every_page_has_a_title_and_a_description(page): assert re.match(r"# \S.*\n\n> \S", cells(page.stem)[0].source)

# The glossary

known = {"token": "token", "mask": "attention-mask-mask", "attention mask": "attention-mask-mask", "LoRA": "lora", "task": "task", "standard error": "standard-error", "learning rate": "learning-rate"}
def linked(text, seen=None): return site_docs.link_terms(text, known, set() if seen is None else seen)

@pytest.mark.parametrize("text, link", [
    ("A token is", "[token](glossary.ipynb#token){.term}"), ("Tokens are", "[Tokens](glossary.ipynb#token){.term}"), ("*tokens*, cut", "*[tokens](glossary.ipynb#token){.term}*"),
    ("the attention mask", "[attention mask](glossary.ipynb#attention-mask-mask){.term}"), ("the learning\nrate", "[learning\nrate](glossary.ipynb#learning-rate){.term}"),
    ("with LoRA.", "[LoRA](glossary.ipynb#lora){.term}."), ("# A token\n\nA token", "# A token\n\nA [token]"), ("`token` and token", "`token` and [token]"),
    ("<details><summary>A token?</summary>A token</details>", "<details><summary>A token?</summary>A [token]"), ("| a token |\n|---|\n\na token", "|---|\n\na [token]")])
def test_the_first_use_of_a_term_is_linked(text, link):
    assert link in linked(text) and linked(text).count("{.term}") == 1
    assert linked(linked(text), seen=set(known.values())) == linked(text)

@pytest.mark.parametrize("text", ["`token`", "```python\ntoken = 1\n```", "```\na token that never ends", "## A token", "[the token](a.html)", "[a token](a.html#token)", "![a token](token.png)", "https://example.org/token",
    "<https://example.org/token>", '<img alt="token">', "$token$", "$$a\ntoken$$", "> said of a token", "| token | mask |", "tokeniser", "a sub-token", "token-free", "my/token", "my.token", "lora", "LORA",
    "Task 4", "Task\n4", "[@token]{.token}", "::: {.token}"])
def test_what_is_no_prose_stays_as_it_is(text): assert linked(text) == text

def test_a_term_is_linked_once_a_page():
    seen = set()
    assert "{.term}" in linked("A token.", seen) and linked("A token. Tokens.", seen) == "A token. Tokens."
    assert linked("A mask, an attention mask.", seen).count("{.term}") == 1 # two names of one entry

def test_a_name_of_the_package_is_linked_unless_it_is_a_link():
    assert site_docs.Links().linkify("[`freeze`](a.html), `freeze`") == "[`freeze`](a.html), [`freeze`](/freezing.html#freeze)"

@pytest.mark.parametrize("index, head", [(None, ['<span class="visually-hidden">row</span>', "a", "b"]), ("name", ["name", "a", "b"])])
def test_the_head_of_a_table_has_no_empty_cell(index, head):
    table = pd.DataFrame({"a": [1], "b": [2]}).rename_axis(index)
    tidy = site_docs.tidy(table.to_html())
    assert re.findall(r"<th>(.*)</th>", tidy.split("<tbody>")[0]) == head and tidy.split("<tbody>")[1] == table.to_html().split("<tbody>")[1]

def test_no_terms_no_links(): assert site_docs.link_terms("A token", {}, set()) == "A token"

def entries(): return re.findall(r"^### (.+)\n((?:(?!#).*\n?)*)", "\n".join(c.source for c in cells("glossary")), re.M)

def test_the_glossary_has_no_name_twice_and_an_explanation_with_a_link_for_each():
    names = [name for heading, _ in entries() for name in heading.split(", ")]
    assert len(names) == len(set(map(str.lower, names))) == len(site_docs.terms())
    for heading, text in entries():
        assert re.search(r"\]\([\w./]+\.ipynb", text), f"{heading}: no link to a page that shows it"
        assert 2 <= len(re.findall(r"[.?!)](?:\s|$)", text)) <= 8 and len(text) < 700, f"{heading}: two or three sentences"

@pytest.mark.parametrize("term", ["encoder", "token", "word piece", "attention mask", "padding", "pooling", "embedding", "cosine similarity", "head", "task", "logit", "softmax", "multi-task learning", "negative transfer", "forgetting",
    "gradient conflict", "uncertainty weighting", "PCGrad", "freezing", "backbone", "gradual unfreezing", "LoRA", "layer-wise learning-rate decay", "warm-up", "weight decay", "Adam", "AdamW", "epoch", "training step", "batch", "seed",
    "standard deviation", "standard error", "STS-B", "Spearman", "macro F1", "checkpoint", "fine-tuning", "transfer learning", "retracing", "mixed precision"])
def test_the_glossary_explains(term): assert term in site_docs.terms()

def on_the_site(name): # a page's prose as the site gets it, and the anchors that it links to
    seen = set()
    return [site_docs.link_terms(c.source, site_docs.terms(), seen) for c in cells(name)[1:]], seen

@pytest.mark.parametrize("name", ["01_sentence_transformer", "02_multitask", "03_freezing", "claims"])
def test_the_pages_link_to_the_glossary_and_keep_their_words(name):
    texts, seen = on_the_site(name)
    assert len(seen) >= 5
    plain = re.sub(r"\[([^\]]*)\]\(glossary\.ipynb#[\w-]+\)\{\.term\}", r"\1", "\n".join(texts))
    assert plain == "\n".join(c.source for c in cells(name)[1:])

def test_the_site_links_terms_and_fills_in_pages():
    "What nbdev makes of a page on its way to the site: title and description stay, the first use is linked, a marker is replaced."
    code = """if True:
        import json, nbformat, pathlib
        from execnb.nbio import dict2nb
        from nbdev.processors import FilterDefaults
        from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
        texts = ["# A token\\n\\n> about tokens\\n\\nThe first token, `token`.", "Another token.", "<!-- changelog -->"]
        pages = [texts, ["# Glossary\\n\\n> of tokens", "### token\\nA token."], texts[:2]]
        for page in pages:
            nb = dict2nb(json.loads(nbformat.writes(new_notebook(cells=[*map(new_markdown_cell, page), new_code_cell("'token'")]))))
            nb.path_ = pathlib.Path("page.ipynb")
            FilterDefaults()(nb)
            print(json.dumps([c.source for c in nb.cells]))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root/"tests"), "IN_TEST": "1"})
    assert done.returncode == 0, done.stderr
    generated, glossary, page = ("\n\n".join(json.loads(line)) for line in done.stdout.splitlines())
    assert "title: A token" in page and "description: about tokens" in page and page.count("{.term}") == 1
    assert "The first [token](glossary.ipynb#token){.term}, `token`.\n\nAnother token.\n\n'token'" in page
    assert "{.term}" not in glossary + generated and site_docs.changelog().splitlines()[0] in generated and "<!-- changelog" not in generated

# The reference

names = sorted(p.stem for p in (root/"mtst").glob("[a-z]*.py"))

@pytest.mark.parametrize("name", names)
def test_the_reference_describes_every_public_name(name):
    module = next(m for m in site_docs.modules() if m.__name__ == f"mtst.{name}")
    for public in module.__all__:
        thing, text = getattr(module, public), site_docs.describe(module, public)
        section, page, anchor = re.search(r"Built in \[(.+)\]\((.+)#(.+)\)\.$", text).groups()
        assert f"## {section}\n" in "\n".join(c.source + "\n" for c in cells(Path(page).stem)) and anchor == site_docs.slug(section)
        if not callable(thing): continue
        assert f"```python\n{public}(" in text and inspect.getdoc(thing).split()[0] in text
        for argument, comment in site_docs.comments(thing).items():
            assert argument in inspect.signature(thing).parameters or argument == "return"
            if comment: assert f"| {'*gives*' if argument == 'return' else f'`{argument}`'} |" in text

def test_the_reference_is_whole():
    text = site_docs.reference()
    for module in site_docs.modules():
        for name in module.__all__:
            assert f"{{#{module.__name__.split('.')[-1]}.{name}}}" in text
            for method in site_docs.methods(getattr(module, name)): assert f"{{#{module.__name__.split('.')[-1]}.{name}.{method}}}" in text
    anchors = re.findall(r"\{#(.+?)\}", text)
    assert len(anchors) == len(set(anchors)) and "_" not in {a.split(".")[-1][0] for a in anchors}
    assert [m.__name__.split(".")[1] for m in site_docs.modules()] == list(dict.fromkeys(a.split(".")[0] for a in anchors))
    assert sorted(m.__name__.split(".")[1] for m in site_docs.modules()) == names

def test_comments_are_read_from_the_code():
    def sample(
        a, # one | two
        b=1, c=2, # both
        *rest,
    ): # what it gives
        "Docstring."
    assert site_docs.comments(sample) == {"a": "one | two", "b": "both", "c": "both", "rest": "", "return": "what it gives"}
    assert site_docs._escaped("a | b, <c> and `x|y_z` of max_length") == r"a \| b, \<c\> and `x\|y_z` of max\_length"

# The changelog

def test_the_changelog_begins_with_the_present_version():
    settings = configparser.ConfigParser(delimiters=["="], interpolation=None)
    settings.read(root/"settings.ini")
    assert re.search(r"^## (\S+) \(\d+ \w+ \d{4}\)$", site_docs.changelog(), re.M)[1] == settings["DEFAULT"]["version"]

@pytest.mark.parametrize("name, marker", [("api", "<!-- reference -->"), ("changelog", "<!-- changelog -->")])
def test_the_generated_pages_have_their_place(name, marker): assert [c.source for c in cells(name)].count(marker) == 1

# The claims

@pytest.fixture
def page(tmp_path, monkeypatch):
    "Run the cells of the claims that define the rule, and others by a word in them, in a folder with copies of the results."
    (tmp_path/"results").mkdir()
    for file in (nbs/"results").glob("*.csv"): (tmp_path/"results"/file.name).write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path)
    names = {}
    exec("import numpy as np, pandas as pd\nfrom fastcore.test import test_eq\npage = 'page.ipynb'", names)
    def run(*words):
        for word in words:
            for cell in cells("claims", "code"):
                if word in cell.source: exec(cell.source, names)
        return names
    run("def sign(", "def where(", "def verdict(", "claims = []", "class Table")
    return run

def change(file, **columns): # let columns of a results file be what a function makes of the table
    table = pd.read_csv(f"results/{file}.csv")
    for name, new in columns.items(): table[name] = new(table)
    table.to_csv(f"results/{file}.csv", index=False)

@pytest.mark.parametrize("differences, claimed, wanted", [
    ([(2, .5)], "larger", "✓ holds"), ([(2, .5)], "smaller", "✗ fails"), ([(-2, .5)], "larger", "✗ fails"), ([(2, 1.1)], "larger", "○ not seen"), ([(.4, .01)], "larger", "○ not seen"),
    ([(-.4, .01)], "not smaller", "✓ holds"), ([(-2, .5)], "not smaller", "✗ fails"), ([(2, .5), (0, .5)], "larger", "✓ holds"), ([(2, .5), (-2, .5)], "larger", "✗ fails")])
def test_a_verdict_follows_the_numbers(page, differences, claimed, wanted): assert page()["verdict"]({"": differences}, claimed) == wanted

def test_the_verdict_on_sharing_changes_with_the_measurements(page):
    says = lambda: page("def shared_minus_alone", "one encoder for both tasks")["claims"][-1]
    before = says()
    assert "fails (sentiment)" in before["verdict"]
    change("sharing", accuracy=lambda t: t.accuracy + 0.05*t.way.str.startswith("joint"))
    assert says()["verdict"] == "✓ holds" and says()["measured"] != before["measured"]
    change("sharing", accuracy=lambda t: t.accuracy - 0.2*t.way.str.startswith("joint"))
    assert says()["verdict"] == "✗ fails"

def test_the_verdicts_on_freezing_change_with_the_measurements(page):
    def verdicts(): return [c["verdict"] for c in page("def mean_and_error", "def by_rows", "Transfer learning is", "small data wants")["claims"] if c["found"]]
    before = verdicts()
    change("freezing", accuracy=lambda t: t.accuracy - 0.1*(t.way == "all"))
    after = verdicts()[len(before):]
    assert before[1] != after[1] == "✓ holds" and before[4] == "✗ fails" and after[4] == "✓ holds"

def outputs(name): return "\n".join("".join(o.get("text", "") or o.get("data", {}).get("text/plain", "")) for c in cells(name, "code") for o in c.outputs).replace("−", "-")

@pytest.mark.parametrize("task, name, written", [(2, "02_multitask", r"([+-]\d+\.\d) points ± (\d\.\d)"), (3, "03_freezing", r"([+-]\d+\.\d) ± (\d\.\d)")])
def test_the_numbers_are_those_of_the_task_pages(task, name, written):
    table = next(t for t in re.split(r"(?=\| the seed says)", outputs("claims"))[1:] if f"({name}.ipynb" in t).split("\n\n")[0]
    ours = {(a.replace("-0.0", "+0.0"), b) for a, b in re.findall(r"([+-]\d+\.\d) ± (\d\.\d)(?!\d)", "\n".join(l for l in table.splitlines() if "random" not in l))}
    theirs = {(a.replace("-0.0", "+0.0"), b) for a, b in re.findall(written, outputs(name))}
    assert ours and ours <= theirs, ours - theirs

def test_the_numbers_on_layer_wise_rates_are_those_of_task_4():
    lists = lambda text: {(a.replace("-0.0", "+0.0"), b) for a, b in re.findall(r"((?:[+-]\d+\.\d, ){3}[+-]\d+\.\d) \(?± (\d\.\d)(?!\d)", text)}
    ours, theirs = lists(outputs("claims")), lists(outputs("04_layerwise"))
    if not theirs: pytest.skip("the page of Task 4 has no table of claims yet: run its notebook")
    assert len(ours) >= 10 and ours <= theirs, ours - theirs
