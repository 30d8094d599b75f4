"""One contender of the benchmark, kept alive in a process of its own: `python worker.py` reads a job a line from stdin and writes an answer a line to stdout, both JSON.

The first job is {"do": "load", "contender": "mtst", "folder": …, "threads": 2, …}; then come others that the contender knows, such as {"do": "encode", "texts": FILE, "out": FILE.npy}.
`texts` names a file with a JSON string a line. An answer has the seconds (those that the job gives, if it times itself), the peak of resident memory and what texts and vectors take of it in MB; or only the error."""
import functools, json, os, resource, sys, time
from importlib.metadata import version
import numpy as np

LIBRARIES = ["mtst", "keras", "tensorflow", "jax", "torch", "sentence_transformers", "onnxruntime", "openvino", "keras_hub", "transformers"]

def tokenizer(folder):
    from transformers import AutoTokenizer
    known = AutoTokenizer.from_pretrained(folder)
    return lambda texts: known(texts, truncation=True, max_length=256, return_attention_mask=False, return_token_type_ids=False)["input_ids"]

def batches(token_lists, size, dtype):
    "Row numbers, tokens and mask of texts of similar length, longest first."
    order = np.argsort([-len(t) for t in token_lists], kind="stable")
    for start in range(0, len(order), size):
        rows = order[start:start + size]
        tokens = np.zeros((len(rows), len(token_lists[rows[0]])), dtype)
        for i, r in enumerate(rows): tokens[i, :len(token_lists[r])] = token_lists[r]
        yield rows, tokens, (np.arange(tokens.shape[1]) < np.array([[len(token_lists[r])] for r in rows])).astype(dtype)

def normalized(vectors): return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

def encoder(folder, run, dtype="int64"): # run: function of tokens and mask → vectors
    tokenize = tokenizer(folder)
    def encode(texts, batch_size=32):
        vectors = np.zeros((len(texts), 384), "float32")
        for rows, tokens, mask in batches(tokenize(texts), batch_size, dtype): vectors[rows] = run(tokens, mask)
        return normalized(vectors)
    return encode

# The contenders: a function that loads one and gives the jobs that it can do, a dict: name → function

def mtst(folder, threads, gpu=False, **settings):
    if gpu: __import__("jax").devices("gpu") # raises without
    from mtst import SentenceTransformer
    from mtst.sentence_transformer import ops
    model = SentenceTransformer.from_pretrained(folder, **settings)
    return {"encode": lambda texts, **options: model.encode(texts, show_progress_bar=False, **options), "lengths": lambda texts: [len(t) for t in model.tokenize(texts)],
        "matmul": multiplication(lambda shape, dtype: ops.cast(np.random.normal(size=shape), dtype))}

def mtst_training(folder, threads, **settings):
    from mtst import MultiTaskSentenceTransformer, Task, freeze, load_reviews
    from keras.callbacks import LambdaCallback
    from mtst.data import DOMAINS, SENTIMENTS
    from mtst.multitask import adamw
    model = MultiTaskSentenceTransformer.from_pretrained(folder, tasks=[Task("domain", DOMAINS), Task("sentiment", SENTIMENTS)], **settings)
    model.compile(adamw(5e-5))
    def steps(n):
        tokens, y = training_batch(32*n)
        clock = {} # from the first step to the last: tidying up after `fit` takes TensorFlow up to ten seconds, whatever the number of steps
        timer = LambdaCallback(on_train_batch_begin=lambda batch, logs: clock.setdefault("began", time.perf_counter()), on_train_batch_end=lambda batch, logs: clock.update(ended=time.perf_counter()))
        model.fit({"input_ids": tokens, "attention_mask": np.ones_like(tokens)}, {"domain": y, "sentiment": y}, batch_size=32, verbose=0, callbacks=[timer])
        return clock["ended"] - clock["began"]
    def frozen(cached, epochs):
        if model.encoder.trainable_weights: freeze(model, "encoder")
        model.fit(load_reviews("shipped")[0], epochs=epochs, cache_features=cached, verbose=0)
    return {"steps": steps, "frozen": frozen, "save": lambda to: model.save_pretrained(to)}

def sentence_transformers(folder, threads, gpu=False):
    import torch
    from sentence_transformers import SentenceTransformer
    torch.set_num_threads(threads)
    model = SentenceTransformer(folder, device="cuda" if gpu else "cpu", model_kwargs={"dtype": torch.bfloat16} if gpu else None)
    return {"encode": lambda texts, **options: model.encode(texts, show_progress_bar=False, **options), "matmul": multiplication(lambda shape, dtype: torch.randn(shape).to(getattr(torch, dtype)))}

