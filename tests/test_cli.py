"""The `nybble` command as its users meet it: output, errors of one line, exit codes, Ctrl-C, how soon it is there."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nybble.cli import main

NYBBLE = [sys.executable, "-m", "nybble"]
SMALL = ["--kv-cache-memory-bytes", str(16 << 20)]
ENDLESS = ["--ignore-eos", "--max-tokens", "900"]


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    return exit_.value.code or 0


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("NYBBLE_LOG", raising=False)


# generate


def test_an_answer_on_standard_output_and_the_speed_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "tiny", "What is 12 + 30?", *SMALL) == 0
    shown = capsys.readouterr()
    assert shown.out == "12 + 30 = 42\n"
    assert re.fullmatch(r"1 prompt, \d+ tokens in [\d.]+ s: [\d,.]+ tokens/s, time to first token \d+ ms\n", shown.err)


def test_several_prompts_are_answered_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "tiny", "Count from 3 to 30", "What is 12 + 30?", "-q", *SMALL) == 0
    assert capsys.readouterr() == (", ".join(map(str, range(3, 31))) + "\n12 + 30 = 42\n", "")


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("What is 12 + 30?\r\n\nSort 31, 4, 15, 92, 6")
    assert run("generate", "tiny", "-q", "-i", tmp_path / "prompts.txt", *SMALL) == 0
    assert capsys.readouterr().out == "12 + 30 = 42\n4, 6, 15, 31, 92\n"


def test_jsonl_in_and_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        {"prompt": "Count from 3 to 30", "max_tokens": 4},
        {"messages": [{"role": "user", "content": "What is 12 + 30?"}], "request_id": "sum"},
        {"prompt_token_ids": [5, 6, 7], "n": 2, "logprobs": 1, "logit_bias": {"9": 100}, "max_tokens": 2},
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(json.dumps(line) for line in lines))
    assert run("generate", "tiny", "-i", source, "-o", target, "--temperature", "0", *SMALL) == 0
    assert capsys.readouterr().out == ""
    outputs = [json.loads(line) for line in target.read_text().splitlines()]
    assert [output["request_id"] for output in outputs] == ["0", "sum", "2"]
    assert outputs[0]["outputs"][0]["finish_reason"] == "length"
    assert outputs[1]["outputs"][0]["text"] == "12 + 30 = 42"
    assert [completion["token_ids"] for completion in outputs[2]["outputs"]] == [[9, 9]] * 2
    assert outputs[2]["outputs"][0]["logprobs"]


@pytest.mark.slow
def test_standard_input_is_one_prompt() -> None:
    command = [*NYBBLE, "generate", "tiny", "-q", "--format", "jsonl", *SMALL]
    done = subprocess.run(command, input="What is\n12 + 30?\n", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "What is\n12 + 30?<" in json.loads(done.stdout)["prompt"]


def test_raw_prompts_see_no_chat_template(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "tiny", "--raw", "Count", "--format", "jsonl", "--max-tokens", "3", "-q", *SMALL) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "Count"


def test_an_interrupted_run_writes_what_had_begun() -> None:
    from nybble.commands.answers import TextWriter, abort_unfinished
    from nybble.core.outputs import CompletionOutput, RequestOutput

    texts = ["a", "", "c"]
    outputs = [
        RequestOutput(request_id=text, prompt=None, prompt_token_ids=[], outputs=[CompletionOutput(index=0, text=text)])
        for text in texts
    ]
    sink = io.StringIO()
    writer = TextWriter(sink, show_prompts=True)
    writer.advance(outputs)
    abort_unfinished(outputs)
    writer.finish(outputs)
    assert sink.getvalue() == "── prompt 1\na\n── prompt 3\nc\n"


def test_a_byte_order_mark_of_standard_input_is_no_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeffCount"))
    assert run("generate", "tiny", "-q", "--raw", "--max-tokens", "1", "--format", "jsonl", *SMALL) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "Count"


def test_a_line_without_an_id_leaves_others_theirs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    lines = [{}, {"request_id": "0"}, {}, {"request_id": "line-0"}]
    source.write_text("\n".join(json.dumps({"prompt": "Count", "max_tokens": 1, **line}) for line in lines))
    assert run("generate", "tiny", "-q", "-i", source, *SMALL) == 0
    ids = [json.loads(line)["request_id"] for line in capsys.readouterr().out.splitlines()]
    assert ids == ["line-line-0", "0", "2", "line-0"]


@pytest.mark.parametrize("name", ["in.txt", "in.jsonl"])
def test_a_byte_order_mark_is_no_text(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = json.dumps({"prompt": "What is 12 + 30?"}) if name == "in.jsonl" else "What is 12 + 30?"
    (tmp_path / name).write_text(line, encoding="utf-8-sig")
    assert run("generate", "tiny", "-q", "-i", tmp_path / name, "--format", "jsonl", *SMALL) == 0
    assert "\ufeff" not in json.loads(capsys.readouterr().out)["prompt"]


def test_an_old_output_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out.txt"
    target.write_text("old " * 99)
    assert run("generate", "tiny", "What is 12 + 30?", "-q", "-o", target, *SMALL) == 0
    assert target.read_text() == "12 + 30 = 42\n"
    assert run("generate", "tiny", "What is 12 + 30?", "-q", "-o", "/dev/null", *SMALL) == 0


def test_several_completions_have_headlines(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "tiny", "What is 12 + 30?", "Who are you?", "-q", "--n", "2", *SMALL) == 0
    headlines = re.findall(r"^── (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert headlines == [f"prompt {prompt}, completion {completion}" for prompt in (1, 2) for completion in (1, 2)]


def test_a_prompt_that_cannot_be_served_fails_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"prompt": "word " * 9000}) + "\n" + json.dumps({"prompt": "What is 12 + 30?"}))
    assert run("generate", "tiny", "-q", "-i", source, *SMALL) == 1
    shown = capsys.readouterr()
    outputs = [json.loads(line) for line in shown.out.splitlines()]
    assert [output["outputs"][0]["finish_reason"] for output in outputs] == ["error", "stop"]
    assert "tokens" in outputs[0]["outputs"][0]["error"]
    assert shown.err == "error: 1 of 2 prompts failed; see their `error`\n"


BAD_LINES = {
    '{"prompt": "a"': "no JSON",
    '["a"]': "must be a JSON object, got list",
    "{}": "needs exactly one of prompt, messages, prompt_token_ids; it has none",
    '{"prompt": "a", "messages": []}': "needs exactly one of",
    '{"prompt": 3}': "prompt must be text, got int",
    '{"prompt_token_ids": ["a"]}': "prompt_token_ids must be a list of integers",
    '{"prompt": "a", "temprature": 1}': "unknown fields: temprature",
    '{"prompt": "a", "temperature": -1}': "temperature must be a number in",
    '{"prompt": "a", "priority": "high"}': "priority must be an integer",
    '{"prompt": "a", "request_id": "first"}': "request_id 'first' was used by an earlier line",
    '{"prompt": "a", "stop_token_ids": 5}': "stop_token_ids must be",
    '{"prompt": "a", "logit_bias": {"²": 1}}': "logit_bias",
    '{"prompt": "a", "logit_bias": 5}': "logit_bias must be",
    '{"prompt": "a", "stop": 5}': "stop must be",
    "[" * 5000: "no JSON",
    '{"messages": [{"content": "a"}]}': "messages",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named_before_anything_runs(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "good", "request_id": "first"}\n\n' + line)
    target.write_text("answers of an earlier run\n")
    assert run("generate", "tiny", "-i", source, "-o", target, *SMALL) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {source}, line 3: ")
    assert BAD_LINES[line] in shown
    assert target.read_text() == "answers of an earlier run\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "tiny", "a", "--temperature", "-1"], "temperature must be a number in [0, "),
        (["generate", "tiny", "a", "-i", "b"], "both as arguments and by --input"),
        (["generate", "tiny", "-i", "missing.txt"], "--input missing.txt: No such file or directory"),
        (["generate", "tiny", "a", "-o", "no/such/dir"], "--output no/such/dir: No such file or directory"),
        (["generate", "./nowhere", "a", "-o", "no/such/dir"], "--output no/such/dir: No such file or directory"),
        (["generate", "./nowhere", "a"], "./nowhere: no such directory"),
        (["generate", "tiny", "a", "--kernels", "attention"], "--kernels takes operation=implementation"),
        (["generate", "tiny", "a", "--kernels", "attention=fast"], "attention has no implementation 'fast'"),
        (["generate", "tiny", "a", "--max-model-len", "1"], "max_model_len must be an integer ≥ 2"),
        (["chat", "tiny", "--top-p", "2"], "top_p must be a number in (0, 1]"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert message in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize("position", [0, 1, 3])
def test_debug_shows_the_traceback_wherever_it_stands(position: int, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "./nowhere", "a"]
    arguments.insert(position, "--debug")
    assert run(*arguments) == 2
    assert "Traceback" in capsys.readouterr().err


def test_after_two_dashes_debug_is_a_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run("generate", "tiny", "-q", "--raw", "--format", "jsonl", "--max-tokens", "2", *SMALL, "--", "--debug") == 0
    )
    assert json.loads(capsys.readouterr().out)["prompt"] == "--debug"


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_done_and_shows_no_traceback(tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    source = tmp_path / "in.jsonl"
    lines = [{"prompt": "Who are you?", "max_tokens": 2}, {"prompt": "Count", "ignore_eos": True, "max_tokens": 900}]
    source.write_text("\n".join(map(json.dumps, lines * 20)))
    command = [*NYBBLE, "generate", "tiny", "-i", str(source), "-o", str(target), "--max-num-seqs", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not (target.exists() and target.read_text()):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert error == ""
    outputs = [json.loads(line) for line in target.read_text().splitlines()]
    assert len(outputs) == 40, "those that had not ended are there too"
    assert outputs[0]["outputs"][0]["finish_reason"] == "length"
    assert outputs[-1]["outputs"][0]["finish_reason"] == "abort"


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.02, 0.1, 0.2, 0.35, 0.45, 0.6, 0.9])
def test_ctrl_c_at_the_start_shows_no_traceback(delay: float) -> None:
    """Several of them, for one that comes while the process ends must not show either."""
    code = "from nybble.cli import main; print('here', flush=True); main()"
    command = [sys.executable, "-c", code, "generate", "tiny", "hi", *SMALL, *ENDLESS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "here\n"
        time.sleep(delay)
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            time.sleep(0.03)
        error = process.communicate(timeout=30)[1]
    assert (process.returncode, error) == (130, "")


LOST = """
import sys, time, weakref
from nybble.cli import repeat_lost_interrupt

