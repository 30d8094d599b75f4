"""Several tasks on one encoder: labels, batches, losses, training, saving; by hand in NumPy wherever a number can be had by hand."""
import importlib.util, json, os, runpy, signal, subprocess, sys
from pathlib import Path
import keras, numpy as np, pandas as pd, pytest
from safetensors.numpy import load_file, save_file
from scipy.special import expit, log_softmax
from conftest import eager, python, write_bert
from mtst import MultiTaskSentenceTransformer, SentenceTransformer, Task
from mtst.multitask import AdamW, Batches, ConflictMeter, WarmupLinear, adamw, gradient_conflict, project_conflicts, sampling_shares, task_gradients

def two_tasks(): return [Task("mood", ["bad", "good"]), Task("topic", ["food", "film", "shop"])]
def four_tasks(): return [Task("topic", ["food", "film", "shop"]), Task("mood", ["bad", "good"], activation="sigmoid"), Task("tags", ["x", "y"], "multilabel"), Task("stars", kind="regression")]

texts = ["good food", "a b c", "food d e", "e f g h i", "good", "bad film a b c d", "a film", "no food", "x y z x y z x", "good e", "q r", "s t u"]
table = pd.DataFrame({"text": texts, "mood": ["good", "bad", None, "bad", "good", "bad", None, "bad", "good", "good", None, None],
    "topic": ["food", None, "food", "shop", None, "film", "film", "food", None, "shop", "film", None]})
four = pd.DataFrame({"text": texts[:6], "topic": ["food", None, "shop", "", "film", "film"], "mood": [None, "bad", None, "good", "bad", pd.NA],
    "tags": ["x|y", None, "x", "y", [], None], "stars": [1.5, 2, float("nan"), -1, None, 7]})

@pytest.fixture(scope="module")
def still(tmp_path_factory):
    "A tiny BERT without dropout: what it computes in training can be computed again."
    return write_bert(tmp_path_factory.mktemp("still")/"bert", hidden_dropout_prob=0, attention_probs_dropout_prob=0)

def make(folder, tasks=None, seed=0, frozen=False, compiled_with=None, **kwargs):
    keras.utils.set_random_seed(seed)
    model = MultiTaskSentenceTransformer(SentenceTransformer.from_pretrained(folder), tasks or two_tasks(), **{"dropout": 0, **kwargs})
    model.sentence_transformer.trainable = not frozen
    model.compile(compiled_with or keras.optimizers.SGD(0.1))
    return model

def same_weights(a, b, tolerance=0):
    a, b = (m if isinstance(m, list) else m.get_weights() for m in (a, b))
    return len(a) == len(b) and all(np.abs(x - y).max() <= tolerance for x, y in zip(a, b))

def values(variables): return [keras.ops.convert_to_numpy(v).copy() for v in variables]
def encoder_weights(model): return values(v for v in model.encoder.variables if "seed" not in v.path)
def head_weights(model): return [w for head in model.heads.values() for w in head.get_weights()]
def in_order(model, rows, size=99): return model.batches(rows, batch_size=size, shuffle=False)
def total_loss(model, batch): return float(model.compute_loss(batch[0], batch[1], model(batch[0], training=False), batch[2]))

eagerly = eager("restarted", "traced") # traced training is in the tests that restart one or count

@pytest.fixture(scope="module")
def model(still):
    "Four tasks of four kinds, to be read only."
    return make(still, four_tasks())

def test_training_is_not_traced_again_for_other_lengths(still, count_calls):
    "TensorFlow traces a step for its first shape and once more for any; then no length and no batch size costs a trace."
    model, traced = make(still), count_calls(MultiTaskSentenceTransformer, "call")
    lengths = lambda *some: pd.DataFrame({"text": ["good " * n for n in some], "mood": "good", "topic": "food"})
    model.fit(lengths(1, 1, 5, 5, 9), batch_size=2, by_length=True, verbose=0)
    before = len(traced)
    model.fit(lengths(1, 1, 5, 5, 9), batch_size=2, by_length=True, epochs=2, verbose=0)
    model.fit(lengths(2, 2, 12, 17, 17, 20, 20), batch_size=2, by_length=True, verbose=0)
    assert 0 < before <= 3 and len(traced) == before

# ---- tasks and labels

@pytest.mark.parametrize("settings, said", [(dict(labels=["a", "b"], kind="ranking"), "'ranking' is not known"), (dict(labels=["a"]), "two or more"), (dict(labels=None), "two or more"),
    (dict(labels=[], kind="multilabel"), "label"), (dict(labels=["a", "b", "a"]), "twice"), (dict(labels=[1, "1", 2]), "twice"), (dict(labels=["a", "b", "c"], activation="sigmoid"), "two labels, not 3"),
    (dict(labels=["a", "b"], class_weight={"a": 1, "c": 2}), r"\['c'\]"), (dict(labels=["a", "b"], activation="sigmiod"), "sigmiod")])
def test_settings_that_do_not_fit_are_refused(settings, said):
    with pytest.raises(ValueError, match=f"mood.*{said}"): Task("mood", **settings)

@pytest.mark.parametrize("task, units", [(Task("t", ["a", "b"]), 2), (Task("t", ["a", "b"], activation="sigmoid"), 1), (Task("t", ["a"], "multilabel"), 1), (Task("t", kind="regression"), 1)])
def test_outputs_of_a_head(task, units): assert task.units == units

gone = [None, float("nan"), pd.NA, "", "  ", np.nan]
@pytest.mark.parametrize("task, label, value", [(Task("t", ["a", "b"]), "b", 1), (Task("t", ["a", "b"], activation="sigmoid"), "b", [1]), (Task("t", ["a", "b"], "multilabel"), "b", [0, 1]),
    (Task("t", kind="regression"), 2.5, [2.5]), (Task("t", kind="regression"), "2.5", [2.5])], ids=["softmax", "sigmoid", "multilabel", "regression", "number as text"])
def test_missing_labels_weigh_nothing(task, label, value):
    y, weights = task.encode_labels([label, *gone, label])
    assert weights.dtype == "float32" and weights.tolist() == [1, *[0]*len(gone), 1] and y[0].tolist() == value == y[-1].tolist() and np.isfinite(y).all()

