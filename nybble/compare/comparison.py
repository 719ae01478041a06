"""`Comparison`: the same points on several targets, in turns (A B A B) or one target after the other (blocks)."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import msgspec

from nybble.bench.metrics import FORMULAS
from nybble.bench.points import Point
from nybble.bench.probe import probe
from nybble.bench.prompt_text import WordCost
from nybble.bench.results import ResultsFile
from nybble.bench.serve_run import Plan, ServeRun
from nybble.bench.target import Target, TargetSettings, served_model
from nybble.bench.workload import Workload, WorkloadSettings
from nybble.compare.launch import Launched, version_of
from nybble.compare.quality import Answer, answers_of, judge
from nybble.compare.recipe import Recipe, TargetSpec
from nybble.core.errors import ConfigError, NybbleError

Order = Literal["interleaved", "blocks"]
SAMPLING = {
    "temperature": 0.0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Sent explicitly: engines take different defaults, some from the checkpoint, and a penalty costs time."""


class Asked(msgspec.Struct, kw_only=True):
    """What a comparison is to do.

    `model`: what recipes serve, and what is asked of a URL that serves several. `prefix_cache`: for recipes.
    """

    specs: list[TargetSpec]
    points: list[Point]
    workload: WorkloadSettings
    plan: Plan
    order: Order
    baseline: str
    model: str | None = None
    api_key: str | None = None
    body: dict[str, Any] = {}
    timeout: float = 600.0
    prefix_cache: bool = False
    wants_quality: bool = True
    allows_other_models: bool = False


def cache_flags(recipe: Recipe, asked: Asked) -> list[str]:
    """What turns the prefix cache on or off."""
    return recipe.prefix_cache_on if asked.prefix_cache else recipe.prefix_cache_off


