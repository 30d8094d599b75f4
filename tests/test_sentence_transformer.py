"""The encoder and its frame: what goes in, what comes out, what is loaded and saved, and what it costs."""
import json, os, shutil, subprocess, sys, time
import keras, numpy as np, pandas as pd, pytest
from safetensors.numpy import load_file, save_file
from conftest import VOCAB, bert_weights, files, python, write_bert
from mtst import SentenceTransformer, load_reviews
from mtst.sentence_transformer import SelfAttention, batches_by_length

# ---- what encode takes

@pytest.mark.parametrize("bad, error", [(None, TypeError), (float("nan"), TypeError), (b"good", TypeError), (3, TypeError), (["good"], TypeError), ({"a": "b"}, TypeError), ("a\ud800", ValueError)],
    ids=["None", "NaN", "bytes", "int", "list", "dict", "half a character"])
def test_a_bad_text_is_named_by_position(model, bad, error):
    with pytest.raises(error, match=r"Text 2 \(counting from 0\)"): model.encode(["good", "food", bad])

@pytest.mark.parametrize("bad", [None, float("nan"), b"good", 3, {"a": "b"}, pd.DataFrame({"text": ["good"]})], ids=["None", "NaN", "bytes", "int", "dict", "DataFrame"])
def test_what_is_no_list_of_texts_is_refused(model, bad):
    with pytest.raises(TypeError, match=type(bad).__name__): model.encode(bad)

@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"batch_size": -1}, {"truncate_dim": 0}, {"truncate_dim": 385}, {"truncate_dim": -1}])
def test_settings_out_of_range(model, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): model.encode(["good"], **wrong)

odd = ["", "   ", "\n\t", "👩‍👩‍👧‍👦🏳️‍🌈", "مرحبا بالعالم", "a\0b", "e\u0301\u0302"*50, "我喜欢这部电影", "x"*1000, "\ufeff\u200b\u202e", "[CLS] [SEP] [PAD]"]
def test_any_text_gives_a_vector_of_length_1(model):
    vectors = model.encode(odd)
    assert vectors.dtype == "float32" and vectors.shape == (len(odd), 384) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5) # NaN fails too
    assert np.allclose(vectors, np.stack([model.encode(text) for text in odd]), atol=1e-5)

def test_a_text_of_100_000_words_is_cut(model):
    start = time.perf_counter()
    whole = model.encode("good " * 100_000)
    assert time.perf_counter() - start < 5
    assert np.allclose(whole, model.encode("good " * (model.max_seq_length - 2)), atol=1e-6)
    assert not np.allclose(whole, model.encode("good " * (model.max_seq_length - 3)), atol=1e-6) # not cut shorter either

@pytest.mark.parametrize("several", [list, tuple, iter, np.array, pd.Series])
def test_any_iterable_of_texts(model, several):
    assert np.allclose(model.encode(several(["good", "food"])), np.stack([model.encode("good"), model.encode("food")]), atol=1e-6)

def test_no_texts(model, tmp_path):
    assert model.encode([]).shape == (0, 384)
    model.encode(iter([]), output_file=tmp_path/"a.npy")
    assert np.load(tmp_path/"a.npy").shape == (0, 384)

# ---- what encode gives

@pytest.fixture(scope="module")
def texts():
    random = np.random.default_rng(0)
    return [" ".join(random.choice(["good", "bad", "food", "the", "a", "film", "uneatable"], n)) for n in random.integers(0, 60, 80)]

@pytest.fixture(scope="module")
def one_by_one(model, texts): return np.stack([model.encode(text) for text in texts])

@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_vectors_come_in_the_order_of_the_texts(model, texts, one_by_one, batch_size):
    assert np.abs(model.encode(texts, batch_size=batch_size) - one_by_one).max() < 1e-5

def test_truncated_vectors(model, texts, one_by_one):
    assert np.allclose(model.encode(texts, truncate_dim=10), one_by_one[:, :10], atol=1e-5)
    assert np.allclose(np.linalg.norm(model.encode(texts, truncate_dim=10, normalize_embeddings=True), axis=1), 1, atol=1e-5)

