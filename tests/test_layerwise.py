"""Layer-wise rates: each weight moves by the rate of its group and in no other way, through schedules, freezing, half precision and restarts. What a step does is measured, not read off the settings."""
import importlib.util, json, logging, runpy
from types import SimpleNamespace
import keras, matplotlib, numpy as np, pandas as pd, pytest, tensorflow as tf
from conftest import eager, python, write_bert
from mtst import Task
from mtst.freezing import GradualUnfreezing, add_lora, freeze, merge_lora, named_weights, part_of, rate_factors, unfreeze, weights_of
from mtst.layerwise import LayerwiseRates, RateLogger, depth_of, layerwise_rates, step_report, warmup_cosine
from mtst.multitask import AdamW, WarmupLinear, _steps_at_once
from test_freezing import At, array, excluding, fake_steps, frozen, furthest, make, moved, names, table, train, two_tasks
matplotlib.use("Agg")

logging.getLogger("tensorflow").setLevel("ERROR") # several models in one process: TensorFlow takes their graphs for retracing
pytestmark = pytest.mark.filterwarnings("ignore:.*run_functions_eagerly")

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "Encoders of 1, 3 and 12 layers, no dropout."
    return {depth: write_bert(tmp_path_factory.mktemp("depth")/str(depth), depth=depth, hidden_dropout_prob=0, attention_probs_dropout_prob=0) for depth in (1, 3, 12)}

@pytest.fixture(scope="module")
def models(folders):
    "One for each depth: compiled anew and moved by many tests, never frozen."
    return {depth: make(folder) for depth, folder in folders.items()}

eagerly = eager("traced")

@pytest.fixture
def half(request):
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy("float32")

def layered(model, decay=0.5, base=0.1, head_factor=1.0, patterns=None, weight_decay=0, **options):
    "Compile with layer-wise rates, large ones: then the rounding of the weights is far below them."
    rates = layerwise_rates(model, base, decay, head_factor, patterns)
    model.compile(rates.optimizer(weight_decay=weight_decay, **options))
    return rates

def push(model, steps=1):
    "Steps with a gradient of 1 or -1 for each weight, the same each time, so that Adam moves the weight by its rate each time. No forward pass is needed."
    for _ in range(steps):
        gradients = [np.random.default_rng(sum(map(ord, n))).choice([-1.0, 1.0], v.shape).astype("float32") for n, v in named_weights(model).items() if v.trainable]
        model.optimizer.apply([keras.ops.convert_to_tensor(g) for g in gradients], [v for v in named_weights(model).values() if v.trainable])

def by_hand(name, depth, decay, heads=1.0):
    "The factor of a weight, from its name."
    if name.startswith("encoder/embeddings"): return decay**depth
    return decay**(depth - 1 - int(name.split("/")[1].removeprefix("layer_"))) if name.startswith("encoder") else heads

def assert_moved_by(expected, model, before):
    "Every single weight by what is expected of its name, within a percent; by 0 to the bit."
    after = weights_of(model)
    for name, rate in expected.items():
        if not rate: assert np.array_equal(before[name], after[name]), name
        else: assert np.abs(after[name].astype("float64") - before[name]) == pytest.approx(np.full(before[name].shape, rate), rel=1e-2), name

def weighed(): return [Task("mood", ["bad", "good"], loss_weight=1000.0), Task("topic", ["food", "film", "shop"], loss_weight=1000.0)]

def ratio(*args): return step_report(*args)["moved ÷ rate"]

# ---- the promise: one step moves each group by its rate

@pytest.mark.parametrize("depth, decay, clipnorm", [(1, 0.65, 1.0), (1, 0.9, None), (1, 1.0, 1.0), (3, 0.65, None), (3, 0.9, 1.0), (3, 1.0, None), (12, 0.65, 1.0), (12, 0.9, None), (12, 1.0, 1.0)])
def test_each_weight_moves_by_its_rate(models, depth, decay, clipnorm):
    model = models[depth]
    rates = layered(model, decay, head_factor=3, clipnorm=clipnorm)
    before = weights_of(model)
    push(model)
    assert_moved_by({n: 0.1*by_hand(n, depth, decay, heads=3) for n in before}, model, before)
    report = step_report(model, before, rates)
    assert list(report.index) == list(rates.table.index) and report["moved ÷ rate"].to_numpy() == pytest.approx(1, rel=1e-2) and (report.rate == rates.table.rate).all()

@pytest.mark.parametrize("depth", [1, 3, 12])
def test_each_group_moves_by_its_rate_in_a_training_step(folders, depth):
    "With the gradients of real losses, those of words that occur often included; weighed up, and not made smaller by each random norm, so that twelve layers below they are still large against Adam's ε."
    model = make(folders[depth], weighed())
    for n, v in named_weights(model).items(): v.assign(keras.ops.ones(v.shape) if n.endswith("gamma") else v)
    rates, before = layered(model, 0.65, head_factor=3, clipnorm=None), weights_of(model)
    train(model)
    assert ratio(model, before, rates).to_numpy() == pytest.approx(1, rel=1e-2)