@pytest.mark.parametrize("task, column, said", [(Task("t", ["a", "b"]), ["a", "c", None, "c"], "'c' in rows 2, 4 is not one of a, b"), (Task("t", ["a", "b"]), ["a", "A"], "'A' in row 2"),
    (Task("t", kind="regression"), [1, "many"], "'many' in row 2 is not a number"), (Task("t", kind="regression"), [1, float("inf")], "row 2"),
    (Task("t", ["a", "b"], "multilabel"), ["a|b", "a|c"], r"'a\|c' in row 2"), (Task("t", ["a", "b"], "multilabel"), [["a"], ["a", "c"]], "row 2")])
def test_unknown_labels_are_named_by_row(task, column, said):
    with pytest.raises(ValueError, match=f"'t'.*{said}"): task.encode_labels(column)

@pytest.mark.parametrize("cells", [["x|z", "z | x", "y", "|"], [["x", "z"], ("z", "x"), {"y"}, []], ["x|z", np.array(["x", "z"]), ["y"], []]], ids=["text", "lists", "mixed"])
def test_several_labels_of_a_row(cells):
    y, weights = Task("t", ["x", "y", "z"], "multilabel").encode_labels(cells)
    assert y.tolist() == [[1, 0, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]] and weights.tolist() == [1]*4 # no label at all is an answer too

def test_class_weights_become_weights_of_rows():
    for activation in ("softmax", "sigmoid"):
        assert Task("t", ["a", "b"], activation=activation, class_weight={"a": 3}).encode_labels(["a", "b", None, "a"])[1].tolist() == [3, 1, 0, 3]

@pytest.mark.parametrize("column", [pd.Series(["a", None, "b"], dtype="category"), pd.Series(["a", None, "b"], dtype="string"), pd.Series(["a", None, "b"], index=[7, 7, 3])], ids=["category", "string", "odd index"])
def test_columns_of_any_dtype(column):
    y, weights = Task("t", ["a", "b"]).encode_labels(column)
    assert y.tolist() == [0, 0, 1] and weights.tolist() == [1, 0, 1]

@pytest.mark.parametrize("column", [pd.Series([1, None, 0], dtype="Int64"), pd.Series([1, None, 0]), pd.Series([1, None, 0], dtype=object)], ids=["Int64", "float64", "object"])
def test_whole_numbers_as_labels_with_gaps(column):
    "pandas turns a column of whole numbers into floats as soon as one is missing."
    y, weights = Task("t", [0, 1]).encode_labels(column)
    assert y.tolist() == [1, 0, 0] and weights.tolist() == [1, 0, 1]
    y, weights = Task("t", kind="regression").encode_labels(column)
    assert y.tolist() == [[1], [0], [0]] and weights.tolist() == [1, 0, 1]

def test_labels_and_class_weights_may_be_numbers(): assert Task("t", [0, 1], class_weight={0: 2}).encode_labels([0, 1])[1].tolist() == [2, 1]

def test_labels_may_have_spaces_around_them(): assert Task("t", [" a", "b "]).encode_labels([" a", "b ", "b"])[0].tolist() == [0, 1, 1]

@pytest.mark.parametrize("cell", [["a", "b"], []])
def test_a_list_is_no_class(cell):
    "One of two labels must not be dropped in silence, nor none be taken for the first."
    with pytest.raises(ValueError, match="row 2"): Task("t", ["a", "b"]).encode_labels(["a", cell])

# ---- batches

def words(texts): return [[i]*len(t.split()) for i, t in enumerate(texts)] # token ids tell the row
def rows_of(batches): return [batches[i][0]["input_ids"].max(1).tolist() for i in range(batches.num_batches)]
def every(batches): return sum(rows_of(batches), [])
lengths = np.random.default_rng(0).integers(1, 9, 103)
long_table = pd.DataFrame({"text": ["a " * n for n in lengths], "mood": ["good", None, "bad"]*34 + ["good"], "topic": [None, "food", "film"]*34 + [None]})

