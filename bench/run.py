"""Measure mtst and what a user would pick instead, in alternation: `make bench`, or `python bench/run.py --only encode --rounds 3`.

Each contender has a process of its own (worker.py) and the same number of threads; the others wait meanwhile. Everything is done once untimed, then `--rounds` times in turn.
The rows go to nbs/results/speed.csv, which bars are met to nbs/results/speed_bars.csv; the page nbs/speed.ipynb shows both."""
import argparse, datetime, gzip, itertools, json, os, platform, subprocess, sys, tempfile, time
from functools import cache, cached_property
from pathlib import Path
import numpy as np, pandas as pd
import summary

root = Path(__file__).resolve().parent.parent
ENCODERS = { # contender → its worker, settings to try, batch sizes to try
    "mtst float32": ("mtst", [{}], [None]), "mtst bfloat16": ("mtst", [{"precision": "bfloat16"}], [None]), "sentence-transformers": ("sentence_transformers", [{}], [None]),
    "ONNX Runtime": ("onnx_runtime", [{"graph": "plain"}, {"graph": "fused"}], [16, 32, 64]), "KerasHub": ("keras_hub", [{}], [32]),
    **{f"OpenVINO{name}": ("open_vino", [{"precision": p, "hint": hint} for hint in ("LATENCY", "THROUGHPUT")], [16, 32, 64]) for name, p in (("", "f32"), (" bfloat16", "bf16"))}}
TRAINERS = {"mtst float32": ("mtst_training", {}), "mtst bfloat16": ("mtst_training", {"precision": "bfloat16"}),
    "PyTorch float32": ("torch_training", {}), "PyTorch bfloat16": ("torch_training", {"bfloat16": True})}

# The machine and the texts

def cores(): return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

def machine(): # in a line: the processor's name, its cores, and what it can do that matters here
    about = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in about.splitlines())}
    flags = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in said.get("flags", "").split()]
    return ", ".join([said.get("model name") or platform.processor() or platform.machine(), f"{cores()} cores", *flags])

@cache
def labelled():
    from mtst import load_reviews
    return load_reviews()[0]

def reviews(n): # n texts, and where they are from
    table = labelled()
    return list(itertools.islice(itertools.cycle(table.text), n)), table.attrs["source"] + (", repeated" if n > len(table) else "")

def sentences(n): # n longer ones, from books if they are at hand
    path = Path(os.environ.get("MTST_DATA", ""))/"books"/"books_100k.txt.gz"
    if not path.is_file(): return reviews(n)
    with gzip.open(path, "rt", encoding="utf-8") as file: return [line.rstrip("\n") for line in itertools.islice(file, n)], "books"

