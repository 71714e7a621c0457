"""Statistics, rubrics, trial books and the blind protocol: no simulator, outcomes drawn from coins."""

import itertools
import json
import math
import stat
import threading
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import pytest
from scipy import stats as scipy_stats

from wallvla import cli
from wallvla.evaluation import commands
from wallvla.evaluation.blind import (
    BlindDispatcher,
    BlindError,
    BlindGate,
    BlindStudy,
    create_study,
    plan_study,
    reveal,
    trial_seed,
)
from wallvla.evaluation.journal import Journal, JournalError, read_journal
from wallvla.evaluation.published_results import load_reference, reference_names
from wallvla.evaluation.remote import RemotePolicy, policy_server
from wallvla.evaluation.report import write_blind_report
from wallvla.evaluation.rubric import Rubric, Stage, load_rubrics, read_rubrics
from wallvla.evaluation.statistics import (
    bootstrap_mean,
    compare_paired,
    compare_unpaired,
    fisher_exact,
    holm,
    mcnemar_exact,
    newcombe_interval,
    paired_bootstrap,
    planted_study,
    smallest_difference,
    trials_to_tell_apart,
)
from wallvla.evaluation.trials import TrialBook, read_trials, score_in_terminal, summarize_trials
from wallvla.evaluation.trials_web import TrialForm


# ---- statistics ----


def test_exact_tests_agree_with_scipy():
    for only_a, only_b in itertools.product(range(0, 13, 3), range(0, 9, 2)):
        pairs = only_a + only_b
        expected = scipy_stats.binomtest(only_a, pairs).pvalue if pairs else 1.0
        assert mcnemar_exact(only_a, only_b) == pytest.approx(expected)
    for a, n, b, m in [(45, 50, 38, 50), (0, 10, 5, 12), (10, 10, 9, 10), (3, 30, 3, 30)]:
        expected = scipy_stats.fisher_exact([[a, n - a], [b, m - b]]).pvalue
        assert fisher_exact(a, n, b, m) == pytest.approx(expected)


def test_newcombe_against_its_paper():
    """Newcombe 1998, table II, method 10: 56/70 - 48/80 is 0.2 [0.0524, 0.3339]."""
    assert newcombe_interval(56, 70, 48, 80) == pytest.approx((0.0524, 0.3339), abs=1e-4)


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})


def test_bootstrap_covers_the_truth_and_keeps_the_shares_of_groups():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(100):
        low, high = paired_bootstrap(rng.random(80) < 0.8, rng.random(80) < 0.6, seed=seed)
        covered += low <= 0.2 <= high
    assert covered >= 88
    # Within each group all is alike, so there is nothing to vary
    groups = ["a"] * 10 + ["b"] * 30
    assert paired_bootstrap([1] * 10 + [0] * 30, [0] * 40, groups) == (0.25, 0.25)
    low, high = bootstrap_mean([0, 100] * 20)
    assert 30 < low < 50 < high < 70


def test_sample_size_by_simulation():
    """The advised number of trials has the promised power."""
    needed = trials_to_tell_apart(0.9, 0.75)
    assert needed == 100  # Fleiss without the continuity correction
    rng = np.random.default_rng(1)
    a, b = rng.binomial(needed, 0.9, 20000), rng.binomial(needed, 0.75, 20000)
    pooled = (a + b) / (2 * needed)
    z = np.abs(a - b) / needed / np.sqrt(2 * pooled * (1 - pooled) / needed)
    assert 0.78 < (z > 1.96).mean() < 0.83
    assert trials_to_tell_apart(0.5, 0.5) is None
    assert trials_to_tell_apart(0.9, 0.9 - smallest_difference(100, 0.9)) <= 100


def test_advice_says_what_the_trials_cannot():
    result = compare_unpaired(20, 25, 17, 25)
    assert not result["different"] and "25 trials each cannot tell these apart" in result["advice"]
    assert f"needs about {trials_to_tell_apart(0.8, 0.68)} each" in result["advice"]
    same = [True] * 45 + [False] * 5
    assert "no difference" in compare_paired(same, same)["advice"]
    assert compare_paired([True] * 20, [False] * 20)["different"]
    with pytest.raises(ValueError, match="same scenes"):
        compare_paired([True], [True, False])


