"""A W&B server on the loopback, as much of one as wandb 0.31 needs: it stores what it is sent, and fails as it is told.

It answers what `wandb.init`, the stream of a run, `wandb beta sync` and `wandb.Api().run` ask. Rows are stored at the
offset they are sent to, as the real service does: a row sent twice to one place is one row, to two places two.
"""

import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "f" * 40
ENTITY = "somebody"


@dataclass
class StoredRun:
    """What the server knows of a run."""

    name: str
    project: str
    entity: str
    rows: dict[int, dict] = field(default_factory=dict)  # of the history, by offset
    config: dict = field(default_factory=dict)
    summary: dict = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    fields: dict = field(default_factory=dict)  # of UpsertBucket: displayName, groupName, jobType, commit, ...
    lines: dict[str, int] = field(default_factory=dict)  # lengths of the other streams
    uploads: dict[str, bytes] = field(default_factory=dict)
    exit_codes: list[int] = field(default_factory=list)

    @property
    def history(self):
        """Return the rows in the order of their offsets."""
        return [self.rows[offset] for offset in sorted(self.rows)]

    @property
    def steps(self):
        """Return the steps in the order of the rows."""
        return [row["_step"] for row in self.history]

    def settings(self):
        """Return the config without what W&B adds."""
        return {name: entry["value"] for name, entry in self.config.items() if name != "_wandb"}


