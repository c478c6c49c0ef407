"""Input that was made to break us: refused with one sentence, and nothing is opened, written or unpickled for it.

``FUSION_FUZZ=2000 pytest tests/webui_live/test_hostile.py`` is the full run; in the suite there are fewer cases.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.webui_live.client import TITLE, Client, RefusedError, expert
from tests.webui_live.conftest import Names
from tests.webui_live.host import Host
from tests.webui_live.test_faults import aggregator, victim  # noqa: F401

CASES = int(os.environ.get("FUSION_FUZZ", "120"))
TINY = {"width": 64, "height": 64, "steps": 1, "prompt": "a cat", "seed": 1, "sampler_name": "Euler"}

#: Paths and names that a careless join, open or log would trip over.
PATHS = ["../canary", "..\\canary", "../../canary.safetensors", "/etc/passwd", "C:\\canary", "canary\0.safetensors",
         "./../canary", "%2e%2e/canary", "....//canary", "~/canary", "//canary", "file:///etc/passwd", "*", "?", ".",
         "..", "/", "canary\n", " canary", "con", "a" * 5000, "\ud800", "\u202ecanary", "{0.__class__}",
         "%s%n"]  # fmt: skip
NUMBERS = [0, -1, 1e308, -1e308, 5e-324, float("nan"), float("inf"), float("-inf"), 2**53 + 1, 10**300, -(10**300),
           10**4000, 0.1 + 0.2]  # fmt: skip


def nested(depth: int) -> Any:
    value: Any = []
    for i in range(depth):
        value = [value] if i % 2 else {"a": value}
    return value


TEXTS = st.one_of(
    st.text(max_size=40), st.text("()[]{}<>:|,.\\\"' AND\nBREAK0.5", max_size=40), st.sampled_from(PATHS),
    st.sampled_from(["(" * 3000, "[" * 3000, "a AND b", "x" * 10_001, "<lora:x:1>", "[a:b:0.5]", "(a:1e999)", "\0"]),
)  # fmt: skip
ANYTHING = st.one_of(
    st.none(), st.booleans(), st.sampled_from(NUMBERS), TEXTS, st.integers(), st.floats(),
    st.sampled_from([nested(5), nested(200), [None] * 10_000, {"": ""}, [], {}]),
    st.recursive(TEXTS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3)),
)  # fmt: skip


def values_of(schema: dict, checkpoints: list[str]) -> st.SearchStrategy:
    """What a part of the schema allows, with its limits; and prompts that are only texts."""
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kind = schema["type"]
    if kind == "boolean":
        return st.booleans()
    if kind == "string":
        return st.sampled_from(["a dog", "(a (red:1.3) [dog]:0.9), [cat:house:0.5]", "", "é 犬 🐕"]) | TEXTS
    if kind == "integer":
        return st.integers(schema.get("minimum"), schema.get("maximum"))
    if kind == "number":
        return st.floats(schema.get("minimum"), schema.get("maximum"), allow_nan=False)
    if kind == "array":
        items = values_of(schema["items"], checkpoints)
        least, most = schema.get("minItems", 0), schema.get("maxItems", 4)
        if schema["items"]["type"] == "number":  # a window goes down
            return st.lists(items, min_size=least, max_size=most).map(lambda pair: sorted(pair, reverse=True))
        return st.lists(items, min_size=1, max_size=2) | st.lists(items, min_size=least, max_size=most + 1)
    parts = {key: values_of(part, checkpoints) for key, part in schema["properties"].items()}
    if "checkpoint" in parts:
        parts["checkpoint"] = st.sampled_from(checkpoints)
    return some_of(parts)


@st.composite
def some_of(draw: st.DrawFn, parts: dict[str, st.SearchStrategy]) -> dict:
    """A few of the keys with allowed values, and at times one that is not allowed, or an unknown key."""
    keys = draw(st.lists(st.sampled_from(sorted(parts)), max_size=5, unique=True))
    if "experts" in parts and draw(st.integers(0, 2)):
        keys = list(dict.fromkeys(["experts", *keys]))
    if "checkpoint" in parts:
        keys = list(dict.fromkeys(["checkpoint", *keys]))
    result = {key: draw(parts[key]) for key in keys}
    if draw(st.integers(0, 3)):  # what goes together
        if any(key.startswith("freeu_") and key[-1].isdigit() for key in result):
            result["freeu"] = "Custom"
        if result.get("freeu") == "Custom":
            result["freeu_b3"] = 1.2
        result |= {"afa_maps": "uniform"} if result.get("method") == "AFA" else {}
        result |= {key: "both" for key in ("passes", "skip_passes") if key in result}
    if not draw(st.integers(0, 7)):
        key = draw(st.sampled_from(sorted(parts)) | TEXTS)
        result[key] = draw(ANYTHING)
    return result


def test_settings_drawn_from_the_schema(client: Client, host: Host, names: Names) -> None:
    """Each is drawn, or refused with 422 and one sentence; no traceback, and no thing of ours stays."""
    schema = client.ask("/denoiser-fusion/schema")
    before, start = client.state(), len(host.log)
    counts = {200: 0, 422: 0}

    @seed(20260101)
    @settings(max_examples=CASES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(values_of(schema, [names.expert, names.copy, names.base] * 3 + ["tiny_xl", "nothing"]))
    def each(fusion: dict) -> None:
        status, answer = post(client, {**TINY, "alwayson_scripts": {TITLE: {"args": [fusion]}}})
        assert status in counts, answer
        if status == 422:
            assert answer["detail"], answer
            assert answer["detail"].isprintable()
            assert len(answer["detail"]) < 3000
        counts[status] += 1

    each()
    print(counts)
    assert min(counts.values()) >= CASES // 10
    assert "Traceback" not in host.log[start:]
    assert client.state() == before


def post(client: Client, body: Any, path: str = "/sdapi/v1/txt2img") -> tuple[int, dict]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(client.url + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"{}")


@pytest.mark.parametrize("depth", [50, 300, 600, 900])
def test_deep_nesting(client: Client, host: Host, depth: int) -> None:
    """Until the host's own reader gives up."""
    start = len(host.log)
    for opened, closed in (("[", "]"), ('{"a":', "}")):
        deep = opened * depth + "1" + closed * depth
        for args in (f'{{"experts": {deep}}}', f'{{"k_expert": {deep}}}', f'{{"{"k" * 100000}": {deep}}}', deep):
            body = json.dumps({**TINY, "alwayson_scripts": {TITLE: {"args": ["HERE"]}}}).replace('"HERE"', args)
            status, answer = post(client, body.encode())
            assert status in (400, 422), answer
    assert "Traceback" not in host.log[start:]


