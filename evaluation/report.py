"""Reports that can be sent around: one HTML file that needs nothing else, the same as Markdown, and as JSON.

    write_report(load_run("runs/eval-hub"), "runs/eval-hub/report", references=["wall-oss-0.5"])
    write_comparison(load_run("runs/a"), load_run("runs/b"), "runs/a-against-b")

Both are made from blocks (a heading, a paragraph, a table, a bar chart, a video), which are rendered twice.
"""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from .published_results import WARNING, load_reference
from .statistics import compare_paired, compare_unpaired, holm, trials_to_tell_apart


MAX_VIDEOS = 6
MAX_VIDEO_BYTES = 6 << 20  # all embedded videos together
STYLE = """
:root{--ink:#1d2433;--dim:#5b6475;--line:#dfe3ea;--bar:#2e6f95;--other:#d1495b;--page:#fff;--soft:#f5f7fa}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ef;--dim:#9aa4b5;--line:#343b48;--bar:#6fb1d6;--other:#f08090;
--page:#151922;--soft:#1d222d}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:60rem;margin:0 auto;padding:1.5rem 1rem 4rem}h1{font-size:1.6rem;line-height:1.2;margin:.5rem 0}
h2{font-size:1.15rem;margin:2.2rem 0 .6rem}p{margin:.5rem 0;max-width:46rem}.dim{color:var(--dim)}
.note{background:var(--soft);border-left:4px solid var(--other);padding:.6rem .9rem;max-width:46rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .7rem .3rem 0;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th{color:var(--dim);font-weight:600}th:first-child,td:first-child,.text{text-align:left}
.chart{display:grid;grid-template-columns:minmax(7rem,max-content) 1fr max-content;gap:.35rem .8rem;align-items:center;
font-size:.9rem;max-width:46rem;margin:0 0 1.4rem}.chart svg{width:100%;height:14px;
display:block}.chart b{font-weight:600}
.chart .group{grid-column:1/-1;font-weight:600;margin-top:.6rem}
.videos{display:grid;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr));gap:1rem}
video{width:100%;border-radius:6px}
figure{margin:0}figcaption{font-size:.85rem;color:var(--dim)}code{background:var(--soft);padding:.1rem .3rem}
@media (max-width:40rem){.chart{grid-template-columns:1fr max-content;grid-auto-flow:dense}
.chart .name{grid-column:1}.chart .value{grid-column:2}.chart .bar{grid-column:1/-1}}
"""


def load_run(path: Path | str) -> dict:
    """The results of an evaluation: its folder or its `results.json`.

    Returns:
        What `evaluate` wrote, with `name` (of the folder) and `folder`.

    Raises:
        ValueError: nothing there, or no results of ours.
    """
    path = Path(path)
    file = path / "results.json" if path.is_dir() else path
    if not file.exists():
        raise ValueError(f"{path} holds no results.json: give the output folder of a finished `wallvla eval`.")
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON ({error}): evaluate again.") from error
    missing = {"spec", "episodes", "summary"} - set(results)
    if missing:
        raise ValueError(f"{file} has no {sorted(missing)}: it is no result of `wallvla eval`.")
    return {**results, "name": file.resolve().parent.name, "folder": str(file.resolve().parent)}


# --- what is said


def run_report(run: Mapping, references: Sequence[str] = ()) -> dict:
    """The blocks and the figures of one run; see `write_report`."""
    spec = run["spec"]
    blocks: list[dict] = [
        {"kind": "title", "text": f"Closed-loop evaluation: {run['name']}"},
        {"kind": "text", "text": _conditions(spec)},
        {"kind": "heading", "text": "Success rates"},
        {"kind": "chart", "rows": _chart_rows(run["summary"])},
        _summary_table(run["summary"]),
        {
            "kind": "text",
            "text": "Intervals are Wilson's, 95%. Progress is the best of an episode, 0 to 100, on the scale of the "
            "simulator; steps are those of the successes.",
        },
    ]
    comparisons = _compare_policies(run)
    if comparisons:
        blocks += [
            {"kind": "heading", "text": "Policies on the same scenes"},
            _comparison_table(comparisons),
            *({"kind": "text", "text": f"{row['a']} and {row['b']}: {row['advice']}"} for row in comparisons),
        ]
    for name in references:
        blocks += _reference_blocks(name)
    failures = [episode for episode in run["episodes"] if not episode["success"]]
    if failures:
        rows = [
            [episode["policy"], episode["task"], episode["seed"], episode["steps"], round(100 * episode["progress"])]
            for episode in failures[:40]
        ]
        more = f" (the first 40 of {len(failures)})" if len(failures) > 40 else ""
        blocks += [
            {"kind": "heading", "text": f"Failures{more}"},
            {
                "kind": "text",
                "text": "Each can be run again and looked at: wallvla replay RUN --task TASK --seed SEED",
            },
            {"kind": "table", "columns": ["policy", "task", "seed", "steps", "progress"], "rows": rows, "texts": 2},
        ]
    videos = sorted((item for item in run["episodes"] if item["video"]), key=lambda item: item["success"])
    if videos:
        blocks.append({"kind": "heading", "text": "Videos, failures first"})
        blocks.append({"kind": "videos", "items": [_video_item(run, episode) for episode in videos[:MAX_VIDEOS]]})
    if run.get("video_errors"):
        blocks.append({"kind": "note", "text": "Videos that could not be written: " + "; ".join(run["video_errors"])})
    figures = {"name": run["name"], "spec": spec, "summary": run["summary"], "comparisons": comparisons}
    return {"blocks": blocks, "figures": {**figures, "references": [load_reference(name) for name in references]}}