class WandbServer:
    """Serves on a free port of the loopback.

    Attributes:
        runs: by their ids.
        fault: None; "error": HTTP 500 for ever; "silent": accepts, never answers; "key": refuses every key; "gone":
            refuses connections; "rows": HTTP 500 to rows alone; "lost": thanks for rows and forgets them.
        die_after: rows that it takes before the fault `die_of` begins, or None.
        die_at: name of the GraphQL operation at which it begins, or None.
    """

    def __init__(self):
        self.runs: dict[str, StoredRun] = {}
        self.fault = None
        self.die_after = None
        self.die_at = None
        self.die_of = None
        self.requests: list[str] = []
        self.unknown: list[str] = []
        self.lock = threading.Lock()
        self._ended = threading.Event()
        handler = type("Handler", (_Handler,), {"server_of_runs": self, "ended": self._ended})
        self._http = _Http(("127.0.0.1", 0), handler)
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self._http.server_port}"

    def environment(self, **others):
        """Return the variables with which a process talks to this server."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB_MODE": "online", **others}

    def close(self):
        """Refuse connections from now on."""
        self._ended.set()
        self._http.shutdown()
        self._http.server_close()

    def only_run(self):
        """Return the one run that there is."""
        (run,) = self.runs.values()
        return run

    # ---- what is asked -----------------------------------------------------------------------------------------------

    def answer(self, operation, query, given):
        """Return the data of a GraphQL answer; the caller holds the lock."""
        if operation in ("Viewer", "GetDefaultEntity"):
            return {"viewer": _viewer()}
        if operation == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        if operation == "OrganizationCoreWeaveOrganizationID":
            return {"entity": {"organization": {"coreWeaveOrganizationId": None}}}
        if operation == "RunResumeStatus":
            run = self.runs.get(given["name"])
            model = {"id": "project", "name": given.get("project"), "entity": {"id": "entity", "name": ENTITY}}
            return {"model": {**model, "bucket": None if run is None else _bucket(run)}}
        if operation == "UpsertBucket":
            return {"upsertBucket": {"bucket": _bucket(self._upsert(given)), "inserted": True}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{given['run']}/{name}"} for name in given["files"]]
            return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}
        if operation in ("Run", "RunHistoryKeys"):
            run = self.runs.get(given["name"])
            return {"project": {"internalId": "1", "run": None if run is None else _bucket(run)}}
        self.unknown.append(f"{operation}: {query}")
        return {}

    def _upsert(self, given):
        run = self.runs.setdefault(
            given["name"],
            StoredRun(given["name"], given.get("project") or "uncategorized", given.get("entity") or ENTITY),
        )
        if given.get("config"):
            run.config = json.loads(given["config"])
        if given.get("tags") is not None:
            run.tags = given["tags"]
        run.fields |= {name: value for name, value in given.items() if value is not None}
        return run

    def dies_of(self, name, sent):
        """Say whether this part of a stream is one too many, and begin to fail if it is."""
        rows = len(self.runs[name].rows) + len(sent.get("files", {}).get("wandb-history.jsonl", {}).get("content", []))
        if self.die_after is None or rows <= self.die_after:
            return False
        self.fault, self.die_after = self.die_of, None
        if self.fault == "gone":
            threading.Thread(target=self.close).start()
        return True

    def store(self, name, sent):
        """Store a part of a stream."""
        run = self.runs[name]
        for file, part in sent.get("files", {}).items():
            for place, line in enumerate(part["content"], part["offset"]):
                if file == "wandb-history.jsonl":
                    run.rows[place] = json.loads(line)
                elif file == "wandb-summary.json":
                    run.summary |= json.loads(line)
                else:
                    run.lines[file] = place + 1
        if sent.get("complete"):
            run.exit_codes.append(sent.get("exitcode"))


def _viewer():
    return {
        "id": "viewer", "entity": ENTITY, "username": ENTITY, "name": ENTITY, "email": "", "admin": False,
        "flags": "{}", "teams": {"edges": []}, "apiKeys": {"edges": []}, "deletedAt": None,
    }  # fmt: skip


def _bucket(run):
    history = run.history
    return {
        "id": f"id-{run.name}", "name": run.name, "displayName": run.fields.get("displayName", run.name),
        "description": None, "notes": None, "tags": run.tags, "config": json.dumps(run.config), "sweepName": None,
        "state": "finished", "commit": run.fields.get("commit"), "group": run.fields.get("groupName"),
        "jobType": run.fields.get("jobType"), "createdAt": "2026-01-01T00:00:00", "heartbeatAt": "2026-01-01T00:00:00",
        "project": {"id": "project", "name": run.project, "entity": {"id": "entity", "name": run.entity}},
        "projectId": 1, "user": {"name": ENTITY, "username": ENTITY}, "readOnly": False, "historyKeys": {
            "lastStep": history[-1]["_step"] if history else -1, "keys": {}, "sets": [],
        },
        "summaryMetrics": json.dumps(run.summary), "systemMetrics": "{}", "historyLineCount": len(run.rows),
        "logLineCount": run.lines.get("output.log", 0), "eventsLineCount": run.lines.get("wandb-events.jsonl", 0),
        "historyTail": json.dumps([json.dumps(row) for row in history[-1:]]), "eventsTail": "[]",
        "wandbConfig": json.dumps({"t": run.config.get("_wandb", {}).get("value", {}).get("t", {})}),
    }  # fmt: skip


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """Say nothing of clients that left, or were killed."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of_runs: WandbServer
    ended: threading.Event

    def _answer(self):
        server = self.server_of_runs
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with server.lock:
            server.requests.append(self.path)
            status, value = self._act(server, body)
            silent = server.fault in ("silent", "gone")
        if silent:
            self.ended.wait()
            self.close_connection = True
            return
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _act(self, server, body):
        if server.fault in ("silent", "gone"):
            return 200, {}
        if server.fault == "error":
            return 500, {"error": "told to fail"}
        if server.fault == "key":
            return 401, {"errors": [{"message": "user is not logged in"}]}
        if self.path == "/graphql":
            asked = json.loads(body)
            operation = asked.get("operationName") or re.search(r"(?:query|mutation) (\w+)", asked["query"])[1]
            server.requests[-1] += f" {operation}"
            if operation == server.die_at:
                server.fault, server.die_at = server.die_of, None
                return self._act(server, body)
            return 200, {"data": server.answer(operation, asked["query"], asked.get("variables") or {})}
        if self.path.endswith("/file_stream"):
            name, sent = self.path.split("/")[4], json.loads(body)
            if server.fault == "rows":
                return 500, {"error": "told to fail"}
            if server.fault == "lost":
                return 200, {"exitcode": None, "limits": {}}
            if server.dies_of(name, sent):
                return self._act(server, body)
            server.store(name, sent)
            return 200, {"exitcode": None, "limits": {}}
        if self.path.startswith("/upload/"):
            _, _, name, file = self.path.split("/", 3)
            server.runs[name].uploads[file.partition("?")[0]] = body
        return 200, {}

    do_GET = do_POST = do_PUT = _answer

    def log_message(self, *_):
        """Print nothing."""