def test_output_file_holds_what_memory_holds(tiny, tmp_path):
    "Several chunks, from a generator; and the file is a plain array."
    texts = ["good food"[:i % 10] for i in range(5000)]
    shown = tiny.encode((t for t in texts), output_file=tmp_path/"a.npy", batch_size=500, truncate_dim=7)
    found = np.load(tmp_path/"a.npy", allow_pickle=False)
    assert found.dtype == "float32" and found.shape == (5000, 7) and np.array_equal(found, shown) and np.array_equal(found, tiny.encode(texts, batch_size=500, truncate_dim=7))
    assert os.listdir(tmp_path) == ["a.npy"] and not shown.flags.writeable

@pytest.mark.parametrize("last", [lambda: 1/0, lambda: 3], ids=["generator fails", "no string"])
def test_a_failure_midway_leaves_no_file(tiny, tmp_path, last):
    def texts():
        yield from ["good"]*5000
        yield last()
    with pytest.raises((ZeroDivisionError, TypeError), match="division|Text 5000"): tiny.encode(texts(), output_file=tmp_path/"a.npy", batch_size=500)
    assert os.listdir(tmp_path) == []

def test_output_file_without_a_folder_fails_before_the_work(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"): model.encode((1/0 for _ in [0]), output_file=tmp_path/"none"/"a.npy")

def test_nearest(model):
    corpus = model.encode(["The pasta was cold.", "A thrilling film.", "The charger broke."])
    assert [row for row, _ in model.nearest("This movie is exciting!", corpus, top_k=2)][0] == 1
    assert [found[0][0] for found in model.nearest(["cold noodles", "broken charger"], corpus)] == [0, 2]
    with pytest.raises(ValueError, match=r"\(texts, 384\)"): model.nearest("good", corpus[:, :10])

# ---- what is loaded

def bert_in_numpy(weights, ids, heads=2, depth=2):
    "BERT from the paper, in NumPy, for one text."
    from scipy.special import erf, softmax
    w = lambda name: weights[name].astype("float64")
    dense = lambda x, name: x @ w(name + ".weight").T + w(name + ".bias")
    norm = lambda x, name: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12) * w(name + ".weight") + w(name + ".bias")
    e = "embeddings."
    x = norm(w(e+"word_embeddings.weight")[ids] + w(e+"position_embeddings.weight")[:len(ids)] + w(e+"token_type_embeddings.weight")[0], e+"LayerNorm")
    for i in range(depth):
        at = f"encoder.layer.{i}."
        q, k, v = (dense(x, f"{at}attention.self.{n}").reshape(len(ids), heads, -1).swapaxes(0, 1) for n in ("query", "key", "value"))
        mixed = softmax(q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]), -1) @ v
        x = norm(x + dense(mixed.swapaxes(0, 1).reshape(len(ids), -1), at+"attention.output.dense"), at+"attention.output.LayerNorm")
        inner = dense(x, at+"intermediate.dense")
        x = norm(x + dense(inner * (1 + erf(inner / np.sqrt(2))) / 2, at+"output.dense"), at+"output.LayerNorm")
    return x

pooled = {"mean": lambda tokens: tokens.mean(0), "cls": lambda tokens: tokens[0], "max": lambda tokens: tokens.max(0)}

