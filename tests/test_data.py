"""Data: the two review sets, the benchmarks, and tables with everything that people's files have in them."""
import functools, gzip, http.server, json, re, shutil, threading, warnings, zipfile
import huggingface_hub, pandas as pd, pytest
from mtst import data as mtst_data
from mtst.data import DOMAINS, SENTIMENTS, load_public, load_reviews, parse_public, parse_reviews, read_table

# ---- the UCI reviews

def triples(table): return sorted(zip(table.text, table.domain, table.sentiment))

def test_uci_originals_are_the_reference_split(data, monkeypatch):
    monkeypatch.setenv("MTST_DATA", str(data))
    with warnings.catch_warnings():
        warnings.simplefilter("error") # a copy that differs would be warned of
        parts = load_reviews("uci")
    assert [len(part) for part in parts] == [2400, 600] and "UCI" in parts[0].attrs["source"]
    for part, name in zip(parts, ("train", "test")):
        reference = pd.read_csv(data/"uci_sentiment"/f"{name}.tsv", sep="\t", quoting=3, keep_default_na=False, lineterminator="\n")
        reference["domain"] = reference.domain.replace({"amazon": "product", "imdb": "movie", "yelp": "restaurant"})
        assert triples(part) == triples(reference)

@pytest.mark.parametrize("file", mtst_data._uci_files)
def test_each_original_has_1000_rows(data, file):
    table = parse_reviews((data/"uci_sentiment"/"orig"/file).read_bytes(), file)
    assert len(table) == 1000 and table.sentiment.value_counts().to_dict() == {"negative": 500, "positive": 500}

lines = [f"Sentence {i}\twith a tab, \"a quote\x85.  \t{i % 2}" for i in range(1000)]

@pytest.mark.parametrize("fault, said", [(lines[:-1], "999"), (lines[:-1] + ["no label"], "1,000 rows, 500"), (lines[:-1] + ["x\t0"], "499 of them")])
def test_a_damaged_original_is_refused(fault, said):
    with pytest.raises(ValueError, match=f"yelp_labelled.txt should have .*{said}"): parse_reviews("\n".join(fault).encode(), "yelp_labelled.txt")

def test_another_copy_is_parsed_with_a_warning():
    with pytest.warns(UserWarning, match="not byte for byte"): table = parse_reviews("\r\n".join(lines).encode(), "yelp_labelled.txt")
    assert table.iloc[3].to_dict() == {"text": 'Sentence 3\twith a tab, "a quote\x85.', "domain": "restaurant", "sentiment": "positive"}

def write_zip(path, content="\n".join(lines).encode()):
    "An archive of the publisher's shape."
    with zipfile.ZipFile(path, "w") as archive:
        for name in [*mtst_data._uci_files, "readme.txt"]:
            archive.writestr(f"sentiment labelled sentences/{name}", content)
            archive.writestr(f"__MACOSX/sentiment labelled sentences/._{name}", b"\0\5\26\7")
    return path

@pytest.fixture
def no_data(monkeypatch, tmp_path):
    "No MTST_DATA, an empty cache, and a publisher whose address is a file that a test may write."
    monkeypatch.delenv("MTST_DATA", raising=False)
    monkeypatch.setenv("MTST_CACHE", str(tmp_path/"cache"))
    monkeypatch.setattr(mtst_data, "_uci_address", (tmp_path/"published.zip").as_uri())
    return tmp_path

@pytest.mark.filterwarnings("ignore:.*not byte for byte")
@pytest.mark.parametrize("already", [True, False], ids=["in the cache", "downloaded"])
def test_uci_from_the_zip(no_data, already):
    (no_data/"cache").mkdir()
    write_zip(no_data/"cache"/"sentiment_labelled_sentences.zip" if already else no_data/"published.zip")
    train, test = load_reviews("uci")
    assert (len(train), len(test)) == (2400, 600) and set(train.domain) == set(DOMAINS)
    assert [f.name for f in (no_data/"cache").iterdir()] == ["sentiment_labelled_sentences.zip"]

