"""Freezing: what is frozen stays to the bit, in any order of calls; what is not learns on undisturbed. By hand in NumPy wherever a number can be had by hand."""
import functools, logging
import keras, numpy as np, pandas as pd, pytest, tensorflow as tf
from conftest import eager, write_bert
from mtst import MultiTaskSentenceTransformer, SentenceTransformer, Task
from mtst.freezing import GradualUnfreezing, add_lora, freeze, freeze_report, heads_then_all, matching, merge_lora, named_weights, part_of, rate_factors, unfreeze, weights_of
from mtst.multitask import AdamW, WarmupLinear, adamw
from mtst.sentence_transformer import BertEncoder

logging.getLogger("tensorflow").setLevel("ERROR") # several models in one process: TensorFlow takes their graphs for retracing

def two_tasks(): return [Task("mood", ["bad", "good"]), Task("topic", ["food", "film", "shop"])]
table = pd.DataFrame({"text": ["good food", "a b c", "food d e", "e f g h i", "good", "bad film a b c d", "a film", "no food"], "mood": ["good", "bad"]*4, "topic": ["food", "shop", "food", "film"]*2})

@pytest.fixture(scope="module")
def still(tmp_path_factory):
    "One layer, no dropout."
    return write_bert(tmp_path_factory.mktemp("still")/"bert", hidden_dropout_prob=0, attention_probs_dropout_prob=0)

@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    "Three layers, no dropout."
    return write_bert(tmp_path_factory.mktemp("deep")/"bert", depth=3, hidden_dropout_prob=0, attention_probs_dropout_prob=0)

@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    "Two layers, no dropout."
    return write_bert(tmp_path_factory.mktemp("pair")/"bert", depth=2, hidden_dropout_prob=0, attention_probs_dropout_prob=0)

@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    "Two layers, half of everything dropped out in training."
    return write_bert(tmp_path_factory.mktemp("noisy")/"bert", depth=2, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)

loaded = functools.cache(SentenceTransformer.from_pretrained)
def encoder_of(folder): # a new one each time, without reading the files again
    first = loaded(folder)
    body = SentenceTransformer(BertEncoder(first.encoder.config, name="encoder"), first.tokenizer)
    body.encoder.set_weights(first.encoder.get_weights())
    return body

def make(folder, tasks=None, seed=0, compiled_with=None, **kwargs):
    loaded(folder) # draws random numbers the first time
    keras.utils.set_random_seed(seed)
    model = MultiTaskSentenceTransformer(encoder_of(folder), tasks or two_tasks(), **{"dropout": 0, **kwargs})
    model.compile(compiled_with or keras.optimizers.SGD(0.1))
    return model

def train(model, epochs=1, rows=table, batch_size=8, **kwargs): return model.fit(rows, batch_size=batch_size, epochs=epochs, **{"verbose": 0, **kwargs})
def moved(before, after): return {n for n, w in before.items() if not np.array_equal(w, (after if isinstance(after, dict) else weights_of(after))[n])}
def names(model, *patterns): return {n for p in patterns for n in matching(model, p)}
def frozen(model): return {n for n, v in named_weights(model).items() if not v.trainable}
def furthest(a, b):
    a, b = (x if isinstance(x, dict) else weights_of(x) for x in (a, b))
    assert a.keys() == b.keys()
    return max(np.abs(a[n] - b[n]).max() for n in a)
def inputs(model): return model.batches(table, batch_size=len(table), shuffle=False)[0][0]
def array(x): return np.array(keras.ops.convert_to_numpy(x))

class Watch(keras.callbacks.Callback):
    "Of each epoch, what was trainable and what moved."
    def on_epoch_begin(self, epoch, logs=None): self.before = weights_of(self.model)
    def on_epoch_end(self, epoch, logs=None):
        self.trainable = [*getattr(self, "trainable", []), set(named_weights(self.model)) - frozen(self.model)]
        self.moved = [*getattr(self, "moved", []), moved(self.before, self.model)]

class At(keras.callbacks.Callback):
    "Do something at the start of an epoch."
    def __init__(self, epoch, what): super().__init__(); self.epoch, self.what = epoch, what
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch: self.what(self.model)

eagerly = eager("traced") # the traced tests are about just that

@pytest.fixture(scope="module")
def reading(deep):
    "To be read only: nothing in it is ever frozen."
    return make(deep, balance="uncertainty")

# ---- any order of freezing, compiling and training

parts = {"word": ("encoder/embeddings/word",), "lowest": 1, "encoder": ("encoder",), "head": ("heads/mood",), "projection": ("layer_0/attention/query_key_value",)}
orders = ["freeze compile fit", "compile freeze fit", "compile fit freeze fit", "compile fit freeze fit unfreeze fit", "freeze compile fit unfreeze fit freeze fit", "compile fit freeze freeze fit",
    "compile fit freeze compile fit", "freeze compile fit compile fit unfreeze fit", "compile fit freeze compile unfreeze fit", "freeze unfreeze compile fit freeze fit", "compile freeze unfreeze fit",
    "compile fit freeze unfreeze fit", "freeze compile fit unfreeze compile fit", "compile evaluate fit evaluate freeze fit", "compile fit freeze fit freeze unfreeze freeze fit"]

def play(model, order, part, momentum=0.0):
    "Do what the order says. After each training exactly that has moved which wasn't frozen."
    what, lowest = (part, None) if isinstance(part, tuple) else ((), part)
    chosen = names(model, *what) if what else names(model, "embeddings", *(f"layer_{i}" for i in range(lowest)))
    for step in order.split():
        if step == "compile": model.compile(keras.optimizers.SGD(0.1, momentum=momentum))
        elif step == "freeze": freeze(model, *what, lowest=lowest)
        elif step == "unfreeze": unfreeze(model, *what, lowest=lowest)
        elif step == "evaluate": model.evaluate(model.batches(table), verbose=0)
        else:
            before, expected = weights_of(model), set(named_weights(model)) - frozen(model)
            train(model)
            assert moved(before, model) == expected and set(freeze_report(model).index) == set(map(part_of, before))
        if step == "freeze": assert frozen(model) == chosen
        if step == "unfreeze": assert not frozen(model)

@pytest.mark.parametrize("i", range(len(orders)), ids=[o.replace(" ", "-") for o in orders])
def test_traced_in_any_order(still, pair, i):
    "A training step that was traced before knows nothing of a change of mind: each order with one of the parts."
    name = list(parts)[i % len(parts)]
    play(make(pair if name == "lowest" else still), orders[i], parts[name])

@pytest.mark.parametrize("name", parts)
def test_in_a_long_order_with_each_part(pair, name): play(make(pair), "freeze compile fit unfreeze fit freeze freeze fit compile fit", parts[name], momentum=0.9)