def test_patterns_take_the_place_of_the_depth(models):
    model, patterns = models[3], {"*/attention_norm": 0, "layer_1/up": 2, "heads/topic": 0.5, "word": 0.25}
    rates, before = layered(model, 0.5, head_factor=3, patterns=patterns), weights_of(model)
    push(model)
    special = {n: f for p, f in patterns.items() for n in names(model, p)}
    assert_moved_by({n: 0.1*special.get(n, by_hand(n, 3, 0.5, heads=3)) for n in before}, model, before)
    assert rates.table.factor.to_dict() == {"encoder/embeddings/word × 0.25": 0.25, "encoder/embeddings/position": 0.125, "encoder/embeddings/segment": 0.125, "encoder/embeddings/norm": 0.125,
        "encoder/layer_0 × 0.25": 0.25, "encoder/layer_0 × 0": 0, "encoder/layer_1 × 0.5": 0.5, "encoder/layer_1 × 0": 0, "encoder/layer_1 × 2": 2, "encoder/layer_2 × 1": 1, "encoder/layer_2 × 0": 0,
        "heads/mood": 3, "heads/topic × 0.5": 0.5}
    report = step_report(model, before, rates)
    still = report.index[report.rate == 0]
    assert (report.moved[still] == 0).all() and report["moved ÷ rate"][still].isna().all() and report["moved ÷ rate"].drop(still).to_numpy() == pytest.approx(1, rel=1e-2)

def test_the_report_tells_on_an_optimizer_that_scales_gradients(models):
    "The fault that all this is about: under Adam it changes nothing."
    model, rates = models[3], layerwise_rates(models[3], 0.01, 0.5)
    model.compile(keras.optimizers.Adam(0.01))
    before, learning = weights_of(model), model.trainable_variables
    model.optimizer.apply([keras.ops.full(v.shape, rates.factors[v.path]) for v in learning], learning)
    assert (ratio(model, before, rates)*rates.table.factor).to_numpy() == pytest.approx(1, rel=1e-2)

def test_the_report_counts_the_steps(models):
    model = models[3]
    rates, before = layered(model, 0.65), weights_of(model)
    push(model, 3)
    assert ratio(model, before, rates).to_numpy() == pytest.approx(3, rel=1e-2)

def test_the_report_looks_at_the_largest_percent(models):
    "One weight in a hundred may be moved by something else; two may not."
    model = models[3]
    rates, before = layered(model, 1.0), weights_of(model)
    push(model)
    kernel = model.encoder.transformer_layers[0].up.kernel
    for many, seen in ((5, False), (9, True)): # of 600
        spoiled = array(kernel).ravel()
        spoiled[:many] += 5
        kernel.assign(spoiled.reshape(kernel.shape))
        assert (ratio(model, before, rates)["encoder/layer_0"] > 1.01) == seen

# ---- a rate of 0

def test_a_rate_of_0_after_a_restore_with_momentum(folders, tmp_path):
    "Neither weight decay nor what Adam remembers moves a single bit."
    model, restored, still = make(folders[3]), make(folders[3]), ("layer_0", "word", "layer_2/down/bias", "heads/mood")
    layered(model, weight_decay=0.5)
    push(model, 5)
    model.save_weights(tmp_path/"state.weights.h5")
    layered(restored, weight_decay=0.5, patterns=dict.fromkeys(still, 0), clipnorm=None)
    restored.optimizer.build(restored.trainable_variables)
    restored.load_weights(tmp_path/"state.weights.h5")
    assert int(restored.optimizer.iterations) == 5 and all(np.abs(array(m)).min() > 0.001 for m in restored.optimizer._momentums) and not moved(weights_of(model), restored)
    before = weights_of(restored)
    fake_steps(restored, 10)
    assert moved(before, restored) == set(before) - names(restored, *still) and int(restored.optimizer.iterations) == 15

@pytest.mark.parametrize("half", ["mixed_bfloat16", "mixed_float16"], indirect=True)
def test_a_rate_of_0_in_half_precision(folders, half):
    "In training; ten steps, half of them before."
    model = make(folders[1])
    layered(model, base=1e-2, weight_decay=0.5)
    train(model, 2, batch_size=4)
    layered(model, base=1e-2, weight_decay=0.5, patterns={"layer_0/attention": 0, "embeddings": 0})
    before = weights_of(model)
    train(model, 5, batch_size=4)
    assert int(model.optimizer.iterations) == 10 and moved(before, model) == set(before) - names(model, "layer_0/attention", "embeddings")

def test_a_base_rate_of_0(models):
    model = models[1]
    before = weights_of(model)
    for schedule in ("linear", "cosine"):
        layered(model, base=0, weight_decay=0.5, steps=4, schedule=schedule)
        push(model, 2)
    assert not moved(before, model)

# ---- without a decay: the plain optimizer