@pytest.mark.parametrize("found", ["nothing", "no archive", "a damaged archive"])
def test_without_the_uci_reviews_the_shipped_ones_take_their_place(no_data, found):
    if found == "no archive": (no_data/"published.zip").write_bytes(b"<html>Sign in to this network</html>")
    if found == "a damaged archive": write_zip(no_data/"published.zip").write_bytes((no_data/"published.zip").read_bytes().replace(b"Sentence 500", b"Sentence 50X"))
    with pytest.warns(UserWarning, match="720 reviews that come with mtst"): train, test = load_reviews()
    assert len(train) + len(test) == 720 and "come with mtst" in train.attrs["source"]
    with pytest.raises(Exception): load_reviews("uci")
    assert not [f for f in no_data.glob("cache/*")] # what is damaged is not kept

def test_unknown_source():
    with pytest.raises(ValueError, match="'UCI'; it can be 'auto'"): load_reviews("UCI")

# ---- the shipped reviews

def test_shipped_reviews_are_balanced_and_all_different():
    train, test = load_reviews("shipped")
    both = pd.concat([train, test])
    counts = both.groupby(["domain", "sentiment"]).size()
    assert len(both) == 720 and len(counts) == 6 and set(counts) == {120} and set(both.sentiment) == set(SENTIMENTS)
    assert all(part.groupby(["domain", "sentiment"]).size().nunique() == 1 for part in (train, test))
    assert both.text.map(lambda t: re.sub(r"[\W_]+", " ", t.lower()).strip()).is_unique # also: no text on both sides

def test_shipped_reviews_are_neither_trivial_nor_hopeless(model):
    "Frozen vectors and logistic regression: near what the UCI reviews give, 0.90."
    from sklearn.linear_model import LogisticRegression
    train, test = load_reviews("shipped")
    x, y = model.encode(train.text), model.encode(test.text)
    scores = {task: LogisticRegression(max_iter=1000).fit(x, train[task]).score(y, test[task]) for task in ("domain", "sentiment")}
    print(scores)
    assert all(0.80 <= score <= 0.97 for score in scores.values()), scores

# ---- the benchmarks

sizes = {"sst2": (6920, 1821), "trec": (5452, 500), "stsb": (5749, 1379)}
kept = {"sst2": ["test.jsonl", "train.jsonl"], "trec": ["TREC_10.label", "train_5500.label"], "stsb": ["stsbenchmark.tsv.gz"]}
codes = {"abbreviation": "ABBR:exp", "description": "DESC:manner", "entity": "ENTY:cremat", "human": "HUM:ind", "location": "LOC:other", "number": "NUM:date"}

def reference(data, name, part): # read without pandas
    header, *rows = [line.split("\t") for line in (data/name/f"{part}.tsv").read_bytes().decode("utf-8").strip("\n").split("\n")]
    return header, [tuple(row) if name != "stsb" else (*row[:2], float(row[2])) for row in rows]

@pytest.mark.parametrize("name", sizes)
def test_a_benchmark_from_a_folder(data, monkeypatch, name):
    monkeypatch.setenv("MTST_DATA", str(data))
    monkeypatch.setattr(mtst_data, "_download", None) # nothing is fetched
    tables = load_public(name)
    assert tuple(map(len, tables)) == sizes[name] and isinstance(tables, tuple)
    for table, part in zip(tables, ("train", "test")):
        header, rows = reference(data, name, part)
        assert table.columns.tolist() == header and list(table.itertuples(index=False, name=None)) == rows
        assert table.attrs["source"].startswith({"sst2": "SST-2", "trec": "TREC", "stsb": "STS"}[name])

def test_labels_of_the_benchmarks(data, monkeypatch):
    monkeypatch.setenv("MTST_DATA", str(data))
    for table in load_public("sst2"): assert set(table.label) == set(SENTIMENTS)
    for table in load_public("trec"): assert set(table.label) == set(codes)
    for table in load_public("stsb"): assert table.score.dtype == float and (table.score.min(), table.score.max()) == (0, 5)

