"""What the tests share: the default encoder, small random encoders, a fresh Python, and the real data."""
import json, os, string, subprocess, sys
from pathlib import Path
import numpy as np, pytest
from safetensors.numpy import save_file

seconds = {} # notebook → how long it took to run

def pytest_terminal_summary(terminalreporter):
    "The style figures, where the tests of style ran; with the seconds of the notebooks that ran."
    reports = [r for kind in terminalreporter.stats.values() for r in kind if hasattr(r, "nodeid")]
    if not any("test_style.py" in r.nodeid for r in reports): return
    terminalreporter.section("how the notebooks read")
    try:
        import style_figures
        terminalreporter.write_line(style_figures.table(seconds))
    except Exception as e: terminalreporter.write_line(f"There are no figures: {e}") # pytest's count of the tests has to come

def pytest_runtest_setup(item):
    if item.get_closest_marker("online") and os.environ.get("MTST_ONLINE") != "1": pytest.skip("needs a network: set MTST_ONLINE=1")

@pytest.fixture(scope="session")
def model():
    from mtst import SentenceTransformer
    return SentenceTransformer.from_pretrained()

@pytest.fixture(scope="session")
def data():
    "The folder with the public data sets."
    if not os.environ.get("MTST_DATA"): pytest.skip("needs the public data sets: set MTST_DATA to their folder")
    return Path(os.environ["MTST_DATA"])

def eager(*but):
    "A fixture for every test of a file: nothing is traced, which for a few steps of a tiny model takes longer than the steps; except in tests with one of the words `but` in their names."
    @pytest.fixture(autouse=True)
    def eagerly(request):
        import tensorflow as tf
        tf.config.run_functions_eagerly(not any(word in request.node.name for word in but))
        yield
        tf.config.run_functions_eagerly(False)
    return eagerly

@pytest.fixture
def count_calls(monkeypatch):
    "`count_calls(cls, name)` → a list that grows by one whenever that method runs; a traced function runs its methods only while it is traced."
    def count(cls, name):
        calls, method = [], getattr(cls, name)
        monkeypatch.setattr(cls, name, lambda self, *args, **kwargs: calls.append(1) or method(self, *args, **kwargs))
        return calls
    return count

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "food", *string.ascii_lowercase, *("##" + c for c in string.ascii_lowercase)]

def bert_weights(width=8, depth=1, inner=16, vocab=len(VOCAB), positions=32, seed=0):
    "Random weights under the names of a BERT checkpoint; written out here, so that the package's own table of names is tested too."
    shapes = {f"embeddings.{n}_embeddings.weight": (rows, width) for n, rows in [("word", vocab), ("position", positions), ("token_type", 2)]}
    shapes["embeddings.LayerNorm.weight"] = shapes["embeddings.LayerNorm.bias"] = (width,)
    for i in range(depth):
        for name, out, into in [("attention.self.query", width, width), ("attention.self.key", width, width), ("attention.self.value", width, width),
                ("attention.output.dense", width, width), ("intermediate.dense", inner, width), ("output.dense", width, inner)]:
            shapes |= {f"encoder.layer.{i}.{name}.weight": (out, into), f"encoder.layer.{i}.{name}.bias": (out,)}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"): shapes |= {f"encoder.layer.{i}.{name}.{part}": (width,) for part in ("weight", "bias")}
    random = np.random.default_rng(seed)
    return {name: random.normal(scale=0.5, size=shape).astype("float32") for name, shape in shapes.items()}

def write_bert(folder, weights=None, width=8, depth=1, inner=16, positions=32, vocab=VOCAB, **config):
    "A small random BERT as transformers writes it: config, WordPiece vocabulary, weights. No modules.json."
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "bert", "vocab_size": len(VOCAB), "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": 2,
        "intermediate_size": inner, "max_position_embeddings": positions, **config}
    (folder/"config.json").write_text(json.dumps(config))
    (folder/"vocab.txt").write_text("\n".join(vocab) + "\n")
    (folder/"tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": positions}))
    save_file(bert_weights(width, depth, inner, positions=positions) if weights is None else weights, folder/"model.safetensors")
    return folder

@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    "A small random BERT, to be read only."
    return write_bert(tmp_path_factory.mktemp("tiny")/"bert")

@pytest.fixture(scope="session")
def tiny(tiny_folder):
    from mtst import SentenceTransformer
    return SentenceTransformer.from_pretrained(tiny_folder)

def python(code, *args, **env):
    "Run code in a fresh Python, with none of the settings that mtst or Hugging Face read, except those given."
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MTST_", "HF_", "TF_", "TRANSFORMERS_"))}
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=3600, env={**clean, "NO_PROXY": "127.0.0.1", **{k: str(v) for k, v in env.items()}})

def files(folder):
    "What stands in a folder: name → bytes, hidden files and subfolders included."
    return {str(f.relative_to(folder)): f.read_bytes() for f in Path(folder).rglob("*") if f.is_file()}