def comparison_report(
    first: Mapping, second: Mapping, policies: tuple[str | None, str | None] = (None, None), references=()
) -> dict:
    """The blocks and the figures of a comparison of two runs; see `write_comparison`.

    Episodes with the same task and seed are pairs. Where a task has none, its episodes are compared as independent
    trials, and the report says so.

    Raises:
        ValueError: a policy that a run does not have, or no task in common.
    """
    names = [_pick_policy(run, policy) for run, policy in zip((first, second), policies, strict=True)]
    outcomes = [
        {(item["task"], item["seed"]): item for item in run["episodes"] if item["policy"] == name}
        for run, name in zip((first, second), names, strict=True)
    ]
    tasks = [task for task in first["spec"]["tasks"] if task in second["spec"]["tasks"]]
    if not tasks:
        raise ValueError(
            f"{first['name']} and {second['name']} have no task in common: {first['spec']['tasks']} and "
            f"{second['spec']['tasks']}. Evaluate both on the same ones."
        )
    rows = [{"task": task, **_compare_task(outcomes, task)} for task in tasks]
    corrected = holm({row["task"]: row["p"] for row in rows})
    for row in rows:
        row["p_holm"] = corrected[row["task"]]
    pairs = [key for key in outcomes[0] if key in outcomes[1]]
    total = None
    if pairs and all(row["paired"] for row in rows):
        successes = [[table[key]["success"] for key in pairs] for table in outcomes]
        total = compare_paired(*successes, groups=[task for task, _ in pairs])
    labels = [f"{run['name']} ({name})" for run, name in zip((first, second), names, strict=True)]
    differing = _differing_rules(first["spec"], second["spec"])
    blocks: list[dict] = [
        {"kind": "title", "text": f"{labels[0]} against {labels[1]}"},
        {"kind": "text", "text": f"A is {labels[0]}: {_conditions(first['spec'])}"},
        {"kind": "text", "text": f"B is {labels[1]}: {_conditions(second['spec'])}"},
    ]
    if differing:
        blocks.append({"kind": "note", "text": f"The two runs had different rules: {'; '.join(differing)}."})
    if total is not None:
        interval = f"[{total['low']:+.1%}, {total['high']:+.1%}]"
        lead = f"Over {total['trials']} common scenes A minus B is {total['difference']:+.1%} {interval}."
        blocks.append({"kind": "lead", "text": f"{lead} {total['advice']}"})
    blocks += [
        {"kind": "heading", "text": "By task"},
        {"kind": "chart", "rows": _pair_chart(rows)},
        _task_table(rows),
        {
            "kind": "text",
            "text": "p: McNemar's exact test on pairs with the same seed, Fisher's exact test where there are none; "
            "Holm: corrected for the number of tasks; intervals: 95%, bootstrap for pairs, else Newcombe.",
        },
        *({"kind": "text", "text": f"{row['task']}: {row['advice']}"} for row in rows),
    ]
    for name in references:
        blocks += _reference_blocks(name)
    figures = {"a": labels[0], "b": labels[1], "tasks": rows, "all": total, "differing_rules": differing}
    return {"blocks": blocks, "figures": {**figures, "references": [load_reference(name) for name in references]}}


def write_report(run: Mapping, folder: Path | str, references: Sequence[str] = ()) -> dict[str, Path]:
    """Writes `report.html`, `report.md` and `report.json` of a run and returns their paths by ending.

    Args:
        run: from `load_run`.
        folder: gets the files.
        references: names of `published_results` to print beside it.
    """
    return _write(run_report(run, references), Path(folder))