@pytest.mark.parametrize("shuffle, by_length", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("size", [1, 7, 8, 200])
def test_every_row_once_an_epoch(shuffle, by_length, size):
    batches = Batches(long_table, two_tasks(), words, batch_size=size, shuffle=shuffle, by_length=by_length)
    sizes = sorted(map(len, rows_of(batches)))
    assert sorted(every(batches)) == list(range(103)) and len(sizes) == -(-103//size) and set(sizes[1:]) <= {size} # the short one is kept
    assert (every(batches) == list(range(103))) == (not shuffle)

def test_labels_stay_with_their_texts():
    batches = Batches(long_table, two_tasks(), words, batch_size=8)
    for i in range(batches.num_batches):
        x, y, weights = batches[i]
        row = x["input_ids"].max(1)
        assert (x["attention_mask"].sum(1) == lengths[row]).all()
        for task in two_tasks():
            assert all(np.array_equal(a[i_], b[r]) for a, b in zip((y[task.name], weights[task.name]), task.encode_labels(long_table[task.name])) for i_, r in enumerate(row))

def test_batches_by_length_have_less_padding():
    def padding(**kwargs):
        batches = Batches(long_table, two_tasks(), words, batch_size=8, **kwargs)
        return sum((batches[i][0]["attention_mask"] == 0).sum() for i in range(batches.num_batches))
    assert padding() < padding(by_length=False) / 3

def test_rows_without_any_label_are_left_out():
    batches = Batches(table, two_tasks(), words, batch_size=5)
    assert sorted(every(batches)) == list(range(11))

def test_the_order_hangs_on_seed_and_epoch_alone():
    new = lambda seed: Batches(long_table, two_tasks(), words, batch_size=8, seed=seed)
    first, same, other = new(1), new(1), new(2)
    assert rows_of(first) == rows_of(same) != rows_of(other)
    before = rows_of(first)
    first.on_epoch_end()
    assert rows_of(first) != before and sorted(every(first)) == list(range(103))
    same.start_epoch(5); same.start_epoch(1)
    assert rows_of(first) == rows_of(same)
    first.start_epoch(0)
    assert rows_of(first) == before

unequal = pd.DataFrame({"text": ["a"]*36, "mood": ["good"]*32 + [None]*4, "topic": [None]*32 + ["food"]*4}) # 32 rows of one task, 4 of the other
@pytest.mark.parametrize("sampling, temperature, share", [("proportional", 2, 32/36), ("equal", 2, 0.5), ("temperature", 2, 32**.5/(32**.5 + 2)), ("temperature", 1, 32/36), ("temperature", 1e9, 0.5)])
def test_sampling_draws_each_group_as_often_as_it_says(sampling, temperature, share):
    assert np.allclose(sampling_shares([32, 4], sampling, temperature), [share, 1 - share])
    counts = np.bincount(every(Batches(unequal, two_tasks(), words, batch_size=5, sampling=sampling, temperature=temperature)), minlength=36)
    assert counts[:32].sum() == round(36*share) and counts[32:].sum() == round(36*(1 - share))
    assert np.ptp(counts[:32]) <= 1 >= np.ptp(counts[32:]) # within a group each row equally often

def test_unknown_sampling():
    with pytest.raises(ValueError, match="'random' is not known"): sampling_shares([1], "random")

@pytest.mark.parametrize("wrong, said", [(table.drop(columns="mood"), "no column 'mood'"), (table.assign(text=["good", ""]*6), "empty text.*row"), (table.head(0), "no rows"),
    (table.assign(mood=None), "No row .* 'mood'"), (table.assign(topic=["food", "sea"]*6), "'sea' in rows 2, 4"), ([table.drop(columns="topic")], "topic")])
def test_tables_that_can_not_be_learnt_from(still, wrong, said):
    with pytest.raises(ValueError, match=said): make(still).fit(wrong)

@pytest.mark.parametrize("tasks", [[], [Task("a", ["x", "y"]), Task("a", ["p", "q"])]])
def test_a_model_needs_tasks_with_different_names(tiny, tasks):
    with pytest.raises(ValueError, match="different names"): MultiTaskSentenceTransformer(tiny, tasks)

def test_unknown_balance(tiny):
    with pytest.raises(ValueError, match="'gradnorm' is not known"): MultiTaskSentenceTransformer(tiny, two_tasks(), balance="gradnorm")

# ---- losses and metrics over the rows that have a label

def losses_by_hand(model, rows):
    "Of each task, the mean over its labelled rows; 0 if there are none."
    found, losses = model.logits(rows.text.tolist()), {}
    for name, task in model.tasks.items():
        logits, (y, weights) = found[name].astype("float64"), task.encode_labels(rows[name])
        if task.kind == "regression": each = ((logits - y)**2).mean(1)
        elif task.sigmoid or task.kind == "multilabel": each = -(y*np.log(expit(logits)) + (1 - y)*np.log(expit(-logits))).mean(1)
        else: each = -log_softmax(logits, -1)[np.arange(len(y)), y]
        losses[name] = (each*weights).sum() / max(weights.sum(), 1e-9)
    return losses

def test_the_loss_is_the_mean_over_labelled_rows(still):
    model = make(still, four_tasks())
    expected = losses_by_hand(model, four)
    found = {k: v[0] for k, v in model.fit(four, batch_size=99).history.items()} # one step: the loss before it
    assert {n: found[f"{n}_loss"] for n in expected} == pytest.approx(expected, abs=1e-5) and found["loss"] == pytest.approx(sum(expected.values()), abs=1e-5)

@pytest.mark.parametrize("name", ["topic", "mood", "tags", "stars"])
def test_a_batch_without_a_label_of_a_task(model, name):
    rows = four.head(5)
    batches = in_order(model, pd.concat([rows.assign(**{name: None}), four]), 5)
    assert batches[0][2][name].sum() == 0
    expected = losses_by_hand(model, rows.assign(**{name: None}))
    assert expected[name] == 0 and total_loss(model, batches[0]) == pytest.approx(sum(expected.values()), abs=1e-5)
    gradients = task_gradients(model, batches[0])
    assert all((g == 0).all() for g in gradients[name]) and all(np.isfinite(g).all() for gs in gradients.values() for g in gs)

def test_weights_of_classes_and_tasks(still):
    model = make(still, [Task("mood", ["bad", "good"], class_weight={"good": 3}, loss_weight=2), Task("topic", ["food", "film", "shop"], loss_weight=0.5)])
    expected = losses_by_hand(model, table)
    assert total_loss(model, in_order(model, table)[0]) == pytest.approx(2*expected["mood"] + expected["topic"]/2, abs=1e-5)

def test_metrics_count_labelled_rows_only(model):
    found, logits = model.evaluate(in_order(model, four, 2), return_dict=True, verbose=0), model.logits(four.text.tolist())
    labelled = {n: (t.encode_labels(four[n])[0][w], logits[n][w]) for n, t in model.tasks.items() for w in [t.encode_labels(four[n])[1] > 0]}
    expected = {"topic_accuracy": (labelled["topic"][0] == labelled["topic"][1].argmax(1)).mean(), "stars_mean_absolute_error": np.abs(np.subtract(*labelled["stars"])).mean(),
        **{f"{n}_accuracy": (labelled[n][0] == (labelled[n][1] > 0)).mean() for n in ("mood", "tags")}}
    expected["mean_accuracy"] = np.mean([v for k, v in expected.items() if "accuracy" in k])
    assert {k: float(found[k]) for k in expected} == pytest.approx(expected, abs=1e-5)

def test_a_single_task_has_a_mean_accuracy_too(still):
    "A callback that watches it works for any number of tasks."
    found = make(still, two_tasks()[:1]).fit(table, validation_data=table).history
    assert {"mean_accuracy", "val_mean_accuracy"} <= set(found)

def test_softmax_over_two_is_a_sigmoid(still):
    soft, sig = (make(still, [Task("mood", ["bad", "good"], activation=a)]) for a in ("softmax", "sigmoid"))
    kernel, bias = soft.heads["mood"].get_weights()
    sig.heads["mood"].set_weights([kernel[:, 1:] - kernel[:, :1], bias[1:] - bias[:1]])
    pd.testing.assert_frame_equal(soft.predict(texts), sig.predict(texts), atol=1e-6, rtol=0)
    assert total_loss(soft, in_order(soft, table)[0]) == pytest.approx(total_loss(sig, in_order(sig, table)[0]), abs=1e-6)
    for a, b in zip(*(task_gradients(m, in_order(m, table)[0])["mood"] for m in (soft, sig))): assert np.allclose(a, b, atol=1e-6)

def test_own_losses_metrics_and_weights(still):
    model = make(still, four_tasks())
    by_hand = losses_by_hand(model, four)
    y, weights = model.tasks["stars"].encode_labels(four.stars)
    off = np.abs(model.logits(four.text.tolist())["stars"] - y)[weights > 0].mean()
    model.compile(keras.optimizers.SGD(0.1), loss={"stars": keras.losses.MeanAbsoluteError(reduction="mean_with_sample_weight")}, loss_weights={"topic": 0},
        weighted_metrics={"topic": [keras.metrics.SparseTopKCategoricalAccuracy(3, name="top3")]})
    found = {k: v[0] for k, v in model.fit(four).history.items()}
    assert found["loss"] == pytest.approx(by_hand["mood"] + by_hand["tags"] + off, abs=1e-5) and found["topic_top3"] == 1 and "topic_accuracy" not in found and "mood_accuracy" in found

# ---- training

def test_tables_and_batches_train_alike(tiny_folder):
    "With dropout: two trainings of one seed are equal to the bit; the tables are disjoint in their columns."
    def train(rows):
        model = make(tiny_folder, dropout=0.3)
        if callable(rows): model.fit(rows(model), epochs=2)
        else: model.fit(rows, batch_size=8, epochs=2, seed=1)
        return model
    parts = [table[["text", "mood"]].dropna(), table[["text", "topic"]].dropna()]
    whole = pd.concat(parts, ignore_index=True)
    expected = train(whole)
    assert same_weights(expected, train(parts)) and same_weights(expected, train(lambda m: m.batches(whole, batch_size=8, seed=1)))
    assert not same_weights(expected, make(tiny_folder))

def test_validation_does_not_disturb_training(tiny_folder):
    trained = [make(tiny_folder, dropout=0.3) for _ in range(2)]
    for model, validation in zip(trained, (None, [table.head(7), table.tail(5)])): model.fit(table, batch_size=4, epochs=2, validation_data=validation)
    assert same_weights(*trained)

def test_long_texts_only(still):
    "As long as the encoder can take, in every batch."
    model = make(still)
    assert np.isfinite(model.fit(table.assign(text=["good " * 99]*12), batch_size=4).history["loss"]).all()

def test_the_5000th_epoch(still): assert np.isfinite(make(still, frozen=True, dropout=0.1).fit(table, initial_epoch=5000, epochs=5001).history["loss"]).all()

training = '''
import os, signal, sys
import keras, numpy as np, pandas as pd
from mtst import MultiTaskSentenceTransformer, Task
from mtst.multitask import adamw

class Dies(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None): self.epoch = epoch
    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == (1, 1): os.kill(os.getpid(), signal.SIGKILL)

def train(folder, backup, dies=False):
    keras.utils.set_random_seed(3)
    model = MultiTaskSentenceTransformer.from_pretrained(folder, tasks=[Task("mood", ["bad", "good"]), Task("topic", ["food", "film", "shop"])])
    rows = pd.DataFrame({"text": ["good food", "a b c", "food d e", "bad film a"]*4, "mood": ["good", "bad", None, "bad"]*4, "topic": ["food", None, "shop", "film"]*4})
    model.compile(adamw(1e-2, steps=12))
    model.fit(rows, batch_size=4, epochs=3, callbacks=[keras.callbacks.BackupAndRestore(backup), *([Dies()] if dies else [])])
    return model.get_weights()

if __name__ == "__main__": np.savez(sys.argv[3], *train(*sys.argv[1:3], dies=sys.argv[4] == "dies"))
'''
def test_a_killed_and_restarted_training_ends_like_an_undisturbed_one(tiny_folder, tmp_path):
    (tmp_path/"training.py").write_text(training)
    run = lambda what: subprocess.run([sys.executable, tmp_path/"training.py", tiny_folder, tmp_path/"backup", tmp_path/"weights.npz", what], capture_output=True, text=True)
    assert run("dies").returncode == -signal.SIGKILL and any((tmp_path/"backup").iterdir()) and not (tmp_path/"weights.npz").exists()
    ended = run("lives")
    assert ended.returncode == 0, ended.stderr
    resumed = list(np.load(tmp_path/"weights.npz").values())
    undisturbed = runpy.run_path(str(tmp_path/"training.py"))["train"](tiny_folder, tmp_path/"other")
    assert same_weights(undisturbed, resumed, 1e-6)

def test_callbacks_of_keras(still, tmp_path):
    "Nothing improves at a rate of 0: EarlyStopping ends it after the second of five epochs."
    model = make(still, compiled_with=keras.optimizers.SGD(0.0))
    history = model.fit(table, epochs=5, validation_data=table, callbacks=[keras.callbacks.EarlyStopping("val_mean_accuracy", mode="max", patience=1),
        keras.callbacks.ModelCheckpoint(tmp_path/"best.weights.h5", monitor="val_topic_accuracy", mode="max", save_best_only=True, save_weights_only=True)])
    assert len(history.epoch) == 2
    other = make(still, seed=1)
    assert not same_weights(model, other)
    other.load_weights(tmp_path/"best.weights.h5")
    assert same_weights(model, other)

def test_tensorboard(still, tmp_path):
    make(still).fit(table, callbacks=[keras.callbacks.TensorBoard(tmp_path)])
    assert sum(f.stat().st_size for f in (tmp_path/"train").glob("events*")) > 0

# ---- a frozen encoder

def test_a_frozen_encoder_runs_once_and_stays_as_it_is(tiny_folder, count_calls):
    "Also with dropout in its settings. Compared with Keras's own fit, which knows of no vectors."
    calls = count_calls(SentenceTransformer, "vectors_of")
    cached, plain = make(tiny_folder, frozen=True), make(tiny_folder, frozen=True)
    before, batches = encoder_weights(cached), plain.batches(table, batch_size=4)
    cached.fit(table, batch_size=4, epochs=3)
    assert len(calls) == 1
    order = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: batches.start_epoch(epoch))
    keras.Model.fit(plain, batches, epochs=3, shuffle=False, verbose=0, callbacks=[order])
    assert len(calls) == 1 and same_weights(cached, plain, 1e-5) and not same_weights(head_weights(cached), head_weights(make(tiny_folder)))
    assert same_weights(before, encoder_weights(cached))

def test_batches_may_be_used_again_once_the_encoder_learns(still):
    "First the heads, then everything, on the same batches: the second training must move the encoder."
    model = make(still, frozen=True)
    batches, before = model.batches(table, batch_size=4), encoder_weights(make(still))
    model.fit(batches)
    model.sentence_transformer.trainable = True
    model.compile(keras.optimizers.SGD(0.1))
    model.fit(batches)
    assert not same_weights(before, encoder_weights(model))

# ---- balancing the tasks

def test_uncertainty_by_hand(still):
    "exp(-s) × loss + s/2, half of the first for a regression (Kendall et al., eqs. 7 and 10); nothing for a task that the batch lacks."
    model, logs = make(still, four_tasks(), balance="uncertainty"), dict(zip(["topic", "mood", "tags", "stars"], [0.3, -0.7, 1.1, -2.0]))
    for v, s in zip(model.uncertainty.variables_, logs.values()): v.assign(s/model.uncertainty.speed)
    for rows in (four, four.assign(mood=None)):
        batch = in_order(model, pd.concat([rows, four]), len(rows))[0]
        losses = losses_by_hand(model, rows)
        expected = sum((0.5 if n == "stars" else 1)*np.exp(-s)*losses[n] + s/2*(losses[n] > 0) for n, s in logs.items())
        assert total_loss(model, batch) == pytest.approx(expected, abs=1e-4)

def test_uncertainty_learns_how_noisy_a_task_is(still):
    "One step by hand; a loss of 0 with a small variance is negative."
    model = make(still, balance="uncertainty")
    losses = losses_by_hand(model, table)
    model.fit(table, batch_size=99)
    step = -0.1*model.uncertainty.speed**2 # SGD at 0.1 on a variable that is multiplied by `speed`
    assert model.uncertainty.log_variances == pytest.approx([step*(0.5 - losses[n]) for n in ("mood", "topic")], rel=1e-3)
    model = make(still, [Task("stars", kind="regression")], balance="uncertainty")
    model.uncertainty.variables_[0].assign(-3.0/model.uncertainty.speed)
    exact = pd.DataFrame({"text": texts, "stars": model.logits(texts)["stars"][:, 0]})
    assert total_loss(model, in_order(model, exact)[0]) == pytest.approx(-1.5, abs=1e-4)

def opposed(): return table[["text"]].assign(a="x", b="y") # heads with the same weights pull the encoder apart
def pair(still, **kwargs):
    model = make(still, [Task("a", ["x", "y", "z"]), Task("b", ["x", "y", "z"])], **kwargs)
    for head in model.heads.values(): head.set_weights([np.random.RandomState(1).normal(size=(8, 3)), np.zeros(3)])
    return model

def test_pcgrad_without_conflict_is_the_plain_step(still):
    rows = opposed().assign(b=opposed().a)
    plain, projected = pair(still), pair(still, balance="pcgrad")
    for model in (plain, projected): model.fit(rows, batch_size=99)
    assert same_weights(plain, projected, 1e-5) and not same_weights(plain, pair(still), 1e-3)

def test_pcgrad_in_conflict_by_hand(still):
    "The encoder takes the projected step, the heads the plain one, and what is reported is the plain loss."
    plain, projected = pair(still), pair(still, balance="pcgrad")
    before, gradients = encoder_weights(projected), task_gradients(projected, in_order(projected, opposed())[0])
    a, b = (np.concatenate([g.ravel() for g in gradients[n]]).astype("float64") for n in "ab")
    assert -0.95 < a @ b / np.linalg.norm(a) / np.linalg.norm(b) < -0.1
    combined = (a - (a @ b)/(b @ b)*b) + (b - (a @ b)/(a @ a)*a)
    reported = [model.fit(opposed(), batch_size=99).history for model in (plain, projected)]
    assert np.allclose(np.concatenate([w.ravel() for w in before]) - 0.1*combined, np.concatenate([w.ravel() for w in encoder_weights(projected)]), atol=1e-5)
    assert same_weights(head_weights(plain), head_weights(projected), 1e-5) and not same_weights(head_weights(plain), head_weights(pair(still)), 1e-3)
    assert {k: v[0] for k, v in reported[1].items()} == pytest.approx({k: v[0] for k, v in reported[0].items()}, abs=1e-5)

def test_pcgrad_heeds_what_compile_was_told(still):
    "With one task weighed 0 there is nothing to project: the plain step."
    plain, projected = pair(still), pair(still, balance="pcgrad")
    for model in (plain, projected):
        model.compile(keras.optimizers.SGD(0.1), loss_weights={"b": 0})
        model.fit(opposed(), batch_size=99)
    assert same_weights(encoder_weights(plain), encoder_weights(projected), 1e-5)

def test_pcgrad_with_a_frozen_encoder(still):
    plain, projected = make(still, frozen=True), make(still, frozen=True, balance="pcgrad")
    for model in (plain, projected): model.fit(table, batch_size=4)
    assert same_weights(plain, projected, 1e-5)

one_step = '''
import sys
import keras, numpy as np, pandas as pd
from mtst import MultiTaskSentenceTransformer, SentenceTransformer, Task
from mtst.multitask import adamw

texts = ["good food", "a b c", "food d e", "e f g h i", "good", "bad film a b c d"]
rows = pd.DataFrame({"text": texts, "a": ["x"]*5 + [None], "b": [None] + ["y"]*5}) # with equal heads they conflict
model = MultiTaskSentenceTransformer(SentenceTransformer.from_pretrained(sys.argv[1]), [Task(n, ["x", "y", "z"], loss_weight=w) for n, w in (("a", 1), ("b", 2))], dropout=0, balance=sys.argv[3] or None)
for head in model.heads.values(): head.set_weights([np.random.RandomState(1).normal(size=(8, 3)), np.zeros(3)])
found = []
for optimizer in (keras.optimizers.SGD(0.1), adamw(1e-3)):
    model.compile(optimizer)
    found += [v[0] for v in model.fit(rows, batch_size=99).history.values()]
np.savez(sys.argv[2], np.array(found), *(v.numpy() if hasattr(v, "numpy") else np.asarray(v) for v in model.get_weights()))
'''
def test_pcgrad_on_jax_takes_the_same_steps(still, tmp_path):
    "Weights and what is reported after a step of SGD and one of AdamW; the plain step is another."
    if not importlib.util.find_spec("jax"): pytest.skip("needs JAX, which mtst does not ask for")
    def run(backend, balance="pcgrad"):
        ended = python(one_step, still, tmp_path/f"{backend}.npz", balance, KERAS_BACKEND=backend)
        assert ended.returncode == 0, ended.stderr
        return list(np.load(tmp_path/f"{backend}.npz").values())
    expected, plain = run("tensorflow"), run("tensorflow", "")
    assert same_weights(expected, run("jax"), 1e-5) and not same_weights(expected, plain, 1e-3)

def test_projections_of_three_tasks():
    "Each gradient, task by task, against the others as they came (Yu et al., algorithm 1)."
    random = np.random.default_rng(1)
    flat = random.normal(size=(3, 10)).astype("float32")
    flat[1] -= flat[0]
    expected, projections = np.zeros(10), 0
    for i in range(3):
        g = flat[i].astype("float64")
        for j in {0, 1, 2} - {i}:
            if g @ flat[j] < 0: g, projections = g - (g @ flat[j])/(flat[j] @ flat[j])*flat[j], projections + 1
        expected += g
    found = project_conflicts([[g[:6].reshape(2, 3), g[6:]] for g in flat])
    assert projections >= 2 and [f.shape for f in found] == [(2, 3), (4,)] and np.allclose(np.concatenate([np.ravel(f) for f in found]), expected, atol=1e-5)

def test_project_conflicts_with_a_task_that_has_no_gradient():
    assert np.allclose(project_conflicts([[np.array([1., 2.])], [np.zeros(2)]])[0], [1, 2])

# ---- measuring conflict

def test_cosines_of_gradients(still):
    model = pair(still)
    same, against = (gradient_conflict(model, in_order(model, rows)[0]) for rows in (opposed().assign(b=opposed().a), opposed()))
    assert list(same.index) == ["embeddings", "layer_0"] and list(same.columns) == ["a · b"] and np.allclose(same, 1, atol=1e-5)
    assert against.stack().between(-1 - 1e-6, 0).all()
    gradients = task_gradients(model, in_order(model, opposed())[0])
    is_embedding = ["embeddings" in v.path for v in model.encoder.variables if "seed" not in v.path]
    a, b = (np.concatenate([g.ravel() for g, e in zip(gradients[n], is_embedding) if e]) for n in "ab")
    assert against.loc["embeddings", "a · b"] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-5)

