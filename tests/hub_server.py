"""A small Hub on the loopback, for the real `huggingface_hub` client: what creating, committing and reading need.

Repositories are commits in memory, files ending in .safetensors or .png go through LFS, and faults come on demand.
"""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
import transformers
import yaml
from huggingface_hub import constants

TOKENS = {"hf_mine": "me", "hf_yours": "you"}
LFS_SUFFIXES = (".safetensors", ".png", ".bin", ".pt")


@dataclass
class Repo:
    private: bool
    refs: dict[str, str] = field(default_factory=dict)  # branch or refs/pr/1 -> commit
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> path -> content
    history: list[tuple[str, str]] = field(default_factory=list)  # (ref, message), oldest first

    def commit(self, ref, files, message):
        state = [len(self.commits), ref, message, *((path, blob_id(files[path])) for path in sorted(files))]
        sha = hashlib.sha1(repr(state).encode()).hexdigest()
        self.commits[sha] = files
        self.refs[ref] = sha
        self.history.append((ref, message))
        return sha

    def resolve(self, revision):
        return revision if revision in self.commits else self.refs.get(revision)


@dataclass
class Fault:
    """What goes wrong with requests of a method whose path matches, so many times."""

    method: str
    path: str
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    drop_after: int | None = None  # bytes of the body, sent or received, after which the connection is cut
    call: object = None  # called before the request is answered as usual
    after: bool = False  # the request is served, and its answer is lost
    times: int = 1


class HubServer(ThreadingHTTPServer):
    """`with HubServer() as hub`: `hub.endpoint`, `hub.repos`, `hub.faults`, `hub.requests`."""

    daemon_threads = True

    def __init__(self, users):
        super().__init__(("127.0.0.1", 0), Handler)
        self.users = users  # token -> name
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # LFS, by SHA-256
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.storage = f"http://localhost:{self.server_address[1]}"  # another host, as that of large files is

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass  # connections that were cut

    def create(self, repo_id, private=False, files=None):
        repo = self.repos[repo_id] = Repo(private)
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n", **(files or {})}, "initial commit")
        return repo

    def files(self, repo_id, revision="main"):
        repo = self.repos[repo_id]
        return repo.commits[repo.resolve(revision)]

    def paths_of(self, *methods):
        return [path for method, path in self.requests if method in methods]

    def take_fault(self, method, path):
        with self.lock:
            for fault in self.faults:
                if fault.method == method and fault.times > 0 and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


class Refused(Exception):
    def __init__(self, status, message="", code=None):
        self.status, self.message, self.code = status, message, code