def test_planted_weak_policy_is_found_and_planted_copy_is_not():
    """500 simulated evaluations. A test at 5% may accuse at most 5% of the copies; exact tests accuse fewer."""
    result = planted_study(simulations=500)
    assert result["weak"]["low"] > 0.85, "McNemar misses a policy that is 15 points weaker"
    assert result["weak_unpaired"]["low"] > 0.8
    assert result["copy"]["low"] < 0.05 and result["copy"]["rate"] < 0.06
    assert result["copy_unpaired"]["low"] < 0.05 and result["copy_unpaired"]["rate"] < 0.065
    assert result["copy"]["called_different"] > 0, "a level of 5% that never accuses is no level of 5%"


# ---- journal ----


def test_journal_survives_a_crash_in_every_line(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        for number in range(4):
            journal.append({"event": "ünicode", "number": number})
        head = journal.head
    whole = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == 10]
    for cut in sorted({*range(0, len(whole), 11), *ends, *(end - 1 for end in ends)}):
        path.write_bytes(whole[:cut])
        with Journal(path) as journal:
            assert len(journal.records) == sum(end <= cut for end in ends)
            for number in range(len(journal.records), 4):
                journal.append({"event": "ünicode", "number": number})
            assert journal.head == head
        assert path.read_bytes() == whole


def test_journal_notices_every_changed_line(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        for number in range(4):
            journal.append({"outcome": number % 2})
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = {
        "changed": [*lines[:1], lines[1].replace(b'"outcome": 1', b'"outcome": 0'), *lines[2:]],
        "removed": [lines[0], *lines[2:]],
        "repeated": [*lines[:2], *lines[1:]],
        "swapped": [lines[0], lines[2], lines[1], lines[3]],
        "no json": [lines[0], b"{\n", *lines[2:]],
    }
    for content in damaged.values():
        path.write_bytes(b"".join(content))
        with pytest.raises(JournalError, match=r"Line [23] of"):
            Journal(path)
        with pytest.raises(JournalError):
            read_journal(path)
    path.write_bytes(b"".join(lines[:3]))  # cut at the end: a whole chain with another head
    assert read_journal(path)[1] == json.loads(lines[2])["hash"]


def test_journal_is_for_one_writer(tmp_path):
    with Journal(tmp_path / "journal.jsonl"), pytest.raises(JournalError, match="open in another process"):
        Journal(tmp_path / "journal.jsonl")


class FullDisk:
    """A file that takes a part of what is written and then no more."""

    def __init__(self, file):
        self._file = file

    def write(self, data):
        self._file.write(data[:10])
        return 10

    def seek(self, *arguments):
        return self._file.seek(*arguments)

    def truncate(self, size):
        return self._file.truncate(size)

    def close(self):
        self._file.close()


def test_a_full_disk_leaves_no_half_record(tmp_path):
    path = tmp_path / "trials.jsonl"
    rubric = load_rubrics()["fruit_sorting"]
    with TrialBook(path) as book:
        book.record("one", "p", rubric, [1, 1, 1], "ada")
        before = path.read_bytes()
        book._journal._file = FullDisk(book._journal._file)
        with pytest.raises(OSError, match="only a part"):
            book.record("two", "p", rubric, [1, 0, 0], "ada")
        assert path.read_bytes() == before and len(book.trials) == 1
    with TrialBook(path) as book:
        book.record("two", "p", rubric, [1, 0, 0], "ada")
        assert [trial["progress"] for trial in book.trials] == [100, 40]


# ---- rubrics and trials ----


def test_rubrics_are_those_of_the_papers():
    rubrics = load_rubrics()
    assert len(rubrics) == 35
    assert sum("Wall-OSS" in rubric.source for rubric in rubrics.values()) == 31
    incomplete = {name for name, rubric in rubrics.items() if rubric.unstated_points}
    assert incomplete == {"table_setting", "pencil_case_packing"}  # the paper's points add up to 9
    for rubric in rubrics.values():
        everything = [stage.times for stage in rubric.stages]
        assert rubric.progress([0] * len(everything)) == 0 and rubric.success(everything)
        assert rubric.progress(everything) == pytest.approx(100 - 10 * rubric.unstated_points)
        if "Wall-OSS" in rubric.source:
            assert rubric.maximum == 10
    assert rubrics["cup_triangle_stacking"].progress([2, 1, 1, 0, 1]) == 60
    assert rubrics["object_to_basket"].progress([4, 3, 0]) == 77.5
    assert rubrics["pick_to_drawer"].progress([1, 2, 0]) == 60
    with pytest.raises(ValueError, match="3 stages, got 2"):
        rubrics["fruit_sorting"].progress([1, 1])
    with pytest.raises(ValueError, match="'correct tray': a whole number from 0 to 1, got 2"):
        rubrics["fruit_sorting"].progress([1, 2, 0])
    with pytest.raises(ValueError, match="add up to 9, but its maximum is 10"):
        Rubric("x", "X", "", "", 10, (Stage("a", 3, 3),), "")


def test_rubrics_of_ones_own(tmp_path):
    entry = {"id": "a", "name": "A", "description": "", "rule": "", "maximum": 2, "stages": [["go", 1, 2]]}
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"source": "us", "rubrics": [entry, entry]}))
    with pytest.raises(ValueError, match="two rubrics called 'a'"):
        read_rubrics(path)
    path.write_text(json.dumps({"source": "us", "rubrics": [entry]}))
    assert read_rubrics(path)["a"].progress([1]) == 50