def test_traced_adamw_moves_nothing_that_is_frozen(still):
    "Neither by weight decay nor by what it remembers of earlier gradients."
    model = make(still, compiled_with=adamw(1e-2, weight_decay=0.5))
    train(model)
    freeze(model, "layer_0", "embeddings/word", "heads/topic/bias")
    before = weights_of(model)
    train(model, 3)
    assert moved(before, model) == set(before) - frozen(model)

def test_freezing_of_one_thing_after_another_adds_up(pair):
    model = make(pair)
    for what in ("heads/mood", "layer_1", "*/norm"): freeze(model, what)
    assert frozen(model) == names(model, "heads/mood", "layer_1", "embeddings/norm") == {n for n, v in named_weights(model).items() if all(v is not t for t in model.trainable_variables)}
    unfreeze(model, "layer_1/attention/out", "heads")
    assert frozen(model) == names(model, "layer_1", "embeddings/norm") - names(model, "layer_1/attention/out")
    before = weights_of(model)
    train(model)
    assert moved(before, model) == set(before) - frozen(model)

def test_frozen_by_the_means_of_keras_counts_too(pair):
    model = make(pair)
    model.encoder.transformer_layers[1].trainable = False
    freeze(model, "heads/mood")
    assert frozen(model) == names(model, "layer_1", "heads/mood")
    unfreeze(model, "everything")
    assert not frozen(model) and all(layer.trainable for layer in model._flatten_layers())

@pytest.mark.parametrize("through", ["the encoder alone", "another model"])
def test_traced_when_frozen_through_someone_who_shares_the_encoder(still, through):
    "Two models with one encoder: a part frozen in one is frozen in both, whatever was trained before; likewise when it is thawed."
    model = make(still)
    other = model.sentence_transformer if through == "the encoder alone" else model.with_task(Task("more", ["x", "y"]))
    train(model)
    freeze(other, "layer_0")
    before = weights_of(model)
    train(model)
    assert moved(before, model) == set(before) - names(model, "layer_0")
    unfreeze(other, "layer_0")
    before = weights_of(model)
    train(model)
    assert moved(before, model) == set(before)

@pytest.mark.parametrize("balance", ["uncertainty", "pcgrad"])
def test_with_balanced_tasks(pair, balance):
    model = make(pair, balance=balance, compiled_with=keras.optimizers.SGD(1e-3, momentum=0.9))
    for frozen_, thawed in ((("layer_1", "heads/mood"), ()), (("encoder",), ()), ((), ("layer_1/attention",)), (("heads",), ()), ((), ("everything",))):
        freeze(model, *frozen_) if frozen_ else unfreeze(model, *thawed)
        before = weights_of(model)
        train(model)
        assert moved(before, model) == set(before) - frozen(model)

def test_a_sentence_transformer_alone(pair):
    body = encoder_of(pair)
    ids, target = {"input_ids": np.array([[2, 5, 3]]*4), "attention_mask": np.ones((4, 3), int)}, np.ones((4, 8))
    body.compile(keras.optimizers.SGD(0.1), loss="mse")
    body.fit(ids, target, verbose=0)
    freeze(body, lowest=1)
    before = weights_of(body)
    body.fit(ids, target, verbose=0)
    assert moved(before, body) == names(body, "layer_1") and freeze_report(body, before).moved["encoder/layer_0"] == 0 < freeze_report(body, before).moved["encoder/layer_1"]
    unfreeze(body, "encoder")
    body.fit(ids, target, verbose=0)
    assert names(body, "layer_0") <= moved(before, body)

def test_everything_frozen(still):
    model = freeze(make(still), "everything")
    assert frozen(model) == set(named_weights(model)) and not model.trainable_variables
    with pytest.raises(ValueError, match="nothing to train.*Unfreeze"): train(model)
    unfreeze(model, "heads/mood")
    before = weights_of(model)
    train(model)
    assert moved(before, model) == names(model, "heads/mood")

# ---- what the optimizer has learned

def excluding(optimizer): optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"]); return optimizer
optimizers = {"SGD": lambda: keras.optimizers.SGD(1e-2, momentum=0.9), "RMSprop": lambda: keras.optimizers.RMSprop(1e-2, momentum=0.5, centered=True),
    "Keras' AdamW": lambda: excluding(keras.optimizers.AdamW(1e-2, weight_decay=0.1)), "AdamW": lambda: AdamW(1e-2), "Nadam": lambda: keras.optimizers.Nadam(1e-2),
    "accumulating": lambda: keras.optimizers.Adam(1e-2, amsgrad=True, gradient_accumulation_steps=3),
    "scaled Adam": lambda: keras.mixed_precision.LossScaleOptimizer(keras.optimizers.Adam(1e-2)), "scaled AdamW": lambda: keras.mixed_precision.LossScaleOptimizer(AdamW(1e-2)),
    "scaled, excluding": lambda: keras.mixed_precision.LossScaleOptimizer(excluding(keras.optimizers.AdamW(1e-2, weight_decay=0.1)))}
every_optimizer = pytest.mark.parametrize("optimizer", optimizers.values(), ids=optimizers)

def inner(optimizer): return getattr(optimizer, "inner_optimizer", optimizer)
def state(optimizer): return {v.name: array(v) for v in inner(optimizer).variables if not v.name.startswith("variable")} # but for those without a name of their own
def kept(before, after, but=()): return [n for n in before if n not in but and not np.array_equal(before[n], after.get(n))] == []

def fake_steps(model, n=1, seed=0, gradients=None):
    "Steps of the optimizer with random gradients, each weight's own in each step: no forward pass is needed. They come back by name."
    given, named = [], {n: v for n, v in named_weights(model).items() if v.trainable}
    for step in range(n):
        random = {name: np.random.default_rng([seed, step, sum(map(ord, name))]).normal(size=v.shape).astype("float32") for name, v in named.items()}
        scale = float(model.optimizer.scale_loss(1.0))
        model.optimizer.apply([keras.ops.convert_to_tensor(g*scale) for g in random.values()], list(named.values()))
        given.append(random)
    return given

@every_optimizer
def test_what_the_optimizer_knows_of_the_others_is_kept(still, optimizer):
    "Its averages, its count of steps and its rate; the object stays the same."
    model = make(still, compiled_with=optimizer())
    held = model.optimizer
    fake_steps(model, 4)
    held.learning_rate = 3e-3
    before = state(held)
    mood = {n for n in before if "mood_head" in n}
    assert mood
    freeze(model, "heads/mood")
    assert model.optimizer is held and kept(before, state(held), mood) and set(state(held)) == set(before) - mood
    assert int(held.iterations) == int(before["iteration"])//(held.gradient_accumulation_steps or 1) > 0 and float(held.learning_rate) == pytest.approx(3e-3)
    unfreeze(model, "heads/mood")
    assert model.optimizer is held and kept(before, state(held), mood) and set(state(held)) == set(before)
    assert all(not state(held)[n].any() for n in mood)
    fake_steps(model, seed=1)
    assert int(state(held)["iteration"]) == int(before["iteration"]) + 1

