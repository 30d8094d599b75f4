"""The command mtst, called as the console script calls it: with a list of arguments."""
import io, json, os, subprocess, sys, time
from pathlib import Path
import numpy as np, pandas as pd, pytest
from conftest import eager, files, write_bert
from mtst import MultiTaskSentenceTransformer, SentenceTransformer, Task, __version__
from mtst.cli import main

rows = pd.DataFrame({"text": ["good food", "a b, c", 'food "d" e', "bad film", "x y z"]*6, "mood": ["good", "bad", None, "bad", "good"]*6, "stars": ["1.5", None, "3", "-2", "4"]*6})
texts = ["good food", "x y z", "bad film"]

def run(*args): return main([str(a) for a in args])

def write(path, table=rows):
    if path.suffix == ".jsonl": path.write_text("".join(json.dumps({k: v for k, v in row.items() if v is not None}) + "\n" for row in table.to_dict("records")))
    else: table.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",", index=False, quoting=3 if path.suffix == ".tsv" else 0)
    return path

@pytest.fixture(scope="module")
def trained(tiny_folder, tmp_path_factory):
    "A model with two heads, to be read only."
    return MultiTaskSentenceTransformer(SentenceTransformer.from_pretrained(tiny_folder), [Task("mood", ["bad", "good"]), Task("stars", kind="regression")]).save_pretrained(tmp_path_factory.mktemp("trained")/"model")

@pytest.fixture(scope="module")
def answers(trained): return MultiTaskSentenceTransformer.from_pretrained(trained).predict(texts).round(4)

eagerly = eager()

@pytest.fixture
def refused(capsys):
    "A function that runs a command which must fail with exit code 1 and one line; gives that line."
    def refused(*args):
        assert run(*args) == 1
        err = capsys.readouterr().err
        assert err.startswith("mtst: ") and err.count("\n") == 1 and "Traceback" not in err
        return err
    return refused

@pytest.fixture
def untrained(monkeypatch):
    "No model may be made: the complaint has to come before."
    def made(*args, **kwargs): raise AssertionError("a model was made")
    monkeypatch.setattr(MultiTaskSentenceTransformer, "from_pretrained", made)

@pytest.fixture
def untaught(monkeypatch):
    "A model is made and saved, but no time is spent on teaching it."
    monkeypatch.setattr(MultiTaskSentenceTransformer, "fit", lambda *args, **kwargs: None)

# ---- what there is

@pytest.mark.parametrize("command", [[], ["check"], ["download"], ["demo"], ["embed"], ["train"], ["predict"]], ids=lambda c: c[0] if c else "mtst")
def test_help(capsys, command):
    with pytest.raises(SystemExit) as ended: run(*command, "--help")
    assert ended.value.code == 0 and capsys.readouterr().out.startswith(" ".join(["usage: mtst", *command]))

@pytest.mark.parametrize("args", [[], ["bake"], ["embed"], ["train", "a.csv"], ["train", "a.csv", "--task", "a", "--out", "b", "--epochs", "many"]])
def test_usage_errors_give_2(capsys, args):
    with pytest.raises(SystemExit) as ended: run(*args)
    assert ended.value.code == 2 and "usage: mtst" in capsys.readouterr().err

def test_version(capsys):
    with pytest.raises(SystemExit) as ended: run("--version")
    assert ended.value.code == 0 and capsys.readouterr().out == f"mtst {__version__}\n"