class Given(keras.optimizers.schedules.LearningRateSchedule):
    "Rates worked out by hand."
    def __init__(self, rates): self.rates = np.array(rates, "float32")
    def __call__(self, step): return keras.ops.take(self.rates, keras.ops.cast(step, "int32"))

def rates_by_hand(schedule, steps, warmup):
    "Of each step, over the peak: up in equal steps, then down to where step number `steps` + 1 would be 0."
    if schedule == "linear":
        rise = max(1.0, warmup*steps)
        return [t/rise if t <= rise else (steps + 1 - t)/(steps + 1 - rise) for t in range(1, steps + 1)]
    rise = max(1, round(warmup*steps))
    return [t/rise if t <= rise else (1 + np.cos(np.pi*(t - rise)/(steps + 1 - rise)))/2 for t in range(1, steps + 1)]

@pytest.mark.parametrize("schedule", [None, "linear", "cosine"])
def test_without_decay_it_is_the_adamw_of_keras(folders, schedule):
    ours, theirs = make(folders[1]), make(folders[1])
    options = dict(steps=20, schedule=schedule) if schedule else {}
    layered(ours, decay=1.0, base=1e-2, weight_decay=0.3, **options)
    rate = Given([1e-2*r for r in rates_by_hand(schedule, 20, 0.1)]) if schedule else 1e-2
    theirs.compile(excluding(keras.optimizers.AdamW(rate, weight_decay=0.3, global_clipnorm=1.0)))
    for model in (ours, theirs): fake_steps(model, 20)
    assert furthest(ours, theirs) <= 1e-6 and furthest(ours, make(folders[1])) > 1e-2

def test_traced_without_decay_it_trains_as_keras_does(folders):
    "Twenty steps of a real training, each rounded in its own order. Without weight decay: Adam makes whole steps of what rounding leaves of gradients of 0."
    ours, theirs = make(folders[1]), make(folders[1])
    layered(ours, decay=1.0, base=1e-3, steps=20)
    theirs.compile(keras.optimizers.AdamW(WarmupLinear(1e-3, 20), weight_decay=0, global_clipnorm=1.0))
    for model in (ours, theirs): train(model, 10, batch_size=4)
    assert int(ours.optimizer.iterations) == 20 and furthest(ours, theirs) <= 2e-6 and furthest(ours, make(folders[1])) > 1e-3

def test_words_that_occur_often_step_by_their_rate(folders):
    "On TensorFlow a gradient comes for each occurrence. Keras' own AdamW squares them before they are added up, unless it clips."
    rows = table.assign(text=["good good good food", "food food food food"]*4)
    def furthest_word(optimizer):
        model = make(folders[1], compiled_with=optimizer)
        before = weights_of(model)["encoder/embeddings/word/embeddings"]
        train(model, rows=rows)
        return np.abs(weights_of(model)["encoder/embeddings/word/embeddings"] - before).max() / 0.1
    assert furthest_word(AdamW(0.1, weight_decay=0)) == pytest.approx(1, rel=1e-3) and furthest_word(keras.optimizers.AdamW(0.1, weight_decay=0)) > 1.5
    assert furthest_word(AdamW(0.1, weight_decay=0, global_clipnorm=1.0)) <= 1.001

@pytest.mark.parametrize("graph", ["eager", "traced"])
def test_a_word_three_times_in_a_row(graph):
    "√3 times too far with Keras' own."
    def first_steps(optimizer):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.layers.Input((4,), dtype="int32"), keras.layers.Embedding(5, 8, name="word"), keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(1)])
        model.compile(optimizer, "mse", jit_compile=False)
        before = model.get_layer("word").embeddings.numpy()
        model.fit(np.array([[1, 1, 1, 2]]), np.array([[3.0]]), verbose=0)
        return np.abs(model.get_layer("word").embeddings.numpy() - before).max(1)
    assert first_steps(AdamW(0.01, weight_decay=0)) == pytest.approx([0, 0.01, 0.01, 0, 0], rel=1e-3) and first_steps(keras.optimizers.AdamW(0.01, weight_decay=0)) == pytest.approx([0, 0.01*3**0.5, 0.01, 0, 0], rel=1e-3)

# ---- schedules

@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps, warmup", [(10, 0.1), (8, 0.5), (5, 0), (3, 1), (2, 0.1), (1, 0.1)])
def test_the_rates_of_each_step_by_hand(models, schedule, steps, warmup):
    "Measured on three weights of different groups, that stand in a constant ratio; after the last step nothing moves."
    model = models[1]
    layered(model, 0.5, head_factor=4, steps=steps, warmup=warmup, schedule=schedule)
    model.optimizer.build(model.trainable_variables)
    watched, way = {n: named_weights(model)[n] for n in ("encoder/embeddings/position/embeddings", "encoder/layer_0/down/bias", "heads/mood/bias")}, []
    for _ in range(steps + 1):
        before = [array(v) for v in watched.values()]
        model.optimizer.apply([keras.ops.ones(v.shape) for v in watched.values()], list(watched.values()))
        way.append([float((b - array(v)).ravel()[0]) for b, v in zip(before, watched.values())])
    expected = np.outer([*rates_by_hand(schedule, steps, warmup), 0], [0.05, 0.1, 0.4])
    assert np.array(way) == pytest.approx(expected, rel=1e-3, abs=1e-6) and (expected[:-1] > 1e-4).all()