def test_trial_ids_are_unique(tmp_path):
    rubric = load_rubrics()["fruit_sorting"]
    path = tmp_path / "trials.jsonl"
    with TrialBook(path) as book:
        book.record("t1", "p", rubric, [1, 1, 1], "ada")
        with pytest.raises(ValueError, match="'t1' is already in"):
            book.record("t1", "p", rubric, [0, 0, 0], "ada")
        with pytest.raises(ValueError, match="operator is empty"):
            book.record("t2", "p", rubric, [0, 0, 0], " ")
    with Journal(path) as journal:  # someone goes around the book
        journal.append(journal.records[0])
    with pytest.raises(JournalError, match="'t1' in lines 1 and 2"):
        TrialBook(path)
    with pytest.raises(JournalError, match="'t1' in lines 1 and 2"):
        read_trials(path)


def test_terminal_form(tmp_path, capsys):
    """Wrong answers are asked again; ctrl-D ends; a half-answered trial is not recorded."""
    answers = iter(["1", "7", "one", "1", "", "dropped at the end", "1"])

    def ask(question):
        for answer in answers:
            return answer
        raise EOFError

    told = []
    with TrialBook(tmp_path / "t.jsonl") as book:
        rubric = load_rubrics()["fruit_sorting"]
        [entry] = score_in_terminal(book, rubric, "wall-oss", "ada", ask, told.append)
        assert entry["trial"] == "fruit_sorting/wall-oss/1" and entry["counts"] == [1, 1, 0]
        assert entry["comment"] == "dropped at the end" and len(book.trials) == 1
    assert sum("try again" in text for text in told) == 2
    summary = summarize_trials([entry])["wall-oss"]
    assert summary["fruit_sorting"]["progress"] == 90 and summary["all"]["successes"] == 0
    answers = iter(["1", "1", "1", ""])
    arguments = ["score", str(tmp_path / "t.jsonl")]
    parser_options = commands_options("score", [*arguments[1:], "--task", "fruit_sorting", "--policy", "w"])
    with pytest.raises(ValueError, match="--operator"):
        commands.run_score(parser_options, ask)
    parser_options.operator = "bob"
    commands.run_score(parser_options, ask)
    cli.main(arguments)
    assert capsys.readouterr().out.count("fruit_sorting") >= 4