def blob_id(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path):
    return path.endswith(LFS_SUFFIXES)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one packet: in two, the second waits 40 ms
    server: HubServer

    ROUTES = (
        ("POST", r"/api/repos/create", "create_repo"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", "model_info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)", "tree"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<branch>[^/]+)", "create_branch"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
        ("GET", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_get"),
        ("POST", r"/lfs/verify", "lfs_verify"),
        ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def do_GET(self):
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *args):
        pass

    def answer(self):
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.server.requests.append((self.command, unquote(url.path)))
        self.fault = self.server.take_fault(self.command, unquote(url.path))
        length = int(self.headers.get("Content-Length") or 0)
        if self.fault is not None and self.fault.drop_after is not None and self.command in ("PUT", "POST"):
            if not self.fault.after:
                self.rfile.read(min(length, self.fault.drop_after))
                return self.cut()
        self.body = self.rfile.read(length)
        try:
            if self.fault is not None and self.fault.call is not None:
                self.fault.call()
            if self.fault is not None and self.fault.status is not None:
                raise Refused(self.fault.status, "on demand")
            for method, pattern, name in self.ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and method == ("GET" if self.command == "HEAD" else self.command):
                    with self.server.lock:
                        send = getattr(self, name)(
                            **{key: unquote(value or "") for key, value in match.groupdict().items()}
                        )
                    return send()
            raise Refused(404, f"no {self.command} {url.path}")
        except Refused as refused:
            headers = {"X-Error-Message": refused.message, **(self.fault.headers if self.fault else {})}
            if refused.code:
                headers["X-Error-Code"] = refused.code
            self.send(refused.status, json.dumps({"error": refused.message}).encode(), headers)

    def cut(self):
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def send(self, status, body=b"", headers=None):
        if self.fault is not None and self.fault.after:
            return self.cut()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        if self.fault is not None and self.fault.drop_after is not None:
            self.wfile.write(body[: self.fault.drop_after])
            return self.cut()
        self.wfile.write(body)
        return None

    def json(self, value, status=200):
        return lambda: self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    # ---------------------------------------------------------------- who may do what

    @property
    def user(self):
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.server.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.server.users.get(token)

    def readable(self, repo):
        user = self.user
        found = self.server.repos.get(repo)
        if found is None or (found.private and repo.split("/")[0] != user):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        return found

    def writable(self, repo):
        found = self.readable(repo)
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        if repo.split("/")[0] != self.user and "create_pr" not in self.query:
            raise Refused(403, "You don't have the rights to write here")
        return found

    def at(self, repo, revision):
        found = self.readable(repo)
        sha = found.resolve(revision or "main")
        if sha is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found, sha

    # ---------------------------------------------------------------- repositories

    def create_repo(self):
        request = json.loads(self.body)
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        owner = request.get("organization") or self.user
        repo_id = f"{owner}/{request['name']}"
        url = {"url": f"{self.server.endpoint}/{repo_id}"}
        if owner != self.user:
            raise Refused(403, "You don't have the rights to create a model under this namespace")
        if repo_id in self.server.repos:
            return self.json(url, 409)
        self.server.create(repo_id, private=request.get("private") or request.get("visibility") == "private")
        return self.json(url)

    def create_branch(self, repo, branch):
        found = self.writable(repo)
        if branch in found.refs:
            return self.json({"error": "exists"}, 409)
        found.refs[branch] = found.resolve(json.loads(self.body or b"{}").get("startingPoint") or "main")
        return self.json({})

    def validate_yaml(self):
        content = json.loads(self.body)["content"]
        block = re.match(r"---\r?\n(.*?)\r?\n---", content, re.DOTALL)
        try:
            data = yaml.safe_load(block[1]) if block else None
        except yaml.YAMLError as error:
            return self.json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        languages = (data or {}).get("language") or []
        wrong = [code for code in languages if not re.fullmatch(r"[a-z]{2,3}", str(code))]
        errors = [{"message": f'"language" must only contain ISO 639 codes, not {code}'} for code in wrong]
        return self.json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def model_info(self, repo, revision):
        found, sha = self.at(repo, revision)
        siblings = [
            {"rfilename": path, **self.metadata(path, content)} for path, content in found.commits[sha].items()
        ]
        return self.json({"id": repo, "sha": sha, "private": found.private, "siblings": siblings, "tags": []})

    def metadata(self, path, content):
        if "blobs" not in self.query:
            return {}
        lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return {"size": len(content), "blobId": blob_id(content), **({"lfs": lfs} if is_lfs(path) else {})}

    def tree(self, repo, revision):
        found, sha = self.at(repo, revision)
        entries = []
        for path, content in found.commits[sha].items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
            if is_lfs(path):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
            entries.append(entry)
        return self.json(entries)

    # ---------------------------------------------------------------- commits

    def preupload(self, repo, revision):
        found = self.writable(repo)
        files = found.commits[self.at(repo, revision)[1]]
        return self.json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if is_lfs(file["path"]) else "regular",
                        "shouldIgnore": False,
                        "oid": self.oid(file["path"], files.get(file["path"])),
                    }
                    for file in json.loads(self.body)["files"]
                ]
            }
        )

    @staticmethod
    def oid(path, content):
        if content is None:
            return None
        return hashlib.sha256(content).hexdigest() if is_lfs(path) else blob_id(content)

    def lfs_batch(self, repo):
        self.readable(repo)
        objects = []
        for file in json.loads(self.body)["objects"]:
            actions = {}
            if file["oid"] not in self.server.objects:
                upload = {"href": f"{self.server.endpoint}/lfs/{file['oid']}"}
                actions = {"actions": {"upload": upload, "verify": {"href": f"{self.server.endpoint}/lfs/verify"}}}
            objects.append({**file, **actions})
        return self.json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "the content is not that of its hash")
        self.server.objects[oid] = self.body
        return self.json({})

    def lfs_verify(self):
        request = json.loads(self.body)
        if len(self.server.objects.get(request["oid"], b"")) != request["size"]:
            raise Refused(404, "no such object")
        return self.json({})

    def commit(self, repo, revision):
        found = self.writable(repo)
        head, *operations = [json.loads(line) for line in self.body.splitlines()]
        parent = found.resolve(revision)
        ref = revision
        if "create_pr" in self.query:
            number = 1 + sum(name.startswith("refs/pr/") for name in found.refs)
            ref = f"refs/pr/{number}"
        elif head["value"].get("parentCommit") not in (None, parent):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(found.commits[parent])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    raise Refused(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                files[value["path"]] = self.server.objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        sha = found.commit(ref, files, head["value"]["summary"])
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.server.endpoint}/{repo}/commit/{sha}"}
        if ref != revision:
            answer["pullRequestUrl"] = f"{self.server.endpoint}/{repo}/discussions/{ref.rpartition('/')[2]}"
        return self.json(answer)

    # ---------------------------------------------------------------- files

    def resolve(self, repo, revision, path):
        found, sha = self.at(repo, revision)
        content = found.commits[sha].get(path)
        if content is None:
            raise Refused(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{self.oid(path, content)}"'}
        if not is_lfs(path):
            return self.content(content, headers)
        digest = hashlib.sha256(content).hexdigest()
        headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        self.server.objects[digest] = content
        return lambda: self.send(302, b"", {**headers, "Location": f"{self.server.storage}/lfs/{digest}"})

    def lfs_get(self, oid):
        return self.content(self.server.objects[oid], {"ETag": f'"{oid}"'})

    def content(self, content, headers):
        span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if not span:
            return lambda: self.send(200, content, headers)
        start = int(span[1])
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return lambda: self.send(206, content[start:], headers)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The server, with the client of this process pointed at it, an empty cache, and no waiting before retries."""
    with HubServer(TOKENS) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_mine")
        # Shared instances that took the endpoint at import.
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.endpoint)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
        sleep = time.sleep
        monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.005)))
        yield server