@every_optimizer
def test_freezing_and_thawing_leaves_the_others_undisturbed(still, optimizer):
    "Each weight is given gradients of its own here, so that none hangs on another. One part is frozen and thawed; another, frozen all along, is frozen once more."
    trained = [freeze(make(still, compiled_with=optimizer()), "layer_0") for _ in range(2)]
    for i, model in enumerate(trained):
        fake_steps(model, 4)
        if i: unfreeze(freeze(model, "heads/mood", "layer_0/attention"), "heads/mood")
        fake_steps(model, 4, seed=1)
    assert moved(weights_of(trained[0]), trained[1]) == names(model, "heads/mood")

def test_freezing_what_is_frozen_disturbs_nothing(still):
    trained = [freeze(make(still, compiled_with=AdamW(1e-2)), "layer_0") for _ in range(2)]
    for i, model in enumerate(trained):
        fake_steps(model, 4)
        if i: freeze(unfreeze(freeze(model, "layer_0/attention"), "layer_0/up"), "layer_0")
        fake_steps(model, 4, seed=1)
    assert not moved(weights_of(trained[0]), trained[1]) and frozen(model) == names(model, "layer_0")

@pytest.mark.parametrize("name", ["Keras' AdamW", "scaled, excluding"])
def test_exclusions_from_weight_decay_are_kept(still, name):
    model = make(still, compiled_with=optimizers[name]())
    fake_steps(model)
    unfreeze(freeze(model, "layer_0"), "layer_0")
    used = {n: inner(model.optimizer)._use_weight_decay(v) for n, v in named_weights(model).items()}
    assert {n for n, u in used.items() if not u} == {n for n in used if n.split("/")[-1] in ("bias", "gamma", "beta")}

def test_the_scale_of_the_loss_is_kept(still):
    model = make(still, compiled_with=keras.mixed_precision.LossScaleOptimizer(keras.optimizers.Adam(1e-3), initial_scale=64.0, dynamic_growth_steps=2))
    fake_steps(model, 3)
    scale = float(model.optimizer.dynamic_scale), int(model.optimizer.step_counter), int(model.optimizer.iterations)
    freeze(model, "layer_0")
    assert scale == (float(model.optimizer.dynamic_scale), int(model.optimizer.step_counter), int(model.optimizer.iterations)) == (128.0, 1, 3)

class Halving(keras.optimizers.schedules.LearningRateSchedule): # as a user may write it: not registered, no get_config
    def __init__(self, start): self.start = start
    def __call__(self, step): return self.start / 2.0**keras.ops.cast(step, "float32")

class Mine(keras.optimizers.SGD): # an optimizer with an argument of its own
    def __init__(self, flavour, **kwargs): super().__init__(0.1, **kwargs); self.flavour = flavour

@pytest.mark.parametrize("optimizer", [lambda: keras.optimizers.SGD(WarmupLinear(0.1, 10)), lambda: AdamW(Halving(1e-2)), lambda: keras.optimizers.Adam(lambda: 1e-2), lambda: Mine("sweet")],
    ids=["schedule", "own schedule", "function", "own optimizer"])
def test_rates_and_optimizers_of_any_kind(still, optimizer):
    model = make(still, compiled_with=optimizer())
    train(model, 2)
    rate = float(model.optimizer.learning_rate)
    freeze(model, "layer_0")
    before = weights_of(model)
    assert float(model.optimizer.learning_rate) == pytest.approx(rate) and int(model.optimizer.iterations) == 2
    train(model)
    assert moved(before, model) == set(before) - frozen(model) and getattr(model.optimizer, "flavour", "sweet") == "sweet"

def test_running_averages_of_the_weights_start_at_the_weights(still):
    "With use_ema the weights become their averages at the end: that of a weight that joins late must not start at 0."
    model = freeze(make(still, compiled_with=keras.optimizers.SGD(1e-6, use_ema=True, ema_momentum=0.99)), "layer_0")
    train(model, 2)
    unfreeze(model, "layer_0")
    before = weights_of(model)
    train(model)
    assert furthest(before, model) < 1e-3

# ---- names

def test_each_weight_has_one_name(reading):
    named = named_weights(reading)
    assert len(named) == len(reading.weights) and {id(v) for v in named.values()} == {id(v) for v in reading.weights}
    report = freeze_report(reading)
    assert report.parameters.sum() == reading.count_params() == report.trainable.sum() and {part_of(n) for n in named} == set(report.index)
    assert set(report.index) >= {"encoder/embeddings/word", "encoder/embeddings/norm", "encoder/layer_0", "encoder/layer_2", "heads/mood", "heads/topic"}
    assert report.parameters["heads/topic"] == 27 and "moved" not in report

def test_each_weight_has_one_name_in_relatives_too(reading):
    wider = reading.with_task(Task("more", ["x", "y"]))
    for model in (wider, wider.without_task("mood"), reading.sentence_transformer):
        assert {id(v) for v in named_weights(model).values()} == {id(v) for v in model.weights} and freeze_report(model).parameters.sum() == model.count_params()
    assert set(named_weights(reading.sentence_transformer)) == names(reading, "encoder")

@pytest.mark.parametrize("pattern, count", [("everything", 60), ("encoder", 41), ("backbone", 41), ("backbone/layer_1", 12), ("layer_1", 12), ("encoder/layer_?", 36), ("layer_[02]", 24), ("embeddings", 5), ("word", 1),
    ("*/attention", 12), ("layer_2/attention/out/kernel", 1), ("kernel", 14), ("heads", 4), ("heads/mood", 2), ("heads/*/bias", 2), ("log_variance_*", 2), ("norm", 2), ("*norm", 14), ("*", 60)])
def test_patterns(reading, pattern, count):
    found = matching(reading, pattern)
    assert len(found) == len(set(found)) and len(found) == (count if pattern not in ("everything", "*") else len(reading.weights))

@pytest.mark.parametrize("call", [freeze, unfreeze, matching])
@pytest.mark.parametrize("pattern", ["layer_3", "layer", "Encoder", "encoder/", "", "heads/moo", "layer_0/heads", "mood/kernel/x"])
def test_patterns_that_match_nothing(reading, call, pattern):
    "The parts are listed, and nothing is changed."
    with pytest.raises(ValueError, match="encoder/embeddings/word, .*encoder/layer_2, heads/mood, heads/topic"): call(reading, pattern)
    assert not frozen(reading)

def test_a_good_pattern_beside_a_bad_one_changes_nothing(pair):
    model = freeze(make(pair), "heads/mood")
    for call in (freeze, unfreeze):
        with pytest.raises(ValueError, match="layer_7"): call(model, "heads/mood", "layer_7")
    assert frozen(model) == names(model, "heads/mood")