def commands_options(name, arguments):
    import argparse

    parser = argparse.ArgumentParser()
    {"score": commands.score_options, "blind": commands.blind_options}[name](parser)
    return parser.parse_args(arguments)


@pytest.fixture
def form(tmp_path):
    form = TrialForm(tmp_path / "trials.jsonl", port=0)
    thread = threading.Thread(target=form.serve_forever)
    thread.start()
    yield form
    form.close()
    thread.join()


def fetch(url, fields=None, host=None):
    data = None if fields is None else urllib.parse.urlencode(fields).encode()
    request = urllib.request.Request(url, data, {"Host": host} if host else {})
    try:
        with urllib.request.urlopen(request) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_web_form(form):
    status, page = fetch(form.address + "?task=fruit_sorting&operator=%3Cb%3E")
    assert status == 200 and "correct tray" in page and 'value="&lt;b&gt;"' in page
    assert "http" not in page.split("</style>")[1], "the page must not ask anything of anyone"
    token = page.split('name="token" value="')[1].split('"')[0]
    fields = {"task": "fruit_sorting", "token": token, "policy": "<w>", "operator": "ada", "stage0": 1, "stage1": 1}
    status, page = fetch(form.address, fields)
    assert status == 400 and "Every stage needs an answer" in page and not form.book.trials
    status, page = fetch(form.address, {**fields, "stage2": 5})
    assert status == 400 and "from 0 to 1" in page
    status, page = fetch(form.address, {**fields, "stage2": 0, "comment": "x"})
    assert status == 200 and "progress 90" in page and "&lt;w&gt;" in page and "<w>" not in page
    status, page = fetch(form.address, {**fields, "stage2": 0})  # sent twice
    assert status == 200 and "fruit_sorting/&lt;w&gt;/1 recorded" in page and len(form.book.trials) == 1
    assert fetch(form.address, {**fields, "stage2": 0, "token": "made up"})[0] == 400
    assert fetch(form.address, host="elsewhere.example")[0] == 404
    assert len(form.book.trials) == 1


# ---- published tables ----


def test_published_tables_are_consistent_with_themselves():
    assert reference_names() == ["qwen-vla", "vla-scaling", "wall-oss-0.5", "x-vla"]
    for name in reference_names():
        reference = load_reference(name)
        for table in reference["tables"]:
            assert all(len(row) == len(table["columns"]) for row in table["rows"]), (name, table["id"])
            assert table["metric"] and table["conditions"]
    tables = {table["id"]: table for table in load_reference("wall-oss-0.5")["tables"]}
    for number in ("5", "6"):  # the averages that the paper prints
        rows = np.array([row[2:] for row in tables[number]["rows"]], float)
        np.testing.assert_allclose(rows[:-1].mean(axis=0), rows[-1], atol=0.06)
    manipulation = [row[2:] for row in tables["8"]["rows"] if row[1] == "Manip."]
    np.testing.assert_allclose(np.mean(manipulation, axis=0), [61.1, 35.0, 33.7], atol=0.06)
    with pytest.raises(ValueError, match="did you mean wall-oss-0.5"):
        load_reference("wall-oss-0.6")


# ---- blind protocol ----

MODELS = ["alpha", "beta", "gamma", "delta", "epsilon"]
TASKS = ["stack_bowls", "wipe_board"]


@pytest.mark.parametrize(("count", "group_size", "trials"), [(2, 2, 1), (5, 3, 4), (8, 4, 10), (7, 4, 3)])
def test_every_model_gets_exactly_n_trials_of_every_task(count, group_size, trials):
    models = [f"m{index}" for index in range(count)]
    for seed in range(20):
        blocks, aliases = plan_study(models, TASKS, group_size, trials, np.random.default_rng(seed))
        groups = {}
        for block in blocks:
            names = {aliases[alias] for alias in block["queue"]}
            assert 2 <= len(names) <= group_size
            assert groups.setdefault(block["group"], names) == names  # the same groups at every task
            assert len(set(block["queue"])) == len(names)
        assert sorted(itertools.chain(*groups.values())) == models
        for task, model in itertools.product(TASKS, models):
            ran = [alias for block in blocks if block["task"] == task for alias in block["queue"]]
            assert sum(aliases[alias] == model for alias in ran) == trials
        assert len(aliases) == count * len(TASKS), "a model has another alias at every task"