def write_comparison(
    first: Mapping,
    second: Mapping,
    folder: Path | str,
    policies: tuple[str | None, str | None] = (None, None),
    references: Sequence[str] = (),
) -> dict[str, Path]:
    """Like `write_report`, for two runs; `policies` names one of each, by default its first."""
    return _write(comparison_report(first, second, policies, references), Path(folder))


def write_blind_report(results: Mapping, folder: Path | str) -> dict[str, Path]:
    """Like `write_report`, for what `blind.reveal` returned."""
    rows = []
    for model, tasks in results["summary"].items():
        for task, entry in tasks.items():
            progress = f"{entry['progress_low']:.1f} - {entry['progress_high']:.1f}"
            interval = f"{entry['low']:.0%} - {entry['high']:.0%}"
            cells = [f"{entry['progress']:.1f}", progress, f"{entry['rate']:.0%}", interval]
            rows.append([model, task, entry["trials"], *cells])
    blocks: list[dict] = [
        {"kind": "title", "text": "Grouped blind ensemble"},
        {
            "kind": "text",
            "text": f"{len(results['trials'])} trials, judged without knowing the model. The hash chain ",
        },
        {"kind": "heading", "text": "Task progress and success"},
        {"kind": "chart", "rows": _chart_rows(results["summary"])},
        {
            "kind": "table",
            "columns": ["model", "task", "trials", "progress", "95%", "success", "95%"],
            "rows": rows,
            "texts": 2,
        },
        {"kind": "heading", "text": "Pairs of models, over all tasks"},
        _comparison_table(results["comparisons"]),
        *({"kind": "text", "text": f"{row['a']} and {row['b']}: {row['advice']}"} for row in results["comparisons"]),
    ]
    blocks[1]["text"] += f"of the journal ends with {results['head'][:16]}; {len(results['repeats'])} trials repeated."
    return _write({"blocks": blocks, "figures": dict(results)}, Path(folder))


def _write(report: Mapping, folder: Path) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "html": render_html(report["blocks"]),
        "md": render_markdown(report["blocks"]),
        "json": json.dumps(report["figures"], indent=1) + "\n",
    }
    paths = {}
    for ending, text in texts.items():
        paths[ending] = folder / f"report.{ending}"
        partial = folder / f".report.{ending}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(paths[ending])
    return paths


# --- pieces


def _conditions(spec: Mapping) -> str:
    first, last = spec["seed0"], spec["seed0"] + spec["episodes_per_task"] - 1
    limit = "the environment's limit" if spec["max_steps"] is None else f"{spec['max_steps']} steps"
    return (
        f"tasks: {len(spec['tasks'])}, {spec['episodes_per_task']} episodes each (seeds {first} to {last}, none of "
        f"them used in training), {limit}, {spec['execute_steps']} actions of a chunk executed, "
        f"{spec['settle_steps']} settle steps, images of {spec['image_size']} px."
    )


def _differing_rules(first: Mapping, second: Mapping) -> list[str]:
    names = ("image_size", "execute_steps", "max_steps", "settle_steps")
    return [f"{name} {first[name]} and {second[name]}" for name in names if first[name] != second[name]]


def _pick_policy(run: Mapping, policy: str | None) -> str:
    known = list(run["spec"]["policies"])
    if policy is not None and policy not in known:
        raise ValueError(f"{run['name']} has no policy {policy!r}: it has {', '.join(known)}.")
    return known[0] if policy is None else policy


def _compare_task(outcomes: Sequence[Mapping], task: str) -> dict:
    first, second = ({key: item for key, item in table.items() if key[0] == task} for table in outcomes)
    common = [key for key in first if key in second]
    if common:
        result = compare_paired([first[key]["success"] for key in common], [second[key]["success"] for key in common])
        return {"paired": True, **result}
    counts = [(sum(item["success"] for item in table.values()), len(table)) for table in (first, second)]
    return {"paired": False, **compare_unpaired(*counts[0], *counts[1])}


def _compare_policies(run: Mapping) -> list[dict]:
    """The first policy of a run against each of the others, on all its scenes."""
    tables: dict[str, dict] = {name: {} for name in run["spec"]["policies"]}
    for episode in run["episodes"]:
        tables[episode["policy"]][episode["task"], episode["seed"]] = episode["success"]
    [(name, own), *others] = tables.items()
    rows = []
    for other, table in others:
        keys = [key for key in own if key in table]
        result = compare_paired([own[k] for k in keys], [table[k] for k in keys], [task for task, _ in keys])
        rows.append({"a": name, "b": other, **result})
    corrected = holm({row["b"]: row["p"] for row in rows})
    return [{**row, "p_holm": corrected[row["b"]]} for row in rows]