@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_training_shorter_than_its_warm_up(models, schedule):
    layered(models[1], steps=100, warmup=0.5, schedule=schedule)
    seen = []
    for _ in range(3):
        seen.append(float(models[1].optimizer.learning_rate))
        push(models[1])
    assert seen == pytest.approx([0.002, 0.004, 0.006], rel=1e-5)

def test_without_steps_the_rates_are_constant(models):
    layered(models[1])
    push(models[1], 2)
    assert float(models[1].optimizer.learning_rate) == pytest.approx(0.1)

@pytest.mark.parametrize("steps", [None, 10])
def test_unknown_schedule(models, steps):
    with pytest.raises(ValueError, match="'sawtooth'.*linear, cosine"): layerwise_rates(models[1]).optimizer(steps=steps, schedule="sawtooth")

def test_the_cosine_survives_being_written_down():
    again = keras.saving.deserialize_keras_object(json.loads(json.dumps(keras.saving.serialize_keras_object(warmup_cosine(0.3, 9, 0.4)))))
    assert [float(again(i)) for i in range(10)] == pytest.approx([0.3*r for r in [*rates_by_hand("cosine", 9, 0.4), 0]], abs=1e-7)

# ---- with freezing

orders = ["freeze compile push unfreeze push push", "compile freeze push unfreeze push", "compile push freeze push push unfreeze push freeze push", "compile push freeze compile push unfreeze push", "freeze unfreeze compile push push freeze push"]
@pytest.mark.parametrize("order", orders, ids=[o.replace(" ", "-") for o in orders])
def test_freezing_in_any_order(folders, order):
    "In each step the frozen parts stay to the bit, and every other weight moves by its rate, whether it stayed or has just joined."
    model, what = make(folders[3]), ("layer_1", "word", "heads/mood")
    for step in order.split():
        if step == "compile": layered(model, 0.65, head_factor=2, clipnorm=None) # else freezing changes the common length
        elif step == "push":
            before = weights_of(model)
            push(model)
            assert_moved_by({n: 0 if n in frozen(model) else 0.1*by_hand(n, 3, 0.65, heads=2) for n in before}, model, before)
        else: {"freeze": freeze, "unfreeze": unfreeze}[step](model, *what)

def test_frozen_parts_are_not_decayed_either(folders):
    model = freeze(make(folders[1]), "layer_0")
    layered(model, weight_decay=0.5)
    before = weights_of(model)
    push(model, 3)
    assert moved(before, model) == set(before) - names(model, "layer_0")

def test_layers_that_join_step_by_step_take_their_own_rate(folders):
    "Each a fair first step, as if it had been there from the start."
    model, seen = make(folders[3], weighed()), []
    rates = layered(model, 0.65, base=1e-3, head_factor=2, clipnorm=None)
    class Reports(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None): self.before = weights_of(self.model)
        def on_epoch_end(self, epoch, logs=None): seen.append(ratio(self.model, self.before, rates))
    train(model, 3, callbacks=[GradualUnfreezing(layers_per_epoch=2), Reports()])
    joining = [["heads/mood", "heads/topic"], ["encoder/layer_1", "encoder/layer_2"], ["encoder/layer_0", *(f"encoder/embeddings/{n}" for n in ("word", "position", "segment", "norm"))]]
    for i, groups in enumerate(joining):
        assert seen[i][groups].to_numpy() == pytest.approx(1, rel=1e-2) and (seen[i].drop(sum(joining[:i + 1], [])) == 0).all()

# ---- with other weights: low-rank changes, heads, balance

def test_a_low_rank_change_that_was_there_before(folders):
    model = add_lora(make(folders[3]), rank=2)
    rates, before = layered(model, 0.5), weights_of(model)
    push(model)
    new = {n for n in before if "lora" in n}
    assert len(new) == 12 and set(rates.groups) == set(before)
    assert_moved_by({n: 0.1*by_hand(n, 3, 0.5) if n in new or n.startswith("heads") else 0 for n in before}, model, before)
    assert all(rates.groups[n] == f"encoder/layer_{n.split('layer_')[1][0]}" for n in new)

def test_a_low_rank_change_that_came_later(folders):
    model = make(folders[1])
    rates, before = layered(model), weights_of(model)
    add_lora(model, rank=1)
    for old in (before, weights_of(model)):
        with pytest.raises(ValueError, match="anew.*LoRA"): step_report(model, old, rates)
    push(merge_lora(model))
    assert len(step_report(model, before, rates)) == len(rates.table)