def test_order_and_groups_are_uniform():
    """Chi-square over 1500 draws: which model comes at which place, and who is grouped with whom."""
    models, trials, draws = ["a", "b", "c", "d"], 2, 1500
    places = np.zeros((4, 8))
    partners = dict.fromkeys(itertools.combinations(models, 2), 0)
    rng = np.random.default_rng(5)
    for _ in range(draws):
        blocks, aliases = plan_study(models, ["stack_bowls"], 2, trials, rng)
        order = [aliases[alias] for block in blocks for alias in block["queue"]]
        for place, model in enumerate(order):
            places[models.index(model), place] += 1
        partners[tuple(sorted(set(order[:4])))] += 1
    assert scipy_stats.chisquare(list(partners.values())).pvalue > 1e-3
    # Places within a row are not independent (each model has two): test each place by itself, Bonferroni for 8
    for place in range(8):
        assert scipy_stats.chisquare(places[:, place]).pvalue > 1e-3 / 8
    blocked = np.zeros((4, 8))  # the test has to notice a queue that is not shuffled
    blocked[np.arange(8) // 2, np.arange(8)] = draws
    assert scipy_stats.chisquare(blocked[:, 0]).pvalue < 1e-9


def test_public_files_do_not_depend_on_the_names(tmp_path):
    """The same draw for other models gives the same journal but for the commitment: no field carries an identity."""
    journals = []
    for number, models in enumerate((MODELS, ["v", "w" * 300, "x", "y", "z"])):
        create_study(tmp_path / str(number), models, TASKS, 3, 4, entropy=99)
        [created], _ = read_journal(tmp_path / str(number) / "journal.jsonl")
        assert len(created.pop("sealed")) == 64
        journals.append(created)
        text = (tmp_path / str(number) / "journal.jsonl").read_text()
        assert not any(model in text for model in MODELS)
        assert stat.S_IMODE((tmp_path / str(number) / "sealed.json").stat().st_mode) == 0o600
    assert journals[0] == journals[1]


def test_no_public_field_correlates_with_the_position_of_a_model():
    """Features of an alias (letters, rank, place of its first trial) against the model behind it, over 1000 draws."""
    rng = np.random.default_rng(11)
    features = {"first letter": [], "rank": [], "first place": [], "block": []}
    identity = []
    for _ in range(1000):
        blocks, aliases = plan_study(["a", "b", "c", "d"], ["stack_bowls"], 2, 3, rng)
        order = [alias for block in blocks for alias in block["queue"]]
        for alias, model in aliases.items():
            identity.append("abcd".index(model))
            features["first letter"].append(ord(alias[0]) % 4)
            features["rank"].append(sorted(aliases).index(alias))
            features["first place"].append(order.index(alias))
            features["block"].append(int(alias in blocks[1]["queue"]))
    for name, values in features.items():
        table = np.zeros((4, max(values) + 1))
        np.add.at(table, (identity, values), 1)
        table = table[:, table.sum(axis=0) > 0]
        assert scipy_stats.chi2_contingency(table).pvalue > 1e-3, name


def coin(model, task, trial):
    """The outcome of a trial: fixed by its number, so that a repeated one would be noticed."""
    rate = 0.2 + 0.15 * MODELS.index(model)
    return int(np.random.default_rng([trial_seed(trial), len(task)]).random() < rate)


class Crash(BaseException):
    """The power fails."""


def play(folder, crash_after=math.inf):
    """Goes on with a study until it is judged, or until so many records were written."""
    aliases = json.loads((folder / "sealed.json").read_text())["aliases"]
    with BlindStudy(folder) as study:
        append, written = study._journal.append, itertools.count(1)

        def failing(record):
            append(record)
            if next(written) > crash_after:
                raise Crash

        study._journal.append = failing
        while study.progress()["executed"] < study.progress()["trials"]:
            if study.break_due:
                study.take_break()
            study.finish(study.start_next()["trial"], "ada", "video")
        while (waiting := study.next_to_judge()) is not None:
            trial = study._public(waiting["trial"])
            solved = coin(aliases[trial["alias"]], trial["task"], trial["trial"])
            counts = [solved * stage.times for stage in study.rubric(trial["trial"]).stages]
            study.judge(waiting["trial"], "bob", counts)


def test_a_crash_at_every_step_loses_and_repeats_nothing(tmp_path):
    create_study(tmp_path / "calm", MODELS[:3], TASKS[:1], 3, 2, entropy=3)
    play(tmp_path / "calm")
    calm = reveal(tmp_path / "calm")
    steps = len(read_journal(tmp_path / "calm" / "journal.jsonl")[0])
    assert steps == 1 + 3 * 6 + 1
    for crash in range(steps):
        folder = tmp_path / f"crash{crash}"
        create_study(folder, MODELS[:3], TASKS[:1], 3, 2, entropy=3)
        try:
            play(folder, crash)
        except Crash:
            with open(folder / "journal.jsonl", "ab") as file:
                file.write(b'{"number": 7, "prev')  # and it failed within the next line
        play(folder)
        results = reveal(folder)
        assert results["trials"] == calm["trials"] and results["summary"] == calm["summary"]
        records, _ = read_journal(folder / "journal.jsonl")
        for event in ("executed", "judged"):
            done = [record["trial"] for record in records if record["event"] == event]
            assert sorted(done) == [f"T{number:04d}" for number in range(1, 7)]


def test_a_study_that_was_not_written_completely_can_be_drawn_again(tmp_path):
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "sealed.json").write_text("half")  # crashed between the two files
    create_study(folder, MODELS[:2], TASKS, 2, 1)
    with pytest.raises(ValueError, match="holds a study already"):
        create_study(folder, MODELS[:2], TASKS, 2, 1)