@pytest.mark.parametrize("lowest", [-1, 4, 99])
def test_more_layers_than_there_are(reading, lowest):
    for call in (freeze, unfreeze):
        with pytest.raises(ValueError, match=f"lowest={lowest}.* 3 layers"): call(reading, lowest=lowest)
    assert not frozen(reading)

@pytest.mark.parametrize("lowest, patterns", [(0, ["embeddings"]), (2, ["embeddings", "layer_0", "layer_1"]), (3, ["encoder"])])
def test_lowest(deep, lowest, patterns):
    model = freeze(make(deep), lowest=lowest)
    assert frozen(model) == names(model, *patterns)
    assert not frozen(unfreeze(model, lowest=lowest))
    assert frozen(freeze(model, "heads/mood", lowest=lowest)) == names(model, "heads/mood", *patterns)

def test_nothing_said(reading):
    for call in (freeze, unfreeze):
        with pytest.raises(ValueError, match="Say what.*lowest"): call(reading)

def test_thawing_what_is_not_frozen(pair):
    model = make(pair)
    with pytest.raises(ValueError, match="'layer_0' is not frozen.*no parts"): unfreeze(model, "layer_0")
    with pytest.raises(ValueError, match="not frozen"): unfreeze(model, lowest=1)
    freeze(model, "layer_1", "heads/mood")
    with pytest.raises(ValueError, match="'embeddings' is not frozen.*encoder/layer_1, heads/mood"): unfreeze(model, "layer_1", "embeddings")
    assert frozen(model) == names(model, "layer_1", "heads/mood") and not frozen(unfreeze(model, "everything"))

odd = ["encoder", "backbone", "embeddings", "layer_0", "everything", "heads", "kernel", "mybackbone", "[ab]"]
@pytest.mark.parametrize("name", odd)
def test_tasks_with_odd_names(still, name):
    model = make(still, [Task(name, ["x", "y"]), Task("plain", ["x", "y"])])
    report = freeze_report(model)
    assert report.parameters[f"heads/{name}"] == 18 and report.parameters.sum() == model.count_params()
    freeze(model, f"heads/{name}")
    assert frozen(model) == {f"heads/{name}/kernel", f"heads/{name}/bias"}

def test_a_task_called_encoder_is_no_encoder(still):
    "Whatever freezes the encoder for a while leaves its head alone."
    rows = table.rename(columns={"mood": "encoder"})
    def model(): return make(still, [Task("encoder", ["bad", "good"])], compiled_with=keras.optimizers.SGD(0.1))
    one, other, third = model(), model(), model()
    train(one, 1, rows, callbacks=[GradualUnfreezing()])
    assert not frozen(one) & {"heads/encoder/kernel", "heads/encoder/bias"}
    heads_then_all(other, rows, head_epochs=1, epochs=1, verbose=0)
    assert not frozen(add_lora(third, 1)) & {"heads/encoder/kernel", "heads/encoder/bias"}

# ---- the report

def test_the_report_says_what_is_trainable_and_what_moved(pair):
    model = make(pair)
    before = weights_of(model)
    freeze(model, "layer_0", "embeddings/word", "layer_1/attention/out", "heads/mood/bias")
    train(model)
    report = freeze_report(model, before)
    assert report.trainable.sum() == sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    assert report.trainable[["encoder/layer_0", "encoder/embeddings/word"]].sum() == 0 and report.trainable["heads/mood"] == 16
    assert report.trainable["encoder/layer_1"] == report.parameters["encoder/layer_1"] - 72
    assert (report.moved[["encoder/layer_0", "encoder/embeddings/word"]] == 0).all() and (report.moved.drop(["encoder/layer_0", "encoder/embeddings/word"]) > 0).all()
    after, of = weights_of(model), names(model, "layer_1")
    flat = lambda weights: np.concatenate([weights[n].ravel() for n in of]).astype("float64")
    assert report.moved["encoder/layer_1"] == pytest.approx(np.linalg.norm(flat(after) - flat(before)) / np.linalg.norm(flat(before)))

def test_weights_of_is_a_copy(still):
    model = make(still)
    before = weights_of(model)
    train(model)
    assert moved(before, model) == set(before) and not any(isinstance(w, tf.Tensor) for w in before.values())

def test_a_frozen_part_that_was_changed_by_hand(still):
    model = freeze(make(still), "layer_0", "heads/mood")
    kernel = model.encoder.transformer_layers[0].up.kernel
    kernel.assign(np.nextafter(array(kernel), np.inf))
    with pytest.raises(RuntimeError, match="encoder/layer_0/up/kernel.*unfreeze and freeze again"): freeze_report(model)
    freeze(model, "layer_0", "embeddings") # doesn't hide it
    with pytest.raises(RuntimeError, match="up/kernel"): freeze_report(model)
    unfreeze(model, "heads/mood") # nor does that
    with pytest.raises(RuntimeError, match="up/kernel"): freeze_report(model)
    assert len(freeze_report(freeze(unfreeze(model, "layer_0"), "layer_0")))

def test_weights_that_learned_in_between_by_the_means_of_keras(still):
    "No false alarm: they weren't frozen when they moved."
    model = freeze(make(still), "encoder")
    model.sentence_transformer.trainable = True
    model.compile(keras.optimizers.SGD(0.1))
    train(model)
    assert freeze_report(freeze(model, "encoder")).trainable["encoder/layer_0"] == 0

def test_a_thawed_part_may_move(still):
    model = unfreeze(freeze(make(still), "encoder"), "layer_0")
    train(model)
    assert freeze_report(model).trainable["encoder/layer_0"] > 0

# ---- dropout

def test_dropout_of_frozen_parts_is_off(noisy):
    model = make(noisy)
    ids = inputs(model)
    def vectors(training): return array(model.sentence_transformer(ids, training=training))
    assert not np.allclose(vectors(True), vectors(False))
    freeze(model, "encoder")
    assert np.array_equal(vectors(True), vectors(False))
    for part in ("embeddings", "layer_0", "layer_1"):
        unfreeze(model, part)
        assert not np.allclose(vectors(True), vectors(False)), part
        freeze(model, part)
        assert np.array_equal(vectors(True), vectors(False)), part
    unfreeze(model, "everything")
    assert not np.allclose(vectors(True), vectors(False))

def test_dropout_below_a_thawed_layer_is_off(noisy):
    "The tokens that the top layer gets are the same in training as after it."
    model = freeze(make(noisy), lowest=1)
    seen, top = [], model.encoder.transformer_layers[1]
    call = top.call
    top.call = lambda tokens, *args, **kwargs: (seen.append(array(tokens)), call(tokens, *args, **kwargs))[1]
    out = [array(model.sentence_transformer(inputs(model), training=t)) for t in (True, True, False)]
    assert len(seen) == 3 and np.array_equal(seen[0], seen[1]) and np.array_equal(seen[0], seen[2]) and not np.allclose(out[0], out[1])