def test_gradients_are_those_of_finite_differences(still):
    model = make(still)
    batch = in_order(model, table)[0]
    variable, gradient = [(v, g) for v, g in zip(model.encoder.trainable_variables, task_gradients(model, batch)["mood"]) if v.path.endswith("output_norm/gamma")][0]
    start, loss = values([variable])[0], lambda: losses_by_hand(model, table)["mood"]
    for i in (0, 5):
        around = []
        for step in (0.01, -0.01):
            variable.assign(start + step*np.eye(len(start))[i])
            around.append(loss())
        assert gradient[i] == pytest.approx((around[0] - around[1])/0.02, abs=1e-3)

def test_the_meter_measures_and_leaves_training_alone(tiny_folder):
    trained, meter = [make(tiny_folder, dropout=0.3) for _ in range(2)], ConflictMeter(table, rows=8)
    trained[0].fit(table, batch_size=4, epochs=2)
    trained[1].fit(table, batch_size=4, epochs=2, callbacks=[meter])
    assert same_weights(*trained) and meter.table.shape == (6, 3) and set(meter.table.columns) == {"part", "mood · topic", "epoch"} and sorted(set(meter.table.epoch)) == [0, 1, 2]
    assert meter.table["mood · topic"].between(-1 - 1e-6, 1 + 1e-6).all() and meter.table["mood · topic"].nunique() == 6