def test_the_order_of_the_steps_is_enforced(tmp_path):
    folder = tmp_path / "study"
    create_study(folder, MODELS[:4], TASKS[:1], 2, 1, entropy=8)
    with BlindStudy(folder) as study:
        with pytest.raises(BlindError, match="T0001 is not running, no trial is"):
            study.finish("T0001", "ada")
        with pytest.raises(BlindError, match="No break is due"):
            study.take_break()
        with pytest.raises(BlindError, match="no trial 'T0009'"):
            study.judge("T0009", "bob", [0])
        first = study.start_next()
        assert study.start_next() == first, "an interrupted trial comes again"
        with pytest.raises(BlindError, match="needs one"):
            study.repeat("T0001", " ")
        study.repeat("T0001", "camera cable")
        assert study.start_next() == first
        study.finish("T0001", "ada")
        with pytest.raises(BlindError, match="someone else"):
            study.judge("T0001", "ada", [3])
        study.judge("T0001", "bob", [3])
        with pytest.raises(BlindError, match="recorded once"):
            study.judge("T0001", "eve", [0])
        study.finish(study.start_next()["trial"], "ada")
        with pytest.raises(BlindError, match="take a break"):
            study.start_next()
        with pytest.raises(BlindError, match="not executed"):
            study.judge("T0003", "bob", [0])
    with pytest.raises(BlindError, match="3 of 4 trials are not judged"):
        reveal(folder)
    play_with_zeros(folder)
    results = reveal(folder)
    assert [record["reason"] for record in results["repeats"]] == ["camera cable"]
    assert reveal(folder)["summary"] == results["summary"]  # once more is harmless
    with BlindStudy(folder) as study, pytest.raises(BlindError, match="revealed: nothing can be added"):
        study._add({"event": "judged", "trial": "T0001"})


