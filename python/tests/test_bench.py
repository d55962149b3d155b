"""Checks the traces, arrivals, prompts, figures and reports of `pd-bench`.

tests/processes/test_bench.py runs the command.
"""

import itertools
import json
import random
import re

import pytest

from pd_sidecar.bench import cli, saved, traces
from pd_sidecar.bench.arrivals import Arrivals
from pd_sidecar.bench.charts import Series, chart, nice, thinned
from pd_sidecar.bench.client import Dialogue, Settings
from pd_sidecar.bench.html import report
from pd_sidecar.bench.samples import Goals, Result, Sample, quantile
from pd_sidecar.bench.transfers import added, counters
from pd_sidecar.bench.workload import BadInputError, Block, Conversation, Span, Synthetic, Turn, token_ids

SHAREGPT = [
    {"id": "a", "conversations": [
        {"from": "system", "value": "be short"}, {"from": "human", "value": "one"}, {"from": "gpt", "value": "x" * 40},
        {"from": "human", "value": "two"}, {"from": "gpt", "value": "y" * 8},
    ]},
    {"id": "empty", "conversations": [{"from": "gpt", "value": "an answer to nothing"}]},
    {"messages": [
        {"role": "user", "content": "three"}, {"role": "assistant", "content": "z"}, {"role": "user", "content": "?"},
    ]},
]  # fmt: skip
MOONCAKE = [
    {"timestamp": 5000, "input_length": 1000, "output_length": 7, "hash_ids": [1, 2]},
    {"timestamp": 6500, "input_length": 1024, "output_length": 0, "hash_ids": [1, 3]},
]


def written(path, entries, *, lines):
    path.write_text("\n".join(json.dumps(each) for each in entries) if lines else json.dumps(entries))
    return path


@pytest.mark.parametrize("lines", [False, True])
def test_sharegpt(tmp_path, lines) -> None:
    first, last = traces.read(written(tmp_path / "t.json", SHAREGPT, lines=lines))
    assert first.system == "be short"
    # The recorded answers say only how long the answers are: four characters for each token.
    assert [(turn.text, turn.answer_tokens) for turn in first.turns] == [("one", 10), ("two", 2)]
    # A message without an answer is left out.
    assert [(turn.text, turn.answer_tokens) for turn in last.turns] == [("three", 1)]


@pytest.mark.parametrize("lines", [False, True])
def test_mooncake(tmp_path, lines) -> None:
    found = traces.read(written(tmp_path / "t.jsonl", MOONCAKE, lines=lines))
    assert [(each.at_s, each.turns[0].tokens, each.turns[0].answer_tokens) for each in found] == [
        (5.0, 1000, 7),
        (6.5, 1024, 1),
    ]
    one, two = (token_ids(each.turns[0].blocks, "seed", Span(10, 99)) for each in found)
    # Equal hashes are equal tokens, and other hashes are not.
    assert one[:512] == two[:512] and one[512:1000] != two[512:1000]
    assert (len(one), len(two)) == (1000, 1024) and set(one) <= set(range(10, 100))
    assert token_ids(found[0].turns[0].blocks, "other", Span(10, 99)) != one
    at = [at for at, _ in Arrivals("trace", speed=3.0).times(found, 0)]
    assert at == [0.0, 0.5]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no entry"),
        ("[", "no JSON array"),
        ('{"a": 1}\nx', "line 2: no JSON"),
        ("[3]", "entry 0: must be an object, is int"),
        ('[{"id": 1}]', "needs a field `conversations` or `messages`"),
        ('[{"messages": 1}]', "`messages` must be a list, is int"),
        ('[{"messages": [{"role": "user", "content": []}]}]', "message 0: `content` must be a str"),
        ('[{"messages": []}]', "no entry has a message of a user"),
        (
            '{"timestamp": 0, "input_length": "9", "output_length": 1, "hash_ids": [1]}',
            "`input_length` must be a number",
        ),
        ('{"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": [1]}', "between 1 and 512"),
        ('{"timestamp": -1, "input_length": 5, "output_length": 1, "hash_ids": [1]}', "`timestamp` must be a number"),
    ],
)
def test_a_trace_that_is_none(tmp_path, text, says) -> None:
    (tmp_path / "t").write_text(text)
    with pytest.raises(BadInputError, match=re.escape(says)) as error:
        traces.read(tmp_path / "t")
    assert str(tmp_path / "t") in str(error.value)


