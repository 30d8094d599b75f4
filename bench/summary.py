"What the measurements say: medians, and which bars are met. And how they are kept."
import numpy as np, pandas as pd
from mtst.checkpoint import whole_file

COLUMNS = ["what", "contender", "setting", "round", "value", "unit", "date", "machine", "versions"]

def read(path): return pd.read_csv(path, keep_default_na=False, na_values={"value": [""]}) if path.is_file() else pd.DataFrame(columns=COLUMNS)

def keep(rows, path):
    "Put rows into a file in place of earlier ones of the same experiment and unit, and of those from another machine. The file is whole or absent; gives all its rows."
    old, replaced = read(path), set(zip(rows.what, rows.unit))
    old = old[[(r.what, r.unit) not in replaced and r.machine in set(rows.machine) for r in old.itertuples()]]
    rows = pd.concat([old, rows], ignore_index=True) if len(old) else rows
    with whole_file(path) as part: rows[COLUMNS].to_csv(part, index=False)
    return rows

def medians(rows, what): # of one experiment: a Series over contender, setting and unit
    return rows[rows.what == what].dropna(subset=["value"]).groupby(["contender", "setting", "unit"], sort=False).value.median()

class Medians:
    "`at(what, contender, unit, setting)`: the median over the rounds; that of the best setting, if none is given; NaN where nothing was measured."
    def __init__(self, rows): self.medians = {what: medians(rows, what) for what in rows.what.unique()}
    def at(self, what, contender, unit, setting=None):
        return max((v for (c, s, u), v in self.medians.get(what, pd.Series()).items() if (c, u) == (contender, unit) and setting in (None, s)), default=np.nan)

def asked(m): # m: `Medians` → for each bar: what, the value measured, the relation, the value asked for, and what the processor's limit would give
    rate = lambda contender, what="encode": m.at(what, contender, "sentences/s")
    train = lambda contender: m.at("train", contender, "steps/s")
    start = lambda setting, contender="mtst": m.at("start", contender, "s", setting)
    limit = lambda setting, unit="sentences/s": m.at("limit", "processor", unit, setting)
    per_text = lambda n: m.at("growth", "mtst", "s", n)/int(n.replace(",", ""))
    working = lambda n: m.at("growth", "mtst", "MB, peak", n) - m.at("growth", "mtst", "MB, texts and vectors", n)
    onnx, vino, plain, torch = rate("ONNX Runtime"), rate("OpenVINO bfloat16"), rate("sentence-transformers"), train("PyTorch float32")
    few, many = "10,000", "100,000"
    return [
        ("encoding in float32 ÷ ONNX Runtime at its best", rate("mtst float32")/onnx, "≥", 1.0, limit("float32")/onnx),
        ("encoding in bfloat16 ÷ OpenVINO in bfloat16 at its best", rate("mtst bfloat16")/vino, "≥", 1.0, limit("bfloat16")/vino),
        ("mean cosine of bfloat16 to float32", m.at("encode", "mtst bfloat16", "mean cosine to mtst float32"), "≥", 0.9999, np.inf),
        ("encoding in float32 ÷ sentence-transformers at its defaults", rate("mtst float32")/plain, "≥", 3.0, limit("float32")/plain),
        ("first ten sentences, whole process ÷ sentence-transformers", start("ten sentences, whole process")/start("ten sentences, whole process", "sentence-transformers"), "≤", 1.5, 0),
        ("first ten sentences, loading and call ÷ sentence-transformers", start("ten sentences, loading and call")/start("ten sentences, loading and call", "sentence-transformers"), "≤", 1.5, 0),
        ("training step in float32 ÷ PyTorch", train("mtst float32")/torch, "≥", 2.0, limit("float32", "steps/s")/torch),
        ("training step in bfloat16 ÷ PyTorch in float32", train("mtst bfloat16")/torch, "≥", 3.0, limit("bfloat16", "steps/s")/torch),
        ("`import mtst`, s", start("import mtst"), "<", 0.1, 0), ("`mtst check`, s", start("mtst check"), "<", 6.0, 0), ("`mtst predict` on a sentence, s", start("mtst predict"), "<", 8.0, 0),
        (f"time per text, {many} ÷ {few} texts", per_text(many)/per_text(few), "≤", 1.2, 0),
        (f"memory beside texts and vectors, {many} ÷ {few} texts", working(many)/working(few), "≤", 1.2, 0),
        ("one GPU through JAX, bfloat16 ÷ sentence-transformers in bfloat16", rate("mtst bfloat16", "gpu")/rate("sentence-transformers", "gpu"), "≥", 1.5, np.inf)]

def verdict(measured, relation, wanted, limit):
    if np.isnan(measured): return "not measured"
    if {"≥": measured >= wanted, "≤": measured <= wanted, "<": measured < wanted}[relation]: return "✓ met"
    return "✗ not met, beyond this processor's limit" if relation == "≥" and limit < wanted else "✗ not met"

def bars(rows): # a row for each bar: bar, measured, asked, limit, verdict
    return pd.DataFrame([dict(bar=bar, measured=measured, asked=f"{relation} {wanted:g}", limit=limit if 0 < limit < np.inf else np.nan, verdict=verdict(measured, relation, wanted, limit))
        for bar, measured, relation, wanted, limit in asked(Medians(rows))])

LEAST_COSINE = 0.999
def wrong(rows): # the contenders whose vectors are not those of sentence-transformers, with their lowest cosine
    low = rows[(rows.unit == "lowest cosine") & ~(rows.value >= LEAST_COSINE)]
    return {f"{r.contender}, {r.setting}": r.value for r in low.itertuples()}

def table(rows): # encoding: a row for each contender with its best setting
    m = medians(rows, "encode").unstack("unit").reset_index().sort_values("sentences/s", ascending=False).drop_duplicates("contender")
    base = m.loc[m.contender == "sentence-transformers", "sentences/s"].max()
    return m.assign(**{"÷ sentence-transformers": m["sentences/s"]/base}).set_index("contender")[["setting", "sentences/s", "÷ sentence-transformers", "mean cosine", "lowest cosine"]].rename_axis(columns=None).round({"sentences/s": 0, "÷ sentence-transformers": 2})
