"""Check a rendered site: `python tests/check_site.py _docs` lists what is wrong, and ends with exit code 1 if anything is.

Every internal link and anchor leads somewhere, every picture and script exists, every picture has a text for those who can't see it, no page
asks another host for a font, script or style, and no page names a folder of the machine that made it."""
import re, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

machine_path = re.compile(r"(?<![\w.:/-])/(?:work|tmp|root|home|Users|private|mnt|opt)/[\w.-]+|\b[A-Z]:\\Users\\\w+|file://")

class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.files, self.no_alt, self.stack = set(), [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[k] for k in ("id", "name") if attrs.get(k)}
        if tag == "a" and "href" in attrs and "onclick" not in attrs: self.links.append(attrs["href"] or "")
        if tag == "link" and attrs.get("rel") != "canonical": self.files.append(attrs.get("href") or "")
        if tag in ("img", "script", "source", "iframe", "video") and "src" in attrs: self.files.append(attrs["src"] or "")
        if tag == "img" and not (attrs.get("alt") or "").strip(): self.no_alt.append(attrs.get("src", "")[:60])

def problems(site):
    "Yield what is wrong with the site in this folder, a line each."
    site = Path(site).resolve()
    texts = {f.resolve(): f.read_text("utf-8") for f in sorted(site.rglob("*.html")) if "site_libs" not in f.parts}
    pages = {f: Page(text) for f, text in texts.items()}
    if not pages: yield f"{site} has no pages"
    for file, page in pages.items():
        here = file.relative_to(site).as_posix()
        for found in sorted(set(machine_path.findall(texts[file]))): yield f"{here}: names a folder of a machine: {found}"
        for src in page.no_alt: yield f"{here}: a picture without alternative text: {src}"
        for target, is_link in [(t, True) for t in page.links] + [(t, False) for t in page.files]:
            url = urlsplit(target)
            if url.scheme or url.netloc:
                if not is_link and url.scheme != "data": yield f"{here}: needs a file of another host: {target[:80]}"
                if is_link and url.scheme not in ("http", "https", "mailto"): yield f"{here}: a link of an odd kind: {target[:80]}"
                continue
            if not target: yield f"{here}: an empty link"; continue
            base = site if url.path.startswith("/") else file.parent
            goal = (base/unquote(url.path).lstrip("/")).resolve() if url.path else file
            if goal.is_dir(): goal /= "index.html"
            anchor = unquote(url.fragment)
            if not goal.is_relative_to(site) or not goal.is_file(): yield f"{here}: leads nowhere: {target}"
            elif is_link and anchor and goal in pages and anchor not in pages[goal].ids: yield f"{here}: no such place on the page: {target}"
    for css in site.rglob("*.css"):
        for host in re.findall(r"(?:@import|url\()\s*[\"'(]*((?:https?:)?//[^\"')\s]+)", css.read_text("utf-8", "replace")): yield f"{css.relative_to(site)}: needs a file of another host: {host}"

if __name__ == "__main__":
    found = list(problems(sys.argv[1] if len(sys.argv) > 1 else "_docs"))
    print(*found or ["The site is in order."], sep="\n")
    sys.exit(bool(found))
