"The benchmark: its rules on made-up numbers, its files, the protocol of its workers. Nothing is timed here."
import json, re, subprocess, sys
from pathlib import Path
import numpy as np, pandas as pd, pytest

root = Path(__file__).parent.parent
sys.path.insert(0, str(root/"bench"))
import run, summary
from mtst import find_checkpoint, load_reviews

@pytest.fixture(autouse=True)
def offline(monkeypatch): monkeypatch.setattr(run, "labelled", lambda: load_reviews("shipped")[0])

def rows(*some, **rest): # (what, contender, setting, unit, value) …, each as three rounds around the value
    made = [dict(what=w, contender=c, setting=s, unit=u, round=i + 1, value=v*factor) for w, c, s, u, v in some for i, factor in enumerate((0.9, 1, 3))]
    return pd.DataFrame(made, columns=summary.COLUMNS).assign(**dict(date="2026-01-01", machine="a processor, 2 cores", versions="") | rest)

def speed(contender, value, setting="", what="encode"): return what, contender, setting, "sentences/s", value
def verdict(table, start): return next(r.verdict for r in summary.bars(table).itertuples() if r.bar.startswith(start))

# The bars

@pytest.mark.parametrize("ours, limit, wanted", [(110, 200, "✓ met"), (100, 200, "✓ met"), (99, 200, "✗ not met"), (90, 95, "✗ not met, beyond this processor's limit"), (101, 95, "✓ met")])
def test_a_bar_is_met_or_not(ours, limit, wanted):
    table = rows(speed("mtst float32", ours), speed("ONNX Runtime", 80, "plain"), speed("ONNX Runtime", 100, "fused"), speed("processor", limit, "float32", "limit"))
    assert verdict(table, "encoding in float32 ÷ ONNX") == wanted

def test_without_rows_nothing_is_met(): assert set(summary.bars(rows()).verdict) == {"not measured"}

def test_a_contender_that_could_not_run_is_no_bar_met():
    table = rows(speed("mtst bfloat16", 100), speed("OpenVINO bfloat16", np.nan))
    assert verdict(table, "encoding in bfloat16") == "not measured"

@pytest.mark.parametrize("seconds, wanted", [((1, 10), "✓ met"), ((1, 12), "✓ met"), ((1, 12.5), "✗ not met")])
def test_time_has_to_grow_with_the_texts(seconds, wanted):
    assert verdict(rows(*(("growth", "mtst", n, "s", s) for n, s in zip(("10,000", "100,000"), seconds))), "time per text") == wanted

@pytest.mark.parametrize("peak, wanted", [(700, "✓ met"), (900, "✗ not met")])
def test_memory_is_counted_without_texts_and_vectors(peak, wanted):
    table = rows(*(("growth", "mtst", n, f"MB, {unit}", v) for n, pair in {"10,000": (500, 20), "100,000": (peak, 200)}.items() for unit, v in zip(("peak", "texts and vectors"), pair)))
    assert verdict(table, "memory") == wanted

@pytest.mark.parametrize("setting, seconds, wanted", [("import mtst", 0.09, "✓ met"), ("import mtst", 0.1, "✗ not met"), ("mtst check", 7, "✗ not met"), ("mtst predict", 7, "✓ met")])
def test_a_start_takes_less_than_said(setting, seconds, wanted): assert verdict(rows(("start", "mtst", setting, "s", seconds)), f"`{setting}`") == wanted

def test_wrong_vectors_are_found():
    cosine = lambda c, v: ("encode", c, "fused", "lowest cosine", v)
    assert set(summary.wrong(rows(cosine("right", 0.9999*2)))) == set() # each of the three rounds counts: 1.8, 2, 6
    assert set(summary.wrong(rows(cosine("right", 2), cosine("wrong", 0.998), cosine("no number", np.nan)))) == {"wrong, fused", "no number, fused"}

def test_the_table_shows_each_contenders_best_setting():
    table = summary.table(rows(speed("ONNX Runtime", 80, "plain"), speed("ONNX Runtime", 100, "fused"), speed("sentence-transformers", 40), *(("encode", c, s, f"{w} cosine", 1) for c, s in [("ONNX Runtime", "fused"), ("sentence-transformers", "")] for w in ("mean", "lowest"))))
    assert list(table.index) == ["ONNX Runtime", "sentence-transformers"] and table.setting.iloc[0] == "fused" and table["÷ sentence-transformers"].tolist() == [2.5, 1]

# The files

def test_new_rows_take_the_place_of_old_ones(tmp_path):
    path = tmp_path/"speed.csv"
    summary.keep(rows(speed("a", 1, "old"), ("train", "a", "", "steps/s", 5), ("limit", "processor", "float32", "steps/s", 6)), path)
    summary.keep(rows(speed("a", 2, "new"), ("limit", "processor", "float32", "sentences/s", 7)), path)
    assert {(r.what, r.setting, r.unit) for r in summary.read(path).itertuples()} == {("encode", "new", "sentences/s"), ("train", "", "steps/s"), ("limit", "float32", "steps/s"), ("limit", "float32", "sentences/s")}
    summary.keep(rows(speed("b", 2), machine="another"), path)
    assert set(summary.read(path).contender) == {"b"}

