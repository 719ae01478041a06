"""`LLM`: prompts in, outputs out, in order; refusals, Ctrl-C and the progress bar. On the embedded model."""

import json
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nybble import LLM, SamplingParams
from nybble.core.errors import ConfigError, EngineDeadError, RequestError
from nybble.models.checkpoint import TINY

QUESTIONS = ["Count from 3 to 30", "What is 12 + 30?", "Sort 31, 4, 15, 92, 6", "Who are you?"]
GREEDY = SamplingParams(temperature=0, max_tokens=128)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny", max_num_seqs=8, kv_cache_memory_bytes=16 << 20) as llm:
        yield llm


def test_answers_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    outputs = llm.chat(QUESTIONS, GREEDY)
    texts = [output.outputs[0].text for output in outputs]
    assert texts[1:3] == ["12 + 30 = 42", "4, 6, 15, 31, 92"]
    assert texts[0] == ", ".join(map(str, range(3, 31)))
    assert all(output.finished and output.outputs[0].finish_reason == "stop" for output in outputs)
    assert [llm.chat(question, GREEDY)[0].outputs[0].text for question in QUESTIONS] == texts


def test_a_conversation_is_one_prompt(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "What is 12 + 30?"}]
    alone = llm.chat(conversation, GREEDY)
    both = llm.chat([conversation, "Who are you?"], GREEDY)
    assert [len(alone), len(both)] == [1, 2]
    assert alone[0].outputs[0].text == both[0].outputs[0].text == "12 + 30 = 42"


def test_prompts_are_texts_or_token_ids_one_or_many(llm: LLM) -> None:
    text = "Count from 3 to 12."
    ids = llm.tokenizer.encode(text)
    one_text, one_ids = llm.generate(text, GREEDY), llm.generate(ids, GREEDY)
    many = llm.generate([text, ids], GREEDY)
    assert {output.outputs[0].text for output in (*one_text, *one_ids, *many)} == {one_text[0].outputs[0].text}
    assert [output.prompt for output in many] == [text, None]
    assert many[0].prompt_token_ids == many[1].prompt_token_ids == ids
    assert llm.generate([], GREEDY) == []