def torch_training(folder, threads, bfloat16=False):
    import torch
    from transformers import AutoModel
    torch.set_num_threads(threads)
    bert, heads = AutoModel.from_pretrained(folder).train(), torch.nn.ModuleList([torch.nn.Linear(384, 3), torch.nn.Linear(384, 2)])
    weights, loss = [*bert.parameters(), *heads.parameters()], torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(weights, 5e-5, weight_decay=0.01)
    def step(tokens, y):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            vectors = torch.nn.functional.dropout(bert(tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state.mean(1), 0.1)
            total = sum(loss(head(vectors), y) for head in heads)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
    def steps(n):
        tokens, y = (torch.as_tensor(a.astype("int64")) for a in training_batch(32*n))
        for i in range(0, 32*n, 32): step(tokens[i:i + 32], y[i:i + 32])
    return {"steps": steps}

def onnx_export(folder, threads, to):
    "Write the encoder and the pooling to `to`/plain.onnx, and with ONNX Runtime's fused operators to `to`/fused.onnx."
    import torch
    from onnxruntime.transformers import optimizer
    from transformers import AutoModel
    class Pooled(torch.nn.Module):
        def __init__(self): super().__init__(); self.bert = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
        def forward(self, input_ids, attention_mask):
            tokens, mask = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state, attention_mask.unsqueeze(-1).float()
            return (tokens*mask).sum(1) / mask.sum(1)
    example, axes = torch.ones(2, 8, dtype=torch.long), {0: "batch", 1: "length"}
    torch.onnx.export(Pooled(), (example, example), f"{to}/plain.onnx", input_names=["input_ids", "attention_mask"], output_names=["vectors"],
        dynamic_axes={"input_ids": axes, "attention_mask": axes, "vectors": {0: "batch"}}, opset_version=17, dynamo=False)
    optimizer.optimize_model(f"{to}/plain.onnx", model_type="bert", num_heads=12, hidden_size=384, opt_level=1).save_model_to_file(f"{to}/fused.onnx")
    return {}

def onnx_runtime(folder, threads, exported, graph):
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(f"{exported}/{graph}.onnx", options, providers=["CPUExecutionProvider"])
    return {"encode": encoder(folder, lambda tokens, mask: session.run(None, {"input_ids": tokens, "attention_mask": mask})[0])}

def open_vino(folder, threads, exported, precision, hint):
    import openvino
    core, tokenize = openvino.Core(), tokenizer(folder)
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"): raise RuntimeError("the processor has no bfloat16")
    model = core.compile_model(f"{exported}/plain.onnx", "CPU", {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": hint, "INFERENCE_NUM_THREADS": threads})
    queue = openvino.AsyncInferQueue(model, 2 if hint == "THROUGHPUT" else 1)
    def encode(texts, batch_size):
        vectors = np.zeros((len(texts), 384), "float32")
        def done(request, rows): vectors[rows] = request.get_output_tensor().data
        queue.set_callback(done)
        for rows, tokens, mask in batches(tokenize(texts), batch_size, "int64"): queue.start_async({"input_ids": tokens, "attention_mask": mask}, rows)
        queue.wait_all()
        return normalized(vectors)
    return {"encode": encode}

def keras_hub(folder, threads):
    import keras_hub, tensorflow as tf
    backbone = keras_hub.models.BertBackbone.from_preset(folder)
    @tf.function(input_signature=[tf.TensorSpec((None, None), "int32")]*2)
    def pooled(tokens, mask):
        out, weight = backbone({"token_ids": tokens, "padding_mask": mask, "segment_ids": tf.zeros_like(tokens)})["sequence_output"], tf.cast(mask, "float32")[:, :, None]
        return tf.reduce_sum(out*weight, 1) / tf.reduce_sum(weight, 1)
    return {"encode": encoder(folder, pooled, "int32")}

def multiplication(make): # make: function of shape and dtype → a matrix; two of the sizes in a layer are made once
    matrices = functools.cache(lambda dtype: (make((512, 384), dtype), make((384, 1536), dtype)))
    def matmul(dtype, times):
        a, b = matrices(dtype)
        for _ in range(times): c = a @ b
        float(c[0, 0]) # wait for it
    return matmul

@functools.cache
def training_batch(rows): # random words, and labels
    random = np.random.default_rng(0)
    return random.integers(1000, 20000, (rows, 32)).astype("int32"), random.integers(0, 2, rows).astype("int32")

def megabytes(texts, vectors): return (sum(map(sys.getsizeof, texts)) + sys.getsizeof(texts) + vectors.nbytes)/1e6

def serve(jobs, say):
    work = {"load": lambda contender, **settings: work.update(globals()[contender](**settings))}
    for job in map(json.loads, jobs):
        out, do = job.pop("out", None), work[job.pop("do")]
        if "texts" in job:
            with open(job["texts"]) as file: job["texts"] = [json.loads(line) for line in file]
        try:
            began = time.perf_counter()
            result, answer = do(**job), {"seconds": time.perf_counter() - began, "versions": {name: version(name) for name in LIBRARIES if name in sys.modules}}
        except Exception as e: say({"error": f"{type(e).__name__}: {str(e).strip().splitlines()[0]}" if str(e).strip() else type(e).__name__}); continue
        answer["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(1e6 if sys.platform == "darwin" else 1e3)
        if isinstance(result, np.ndarray): answer["own"] = megabytes(job["texts"], result)
        elif isinstance(result, float): answer["seconds"] = result
        else: answer["result"] = result if isinstance(result, list) else None
        if out: np.save(out, result)
        say(answer)

if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w") # what the libraries print goes to stderr
    os.dup2(2, 1)
    serve(sys.stdin, lambda answer: print(json.dumps(answer), file=answers, flush=True))