def test_a_file_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path/"speed.csv"
    def fails(self, file, **options): Path(file).write_text("half"); raise OSError("the disk is full")
    before = summary.keep(rows(speed("a", 1)), path)
    monkeypatch.setattr(pd.DataFrame, "to_csv", fails)
    with pytest.raises(OSError): summary.keep(rows(speed("a", 2)), path)
    assert [p.name for p in tmp_path.iterdir()] == ["speed.csv"] and summary.read(path).value.tolist() == before.value.tolist()

def test_the_stored_verdicts_follow_from_the_stored_rows():
    folder = root/"nbs"/"results"
    stored, now = pd.read_csv(folder/"speed_bars.csv"), summary.bars(summary.read(folder/"speed.csv"))
    assert stored.bar.tolist() == now.bar.tolist() and stored.verdict.tolist() == now.verdict.tolist() and np.allclose(stored.measured, now.measured, equal_nan=True)

def test_what_it_is_measured_beside_is_pinned():
    lines = [l for l in (root/"bench"/"requirements.txt").read_text().splitlines() if l[:1] != "#"]
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", l) for l in lines)
    assert {"torch", "sentence-transformers", "onnx", "onnxruntime", "openvino", "keras-hub", "tensorflow", "tensorflow-text"} <= {l.split("==")[0] for l in lines}
    assert set((root/"tests"/"requirements-peers.txt").read_text().split()) <= set(lines) # the same reference as in the tests

# The conductor, with made-up workers

class Fake:
    loaded, versions, made = 1.0, "fake 1", []
    def __init__(self, kind, **settings):
        if settings.get("gpu") or settings.get("precision") == "bf16": raise run.NotMeasured("there is none")
        self.kind = kind
        self.made.append(self)
    def ask(self, do, out=None, texts=None, **job):
        n = len(Path(texts).read_text().splitlines()) if texts else 0
        if out: np.save(out, np.ones((n, 4)) if self.kind != "keras_hub" else np.eye(n, 4) + 0.1)
        return {"seconds": {"mtst": 1, "onnx_runtime": 2 if job.get("batch_size") == 64 else 3}.get(self.kind, 4), "peak": 100.0, "own": 1.0, "result": [16]*n}
    def close(self): self.made.remove(self)

def test_all_experiments_run_and_end(tmp_path, monkeypatch, capsys):
    b = run.Bench(tmp_path, "no/python", texts=20, rounds=2)
    monkeypatch.setattr(b, "start", Fake)
    monkeypatch.setattr(run.time, "sleep", lambda seconds: None)
    for name in set(run.EXPERIMENTS) - {"start"}: run.EXPERIMENTS[name](b)
    b.close()
    table = summary.keep(pd.DataFrame(b.rows), tmp_path/"speed.csv")
    assert not Fake.made and verdict(table, "encoding in float32 ÷ ONNX") == "✓ met" and verdict(table, "encoding in bfloat16") == verdict(table, "one GPU") == "not measured"
    assert set(summary.table(table).loc["ONNX Runtime", ["setting"]]) <= {"plain, batches of 64", "fused, batches of 64"} # the best settings were found
    assert {k.split(",")[0] for k in summary.wrong(table)} == {"KerasHub"}
    assert "not measured: encode, OpenVINO bfloat16" in capsys.readouterr().out
    assert table[table.what == "encode"].dropna(subset=["value"]).groupby(["contender", "setting", "unit"])["round"].max().loc["mtst float32"].max() == 2

def test_texts_have_the_length_that_is_asked_for(model):
    for n in (4, 32): assert {len(t) for t in model.tokenize(run.texts_of(n, 50, find_checkpoint()))} == {n}

def test_the_work_of_a_layer_is_counted(): # by hand: a text of 3 tokens, width 2, inner width 5
    assert run.products([3], dict(num_hidden_layers=1, hidden_size=2, intermediate_size=5)) == 2*3*(4*2*2 + 2*2*5) + 2*2*3*3*2

# The protocol

def test_a_worker_answers_line_by_line(tmp_path, model):
    texts, out = [f"text number {i}, with more words"[:10 + 2*i] for i in range(8)], tmp_path/"v.npy"
    (tmp_path/"texts").write_text("".join(json.dumps(t) + "\n" for t in texts))
    b = run.Bench(tmp_path, "no/python")
    worker = b.start("mtst")
    answer = worker.ask("encode", texts=str(tmp_path/"texts"), out=str(out))
    assert answer["seconds"] > 0 and answer["peak"] > 100 and 8*384*4/1e6 < answer["own"] < 0.1 and "tensorflow" in worker.versions
    assert np.allclose(np.load(out), model.encode(texts), atol=1e-5)
    assert worker.ask("lengths", texts=str(tmp_path/"texts"))["result"] == [len(t) for t in model.tokenize(texts)]
    with pytest.raises(run.NotMeasured, match="TypeError"): worker.ask("encode", texts=str(tmp_path/"texts"), no_such_option=1)
    assert worker.ask("encode", texts=str(tmp_path/"texts"))["seconds"] > 0 # it lives on
    worker.close()
    assert worker.process.returncode == 0

def test_a_worker_that_dies_is_not_measured(tmp_path):
    with pytest.raises(run.NotMeasured, match="there is no"): run.Bench(tmp_path, "no/python").start("onnx_runtime")
    b = run.Bench(tmp_path, sys.executable)
    with pytest.raises(run.NotMeasured, match="ModuleNotFoundError"): b.start("open_vino", exported="", precision="f32", hint="LATENCY")
