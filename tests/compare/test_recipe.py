"""Targets and recipes as users write them."""

from pathlib import Path

import pytest

from nybble.compare.order import choose_order
from nybble.compare.recipe import BUILT_IN, parse_target
from nybble.core.errors import ConfigError


def test_urls_built_in_recipes_and_their_flags() -> None:
    assert parse_target("a=http://x:1/v1").url == "http://x:1/v1"
    spec = parse_target("b=vllm --max-num-seqs 8 --served 'two words'")
    assert (spec.recipe, spec.flags) == (BUILT_IN["vllm"], ["--max-num-seqs", "8", "--served", "two words"])
    for recipe in BUILT_IN.values():
        assert {"{model}", "{port}", "{name}"} <= set(recipe.command)


def test_a_yaml_recipe_alone_and_on_top_of_a_built_in_one(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("command: my-server --port {port} {model}\nready: /ping\nenv: {A: b}\n")
    recipe = parse_target(f"c={own} --fast").recipe
    assert recipe is not None
    assert (recipe.command, recipe.ready, recipe.env) == (
        ["my-server", "--port", "{port}", "{model}"],
        "/ping",
        {"A": "b"},
    )
    own.write_text("base: lmdeploy\nenv: {PYTHONPATH: elsewhere}\nready_timeout: 5\n")
    recipe = parse_target(f"c={own}").recipe
    assert recipe is not None
    assert recipe.command == BUILT_IN["lmdeploy"].command
    assert (recipe.env, recipe.ready_timeout) == ({"PYTHONPATH": "elsewhere"}, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("http://x", "NAME=URL"),
        ("a=", "NAME=URL"),
        ("a/b=vllm", "letters, digits"),
        ("a=sglang", "none of nybble, vllm, lmdeploy"),
        ("a=none.yaml", "No such file"),
    ],
)
def test_bad_targets(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_target(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("command: [a\n", "recipe"),
        ("- a\n", "must be a mapping"),
        ("ready: /x\n", "missing required field `command`"),
        ("base: other\n", "base must be one of"),
        ("base: vllm\nmemry_flag: x\n", "memry_flag"),
        ("base: vllm\nready_timeout: soon\n", "ready_timeout"),
    ],
)
def test_bad_recipes_name_the_field(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        parse_target(f"a={tmp_path}/r.yaml")


@pytest.mark.parametrize(
    ("targets", "has_gpu", "order", "why"),
    [
        (["a=nybble", "b=http://127.0.0.1:1"], True, "interleaved", "no two engines"),
        (["a=nybble", "b=vllm"], False, "interleaved", "no GPU"),
        (["a=nybble", "b=vllm"], True, "blocks", "may fill the GPU"),
        (
            ["a=nybble --gpu-memory-utilization 0.45", "b=vllm --gpu-memory-utilization=0.5"],
            True,
            "interleaved",
            "adds up to 0.95",
        ),
        (
            ["a=nybble --gpu-memory-utilization 0.5", "b=vllm --gpu-memory-utilization 0.5"],
            True,
            "blocks",
            "may fill the GPU",
        ),
        (["a=nybble --gpu-memory-utilization 0.1", "b=lmdeploy --cache-max-entry-count 0.1"], True, "blocks", "may"),
    ],
)
def test_turns_are_taken_only_where_memory_surely_holds_all(
    targets: list[str], has_gpu: bool, order: str, why: str
) -> None:
    chosen, said = choose_order([parse_target(text) for text in targets], has_gpu=has_gpu)
    assert (chosen, why in said) == (order, True), said


def test_engines_on_gpus_of_their_own_take_turns(tmp_path: Path) -> None:
    specs = []
    for device in (0, 1):
        (tmp_path / f"{device}.yaml").write_text(f"base: nybble\nenv: {{CUDA_VISIBLE_DEVICES: '{device}'}}\n")
        specs.append(parse_target(f"on{device}={tmp_path}/{device}.yaml"))
    assert choose_order(specs, has_gpu=True)[0] == "interleaved"
    assert choose_order([specs[0], specs[0]], has_gpu=True)[0] == "blocks"


def test_a_quote_without_an_end_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'--target a=nybble "x: no closing quotation; close the quotation mark'):
        parse_target('a=nybble "x')
    (tmp_path / "r.yaml").write_text("command: 'serve \"x'\n")
    with pytest.raises(ConfigError, match=r"r.yaml: command: no closing quotation"):
        parse_target(f"a={tmp_path}/r.yaml")
