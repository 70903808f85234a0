import json

import pytest

from jaxgpt.runs import metrics


@pytest.mark.parametrize("cut", [b"", b"{", b'{"kind": "train", "st', b'{"kind": "train", "step": 3}'])
def test_a_line_that_a_kill_cut_off_is_dropped_and_the_next_record_has_its_own(tmp_path, cut):
    whole = b'{"kind": "start", "step": 0}\n{"kind": "train", "step": 2}\n'
    (tmp_path / "metrics.jsonl").write_bytes(whole + cut)
    file = metrics.JsonLines(tmp_path / "metrics.jsonl")
    file({"kind": "start", "step": 2})
    file({"kind": "train", "step": 3, "loss": float("nan")})
    file.close()
    content = (tmp_path / "metrics.jsonl").read_bytes()
    assert content.startswith(whole)
    assert [json.loads(line)["step"] for line in content.splitlines()] == [0, 2, 2, 3]
    assert json.loads(content.splitlines()[-1])["loss"] is None


def test_what_fails_once_is_reported_once_and_not_called_again():
    calls = []

    def sink(record):
        calls.append(record)
        raise RuntimeError("gone")

    careful = metrics.optional("picture", sink)
    with pytest.warns(metrics.MetricsWarning, match=r"no picture \(RuntimeError: gone\)") as warned:
        for i in range(3):
            careful(i)
    assert calls == [0] and len(warned) == 1
    with pytest.raises(KeyboardInterrupt):  # a second Ctrl-C has its usual effect
        metrics.optional("picture", lambda: (_ for _ in ()).throw(KeyboardInterrupt()))()