def test_the_console_script_answers_at_once():
    "In under a second and without TensorFlow; the best of five, for machines that are busy."
    script, seconds = Path(sys.executable).parent/"mtst", []
    for _ in range(5):
        start = time.perf_counter()
        ended = subprocess.run([script, "--help"], capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
        assert ended.returncode == 0 and "predict" in ended.stdout
        if seconds[-1] < 1: break
    assert min(seconds) < 1
    imported = subprocess.run([sys.executable, "-X", "importtime", script, "--help"], capture_output=True, text=True).stderr
    assert "argparse" in imported and not any(name in imported for name in ("tensorflow", "keras", "numpy", "pandas", "transformers"))

def test_check(tiny_folder, capsys):
    assert run("check", "--model", tiny_folder) == 0
    out = capsys.readouterr().out
    assert str(tiny_folder) in out and "became 8 numbers" in out and out.endswith("It loads and computes.\n")

# ---- embed

@pytest.mark.parametrize("normalize", [False, True])
def test_embed(tiny_folder, tiny, tmp_path, capsys, normalize):
    "One row a line, also for an empty line, and for a character that only Unicode takes for a line's end."
    lines = ["good food", "", "a\x85b\u2028c", "x y"]
    (tmp_path/"a.txt").write_bytes("\r\n".join(lines).encode())
    assert run("embed", tmp_path/"a.txt", tmp_path/"a.npy", "--model", tiny_folder, "--batch-size", 2, *["--normalize"]*normalize) == 0
    found = np.load(tmp_path/"a.npy", allow_pickle=False)
    assert found.dtype == "float32" and np.allclose(found, tiny.encode(lines, normalize_embeddings=normalize), atol=1e-6)
    assert "4 texts, 8 numbers each" in capsys.readouterr().out and np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5) == normalize

def test_embed_that_can_not_be(tiny_folder, tmp_path, refused):
    (tmp_path/"a.txt").write_text("good\n")
    (tmp_path/"latin.txt").write_bytes(b"good\ncaf\xe9\n")
    assert "none.txt" in refused("embed", tmp_path/"none.txt", tmp_path/"a.npy", "--model", tiny_folder)
    assert "latin.txt is not UTF-8" in refused("embed", tmp_path/"latin.txt", tmp_path/"a.npy", "--model", tiny_folder)
    assert "does not exist" in refused("embed", tmp_path/"a.txt", tmp_path/"none"/"a.npy", "--model", tiny_folder)
    assert "batch" in refused("embed", tmp_path/"a.txt", tmp_path/"a.npy", "--model", tiny_folder, "--batch-size", 0)
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "latin.txt"]

# ---- train

@pytest.mark.parametrize("ending, more", [(".csv", ["--freeze"]), (".tsv", ["--test"]), (".jsonl", ["--batch-size", "8", "--learning-rate", "0.01", "--seed", "3", "--freeze"])])
def test_train_on_a_table_with_gaps(tiny_folder, tiny, tmp_path, capsys, ending, more):
    "Two tasks, one of them numbers; the folder holds what the table asks for."
    path = write(tmp_path/f"rows{ending}")
    if more == ["--test"]: more = ["--test", write(tmp_path/"test.csv", rows.head(10))]
    assert run("train", path, "--task", "mood", "--task", "stars:regression", "--model", tiny_folder, "--out", tmp_path/"new"/"model", "--epochs", 1, *more) == 0
    out = capsys.readouterr().out
    assert f"Training on {30 if '--test' in more else 27} rows, testing on {10 if '--test' in more else 3}: mood (2 labels), stars (a number)" in out and "mean_absolute_error" in out and "Saved in" in out
    model = MultiTaskSentenceTransformer.from_pretrained(tmp_path/"new"/"model")
    assert [(t.name, t.kind, t.labels) for t in model.tasks.values()] == [("mood", "classification", ["bad", "good"]), ("stars", "regression", None)]
    assert np.array_equal(model.sentence_transformer.encode(texts), tiny.encode(texts)) == ("--freeze" in more)
    assert os.listdir(tmp_path/"new") == ["model"]

def test_train_twice_with_one_seed(tiny_folder, tmp_path):
    for name in "ab": assert run("train", write(tmp_path/"rows.csv"), "--task", "mood", "--model", tiny_folder, "--out", tmp_path/name, "--epochs", 1, "--freeze") == 0
    assert files(tmp_path/"a") == files(tmp_path/"b")

def test_train_with_several_labels_and_another_text_column(tiny_folder, tmp_path, untaught):
    table = rows.rename(columns={"text": "body"}).assign(tags=["x|y", "y", "x | z", None, "z"]*6)
    assert run("train", write(tmp_path/"rows.csv", table), "--text", "body", "--task", "tags:multilabel", "--model", tiny_folder, "--out", tmp_path/"model", "--epochs", 1, "--freeze") == 0
    assert MultiTaskSentenceTransformer.from_pretrained(tmp_path/"model").tasks["tags"].labels == ["x", "y", "z"]

