"""A local server that speaks the Hugging Face Hub's protocol and ModelScope's, with the faults that a test asks for.

What it answers is what the two answered when their clients were written: huggingface_hub 1.33, modelscope-hub 0.5.1.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, quote, unquote, urlsplit

LFS_BYTES = 1000  # from this size on a file lies in large-file storage, behind a redirect to another host
PAGE_ENTRIES = 3  # of the Hub's listing, which brings its next page's address along


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def blob(content: bytes) -> str:
    """The id that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


@dataclass
class Repository:
    """`commits` holds all files of each; `gated` and `private` name the tokens that may read it, `writers` those that
    may write, where not all may."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: set[str] | None = None
    private: set[str] | None = None
    writers: set[str] | None = None

    def push(self, files: dict[str, bytes], branch: str = "main") -> str:
        commit = commit_of(files)
        self.commits[commit] = dict(files)
        self.branches[branch] = self.branches["master" if branch == "main" else branch] = commit
        return commit

    def at(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Fault:
    """What happens to one request for a file's bytes: a `status` with `headers`, a connection `cut_after` so many
    bytes, other content (`changed`), or the `whole` file in answer to a request for its rest. Of a file that is sent,
    the connection is cut after so many bytes of it; of a commit, when it is made, before the answer."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    changed: bytes | None = None
    whole: bool = False