# ---- vectors computed once

def test_traced_cached_vectors_change_nothing(noisy):
    "Several epochs, dropout before the heads, an optimizer with a memory."
    trained = [freeze(make(noisy, dropout=0.3, compiled_with=keras.optimizers.SGD(0.1, momentum=0.9)), "encoder") for _ in range(2)]
    before = weights_of(trained[0])
    for model, cache in zip(trained, (None, False)): train(model, 3, batch_size=3, cache_features=cache, seed=5)
    assert furthest(*trained) <= 1e-5 and moved(before, trained[0]) == names(model, "heads")

@pytest.mark.parametrize("cache, count", [(None, 1), (True, 1), (False, 0)])
def test_when_the_vectors_are_cached(noisy, count_calls, cache, count):
    calls = count_calls(SentenceTransformer, "vectors_of")
    model = freeze(make(noisy), "encoder")
    found = train(model, 2, cache_features=cache, validation_data=table.head(3)).history
    assert len(calls) == 2*count and len(found["val_loss"]) == 2
    other = freeze(make(noisy), "encoder")
    assert found["val_loss"] == pytest.approx(train(other, 2, cache_features=False, validation_data=other.batches(table.head(3), shuffle=False)).history["val_loss"], abs=1e-5)

def test_the_vectors_are_cached_only_where_that_is_valid(pair):
    model = make(pair)
    batch = model.batches(table, batch_size=8)[0]
    data = batch[0], batch[1]
    for prepare, kwargs in ((lambda: None, {}), (lambda: freeze(model, lowest=1), {}), (lambda: freeze(model, "encoder"), dict(callbacks=[GradualUnfreezing()]))):
        prepare()
        with pytest.raises(ValueError, match="cache_features=True needs"): train(model, cache_features=True, **kwargs)
    with pytest.raises(ValueError, match="cache_features=True needs"): model.fit(*data, cache_features=True, verbose=0)
    before = weights_of(model)
    model.fit(*data, verbose=0) # what is no table is trained on as it is
    assert moved(before, model) == names(model, "heads")
    model.fit(*data, validation_data=model.batches(table), verbose=0)
    unfreeze(model, "encoder/layer_1/attention/out/bias") # one vector is enough
    with pytest.raises(ValueError, match="cache_features=True needs"): train(model, cache_features=True)

def test_what_is_said_of_it(still, capsys):
    model = make(still)
    said = lambda **kwargs: (model.fit(table, **kwargs), capsys.readouterr().out)[1]
    assert "encoder is frozen" not in said()
    freeze(model, "encoder")
    assert "vectors of 8 texts are computed once" in said() and "vectors of 8 texts" in said(verbose=2)
    assert said(verbose=0) == "" and "computed once" not in said(cache_features=False)

def test_thawing_while_the_vectors_are_cached(still):
    model = freeze(make(still), "encoder")
    with pytest.raises(RuntimeError, match="cache_features=False"): train(model, 2, callbacks=[At(1, lambda m: unfreeze(m, "layer_0"))])
    assert frozen(model) == names(model, "encoder") # nothing is left half done
    unfreeze(model, "layer_0")
    before = weights_of(model)
    train(model)
    assert moved(before, model) == names(model, "layer_0", "heads")

def test_traced_thawing_on_the_way_as_the_message_advises(still):
    model, watch = freeze(make(still), "encoder"), Watch()
    train(model, 2, cache_features=False, callbacks=[At(1, lambda m: unfreeze(m, "layer_0")), watch])
    assert watch.moved == [names(model, "heads"), names(model, "heads", "layer_0")]

def test_traced_freezing_on_the_way(still):
    model, watch = make(still), Watch()
    train(model, 2, callbacks=[At(1, lambda m: freeze(m, "embeddings")), watch])
    assert watch.moved == [set(named_weights(model)), set(named_weights(model)) - names(model, "embeddings")]

def test_traced_the_encoder_learns_after_a_training_on_cached_vectors(still):
    model = freeze(make(still), "encoder")
    batches = model.batches(table, batch_size=8)
    model.fit(batches, verbose=0)
    unfreeze(model, "encoder")
    before = weights_of(model)
    model.fit(batches, verbose=0)
    assert moved(before, model) == set(before)

def test_batches_don_t_keep_vectors_that_are_out_of_date(still):
    "After a training on cached vectors, then one of the encoder, the same batches are scored with the encoder as it is now."
    model = freeze(make(still), "encoder")
    batches, validation = (model.batches(table, batch_size=8, shuffle=False) for _ in range(2))
    model.fit(batches, validation_data=validation, verbose=0)
    unfreeze(model, "encoder")
    train(model, 3)
    fresh = model.evaluate(model.batches(table, batch_size=8, shuffle=False), verbose=0, return_dict=True)
    for old in (batches, validation): assert model.evaluate(old, verbose=0, return_dict=True)["loss"] == pytest.approx(fresh["loss"], abs=1e-6)

def test_a_training_that_broke_off_while_the_vectors_were_computed(still, monkeypatch):
    "The model is as good as before."
    model = freeze(make(still), "encoder")
    with monkeypatch.context() as patched:
        patched.setattr(SentenceTransformer, "vectors_of", lambda *args, **kwargs: 1/0)
        with pytest.raises(ZeroDivisionError): train(model)
    assert not frozen(unfreeze(model, "encoder"))

# ---- thawing from the top down

@pytest.mark.parametrize("settings, joins", [({}, [0, 1, 2, 3, 4]), (dict(start=0), [1, 2, 3, 4]), (dict(layers_per_epoch=2), [0, 2, 4]), (dict(layers_per_epoch=3, start=2), [0, 0, 3, 4]), (dict(start=9), [0, 0])],
    ids=["default", "at once", "two", "three, late", "never"])
def test_layers_join_from_the_top_down(deep, settings, joins):
    "What can learn in each epoch, and what moved in it."
    model, watch = make(deep), Watch()
    train(model, len(joins), callbacks=[GradualUnfreezing(**settings), watch])
    stack = ["layer_2", "layer_1", "layer_0", "embeddings"]
    expected = [names(model, "heads", *stack[:n]) for n in joins]
    assert watch.trainable == expected and watch.moved == expected

def test_traced_layers_join_one_after_another(pair):
    model, watch = make(pair), Watch()
    train(model, 3, callbacks=[GradualUnfreezing(start=0), watch])
    assert watch.moved == [names(model, "heads", *["layer_1", "layer_0", "embeddings"][:n]) for n in (1, 2, 3)]

