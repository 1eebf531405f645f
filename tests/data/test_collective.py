"""`mdc:ID`: Mozilla Data Collective's own client downloads from a server on the loopback that answers alike."""

import io
import json
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from helpers import noise

from peft_clsr import load_recordings, prepare_dataset
from peft_clsr.cli import main

pytest.importorskip("datacollective", reason="datacollective needs Python 3.11.4")

ID, KEY = "cmn29afhz01aomm07h2p0k8pn", "a-key"
COLUMNS = "client_id path sentence_id sentence sentence_domain up_votes down_votes age gender accents variant locale"


def common_voice_archive():
    """As Mozilla's archives of Common Voice: RELEASE/LANGUAGE/SPLIT.tsv and RELEASE/LANGUAGE/clips/*.mp3."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:

        def add(name, data):
            entry = tarfile.TarInfo(f"cv-corpus-23.0-2025-09-05/ro/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))

        for split, size in (("train", 3), ("dev", 1), ("test", 2)):
            lines = [COLUMNS.replace(" ", "\t")]
            for row in range(size):
                path = f"common_voice_ro_{split}{row}.mp3"
                soundfile.write(sound := io.BytesIO(), noise(0.5, 32000, row), 32000, format="MP3")
                add(f"clips/{path}", sound.getvalue())
                cells = ["c", path, "s", f'"Propoziția {split} {row}', "", "2", "0", "", "", "", "", "ro"]
                lines.append("\t".join(cells))
            add(f"{split}.tsv", ("\n".join(lines) + "\n").encode())
        add("clips/unused.mp3", np.random.default_rng(0).bytes(200_000))  # the client writes 64 KiB at a time
    return content.getvalue()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, status, body, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        return body

    def do_GET(self):
        site = self.server.site
        site.requests.append(f"GET {self.path}")
        if self.path == f"/api/datasets/{ID}":
            details = {"id": ID, "name": "Romanian", "filename": "mcv-ro.tar.gz", "checksum": "c1", "locale": "ro"}
            self.wfile.write(self.answer(200, details))
        elif self.path == "/storage/mcv-ro.tar.gz?signature=s":
            assert self.headers["Authorization"] is None  # the key is for the API alone
            start = int((self.headers["Range"] or "bytes=0-")[6:-1])
            body = self.answer(206 if start else 200, site.archive[start:])
            site.sent.append(start)
            self.wfile.write(body if site.cut is None else body[: site.cut])
            self.close_connection = True
        else:
            self.wfile.write(self.answer(404, {"error": "Dataset not found"}))

    def do_POST(self):
        site = self.server.site
        site.requests.append(f"POST {self.path}")
        if self.headers["Authorization"] != f"Bearer {KEY}":
            self.wfile.write(self.answer(401, {"error": "Invalid API key"}))
        elif site.refusal:
            self.wfile.write(self.answer(*site.refusal))
        else:
            url = f"http://127.0.0.1:{self.server.server_port}/storage/mcv-ro.tar.gz?signature=s"
            session = {"downloadUrl": url, "sizeBytes": str(len(site.archive)), "checksum": "c1"}
            self.wfile.write(self.answer(200, session))


@pytest.fixture(scope="module")
def archive():
    return common_voice_archive()


@pytest.fixture
def site(archive, monkeypatch, tmp_path):
    """The server: its requests, and what goes wrong."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.site = SimpleNamespace(archive=archive, requests=[], sent=[], cut=None, refusal=None)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("MDC_API_URL", f"http://127.0.0.1:{server.server_port}/api")
    monkeypatch.setenv("MDC_API_KEY", KEY)
    monkeypatch.setenv("MDC_DOWNLOAD_PATH", str(tmp_path / "mozdata"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server.site
    server.shutdown()
    server.server_close()


def load(split="train", **arguments):
    return load_recordings(f"mdc:{ID}", "ro", split, text_column="sentence", **arguments)


def test_common_voice_is_downloaded_once_unpacked_and_read(site, tiny_processor):
    train_set = load()
    assert train_set["sentence"][:] == [f'"Propoziția train {row}' for row in range(3)]
    assert load("test")["sentence"][:] == [f'"Propoziția test {row}' for row in range(2)]
    assert load(limit=1).num_rows == 1
    assert site.sent == [0]
    prepared, counts = prepare_dataset(train_set, tiny_processor, "ro", text_column="sentence")
    assert counts["kept"] == 3 and int(prepared[0]["attention_mask"].sum()) == 50


def test_an_interrupted_download_is_named_and_resumed(site):
    site.cut = 150_000
    with pytest.raises(OSError, match=f"mdc:{ID}: the download was interrupted .*: start again, to resume it"):
        load()
    site.cut = None
    assert load().num_rows == 3
    assert site.sent == [0, 2**17]


def test_a_damaged_archive_leaves_nothing_that_looks_complete(site, tmp_path):
    site.archive = site.archive[: len(site.archive) // 2]
    with pytest.raises(OSError, match="cannot be unpacked .*: delete it, and start again"):
        load()
    assert sorted(path.name for path in (tmp_path / "mozdata").glob("mcv*")) == ["mcv-ro.tar.gz"]


def test_without_a_key_nothing_is_asked(site, monkeypatch):
    monkeypatch.delenv("MDC_API_KEY")
    with pytest.raises(ValueError, match="needs an API key .* agree to the terms .* set MDC_API_KEY to the key"):
        load()
    assert site.requests == []


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (403, ValueError, "Terms not agreed .agree to the terms on the dataset's page"),
        (404, ValueError, "has no such dataset"),
        (429, OSError, "Rate limit exceeded.*try again later"),
        (500, OSError, "cannot be downloaded.*or unpack the dataset's archive yourself and give its folder"),
    ],
)
def test_refusals_are_named_with_the_remedy(site, status, error, message):
    site.refusal = (status, {"error": "Terms not agreed"})
    with pytest.raises(error, match=f"mdc:{ID}.*{message}"):
        load()


def test_a_wrong_key_is_named(site, monkeypatch):
    monkeypatch.setenv("MDC_API_KEY", "another")
    with pytest.raises(ValueError, match="MDC_API_KEY. is invalid, expired or revoked.*Create a new key"):
        load()


def test_a_wrong_id_is_named(site):
    with pytest.raises(
        ValueError, match="has no such dataset .*: check the ID, which is the last part of the address"
    ):
        load_recordings("mdc:nothing", "ro", "train")


def test_a_server_that_does_not_answer_is_named(site, monkeypatch):
    monkeypatch.setenv("MDC_API_URL", "http://127.0.0.1:9/api")
    with pytest.raises(OSError, match=f"mdc:{ID} cannot be downloaded: .*give its folder"):
        load()


# ---------------------------------------------------------------- the command


@pytest.fixture
def train(tiny_whisper, tiny_processor, tmp_path, capsys):
    """Runs `peft-clsr train` on a dataset for one step; returns its exit status and what it printed."""
    tiny_processor.tokenizer.add_tokens([f"<|{step / 50:.2f}|>" for step in range(151)])
    whisper = tiny_whisper()
    whisper.generation_config.max_length = 16  # noise makes a random model talk without end
    whisper.save_pretrained(tmp_path / "student")
    tiny_processor.save_pretrained(tmp_path / "student")

    def call(dataset):
        options = ["--student", tmp_path / "student", "--dataset", dataset, "--languages", "ro"]
        options += ["--text_column", "sentence", "--output_dir", tmp_path / "run", "--max_steps", 1, "--use_cpu"]
        options += ["--max_new_tokens", 4, "--gate_dim", 4, "--report_to", "none"]
        try:
            status = main(["train", *map(str, options)])
        except SystemExit as error:
            status = error.code
        return status, capsys.readouterr()

    return call


def test_the_command_trains_on_it(train, site, tmp_path):
    status, printed = train(f"mdc:{ID}")
    assert status == 0, printed.err
    results = json.loads((tmp_path / "run" / "results.json").read_text())["languages"]["ro"]
    assert (results["train_items"]["kept"], results["eval_items"]["kept"]) == (3, 2)


@pytest.mark.parametrize("dataset", ["mdc:", "mdc:a/b", "mdc:../x"])
def test_a_name_without_an_id_is_refused(train, site, dataset, tmp_path):
    status, printed = train(dataset)
    assert status == 2 and f"{dataset!r} names no dataset of Mozilla Data Collective: expected mdc:ID" in printed.err
    assert site.requests == [] and not (tmp_path / "run").exists()


def test_a_missing_extra_is_named(train, site, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datacollective", None)
    status, printed = train(f"mdc:{ID}")
    assert status == 2 and "datacollective is not installed: pip install 'peft_clsr[mdc]'" in printed.err
    assert not (tmp_path / "run").exists()
