"""What PyTorch and sentence-transformers say: run by test_interop.py in an environment that has them.

`interop_reference.py FOLDER TEXTS OUT.npy [FOLDER TEXTS OUT.npy …]` encodes each file's lines with each model.
`interop_reference.py --make FOLDER VOCAB` writes random BERTs of several shapes, as transformers writes them."""
import shutil, sys
from pathlib import Path
import numpy as np, torch
from sentence_transformers import SentenceTransformer
from transformers import BertConfig, BertForMaskedLM, BertModel, BertTokenizer

torch.set_num_threads(1)

def encode(folder, texts, out):
    lines = Path(texts).read_bytes().decode().split("\n") # some texts hold other ends of line
    np.save(out, SentenceTransformer(folder, device="cpu").encode(lines, batch_size=32, show_progress_bar=False).astype("float32"))

def make(folder, vocab):
    "One subfolder a shape; all weights random, also those that start as zeros and ones."
    shapes = {
        "deep": dict(hidden_size=48, num_hidden_layers=5, num_attention_heads=6, intermediate_size=100),
        "cased": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=64, hidden_act="gelu_new", layer_norm_eps=1e-6),
        "masked_lm": dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128, hidden_act="relu"),
        "sharded": dict(hidden_size=72, num_hidden_layers=3, num_attention_heads=3, intermediate_size=144),
        "half": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)}
    for i, (name, shape) in enumerate(shapes.items()):
        torch.manual_seed(i)
        tokenizer = BertTokenizer(vocab, do_lower_case=name != "cased", model_max_length=64)
        model = (BertForMaskedLM if name == "masked_lm" else BertModel)(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **shape))
        with torch.no_grad():
            for p in model.parameters(): p.add_(torch.randn_like(p) * 0.1)
        (model.half() if name == "half" else model).save_pretrained(folder/name, **({"max_shard_size": "100KB"} if name == "sharded" else {}))
        tokenizer.save_pretrained(folder/name)
    for mode in ("cls", "max"): # as sentence-transformers itself writes a model
        model = SentenceTransformer(str(folder/"deep"), device="cpu")
        model[1].__init__(model[1].embedding_dimension if hasattr(model[1], "embedding_dimension") else model[1].word_embedding_dimension, mode)
        model.save(str(folder/mode))

if __name__ == "__main__":
    if sys.argv[1] == "--make": make(Path(sys.argv[2]), sys.argv[3])
    else:
        for i in range(1, len(sys.argv), 3): encode(*sys.argv[i:i + 3])