# ---- predict and evaluate

def test_answers_come_in_order_with_their_probability(model):
    found, logits = model.predict(texts, batch_size=5), model.logits(texts)
    assert list(found.columns) == ["text", "topic", "topic_probability", "mood", "mood_probability", "tags", "tags_probability", "stars"] and found.text.tolist() == texts
    p = np.exp(log_softmax(logits["topic"].astype("float64"), -1))
    assert found.topic.tolist() == [["food", "film", "shop"][i] for i in p.argmax(1)] and np.allclose(found.topic_probability, p.max(1), atol=1e-6)
    p = expit(logits["mood"][:, 0].astype("float64"))
    assert found.mood.tolist() == ["good" if x > 0.5 else "bad" for x in p] and np.allclose(found.mood_probability, np.maximum(p, 1 - p), atol=1e-6)
    assert found.tags.tolist() == ["|".join(np.array(["x", "y"])[row > 0]) for row in logits["tags"]] and np.allclose(found.stars, logits["stars"][:, 0])
    for i in (0, 8): pd.testing.assert_frame_equal(model.predict(texts[i]), found[i:i + 1].reset_index(drop=True), atol=1e-5)

@pytest.mark.parametrize("several", [tuple, pd.Series, np.array, iter], ids=["tuple", "Series", "array", "iterator"])
def test_any_iterable_of_texts_is_labelled(model, several): pd.testing.assert_frame_equal(model.predict(several(texts)), model.predict(texts))