def play_with_zeros(folder):
    with BlindStudy(folder) as study:
        while study.progress()["executed"] < study.progress()["trials"]:
            if study.break_due:
                study.take_break()
            study.finish(study.start_next()["trial"], "ada")
        while (waiting := study.next_to_judge()) is not None:
            study.judge(waiting["trial"], "bob", [0] * len(study.rubric(waiting["trial"]).stages))


def test_an_exchanged_key_is_noticed(tmp_path):
    create_study(tmp_path / "s", MODELS[:2], TASKS[:1], 2, 1)
    play_with_zeros(tmp_path / "s")
    sealed = tmp_path / "s" / "sealed.json"
    data = json.loads(sealed.read_text())
    first, second = data["aliases"]
    data["aliases"][first], data["aliases"][second] = data["aliases"][second], data["aliases"][first]
    sealed.write_text(json.dumps(data, indent=1) + "\n")
    with pytest.raises(BlindError, match="not the key"):
        reveal(tmp_path / "s")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": ["a"]}, "at least two"),
        ({"models": ["a", "a"]}, "Every model once"),
        ({"tasks": ["fold_bowls"]}, "Unknown rubric 'fold_bowls'"),
        ({"models": ["a", "b", "c"], "group_size": 2}, "leave one alone"),
        ({"trials": 0}, "trials must be positive"),
    ],
)
def test_bad_studies_are_refused(tmp_path, change, message):
    options = {"models": ["a", "b"], "tasks": ["stack_bowls"], "group_size": 4, "trials": 1} | change
    with pytest.raises(ValueError, match=message):
        create_study(tmp_path / "s", **options)
    assert not (tmp_path / "s" / "journal.jsonl").exists()


class Steady:
    """A policy that returns its own number, in a chunk of its own length."""

    def __init__(self, value, steps=8, cameras=("front",)):
        self.value, self.steps, self.cameras, self.seeds = value, steps, cameras, []

    def reset(self, seed=0):
        self.seeds.append(seed)

    def act(self, observation, instruction):
        if self.value is None:
            raise RuntimeError("weights of alpha are broken")
        assert set(observation["images"]) == set(self.cameras)
        return np.full((self.steps, 2), self.value)


def test_dispatch_by_alias_gives_nothing_away(tmp_path, caplog):
    """Through the policy server: same cameras, length and time of every answer; errors do not name the model."""
    folder = tmp_path / "s"
    create_study(folder, MODELS[:3], TASKS[:1], 3, 1, entropy=1)
    aliases = json.loads((folder / "sealed.json").read_text())["aliases"]
    policies = {"alpha": Steady(None), "beta": Steady(2.0, 16, ("front", "wrist")), "gamma": Steady(3.0)}
    dispatcher = BlindDispatcher(folder, policies.__getitem__, ("front", "wrist"), 2, 8, 0.05)
    observation = {
        "images": {name: np.zeros((4, 4, 3), np.uint8) for name in ("front", "wrist")},
        "state": np.zeros(2, np.float32),
    }
    seen = {}
    with BlindStudy(folder) as study:
        gate = BlindGate(study, dispatcher, ("front", "wrist"))
        with pytest.raises(BlindError, match="No trial is running"):
            gate.reset(0)
        with policy_server(lambda: gate) as server:
            for _ in range(3):
                trial = study.start_next()
                robot = RemotePolicy(server.address)
                assert robot.cameras == ("front", "wrist")
                robot.reset(123)
                try:
                    seen[trial["alias"]] = robot.act(observation, "stack")
                except RuntimeError as error:
                    seen[trial["alias"]] = str(error)
                robot.close()
                study.finish(trial["trial"], "ada")
    for alias, model in aliases.items():
        if model == "alpha":
            assert f"The policy of {alias} failed (RuntimeError)" in seen[alias] and "weights" not in seen[alias]
        else:
            np.testing.assert_array_equal(seen[alias], np.full((8, 2), policies[model].value))
            assert policies[model].seeds != [123]
    public = caplog.text + (folder / "journal.jsonl").read_text() + repr(dispatcher.policy(next(iter(aliases))))
    assert not any(model in public for model in MODELS)
    with pytest.raises(BlindError, match="no alias"):
        dispatcher.policy("alpha")