def _chart_rows(summary: Mapping[str, Mapping]) -> list[dict]:
    rows = []
    for policy, tasks in summary.items():
        rows.append({"group": policy})
        for task, entry in tasks.items():
            if len(tasks) > 2 or task != "all":
                rows.append({"name": task, **{key: entry[key] for key in ("rate", "low", "high")}, "other": False})
    return rows


def _pair_chart(rows: Sequence[Mapping]) -> list[dict]:
    chart = []
    for row in rows:
        chart.append({"group": row["task"]})
        for name in ("a", "b"):
            rate = row[f"rate_{name}"]
            chart.append({"name": name.upper(), "rate": rate, "low": rate, "high": rate, "other": name == "b"})
    return chart


def _summary_table(summary: Mapping[str, Mapping]) -> dict:
    rows = []
    for policy, tasks in summary.items():
        for task, entry in tasks.items():
            rows.append(
                [
                    policy,
                    task,
                    f"{entry['successes']}/{entry['episodes']}",
                    f"{entry['rate']:.1%}",
                    f"{entry['low']:.1%} - {entry['high']:.1%}",
                    f"{entry['progress']:.0f}",
                    None if entry["mean_steps"] is None else f"{entry['mean_steps']:.0f}",
                    f"{entry['policy_ms']:.1f}",
                ]
            )
    columns = ["policy", "task", "successes", "rate", "95%", "progress", "steps", "ms per call"]
    return {"kind": "table", "columns": columns, "rows": rows, "texts": 2}


def _comparison_table(rows: Sequence[Mapping]) -> dict:
    cells = [
        [
            row["a"],
            row["b"],
            f"{row['difference']:+.1%}",
            f"{row['low']:+.1%} to {row['high']:+.1%}",
            f"{row['p']:.2g}",
            f"{row['p_holm']:.2g}",
            trials_to_tell_apart(row["rate_a"], row["rate_b"]),
        ]
        for row in rows
    ]
    columns = ["A", "B", "A - B", "95%", "p", "p (Holm)", "trials needed"]
    return {"kind": "table", "columns": columns, "rows": cells, "texts": 2}


def _task_table(rows: Sequence[Mapping]) -> dict:
    cells = [
        [
            row["task"],
            f"{row['trials']}{'' if row['paired'] else ' (not paired)'}",
            f"{row['rate_a']:.1%}",
            f"{row['rate_b']:.1%}",
            f"{row['difference']:+.1%}",
            f"{row['low']:+.1%} to {row['high']:+.1%}",
            f"{row['only_a']} / {row['only_b']}" if row["paired"] else None,
            f"{row['p']:.2g}",
            f"{row['p_holm']:.2g}",
        ]
        for row in rows
    ]
    columns = ["task", "trials", "A", "B", "A - B", "95%", "only A / only B", "p", "p (Holm)"]
    return {"kind": "table", "columns": columns, "rows": cells, "texts": 1}


def _reference_blocks(name: str) -> list[dict]:
    reference = load_reference(name)
    blocks: list[dict] = [
        {"kind": "heading", "text": f"Published: {reference['paper']}"},
        {"kind": "note", "text": WARNING},
    ]
    for table in reference["tables"]:
        where = (
            table["id"] if not table["id"][0].isalnum() or table["id"].startswith("Fig") else f"Table {table['id']}"
        )
        caption = f"{where}: {table['title']} ({table['metric']}; {table['conditions']})"
        blocks.append({"kind": "text", "text": caption})
        texts = sum(
            any(isinstance(row[index], str) for row in table["rows"]) for index in range(len(table["columns"]))
        )
        blocks.append({"kind": "table", "columns": table["columns"], "rows": table["rows"], "texts": max(1, texts)})
    return blocks


def _video_item(run: Mapping, episode: Mapping) -> dict:
    word = "success" if episode["success"] else "failure"
    caption = f"{episode['policy']}, {episode['task']}, seed {episode['seed']}: {word}"
    return {"path": str(Path(run["folder"]) / episode["video"]), "caption": caption}


# --- how it is said