def test_each_prompt_may_have_its_own_parameters(llm: LLM) -> None:
    lengths = [3, 7, 5]
    params = [SamplingParams(max_tokens=length, ignore_eos=True) for length in lengths]
    outputs = llm.generate(["one", "two", "three"], params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
    assert [output.outputs[0].finish_reason for output in outputs] == ["length"] * 3
    with pytest.raises(RequestError, match="sampling_params has 2 entries for 3 prompts"):
        llm.generate(["one", "two", "three"], params[:2])


def test_without_parameters_completions_are_short_and_answers_are_whole(llm: LLM) -> None:
    assert len(llm.generate("Count from 3 to 30")[0].outputs[0].token_ids) == 16
    assert llm.chat("Count from 3 to 30")[0].outputs[0].finish_reason == "stop"


def test_outputs_carry_timing_and_log_probabilities(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=2, prompt_logprobs=1, n=2)
    output = llm.generate("Sort 5, 3", params)[0]
    assert len(output.outputs) == 2
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    for completion in output.outputs:
        assert completion.logprobs is not None
        assert completion.timing is not None
        times = completion.timing
        assert times.arrival_time <= times.first_scheduled_time <= times.first_token_time <= times.finished_time
        sampled = [entry[token].logprob for token, entry in zip(completion.token_ids, completion.logprobs, strict=True)]
        assert completion.cumulative_logprob == pytest.approx(sum(sampled))
        assert all(logprob <= 0 for logprob in sampled)


def test_what_can_never_be_served_is_refused_and_nothing_stays_behind(llm: LLM) -> None:
    with pytest.raises(RequestError):
        llm.generate(["fits", [1] * 100_000], GREEDY)
    assert llm.stats.num_running == llm.stats.num_waiting == llm.stats.num_kv_blocks_used == 0
    assert llm.chat("What is 12 + 30?", GREEDY)[0].outputs[0].text == "12 + 30 = 42"


def test_one_run_at_a_time(llm: LLM) -> None:
    run = llm.run([llm.requests.from_chat("Count from 3 to 30", GREEDY)])
    next(run)
    with pytest.raises(RequestError, match="in use"):
        llm.generate("Hello!")
    run.close()  # aborts
    assert llm.stats.num_running == 0
    assert llm.chat("What is 12 + 30?", GREEDY)[0].outputs[0].text == "12 + 30 = 42"


def test_a_refused_request_ends_each_of_its_completions(llm: LLM) -> None:
    requests = [
        llm.requests.from_prompt([1] * 100_000, SamplingParams(n=3)),
        llm.requests.from_chat("What is 12 + 30?", GREEDY),
    ]
    ends = [
        (delta.request_id, delta.index, delta.finish_reason)
        for deltas in llm.run(requests, raise_refused=False)
        for delta in deltas
        if delta.finish_reason
    ]
    refused, served = (request.request_id for request in requests)
    assert ends == [*((refused, index, "error") for index in range(3)), (served, 0, "stop")]


def test_an_error_while_cleaning_up_does_not_block_the_llm(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    run = llm.run([llm.requests.from_chat("Count from 3 to 30", GREEDY)])
    next(run)
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            run.close()
    assert llm.chat("What is 12 + 30?", GREEDY)[0].outputs[0].text == "12 + 30 = 42"


@pytest.mark.parametrize(
    ("prompts", "params", "field"),
    [
        (None, GREEDY, "prompts"),
        ({"prompt": "hi"}, GREEDY, "prompts"),
        (b"hi", GREEDY, "prompt"),
        ([{"prompt": "hi"}], GREEDY, "prompt"),
        ("hi", {"temperature": 0}, "sampling_params"),
        (["hi"], [0], "sampling_params"),
    ],
)
def test_arguments_of_another_kind_are_named(llm: LLM, prompts: object, params: object, field: str) -> None:
    with pytest.raises(RequestError, match=field):
        llm.generate(prompts, params)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="messages"):
        llm.chat(None)  # type: ignore[arg-type]


def test_prompts_may_come_from_any_iterable(llm: LLM) -> None:
    outputs = llm.chat((question for question in QUESTIONS[1:3]), GREEDY)
    assert [output.outputs[0].text for output in outputs] == ["12 + 30 = 42", "4, 6, 15, 31, 92"]


def test_the_checkpoints_own_recommendations_apply(tmp_path: Path) -> None:
    """Sampling and length from generation_config.json, the end of a turn from tokenizer_config.json."""
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    recommended = {"repetition_penalty": 1.3, "top_k": 5, "max_new_tokens": 7, "eos_token_id": 0}
    (tmp_path / "generation_config.json").write_text(json.dumps(recommended))
    with LLM(str(tmp_path), kv_cache_memory_bytes=4 << 20) as llm:
        params = llm.requests.default_params()
        assert (params.repetition_penalty, params.top_k, params.max_tokens) == (1.3, 5, 7)
        assert llm.requests.default_params(top_k=3).top_k == 3
        (output,) = llm.chat("What is 12 + 30?", GREEDY)
        assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("12 + 30 = 42", "stop")


def test_ctrl_c_ends_the_run_and_the_llm_goes_on(llm: LLM) -> None:
    handler = signal.getsignal(signal.SIGINT)
    endless = SamplingParams(max_tokens=None, ignore_eos=True)
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["Count from 3 to 30"] * 100, endless)
    assert signal.getsignal(signal.SIGINT) is handler
    assert llm.stats.num_running == llm.stats.num_kv_blocks_used == 0
    assert llm.chat("What is 12 + 30?", GREEDY)[0].outputs[0].text == "12 + 30 = 42"


def test_a_progress_bar_on_request(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.chat(QUESTIONS, GREEDY, progress=True)
    shown = capsys.readouterr()
    assert "4/4" in shown.err
    assert "tokens/s" in shown.err
    assert shown.out == ""
    llm.chat(QUESTIONS, GREEDY)  # standard error is no terminal here
    assert capsys.readouterr().err == ""


def test_a_setting_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match=r"max_num_seq is not a setting.*did you mean max_num_seqs"):
        LLM("tiny", max_num_seq=4)


def test_a_closed_llm_says_so() -> None:
    llm = LLM("tiny", kv_cache_memory_bytes=1 << 20)
    llm.close()
    with pytest.raises(EngineDeadError, match="closed"):
        llm.generate("Hello!")