def test_an_unknown_benchmark():
    with pytest.raises(ValueError, match="'SST2'; it can be 'sst2', 'trec', 'stsb'"): load_public("SST2")

def plain_rows(name, part): # made up; with quotation marks, and a character that splitlines would take for a line's end
    rows = sizes[name][part == "test"]
    if name == "stsb": return [(f'A "{i}"\x85.', f"B {i}", i % 6) for i in range(rows)]
    labels = SENTIMENTS if name == "sst2" else sorted(codes)
    return [(f'A 5" caf\xe9 no.\x85{i} ?', labels[i % len(labels)]) for i in range(rows)]

def published(name, part, rows=None, newline="\n"): # name and bytes of the file that the publisher gives for a part
    rows = {part: rows} if rows else {p: plain_rows(name, p) for p in ("train", "test")}
    if name == "sst2": lines = [json.dumps({"text": text, "label": SENTIMENTS.index(label), "label_text": label}, ensure_ascii=False) for text, label in rows[part]]
    if name == "trec": lines = [f"{codes[label]} {text}" for text, label in rows[part]]
    if name == "stsb":
        lines = ["split\tgenre\tdataset\tyear\tsid\tscore\tsentence1\tsentence2", "dev\tmain-news\tMSRvid\t2012\t7\t1.0\tC\tD"]
        lines += [f"{p}\tmain-captions\tMSRvid\t2012test\t{i:04}\t{score}\t{one}\t{two}" for p in rows for i, (one, two, score) in enumerate(rows[p])]
    raw = (newline.join(lines) + newline).encode("latin-1" if name == "trec" else "utf-8")
    return kept[name][-1 if part == "train" else 0], gzip.compress(raw) if name == "stsb" else raw

@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("name", sizes)
def test_the_publishers_formats_are_read_as_they_are(data, name, newline):
    "The real sets, written in the publisher's format and parsed."
    for part in ("train", "test"):
        header, rows = reference(data, name, part)
        table = parse_public(published(name, part, rows, newline)[1], name, part)
        assert table.columns.tolist() == header and list(table.itertuples(index=False, name=None)) == rows

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