def render_markdown(blocks: Sequence[Mapping]) -> str:
    """The blocks as Markdown; charts say nothing that the tables do not, and are left out."""
    lines: list[str] = []
    for block in blocks:
        kind = block["kind"]
        if kind == "title":
            lines.append(f"# {block['text']}")
        elif kind == "heading":
            lines.append(f"## {block['text']}")
        elif kind == "lead":
            lines.append(f"**{block['text']}**")
        elif kind == "note":
            lines.append(f"> **Note.** {block['text']}")
        elif kind == "text":
            lines.append(block["text"])
        elif kind == "table":
            rows = [[_cell(value).replace("|", "\\|") for value in row] for row in [block["columns"], *block["rows"]]]
            rows.insert(1, ["---"] * block["texts"] + ["---:"] * (len(block["columns"]) - block["texts"]))
            lines.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
        elif kind == "videos":
            lines.append("\n".join(f"- {item['caption']}: `{Path(item['path']).name}`" for item in block["items"]))
    return "\n\n".join(lines) + "\n"


def render_html(blocks: Sequence[Mapping]) -> str:
    """The blocks as one HTML document without any reference to something outside of it."""
    title = next(block["text"] for block in blocks if block["kind"] == "title")
    body = []
    budget = MAX_VIDEO_BYTES
    for block in blocks:
        kind = block["kind"]
        if kind in ("title", "heading", "text", "lead", "note"):
            start, end = {
                "title": ("<h1>", "</h1>"),
                "heading": ("<h2>", "</h2>"),
                "text": ('<p class="dim">', "</p>"),
                "lead": ("<p><strong>", "</strong></p>"),
                "note": ('<p class="note">', "</p>"),
            }[kind]
            body.append(start + html.escape(block["text"]) + end)
        elif kind == "table":
            body.append(_html_table(block))
        elif kind == "chart":
            body.append(_html_chart(block["rows"]))
        elif kind == "videos":
            videos, budget = _html_videos(block["items"], budget)
            body.append(videos)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def _cell(value) -> str:
    return "-" if value is None else str(value)


def _html_table(block: Mapping) -> str:
    def row(cells: Sequence, tag: str) -> str:
        styles = [' class="text"' if index < block["texts"] else "" for index in range(len(cells))]
        return "".join(
            f"<{tag}{style}>{html.escape(_cell(cell))}</{tag}>" for cell, style in zip(cells, styles, strict=True)
        )

    lines = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in block["rows"])
    return f'<div class="wide"><table><tr>{row(block["columns"], "th")}</tr>{lines}</table></div>'


def _html_chart(rows: Sequence[Mapping]) -> str:
    """Bars of rates with a whisker for the interval, as inline SVG in percent of the width."""
    parts = []
    for row in rows:
        if "group" in row:
            parts.append(f'<span class="group">{html.escape(row["group"])}</span>')
            continue
        rate, low, high = (100 * row[key] for key in ("rate", "low", "high"))
        color = "var(--other)" if row["other"] else "var(--bar)"
        value = f"{rate:.0f}%" if low == high else f"{rate:.0f}% [{low:.0f}, {high:.0f}]"
        whisker = (
            ""
            if low == high
            else (
                f'<line x1="{low:.2f}" x2="{high:.2f}" y1="7" y2="7" stroke="var(--ink)" stroke-width="1.5" '
                'vector-effect="non-scaling-stroke"/>'
            )
        )
        parts.append(
            f'<span class="name">{html.escape(row["name"])}</span>'
            f'<span class="bar"><svg viewBox="0 0 100 14" preserveAspectRatio="none" role="img" aria-label="{value}">'
            f'<rect width="100" height="14" fill="var(--soft)"/>'
            f'<rect width="{rate:.2f}" height="14" fill="{color}" opacity=".75"/>{whisker}</svg></span>'
            f'<b class="value">{value}</b>'
        )
    return f'<div class="chart">{"".join(parts)}</div>'


def _html_videos(items: Sequence[Mapping], budget: int) -> tuple[str, int]:
    """Videos inside of the page as long as they fit into the budget of bytes; the rest by name."""
    figures = []
    for item in items:
        path, caption = Path(item["path"]), html.escape(item["caption"])
        size = path.stat().st_size if path.exists() else None
        if size is None or size > budget:
            reason = "missing" if size is None else "too large to embed"
            figures.append(f"<figure><figcaption>{caption} ({reason}: {html.escape(path.name)})</figcaption></figure>")
            continue
        budget -= size
        data = base64.b64encode(path.read_bytes()).decode()
        figures.append(
            f'<figure><video controls muted loop playsinline preload="metadata" src="data:video/mp4;base64,{data}">'
            f"</video><figcaption>{caption}</figcaption></figure>"
        )
    return f'<div class="videos">{"".join(figures)}</div>', budget