class Hub:
    """The servers: `url` is the hub, `storage` the other host that large files come from. `asked` has every request as
    (host, path, headers); `faults` those to come, by a file's base name, by its sha256 as it is sent, or by "listing",
    "card" or "commit". `stored` has what was sent to large-file storage."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.tokens: set[str] = set()
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.faults: dict[str, list[Fault]] = {}
        self.listed: dict[str, dict] = {}  # by path: what the listing says otherwise
        self.blobs: dict[str, tuple[str, bytes]] = {}
        self.stored: dict[str, bytes] = {}
        self.owners: dict[str, set[str]] = {}  # the tokens that may make repositories of an owner's, where not all may
        self.servers = [self._serve("hub"), self._serve("storage")]
        # huggingface_hub takes two ports of one name for one host
        names = ("127.0.0.1", "localhost")
        self.url, self.storage = (f"http://{n}:{s.server_port}" for n, s in zip(names, self.servers, strict=True))

    def _serve(self, host: str) -> ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"hub": self, "host": host})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return server

    def close(self) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def ranges(self, name: str) -> list[str | None]:
        """The Range of every request that was answered with bytes of the file called `name`."""
        return [headers.get("range") for _, path, headers in self.asked if path.endswith(f"/{name}#bytes")]

    def fault(self, name: str) -> Fault:
        waiting = self.faults.get(name, [])
        return waiting.pop(0) if waiting else Fault()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    host: str

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        self.words = unquote(parts.path).strip("/").split("/")
        self.note(self.path)
        if self.host == "storage":
            self.send_bytes(*self.hub.blobs[self.words[-1]])
        elif self.words[:2] == ["api", "v1"]:
            self.modelscope()
        else:
            self.huggingface()

    do_HEAD = do_GET

    def note(self, path: str) -> None:
        self.hub.asked.append((self.host, path, {name.lower(): value for name, value in self.headers.items()}))

    def answer(self, status: int, body: object = None, **headers: str) -> None:
        body = {"error": headers.get("X_Error_Message")} if body is None else body
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def fails(self, fault: Fault) -> bool:
        if fault.status:
            self.answer(fault.status, {"error": "a fault"}, **fault.headers)
        return fault.status is not None

    def send_bytes(self, name: str, content: bytes, ranges: bool = True, **headers: str) -> None:
        if self.command == "HEAD":
            self.answer(200, content, ETag=f'"{blob(content)}"', **headers)
            return
        fault = self.hub.fault(name)
        if self.fails(fault):
            return
        self.note(f"/{name}#bytes")
        content = content if fault.changed is None else fault.changed
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted and ranges and not fault.whole else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = len(content) if fault.cut_after is None else start + fault.cut_after
        self.wfile.write(content[start:end])
        self.wfile.flush()
        if fault.cut_after is not None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def send_or_redirect(self, path: str, content: bytes, ranges: bool, **headers: str) -> None:
        name = PurePosixPath(path).name
        if len(content) < LFS_BYTES:
            self.send_bytes(name, content, ranges)
            return
        self.hub.blobs[sha256(content)] = (name, content)
        self.answer(302, Location=f"{self.hub.storage}/{sha256(content)}?Signature=SIGNED", **headers)

    # the Hugging Face Hub

    def huggingface(self) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            self.answer(401, X_Error_Message="Invalid credentials in Authorization header")
            return
        words = self.words[1:] if self.words[0] == "api" else self.words
        if words[0] == "resolve-cache":
            _, name, commit, path = self.path_of_cache(words)
            content = self.hub.repositories[name].commits[commit][path]
            self.send_bytes(PurePosixPath(path).name, content, X_Repo_Commit=commit)
            return
        if len(words) < 2:  # what the library asks for beside, such as api/agent-harnesses
            self.answer(404)
            return
        dataset = words[0] == "datasets"
        owner, repository = words[1:3] if words[0] in ("models", "datasets") else words[:2]
        rest = words[3:] if words[0] in ("models", "datasets") else words[2:]
        name = f"datasets/{owner}/{repository}" if dataset else f"{owner}/{repository}"
        there = self.hub.repositories.get(name)
        if there is None or (there.private is not None and token not in there.private):
            if token:
                self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            else:
                self.answer(401, X_Error_Message="Invalid username or password.")
            return
        commit = there.at("/".join(rest[1:]) if rest[:1] == ["revision"] else rest[1] if rest else "main")
        if commit is None:
            self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message=f"Invalid rev id: {rest[1]}")
        elif rest[:1] == ["tree"]:
            self.tree(there.commits[commit])
        elif rest[:1] == ["resolve"]:
            self.resolve(name, there, commit, "/".join(rest[2:]), token)
        elif not self.fails(self.hub.fault("listing")):
            told = {"id": f"{owner}/{repository}", "sha": commit, "tags": [], "siblings": []}
            self.answer(200, told | {"private": there.private is not None})

    def tree(self, files: dict[str, bytes]) -> None:
        entries = [
            {"type": "directory", "oid": "0" * 40, "size": 0, "path": path}
            for path in sorted({path.rpartition("/")[0] for path in files} - {""})
        ]
        for path, content in files.items():
            entry = {"type": "file", "oid": blob(content), "size": len(content), "path": path}
            if len(content) >= LFS_BYTES:
                lfs = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
                entry |= {"oid": blob(b"pointer"), "lfs": lfs, "xetHash": sha256(content)}
            entries.append(entry | self.hub.listed.get(path, {}))
        start = int(self.query.get("cursor", 0))
        more = {}
        if start + PAGE_ENTRIES < len(entries):
            address = f"{self.hub.url}{urlsplit(self.path).path}?recursive=True&cursor={start + PAGE_ENTRIES}"
            more = {"Link": f'<{address}>; rel="next"'}
        self.answer(200, entries[start : start + PAGE_ENTRIES], **more)

    def resolve(self, name: str, there: Repository, commit: str, path: str, token: str) -> None:
        if there.gated is not None and token not in there.gated:
            said = f"Access to model {name} is restricted."
            self.answer(403 if token else 401, X_Error_Code="GatedRepo", X_Error_Message=said)
        elif path not in there.commits[commit]:
            self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
        elif len(there.commits[commit][path]) < LFS_BYTES:
            place = quote(f"/api/resolve-cache/{name}@{commit}/{path}")
            self.answer(307, Location=place, X_Repo_Commit=commit)
        else:
            content = there.commits[commit][path]
            linked = {"X_Linked_Size": str(len(content)), "X_Linked_Etag": f'"{sha256(content)}"'}
            self.send_or_redirect(path, content, True, X_Repo_Commit=commit, **linked)

    def path_of_cache(self, words: list[str]) -> tuple[str, str, str, str]:
        name, _, rest = "/".join(words[1:]).partition("@")
        commit, _, path = rest.partition("/")
        return words[0], name, commit, path

    # the same, written to

    def do_POST(self) -> None:
        self.words = unquote(urlsplit(self.path).path).strip("/").split("/")
        self.note(self.path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.hub.tokens:
            self.answer(401, X_Error_Message="Invalid credentials in Authorization header")
        elif self.words == ["api", "validate-yaml"]:
            if not self.fails(self.hub.fault("card")):
                self.answer(200, {"warnings": [], "errors": []})
        elif self.words == ["api", "repos", "create"]:
            self.create(token, json.loads(body))
        elif self.words[0] == "verify":
            self.answer(200 if self.words[1] in self.hub.stored else 404)
        else:
            self.write(token, body)

    def create(self, token: str, asked: dict) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if token not in self.hub.owners.get(asked["organization"], {token}):
            said = f"You don't have the rights to create a model under the namespace {asked['organization']}"
            self.answer(403, X_Error_Message=said)
        elif name in self.hub.repositories:
            said = "You already created this model repo"
            self.answer(409, {"error": said, "url": f"{self.hub.url}/{name}"}, X_Error_Message=said)
        else:
            private = {token} if asked.get("visibility") == "private" else None
            self.hub.repositories[name] = Repository(private=private)
            self.hub.repositories[name].push({".gitattributes": b"*.safetensors filter=lfs"})
            self.answer(200, {"url": f"{self.hub.url}/{name}"})

    def write(self, token: str, body: bytes) -> None:
        words = self.words[2:] if self.words[0] == "api" else self.words
        owner, repository, *rest = words
        repository = repository.removesuffix(".git")
        there = self.hub.repositories.get(f"{owner}/{repository}")
        if there is None:
            self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        elif token not in (there.writers or {token}):
            self.answer(403, X_Error_Message=f"Forbidden: pass a token with write access ({token})")
        elif rest[0] == "preupload":
            files = there.commits[there.branches["main"]]
            answers = []
            for file in json.loads(body)["files"]:
                held = files.get(file["path"])
                large = file["size"] >= LFS_BYTES
                oid = None if held is None else sha256(held) if len(held) >= LFS_BYTES else blob(held)
                mode = {"uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
                answers.append({"path": file["path"], "oid": oid, **mode})
            self.answer(200, {"files": answers})
        elif rest[0] == "commit":
            self.commit(f"{owner}/{repository}", there, body)
        else:
            objects = [self.wanted(one["oid"], one["size"]) for one in json.loads(body)["objects"]]
            self.answer(200, {"transfer": "basic", "objects": objects})

    def wanted(self, oid: str, size: int) -> dict:
        """Where to send an object; nowhere, when it is there already."""
        if oid in self.hub.stored:
            return {"oid": oid, "size": size}
        upload = {"href": f"{self.hub.storage}/{oid}?Signature=SIGNED"}
        actions = {"upload": upload, "verify": {"href": f"{self.hub.url}/verify/{oid}"}}
        return {"oid": oid, "size": size, "actions": actions}

    def do_PUT(self) -> None:
        """A file's bytes into the storage."""
        self.note(self.path)
        name = urlsplit(self.path).path.strip("/")
        size = int(self.headers["Content-Length"])  # as storage like Amazon's asks for
        fault = self.hub.fault(name)
        content = self.rfile.read(size if fault.cut_after is None else fault.cut_after)
        if fault.cut_after is not None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif not self.fails(fault):
            self.hub.stored[sha256(content)] = content
            self.answer(200)

    def commit(self, name: str, there: Repository, body: bytes) -> None:
        fault = self.hub.fault("commit")
        if self.fails(fault):
            return
        lines = [json.loads(line) for line in body.splitlines()]
        head = there.branches["main"]
        if lines[0]["value"].get("parentCommit", head) != head:
            self.answer(412, X_Error_Message="A commit has happened since. Please refresh and try again.")
            return
        files = dict(there.commits[head])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            else:
                del files[value["path"]]
        commit = there.push(files)
        if fault.cut_after is not None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.answer(200, {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}"})

    # ModelScope

    def modelscope(self) -> None:
        kind, owner, repository, *rest = self.words[2:]
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        name = f"datasets/{owner}/{repository}" if kind == "datasets" else f"{owner}/{repository}"
        there = self.hub.repositories.get(name)
        if token and token not in self.hub.tokens:
            self.envelope(401, 10010103009, "AccessToken is invalid or expired")
        elif there is None or (there.private is not None and token not in there.private):
            self.envelope(404, 10010205001, "record not found")
        elif there.gated is not None and token not in there.gated:
            self.envelope(403, 10010103403, "access denied")
        elif rest == ["repo", "tree" if kind == "datasets" else "files"]:
            if not self.fails(self.hub.fault("listing")):
                self.listing(there)
        else:
            commit = there.at(self.query["Revision"])
            self.send_or_redirect(self.query["FilePath"], there.commits[commit][self.query["FilePath"]], ranges=False)

    def envelope(self, status: int, code: int, message: str, data: object = None) -> None:
        success = status == 200
        self.answer(status, {"Code": code, "Data": data, "Message": message, "RequestId": "r", "Success": success})

    def listing(self, there: Repository) -> None:
        commit = there.at(self.query["Revision"])
        if commit is None and re.fullmatch(r"[0-9a-f]{40}", self.query["Revision"]):
            self.envelope(404, 10010205001, "record not found")
            return
        if commit is None:  # a name that there is not is no error to it
            self.envelope(200, 200, "success", {"Files": None, "IsVisual": 0, "LatestCommitter": None})
            return
        files = there.commits[commit]
        entries = [
            {"Name": path, "Path": path, "Type": "tree", "Size": 0, "Revision": commit}
            for path in sorted({path.rpartition("/")[0] for path in files} - {""})
        ]
        for path, content in files.items():
            entries.append(
                {
                    "Name": PurePosixPath(path).name,
                    "Path": path,
                    "Type": "blob",
                    "Size": len(content),
                    "Sha256": sha256(content),
                    "IsLFS": len(content) >= LFS_BYTES,
                    "Revision": commit if path == "config.json" or len(files) < 3 else "f" * 40,
                }
                | self.hub.listed.get(path, {})
            )
        if "PageSize" in self.query:
            size = int(self.query["PageSize"])
            start = size * (int(self.query["PageNumber"]) - 1)
            entries = entries[start : start + size]
        data = {"Files": entries, "IsVisual": 0, "LatestCommitter": {"Id": "", "ShortId": commit[:8]}}
        self.envelope(200, 200, "success", data)
