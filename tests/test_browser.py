"""The rendered site as a reader has it: every page in a headless Chromium, by day, by night and on a phone.

Needs Playwright (`make browser` installs it), a Chromium or Chrome on the PATH, and the site: the folder that MTST_SITE names, else Quarto renders one."""
import functools, http.server, os, re, shutil, subprocess, threading
from contextlib import contextmanager
from pathlib import Path
import nbformat, pytest
import check_site, links, notebooks

sync = pytest.importorskip("playwright.sync_api", reason="needs Playwright: `make browser` installs it and runs these tests")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe: `make browser` installs it and runs these tests").Axe()
root, patience = Path(__file__).parent.parent, 120_000 # milliseconds, for a machine that has other things to do

def name_of(path):
    found = re.search(r"#\| default_exp (\w+)", path.read_text("utf-8"))
    return f"{found[1] if found else path.stem}.html"

names = {name_of(p): p for p in notebooks.paths} # page → notebook

@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The folder of the rendered site. It is rendered in a copy, so that nothing changes here."
    if os.environ.get("MTST_SITE"): return Path(os.environ["MTST_SITE"]).resolve()
    if not shutil.which("quarto"): pytest.skip("needs the rendered site: put Quarto on the PATH, or set MTST_SITE to the folder that `make docs` wrote")
    copy = tmp_path_factory.mktemp("site")/"mtst"
    shutil.copytree(root, copy, symlinks=True, ignore=shutil.ignore_patterns(".venv*", ".git", "_docs", "_proc", "__pycache__", ".pytest_cache", "demo", "build"))
    (copy/".venv").symlink_to(root/".venv")
    done = subprocess.run(["make", "--assume-old=.venv/ready", "docs"], cwd=copy, capture_output=True, text=True)
    assert (copy/"_docs"/"index.html").exists(), done.stdout[-2000:] + done.stderr[-2000:]
    return copy/"_docs"

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

@pytest.fixture(scope="session")
def address(site):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()

@pytest.fixture(scope="session")
def chromium():
    found = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome", "chrome"])), None)
    if not found: pytest.skip("needs Chromium or Chrome on the PATH")
    with sync.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=found, timeout=patience)
        yield browser
        browser.close()

@pytest.fixture(scope="session")
def visit(chromium, address):
    "Opens a page of the site in a window of its own, as a context."
    @contextmanager
    def opened(name, width=1280, height=900, **options):
        with chromium.new_context(viewport={"width": width, "height": height}, **options) as window:
            window.set_default_timeout(patience)
            page = window.new_page()
            page.wrong, page.elsewhere = [], []
            page.on("console", lambda m: m.type in ("error", "warning") and page.wrong.append(f"{m.text} {m.location.get('url', '')}"))
            page.on("pageerror", lambda e: page.wrong.append(str(e)))
            page.on("request", lambda r: r.url.startswith((address, "data:", "blob:")) or page.elsewhere.append(r.url))
            page.goto(address + name)
            yield page
    return opened

@pytest.fixture(scope="module", params=names)
def page(request, visit):
    "Each page in turn, on a wide screen by day."
    with visit(request.param) as page:
        page.name = request.param
        yield page

def background(page): return page.evaluate("getComputedStyle(document.body).backgroundColor")

def brightness(page): return sum(map(int, re.findall(r"\d+", background(page))[:3])) / 765

def faults(page, *rules):
    "What axe, the common checker of accessibility, finds on a page."
    found = axe.run(page, options={"runOnly": {"type": "rule" if rules else "tag", "values": list(rules) or ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}, "resultTypes": ["violations"]})
    return [f"{v['id']}: {n['html'][:120]} {n['failureSummary'][:200]}" for v in found.response["violations"] for n in v["nodes"]]

def test_each_notebook_has_a_page(site): assert {p.name for p in site.glob("*.html")} == set(names)

def test_the_site_is_in_order(site): assert not (found := list(check_site.problems(site))), "\n".join(found)

def test_nothing_goes_wrong_and_nothing_comes_from_elsewhere(page):
    page.mouse.wheel(0, 99999)
    page.wait_for_load_state("networkidle")
    assert not page.wrong + page.elsewhere