def test_train_on_labels_with_spaces_around_them(tiny_folder, tmp_path, untaught):
    "As in a .csv with a space after each comma."
    (tmp_path/"rows.csv").write_text("text, mood\n" + "good food, good\nbad film, bad \n"*10)
    assert run("train", tmp_path/"rows.csv", "--task", "mood", "--model", tiny_folder, "--out", tmp_path/"model", "--epochs", 1, "--freeze") == 0
    assert MultiTaskSentenceTransformer.from_pretrained(tmp_path/"model").tasks["mood"].labels == ["bad", "good"]

def test_train_when_no_test_row_has_a_label_of_a_task(tiny_folder, tmp_path, untaught):
    "The model must not be lost after its training for want of a score."
    path, test = write(tmp_path/"rows.csv"), write(tmp_path/"test.csv", rows.head(3).assign(mood=None))
    assert run("train", path, "--test", test, "--task", "mood", "--task", "stars:regression", "--model", tiny_folder, "--out", tmp_path/"model", "--epochs", 1, "--freeze") == 0
    assert (tmp_path/"model"/"tasks.json").is_file()

@pytest.mark.parametrize("change, args, said", [
    (lambda t: t, ["--task", "anger"], "'anger'"), (lambda t: t, ["--task", "mood", "--text", "body"], "'body'"), (lambda t: t.assign(mood=[f"v{i}" for i in range(len(t))]), ["--task", "mood"], "--task mood:regression"),
    (lambda t: t, ["--task", "mood:ranking"], "'ranking'"), (lambda t: t, ["--task", "mood:regression"], "not a number"), (lambda t: t.assign(mood="good"), ["--task", "mood"], "two or more"),
    (lambda t: t.assign(mood=None), ["--task", "mood"], "mood"), (lambda t: t.assign(text=["good", ""]*30), ["--task", "mood"], "row"), (lambda t: t, ["--task", "mood", "--task", "mood"], "different names")],
    ids=["no such column", "no texts", "too many labels", "unknown kind", "words for numbers", "one label only", "no label", "empty text", "a task twice"])
def test_tables_that_can_not_be_trained_on(tiny_folder, tmp_path, refused, change, args, said):
    path = write(tmp_path/"rows.csv", change(pd.concat([rows]*2, ignore_index=True)))
    assert said in refused("train", path, *args, "--model", tiny_folder, "--out", tmp_path/"model")
    assert os.listdir(tmp_path) == ["rows.csv"]

def test_tables_that_can_not_be_read(tiny_folder, tmp_path, refused, untrained):
    (tmp_path/"rows.xls").write_text("a")
    for name in ("none.csv", "rows.xls"): assert name in refused("train", tmp_path/name, "--task", "mood", "--model", tiny_folder, "--out", tmp_path/"model")
    assert "none.csv" in refused("train", write(tmp_path/"rows.csv"), "--test", tmp_path/"none.csv", "--task", "mood", "--model", tiny_folder, "--out", tmp_path/"model")

def test_foreign_files_are_not_overwritten(tiny_folder, tmp_path, refused, untrained):
    (tmp_path/"out").mkdir()
    (tmp_path/"out"/"thesis.txt").write_text("mine")
    assert "thesis.txt" in refused("train", write(tmp_path/"rows.csv"), "--task", "mood", "--model", tiny_folder, "--out", tmp_path/"out")
    assert files(tmp_path/"out") == {"thesis.txt": b"mine"}

def test_a_place_that_can_not_be_written_is_refused_before_training(tiny_folder, tmp_path, refused, untrained):
    (tmp_path/"file").write_text("mine")
    for out in (tmp_path/"file", tmp_path/"file"/"model"): assert "file" in refused("train", write(tmp_path/"rows.csv"), "--task", "mood", "--model", tiny_folder, "--out", out)
    assert (tmp_path/"file").read_text() == "mine"