def test_heads_that_come_and_go(folders):
    model = make(folders[1])
    rates, before = layered(model), weights_of(model)
    more, fewer = model.with_task(Task("more", ["x", "y"])), model.without_task("mood")
    for other in (more, fewer):
        for old in (before, weights_of(other)):
            with pytest.raises(ValueError, match="anew"): step_report(other, old, rates)
        new = layered(other, 0.5, head_factor=3)
        start = weights_of(other)
        push(other)
        assert_moved_by({n: 0.1*by_hand(n, 1, 0.5, heads=3) for n in start}, other, start)
        assert ratio(other, start, new).to_numpy() == pytest.approx(1, rel=1e-2)
        with pytest.raises(ValueError, match="`before`"): step_report(other, before, new)

@pytest.mark.parametrize("balance", ["uncertainty", "pcgrad"])
def test_balanced_tasks(folders, balance):
    "Without clipping: the log-variances' large gradients would leave little of the others."
    model = make(folders[3], balance=balance)
    rates, before = layered(model, 0.5, head_factor=3, clipnorm=None), weights_of(model)
    extra = [g for g in rates.table.index if "variance" in g]
    assert sorted(n for n in rates.groups if "variance" in n) == sorted(extra) and len(extra) == (2 if balance == "uncertainty" else 0) and (rates.table.factor[extra] == 3).all()
    train(model)
    assert ratio(model, before, rates).to_numpy() == pytest.approx(1, rel=1e-2)

# ---- half precision

@pytest.mark.parametrize("balance", [None, "pcgrad"])
@pytest.mark.parametrize("half", ["mixed_bfloat16", "mixed_float16"], indirect=True)
def test_half_precision_keeps_the_promise(folders, half, balance):
    "The weights stay float32; the logger reads the rate through the optimizer that scales the loss."
    model = make(folders[1], balance=balance)
    rates, before = layered(model, 0.5, base=1e-2, head_factor=3, steps=4, warmup=0.5), weights_of(model)
    logger = RateLogger(rates)
    assert isinstance(model.optimizer, keras.mixed_precision.LossScaleOptimizer) == (half == "mixed_float16") and {v.dtype for v in named_weights(model).values()} == {"float32"}
    history = train(model, callbacks=[logger])
    assert int(model.optimizer.iterations) == 1 and (2*ratio(model, before, rates)).to_numpy() == pytest.approx(1, rel=1e-2) # half of the warm-up
    assert train(model, 3, callbacks=[logger]).history["loss"][-1] < history.history["loss"][0]
    assert logger.table["encoder/layer_0"].to_numpy() == pytest.approx(np.array(rates_by_hand("linear", 4, 0.5))*1e-2, rel=1e-4)
    assert (logger.table["heads/mood"]/logger.table["encoder/layer_0"]).to_numpy() == pytest.approx(3)

# ---- saved, restored, interrupted

@pytest.mark.parametrize("options", [{}, dict(steps=9), dict(steps=9, schedule="cosine", warmup=0.4, clipnorm=None, weight_decay=0.2)], ids=["constant", "linear", "cosine"])
def test_the_optimizer_survives_being_written_down(folders, options):
    "As JSON, for a model that was made anew: Keras numbers the names of models within a process."
    model, again = make(folders[1]), make(folders[1])
    layered(model, 0.65, head_factor=3, patterns={"layer_0/up": 0}, **options)
    again.compile(keras.saving.deserialize_keras_object(json.loads(json.dumps(keras.saving.serialize_keras_object(model.optimizer)))))
    assert type(again.optimizer) is AdamW and again.optimizer.factors == model.optimizer.factors and again.optimizer.global_clipnorm == model.optimizer.global_clipnorm
    before = weights_of(model)
    for m in (model, again): push(m, 3)
    assert not moved(weights_of(model), again) and moved(before, model) == set(before) - names(model, "layer_0/up")

def test_rates_of_one_model_for_another_of_the_same_build(folders):
    "They hold there too, though Keras has given its weights other paths."
    model, other = make(folders[3]), make(folders[3])
    rates, before = layerwise_rates(model, 0.1, 0.5, head_factor=3), weights_of(other)
    assert not set(rates.factors) & {v.path for v in other.weights}
    other.compile(rates.optimizer(weight_decay=0))
    push(other)
    assert_moved_by({n: 0.1*by_hand(n, 3, 0.5, heads=3) for n in before}, other, before)

