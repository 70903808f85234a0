"""Every file of a checkpoint that training wrote, damaged in five ways."""

import hashlib
import subprocess
import sys

import chex
import pytest
from etils import epath
from flax import nnx

import jaxgpt
from jaxgpt import cli
from jaxgpt.runs import manifest
from jaxgpt.runs.checkpoint import Checkpoints, CheckpointWarning

DAMAGES = {
    "halved": lambda data: data[: len(data) // 2],
    "emptied": lambda data: b"",
    "flipped": lambda data: data[: len(data) // 3] + bytes([data[len(data) // 3] ^ 4]) + data[len(data) // 3 + 1 :],
    "deleted": lambda data: None,
    "grown": lambda data: data + b"\n",
}


def put(path, data):
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damage_of_any_file_of_a_checkpoint_is_found(trained_copy, damage):
    files = sorted(path for path in (trained_copy / "checkpoints" / "40").rglob("*") if path.is_file())
    assert len(files) > 8 and {"manifest.json", "manifest.ocdbt", "_METADATA"} <= {path.name for path in files}
    for path in files:
        checkpoints, data = Checkpoints(trained_copy / "checkpoints"), path.read_bytes()
        assert checkpoints.find_damage(40) is None
        put(path, DAMAGES[damage](data))
        found = Checkpoints(trained_copy / "checkpoints").find_damage(40)
        assert found is not None and path.name in found, path
        put(path, data)


def test_a_changed_byte_anywhere_in_a_manifest_is_found(trained, tmp_path):
    data = (trained[0] / "checkpoints" / "40" / "manifest.json").read_bytes()
    folder = epath.Path(tmp_path)
    for i in range(0, len(data), 11):  # a prime: every kind of place and bit
        (tmp_path / "manifest.json").write_bytes(data[:i] + bytes([data[i] ^ 1 << i // 11 % 8]) + data[i + 1 :])
        with pytest.raises(manifest.DamagedError):
            manifest.read(folder)
    (tmp_path / "manifest.json").write_bytes(data)
    assert manifest.read(folder)["step"] == 40


def test_a_file_too_many_is_named_and_a_hidden_one_is_not_minded(trained_copy):
    folder = trained_copy / "checkpoints" / "40"
    (folder / "state" / ".DS_Store").write_bytes(b"\0")
    manifest.verify(epath.Path(folder))
    (folder / "state" / "more").write_bytes(b"\0")
    with pytest.raises(manifest.DamagedError, match="not part of this checkpoint: state/more"):
        manifest.verify(epath.Path(folder))


def test_on_an_object_store_files_are_compared_by_size_and_not_read_again(tmp_path, monkeypatch):
    folder = epath.Path(tmp_path)
    (folder / "array").write_bytes(b"12345")
    monkeypatch.setattr(manifest.storage, "is_remote", lambda path: True)
    with monkeypatch.context() as patch:
        opened = type(folder).open
        names = []
        patch.setattr(type(folder), "open", lambda self, *a, **k: names.append(self.name) or opened(self, *a, **k))
        manifest.write(folder, {"step": 1})
        manifest.verify(folder)
        assert "array" not in names
    assert manifest.read(folder)["files"] == {"array": {"size": 5, "sha256": None}}
    (folder / "array").write_bytes(b"1234")
    with pytest.raises(manifest.DamagedError, match="array has size 4, but was saved with 5"):
        manifest.verify(folder)


def test_a_file_that_may_not_be_read_is_not_taken_for_a_damaged_one(trained_copy, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(epath.Path(trained_copy)), "open", refuse)
    with pytest.raises(PermissionError):
        manifest.verify(epath.Path(trained_copy / "checkpoints" / "40"))


def test_the_manifest_says_what_the_checkpoint_was_made_with(trained):
    facts = Checkpoints(trained[0] / "checkpoints").manifest(40)
    assert facts["config"]["model.n_embd"] == 16 and facts["config"]["train.dtype"] == "float32"
    assert len(facts["corpus_sha256"]) == 64 and facts["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1}
    assert facts["circumstances"]["threads"] >= 1 and "jaxlib" in facts["circumstances"]["versions"]


def test_a_run_goes_back_to_the_newest_undamaged_checkpoint_and_ends_in_the_same_bits(trained, trained_copy):
    array = max((trained_copy / "checkpoints" / "40").rglob("*"), key=lambda path: path.stat().st_size)
    put(array, DAMAGES["flipped"](array.read_bytes()))
    config = jaxgpt.load_config([*trained[1], "--run.dir", str(trained_copy)])
    with pytest.warns(CheckpointWarning, match="checkpoint 40 is damaged"):
        again = jaxgpt.train(config)
    assert (trained_copy / "checkpoints" / "40.corrupt").is_dir()
    chex.assert_trees_all_equal(
        *(nnx.to_pure_dict(nnx.state(run.model)) for run in (again, jaxgpt.load(trained[0], 40)))
    )


def test_a_run_with_nothing_but_damaged_checkpoints_ends_with_4_each_time(trained, trained_copy, capsys):
    for path in (trained_copy / "checkpoints").rglob("_METADATA"):
        path.write_bytes(b"")
    before = (trained_copy / "metrics.jsonl").read_bytes()
    for _ in range(2):
        with pytest.warns(CheckpointWarning) if _ == 0 else pytest.MonkeyPatch.context():
            assert cli.main(["train", *trained[1], "--run.dir", str(trained_copy)]) == 4
        error = capsys.readouterr().err
        assert error.count("jaxgpt: error: ") == 1 and "30.corrupt, 40.corrupt" in error
    with pytest.MonkeyPatch.context():
        assert cli.main(["sample", "--run", str(trained_copy)]) == 4
    assert (trained_copy / "metrics.jsonl").read_bytes() == before


@pytest.mark.full
def test_a_warning_is_one_line_on_stderr(trained_copy):
    put(trained_copy / "checkpoints" / "40" / "state" / "_METADATA", b"")
    command = [sys.executable, "-m", "jaxgpt", "sample", "--run", str(trained_copy), "--max_new_tokens", "9"]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert done.returncode == 0 and len(lines) == 2, lines
    assert lines[0].startswith("jaxgpt: warning: checkpoint 40 is damaged") and lines[1].endswith("step 30")


@pytest.mark.parametrize(
    ("name", "old", "new"), [("config.yaml", "activation: relu", "activation: gelu"), ("tokenizer.json", "de", "ed")]
)
def test_small_files_that_are_not_the_checkpoint_s_are_refused(trained, trained_copy, capsys, name, old, new):
    text = (trained_copy / name).read_text()
    assert old in text
    (trained_copy / name).write_text(text.replace(old, new))
    assert cli.main(["sample", "--run", str(trained_copy)]) == 4
    assert "was changed since checkpoint 40" in capsys.readouterr().err
    assert cli.main(["train", *trained[1], "--run.dir", str(trained_copy)]) in (4, 6)  # 6 names the field
    assert (trained_copy / name).read_text() == text.replace(old, new)


def test_another_configuration_is_named_from_the_manifest_where_config_yaml_is_gone(trained, trained_copy, capsys):
    (trained_copy / "config.yaml").unlink()
    argv = ["train", *trained[1], "--run.dir", str(trained_copy)]
    assert cli.main([*argv, "--model.activation", "gelu", "--train.dtype", "bfloat16"]) == 6
    error = capsys.readouterr().err
    assert "train.dtype (was float32, now bfloat16)" in error and "\n" not in error.strip()


def test_another_text_is_refused_with_both_hashes(trained, trained_copy, capsys, text):
    was, file = Checkpoints(trained_copy / "checkpoints").manifest(40)["corpus_sha256"], trained[0].parent / "my.txt"
    for command, code in (
        (["train", *trained[1], "--run.dir", str(trained_copy)], 6),
        (["eval", "--run", str(trained_copy)], 3),
    ):
        file.write_text(text[:-1], encoding="utf-8")
        try:
            assert cli.main(command) == code
        finally:
            file.write_text(text, encoding="utf-8")
        error = capsys.readouterr().err
        assert was in error and hashlib.sha256(text[:-1].encode()).hexdigest() in error


def test_another_number_of_threads_or_version_continues_and_says_so(trained, trained_copy, monkeypatch):
    monkeypatch.setenv("NPROC", "77")
    config = jaxgpt.load_config([*trained[1], "--run.dir", str(trained_copy)])
    with pytest.warns(CheckpointWarning, match=r"last bits may differ .*threads was \d+, now 77"):
        jaxgpt.train(config)
