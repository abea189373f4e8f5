"""Scores by functions of the user's: what they are given, what they may return, and one clear line for everything else."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.flags import RewardSourceFlags
from posttrain.training.episodes import Episode
from posttrain.training.reward_functions import FunctionReward, columns, load_function, wanted
from posttrain.types import UserError

EPISODES = [
    Episode(
        f"data.jsonl:{i + 1}",
        [{"role": "user", "content": f"question {i}"}],
        [],
        [1, 2, i],
        [7, 8][: i + 1],
        f"answer {i}",
        i > 0,
    )
    for i in range(2)
]


@pytest.fixture(autouse=True)
def _imports_put_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in [name for name in sys.modules if name.startswith(("reward_func_", "my_rewards", "neighbour_of_rewards"))]:
        del sys.modules[name]


def source(function: Any, spec: str = "m:f") -> FunctionReward:
    return FunctionReward("f", spec, function)


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


# ---------------------------------------------------------------- what it is given


def test_a_function_gets_the_columns_it_names() -> None:
    def lengths(answers: list[str], stopped: list[bool], prompts: list[Any], answer_ids: list[Any]) -> list[float]:
        assert prompts == [episode.messages for episode in EPISODES]
        assert answer_ids == [[7], [7, 8]]
        return [len(a) + 10.0 * s for a, s in zip(answers, stopped, strict=True)]

    assert source(lengths)(EPISODES) == [8.0, 18.0]


def test_with_kwargs_it_gets_all_of_them() -> None:
    seen: dict[str, Any] = {}

    def score(answers: list[str], **rest: Any) -> list[float]:
        seen.update(rest)
        return [0.0] * len(answers)

    source(score)(EPISODES)
    assert seen == {
        "prompts": [e.messages for e in EPISODES], "answer_ids": [[7], [7, 8]], "prompt_ids": [[1, 2, 0], [1, 2, 1]],
        "tools": [[], []], "sources": ["data.jsonl:1", "data.jsonl:2"], "stopped": [False, True],
    }  # fmt: skip


def test_columns_of_the_row_reach_the_function_that_names_them() -> None:
    rows = [
        dataclasses.replace(e, columns={"reference": {"text": f"gold {i}"}} | ({"level": 3} if i else {}))
        for i, e in enumerate(EPISODES)
    ]

    def score(answers: list[str], reference: list[Any], level: Any = None, absent: str = "own") -> list[float]:
        assert reference == [{"text": "gold 0"}, {"text": "gold 1"}]
        assert (level, absent) == ([None, 3], "own")
        reference[0].clear()
        return [0.0, 1.0]

    assert source(score)(rows) == [0.0, 1.0]
    assert rows[0].columns["reference"] == {"text": "gold 0"}
    assert source(lambda answers, **columns: [float(x or 0) for x in columns["level"]])(rows) == [0.0, 3.0]
    asked = wanted(score)
    assert (asked.needed, asked.optional, asked.every) == ({"reference"}, {"level", "absent"}, False)


def test_what_it_does_to_its_columns_does_not_reach_the_episodes() -> None:
    def vandal(prompts: list[Any], answer_ids: list[list[int]]) -> list[float]:
        prompts[0][0]["content"] = "gone"
        answer_ids[1].clear()
        return [0, 0]

    before = [dataclasses.asdict(episode) for episode in EPISODES]
    source(vandal)(EPISODES)
    assert [dataclasses.asdict(episode) for episode in EPISODES] == before


# ---------------------------------------------------------------- what it may return


@pytest.mark.parametrize(
    "returned",
    [
        [1, 0.5],
        (True, 0.5),
        np.array([1, 0.5], dtype=np.float32),
        torch.tensor([1, 0.5], dtype=torch.bfloat16),
        [torch.tensor(1.0), np.float64(0.5)],
    ],
    ids=["list", "tuple", "array", "tensor", "scalars"],
)
def test_numbers_of_any_make(returned: Any) -> None:
    got = source(lambda answers: returned)(EPISODES)
    assert got == [1.0, 0.5]
    assert {type(score) for score in got} == {float}


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "--reward_func m:f: gave 1 scores for 2 answers"),
        ([1.0, math.nan], r"--reward_func m:f: gave nan for data\.jsonl:2; a score must be a finite number"),
        ([math.inf, 1.0], r"gave inf for data\.jsonl:1"),
        ([1.0, None], r"gave 'None' \(NoneType\) for data\.jsonl:2, not a number"),
        (["0.5", 1.0], r"gave '0\.5' \(str\) for data\.jsonl:1, not a number"),
        ([[1.0], [2.0]], r"gave '\[1\.0\]' \(list\) for data\.jsonl:1"),
        (0.5, "returned float, expected a list of 2 numbers"),
        (None, "returned NoneType, expected a list of 2 numbers"),
        ("ab", "returned str, expected a list of 2 numbers"),
        ((x for x in (1.0, 2.0)), "returned generator, expected a list of 2 numbers"),
        (torch.tensor(1.0), "returned float, expected a list of 2 numbers"),
    ],
)
def test_anything_else_is_told_in_one_line(returned: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        source(lambda answers: returned)(EPISODES)
    assert "\n" not in str(caught.value)


def test_what_it_raises_is_told_with_its_place(tmp_path: Path) -> None:
    spec = write(tmp_path, "mine.py", "def broken(answers):\n    return [1 / 0 for _ in answers]\n") + ":broken"
    with pytest.raises(UserError) as caught:
        FunctionReward("broken", spec, load_function(spec))(EPISODES)
    assert str(caught.value) == f"--reward_func {spec}: raised ZeroDivisionError: division by zero (mine.py:2)"
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


# ---------------------------------------------------------------- how it is found


def test_a_module_of_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards").mkdir()
    write(tmp_path / "my_rewards", "__init__.py", "")
    write(tmp_path / "my_rewards", "length.py", "def score(answers):\n    return [len(a) for a in answers]\n")
    assert source(load_function("my_rewards.length:score"))(EPISODES) == [8.0, 8.0]
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    write(tmp_path, "colorsys.py", "def rgb_to_hsv(answers): ...\n")
    found = load_function("colorsys:rgb_to_hsv")  # the library's: ours never stands in for it
    assert wanted(found).needed == {"r", "g", "b"}


def test_a_file_imports_its_neighbours_and_is_loaded_once(tmp_path: Path) -> None:
    write(tmp_path, "neighbour_of_rewards.py", "BASE = 5\n")
    file = write(
        tmp_path, "two.py",
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom neighbour_of_rewards import BASE\n"
        "@dataclass\nclass State:\n    calls: int = 0\nSTATE = State()\n"
        "def first(answers):\n    STATE.calls += 1\n    return [BASE + STATE.calls] * len(answers)\n"
        "def second(answers):\n    return first(answers)\n",
    )  # fmt: skip
    assert source(load_function(f"{file}:first"))(EPISODES) == [6.0, 6.0]
    assert source(load_function(f"{file}:second"))(EPISODES) == [7.0, 7.0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rewards", "expected module:function or path/to/file.py:function"),
        (":score", "expected module:function"),
        ("..rewards:score", "expected module:function"),
        ("rewards:a.b", "expected module:function"),
        ("nowhere/rewards.py:score", "no such file"),
        ("no_such_module_of_anyones:score", r"cannot be imported \(No module named 'no_such_module_of_anyones'\)"),
        ("{}/good.py:scor", r"good\.py has no function scor; did you mean score\?"),
        ("{}/good.py:NUMBER", r"good\.py has no function NUMBER"),
        (
            "{}/good.py:ordered",
            "takes 'answers' by position only; a function is called with keywords: prompts, answers, answer_ids",
        ),
        ("{}/syntax.py:score", r"cannot be imported \(.*syntax\.py, line 1\)"),
        ("{}/needs.py:score", r"cannot be imported \(No module named 'no_such_library'\)"),
    ],
)
def test_what_cannot_be_called_is_told_before_anything_else(tmp_path: Path, spec: str, message: str) -> None:
    write(
        tmp_path, "good.py",
        "NUMBER = 1\ndef score(answers): ...\ndef ordered(answers, /): ...\n",
    )  # fmt: skip
    write(tmp_path, "syntax.py", "def score(answers:\n")
    write(tmp_path, "needs.py", "import no_such_library\n")
    spec = spec.format(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load_function(spec)
    assert str(caught.value).startswith(f"--reward_func {spec}: ")
    assert "\n" not in str(caught.value)


def test_optional_parameters_of_its_own_are_its_own(tmp_path: Path) -> None:
    file = write(tmp_path, "own.py", "def score(answers, scale=3.0, *more):\n    return [scale] * len(answers)\n")
    assert source(load_function(f"{file}:score"))(EPISODES) == [3.0, 3.0]


def test_an_exception_while_importing_says_whose_module_it_was(tmp_path: Path) -> None:
    spec = write(tmp_path, "falls.py", "X = 1\nraise RuntimeError(3)\n") + ":score"
    with pytest.raises(UserError) as caught:
        load_function(spec)
    assert str(caught.value) == f"--reward_func {spec}: its module raised RuntimeError: 3 (falls.py:2)"


def test_the_columns_are_what_the_help_says() -> None:
    (text,) = (f.metadata["help"] for f in dataclasses.fields(RewardSourceFlags) if f.name == "reward_func")
    assert ", ".join(columns([])) in text