def test_an_interrupted_training_ends_like_an_undisturbed_one(folders, tmp_path):
    "Broken off after the first of three epochs, taken up by a new model."
    def run(backup, *more):
        model = make(folders[1], dropout=0.3)
        rates = layered(model, 0.5, base=1e-2, head_factor=3, weight_decay=0.1, steps=6, schedule="cosine", warmup=0.5)
        logger = RateLogger(rates)
        train(model, 3, batch_size=4, callbacks=[keras.callbacks.BackupAndRestore(tmp_path/backup), logger, *more])
        return model, logger.table
    with pytest.raises(ZeroDivisionError): run("broken", At(1, lambda m: 1/0))
    (resumed, rest), (undisturbed, all_) = run("broken"), run("whole")
    assert furthest(resumed, undisturbed) <= 1e-6 < furthest(resumed, make(folders[1], dropout=0.3))
    assert list(rest.index) == [2, 3, 4, 5] and np.allclose(rest, all_.iloc[2:], rtol=1e-6) and all_["encoder/layer_0"].to_numpy() == pytest.approx(1e-2*np.array(rates_by_hand("cosine", 6, 0.5)), rel=1e-5)

# ---- on JAX

one_step = '''
import sys
import keras, numpy as np, pandas as pd
from mtst import MultiTaskSentenceTransformer, SentenceTransformer, Task
from mtst.freezing import weights_of
from mtst.layerwise import RateLogger, layerwise_rates, step_report

rows = pd.DataFrame({"text": ["good food", "a b c", "food d e", "bad film a b c d"], "mood": ["good", "bad"]*2, "topic": ["food", "shop", "food", "film"]})
keras.utils.set_random_seed(0)
model = MultiTaskSentenceTransformer(SentenceTransformer.from_pretrained(sys.argv[1]), [Task("mood", ["bad", "good"]), Task("topic", ["food", "film", "shop"])], dropout=0)
for head in model.heads.values(): head.set_weights([np.random.RandomState(1).normal(size=w.shape) for w in head.get_weights()])
rates = layerwise_rates(model, 0.1, 0.5, 3)
model.compile(rates.optimizer(weight_decay=0, clipnorm=None))
before = weights_of(model)
model.fit(rows, batch_size=4, verbose=0)
after, report = weights_of(model), step_report(model, before, rates)
still = layerwise_rates(model, 0.1, 0.5, patterns={"layer_0": 0})
model.compile(still.optimizer(weight_decay=0.5, steps=6, schedule="cosine", warmup=0.5))
logger = RateLogger(still)
model.fit(rows, batch_size=2, epochs=3, verbose=0, callbacks=[logger])
last = weights_of(model)
stayed = [n for n in last if np.array_equal(after[n], last[n])]
np.savez(sys.argv[2], ratio=report["moved ÷ rate"], stayed=stayed, logged=logger.table["heads/mood"], **{n.replace("/", "|"): after[n] - before[n] for n in before})
'''
def test_on_jax_the_same_steps(folders, tmp_path, monkeypatch):
    "A step by step comparison with TensorFlow; a group at rate 0 stays to the bit; the logger sees the rate of each step."
    if not importlib.util.find_spec("jax"): pytest.skip("needs JAX, which mtst does not ask for")
    (tmp_path/"one_step.py").write_text(one_step)
    monkeypatch.setattr("sys.argv", ["", str(folders[3]), str(tmp_path/"tensorflow.npz")])
    runpy.run_path(str(tmp_path/"one_step.py"))
    ended = python(one_step, folders[3], tmp_path/"jax.npz", KERAS_BACKEND="jax")
    assert ended.returncode == 0, ended.stderr
    expected, found = (dict(np.load(tmp_path/f"{backend}.npz")) for backend in ("tensorflow", "jax"))
    assert found.keys() == expected.keys() and found["ratio"] == pytest.approx(1, rel=1e-2) == expected["ratio"]
    assert set(found["stayed"]) == set(expected["stayed"]) and len(found["stayed"]) == 12 and all("layer_0" in n for n in found["stayed"])
    for one in (found, expected): assert one["logged"] == pytest.approx(0.1*np.array(rates_by_hand("cosine", 6, 0.5)), rel=1e-5)
    for n in expected.keys() - {"ratio", "stayed", "logged"}: # where the gradient is more than the rounding of a sum that is 0
        clear = np.abs(expected[n]) > 0.99*np.abs(expected[n]).max()
        assert np.mean(np.isclose(found[n], expected[n], rtol=1e-2, atol=0)[clear]) > 0.9, n

# ---- watching the rates

def logged(model, rates, *callbacks, epochs=2, **options): return train(model, epochs, batch_size=4, callbacks=list(callbacks), **options).history

