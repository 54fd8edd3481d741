"""A hub on this machine: what huggingface_hub asks of one to list, read and write repositories, and a log of it."""

import base64
import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

_RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_MODEL = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?")
_UPLOAD = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/(?P<step>preupload|commit)/(?P<revision>[^/]+)")


class HubServer(ThreadingHTTPServer):
    """Repositories by name, each a list of commits: files by name, the last commit being "main".

    Attributes:
        repos: names to commits.
        private: what `create` was asked for, by name.
        lfs, refuse_uploads: whether uploads go by way of LFS, and fail; `objects` has them by checksum.
        log: of each request method, path and bytes that were answered.
        before_commit: called before a commit is taken.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos, self.private, self.objects, self.log = {}, {}, {}, []
        self.lfs = self.refuse_uploads = False
        self.before_commit = lambda: None

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, repo, **files):
        """A commit with these files beside those of the last one; "__" stands for "." in names."""
        commits = self.repos.setdefault(repo, [{}])
        commits.append({**commits[-1], **{name.replace("__", "."): content for name, content in files.items()}})

    def files(self, repo, revision="main"):
        commits = self.repos[repo]
        return (
            commits[-1] if revision == "main" else commits[[sha(repo, i) for i in range(len(commits))].index(revision)]
        )


def sha(repo, number):
    return hashlib.sha1(f"{repo} {number}".encode()).hexdigest()


@contextmanager
def running():
    server = HubServer()
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if found := _RESOLVE.fullmatch(path):
            self._file(**found.groupdict())
        elif found := _MODEL.fullmatch(path):
            self._model(found["repo"], found["revision"] or "main")
        else:
            self._answer(404)

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = unquote(urlsplit(self.path).path)
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path.endswith("/info/lfs/objects/batch"):
            asked = json.loads(body)["objects"]
            links = [
                {**item, "actions": {"upload": {"href": f"{self.server.endpoint}/{item['oid']}"}}} for item in asked
            ]
            self._json({"transfer": "basic", "objects": links})
        elif found := _UPLOAD.fullmatch(path):
            self._commit(found["repo"], body) if found["step"] == "commit" else self._preupload(json.loads(body))
        else:
            self._answer(404)

    def do_PUT(self):
        self.server.objects[self.path[1:]] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(403 if self.server.refuse_uploads else 200)

    def _file(self, repo, revision, file):
        content = self._commit_files(repo, revision)
        if content is None:
            return
        if file not in content:
            self._answer(404, headers={"X-Error-Code": "EntryNotFound"})
            return
        content, code = content[file], 200
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": self._sha(repo, revision)}
        if found := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, last = map(int, found.groups())
            headers["Content-Range"] = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
            content, code = content[first : last + 1], 206
        self._answer(code, content, headers)

    def _model(self, repo, revision):
        files = self._commit_files(repo, revision)
        if files is not None:
            names = [{"rfilename": name} for name in files]
            self._json({"id": repo, "sha": self._sha(repo, revision), "siblings": names})

    def _create(self, asked):
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        url = {"url": f"{self.server.endpoint}/{name}"}
        if name in self.server.repos:
            self._json(url, 409)
            return
        self.server.private[name] = asked.get("private", asked.get("visibility") == "private")
        self.server.add(name, __gitattributes=b"")
        self._json(url)

    def _preupload(self, asked):
        mode = "lfs" if self.server.lfs else "regular"
        self._json({"files": [{"path": f["path"], "uploadMode": mode, "shouldIgnore": False} for f in asked["files"]]})

    def _commit(self, repo, body):
        self.server.before_commit()
        lines = [json.loads(line) for line in body.splitlines()]
        commits, files, header = self.server.repos[repo], {}, lines[0]["value"]
        if header.get("parentCommit") not in (None, sha(repo, len(commits) - 1)):
            self._json({"error": "a commit has happened since"}, 412)
            return
        for line in lines[1:]:
            value = line["value"]
            files[value["path"]] = (
                base64.b64decode(value["content"]) if line["key"] == "file" else self.server.objects[value["oid"]]
            )
        commits.append({**commits[-1], **files})
        commit = sha(repo, len(commits) - 1)
        url = f"{self.server.endpoint}/{repo}/commit/{commit}"
        self._json({"success": True, "commitUrl": url, "commitOid": commit, "hookOutput": header["summary"]})

    def _commit_files(self, repo, revision):
        """The files at a revision; None, and the answer why, if there are none."""
        if repo == "owner/gated":
            self._answer(403, headers={"X-Error-Code": "GatedRepo"})
            return None
        if repo not in self.server.repos:
            self._answer(404, headers={"X-Error-Code": "RepoNotFound"})
            return None
        try:
            return self.server.files(repo, revision)
        except ValueError:
            self._answer(404, headers={"X-Error-Code": "RevisionNotFound"})
            return None

    def _sha(self, repo, revision):
        return sha(repo, len(self.server.repos[repo]) - 1) if revision == "main" else revision

    def _json(self, value, code=200):
        self._answer(code, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, code, content=b"", headers=None):
        self.send_response(code)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        self.server.log.append((self.command, unquote(self.path), len(content) if self.command != "HEAD" else 0))