def test_synthetic_lengths_depend_only_on_the_seed() -> None:
    made = Synthetic(Span(50, 90), Span(5, 9), Span(1, 3), Span(10, 20), shared=30)
    first, again, other = (list(itertools.islice(made.conversations(seed), 200)) for seed in (1, 1, 2))
    assert first == again != other
    assert {len(each.turns) for each in first} == {1, 2, 3}
    lengths = {each.turns[0].tokens for each in first}
    assert min(lengths) >= 50 and max(lengths) <= 90 and len(lengths) > 20
    prompts = [token_ids(each.turns[0].blocks, "s", Span(10, 10_000)) for each in first]
    assert len({tuple(prompt[:30]) for prompt in prompts}) == 1
    assert len({tuple(prompt[30:50]) for prompt in prompts}) == 200


def test_arrivals() -> None:
    one = Conversation((Turn(1, (Block("a", 1),)),))
    fixed = [at for at, _ in Arrivals("fixed", rate=4.0).times([one] * 5, 0)]
    assert fixed == [0.0, 0.25, 0.5, 0.75, 1.0]
    poisson = [at for at, _ in Arrivals("poisson", rate=10.0).times([one] * 5000, 3)]
    gaps = [after - before for before, after in itertools.pairwise(poisson)]
    mean = sum(gaps) / len(gaps)
    # In a Poisson process, gaps vary as much as their mean is long.
    assert mean == pytest.approx(0.1, rel=0.1)
    assert (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 == pytest.approx(mean, rel=0.1)


def test_a_later_turn_continues_the_earlier_ones() -> None:
    conversation = Conversation((Turn(3, (Block("a", 4),)), Turn(2, (Block("b", 2),))))
    dialogue = Dialogue(conversation, Settings("m", ids=Span(100, 200)), "s")
    first = dialogue.body(conversation.turns[0])
    assert (len(first["prompt"]), first["max_tokens"], first["ignore_eos"]) == (4, 3, True)
    dialogue.heard("text", [1, 2, 3], 3)
    second = dialogue.body(conversation.turns[1])["prompt"]
    assert second[:7] == [*first["prompt"], 1, 2, 3] and len(second) == 9
    texts = Conversation((Turn(3, text="hello"), Turn(2, text="again")), system="be short")
    dialogue = Dialogue(texts, Settings("m", endpoint="chat", ignore_eos=False), "s")
    assert "ignore_eos" not in dialogue.body(texts.turns[0])
    dialogue.heard("hi", [], 1)
    assert [(each["role"], each["content"]) for each in dialogue.body(texts.turns[1])["messages"]] == [
        ("system", "[s] be short"), ("user", "hello"), ("assistant", "hi"), ("user", "again"),
    ]  # fmt: skip


def some_result(name="a", failed=1) -> Result:
    good = [Sample(i % 2, i * 0.1, 0.0, 0.1 + i / 100, 1.1 + i / 100, 50, 11) for i in range(101)]
    return Result(name, f"http://{name}", [*good, *[Sample(0, 1.0, error="HTTP 503: no")] * failed], seconds=20.2)


def test_figures() -> None:
    figures = some_result().summary(Goals(first_s=0.6, per_token_s=0.2))
    assert (figures["requests"], figures["failed"]) == (102, 1)
    assert figures["first_ms"] == {"mean": 600.0, "p50": 600.0, "p90": 1000.0, "p99": 1090.0}
    assert figures["per_token_ms"]["p50"] == pytest.approx(100.0)
    assert figures["answer_tokens_per_s"] == pytest.approx(1111 / 20.2, abs=0.01)
    # 51 of the 102 requests begin within 600 ms. The failed request keeps no goal.
    assert figures["goals_kept"] == 0.5
    assert [turn["requests"] for turn in figures["turns"]] == [51, 50]
    assert figures["errors"] == {"HTTP 503: no": 1}
    values = sorted(random.Random(1).random() for _ in range(1001))
    assert quantile(values, 0.5) == values[500] and quantile([3.0], 0.99) == 3.0
    nothing = Result("b", "http://b").summary(Goals())
    assert nothing["first_ms"] is None and nothing["goals_kept"] is None


def test_counters_of_the_proxy() -> None:
    before = 'pd_proxy_transfers_total 3\npd_proxy_alone_total{reason="cheaper"} 1\npd_proxy_moved_bytes_total 10\n'
    after = (
        before.replace("total 3", "total 5").replace("total 10", "total 4e3")
        + 'pd_proxy_alone_total{reason="no_prefill"} 2\n'
    )
    assert added(counters(before), counters(after)) == {
        "transfers": 2.0, "moved_bytes": 3990.0, "alone_no_prefill": 2.0,
    }  # fmt: skip
    assert counters("vllm:num_requests_running 1\n") == {}


def test_charts() -> None:
    assert [nice(value) for value in (0.0, 0.7, 1.0, 130.0, 2600.0)] == [1.0, 1.0, 1.0, 200.0, 5000.0]
    many = [(float(i), 1.0) for i in range(100_001)]
    assert len(thinned(many)) <= 2001 and thinned(many)[-1] == many[-1]
    assert "No data" in chart("t", "x", "y", [Series("a", [])])
    drawn = chart("a < b", "x", "y", [Series("<i>", [(0.0, 5.0), (10.0, 10.0)]), Series("b", [])])
    assert "a &lt; b" in drawn and "<i>" not in drawn
    # The axes end at 10, so the line goes from the middle at the left to the corner.
    assert 'points="62.0,134.0 616.0,12.0"' in drawn


def test_a_report_has_all_servers_and_needs_no_network(tmp_path) -> None:
    results, goals = [some_result("one"), some_result("<two>", failed=0)], Goals(first_s=0.5)
    (tmp_path / "a.json").write_text(json.dumps(saved.document({"command": "c"}, goals, results, interrupted=False)))
    about, read_goals, read = saved.read(tmp_path / "a.json")
    assert (about, read_goals, read) == ({"command": "c"}, goals, results)
    html = report("title", about, ["a warning"], read, [each.summary(goals) for each in read])
    for text in ("one", "&lt;two&gt;", "a warning", "HTTP 503: no", "by turn", "600.0, 1000.0, 1090.0"):
        assert text in html, text
    assert html.count("<svg") == 5 and "<two>" not in html
    assert not re.search(r"(?:src|href)=|@import|url\(", html)
    assert cli.run(["report", str(tmp_path / "a.json"), "--html", str(tmp_path / "a.html")]) == 0
    assert "600.0" in (tmp_path / "a.html").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run", "localhost:8000"], "a server is [NAME=]URL"),
        (["run", "a=http://x", "a=http://y"], "the same name"),
        (["run", "http://x", "--clients", "2", "--rate", "1"], "choose one"),
        (["run", "http://x", "--arrivals", "fixed"], "needs --rate"),
        (["run", "http://x", "--arrivals", "trace"], "needs a --trace"),
        (["run", "http://x", "--rate", "0"], "a number above 0"),
        (["run", "http://x", "--goal-first", "5"], "a time with a unit"),
        (["run", "http://x", "--prompt-tokens", "9:3"], "LOW:HIGH"),
        (["run", "http://x", "--shared-tokens", "2000"], "below --prompt-tokens"),
        (["run", "http://x", "--trace", "/does/not/exist"], "/does/not/exist"),
        (["run", "http://x", "--html", "/does/not/exist"], "cannot write /does/not/exist"),
        (["run", "http://x", "--key-file", "/does/not/exist"], "--key-file"),
        (["report", "pyproject.toml"], "no file that `pd-bench run --json` has written"),
    ],
)
def test_wrong_arguments(capsys, words, says) -> None:
    assert cli.run(words) == cli.USAGE
    assert says in capsys.readouterr().err


def test_an_unreachable_server(capsys) -> None:
    # Port 1 is reserved, and nothing listens there.
    assert cli.run(["run", "http://127.0.0.1:1"]) == cli.UNREACHABLE
    assert "127.0.0.1" in capsys.readouterr().err


def test_help_teaches(capsys) -> None:
    assert cli.run(["--help"]) == 0 and cli.run(["run", "--help"]) == 0
    text = capsys.readouterr().out
    for word in ("--rate", "--turns", "--trace", "exit codes", "pd-bench report"):
        assert word in text