def test_a_row_per_step_and_a_value_per_epoch(folders, tmp_path):
    "In the history, in CSV files and in TensorBoard's, beside evaluations; only behind the logger in the list of callbacks."
    model = make(folders[1])
    rates = layered(model, 0.5, base=1e-2, head_factor=3, steps=6, warmup=0.5)
    logger, files = RateLogger(rates), [tmp_path/"before.csv", tmp_path/"after.csv"]
    evaluates = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: model.evaluate(model.batches(table), verbose=0))
    boards = [keras.callbacks.TensorBoard(tmp_path/"board")] if importlib.util.find_spec("tensorboard") else []
    history = logged(model, rates, keras.callbacks.CSVLogger(files[0]), evaluates, logger, keras.callbacks.CSVLogger(files[1]), *boards, validation_data=table)
    steps = 1e-2*np.array(rates_by_hand("linear", 6, 0.5))
    assert logger.table.shape == (4, len(rates.table)) and list(logger.table.columns) == list(rates.table.index) and logger.table.index.name == "step"
    assert logger.table.to_numpy() == pytest.approx(np.outer(steps[:4], rates.table.factor), rel=1e-4)
    for group, factor in rates.table.factor.items(): assert history[f"rate/{group}"] == pytest.approx(steps[[2, 4]]*factor, rel=1e-4) # of the step that comes next
    assert all(type(v) is float for v in history["rate/heads/mood"]) and {"val_loss", "loss"} <= set(history)
    before, after = map(pd.read_csv, files)
    assert not [c for c in before if c.startswith("rate/")] and after["rate/heads/mood"].tolist() == pytest.approx(history["rate/heads/mood"]) and len(after) == 2
    logged(model, rates, logger, epochs=3, initial_epoch=2) # goes on where it was
    assert logger.table["heads/mood"].to_numpy() == pytest.approx(3*steps, rel=1e-4) and list(logger.table.index) == list(range(6))
    if boards: assert board(tmp_path/"board"/"train", "epoch_rate/heads/mood") == pytest.approx(history["rate/heads/mood"])

def board(folder, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder))
    events.Reload()
    return [float(tf.make_ndarray(e.tensor_proto)) for e in events.Tensors(tag)]

def test_the_logger_follows_a_callback_that_sets_the_rate(folders):
    model = make(folders[1])
    rates = layered(model, 0.5, base=1e-2)
    logger = RateLogger(rates)
    history = logged(model, rates, keras.callbacks.LearningRateScheduler(lambda epoch, rate: 1e-2/(epoch + 1)), logger)
    assert logger.table["encoder/embeddings/word"].to_numpy() == pytest.approx([5e-3, 5e-3, 2.5e-3, 2.5e-3], rel=1e-5) and history["rate/encoder/layer_0"] == pytest.approx([1e-2, 5e-3], rel=1e-5)

def test_several_steps_at_once_are_logged_under_their_numbers(folders):
    model = make(folders[1])
    rates = layerwise_rates(model, 1e-2, 0.5)
    model.compile(rates.optimizer(steps=4, warmup=1), steps_per_execution=2)
    logger = RateLogger(rates)
    logged(model, rates, logger)
    assert list(logger.table.index) == [0, 2] and logger.table["heads/mood"].to_numpy() == pytest.approx([2.5e-3, 7.5e-3], rel=1e-5)

def test_the_logger_sees_each_step_of_heads_on_computed_vectors(models):
    "Where nobody watches, `fit` runs 25 steps at once."
    long = SimpleNamespace(num_batches=600)
    assert _steps_at_once(long, 1, []) == 25 and _steps_at_once(long, 1, [RateLogger(layerwise_rates(models[1]))]) == 1

# ---- each weight is in one group

@pytest.mark.parametrize("depth", [1, 3, 12])
@pytest.mark.parametrize("settings", [{}, dict(decay=1.0), dict(decay=0.3, head_factor=10), dict(patterns={"*/bias": 0, "layer_0/up/kernel": 3, "word": 0.9}), dict(patterns={"everything": 2}),
    dict(patterns={"layer_0/up": 0.12345671, "layer_0/down": 0.12345672})], ids=["plain", "no decay", "steep", "patterns", "everything", "nearly alike"])
def test_each_weight_is_in_exactly_one_group(models, depth, settings):
    "And the group's line in the table says what is true of each of its weights."
    model = models[depth]
    rates, named = layerwise_rates(model, 2e-3, **settings), named_weights(model)
    assert list(rates.groups) == list(named) and set(rates.groups.values()) == set(rates.table.index) and rates.table.index.is_unique
    assert set(rates.factors) == {v.path for v in model.weights} and len(rates.factors) == len(model.weights)
    assert rates.table.parameters.sum() == model.count_params() and (rates.table.rate == 2e-3*rates.table.factor).all()
    for n, v in named.items():
        row = rates.table.loc[rates.groups[n]]
        assert row.factor == rates.factors[v.path] and row.depth == depth_of(n, depth) and rates.groups[n].split(" × ")[0] == part_of(n)
    assert rates.table.parameters.to_dict() == {g: sum(int(np.prod(named[n].shape)) for n in named if rates.groups[n] == g) for g in rates.table.index}

def test_the_eleventh_layer_is_not_the_second(models):
    rates = layerwise_rates(models[12], 1e-3, 0.5, patterns={"layer_1": 7})
    assert [rates.table.factor[f"encoder/layer_{i}"] for i in (0, 2, 9, 10, 11)] == [0.5**11, 0.5**9, 0.25, 0.5, 1] and rates.table.factor["encoder/layer_1 × 7"] == 7
    assert {n for n, g in rates.groups.items() if g == "encoder/layer_1 × 7"} == names(models[12], "layer_1") and rates.table.depth.is_monotonic_increasing

