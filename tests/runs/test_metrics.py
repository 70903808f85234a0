import json

import pytest
from test_track import FINAL, START

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


@pytest.mark.parametrize("more, lines", [({}, ()), ({"peak_unknown": True}, ("MFU      unknown", "--run.peak_tflops"))])
def test_a_device_without_a_known_peak_has_a_remedy_on_the_screen(capsys, more, lines):
    metrics.Console(40)({**START, **more})
    said = capsys.readouterr().out
    assert all(line in said for line in lines) and ("MFU" in said) == bool(lines)


@pytest.mark.parametrize("command", ["sample", "chat"])
def test_the_last_line_names_the_command_to_go_on_with(capsys, command):
    metrics.Console(40)({**FINAL, "sample": "", "next": command})
    assert f"more     jaxgpt {command} --run r\n" in capsys.readouterr().out


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