def pooling(folder, settings, *more):
    "Write the settings of pooling as sentence-transformers does, by flags or by name."
    (folder/"1_Pooling").mkdir(exist_ok=True)
    (folder/"1_Pooling"/"config.json").write_text(json.dumps({"word_embedding_dimension": 8, **settings}))
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), *more]
    (folder/"modules.json").write_text(json.dumps([{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"} for i, (path, kind) in enumerate(kinds)]))
    return folder

@pytest.mark.parametrize("mode", pooled)
def test_vectors_are_those_of_the_paper(tmp_path, mode):
    "Encoder and pooling against NumPy; the second text makes the first one a padded row."
    weights, texts = bert_weights(depth=2), ["Good food", "a good b c d e f g h"]
    expected = np.stack([pooled[mode](bert_in_numpy(weights, [2, *map(VOCAB.index, text.lower().split()), 3])) for text in texts])
    assert np.abs(SentenceTransformer.from_pretrained(write_bert(tmp_path, weights, depth=2), pooling=mode).encode(texts) - expected).max() < 1e-5

flags = lambda on: {f"pooling_mode_{f}": f == on for f in ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")}

@pytest.mark.parametrize("mode, settings, more", [("mean", {"pooling_mode": "mean"}, []), ("cls", {"pooling_mode": "cls"}, [("2_Normalize", "Normalize")]), ("max", {"pooling_mode": "max"}, []),
    ("mean", flags("mean_tokens"), [("2_Normalize", "Normalize")]), ("cls", flags("cls_token"), []), ("max", flags("max_tokens"), [])])
def test_pooling_is_what_the_settings_say(tmp_path, mode, settings, more):
    model = SentenceTransformer.from_pretrained(pooling(write_bert(tmp_path), settings, *more))
    assert (model.pooling, model.normalize) == (mode, bool(more))

@pytest.mark.parametrize("settings", [{"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, {"pooling_mode": "weightedmean"}, {"pooling_mode_mean_sqrt_len_tokens": True}, {"pooling_mode_mean_tokens": False}])
def test_a_pooling_that_is_not_built_is_refused(tmp_path, settings):
    with pytest.raises(ValueError, match="pooling mode"): SentenceTransformer.from_pretrained(pooling(write_bert(tmp_path), settings))

def old_names(weights): return {"bert." + n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): w for n, w in weights.items()}

@pytest.mark.parametrize("rename", [old_names, lambda w: {f"bert.{n}": v for n, v in w.items()}, lambda w: {**w, "embeddings.position_ids": np.arange(32)[None], "pooler.dense.weight": np.ones((8, 8), "float32")}],
    ids=["gamma and beta", "bert.", "parts that are not used"])
def test_other_spellings_of_the_weights(tiny, tmp_path, rename):
    same = SentenceTransformer.from_pretrained(write_bert(tmp_path, rename(bert_weights())))
    assert np.array_equal(tiny.encode("good food"), same.encode("good food"))

def test_the_settings_of_length_and_case(tmp_path):
    tokens = lambda **kwargs: SentenceTransformer.from_pretrained(tmp_path, **kwargs).tokenize(["GOOD "*99])[0]
    write_bert(tmp_path)
    (tmp_path/"tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": false}')
    good = VOCAB.index("good")
    assert tokens(max_seq_length=999) == [2, *[1]*30, 3] # the encoder has 32 positions
    (tmp_path/"sentence_bert_config.json").write_text('{"max_seq_length": 8, "do_lower_case": true}')
    assert tokens() == [2, *[good]*6, 3] and tokens(max_seq_length=5) == [2, *[good]*3, 3]

def edit_json(file, **changes): file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
def edit_weights(folder, drop=None, **more): save_file({n: w for n, w in {**load_file(folder/"model.safetensors"), **more}.items() if n != drop}, folder/"model.safetensors")

@pytest.mark.parametrize("damage, error, said", [
    (lambda f: (f/"vocab.txt").unlink(), FileNotFoundError, "no tokeniser"), (lambda f: (f/"config.json").unlink(), FileNotFoundError, r"no config\.json"),
    (lambda f: (f/"model.safetensors").unlink(), FileNotFoundError, r"no model\.safetensors"), (lambda f: (f/"config.json").write_text('{"model_'), ValueError, r"config\.json"),
    (lambda f: edit_json(f/"config.json", model_type="roberta"), ValueError, "'roberta'"), (lambda f: edit_json(f/"config.json", hidden_act="swish"), ValueError, "'swish'"),
    (lambda f: edit_json(f/"config.json", position_embedding_type="relative_key"), ValueError, "'relative_key'"), (lambda f: edit_json(f/"config.json", num_attention_heads=3), ValueError, "3 heads"),
    (lambda f: pooling(f, {"pooling_mode": "mean"}, ("2_Dense", "Dense")), ValueError, "'Dense'"),
    (lambda f: (f/"vocab.txt").write_text("\n".join([*VOCAB, "extra", "words"])), ValueError, "61 tokens, the encoder 59"),
    (lambda f: edit_weights(f, drop="encoder.layer.0.output.dense.bias"), ValueError, r"lacks 1 of 21 weights.*layer\.0\.output\.dense\.bias"),
    (lambda f: edit_weights(f, **{"encoder.layer.2.output.dense.bias": np.ones(8)}), ValueError, r"no place for.*layer\.2\.output"),
    (lambda f: edit_weights(f, **{"encoder.layer.0.output.dense.weight": np.ones((16, 8), "float32")}), ValueError, r"output\.dense\.weight' has the shape \(16, 8\); config.json asks for \(8, 16\)"),
    (lambda f: edit_json(f/"config.json", max_position_embeddings=64), ValueError, r"position_embeddings\.weight' has the shape \(32, 8\)")])
def test_a_damaged_checkpoint_is_named(tmp_path, damage, error, said):
    damage(write_bert(tmp_path))
    with pytest.raises(error, match=said): SentenceTransformer.from_pretrained(tmp_path)

# ---- what is saved

def test_saved_and_loaded_is_equal_to_the_bit(tmp_path):
    weights = {**bert_weights(), "pooler.dense.weight": np.ones((8, 8), "float32"), "embeddings.position_ids": np.arange(32)[None]}
    model = SentenceTransformer.from_pretrained(write_bert(tmp_path/"a", weights), pooling="max", normalize=True, max_seq_length=9, do_lower_case=True)
    again = SentenceTransformer.from_pretrained(model.save_pretrained(tmp_path/"b"))
    assert np.array_equal(model.encode(["good", "x "*50]), again.encode(["good", "x "*50]))
    assert (again.pooling, again.normalize, again.max_seq_length, again.do_lower_case) == ("max", True, 9, True)
    saved = load_file(tmp_path/"b"/"model.safetensors")
    assert saved.keys() == weights.keys() and all(np.array_equal(saved[n], w) for n, w in weights.items()) # also what the encoder does not use
    before = files(tmp_path/"b")
    (tmp_path/"b"/"config.json").write_text("{}")
    again.save_pretrained(tmp_path/"b") # over the earlier one, and after encoding: that must not change what is saved
    assert {n for n, content in files(tmp_path/"b").items() if content != before.get(n)} == set() and sorted(os.listdir(tmp_path)) == ["a", "b"]

def test_the_default_encoder_saved_and_loaded(model, tmp_path):
    same = SentenceTransformer.from_pretrained(model.save_pretrained(tmp_path/"new"/"model"))
    assert same.normalize and np.array_equal(model.encode(odd), same.encode(odd))

def test_a_save_that_fails_keeps_the_earlier_checkpoint(tiny_folder, tmp_path, monkeypatch):
    shutil.copytree(tiny_folder, tmp_path/"a")
    model = SentenceTransformer.from_pretrained(tmp_path/"a")
    monkeypatch.setattr(model.tokenizer, "save_pretrained", lambda folder: 1/0)
    with pytest.raises(ZeroDivisionError): model.save_pretrained(tmp_path/"a")
    assert files(tmp_path) == {f"a/{name}": content for name, content in files(tiny_folder).items()}

def test_a_batch_is_filled_with_tokens():
    lengths = [256, 3, 17, 17, 300, 5, 5, 5, 16, 1, 0]
    batches = batches_by_length(lengths, tokens=64)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    for rows, after in zip(batches, [*batches[1:], None]):
        longest = lengths[rows[0]]
        assert len(rows) == 1 or len(rows)*longest <= 64
        assert after is None or (len(rows) + 1)*longest > 64, "there was room for one more"
    assert batches_by_length([]) == []

def test_what_fails_in_a_batch_is_raised(tiny, monkeypatch):
    "Batches are computed in threads; an error there must not leave zeros behind."
    steps = []
    def fail(inputs):
        steps.append(1)
        raise MemoryError("too large")
    monkeypatch.setitem(tiny.__dict__, "forward", fail)
    with pytest.raises(MemoryError, match="too large"): tiny.encode(["good food"]*200, batch_size=1)
    assert len(steps) < 200, "the rest is not computed for nothing"

# ---- precision

def test_bfloat16_gives_nearly_the_same_vectors(model, texts):
    rough = SentenceTransformer.from_pretrained(precision="bfloat16")
    assert {v.dtype for v in rough.weights if "seed" not in v.path} == {"float32"} and rough.encoder.transformer_layers[0].up.compute_dtype == "bfloat16"
    real = [*load_reviews("shipped")[0].text[:200], *texts]
    a, b = model.encode(real, normalize_embeddings=True), rough.encode(real, normalize_embeddings=True)
    assert b.dtype == "float32" and not np.array_equal(a, b) and (a*b).sum(1).mean() >= 0.9999

def test_precision_is_the_models_own(tiny_folder, tmp_path):
    before = keras.config.dtype_policy().name
    rough, plain = (SentenceTransformer.from_pretrained(tiny_folder, precision=p) for p in ("bfloat16", None))
    assert keras.config.dtype_policy().name == before == plain.encoder.transformer_layers[0].up.dtype_policy.name
    for name, saved in (("rough", rough), ("plain", plain)): saved.save_pretrained(tmp_path/name)
    assert files(tmp_path/"rough") == files(tmp_path/"plain")

@pytest.mark.parametrize("precision", ["bf16", "mixed_bfloat16", 16])
def test_an_unknown_precision(tiny_folder, precision):
    with pytest.raises(ValueError, match=f"precision {precision!r} is not known. Known are: float32, bfloat16"): SentenceTransformer.from_pretrained(tiny_folder, precision=precision)
    assert keras.config.dtype_policy().name == "float32"

# ---- what it costs

@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_a_row_of_padding_only_gives_numbers(tiny_folder, policy):
    keras.config.set_dtype_policy(policy)
    try: model = SentenceTransformer.from_pretrained(tiny_folder, normalize=True)
    finally: keras.config.set_dtype_policy("float32")
    encoded = model.encode(["good food", "", "x "*99])
    assert encoded.dtype == "float32" and np.allclose(np.linalg.norm(encoded, axis=1), 1, atol=1e-2)
    for model.pooling in pooled:
        vectors = model({"input_ids": np.array([[2, 5, 3], [0, 0, 0]]), "attention_mask": np.array([[1, 1, 1], [0, 0, 0]])})
        assert np.isfinite(keras.ops.convert_to_numpy(keras.ops.cast(vectors, "float32"))).all(), model.pooling

def test_a_third_shape_of_batch_is_not_traced_anew(tiny_folder, count_calls):
    model, traced = SentenceTransformer.from_pretrained(tiny_folder), count_calls(SentenceTransformer, "pooled")
    for n in (1, 2): model.encode(["good " * n] * n)
    before = len(traced)
    for n in (3, 7, 20): model.encode(["good " * n] * n)
    assert 0 < before == len(traced)

@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_known_shape_is_not_traced_again(tiny_folder, count_calls, precision):
    model, traced = SentenceTransformer.from_pretrained(tiny_folder, precision=precision), count_calls(SentenceTransformer, "pooled")
    first = model.encode(["good food", "a film"])
    before = len(traced)
    assert before > 0 and not np.array_equal(first, model.encode(["bad food", "the film"])) and len(traced) == before

def test_a_model_is_built_in_one_run(tiny_folder, count_calls):
    "Without their empty `build`, Keras would try the layers several times over to learn which weights they make."
    calls = count_calls(SelfAttention, "call")
    model = SentenceTransformer.from_pretrained(tiny_folder)
    assert len(calls) == len(model.encoder.transformer_layers) > 0

def test_encoding_prints_nothing():
    ended = python("import sys\nfrom mtst import SentenceTransformer\nsys.exit(SentenceTransformer.from_pretrained().encode(['good', 'food']).shape != (2, 384))")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")

def test_import_is_instant():
    code = "import sys, mtst; sys.exit(any(m in sys.modules for m in ('tensorflow', 'keras', 'numpy', 'pandas', 'transformers')))"
    def seconds(code):
        start = time.perf_counter()
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0, "import mtst imports more than itself"
        return time.perf_counter() - start
    took = min(seconds(code) for _ in range(5)) - min(seconds("import sys") for _ in range(5))
    print(f"import mtst: {took*1000:.1f} ms")
    assert took < 0.1

peak = """
import gzip, itertools, sys
from mtst import SentenceTransformer
model, lines = SentenceTransformer.from_pretrained(), gzip.open(sys.argv[1], "rt", encoding="utf-8", newline="\\n")
open("/proc/self/clear_refs", "w").write("5") # forget the peak of loading: it would hide that of encoding
rows = len(model.encode((line.rstrip("\\n") for line in itertools.islice(lines, int(sys.argv[2]))), output_file=sys.argv[3]))
print(rows, next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
@pytest.mark.skipif(os.environ.get("MTST_SLOW") != "1", reason="takes minutes: set MTST_SLOW=1")
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_does_not_grow_with_the_texts(data, tmp_path):
    "100,000 vectors alone are 154 MB, more than the 10% allowed."
    peaks = {}
    for n in (1000, 100_000):
        ended = python(peak, data/"books"/"books_100k.txt.gz", n, tmp_path/"a.npy")
        rows, peaks[n] = map(int, ended.stdout.split())
        assert rows == n, ended.stderr
    print({n: f"{kb/1024:.0f} MiB" for n, kb in peaks.items()})
    assert peaks[100_000] < 1.1 * peaks[1000]
