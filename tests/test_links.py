"Every link leads somewhere: from page to page, in the files beside them, and on a rendered site. And each check can fail."
from pathlib import Path
import nbformat, pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, new_raw_cell
import check_site, links, notebooks

root = Path(__file__).parent.parent

@pytest.fixture(scope="module")
def pages(tmp_path_factory): return links.processed(tmp_path_factory.mktemp("pages"))

def test_each_notebook_is_a_page(pages): assert {p.name for p in pages.glob("*.ipynb")} == {p.name for p in notebooks.paths}

def test_links_of_the_pages(pages): assert not (found := list(links.problems(pages))), "\n".join(found)

def test_links_of_the_files_beside_them(): assert not (found := list(links.problems_of_texts(sorted(root.glob("*.md")), root))), "\n".join(found)

def write(folder, name, *cells):
    nbformat.write(new_notebook(cells=[new_raw_cell(f"---\noutput-file: {name.split('_')[-1]}.html\n---"), *cells]), folder/f"{name}.ipynb")

@pytest.fixture
def two(tmp_path):
    "Two small pages, as nbdev processes them."
    figure = new_code_cell("#| label: fig-late\nplot()", outputs=[new_output("display_data", data={"image/png": ""})])
    name = new_code_cell("show_doc(f)", outputs=[new_output("display_data", data={"text/markdown": "### named_weights\n\n"})])
    headings = new_markdown_cell('## 2. The *first* `fit`, and $x$ – again!\n\n## Why?\n\ntext\n\n## Why?\n\n<div id="box"></div>\n\n## Named {#other}')
    empty = new_code_cell("#| label: fig-empty\nplot()")
    write(tmp_path, "01_first", headings, figure, name, empty)
    def second(text):
        write(tmp_path, "02_second", new_markdown_cell("## Here\n\n" + text), figure)
        return list(links.problems(tmp_path))
    return second

@pytest.mark.parametrize("text", ["[a](01_first.ipynb)", "[a](first.html#why)", "[a](/first.html#why-1)", "[a](01_first.ipynb#the-first-fit-and-x-again)", "[a](01_first.ipynb#box)",
    "[a](01_first.ipynb#other)", "[a](01_first.ipynb#fig-late)", "[a](01_first.ipynb#named_weights)", "[a](#here)", "see @fig-late.", "[a](https://example.org/x)", "me@fig-no.org",
    "`[a](nowhere.ipynb)`", "```\n[a](nowhere.ipynb) @fig-no\n```", '<a href="first.html#why">a</a>', "<details><summary>A</summary>[a](#here)</details>"])
def test_good_links(two, text): assert two(text) == []

@pytest.mark.parametrize("text", ["[a](03_third.ipynb)", "[a](third.html)", "[a](01_first.ipynb#wy)", "[a](first.html#why-2)", "[a](#there)", "[a](01_first.ipynb#named)", "[a](01_first.ipynb#fig-early)",
    "[a](01_first.ipynb#fig-empty)", "see @fig-early", "(@tbl-none)", "![a](no.png)", '<img src="no.png">', '<a href="third.html">a</a>', "[a](../outside.md)", "[a](file:///etc/passwd)",
    "[a][b]\n\n[b]: nowhere.md", "<details><summary>A</summary>[a](#there)</details>"])
def test_bad_links(two, text): assert len(two(text)) == 1

@pytest.mark.parametrize("text, faults", [("[a](nbs/01_first.ipynb#why) [b](#an-anchor-with-v12)", 0), ("[a](nbs/none.ipynb)", 1), ("[a](nbs/01_first.ipynb#wy)", 1), ("[a](#an-anchor-with-v1.2)", 1)])
def test_links_of_a_readme_can_be_wrong(tmp_path, text, faults):
    (tmp_path/"nbs").mkdir()
    write(tmp_path/"nbs", "01_first", new_markdown_cell("## Why?"))
    (tmp_path/"README.md").write_text("# An anchor with v1.2\n\n" + text)
    assert len(list(links.problems_of_texts([tmp_path/"README.md"], tmp_path))) == faults

@pytest.mark.parametrize("text, fault", [("<p id=here>well</p><a href='#here'>a</a><img src='a.png' alt='a dot'>", ""), ("<a href='b.html'>a</a>", "leads nowhere"), ("<a href='#there'>a</a>", "no such place"),
    ("<a href=''>a</a>", "an empty link"), ("<a href='javascript:f()'>a</a>", "odd kind"), ("<img src='b.png' alt='a dot'>", "leads nowhere"), ("<img src='a.png'>", "without alternative text"),
    ("<script src='https://example.org/x.js'></script>", "another host"), ("<p>/home/somebody/mtst</p>", "a folder of a machine"), ("<a href='../a.html'>a</a>", "leads nowhere")])
def test_the_check_of_a_rendered_site_can_fail(tmp_path, text, fault):
    (tmp_path/"a.png").touch()
    (tmp_path/"index.html").write_text(text)
    assert fault in (found := "\n".join(check_site.problems(tmp_path))) and bool(found) == bool(fault)

def test_a_site_that_is_not_there_is_no_good_site(tmp_path): assert "has no pages" in next(check_site.problems(tmp_path))