@pytest.mark.parametrize("args", [
    [], [{}, {}], [[{}]], [None], ["on"], [True, None], [{"enabled": True}, 1e999], [True] * 500, [0], [[], []],
])  # fmt: skip
def test_other_things_in_args(client: Client, args: list) -> None:
    status, answer = post(client, {**TINY, "alwayson_scripts": {TITLE: {"args": args}}})
    assert status == (200 if args in ([], [None]) else 422), answer


@pytest.fixture
def canaries(host: Host, aggregator: Path) -> list[Path]:  # noqa: F811
    """Good files outside of the folders for them, under names that the paths above lead to."""
    checkpoint = (host.data / "models/Stable-diffusion/tiny_b.safetensors").read_bytes()
    made = [host.data / "models/canary.safetensors", host.data / "canary.safetensors", host.data / "models/canary"]
    for path in made:
        path.write_bytes(checkpoint if path != made[2] else aggregator.read_bytes())
    yield made
    for path in made:
        path.unlink()


def test_no_path_in_a_name_is_opened(client: Client, names: Names, canaries: list[Path]) -> None:
    client.ask("/probe/watch", on=True, reads=True)
    for path in [*PATHS, *map(str, canaries)]:
        for fusion in (expert(path), {"method": "AFA", "afa_aggregator": path}):
            status, answer = post(client, {**TINY, "alwayson_scripts": {TITLE: {"args": [fusion]}}})
            assert status == 422, (fusion, answer)
            assert answer["detail"].isprintable()
            assert "no such" in answer["detail"] or "is not allowed; allowed: text" in answer["detail"], answer
    client.draw(expert(names.expert))
    opened = [str(event) for event in client.ask("/probe/watch", on=False)]
    assert any(names.expert in event for event in opened)
    assert [event for event in opened if "canary" in event or "passwd" in event] == []


def test_nothing_is_written_outside_and_nothing_unpickled(client: Client, host: Host, names: Names) -> None:
    """By our code or on its behalf: pictures go to the host's outputs, and there is nothing else."""
    client.ask("/sdapi/v1/txt2img", TINY)
    before = {path for path in host.data.rglob("*") if path.is_file()}
    client.ask("/probe/watch", on=True)
    fusions = [expert(names.expert, compare=True), expert(names.expert, method="AFA", afa_maps="uniform"),
               expert("tiny_xl"), {"freeu": "Custom", "freeu_b3": 1.2, "skipping": "Forecast"}]  # fmt: skip
    with client.settings({"samples_save": True, "grid_save": True, "denoiser_fusion_preview_masks": True}):
        for fusion in fusions:
            post(client, {**TINY, "save_images": True, "alwayson_scripts": {TITLE: {"args": [fusion]}}})
    events = client.ask("/probe/watch", on=False)
    assert {event for event, *_ in events} <= {"open", "os.mkdir", "os.rename"}
    outputs = str(host.data / "outputs")
    allowed = (outputs, str(host.data / "cache"), str(host.data / "params.txt"))  # the last two are the host's own
    assert [event for event in events if not event[1].startswith(allowed)] == []
    new = {path for path in host.data.rglob("*") if path.is_file()} - before
    assert any("fusion-comparison" in path.name or path.parent.parent.name == "txt2img-grids" for path in new)
    assert [path for path in new if not str(path).startswith(allowed)] == []