def texts_of(length, n, folder): # n texts of just so many tokens: words of the reviews that are one token each
    known = json.loads((folder/"tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    words = itertools.cycle([w for w in " ".join(reviews(2000)[0]).lower().split() if w.isalpha() and w in known])
    return [" ".join(itertools.islice(words, length - 2)) for _ in range(n)] # and the two at the ends

def products(lengths, config): # floating-point operations of the encoder's matrix products on texts of these lengths
    n, width, inner = np.asarray(lengths, float), config["hidden_size"], config["intermediate_size"]
    return config["num_hidden_layers"]*(n.sum()*(8*width*width + 4*width*inner) + 4*width*(n**2).sum())

# The contenders

class NotMeasured(Exception): "What a contender can't do here, and why."

class Worker:
    "A contender's process: `ask(do, …)` sends a job and waits for the answer."
    def __init__(self, python, contender, folder, log, **settings):
        threads, gpu = cores(), settings.get("gpu", False)
        said = {"TF_NUM_INTRAOP_THREADS": threads, "OMP_NUM_THREADS": threads, "TF_CPP_MIN_LOG_LEVEL": 3, "HF_HUB_OFFLINE": 1, "KERAS_BACKEND": "jax" if gpu else "tensorflow"}
        if not gpu: said["CUDA_VISIBLE_DEVICES"] = ""
        self.process = subprocess.Popen([python, Path(__file__).with_name("worker.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | {k: str(v) for k, v in said.items()})
        try: self.loaded = self.ask("load", contender=contender, folder=str(folder), threads=threads, **settings)["seconds"]
        except NotMeasured: self.close(); raise

    def ask(self, do, **job):
        try: print(json.dumps({"do": do, **job}), file=self.process.stdin, flush=True)
        except BrokenPipeError: pass
        answer = json.loads(self.process.stdout.readline() or '{"error": "its process ended"}')
        if "error" in answer: raise NotMeasured(answer["error"])
        self.versions = ", ".join(f"{name} {v}" for name, v in answer["versions"].items())
        return answer

    def close(self):
        try: self.process.stdin.close()
        except BrokenPipeError: pass
        self.process.wait(60)

class Bench:
    def __init__(self, temp, peers, texts=2000, rounds=5, steps=10):
        from mtst import find_checkpoint
        self.temp, self.peers, self.texts, self.rounds, self.steps, self.folder = Path(temp), peers, texts, rounds, steps, find_checkpoint()
        self.rows, self.workers, self.failed, self.log = [], {}, {}, open(self.temp/"log", "w")
        self.always = dict(date=datetime.date.today().isoformat(), machine=machine())
        self.config = json.loads((self.folder/"config.json").read_text())

    def row(self, what, contender, setting, unit, value, round=1, versions=""):
        self.rows.append(dict(what=what, contender=contender, setting=setting, round=round, value=value, unit=unit, versions=versions) | self.always)

    def medians(self, what): return summary.medians(pd.DataFrame(self.rows, columns=summary.COLUMNS), what)

    def start(self, kind, **settings): # a new worker
        python = sys.executable if kind.startswith("mtst") else self.peers
        if not Path(python).is_file(): raise NotMeasured(f"there is no {python}")
        return Worker(python, kind, self.folder, self.log, **settings)

    def worker(self, kind, **settings): # one that stays; what failed once is not tried again
        if (key := json.dumps([kind, settings])) in self.failed: raise self.failed[key]
        try:
            if key not in self.workers: self.workers[key] = self.start(kind, **settings)
        except NotMeasured as e: self.failed[key] = e; raise
        return self.workers[key]

    def close(self):
        while self.workers: self.workers.popitem()[1].close()

    def alternate(self, jobs, rounds=None):
        "Do jobs in turn: a dict, (what, contender, setting, unit) → function that gives a value and versions. The first time is not counted. What can't be done gets a row without a value."
        rounds = rounds or self.rounds
        for round in range(rounds + 1):
            for key, job in list(jobs.items()):
                time.sleep(0.3) # until the threads of the one before sleep
                try: value, versions = job()
                except NotMeasured as e:
                    print(f"not measured: {', '.join(filter(None, key[:3]))}: {e}", flush=True)
                    self.row(*key, np.nan, versions=str(e))
                    del jobs[key]
                else: round and self.row(*key, value, round, versions)
            if round and jobs: print(f"{next(iter(jobs))[0]} {round}/{rounds}: " + " · ".join(f"{r['contender']} {r['setting']} {r['value']:.4g}".replace("  ", " ") for r in self.rows[-len(jobs):]), flush=True)

    @cached_property
    def exported(self): # the folder with the ONNX files
        self.start("onnx_export", to=str(self.temp)).close()
        return str(self.temp)

    def write(self, texts): # to a file, for the workers
        path = self.temp/f"{len(os.listdir(self.temp))}.texts"
        path.write_text("".join(json.dumps(t) + "\n" for t in texts))
        return str(path)

    def encoding(self, contender, settings, texts, out=None, **options): # a job, in sentences per second
        kind, file = ENCODERS[contender][0], self.write(texts)
        def job():
            worker = self.worker(kind, **settings, **({"exported": self.exported} if kind in ("onnx_runtime", "open_vino") else {}))
            return len(texts)/worker.ask("encode", texts=file, out=out, **options)["seconds"], worker.versions
        return job

    def multiplication(self, times=200): # jobs: how fast the processor multiplies matrices of a layer's sizes
        def job(kind, dtype): return lambda: (times*2*512*384*1536/1e9/(w := self.worker(kind)).ask("matmul", dtype=dtype, times=times)["seconds"], w.versions)
        return {("matmul", name, dtype, "GFLOP/s"): job(kind, dtype) for name, kind in (("TensorFlow", "mtst"), ("PyTorch", "sentence_transformers")) for dtype in ("float32", "bfloat16")}

    def limit(self, operations, unit): # what it allows: `operations` of matrix products for one of `unit`
        peaks = self.medians("matmul")
        for dtype in ("float32", "bfloat16"): self.row("limit", "processor", dtype, unit, max([v for (_, d, _), v in peaks.items() if d == dtype], default=np.nan)*1e9/operations)

    @cached_property
    def finalists(self): # contender → its two best settings, best first: setting in words → settings of the worker, options of `encode`
        sample, tried = reviews(self.texts)[0][:max(8, self.texts//5)], {}
        for contender, (_, settings, sizes) in ENCODERS.items():
            words = lambda s, b: ", ".join([*(s[k].lower() for k in s if k != "precision"), *([f"batches of {b}"] if b else [])])
            tried[contender] = {words(s, b): (s, {"batch_size": b} if b else {}) for s in settings for b in sizes}
        self.alternate({("settings", c, w, "sentences/s"): self.encoding(c, s, sample, **o) for c, found in tried.items() if len(found) > 1 for w, (s, o) in found.items()}, min(2, self.rounds))
        rates = self.medians("settings")
        return {c: dict(sorted(found.items(), key=lambda pair: -rates.get((c, pair[0], "sentences/s"), 0))[:2]) for c, found in tried.items()}

    def best(self, contender): return next(iter(self.finalists[contender].values()))

    def cosines(self, what, vectors, reference, name): # vectors: (contender, setting) → file
        unit = lambda path: (v := np.load(path)) / np.linalg.norm(v, axis=1, keepdims=True)
        for key, path in vectors.items():
            if not Path(path).is_file() or not Path(reference).is_file(): continue
            cosine = (unit(path)*unit(reference)).sum(1)
            for word, value in (("mean", cosine.mean()), ("lowest", cosine.min())): self.row(what, *key, f"{word} cosine{name}", value)

# The experiments

def encode(b):
    "Sentences per second, the processor's limit, and whether the vectors are the right ones."
    texts, source = reviews(b.texts)
    found = {(c, words): setting for c, settings in b.finalists.items() for words, setting in settings.items()}
    files = {key: str(b.temp/f"vectors_{i}.npy") for i, key in enumerate(found)}
    b.alternate({("encode", *key, "sentences/s"): b.encoding(key[0], settings, texts, files[key], **options) for key, (settings, options) in found.items()} | b.multiplication())
    b.cosines("encode", files, files["sentence-transformers", ""], "")
    b.cosines("encode", {("mtst bfloat16", ""): files["mtst bfloat16", ""]}, files["mtst float32", ""], " to mtst float32")
    lengths = b.worker("mtst").ask("lengths", texts=b.write(texts))["result"]
    b.row("texts", source, "encode", "tokens a text", np.mean(lengths))
    b.limit(products(lengths, b.config)/len(texts), "sentences/s")

def length(b, tokens=8000):
    "Sentences per second by length, with about 8,000 tokens at a time."
    for n in (4, 8, 16, 32, 64, 128):
        texts = texts_of(n, max(16, int(tokens*min(1, b.texts/2000))//n), b.folder)
        b.alternate({("length", c, f"{n} tokens", "sentences/s"): b.encoding(c, settings, texts, **options) for c in ENCODERS if c != "KerasHub" for settings, options in [b.best(c)]}, min(3, b.rounds))

def batch(b):
    "Sentences per second by batch size."
    texts = reviews(b.texts)[0][:max(8, b.texts//4)]
    for n in (8, 16, 32, 64, 128):
        b.alternate({("batch", c, f"batches of {n}", "sentences/s"): b.encoding(c, b.best(c)[0], texts, batch_size=n) for c in ("mtst float32", "mtst bfloat16", "ONNX Runtime")}, min(3, b.rounds))

def growth(b):
    "Seconds and memory for 1,000 to 100,000 sentences, each time in a fresh process."
    def measured(n):
        worker = b.start("mtst")
        texts, source = sentences(n)
        worker.ask("encode", texts=b.write(texts[:100]))
        answer = worker.ask("encode", texts=b.write(texts))
        worker.close()
        for unit, value in (("s", answer["seconds"]), ("MB, peak", answer["peak"]), ("MB, texts and vectors", answer["own"])): b.row("growth", "mtst", f"{n:,}", unit, value, versions=worker.versions)
        print(f"growth: {n:,} sentences ({source}) in {answer['seconds']:.0f} s, {answer['peak']:.0f} MB", flush=True)
        return source
    sizes = [max(10, n*b.texts//2000) for n in (1000, 10_000, 100_000)] if b.texts < 2000 else [1000, 10_000, 100_000]
    for n in [*sizes, *sizes[1::-1]]: source = measured(n)
    b.row("texts", source, "growth", "texts", sizes[-1])

def train(b):
    "Steps per second, all weights trained on two tasks, batches of 32 texts of 32 tokens; and the processor's limit, backwards being twice the work of forwards."
    def steps(kind, settings): return lambda: (b.steps/(w := b.worker(kind, **settings)).ask("steps", n=b.steps)["seconds"], w.versions)
    b.alternate({("train", c, "", "steps/s"): steps(*about) for c, about in TRAINERS.items()} | b.multiplication())
    b.limit(3*products([32]*32, b.config), "steps/s")

def frozen(b):
    "Seconds to train two heads on a frozen encoder, five times over the shipped reviews."
    def fit(cached): return lambda: ((w := b.worker("mtst_training")).ask("frozen", cached=cached, epochs=5)["seconds"], w.versions)
    b.alternate({("frozen", "mtst", setting, "s"): fit(cached) for setting, cached in (("vectors kept", True), ("encoder run each time", False))}, min(3, b.rounds))

def start(b):
    "Seconds from nothing: an import, the command, and ten sentences."
    model, ten, seen = b.temp/"model", b.write(reviews(10)[0]), {}
    trained = b.start("mtst_training")
    trained.ask("steps", n=3), trained.ask("save", to=str(model)), trained.close()
    def command(*arguments):
        began = time.perf_counter()
        done = subprocess.run([Path(sys.executable).with_name("mtst"), *arguments], capture_output=True, text=True)
        if done.returncode: raise NotMeasured(done.stderr.strip().splitlines()[-1])
        return time.perf_counter() - began, ""
    def imported(): return float(subprocess.run([sys.executable, "-c", "import time; t = time.perf_counter(); import mtst; print(time.perf_counter() - t)"], capture_output=True, text=True, check=True).stdout), ""
    def first(kind):
        began = time.perf_counter()
        worker = b.start(kind)
        call = worker.ask("encode", texts=ten)["seconds"]
        worker.close()
        seen[kind] = {"ten sentences, loading and call": (worker.loaded + call, worker.versions), "ten sentences, call": (call, worker.versions)}
        return time.perf_counter() - began, worker.versions
    jobs = {("start", "mtst", "import mtst", "s"): imported, ("start", "mtst", "mtst check", "s"): lambda: command("check"), ("start", "mtst", "mtst predict", "s"): lambda: command("predict", str(model), "A good film.")}
    for name, kind in (("mtst", "mtst"), ("sentence-transformers", "sentence_transformers")):
        jobs["start", name, "ten sentences, whole process", "s"] = lambda kind=kind: first(kind)
        for setting in ("ten sentences, loading and call", "ten sentences, call"): jobs["start", name, setting, "s"] = lambda kind=kind, setting=setting: seen[kind][setting]
    b.alternate(jobs)

def gpu(b):
    "Sentences per second on one GPU in bfloat16: mtst through JAX, sentence-transformers through PyTorch."
    contenders = {"mtst bfloat16": ("mtst", {"precision": "bfloat16", "gpu": True}), "sentence-transformers": ("sentence_transformers", {"gpu": True})}
    texts, jobs = b.write(reviews(b.texts)[0]), {}
    try: workers = {c: b.worker(kind, **settings) for c, (kind, settings) in contenders.items()}
    except NotMeasured as e: print(f"not measured: gpu: {e}"); return b.row("gpu", "mtst bfloat16", "", "sentences/s", np.nan, versions=str(e))
    def job(worker, size, out): return lambda: (b.texts/worker.ask("encode", texts=texts, batch_size=size, out=out)["seconds"], worker.versions)
    files = {(c, f"batches of {n}"): str(b.temp/f"gpu_{c}_{n}.npy") for c in contenders for n in (32, 128, 512)}
    b.alternate({("gpu", *key, "sentences/s"): job(workers[key[0]], int(key[1].split()[-1]), out) for key, out in files.items()})
    b.cosines("gpu", files, files["sentence-transformers", "batches of 32"], "")

EXPERIMENTS = {f.__name__: f for f in (encode, length, batch, train, frozen, start, growth, gpu)}

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), help="what to measure (default: everything)")
    parser.add_argument("--peers", default=root/".venv-bench"/"bin"/"python", help="the Python that has the other contenders")
    parser.add_argument("--results", type=Path, default=root/"nbs"/"results", help="folder for the results")
    for name, default in (("texts", 2000), ("rounds", 5), ("steps", 10)): parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temp:
        b = Bench(temp, args.peers, args.texts, args.rounds, args.steps)
        for name in args.only:
            b.rows = []
            if name in ("train", "start", "growth"): b.close()
            print(f"\n{name}: {EXPERIMENTS[name].__doc__}", flush=True)
            EXPERIMENTS[name](b)
            rows = summary.keep(pd.DataFrame(b.rows), args.results/"speed.csv")
        b.close()
    bars, wrong = summary.bars(rows), summary.wrong(rows)
    with summary.whole_file(args.results/"speed_bars.csv") as part: bars.to_csv(part, index=False)
    print(f"\n{b.always['machine']}\n")
    for table in (summary.table(rows), bars.set_index("bar")): print(table.to_string(float_format="{:.6g}".format, na_rep="", line_width=200), "\n")
    for contender, cosine in wrong.items(): print(f"WRONG VECTORS: {contender}: the lowest cosine to sentence-transformers is {cosine:.5f}")
    sys.exit(bool(wrong))

if __name__ == "__main__": main()