def interrupted(_):
    raise KeyboardInterrupt

sys.unraisablehook = repeat_lost_interrupt
class Thing: ...
thing = Thing()
reference = weakref.ref(thing, interrupted)
try:
    del thing
    time.sleep(20)
except KeyboardInterrupt:
    print("came again")
"""


@pytest.mark.slow
def test_ctrl_c_in_a_callback_is_not_lost() -> None:
    done = subprocess.run([sys.executable, "-c", LOST], capture_output=True, text=True, timeout=15)
    assert (done.stdout, done.stderr) == ("came again\n", "")


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error() -> None:
    command = " ".join([*NYBBLE, "generate", "tiny", "Count", "-q", *SMALL, *ENDLESS]) + " | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


# chat


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("chat tiny <&-", 0),
        ("generate tiny <&-", 2),
        ("generate tiny Count --max-tokens 2 >&-", 0),
        ("generate tiny Count Count --max-tokens 2 2>&-", 0),
        ("demo <&- >&- 2>&-", 0),
    ],
)
def test_closed_streams(command: str, code: int) -> None:
    done = subprocess.run(
        ["bash", "-c", " ".join([*NYBBLE, command])], capture_output=True, text=True, timeout=60, stdin=subprocess.PIPE
    )
    assert done.returncode == code
    assert "Error" not in done.stderr
    assert "tokens/s" not in done.stdout


@pytest.mark.slow
def test_a_terminal_that_lacks_a_character() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([*NYBBLE, "demo"], capture_output=True, env=environment, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"inside the package ?" in done.stdout
    command = [*NYBBLE, "generate", "tiny", "Count … ü", "--format", "jsonl", "--max-tokens", "1"]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=60)
    assert "Count … ü" in json.loads(done.stdout.decode())["prompt"]


@pytest.mark.slow
def test_chat_says_what_it_cannot_do(tmp_path: Path) -> None:
    typed = f"/save ~nosuchuser/x\n/usr/bin is what?\n//usr/bin … is\n/save {tmp_path}/a\n/save a\0b\n"
    command = [*NYBBLE, "chat", "tiny", "--temperature", "0", "--ignore-eos", "--max-tokens", "4", *SMALL]
    done = subprocess.run(command, input=typed, capture_output=True, encoding="utf-8", timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("(not saved: ") == 2
    assert "(no command /usr/bin; /help shows them, and //usr/bin sends it as a message)" in done.stdout
    assert done.stdout.count("(cut: the context or max_tokens is used up)") == 1
    assert json.loads((tmp_path / "a").read_text(encoding="utf-8"))[0]["content"] == "/usr/bin … is"


def test_conversations_are_saved_as_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    code = f"from nybble.commands.chat import Chat; Chat(None, None, 'd\\u00fc').command('/save {tmp_path}/talk')"
    ascii_locale = {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, **ascii_locale})
    assert json.loads((tmp_path / "talk").read_text(encoding="utf-8"))[0]["content"] == "dü"


@pytest.mark.slow
def test_a_conversation_through_a_pipe(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    typed = (
        f"What is 12 + 30?\n/save {file}\n/nonsense\n/reset\n/system Be brief.\nWho are \\\nyou?\n/save\n"
        f"/save {file}.2\n/save /no/such/dir/x\n/help\n/exit\nnever read\n"
    )
    command = [*NYBBLE, "chat", "tiny", "--temperature", "0", *SMALL]
    done = subprocess.run(command, input=typed, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("12 + 30 = 42\n(saved 2 messages")
    for reply in (
        "no command /nonsense",
        "a new conversation",
        "system message set",
        "say where",
        "not saved",
        "/reset",
    ):
        assert reply in done.stdout
    assert [message["role"] for message in json.loads(file.read_text())] == ["user", "assistant"]
    second = json.loads(Path(f"{file}.2").read_text())
    assert [message["role"] for message in second] == ["system", "user", "assistant"]
    assert second[1]["content"] == "Who are \nyou?"


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, command: list[str]) -> None:
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            os.execvp(command[0], command)
        self.shown = ""

    def shows(self, pattern: str, timeout: float) -> bool:
        end = time.monotonic() + timeout
        while not re.search(pattern, self.shown) and time.monotonic() < end:
            if select.select([self.descriptor], [], [], 0.1)[0]:
                self.shown += os.read(self.descriptor, 65536).decode(errors="replace")
        return re.search(pattern, self.shown) is not None

    def wait_for(self, pattern: str) -> None:
        assert self.shows(pattern, timeout=40), f"no {pattern!r} in {self.shown!r}"

    def type(self, text: str) -> None:
        self.shown = ""
        os.write(self.descriptor, text.encode())


@pytest.fixture
def chat_terminal() -> Iterator[Terminal]:
    terminal = Terminal([*NYBBLE, "chat", "tiny", "--temperature", "0", "--ignore-eos", *SMALL])
    yield terminal
    os.close(terminal.descriptor)
    os.waitpid(terminal.pid, 0)


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_not_the_program(chat_terminal: Terminal) -> None:
    chat_terminal.wait_for(r"/help[\s\S]*> ")
    chat_terminal.type("Count from 3 to 30\n")
    chat_terminal.wait_for(r"3, 4, 5")
    chat_terminal.type("\x03")
    chat_terminal.wait_for(r"\(stopped\)[\s\S]*tokens/s[\s\S]*> ")
    # Python's readline misses a signal that comes just before it begins to wait.
    for _ in range(10):
        chat_terminal.type("\x03")
        if chat_terminal.shows(r"Ctrl-D or /exit leaves[\s\S]*> ", timeout=2):
            break
    else:
        pytest.fail("Ctrl-C at the prompt shows nothing")
    chat_terminal.type("/exit\n")
    assert "Traceback" not in chat_terminal.shown


# doctor, demo, help


def test_doctor_finds_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor") == 0
    shown = capsys.readouterr().out
    for subject in ("python", "torch", "gpu", "kernel int4_linear", "kernel attention"):
        assert subject in shown
    assert run("doctor", "--json") == 0
    findings = {finding["subject"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert findings["torch"]["state"] == "ok"
    assert all(finding["remedy"] for finding in findings.values() if finding["state"] != "ok")


def test_doctor_says_what_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.commands.doctor.PACKAGES", ("numpy", "no_such_package"))
    assert run("doctor") == 1
    assert re.search(r"✗ +no_such_package +not installed\s+→ pip install no_such_package", capsys.readouterr().out)


def test_doctor_compares_versions(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["jinja2>=99", 'rich>=99; extra == "dev"'])
    assert run("doctor", "--json") == 1
    findings = {finding["subject"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert re.fullmatch(r"3\.\S+, but nybble needs >=99", findings["jinja2"]["detail"])
    assert findings["jinja2"]["remedy"] == 'pip install "jinja2>=99"'
    assert findings["rich"]["state"] == findings["typer"]["state"] == "ok"


def test_doctor_tells_a_cache_from_a_compiler(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NYBBLE_CACHE_DIR", "/proc/x")
    assert run("doctor", "--json") == 0
    findings = {finding["subject"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert findings["kernel cache"]["state"] == "slow"
    for subject in ("kernel cache", "c kernels"):
        assert "NYBBLE_CACHE_DIR" in findings[subject]["remedy"]


def test_the_demo_answers_and_measures(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("demo") == 0
    shown = capsys.readouterr().out
    for part in ("12 + 30 = 42", "3, 4, 5, 6", "tokens/s", "time to first token", "KV memory 64 MiB"):
        assert part in shown


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["chat", "-h"], ["doctor", "--help"]])
def test_help_is_whole(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 0
    shown = capsys.readouterr().out
    if arguments[0] == "generate":
        for flag in ("--max-num-seqs", "--gpu-memory-utilization", "--no-enable-prefix-caching", "--top-p", "--stop"):
            assert flag in shown


def test_every_engine_setting_and_sampling_parameter_reaches_its_object() -> None:
    """The flags are generated; this checks that each still parses to what its field takes."""
    from nybble.commands.options import engine_flags, sampling_flags
    from nybble.core.config import EngineConfig
    from nybble.core.sampling import SamplingParams

    assert {flag.name for flag in engine_flags()} == {*EngineConfig.__dataclass_fields__} - {"model"}
    left_out = {"logit_bias", "allowed_token_ids", "spaces_between_special_tokens", "detokenize"}
    assert {flag.name for flag in sampling_flags()} == {*SamplingParams.__struct_fields__} - left_out
    assert all(flag.help for flag in (*engine_flags(), *sampling_flags()))


@pytest.mark.slow
def test_import_and_help_are_quick() -> None:
    """Best of several: the machine may be busy, but nothing heavy may be imported."""

    def best(command: list[str]) -> float:
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            times.append(time.perf_counter() - begin)
        return min(times)

    assert best([sys.executable, "-c", "import nybble"]) < 0.3
    assert best([*NYBBLE, "--help"]) < 0.7
    code = "import sys, nybble.cli, nybble; assert not {'torch', 'transformers', 'triton', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
