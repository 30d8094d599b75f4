"Multi-task sentence transformers in Keras. Names are imported when they are first used, so that `import mtst` is instant."
__version__ = "0.1.0"

_modules = {
    "data": ["load_reviews", "load_public", "read_table", "check_table"],
    "checkpoint": ["find_checkpoint", "download_default"],
    "sentence_transformer": ["SentenceTransformer", "BertEncoder"],
    "multitask": ["MultiTaskSentenceTransformer", "Task"],
    "freezing": ["freeze", "unfreeze", "freeze_report", "GradualUnfreezing", "heads_then_all", "add_lora", "merge_lora"],
    "layerwise": ["layerwise_rates", "step_report", "RateLogger"],
}
_where = {name: module for module, names in _modules.items() for name in names}
__all__ = list(_where)

def __getattr__(name):
    if name not in _where: raise AttributeError(f"module 'mtst' has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module("mtst." + _where[name]), name)

def __dir__(): return sorted([*globals(), *__all__])