def test_no_texts_give_no_rows(model):
    empty = model.predict([])
    assert len(empty) == 0 and list(empty.columns) == list(model.predict("good").columns)

@pytest.mark.parametrize("bad, place", [(["good", None], 1), (["good", 3], 1), (["good", float("nan")], 1), (pd.Series(["good", None]), 1), ([None, "good"], 0)])
def test_what_is_no_text_is_named(model, bad, place):
    with pytest.raises(TypeError, match=f"Text {place} "): model.predict(bad)

def test_scores_are_those_of_scikit_learn(model):
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, mean_absolute_error
    found, answers = model.evaluate(four, batch_size=2), model.predict(four.text)
    for name, rows, labels in [("topic", [0, 2, 4, 5], ["food", "film", "shop"]), ("mood", [1, 3, 4], ["bad", "good"])]:
        true, guess, scores = four[name][rows].tolist(), answers[name][rows].tolist(), found.scores.loc[name]
        assert (scores.rows, scores.accuracy, scores.macro_f1) == pytest.approx((len(rows), accuracy_score(true, guess), f1_score(true, guess, labels=labels, average="macro", zero_division=0)))
        assert found.confusion[name].values.tolist() == confusion_matrix(true, guess, labels=labels).tolist() and list(found.confusion[name].columns) == labels
    assert found.scores.loc["stars", "mean_absolute_error"] == pytest.approx(mean_absolute_error(four.stars[[0, 1, 3, 5]], answers.stars[[0, 1, 3, 5]]))
    true, guess = np.array([[1, 1], [1, 0], [0, 1], [0, 0]]), np.array([[label in a.split("|") for label in "xy"] for a in answers.tags[[0, 2, 3, 4]]])
    assert found.scores.loc["tags", "accuracy"] == pytest.approx((true == guess).mean()) and found.scores.loc["tags", "macro_f1"] == pytest.approx(f1_score(true, guess, average="macro", zero_division=0))
    assert "topic" in repr(found) and "<table" in found._repr_html_()