class Comparison:
    """Runs what was asked, with a results file for each target in `folder`, so that it can be resumed.

    Args:
        say: called with a line about what goes on; `warn` with what makes figures doubtful.
    """

    def __init__(
        self,
        asked: Asked,
        folder: Path,
        *,
        resume: bool,
        say: Callable[[str], None],
        warn: Callable[[str], None],
        on_news: Callable[[str, int, int], None],
    ) -> None:
        self._asked = asked
        self._folder = folder
        self._say = say
        self._warn = warn
        self._on_news = on_news
        self._answers: dict[str, list[Answer] | str] = {}
        self._word_cost: WordCost | None = None
        self._launched: dict[str, Launched] = {}
        self.failures: list[str] = []
        self.facts: dict[str, dict[str, Any]] = {spec.name: {} for spec in asked.specs}
        self.results = {spec.name: self._results_file(spec, resume) for spec in asked.specs}

    def _results_file(self, spec: TargetSpec, resume: bool) -> ResultsFile:
        settings = {
            "target": msgspec.to_builtins(spec),
            "workload": self._asked.workload,
            "plan": msgspec.structs.replace(self._asked.plan, num_repeats=0),
            "body": self._asked.body,
            "model": self._asked.model,
            "order": self._asked.order,
            "prefix_cache": self._asked.prefix_cache,
        }
        path = self._folder / f"target-{spec.name}.json"
        return ResultsFile("serve", path, settings, formulas=FORMULAS, resume=resume)

    def num_left(self) -> int:
        """Prompts still to be sent."""
        return sum(
            point.num_prompts * max(0, self._asked.plan.num_repeats - results.num_repeats(point.label))
            for results in self.results.values()
            for point in self._asked.points
        )

    def run(self) -> None:
        """Measure all. What fails is in `failures`; the other targets go on.

        Raises:
            ConfigError: a URL does not answer, or models differ; before anything is started or measured, if it shows.
        """
        self._look_at_urls()
        groups = [self._asked.specs] if self._asked.order == "interleaved" else [[spec] for spec in self._asked.specs]
        for group in groups:
            with ExitStack() as stack:
                runs: dict[str, ServeRun] = {}
                settings: dict[str, TargetSettings] = {}
                for spec in group:
                    try:
                        settings[spec.name] = self._open(spec, stack)
                    except NybbleError as error:
                        self.failures.append(f"{spec.name}: {error}")
                self._check_names()
                for name, target in settings.items():
                    try:
                        runs[name] = self._prepare(name, target)
                    except NybbleError as error:
                        self.failures.append(f"{name}: {error}")
                    else:
                        stack.callback(runs[name].close)
                self._measure(runs)
        for results in self.results.values():
            results.is_complete = not self.failures
            results.write()

    def quality(self) -> dict[str, Any]:
        return judge(self._answers, self._asked.baseline) if self._answers else {}

    def _look_at_urls(self) -> None:
        """A wrong address or another model shows before the first engine is started."""
        for spec in self._asked.specs:
            if spec.url is not None:
                self.facts[spec.name]["model"] = self._model_at(spec.url)
            elif spec.recipe is not None and "{name}" in spec.recipe.command:
                self.facts[spec.name]["model"] = self._asked.model
        self._check_names()

    def _model_at(self, url: str) -> str:
        return asyncio.run(served_model(url, self._asked.api_key, None, self._asked.model))

    def _open(self, spec: TargetSpec, stack: ExitStack) -> TargetSettings:
        asked = self._asked
        facts = self.facts[spec.name]
        key = asked.api_key
        if spec.url is not None:
            url, name = spec.url, str(facts["model"])
            facts |= {"url": url, "prefix_cache": "as the server was started"}
        else:
            url, name = self._launch(spec, stack, facts)
        facts["model"] = name
        body = {**SAMPLING, **asked.body}
        return TargetSettings(
            base_url=url, model=name, route=asked.workload.route, api_key=key, body=body, timeout=asked.timeout
        )

    def _launch(self, spec: TargetSpec, stack: ExitStack, facts: dict[str, Any]) -> tuple[str, str]:
        recipe, model = spec.recipe, self._asked.model
        assert recipe is not None
        assert model is not None
        flags = [*cache_flags(recipe, self._asked), *spec.flags]
        self._say(f"starting {spec.name} …")
        launched = stack.enter_context(Launched(recipe, model, model, flags, self._folder / f"{spec.name}.log"))
        facts |= {
            "command": ["python" if word == sys.executable else word for word in launched.command],
            "env": recipe.env,
            "prefix_cache": "on" if self._asked.prefix_cache else "off",
            "version": version_of(recipe, model, model),
        }
        facts["ready_seconds"] = launched.wait_ready()
        self._launched[spec.name] = launched
        return launched.url, self._model_at(launched.url)

    def _check_names(self) -> None:
        names = {name: str(self.facts[name].get("model")) for name in self.facts if "model" in self.facts[name]}
        if len(set(names.values())) > 1 and not self._asked.allows_other_models:
            told = ", ".join(f"{name} serves {model}" for name, model in names.items())
            raise ConfigError(
                f"the targets' models have different names: {told}; --allow-other-models compares them anyway"
            )

    def _prepare(self, name: str, target: TargetSettings) -> ServeRun:
        self.facts[name].setdefault("version", asyncio.run(_version(target)))
        workload = Workload(self._asked.workload)
        probed = asyncio.run(probe(target, self._asked.workload.input_len[1], workload.count))
        for note in probed.notes:
            self._warn(f"{name}: {note}")
        self._word_cost = self._word_cost or probed.word_cost  # the same texts for all
        if self._asked.wants_quality:
            self._answers[name] = asyncio.run(answers_of(target))
        return ServeRun(
            target,
            msgspec.structs.replace(self._asked.workload, word_cost=self._word_cost),
            self._asked.plan,
            self.results[name],
            warn=lambda text: self._warn(f"{name}: {text}"),
            on_news=lambda part, num_done, num_tokens: self._on_news(f"{name}, {part}", num_done, num_tokens),
        )

    def _measure(self, runs: Mapping[str, ServeRun]) -> None:
        """Point by point and repeat by repeat, the targets take turns."""
        for point in self._asked.points:
            for repeat in range(self._asked.plan.num_repeats):
                for name, run in runs.items():
                    if not run.has_died and self.results[name].num_repeats(point.label) <= repeat:
                        run.measure_once(point)
        for name, run in runs.items():
            if run.has_died and name in self._launched:
                run.failures.append(f"the last that it said: {self._launched[name].last_words()}")
            self.failures += [f"{name}: {failure}" for failure in run.failures]


async def _version(target: TargetSettings) -> str | None:
    """What /version says, which nybble and vLLM have."""
    client = Target(target)
    try:
        status, body = await client.fetch("/version")
        return str(msgspec.json.decode(body)["version"]) if status == 200 else None
    except Exception:  # no such route, or anything else: it is only for the report
        return None
    finally:
        client.close()


def rows_by_label(results: ResultsFile) -> dict[str, dict[str, Any]]:
    return {row["label"]: row for row in results.rows()}


def names_of(specs: Sequence[TargetSpec]) -> list[str]:
    """The targets' names, which must differ.

    Raises:
        ConfigError: two are the same.
    """
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise ConfigError(f"--target: names must differ, got {', '.join(names)}")
    return names