def test_a_second_training_begins_anew_and_a_continued_one_goes_on(pair):
    model, watch, gradual = make(pair), Watch(), GradualUnfreezing(start=0)
    train(model, 1, callbacks=[gradual, watch])
    train(model, 2, callbacks=[gradual, watch])
    train(model, 3, initial_epoch=2, callbacks=[gradual, watch])
    assert watch.moved == [names(model, "heads", *["layer_1", "layer_0", "embeddings"][:n]) for n in (1, 1, 2, 3)]
    assert watch.trainable == watch.moved and len(freeze_report(model))

def test_frozen_heads_stay_frozen_while_the_encoder_thaws(pair):
    model, watch = freeze(make(pair), "heads/mood"), Watch()
    train(model, 2, callbacks=[GradualUnfreezing(), watch])
    assert watch.moved == [names(model, "heads/topic"), names(model, "heads/topic", "layer_1")]

@pytest.mark.parametrize("settings", [dict(layers_per_epoch=0), dict(layers_per_epoch=-1), dict(start=-1)])
def test_arguments_that_make_no_sense(settings):
    with pytest.raises(ValueError, match="at least 1 and 0"): GradualUnfreezing(**settings)

# ---- weights that join late, and rates of their own

def by_hand(w, gradients, rates, decay=0.0, factor=1.0, b1=0.9, b2=0.999, epsilon=1e-7):
    "Adam with a count of steps of its own, after Kingma & Ba 2015, in the form with epsilon hat; decoupled weight decay."
    w, m, v = w.astype("float64"), 0, 0
    for t, (g, rate) in enumerate(zip(gradients, rates), 1):
        m, v = b1*m + (1 - b1)*g, b2*v + (1 - b2)*g.astype("float64")**2
        w = w - rate*factor*decay*w
        w = w - rate*factor*np.sqrt(1 - b2**t)/(1 - b1**t) * m/(np.sqrt(v) + epsilon)
    return w

@pytest.mark.parametrize("wrapped", [False, True], ids=["AdamW", "scaled AdamW"])
def test_late_joiners_learn_like_first_comers(pair, wrapped):
    "Groups of weights join after 0, 3, 7 and 12 steps, one leaves and comes back; each follows Adam from where it joined."
    optimizer = AdamW(1e-2, weight_decay=0.1)
    model = freeze(make(pair, compiled_with=keras.mixed_precision.LossScaleOptimizer(optimizer) if wrapped else optimizer), "encoder")
    start, given, begun = weights_of(model), {n: [] for n in named_weights(model)}, {}
    def steps(n, seed):
        for step in fake_steps(model, n, seed):
            for name, g in step.items(): given[name].append(g)
    steps(3, 0)
    unfreeze(model, "layer_1"); steps(4, 1)
    unfreeze(model, "layer_0/attention"); steps(5, 2)
    freeze(model, "layer_1/up"); steps(2, 3)
    left = {n: weights_of(model)[n] for n in names(model, "layer_1/up")}
    for n in left: given[n] = []
    unfreeze(model, "layer_1/up"); steps(6, 4)
    assert {len(g) for g in given.values()} == {0, 20, 17, 13, 6}
    for name, w in weights_of(model).items():
        decay = 0 if name.split("/")[-1] in ("bias", "gamma", "beta") else 0.1
        assert np.allclose(w, by_hand(left.get(name, start[name]), given[name], [1e-2]*99, decay), atol=3e-6), name

def first_step(model):
    "How far a weight that joins after very many steps moves in its first one, over the learning rate."
    freeze(model, "layer_0")
    fake_steps(model)
    inner(model.optimizer)._iterations.assign(20_000)
    unfreeze(model, "layer_0")
    before = weights_of(model)["encoder/layer_0/up/kernel"]
    gradient = fake_steps(model, seed=1)[0]["encoder/layer_0/up/kernel"]
    step = weights_of(model)["encoder/layer_0/up/kernel"] - before
    assert (np.sign(step) == -np.sign(gradient)).all()
    return np.median(np.abs(step)) / 1e-3

def test_the_first_step_of_a_late_joiner(still): assert first_step(make(still, compiled_with=AdamW(1e-3, weight_decay=0.0))) == pytest.approx(1, rel=1e-2)

def test_the_first_step_of_a_late_joiner_without_the_fair_start(still):
    "Keras' own: 0.1/√0.001 times too far, as the correction for empty averages has long faded."
    assert first_step(make(still, compiled_with=keras.optimizers.AdamW(1e-3, weight_decay=0.0))) == pytest.approx(10**0.5, rel=1e-2)

def variables(seed=0):
    random = np.random.default_rng(seed)
    return [keras.Variable(random.normal(size=s), dtype="float32", name=n) for n, s in (("kernel", (5, 4)), ("bias", (4,)), ("gamma", (4,)), ("beta", (4,)), ("embeddings", (7, 3)))]

def descend(optimizer, steps, seed=0):
    "Random gradients on variables of five kinds."
    learning = variables()
    for step in range(steps):
        random = np.random.default_rng([seed, step])
        optimizer.apply([keras.ops.convert_to_tensor(random.normal(size=v.shape).astype("float32")) for v in learning], learning)
    return [array(v) for v in learning]

@pytest.mark.parametrize("settings", [{}, dict(global_clipnorm=1.0), dict(learning_rate=WarmupLinear(1e-2, 20)), dict(weight_decay=0.5, amsgrad=True), dict(weight_decay=0.0), dict(beta_1=0.5, beta_2=0.9, epsilon=1e-3), dict(gradient_accumulation_steps=2)],
    ids=["plain", "clipped", "schedule", "amsgrad", "no decay", "betas", "accumulating"])
def test_without_factors_it_is_the_adamw_of_keras(settings):
    settings = {"learning_rate": 1e-2, "weight_decay": 0.1, **settings}
    ours, theirs = descend(AdamW(**settings), 20), descend(excluding(keras.optimizers.AdamW(**settings)), 20)
    assert max(np.abs(a - b).max() for a, b in zip(ours, theirs)) <= 1e-6 < min(np.abs(a - array(v)).max() for a, v in zip(ours, variables()))

def test_without_factors_it_trains_a_model_as_keras_does(still):
    "Where Keras adds up the rows of the word embeddings' gradient, which it does when it clips; the length here is never reached."
    trained = [make(still, compiled_with=o) for o in (AdamW(1e-2, weight_decay=0.1, factors={}), excluding(keras.optimizers.AdamW(1e-2, weight_decay=0.1, global_clipnorm=1e6)))]
    for model in trained: train(model, batch_size=4)
    assert furthest(*trained) <= 1e-5 and furthest(trained[0], make(still)) > 1e-3