@pytest.mark.parametrize("name", ["topic", "tags", "stars"])
@pytest.mark.filterwarnings("error")
def test_a_task_without_labels_in_the_test_table_has_no_score(model, name):
    scores = model.evaluate(four.assign(**{name: None})).scores
    assert scores.loc[name, "rows"] == 0 and scores.loc[name].drop("rows").isna().all() and scores.loc["mood", "rows"] == 3

def test_bad_rows_are_not_evaluated(model):
    with pytest.raises(ValueError, match="'sea' in rows 2, 4, 6"): model.evaluate(four.assign(topic=["food", "sea"]*3))
    with pytest.raises(ValueError, match="no column 'stars'"): model.evaluate(four.drop(columns="stars"))

# ---- saving, adding, removing

def test_saved_and_loaded_is_equal_to_the_bit(still, tmp_path):
    model = make(still, [*four_tasks(), Task("last", ["p", "q"], class_weight={"p": 2.0}, loss_weight=0.5)], dropout=0.25)
    model.fit(four.assign(last=["p", "q"]*3))
    again = MultiTaskSentenceTransformer.from_pretrained(model.save_pretrained(tmp_path/"a"))
    assert all(np.array_equal(again.logits(texts)[n], logits) for n, logits in model.logits(texts).items()) and same_weights(model, again)
    assert list(again.tasks.values()) == list(model.tasks.values()) and again.head_dropout.rate == 0.25 and os.listdir(tmp_path) == ["a"]
    assert np.array_equal(SentenceTransformer.from_pretrained(tmp_path/"a").encode(texts), model.sentence_transformer.encode(texts))
    fresh = MultiTaskSentenceTransformer.from_pretrained(tmp_path/"a", tasks=[Task("other", ["p", "q"])])
    assert list(fresh.tasks) == ["other"] and same_weights(encoder_weights(fresh), encoder_weights(model))

def edit_heads(folder, drop=None, **more): save_file({n: w for n, w in {**load_file(folder/"heads.safetensors"), **{k.replace("__", "."): w for k, w in more.items()}}.items() if n != drop}, folder/"heads.safetensors")
def edit_tasks(folder, change):
    saved = json.loads((folder/"tasks.json").read_text())
    change(saved)
    (folder/"tasks.json").write_text(json.dumps(saved))

@pytest.mark.parametrize("damage, error, said", [
    (lambda f: (f/"heads.safetensors").unlink(), FileNotFoundError, r"heads\.safetensors"), (lambda f: edit_heads(f, drop="stars.kernel"), ValueError, r"heads\.safetensors.*stars"),
    (lambda f: edit_heads(f, topic__kernel=np.zeros((8, 2), "float32")), ValueError, r"topic.*\(8, 2\)"), (lambda f: (f/"heads.safetensors").write_bytes(b"damaged"), ValueError, r"heads\.safetensors"),
    (lambda f: (f/"tasks.json").write_text('{"tasks": ['), ValueError, r"tasks\.json"), (lambda f: (f/"tasks.json").write_text("[]"), ValueError, r"tasks\.json"),
    (lambda f: edit_tasks(f, lambda saved: saved.pop("tasks")), ValueError, r"tasks\.json"), (lambda f: edit_tasks(f, lambda saved: saved["tasks"][0].pop("name")), ValueError, r"tasks\.json"),
    (lambda f: edit_tasks(f, lambda saved: saved["tasks"][0].update(colour="red")), ValueError, r"tasks\.json"), (lambda f: edit_tasks(f, lambda saved: saved["tasks"][0].update(kind="ranking")), ValueError, "ranking"),
    (lambda f: (f/"tasks.json").unlink(), ValueError, "without heads")],
    ids=["no heads file", "a head missing", "wrong shape", "damaged heads", "damaged tasks", "tasks of another form", "no list of tasks", "task without a name", "unknown setting", "unknown kind", "no tasks"])
def test_a_damaged_folder_is_named(model, tmp_path, damage, error, said):
    damage(model.save_pretrained(tmp_path/"a"))
    with pytest.raises(error, match=said): MultiTaskSentenceTransformer.from_pretrained(tmp_path/"a")

def test_tasks_come_and_go(model):
    more = model.with_task(Task("extra", ["p", "q"]))
    assert list(more.tasks) == [*model.tasks, "extra"] and list(model.tasks) == ["topic", "mood", "tags", "stars"] and more.encoder is model.encoder
    fewer = more.without_task("mood")
    assert list(fewer.tasks) == ["topic", "tags", "stars", "extra"]
    for other in (more, fewer): assert all(np.array_equal(model.logits(texts)[n], other.logits(texts)[n]) for n in ("topic", "tags", "stars"))
    assert np.array_equal(more.logits(texts)["extra"], fewer.logits(texts)["extra"])
    more.compile(keras.optimizers.SGD(0.0))
    assert "extra_loss" in more.fit(four.assign(extra="p")).history
    with pytest.raises(ValueError, match="'mood' already"): model.with_task(Task("mood", ["p", "q"]))
    with pytest.raises(ValueError, match="no task 'sea'.*topic, mood"): model.without_task("sea")
    with pytest.raises(ValueError, match="one or more tasks"): model.without_task("topic").without_task("mood").without_task("tags").without_task("stars")