LIES = {
    "nothing": b"", "short": b"\1\2\3", "zeros": b"\0" * 64,
    "length beyond the file": (10**6).to_bytes(8, "little") + b"{}",
    "enormous length": (2**63).to_bytes(8, "little") + b"{}", "negative length": b"\xff" * 8 + b"{}",
    "no JSON": b"hello, world", "no UTF-8": b'{"\xff": 1}', "list": b"[]", "deep": b"[" * 100_000,
    "deep object": b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
    "bomb": b'{"__metadata__":{' + b'"k":"v",' * 50_000 + b'"z":""}}',
    "metadata": b'{"__metadata__": {"format": 7}}', "no dtype": b'{"a": {"shape": [1], "data_offsets": [0, 4]}}',
    "strange dtype": b'{"a": {"dtype": "OBJ", "shape": [1], "data_offsets": [0, 4]}}',
    "dtype lies": b'{"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 4]}}',
    "huge shape": b'{"a": {"dtype": "F32", "shape": [1099511627776, 1099511627776], "data_offsets": [0, 4]}}',
    "negative shape": b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
    "offsets beyond the file": b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}',
    "offsets overlap": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
                       b' "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    "offsets run back": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
    "empty tensor": b'{"a": {"dtype": "F32", "shape": [0, 1152921504606846976], "data_offsets": [0, 0]}}',
    "a pickle": b"cos\nsystem\n(S'touch /tmp/fusion-was-here'\ntR.",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["checkpoint", "aggregator"])
def test_headers_that_lie(
    client: Client, host: Host, victim: Path, aggregator: Path, kind: str  # noqa: F811
) -> None:
    start = len(host.log)
    path = victim if kind == "checkpoint" else aggregator
    fusion = expert("victim") if kind == "checkpoint" else {"method": "AFA", "afa_aggregator": "faulty"}
    whole = path.read_bytes()
    for name, content in LIES.items():
        length = b"" if b"length" in name.encode() or name in ("nothing", "short", "zeros", "a pickle") else \
            len(content).to_bytes(8, "little")
        path.write_bytes(length + content + b"\0" * 4 * (b"data_offsets" in content and name != "empty tensor"))
        with pytest.raises(RefusedError) as caught:
            client.draw(fusion, model="tiny_a", width=64, height=64, steps=1)
        assert caught.value.status == 422, name
        assert caught.value.answer["detail"].startswith(("experts[0].checkpoint: ", "afa_aggregator: ")), name
    path.write_bytes(whole)
    assert not Path("/tmp/fusion-was-here").exists()
    assert "Traceback" not in host.log[start:]


def test_infotext_of_a_strangers_picture(client: Client, host: Host) -> None:
    """Pasted, it may fill the panel with what is allowed, be refused, or be passed over; it breaks nothing."""
    start = len(host.log)
    stages = ["[" * 50_000, '[{"backbone_factor": 1e999}]', "{}", "7", '[{"x": 1}]', '[[1]]', "[{}] * 9", '{"a": "b"}']
    texts = [f"FreeU Stages: {json.dumps(stage)}, FreeU Schedule: {schedule}" for stage in stages
             for schedule in ('"0, 1, 0"', '"nan, inf, x"', "1", '""')]  # fmt: skip
    values = ("nan", "-1e999", "9" * 5000, '"\\ud800"', "../canary", '"' + "x" * 20_000 + '"', "[1, 2", "\\", "None")
    for value in values:
        texts += [f"Fusion {field}: {value}" for field in (
            "expert 1 checkpoint", "expert 1 prompt", "method", "k expert", "window", "FreeU b1", "aggregator")]
    for text in texts:
        for steps in ("1", "0"):
            body = {"infotext": f"a cat\nSteps: {steps}, Sampler: Euler, CFG scale: 5, Seed: 1, Size: 64x64, {text}"}
            status, answer = post(client, {**body, "steps": 1, "width": 64, "height": 64})
            assert status in (200, 422), (text[:100], answer)
    assert "Traceback" not in host.log[start:]