def test_a_task_with_the_name_of_a_part_stays_on_top(folders):
    rates = layerwise_rates(make(folders[1], [Task("encoder", ["x", "y"]), Task("layer_0", ["x", "y"]), Task("embeddings", ["x", "y"])]), 1e-3, 0.5, head_factor=3)
    assert (rates.table.factor[["heads/encoder", "heads/layer_0", "heads/embeddings"]] == 3).all() and rates.table.parameters["encoder/layer_0"] == 600

@pytest.mark.parametrize("name, depth", [("encoder/embeddings/norm/gamma", 0), ("encoder/layer_0/up/bias", 1), ("encoder/layer_1/up/bias", 2), ("encoder/layer_10/up/bias", 11), ("encoder/layer_11/output_norm/beta", 12),
    ("heads/mood/kernel", 13), ("heads/layer_3/kernel", 13), ("heads/encoder/kernel", 13), ("log_variance_0", 13)])
def test_depths(name, depth): assert depth_of(name, 12) == depth

@pytest.mark.parametrize("name", ["encoder/pooler/kernel", "encoder/layer_x/up/kernel", "encoder/layer_/up/kernel", "encoder/layers/layer_0/up/kernel", "encoder/norm/gamma", "encoder/embedding/word"])
def test_a_weight_of_the_encoder_in_no_layer(name):
    with pytest.raises(ValueError, match=f"{name} is neither"): depth_of(name, 12)

# ---- settings that make no sense

nan, inf = float("nan"), float("inf")
@pytest.mark.parametrize("wrong, said", [(dict(decay=0), "decay is 0"), (dict(decay=-0.5), "decay is -0.5"), (dict(decay=1.0001), "decay is 1.0001.*at most 1"), (dict(decay=nan), "decay is nan"), (dict(decay=inf), "decay is inf"),
    *[(dict([(name, value)]), f"{name} is {value}") for name in ("base", "head_factor") for value in (-1e-9, nan, inf, -inf)],
    (dict(patterns={"layer_7": 2}), "Nothing in the model is called 'layer_7'.*encoder/layer_2"), (dict(patterns={"layer_1": 2, "*/attention": 3}), "layer_1/attention.*'layer_1' and by '\\*/attention'"),
    (dict(patterns={"layer_1": -1}), "'layer_1' is -1"), (dict(patterns={"heads": nan}), "nan"), (dict(patterns={"everything": 1, "encoder": 1}), "'everything' and by 'encoder'")])
def test_settings_out_of_range(models, wrong, said):
    with pytest.raises(ValueError, match=said): layerwise_rates(models[3], **wrong)

@pytest.mark.parametrize("model", [keras.Model, keras.Sequential, lambda: keras.Sequential([keras.layers.Dense(2)])], ids=["empty", "no layers", "not built"])
def test_a_model_without_weights(model):
    with pytest.raises(ValueError, match="no weights yet.*from_pretrained"): layerwise_rates(model())

def test_a_report_on_another_model(models, folders):
    one, three = models[1], models[3]
    rates, before = layerwise_rates(three), weights_of(three)
    for args in ((one, before, rates), (one, weights_of(one), rates), (three, weights_of(one), rates), (three, before, layerwise_rates(one)), (three, {}, rates)):
        with pytest.raises(ValueError, match="not those of the rates or of `before`"): step_report(*args)

def test_a_report_on_a_head_of_another_shape(models, folders):
    "With the same names; a head of one output would even be broadcast."
    other = make(folders[1], [Task("mood", ["bad", "good"], activation="sigmoid"), two_tasks()[1]])
    with pytest.raises(ValueError, match="`before`"): step_report(models[1], weights_of(other), layerwise_rates(models[1]))

# ---- for the eye

def test_the_table_and_the_pictures(models):
    from matplotlib import pyplot as plt
    rates = layerwise_rates(models[3], 1e-3, 0.5, head_factor=3, patterns={"layer_0": 0})
    assert all(group in repr(rates) for group in rates.table.index) and "1.0e-03" in repr(rates)
    figure = rates.plot()
    figure.canvas.draw()
    axes = figure.axes[0]
    assert axes.get_xscale() == "log" and [t.get_text() for t in axes.get_yticklabels()] == [g for g in rates.table.index if g != "encoder/layer_0 × 0"] and axes.get_xlabel() and axes.get_title()
    logger = RateLogger(rates)
    logger.peaks = {0: 1e-3, 1: 5e-4}
    lines = logger.plot().axes[0].lines
    assert sorted(line.get_ydata()[0] for line in lines) == pytest.approx(sorted(set(rates.table.rate))) and all(line.get_label() for line in lines)
    plt.close("all")

@pytest.mark.parametrize("settings", [dict(base=0), dict(patterns={"everything": 0})])
def test_nothing_to_draw(models, settings):
    with pytest.raises(ValueError, match="All rates are 0"): layerwise_rates(models[1], **settings).plot()
