"""A real server process with the options of ``toolkit serve``, over TLS on a Unix domain socket; rude clients."""

import codecs
import contextlib
import shutil
import socket
import ssl
import subprocess
import time
from dataclasses import fields
from types import SimpleNamespace

import httpx
import pytest

from tests.helpers.server_process import serving
from toolkit.cli import main, serve
from toolkit.engine import EngineConfig

KEY = {"authorization": "bearer zweiter"}
PAGE = "https://chat.example.org"
OPTIONS = [
    *("--grace", "0", "--timeout-keep-alive", "1", "--root-path", "/api"),
    *("--served-model-name", "first", "second", "--api-key", "schlüssel", "--api-key", "zweiter"),
    *("--allowed-origins", f'["{PAGE}"]', "--allowed-methods", "POST", "--chat-template", "{{ messages[0].content }}!"),
    *("--max-model-len", "256", "--num-blocks", "none", "--seed", "3", "--no-enable-prefix-caching"),
]


@pytest.fixture(scope="module")
def server(chat_model, tmp_path_factory):
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command, for a certificate")
    folder = tmp_path_factory.mktemp("tls")
    pem, path = str(folder / "server.pem"), folder / "socket"
    with socket.socket(socket.AF_UNIX) as dead:  # left by a server that was killed
        dead.bind(str(path))
    made = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=localhost"
    made += " -addext subjectAltName=DNS:localhost"
    subprocess.run([*made.split(), "-keyout", pem + ".key", "-out", pem], check=True, capture_output=True)
    where = ("--uds", str(path), "--ssl-certfile", pem, "--ssl-keyfile", pem + ".key")
    with serving(chat_model, *OPTIONS, *where) as one:
        assert one.line == f"serving first on unix:{path}\n", one
        trusted = ssl.create_default_context(cafile=pem)
        transport = httpx.HTTPTransport(uds=str(path), verify=trusted)
        with httpx.Client(base_url="https://localhost", timeout=60, transport=transport) as http:
            yield SimpleNamespace(http=http, path=path, process=one.process, errors=one.errors, trusted=trusted)


def connect(server):
    plain = socket.socket(socket.AF_UNIX)
    plain.settimeout(20)
    plain.connect(str(server.path))
    return server.trusted.wrap_socket(plain, server_hostname="localhost")


def rest(connection):
    received = b""
    with contextlib.suppress(ConnectionError, ssl.SSLError):  # an end by reset
        while part := connection.recv(65536):
            received += part
    return received


def test_the_server_runs_by_its_options(server):
    models = server.http.get("/api/v1/models", headers=KEY).json()["data"]
    assert [(card["id"], card["max_model_len"]) for card in models] == [("first", 256), ("second", 256)]
    for key in ("schlüssel".encode(), "schlüssel".encode("latin-1")):
        assert server.http.get("/v1/models", headers={"authorization": b"Bearer " + key}).status_code == 200
    assert server.http.get("/v1/models").status_code == 401
    asked = {"model": "second", "max_tokens": 3, "temperature": 0}
    chat = {**asked, "messages": [{"role": "user", "content": "fox"}]}
    reply = server.http.post("/v1/chat/completions", json=chat, headers={**KEY, "origin": PAGE})
    assert reply.headers["access-control-allow-origin"] == PAGE
    plain = server.http.post("/v1/completions", json={**asked, "prompt": "fox!"}, headers=KEY).json()
    assert reply.json()["choices"][0]["message"]["content"] == plain["choices"][0]["text"]
    assert reply.json()["model"] == plain["model"] == "first"


UPLOAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer zweiter\r\nContent-Length: 500\r\n\r\n{"
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize("sent", [b"", GET[:24], GET, UPLOAD])
def test_a_connection_without_a_whole_request_is_closed(server, sent):
    with connect(server) as connection:
        started = time.monotonic()
        connection.sendall(sent)
        if sent == GET:
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        assert b"HTTP" not in rest(connection)
        assert 0.9 < time.monotonic() - started < 15


CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer zweiter\r\n"


def test_clients_that_leave_while_uploading_are_not_in_the_log(server):
    for body in (b"Content-Length: 500\r\n\r\n", b'Content-Length: 500\r\n\r\n{"pro', CHUNKED + b"5\r\nab"):
        for _ in range(3):
            with connect(server) as connection:
                connection.sendall(HEAD + body)
                time.sleep(0.05)
    with connect(server) as connection:  # garbage in the middle of a body, with and without an reply already
        connection.sendall(HEAD + CHUNKED + b"5\r\n{    \r\nnonsense\r\n")
        assert rest(connection).startswith(b"HTTP/1.1 400")
    with connect(server) as connection:
        connection.sendall(HEAD.replace(b"/v1/completions", b"/nowhere") + CHUNKED)
        assert connection.recv(65536).startswith(b"HTTP/1.1 404")
        connection.sendall(b"nonsense\r\n")
        rest(connection)
    counted = server.http.get("/metrics").text
    assert 'toolkit:http_requests_total{path="/v1/completions",status="499"}' in counted
    assert not any("Traceback" in line for line in server.errors), server.errors


# The last test of the module: it ends the module's server.
def test_sigterm_ends_uploads(server, chat_model, capsys):
    assert main(["serve", str(chat_model), "--uds", str(server.path)]) == 2
    assert "Address already in use" in capsys.readouterr().err
    started = time.monotonic()
    with connect(server) as connection:
        connection.sendall(HEAD + b"Content-Length: 500\r\n\r\n{")
        time.sleep(0.1)
        server.process.terminate()
        rest(connection)
    assert server.process.wait(timeout=30) == 0
    assert time.monotonic() - started < 9  # less than what uvicorn would wait before it cancels tasks
    assert not server.path.exists()
    assert not any("Traceback" in line for line in server.errors), server.errors


def test_every_limit_of_the_engine_is_an_option(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    shown = capsys.readouterr().out
    for field in fields(EngineConfig):
        assert f"--{field.name.replace('_', '-')}" in shown


WRONG = [
    (["--kinds", "x"], "argument --kinds: invalid JSON value: 'x'"),
    (["--max-num-seqs", "none"], "argument --max-num-seqs: invalid int value: 'none'"),
    (["--timeout-keep-alive", "-1"], "--timeout-keep-alive must be >= 0 and <= 86400, got -1.0."),
    (["--ssl-keyfile", "x"], "ssl_certfile must be given with ssl_keyfile and ssl_ca_certs, got None."),
    (["--ssl-certfile", "nofile"], "ssl_certfile must be a file that can be read, got 'nofile'."),
    (["--ssl-certfile", __file__], "must be PEM files that fit together, without a passphrase"),
    (["--allowed-origins", "["], "argument --allowed-origins: must be a JSON list or words, got '['"),
    (["--allowed-origins", "http://x/"], "allowed_origins must be '*' or such as 'https://host:port'"),
    (["--allow-credentials"], "--allowed-origins must be given with what web pages are allowed, got none."),
    (["--api-key", "a", ""], "api_key must be text that is not empty, got ''; leave it out for none."),
    (["--chat-template", "nofile"], "--chat-template must be a file or a template, got 'nofile'"),
    (["--chat-template", "{% if %}"], "--chat-template must be a Jinja template: line 1: "),
    (["--chat-template", "{% if x %}"], "needs to be closed is 'if'.\n"),
    (["--uds", "/nowhere/x"], "Cannot listen on '/nowhere/x': No such file or directory."),
]


@pytest.mark.parametrize(("options", "sentence"), WRONG)
def test_a_wrong_option_is_one_sentence(chat_model, capsys, options, sentence):
    try:
        status = main(["serve", str(chat_model), "--port", "0", *options])
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert sentence in capsys.readouterr().err


def test_a_template_file_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "template.jinja"
    path.write_bytes(codecs.BOM_UTF8 + b"{{ messages }}")
    assert serve._chat_template(str(path)) == "{{ messages }}"