@pytest.fixture
def publishers(monkeypatch, tmp_path):
    "No MTST_DATA, an empty cache, and publishers that serve a folder which a test may write; `asked` lists what was fetched."
    monkeypatch.delenv("MTST_DATA", raising=False)
    monkeypatch.setenv("MTST_CACHE", str(tmp_path/"cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    site, asked = tmp_path/"site", []
    site.mkdir()
    class Handler(Quiet):
        def do_GET(self):
            asked.append(self.path[1:])
            super().do_GET()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(mtst_data, "_public", {name: (title, address, *rest) for name, (title, _, *rest) in mtst_data._public.items()})
    def hub(repo, file, repo_type, cache_dir):
        assert (repo, repo_type) == ("SetFit/sst2", "dataset")
        asked.append(file)
        if not (site/file).exists(): raise OSError("We couldn't connect to the Hub\nand more lines")
        return shutil.copy(site/file, cache_dir)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    yield site, tmp_path/"cache", asked
    server.shutdown()
    server.server_close()

def publish(site, name):
    for part in ("train", "test"):
        file, raw = published(name, part)
        (site/file).write_bytes(raw)

def cached(cache): return sorted(str(f.relative_to(cache)) for f in cache.rglob("*") if f.is_file())

@pytest.mark.parametrize("name", sizes)
def test_a_benchmark_is_downloaded_once(publishers, name):
    site, cache, asked = publishers
    publish(site, name)
    first = load_public(name)
    assert sorted(asked) == kept[name] and cached(cache) == [f"{name}/{file}" for file in kept[name]]
    shutil.rmtree(site)
    again = load_public(name)
    assert len(asked) == len(kept[name]) # not asked again
    for part, one, two in zip(("train", "test"), first, again):
        assert list(one.itertuples(index=False, name=None)) == plain_rows(name, part) and one.equals(two) and one.attrs == two.attrs

@pytest.mark.parametrize("name", sizes)
def test_offline_says_what_to_do(publishers, name):
    site, cache, asked = publishers
    with pytest.raises(FileNotFoundError, match=rf"(?s){name} is not on this machine, and \S+ could not give \S+ \(.+\)\. With internet access, call again.* MTST_DATA .*{name}/train.tsv") as e: load_public(name)
    assert "\n" not in str(e.value) and not cached(cache)

@pytest.mark.parametrize("fault", ["a sign-in page", "cut short", "a row too few", "another label", "empty"])
@pytest.mark.parametrize("name", sizes)
def test_a_damaged_benchmark_is_not_kept(publishers, name, fault):
    site, cache, asked = publishers
    publish(site, name)
    file, raw = published(name, "test")
    rows = plain_rows(name, "test")
    if fault == "a sign-in page": raw = b"<html>Sign in to this network</html>"
    if fault == "cut short": raw = raw[:len(raw)//2]
    if fault == "a row too few": raw = published(name, "test", rows[1:])[1]
    if fault == "another label": raw = gzip.compress(gzip.decompress(raw).replace(b"\t5\t", b"\t5.1\t")) if name == "stsb" else raw.replace(b'"label": 1', b'"label": -1').replace(b"NUM", b"SUM")
    if fault == "empty": raw = b""
    (site/file).write_bytes(raw)
    with pytest.raises(ValueError, match=f"^{file} is damaged. .* It was not kept: load {name} again.$"): load_public(name)
    assert f"{name}/{file}" not in cached(cache) and not [f for f in cached(cache) if ".part" in f]
    publish(site, name)
    assert tuple(map(len, load_public(name))) == sizes[name] # and the next call is well

@pytest.mark.parametrize("name", sizes)
def test_a_benchmark_that_was_damaged_in_the_cache(publishers, name):
    site, cache, asked = publishers
    publish(site, name)
    load_public(name)
    path = cache/name/kept[name][0]
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is damaged. .* Delete it and load {name} again."): load_public(name)
    path.unlink()
    assert tuple(map(len, load_public(name))) == sizes[name]

def write_tsv(folder, name):
    (folder/name).mkdir()
    for part in ("train", "test"):
        rows = [("text1\ttext2\tscore" if name == "stsb" else "text\tlabel"), *("\t".join(map(str, row)) for row in plain_rows(name, part))]
        (folder/name/f"{part}.tsv").write_bytes(("\n".join(rows) + "\n").encode())
    return folder/name/"test.tsv"

@pytest.mark.parametrize("name", sizes)
def test_faults_in_the_folder_of_benchmarks_are_named(publishers, monkeypatch, tmp_path, name):
    monkeypatch.setenv("MTST_DATA", str(tmp_path))
    path = write_tsv(tmp_path, name)
    assert list(load_public(name)[1].itertuples(index=False, name=None)) == plain_rows(name, "test")
    whole = path.read_bytes()
    last = whole.rstrip().rfind(b"\n") + 1
    for raw, said in [(whole[:last], f"should have {sizes[name][1]:,} rows; found: {sizes[name][1] - 1:,}"), (whole.replace(b"text", b"sentence", 1), "the columns text"), (b"", "."),
            (whole.replace(b"text", b"t\xe4xt", 1), "utf-8"), (whole[:last] + b"\t".join([b"x"]*whole[last:].count(b"\t") + [b"9.5\n"]), "9.5|others in row 1379"), (whole[:last] + b"x\n", "empty")]:
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=f"(?s){re.escape(str(path))} is damaged. .*(?:{said}).* Replace it, or unset .*MTST_DATA"): load_public(name)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"no file {re.escape(str(path))}. Put it there, or unset .*MTST_DATA"): load_public(name)
    assert not publishers[2] # the publisher was never asked

def test_a_folder_without_the_benchmark_leaves_it_to_the_publisher(publishers, monkeypatch, tmp_path):
    monkeypatch.setenv("MTST_DATA", str(tmp_path))
    publish(publishers[0], "trec")
    assert tuple(map(len, load_public("trec"))) == sizes["trec"] and publishers[2] == ["train_5500.label", "TREC_10.label"]

# ---- tables

def table_of(folder, name, content, *args, **kwargs):
    (folder/name).write_bytes(content.encode() if isinstance(content, str) else content)
    return read_table(folder/name, *args, **kwargs)

@pytest.mark.parametrize("name, content, texts", [
    ("a.csv", 'text,label\n"one, two\nlines ""so""",x\nb,y\n', ['one, two\nlines "so"', "b"]),
    ("a.csv", "\ufefftext,label\na,x\nb,y\n", ["a", "b"]), ("a.csv", '\ufeff"text","label"\r\n"a","x"\r\nb,y\r\n', ["a", "b"]),
    ("a.tsv", "\ufefftext\tlabel\na\tx\nb\ty\n", ["a", "b"]), ("a.jsonl", '\ufeff{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}', ["a", "b"]),
    ("a.tsv", 'text\tlabel\r\n"a\tx\r\nb "c"\x85d\ty\r\n', ['"a', 'b "c"\x85d']), ("a.tsv", "text\tlabel\na\tx\nb\ty\r\n", ["a", "b"]),
    ("A.CSV", " text , label\na,x\nb,y", ["a", "b"]), ("a.csv", "label,text\nx,NA\ny,null\n", ["NA", "null"]),
    ("a.jsonl", '{"text": "a\u2028\x85", "label": "x"}\r\n\n{"label": "y", "text": "b"}', ["a\u2028\x85", "b"])])
def test_texts_arrive_as_written(tmp_path, name, content, texts):
    table = table_of(tmp_path, name, content, {"label": ["x", "y"]})
    assert table.text.tolist() == texts and table.label.tolist() == ["x", "y"]

def test_parquet_round_trip(tmp_path):
    table = pd.DataFrame({"text": ["a, \"b\"\n", "\ufeff雪\x85"], "label": ["NA", None], "level": [1, 2]})
    table.to_parquet(tmp_path/"a.parquet")
    found = read_table(tmp_path/"a.parquet", {"label": ["NA"], "level": [1, 2]})
    assert found.drop(columns="label").equals(table.drop(columns="label")) and found.label[0] == "NA" and pd.isna(found.label[1])

@pytest.mark.parametrize("name, join", [("a.csv", ","), ("a.tsv", "\t")])
def test_labels_stay_text(tmp_path, name, join):
    labels = ["NA", "null", "nan", "None", "007", "1.0", "True", "-"]
    table = table_of(tmp_path, name, "\n".join(["text" + join + "label", *(f"t{i}{join}{label}" for i, label in enumerate(labels))]), {"label": labels})
    assert table.label.tolist() == labels

@pytest.mark.parametrize("name, content", [("a.csv", "text,label\na,\nb,x\n"), ("a.tsv", "text\tlabel\na\t\nb\tx\n"), ("a.tsv", "text\tlabel\r\na\t\r\nb\tx\r\n"),
    ("a.tsv", "text\tlabel\na\nb\tx\n"), ("a.jsonl", '{"text": "a", "label": null}\n{"text": "b", "label": "x"}'), ("a.jsonl", '{"text": "a"}\n{"text": "b", "label": "x"}')])
def test_a_missing_label_is_missing(tmp_path, name, content):
    assert table_of(tmp_path, name, content, {"label": ["x"]}).label.isna().tolist() == [True, False]

def test_a_number_among_the_labels_is_seen(tmp_path):
    with pytest.raises(ValueError, match="unknown label label '3' in row 2"):
        table_of(tmp_path, "a.jsonl", '{"text": "a", "label": "x"}\n{"text": "b", "label": 3}', {"label": ["x"]})

@pytest.mark.parametrize("name, content, said", [
    ("a.csv", "", "a.csv can't be read as a table"), ("a.tsv", "", "a.tsv can't be read"), ("a.jsonl", "", "a.jsonl has no column 'text'"), ("a.parquet", "", "a.parquet"),
    ("a.txt", "a", "mtst reads .csv, .tsv"), ("a.csv", "txt,label\na,x", "no column 'text'. Its columns are: txt, label"), ("a.csv", "text\na", "no column 'label'"),
    ("a.csv", b"text,label\na,x\nb\xe4,x\n", "a.csv, line 3 is not UTF-8"), ("a.tsv", b"text\tlabel\na\tx\nb\xe4\tx\n", "a.tsv, line 3 is not UTF-8"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xe4"}', "a.jsonl, line 2 is not UTF-8"), ("a.csv", "text,label\na,x".encode("utf-16"), "line 1 is not UTF-8"),
    ("a.jsonl", '{"text": "a", "label": "x"}\nnope\n', "a.jsonl, line 2 is not JSON"), ("a.jsonl", '["a", "x"]', "a.jsonl, line 1 is not an object"),
    ("a.csv", "text,label\na,x\nb,y\nc,zz\nd,x", "unknown label label 'y', 'zz' in rows 2, 3. Known are: x"),
    ("a.csv", "text,label\na,x\n,x\n  ,x", "empty text, or one that is no text, in rows 2, 3"), ("a.jsonl", '{"text": 3, "label": "x"}', "no text, in row 1"),
    ("a.csv", "text,label\n" + ",x\n"*9, "rows 1, 2, 3, 4, 5 and 4 more"), ("a.csv", 'text,label\n"a,x\nb,x', "a.csv can't be read"),
    ("a.csv", "text,label\na,x\ngood, really,x", "line 3"), ("a.csv", "text,label\ngood, really,x\nbad, no,x\n", "a.csv"), ("a.tsv", "text\tlabel\na\tb\tx\n", "a.tsv"),
    ("a.csv", "text,text ,label\na,b,x", "a.csv has .*'text'")])
def test_faults_are_named(tmp_path, name, content, said):
    with pytest.raises(ValueError, match=said): table_of(tmp_path, name, content, {"label": ["x"]})

def test_another_text_column(tmp_path):
    assert table_of(tmp_path, "a.csv", "review,label\na,x", text="review").columns.tolist() == ["text", "label"]
    with pytest.raises(ValueError, match="no column 'remark'"): table_of(tmp_path, "a.csv", "review,label\na,x", text="remark")
    with pytest.raises(ValueError, match="'text'"): table_of(tmp_path, "a.csv", "review,text\na,b", text="review") # two columns for one name

def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file"): read_table(tmp_path/"none.csv")

@pytest.mark.online
def test_uci_from_the_publisher(monkeypatch, tmp_path):
    monkeypatch.delenv("MTST_DATA", raising=False)
    monkeypatch.setenv("MTST_CACHE", str(tmp_path))
    assert [len(part) for part in load_reviews("uci")] == [2400, 600]

@pytest.mark.online
@pytest.mark.parametrize("name", sizes)
def test_a_benchmark_from_its_publisher(data, monkeypatch, tmp_path, name):
    "The publisher's rows are those in the folder of public data sets; the order may differ, and scores may be rounded."
    monkeypatch.delenv("MTST_DATA", raising=False)
    monkeypatch.setenv("MTST_CACHE", str(tmp_path))
    tables = load_public(name)
    assert tuple(map(len, tables)) == sizes[name]
    for table, part in zip(tables, ("train", "test")):
        found, expected = sorted(table.itertuples(index=False, name=None)), sorted(reference(data, name, part)[1])
        assert [row[:2] for row in found] == [row[:2] for row in expected]
        if name == "stsb": assert [row[2] for row in found] == pytest.approx([row[2] for row in expected], abs=0.01)
