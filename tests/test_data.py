"""Data: the two review sets, and tables with everything that people's files have in them."""
import re, warnings, zipfile
import pandas as pd, pytest
from mtst import data as mtst_data
from mtst.data import DOMAINS, SENTIMENTS, load_reviews, parse_reviews, read_table

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