def test_labels_of_the_test_table_are_checked_before_training(tiny_folder, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(MultiTaskSentenceTransformer, "fit", lambda *args, **kwargs: pytest.fail("trained first"))
    test = write(tmp_path/"test.csv", rows.assign(mood="sea"))
    assert "sea" in refused("train", write(tmp_path/"rows.csv"), "--test", test, "--task", "mood", "--model", tiny_folder, "--out", tmp_path/"model", "--epochs", 1, "--freeze")

def test_a_training_that_is_stopped_gives_130_and_keeps_the_earlier_model(trained, tiny_folder, tmp_path, capsys, monkeypatch):
    def stop(*args, **kwargs): raise KeyboardInterrupt
    MultiTaskSentenceTransformer.from_pretrained(trained).save_pretrained(tmp_path/"model")
    before = files(tmp_path/"model")
    monkeypatch.setattr(MultiTaskSentenceTransformer, "fit", stop)
    assert run("train", write(tmp_path/"rows.csv"), "--task", "mood", "--model", tiny_folder, "--out", tmp_path/"model") == 130
    assert capsys.readouterr().err == "mtst: stopped\n" and files(tmp_path/"model") == before

def test_a_model_may_be_trained_on_in_its_own_folder(tmp_path, untaught):
    write_bert(tmp_path/"model")
    assert run("train", write(tmp_path/"rows.csv"), "--task", "mood", "--model", tmp_path/"model", "--out", tmp_path/"model", "--epochs", 1, "--freeze") in (0, 1) # done or refused
    assert (tmp_path/"model"/"model.safetensors").is_file() # but not destroyed

# ---- predict

def table_of(out): return pd.read_csv(io.StringIO(out), sep="\t")

def test_predict_arguments(trained, answers, capsys):
    assert run("predict", trained, *texts) == 0
    pd.testing.assert_frame_equal(table_of(capsys.readouterr().out), answers, atol=2e-4)

def test_predict_standard_input(trained, answers, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\r\n".join(texts) + "\n"))
    assert run("predict", trained) == 0
    pd.testing.assert_frame_equal(table_of(capsys.readouterr().out), answers, atol=2e-4)

@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.CSV", "a.tsv", "a.jsonl", "a.json"])
def test_predict_files(trained, answers, tmp_path, capsys, name):
    path, table = tmp_path/name, pd.DataFrame({"text": texts})
    if name == "a.txt": path.write_text("\n".join(texts))
    elif "json" in name: path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    else: table.to_csv(path, sep="\t" if name == "a.tsv" else ",", index=False)
    assert run("predict", trained, "--input", path) == 0
    pd.testing.assert_frame_equal(table_of(capsys.readouterr().out), answers, atol=2e-4)

def test_predict_into_a_file(trained, answers, tmp_path, capsys):
    pd.DataFrame({"body": texts}).to_csv(tmp_path/"a.csv", index=False)
    assert run("predict", trained, "--input", tmp_path/"a.csv", "--text-column", "body", "--out", tmp_path/"found.csv") == 0
    assert "found.csv: 3 rows" in capsys.readouterr().out and sorted(os.listdir(tmp_path)) == ["a.csv", "found.csv"]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path/"found.csv"), answers, atol=2e-4)

def test_predict_without_texts_prints_the_header(trained, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert run("predict", trained) == 0 and capsys.readouterr().out == "text\tmood\tmood_probability\tstars\n"

def test_predictions_that_can_not_be(trained, tiny_folder, tmp_path, refused):
    (tmp_path/"a.csv").write_text("body\ngood\n")
    (tmp_path/"latin.txt").write_bytes(b"good\ncaf\xe9\n")
    assert "without heads" in refused("predict", tiny_folder, "good")
    assert "none.txt" in refused("predict", trained, "--input", tmp_path/"none.txt")
    assert "'text'" in refused("predict", trained, "--input", tmp_path/"a.csv")
    assert "latin.txt" in refused("predict", trained, "--input", tmp_path/"latin.txt")
    assert "does not exist" in refused("predict", trained, "good", "--out", tmp_path/"none"/"a.csv")
    assert sorted(os.listdir(tmp_path)) == ["a.csv", "latin.txt"]

@pytest.mark.parametrize("damage", [lambda f: (f/"heads.safetensors").write_bytes(b"damaged"), lambda f: (f/"heads.safetensors").unlink(), lambda f: (f/"tasks.json").write_text('{"dropout": 0.1}')],
    ids=["damaged heads", "no heads", "no tasks"])
def test_a_damaged_model_is_one_line(trained, tmp_path, refused, damage):
    damage(MultiTaskSentenceTransformer.from_pretrained(trained).save_pretrained(tmp_path/"model"))
    assert "heads.safetensors" in (said := refused("predict", tmp_path/"model", "good")) or "tasks.json" in said
