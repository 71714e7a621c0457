"""The scoring form for operators in a browser: one page on the loopback interface, without a request to anywhere else.

    TrialForm("trials.jsonl", port=8080).serve_forever()

Every page has a fresh token, and a form that is sent twice is recorded once. Nothing is kept in the page: what was
recorded is in the file before the operator sees the confirmation.
"""

import html
import http.server
import secrets
import threading
import urllib.parse
from collections.abc import Mapping
from pathlib import Path

from .rubric import Rubric, load_rubrics
from .trials import TrialBook, summarize_trials


MAX_BODY = 1 << 16  # bytes of a form
PAGE_STYLE = """
*{box-sizing:border-box}body{margin:0;font:17px/1.45 system-ui,sans-serif;color:#1d2433;background:#f5f7fa}
main{max-width:38rem;margin:0 auto;padding:1rem}h1{font-size:1.3rem}label{display:block;margin:.9rem 0 .2rem}
input,select,textarea,button{font:inherit;padding:.6rem;width:100%;border:1px solid #b9c1ce;border-radius:8px;
background:#fff}button{background:#1f5f86;color:#fff;border:0;margin-top:1.2rem;font-weight:600}
fieldset{border:0;padding:0;margin:1rem 0 0}
legend{font-weight:600;padding:0}.choices{display:flex;flex-wrap:wrap;gap:.4rem}
.choices label{margin:0;flex:1 0 3.2rem}
.choices input{position:absolute;opacity:0;width:1px}.choices span{display:block;text-align:center;padding:.65rem 0;
border:1px solid #b9c1ce;border-radius:8px;background:#fff}.choices input:checked+span{background:#1f5f86;color:#fff}
.choices input:focus-visible+span{outline:3px solid #e0a030}.dim{color:#5b6475;font-size:.95rem}
.done{background:#e3f1e5;padding:.7rem;border-radius:8px}.wrong{background:#f9e3e5;padding:.7rem;border-radius:8px}
table{border-collapse:collapse;width:100%;font-size:.95rem}td,th{text-align:left;padding:.3rem .4rem .3rem 0}
"""


class TrialForm:
    """The form and its server.

    Args:
        path: of the trial book.
        rubrics: what can be scored, by id; by default the published ones.
        port: 0 takes a free one.
    """

    def __init__(self, path: Path | str, rubrics: Mapping[str, Rubric] | None = None, port: int = 8080) -> None:
        self.rubrics = dict(load_rubrics() if rubrics is None else rubrics)
        self.book = TrialBook(path)
        self._lock = threading.Lock()
        self._tokens: dict[str, dict | None] = {}  # of the pages; with the trial once it was recorded
        form = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                form.answer(self)

            def do_POST(self) -> None:
                form.answer(self)

            def log_message(self, text: str, *values) -> None:
                """Nothing: the trial book is the log."""

        try:
            self._server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        except OSError:
            self.book.close()
            raise
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}/"

    def serve_forever(self) -> None:
        """Answers until `close`."""
        self._server.serve_forever()

    def close(self) -> None:
        """Stops answering and gives the trial book free."""
        self._server.shutdown()
        self._server.server_close()
        self.book.close()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        """One request: choosing a task, the form of a task, or a filled form."""
        url = urllib.parse.urlsplit(request.path)
        # A page of another site could send forms here; only our own host name and our own tokens are answered
        host = request.headers.get("Host", "").rsplit(":", 1)[0]
        if host not in ("127.0.0.1", "localhost") or url.path != "/":
            self._send(request, 404, "<h1>Not here</h1><p>The form is at the root of this address.</p>")
            return
        with self._lock:
            if request.command == "GET":
                self._send(request, 200, self._form(dict(urllib.parse.parse_qsl(url.query))))
                return
            length = request.headers.get("Content-Length", "")
            if not length.isdecimal() or int(length) > MAX_BODY:
                self._send(request, 413, "<h1>Too large</h1>")
                return
            fields = dict(urllib.parse.parse_qsl(request.rfile.read(int(length)).decode(), keep_blank_values=True))
            self._send(request, *self._record(fields))

    def _record(self, fields: Mapping[str, str]) -> tuple[int, str]:
        token = fields.get("token", "")
        if token not in self._tokens:
            return 400, self._form(fields, wrong="This page is from an earlier session: please fill it in again.")
        entry = self._tokens[token]
        if entry is None:
            rubric = self.rubrics.get(fields.get("task", ""))
            if rubric is None:
                return 400, self._form(fields, wrong="Choose a task first.")
            values = [fields.get(f"stage{index}", "") for index in range(len(rubric.stages))]
            if not all(value.isdecimal() for value in values):
                return 400, self._form(fields, wrong="Every stage needs an answer.")
            policy, operator = fields.get("policy", ""), fields.get("operator", "")
            try:
                entry = self.book.record(
                    self.book.next_id(policy, rubric),
                    policy,
                    rubric,
                    list(map(int, values)),
                    operator,
                    fields.get("comment", ""),
                )
            except ValueError as error:
                return 400, self._form(fields, wrong=str(error))
            except OSError as error:
                return 507, self._form(fields, wrong=f"NOT recorded, the disk says: {error}")
            self._tokens[token] = entry
        done = f"{entry['trial']} recorded: {entry['points']:g} points, progress {entry['progress']:g}."
        return 200, self._form({name: fields.get(name, "") for name in ("task", "policy", "operator")}, done=done)

    def _form(self, fields: Mapping[str, str], wrong: str = "", done: str = "") -> str:
        rubric = self.rubrics.get(fields.get("task", ""))
        parts = ["<h1>Score a trial</h1>"]
        parts += [f'<p class="wrong" role="alert">{html.escape(wrong)}</p>'] * bool(wrong)
        parts += [f'<p class="done" role="status">{html.escape(done)}</p>'] * bool(done)
        options = "".join(
            f'<option value="{key}"{" selected" * (item is rubric)}>{html.escape(item.name)}</option>'
            for key, item in self.rubrics.items()
        )
        parts.append(
            f'<form method="get"><label for="task">Task</label><select id="task" name="task">{options}</select>'
            f"{_hidden(fields, ('policy', 'operator'))}<button>Show its stages</button></form>"
        )
        if rubric is not None:
            token = secrets.token_urlsafe(16)
            self._tokens[token] = None
            parts.append(_stage_form(rubric, fields, token))
        parts.append(_table(self.book.trials, self.book.head))
        return "".join(parts)

    @staticmethod
    def _send(request: http.server.BaseHTTPRequestHandler, status: int, body: str) -> None:
        page = (
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Score a trial</title>'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<style>{PAGE_STYLE}</style></head><body><main>{body}</main></body></html>"
        ).encode()
        request.send_response(status)
        request.send_header("Content-Type", "text/html; charset=utf-8")
        request.send_header("Content-Length", str(len(page)))
        request.send_header("Cache-Control", "no-store")
        request.send_header(
            "Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'"
        )
        request.end_headers()
        request.wfile.write(page)