# ---- the optimizer

@pytest.mark.parametrize("step, share", [(0, 0.1), (4, 0.5), (9, 1), (10, 90/91), (54, 46/91), (99, 1/91), (100, 0), (150, 0)])
def test_the_rate_rises_and_falls(step, share):
    assert float(WarmupLinear(2e-3, 100)(step)) == pytest.approx(2e-3*share, abs=1e-9)
    assert float(WarmupLinear.from_config(WarmupLinear(2e-3, 100).get_config())(step)) == pytest.approx(2e-3*share, abs=1e-9)

@pytest.mark.parametrize("steps, warmup, rates", [(1, 0.1, [1]), (2, 0, [1, 0.5]), (3, 1, [1/3, 2/3, 1])])
def test_short_trainings_learn_at_each_step(steps, warmup, rates): assert [float(WarmupLinear(1.0, steps, warmup)(i)) for i in range(steps)] == pytest.approx(rates)

def test_adamw_decays_matrices_only():
    dense, norm = keras.layers.Dense(2), keras.layers.LayerNormalization()
    norm(dense(np.ones((1, 3))))
    variables = [*dense.variables, *norm.variables]
    for v in variables: v.assign(np.ones(v.shape))
    adamw(0.5, weight_decay=0.1).apply([np.zeros(v.shape, "float32") for v in variables], variables)
    assert {v.name: round(float(keras.ops.mean(v)), 4) for v in variables} == {"kernel": 0.95, "bias": 1, "gamma": 1, "beta": 1}

def test_factors_and_a_late_start_by_hand():
    "Adam's first step is as long as the rate; a weight that joins late makes the first step that an early one made."
    def first_step(joined=0, at=0, **kwargs):
        variable, optimizer = keras.Variable(np.zeros(1, "float32"), name="w"), AdamW(0.1, weight_decay=0, **kwargs)
        optimizer.build([variable])
        optimizer.joined = [joined]
        optimizer.iterations.assign(at)
        optimizer.apply([np.ones(1, "float32")], [variable])
        return -float(variable[0])
    assert first_step() == pytest.approx(0.1, abs=1e-5) and first_step(factors={"w": 0.01}) == pytest.approx(0.001, abs=1e-6)
    assert first_step(10_000, 10_000) == pytest.approx(0.1, abs=1e-4) and first_step(0, 10_000) == pytest.approx(0.01/0.001**0.5, abs=1e-3)

@pytest.mark.parametrize("graph", ["eager", "traced", "xla"])
@pytest.mark.parametrize("kwargs", [{}, {"amsgrad": True}, {"epsilon": 1e-3, "beta_1": 0.8}], ids=["plain", "amsgrad", "other"])
def test_one_pass_gives_the_weights_of_keras(kwargs, graph):
    "Five steps with other gradients each time, one of them a table's, which TensorFlow lists by rows."
    import tensorflow as tf
    def trained(kind):
        table, kernel = keras.Variable(np.arange(12, dtype="float32").reshape(4, 3)/10, name="table"), keras.Variable(np.ones((2, 2), "float32"), name="kernel")
        optimizer = kind(0.1, weight_decay=0.01, **kwargs)
        optimizer.build([table, kernel])
        def step(i):
            rows = tf.IndexedSlices(tf.ones((2, 3))*i, tf.constant([0, 2]), tf.constant([4, 3]))
            optimizer.apply([rows if graph != "xla" and kind is AdamW else tf.convert_to_tensor(rows), tf.convert_to_tensor(np.float32([[1, -2], [0, 1e-3]]))*(i - 2)], [table, kernel])
        run = step if graph == "eager" else tf.function(step, jit_compile=graph == "xla")
        for i in range(5): run(tf.constant(float(i)))
        return np.concatenate([np.ravel(table), np.ravel(kernel)])
    ours, theirs = trained(AdamW), trained(keras.optimizers.AdamW)
    assert np.abs(ours - theirs).max() <= 1e-5 and np.abs(ours[:3] - [0, 0.1, 0.2]).min() > 0.3, "of steps of 0.1"

# ---- what was measured

results = Path(__file__).parent.parent/"nbs"/"results"

@pytest.fixture(scope="module")
def sharing(): return pd.read_csv(results/"sharing.csv")

def test_every_way_of_sharing_was_measured_with_three_seeds(sharing):
    seeds = sharing.groupby(["data", "way", "task"]).seed.agg(sorted)
    assert (seeds.map(tuple) == (0, 1, 2)).all() and seeds.groupby("data").size().to_dict() == {"reviews": 14, "SST-2 + TREC": 12}
    assert sharing.accuracy.between(0.5, 1).all() and sharing.drop(columns="accuracy").notna().all(axis=None)

def test_half_of_the_labels_cost_less_than_two_points(sharing):
    reviews = sharing[sharing.data == "reviews"].pivot_table(index="way", columns="task", values="accuracy")
    lost = reviews.loc["joint, fixed weights"] - reviews.loc["joint, half of the labels"]
    assert sorted(lost.index) == ["domain", "sentiment"] and (lost < 0.02).all()

def test_accuracies_of_the_published_reviews(sharing):
    "Alone, and jointly with fixed weights, whole encoder, mean of three seeds."
    reviews = sharing[sharing.data == "reviews"].pivot_table(index="way", columns="task", values="accuracy")
    assert reviews.loc["alone", "sentiment"] >= 0.92 and reviews.loc["joint, fixed weights", "sentiment"] >= 0.92 and reviews.loc["joint, fixed weights", "domain"] >= 0.905

def test_the_meter_was_read_in_every_run():
    table = pd.read_csv(results/"sharing_conflict.csv")
    assert not table.duplicated(["data", "part", "epoch", "seed"]).any() and table.groupby("data").size().to_dict() == {"reviews": 84, "SST-2 + TREC": 84} # 7 parts, 4 times, 3 seeds
    assert table.cosine.between(-1, 1).all()