def test_factors_by_hand():
    "On the rate and on the decay alike."
    factors = {"kernel": 0.5, "bias": 2.0, "embeddings": 0.25, "elsewhere": 7.0}
    found = descend(AdamW(1e-2, weight_decay=0.3, factors=factors), 8)
    for i, v in enumerate(variables()):
        gradients = [[random.normal(size=u.shape).astype("float32") for u in variables()][i] for random in (np.random.default_rng([0, s]) for s in range(8))]
        expected = by_hand(array(v), gradients, [1e-2]*8, 0.3 if v.name in ("kernel", "embeddings") else 0, factors.get(v.name, 1.0))
        assert np.allclose(found[i], expected, atol=2e-6), v.name

def test_a_factor_of_0_stops_a_weight():
    found = descend(AdamW(1e-2, weight_decay=0.5, factors={"kernel": 0, "gamma": 0.0}), 10)
    assert [np.array_equal(w, array(v)) for w, v in zip(found, variables())] == [True, False, True, False, False]

def test_the_first_step_is_proportional_to_the_factor(still):
    "In a real training step, with clipping."
    steps = {}
    for factor in (1.0, 0.1, 3.0, 0.0):
        model = make(still)
        model.compile(adamw(1e-3, weight_decay=0.0, factors=rate_factors(model, {"layer_0": factor})))
        before = weights_of(model)
        train(model)
        steps[factor] = {n: np.linalg.norm(w - before[n]) for n, w in weights_of(model).items()}
    low = names(model, "layer_0")
    for factor in (0.1, 3.0, 0.0):
        for n in steps[1.0]: assert steps[factor][n] == pytest.approx(steps[1.0][n]*(factor if n in low else 1), rel=1e-2), n

def test_weight_decay_is_scaled_by_the_factor():
    "With gradients of 0 there is nothing but decay."
    learning = variables()
    before, optimizer = [array(v) for v in learning], AdamW(1e-2, weight_decay=0.5, factors={"kernel": 0.2})
    optimizer.apply([keras.ops.zeros(v.shape) for v in learning], learning)
    for v, w, share in zip(learning, before, (0.2, 0, 0, 0, 1)): assert np.allclose(array(v), w*(1 - 1e-2*0.5*share), rtol=1e-6, atol=0), v.name

def test_settings_survive_being_written_down():
    optimizer = AdamW(WarmupLinear(1e-2, 20), weight_decay=0.2, factors={"kernel": 0.5}, beta_2=0.99, global_clipnorm=2.0)
    for again in (AdamW.from_config(optimizer.get_config()), keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))):
        assert type(again) is AdamW and again.get_config() == optimizer.get_config() and again.factors == {"kernel": 0.5}
        assert all(np.array_equal(a, b) for a, b in zip(descend(again, 5), descend(AdamW.from_config(optimizer.get_config()), 5)))

def test_factors_and_exclusions_survive_freezing(still):
    trained = []
    for disturbed in (False, True):
        model = make(still)
        model.compile(AdamW(1e-2, weight_decay=0.5, factors=rate_factors(model, {"layer_0": 0.1, "heads/mood": 0.0})))
        fake_steps(model, 2)
        if disturbed: unfreeze(freeze(model, "heads/topic"), "heads/topic")
        fake_steps(model, 2, seed=1)
        trained.append(weights_of(model))
    assert moved(*trained) == names(model, "heads/topic") and set(trained[0]) - moved(weights_of(make(still)), trained[1]) == names(model, "heads/mood")

def test_a_late_joiner_in_a_training_that_was_saved_and_restored(still, tmp_path):
    "Keras saves the optimizer with the weights, as BackupAndRestore does: the count of steps of each weight must be in it."
    def begin(): return freeze(make(still, compiled_with=AdamW(1e-2)), "layer_0")
    model, restored = begin(), begin()
    fake_steps(model, 30)
    unfreeze(model, "layer_0")
    fake_steps(model, 2, seed=1)
    model.save_weights(tmp_path/"state.weights.h5")
    unfreeze(restored, "layer_0")
    restored.optimizer.build(restored.trainable_variables)
    restored.load_weights(tmp_path/"state.weights.h5")
    assert not moved(weights_of(model), restored) and int(restored.optimizer.iterations) == 32
    for m in (model, restored): fake_steps(m, 3, seed=2)
    assert furthest(model, restored) < 1e-6

@pytest.mark.filterwarnings("ignore:Skipping variable loading")
def test_a_broken_off_and_restarted_thawing_goes_on_where_it_was(pair, tmp_path):
    def run(*more):
        watch = Watch()
        train(make(pair), 4, callbacks=[keras.callbacks.BackupAndRestore(tmp_path/"backup"), GradualUnfreezing(), watch, *more])
        return watch
    with pytest.raises(ZeroDivisionError): run(At(2, lambda m: 1/0))
    watch = run()
    everything = set(named_weights(watch.model))
    assert watch.moved == watch.trainable == [everything - names(watch.model, "embeddings"), everything]

@pytest.mark.parametrize("patterns, said", [({"layer_7": 1.0}, "Nothing in the model is called 'layer_7'"), ({"layer_0": 0.1, "attention": 0.2}, "encoder/layer_0/attention.*'layer_0' and by 'attention'"),
    ({"encoder": -0.1}, "'encoder' is -0.1"), ({"encoder": float("nan")}, "nan"), ({"encoder": float("inf")}, "inf"), ({"everything": 1, "heads/mood": 2}, "heads/mood/kernel.*'everything'")])
def test_factors_that_make_no_sense(reading, patterns, said):
    with pytest.raises(ValueError, match=said): rate_factors(reading, patterns)

def test_factors_belong_to_weights(reading):
    factors = rate_factors(reading, {"layer_0": 0.1, "heads": 5, "embeddings/word": 0})
    named = named_weights(reading)
    assert factors == {named[n].path: f for p, f in (("layer_0", 0.1), ("heads", 5), ("embeddings/word", 0)) for n in matching(reading, p)} and rate_factors(reading, {}) == {}

# ---- a low-rank change

def probe(model): return np.concatenate([model.sentence_transformer.encode(table.text.tolist()), *(model.logits(table.text.tolist()).values())], 1)

