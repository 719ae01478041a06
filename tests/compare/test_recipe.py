"""Targets and recipes as users write them."""

from pathlib import Path

import pytest

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