def test_dispatcher_checks_what_a_policy_returns_and_how_it_loads(tmp_path):
    create_study(tmp_path / "s", MODELS[:2], TASKS[:1], 2, 1)
    [alias, _] = json.loads((tmp_path / "s" / "sealed.json").read_text())["aliases"]
    observation = {"images": {"front": np.zeros((4, 4, 3), np.uint8)}, "state": np.zeros(2)}

    def act(policy):
        dispatcher = BlindDispatcher(tmp_path / "s", lambda model: policy, ("front",), 2, 8)
        return dispatcher.policy(alias).act(observation, "stack")

    for policy, message in [(Steady(np.nan), "not finite"), (Steady(1.0, 4), "returned no 8 actions of 2")]:
        with pytest.raises(BlindError, match=message):
            act(policy)

    def missing(model):
        raise OSError(f"{model} is not a folder")

    with pytest.raises(BlindError, match=r"could not be loaded \(OSError\)") as error:
        BlindDispatcher(tmp_path / "s", missing, ("front",), 2, 8).policy(alias)
    assert not any(model in str(error.value) for model in MODELS)


def test_the_whole_study_finds_the_weak_model_and_not_the_copy(tmp_path, capsys):
    """Simulated outcomes: two good models (one a copy of the other) and a weak one, 40 trials at two tasks."""
    folder = tmp_path / "study"
    rates = {"good": 0.9, "copy": 0.9, "weak": 0.5}
    create_study(folder, list(rates), TASKS, 3, 40, entropy=4)
    aliases = json.loads((folder / "sealed.json").read_text())["aliases"]
    rng = np.random.default_rng(2)
    with BlindStudy(folder) as study:
        while study.progress()["executed"] < 240:
            if study.break_due:
                study.take_break()
            study.finish(study.start_next()["trial"], "ada")
        while (waiting := study.next_to_judge()) is not None:
            solved = rng.random() < rates[aliases[study._public(waiting["trial"])["alias"]]]
            study.judge(waiting["trial"], "bob", [solved * s.times for s in study.rubric(waiting["trial"]).stages])
    cli.main(["blind", "reveal", str(folder)])
    assert "good" in capsys.readouterr().out
    results = reveal(folder)
    different = {frozenset((row["a"], row["b"])): row["different"] for row in results["comparisons"]}
    assert different == {
        frozenset(("good", "weak")): True,
        frozenset(("copy", "weak")): True,
        frozenset(("copy", "good")): False,
    }
    page = write_blind_report(results, tmp_path / "report")["html"].read_text()
    assert "src=" not in page and "http" not in page


def test_blind_in_the_terminal(tmp_path, capsys):
    folder = str(tmp_path / "s")
    cli.main(["blind", "create", folder, "--models", "a", "b", "--tasks", "stack_bowls", "--trials", "1"])
    answers = iter(["repeat cable", "clip1.mp4"])

    def ask(question):
        for answer in answers:
            return answer
        raise EOFError

    run = ["run", folder, "--operator", "ada", "--action-dim", "4", "--port", "0"]
    commands.run_blind(commands_options("blind", run), ask)
    answers = iter(["clip2.mp4"])
    commands.run_blind(commands_options("blind", run), ask)
    answers = iter(["2", "", "3", "clean"])
    commands.run_blind(commands_options("blind", ["judge", folder, "--judge", "bob"]), ask)
    cli.main(["blind", "status", folder])
    status = json.loads("{" + capsys.readouterr().out.rsplit("{", 1)[1])
    assert (status["trials"], status["executed"], status["judged"]) == (2, 2, 2)
    cli.main(["blind", "reveal", folder])
    assert "1 trials repeated" in capsys.readouterr().out