def test_pictures_are_there(page):
    "Each picture of the notebook stands on the page, and has loaded."
    widths = page.evaluate("async () => Promise.all([...document.querySelectorAll('main img')].map(async i => { i.loading = 'eager'; await i.decode().catch(() => 0); return i.naturalWidth }))")
    shown = [c for c in nbformat.read(names[page.name], 4).cells if c.cell_type == "code" and not re.search(r"^#\| *(hide|output: *false)", c.source, re.M)]
    assert len(widths) >= sum("image/png" in o.get("data", {}) for c in shown for o in c.outputs) and all(widths)

def test_formulas_are_set(page):
    "Formulas are drawn, and none is left in TeX's own signs."
    prose = "\n".join(c.source for c in nbformat.read(names[page.name], 4).cells if c.cell_type == "markdown")
    formulas = re.findall(r"\$\$.+?\$\$|(?<![\\$\w])\$[^\s$](?:[^$\n]*[^\s$])?\$(?![\d$])", re.sub(r"```.*?```|`[^`]*`", "", prose, flags=re.S), re.S)
    drawn = page.evaluate("[...document.querySelectorAll('main math')].filter(m => m.getBoundingClientRect().width > 2 || m.closest('details')).length")
    left = page.evaluate("(() => { const m = document.querySelector('main').cloneNode(true); m.querySelectorAll('pre, code, annotation').forEach(e => e.remove()); return m.textContent })()")
    assert drawn >= len(formulas) and not re.findall(r"\\(?:frac|tfrac|sqrt|sum|beta|alpha|times|text|mathrm)\b|\$\$", left)

def test_day_and_night(page):
    "The switch changes the page and is remembered; the text can be read in both (WCAG 2.1, level AA)."
    page.mouse.wheel(0, -99999) # the bar with the switch hides while one scrolls down
    assert brightness(page) > 0.8 and not faults(page)
    page.click(".quarto-color-scheme-toggle")
    page.reload()
    assert brightness(page) < 0.25 and not faults(page, "color-contrast", "link-in-text-block")
    page.click(".quarto-color-scheme-toggle")
    assert brightness(page) > 0.8

@pytest.mark.parametrize("name", names)
def test_a_phone_at_night(visit, name):
    "A page scrolls one way only on a small screen, and is dark if the system is."
    with visit(name, 390, 844, has_touch=True, is_mobile=True, color_scheme="dark") as page:
        wide = page.evaluate("[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > 391 && !e.closest('pre, table, math, .cell-output-display')).slice(0, 5).map(e => e.outerHTML.slice(0, 100))")
        assert page.evaluate("document.scrollingElement.scrollWidth") <= 390, wide
        assert brightness(page) < 0.25

def test_search_finds_a_page(visit):
    with visit("index.html") as page:
        page.click("#quarto-search button, #quarto-search input")
        page.keyboard.type("pooling")
        found = page.locator(".search-item a, a.search-result-link")
        found.first.wait_for()
        assert "pool" in found.first.inner_text().lower()
        found.first.click()
        page.wait_for_url(lambda url: "index.html" not in url)
        assert "pooling" in page.inner_text("main").lower() and not page.elsewhere

def test_next_and_previous_lead_through_all_pages(visit):
    with visit("index.html") as page:
        def here(): return page.url.split("/")[-1].split("#")[0] or "index.html"
        def follow(link):
            with page.expect_navigation(): page.click(link)
        way = [here()]
        while page.locator(".nav-page-next a").count() and len(way) <= len(names):
            follow(".nav-page-next a")
            way.append(here())
        assert sorted(way) == sorted(names)
        for name in reversed(way[:-1]):
            follow(".nav-page-previous a")
            assert here() == name

@pytest.fixture(scope="module")
def processed(tmp_path_factory): return links.processed(tmp_path_factory.mktemp("pages"))

@pytest.mark.parametrize("name", names)
def test_anchors_are_where_links_py_thinks_that_they_are(site, processed, name):
    "What stands in for Pandoc where there is no Quarto gives the identifiers that Pandoc gives."
    ids = links.page(processed/names[name].name)[0].ids
    assert not ids - check_site.Page((site/name).read_text("utf-8")).ids