def _hidden(fields: Mapping[str, str], names: tuple[str, ...]) -> str:
    return "".join(
        f'<input type="hidden" name="{name}" value="{html.escape(fields.get(name, ""), quote=True)}">'
        for name in names
    )


def _stage_form(rubric: Rubric, fields: Mapping[str, str], token: str) -> str:
    note = f" Note: {rubric.note}" if rubric.note else ""
    parts = [
        f'<form method="post"><p class="dim">{html.escape(rubric.description)}. Rule: {html.escape(rubric.rule)} '
        f"(maximum {rubric.maximum:g}).{html.escape(note)}</p>",
        _hidden({"task": rubric.id, "token": token}, ("task", "token")),
    ]
    for name, label in (("policy", "Policy"), ("operator", "Operator")):
        value = html.escape(fields.get(name, ""), quote=True)
        parts.append(f'<label for="{name}">{label}</label><input id="{name}" name="{name}" value="{value}" required>')
    for index, stage in enumerate(rubric.stages):
        choices = "".join(
            f'<label><input type="radio" name="stage{index}" value="{count}" required'
            f"{' checked' * (fields.get(f'stage{index}') == str(count))}><span>{count}</span></label>"
            for count in range(stage.times + 1)
        )
        parts.append(
            f"<fieldset><legend>{html.escape(stage.name)} ({stage.points:.3g} each)</legend>"
            f'<div class="choices">{choices}</div></fieldset>'
        )
    comment = html.escape(fields.get("comment", ""))
    parts.append(f'<label for="comment">Comment</label><textarea id="comment" name="comment">{comment}</textarea>')
    parts.append("<button>Record this trial</button></form>")
    return "".join(parts)


def _table(trials: list[dict], head: str) -> str:
    if not trials:
        return '<p class="dim">No trial recorded yet.</p>'
    rows = "".join(
        f"<tr><td>{html.escape(policy)}</td><td>{html.escape(task)}</td><td>{entry['trials']}</td>"
        f"<td>{entry['progress']:.1f}</td></tr>"
        for policy, tasks in summarize_trials(trials).items()
        for task, entry in tasks.items()
    )
    return (
        f"<h1>So far</h1><table><tr><th>policy</th><th>task</th><th>trials</th><th>progress</th></tr>{rows}</table>"
        f'<p class="dim">{len(trials)} trials; the chain ends with {head[:16]}</p>'
    )