def test_traced_a_low_rank_change_from_beginning_to_end(still, tmp_path):
    "Nothing changes when it is added; it and the heads learn; nothing changes when it is saved or merged; then the model is a plain one."
    model = make(still, compiled_with=keras.optimizers.SGD(0.3))
    train(model)
    plain, first = weights_of(model), probe(model)
    assert add_lora(model, rank=2, alpha=4) is model
    assert np.abs(probe(model) - first).max() == 0
    new = set(named_weights(model)) - set(plain)
    assert len(new) == 4 and {n.split("/")[-1] for n in new} == {"lora_kernel_a", "lora_kernel_b"} and len(named_weights(model)) == len(model.weights)
    assert freeze_report(model).parameters.sum() == model.count_params() and set(named_weights(model)) - frozen(model) == new | names(model, "heads")
    before = weights_of(model)
    train(model, 3)
    assert moved(before, model) == new | names(model, "heads") and len(freeze_report(model, before))
    learned = probe(model)
    assert np.abs(learned - first).max() > 1e-3 # also what is computed by a compiled function
    model.save_pretrained(tmp_path/"saved")
    assert np.abs(probe(MultiTaskSentenceTransformer.from_pretrained(tmp_path/"saved")) - learned).max() <= 1e-6
    assert merge_lora(model) is model
    assert np.abs(probe(model) - learned).max() <= 1e-6
    assert set(named_weights(model)) == set(plain) and freeze_report(model).parameters.sum() == model.count_params() and frozen(model) == names(model, "encoder")
    assert moved(plain, model) - names(model, "heads") == {n for n in plain if n.endswith(("query_key_value/kernel", "attention/out/kernel"))}
    unfreeze(model, "encoder")
    before = weights_of(model)
    train(model)
    assert moved(before, model) == set(before) and np.abs(probe(model) - learned).max() > 1e-6

def test_another_low_rank_change_after_merging(pair):
    model = add_lora(make(pair, compiled_with=keras.optimizers.Adam(1e-2)), rank=2)
    train(model, 2)
    merge_lora(model)
    first = probe(model)
    add_lora(model, rank=3)
    assert np.abs(probe(model) - first).max() == 0 and len(names(model, "lora_kernel_a")) == 4
    before = weights_of(model)
    train(model, 2)
    assert moved(before, model) == names(model, "lora_kernel_*", "heads") and np.abs(probe(model) - first).max() > 1e-4
    learned = probe(model)
    assert np.abs(probe(merge_lora(model)) - learned).max() <= 1e-6

def test_the_low_rank_change_by_hand(still):
    model = add_lora(make(still, compiled_with=keras.optimizers.SGD(0.5)), rank=2, alpha=6)
    dense = model.encoder.transformer_layers[0].attention.query_key_value
    old = array(dense._kernel)
    train(model, 2)
    a, b = array(dense.lora_kernel_a), array(dense.lora_kernel_b)
    assert b.any() and np.array_equal(old, array(dense._kernel))
    merge_lora(model)
    assert np.allclose(array(dense.kernel), old + 3*(a @ b), atol=1e-6) and not dense.lora_enabled

def test_a_low_rank_change_at_the_wrong_time(pair):
    model = make(pair)
    with pytest.raises(ValueError, match="no low-rank change to merge"): merge_lora(model)
    for rank in (0, -1, 9):
        with pytest.raises(ValueError, match=f"rank is {rank}.* 8"): add_lora(model, rank=rank)
    assert not frozen(model) and not names(model, "encoder") & {n for n in named_weights(model) if "lora" in n}
    add_lora(model, rank=8)
    count = len(model.weights)
    with pytest.raises(ValueError, match="already.*merge_lora"): add_lora(model, rank=2)
    assert len(model.weights) == count
    merge_lora(model)
    with pytest.raises(ValueError, match="no low-rank change to merge"): merge_lora(model)

def test_a_low_rank_change_leaves_the_heads_as_they_were(pair):
    model = freeze(make(pair), "heads/mood", "layer_0")
    add_lora(model, rank=1)
    before = weights_of(model)
    train(model, 2)
    assert moved(before, model) == names(model, "heads/topic", "lora_kernel_?")
    merge_lora(model)
    assert frozen(model) == names(model, "encoder", "heads/mood") and len(freeze_report(model))

def test_a_hand_in_a_frozen_part_is_noticed_after_merging_too(pair):
    "Merging changes the attention projections; it is no excuse for the embeddings."
    model = add_lora(make(pair), rank=1)
    word = model.encoder.embeddings.word.embeddings
    word.assign(array(word) + 1)
    merge_lora(model)
    with pytest.raises(RuntimeError, match="embeddings/word"): freeze_report(model)

def test_a_low_rank_change_of_a_sentence_transformer_alone(pair):
    body = encoder_of(pair)
    first = body.encode(["good food", "a b"])
    add_lora(body, rank=2)
    assert np.array_equal(body.encode(["good food", "a b"]), first)
    for v in (v for n, v in named_weights(body).items() if n.endswith("lora_kernel_b")): v.assign(np.ones(v.shape))
    learned = body.encode(["good food", "a b"])
    assert np.abs(learned - first).max() > 1e-3
    merge_lora(body)
    assert np.abs(body.encode(["good food", "a b"]) - learned).max() <= 1e-5 and not any("lora" in n for n in named_weights(body))

def test_traced_a_merged_change_in_a_model_that_shares_the_encoder(still):
    "What was traced before would add it once more."
    model = add_lora(make(still, compiled_with=keras.optimizers.Adam(1e-1)), rank=2)
    other = model.with_task(Task("more", ["x", "y"]))
    other.compile()
    train(model, 2)
    rows = table.assign(more="x")
    score = lambda: other.evaluate(other.batches(rows, shuffle=False), verbose=0, return_dict=True)["loss"]
    learned = score()
    merge_lora(model)
    assert score() == pytest.approx(learned, abs=1e-5)

# ---- first the heads, then everything

def test_heads_then_all(pair):
    model, watch = make(pair), Watch()
    histories = heads_then_all(model, table, head_epochs=2, epochs=2, learning_rate=1e-3, batch_size=4, callbacks=[watch], verbose=0)
    assert [len(h.epoch) for h in histories] == [2, 2] and all(isinstance(h, keras.callbacks.History) for h in histories)
    assert watch.moved == [names(model, "heads")]*2 + [set(named_weights(model))]*2 and not frozen(model)

def test_heads_then_all_on_a_model_that_was_trained_before(still):
    model, watch = make(still), Watch()
    train(model)
    freeze(model, "layer_0")
    heads_then_all(model, [table[["text", "mood"]], table[["text", "topic"]]], head_epochs=1, epochs=1, learning_rate=1e-3, validation_data=table, callbacks=[watch], verbose=0)
    assert watch.moved == [names(model, "heads"), set(named_weights(model))]

def test_the_options_of_fit_are_heeded(still):
    "Those that lay out the batches too."
    uneven = pd.DataFrame({"text": list("abcdefghijklmnopqrst"), "mood": ["good"]*17 + [None]*3, "topic": [None]*17 + ["food"]*3})
    expected, found = make(still), make(still)
    options = dict(sampling="equal", by_length=False, seed=3)
    for rate, what, change in ((2e-3, "heads", freeze), (1e-3, "all", unfreeze)):
        change(expected, "encoder")
        batches = expected.batches(uneven, batch_size=8, **options)
        expected.compile(adamw(rate, steps=batches.num_batches))
        expected.fit(batches, verbose=0)
    heads_then_all(found, uneven, head_epochs=1, epochs=1, learning_rate=1e-3, batch_size=8, verbose=0, **options)
    assert furthest(expected, found) <= 1e-5
