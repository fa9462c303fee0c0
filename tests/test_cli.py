"""The command line: what it prints, its exit status, and what it says where something is wrong."""

from __future__ import annotations

import importlib
import inspect
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import tomllib
from itertools import islice
from pathlib import Path

import pytest
import torch

import fxkfac
from fxkfac.cli import main
from fxkfac.cli.bench import gradient_of
from fxkfac.cli.factors import new_accumulation
from fxkfac.cli.interrupt import uninterrupted
from fxkfac.cli.output import as_json
from fxkfac.cli.parser import EXAMPLES, make_parser
from fxkfac.cli.progress import Shown
from fxkfac.cli.target import read_target
from fxkfac.cli.tracing import program_of
from fxkfac.errors import FileError

HERE = Path(__file__).parent
ROOT = HERE.parent
TARGETS = str(HERE / "command_targets.py")


@pytest.fixture(autouse=True)
def _paths(monkeypatch, tmp_path):
    """Targets come from a folder that is empty at first; what is put on the path goes again."""
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)


def run(capsys, *words):
    """Exit status, standard output and standard error."""
    status = main(list(words))
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def found(capsys, *words):
    """What a good call prints with --json."""
    status, out, _ = run(capsys, *words, "--json")
    assert status == 0
    return json.loads(out)


def refusal(capsys, *words):
    """The one line that a wrong call says."""
    status, out, err = run(capsys, *words)
    assert status == 2
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("fxkfac: error: ")
    return line


def tensors(path):
    """Program, loss and the factors in a file, of `target`."""
    module = importlib.import_module("command_targets")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, loss, data = module.target()
        return fxkfac.load(path, fxkfac.trace(model, data[0][0]), loss), (model, loss, data)


# --- what commands do ---


def test_trace_prints_the_program_and_its_coverage(capsys):
    status, out, err = run(capsys, "trace", TARGETS)
    assert (status, err) == (0, "")
    assert "4 parameters in 4 uses" in out
    assert "in all: kronecker 100.0%" in out


def test_trace_gives_plain_data(capsys):
    data = found(capsys, "trace", TARGETS, "--structure", "0.*=diagonal", "--structure=3.bias=skip")
    assert [use["parameter"] for use in data["uses"]] == ["0.weight", "0.bias", "3.weight"]
    assert data["uses"][0]["x"] == "N×3"
    kinds = {row["parameter"]: row["structure"] for row in data["coverage"]}
    assert kinds == {"0.weight": "diagonal", "0.bias": "diagonal"} | {
        "3.weight": "kronecker",
        "3.bias": "skip",
    }
    assert sum(data["shares"].values()) == pytest.approx(1)
    assert data["any_batch_size"] is True


def test_a_pattern_that_comes_again_overrides_what_came_before(capsys):
    words = [f"--structure={pair}" for pair in ("*=diagonal", "0.*=identity", "*=skip")]
    data = found(capsys, "trace", TARGETS, *words)
    assert {row["structure"] for row in data["coverage"]} == {"skip"}


def test_what_has_no_rule_is_refused_unless_asked_otherwise(capsys):
    status, _, err = run(capsys, "trace", f"{TARGETS}:without_rule")
    assert status == 2
    assert "cumsum" in err
    data = found(capsys, "trace", f"{TARGETS}:without_rule", "--unsupported", "diagonal")
    assert {row["parameter"]: row["structure"] for row in data["coverage"]}["w"] == "diagonal"


def test_the_batch_axis_may_be_another(capsys):
    data = found(capsys, "trace", f"{TARGETS}:rows_last", "--batch-axis", "1")
    assert data["uses"][0]["x"] == "N×3"


def test_draw_writes_the_picture(capsys, tmp_path):
    path = str(tmp_path / "model.gv")
    assert found(capsys, "draw", f"{TARGETS}:inputs_only", "-o", path) == {"written": path}
    assert "digraph" in Path(path).read_text()


def test_draw_folds_layers_that_repeat(capsys, tmp_path):
    target = tmp_path / "deep.py"
    target.write_text(
        "import torch\nfrom torch import nn\n\n\ndef target():\n"
        "    layers = [nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(4)]\n"
        "    return nn.Sequential(*layers), torch.randn(5, 3)\n"
    )
    path = str(tmp_path / "model.gv")
    found(capsys, "draw", str(target), "--fold", "-o", path)
    assert "4 ×" in Path(path).read_text()


def test_check_compares_gradients(capsys):
    data = found(capsys, "check", f"{TARGETS}:shuffled")
    assert data["passed"] is True
    assert set(data["errors"]) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert max(data["errors"].values()) < 1e-5


def test_a_failed_check_has_status_one(capsys):
    status, out, err = run(capsys, "check", f"{TARGETS}:changed")
    assert (status, err) == (1, "")
    assert "0.weight" in out
    status, out, _ = run(capsys, "check", f"{TARGETS}:changed", "--json")
    assert status == 1
    assert json.loads(out)["passed"] is False


def test_factors_are_those_of_kfac(capsys, tmp_path):
    path = str(tmp_path / "factors.safetensors")
    words = ["--fisher", "mc", "--mc-samples", "2", "--sharing", "reduce", "--seed", "0"]
    data = found(capsys, "factors", TARGETS, *words, "-o", path)
    assert (data["n"], data["batches"], data["fisher"], data["sharing"]) == (22, 4, "mc", "reduce")
    assert data["products"]["0.weight"] == [{"A": [1, 4, 4], "B": [1, 4, 4]}]
    loaded, (model, loss, batches) = tensors(path)
    program = fxkfac.trace(model, batches[0][0])
    generator = torch.Generator().manual_seed(0)
    how = {"fisher": "mc", "mc_samples": 2, "sharing": "reduce", "generator": generator}
    assert torch.equal(loaded.dense(), fxkfac.kfac(program, loss, batches, **how).dense())


def test_another_seed_is_another_model(capsys):
    for seed in ("0", "1"):
        found(capsys, "factors", TARGETS, "-o", seed, "--seed", seed)
    assert Path("0").read_bytes() != Path("1").read_bytes()


@pytest.mark.parametrize("name", ["used_up", "drawn", "one_pair"])
def test_no_batch_is_lost_or_comes_twice(capsys, name):
    """The first batch is looked at before the others."""
    module = importlib.import_module("command_targets")
    data = found(capsys, "factors", f"{TARGETS}:{name}", "-o", "file", "--fisher", "forward-only")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, loss, batches = getattr(module, name)()
        batches = [batches] if name == "one_pair" else list(batches)
    program = fxkfac.trace(model, batches[0][0])
    generator = torch.Generator().manual_seed(0)  # of dropout
    expected = fxkfac.kfac(program, loss, batches, fisher="forward-only", generator=generator)
    assert data["n"] == expected.n
    assert torch.equal(fxkfac.load("file", program, loss).dense(), expected.dense())


def test_report_tells_what_the_factors_of_a_file_are(capsys):
    found(capsys, "factors", TARGETS, "--fisher", "empirical", "-o", "f.safetensors")
    data = found(capsys, "report", TARGETS, "--factors", "f.safetensors")
    loaded, _ = tensors("f.safetensors")
    assert (data["fisher"], data["sharing"], data["correction"]) == ("empirical", "expand", None)
    assert {k: data[k] for k in ("n", "rows", "total")} == loaded.report().as_dict()


def test_report_tells_what_averages_in_a_file_are(capsys):
    found(capsys, "factors", TARGETS, "--fisher", "empirical", "-o", "f.safetensors")
    loaded, _ = tensors("f.safetensors")
    average = fxkfac.RunningAverage(0.5)
    average.update(loaded)
    fxkfac.save(average, "average")
    data = found(capsys, "report", TARGETS, "--factors", "average")
    assert (data["fisher"], data["sharing"]) == ("empirical", "expand")
    assert {k: data[k] for k in ("n", "rows", "total")} == average.report().as_dict()


@pytest.mark.parametrize("correction", ["ekfac", "kfoc"])
def test_report_corrects_by_the_same_draws(capsys, correction):
    words = ["--fisher", "mc", "--correction", correction]
    data = found(capsys, "report", f"{TARGETS}:shuffled", *words)
    module = importlib.import_module("command_targets")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, loss, loader = module.shuffled()
        batches = list(loader)
    program, how = fxkfac.trace(model, batches[0][0]), {"fisher": "mc"}
    same = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    factors = fxkfac.kfac(program, loss, batches, generator=same(), **how)
    expected = getattr(fxkfac, correction)(program, loss, batches, factors, generator=same())
    assert {k: data[k] for k in ("n", "rows", "total")} == expected.report().as_dict()


def test_report_prints_a_table(capsys):
    status, out, _ = run(capsys, "report", f"{TARGETS}:one_pair")
    assert status == 0
    first, header, *_ = out.splitlines()
    assert first == "type-2, expand: 4 parameters in 2 blocks, over 6 data"
    assert "cond A" in header


@pytest.fixture
def quick(monkeypatch):
    """Memory is measured in one call each."""
    monkeypatch.setattr("fxkfac.measure.memory.CALLS", 1)


@pytest.mark.usefixtures("quick")
def test_bench_measures_what_was_asked_for(capsys):
    words = ["--fisher", "empirical", "--fisher", "type-1", "--repeats", "1", "--budget", "0"]
    data = found(capsys, "bench", f"{TARGETS}:regression", *words)
    assert [row["call"] for row in data["rows"]] == [
        "loss, gradient",
        "empirical",
        "loss, gradient, mc",
    ]
    assert data["n"] == 5
    assert data["rows"][0]["time"] is None
    assert all(row["time"]["repeats"] == 1 for row in data["rows"][1:])
    assert "cannot be enumerated" in data["refused"]["type-1"]


@pytest.mark.usefixtures("quick")
def test_bench_prints_a_table(capsys):
    words = ["--fisher=mc", "--repeats=1"]
    status, out, _ = run(capsys, "bench", f"{TARGETS}:function_of_parameters", *words)
    assert status == 0
    lines = out.splitlines()
    assert lines[1].split("  ")[0] == "call"
    assert [line.split("  ")[0] for line in lines[3:6]] == [
        "loss, gradient",
        "mc",
        "loss, gradient, mc",
    ]


def test_the_gradient_that_is_timed_is_the_models():
    torch.manual_seed(0)
    target = read_target(f"{TARGETS}:regression")
    program = fxkfac.trace(target.model, target.inputs)
    x, y = target.first
    value = target.loss(target.model(x), y)
    expected = torch.autograd.grad(value, list(target.model.parameters()))
    with gradient_of(program, target) as gradient:
        found = gradient()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(isinstance(p, torch.nn.Parameter) for p in target.model.parameters())
    assert all(p.grad is None for p in target.model.parameters())


def test_nothing_but_the_result_is_on_standard_output(capsys):
    status, out, err = run(capsys, "trace", f"{TARGETS}:talkative", "--json")
    assert status == 0
    assert json.loads(out)["front_end"]
    assert err == "on standard output\n"


def test_a_module_is_named_with_dots(capsys):
    assert found(capsys, "trace", "command_targets:inputs_only")["uses"]


def test_random_state_stays_the_callers(capsys):
    before = torch.get_rng_state()
    found(capsys, "check", f"{TARGETS}:shuffled", "--seed", "3")
    assert torch.equal(torch.get_rng_state(), before)


def test_json_has_no_infinity():
    text = as_json({"a": [float("inf"), (-float("inf"), 1.5)], 2: float("nan")})
    assert json.loads(text, parse_constant=pytest.fail) == {"a": ["inf", ["-inf", 1.5]], "2": "nan"}


# --- what is refused ---

WRONG = {
    "no file": (["trace", "no/such/file.py"], "there is no file 'no/such/file.py'"),
    "no module": (["trace", "no_such_module:f"], "Run in the folder that it is in"),
    "no name": (["trace", "a-b"], "neither a module nor a path"),
    "no function": (["trace", f"{TARGETS}:targe"], f"Did you mean {TARGETS}:target?"),
    "a number": (["trace", f"{TARGETS}:not_a_function"], "has an int, but no function"),
    "four": (["trace", f"{TARGETS}:four"], "a tuple of 4; expected (model, inputs) or"),
    "a list": (["trace", f"{TARGETS}:a_list"], "returns a list; expected (model, inputs) or"),
    "no model": (["trace", f"{TARGETS}:no_model"], "a str as its model; expected an nn.Module"),
    "a function": (["trace", f"{TARGETS}:bare_function"], "fxkfac.trace(model, inputs, params)"),
    "raises": (["trace", f"{TARGETS}:fails"], "fails: KeyError: 'weights' (command_targets.py:"),
    "wants more": (
        ["trace", f"{TARGETS}:wants_an_argument"],
        "missing 1 required positional argument: 'x'. --debug shows more.",
    ),
    "leaves": (["trace", f"{TARGETS}:leaves"], "fails: SystemExit: 3 (command_targets.py:"),
    "no seed": (["trace", TARGETS, f"--seed={2**64}"], "expected a number from 0 to 2**63 - 1"),
    "no batch": (["check", f"{TARGETS}:no_batch"], "hold no batch"),
    "no data": (["check", f"{TARGETS}:inputs_only"], "expected (model, loss, data)"),
    "no folder": (["draw", TARGETS, "-o", "no/such.svg"], "Make it"),
    "a folder": (["factors", TARGETS, "-o", "."], "it is a folder. Name a file"),
    "no format": (["draw", TARGETS, "-o", "model.bmp"], "model.bmp"),
    "no flavour": (["factors", TARGETS, "--fisher", "mcc", "-o", "f"], "'mc', 'type-1'"),
    "no policy": (["trace", TARGETS, "--unsupported", "x"], "'diagonal'"),
    "no kind": (["trace", TARGETS, "--structure", "0.weight=x"], "'x'"),
    "no pattern": (["trace", TARGETS, "--structure", "x"], "expected PATTERN=KIND"),
    "no parameter": (["trace", TARGETS, "--structure", "1.*=skip"], "no parameter matches '1.*'"),
    "no output": (["factors", TARGETS], "required: -o/--output"),
    "no command": ([], "required: COMMAND"),
    "no target": (["trace"], "required: TARGET"),
    "no samples": (["factors", TARGETS, "-o", "f", "--mc-samples=0", "--fisher=mc"], "at least 1"),
    "no repeats": (["bench", TARGETS, "--repeats", "0"], "at least one repeat"),
    "no resumption": (["factors", TARGETS, "-o", "f", "--resume", "no"], "cannot read 'no'"),
    "traced twice": (
        ["check", f"{TARGETS}:function_of_parameters", "--batch-axis=0"],
        "traced already, but there is --batch-axis",
    ),
    "corrected twice": (
        ["report", f"{TARGETS}:used_up", "--correction", "kfoc"],
        "every step takes two passes",
    ),
    "no factors": (
        ["report", f"{TARGETS}:regression", "--factors", "factors"],
        "cannot read 'factors'",
    ),
    "said twice": (
        ["factors", TARGETS, "-o", "f", "--resume", "x", "--mc-samples=2"],
        "there is --mc-samples; expected only one of the two",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_told_in_one_line(capsys, case):
    words, told = WRONG[case]
    assert told in refusal(capsys, *words)


def test_what_a_target_cannot_import_is_named(capsys, tmp_path):
    Path("needs.py").write_text("import no_such_package\n")
    line = refusal(capsys, "trace", "needs.py")
    assert "No module named 'no_such_package'" in line
    assert "Install it" in line
    Path("broken.py").write_text("def f(:\n")
    assert "SyntaxError: invalid syntax (broken.py:1)" in refusal(capsys, "trace", "broken.py:f")
    Path("ends.py").write_text("raise SystemExit(3)\n")
    assert "SystemExit: 3 (ends.py:1)" in refusal(capsys, "trace", "ends.py:f")


def test_a_file_that_is_called_like_a_module_does_not_take_its_place(capsys):
    Path("json.py").write_text("from command_targets import inputs_only\n")
    assert found(capsys, "trace", "json.py:inputs_only")["uses"]
    assert sys.modules["json"] is json


def test_a_folder_that_may_not_be_written_to_is_named_before_the_work(capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "you may not write" in refusal(capsys, "factors", f"{TARGETS}:fails", "-o", "f")


def test_without_dot_the_source_is_there(capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    line = refusal(capsys, "draw", f"{TARGETS}:inputs_only", "-o", "model.svg")
    assert "Install graphviz" in line
    assert "digraph" in Path("model.svg.gv").read_text()


def test_debug_shows_the_traceback(capsys):
    status, out, err = run(capsys, "trace", f"{TARGETS}:fails", "--debug")
    assert (status, out) == (2, "")
    assert 'raise KeyError("weights")' in err


# --- progress ---


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    batches = [(torch.zeros(2), torch.zeros(2))] * 3
    assert [len(pair) for pair in Shown(batches, "factors")] == [2, 2, 2]
    return stream.getvalue()


def test_a_terminal_has_a_bar(monkeypatch):
    assert "3/3" in shown(monkeypatch, Terminal())


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_else_there_are_lines_now_and_then(monkeypatch, stream):
    monkeypatch.setitem(sys.modules, "tqdm", None)  # not installed
    assert shown(monkeypatch, stream()) == ""
    monkeypatch.setattr("fxkfac.cli.progress.INTERVAL", 0)
    lines = shown(monkeypatch, stream()).splitlines()
    assert [line.split(" batches")[0] for line in lines] == [f"factors: {k} of 3" for k in range(3)]


# --- what stops a pass ---


def test_a_loader_that_fails_leaves_what_was_added(capsys):
    status, out, err = run(capsys, "factors", f"{TARGETS}:failing_loader", "-o", "f.safetensors")
    kept, wrong = err.splitlines()
    assert (status, out) == (2, "")
    assert "12 data in 2 batches are kept in f.partial.safetensors" in kept
    assert wrong == "fxkfac: error: RuntimeError: the disk is gone. --debug shows where."
    words = ["--resume", "f.partial.safetensors", "-o", "f.safetensors"]
    assert found(capsys, "factors", TARGETS, *words)["batches"] == 4
    found(capsys, "factors", TARGETS, "-o", "whole.safetensors")
    assert Path("f.safetensors").read_bytes() == Path("whole.safetensors").read_bytes()


def test_what_is_kept_tells_how_to_go_on(capsys):
    words = ["factors", f"{TARGETS}:failing_loader", "-o", "f f.safetensors"]
    _, _, err = run(capsys, *words, "--fisher", "mc", "--mc-samples", "2")
    kept = "with --resume 'f f.partial.safetensors' and without --fisher, --mc-samples the same"
    assert kept in err.splitlines()[0]
    found(capsys, "factors", TARGETS, *words[2:], "--resume", "f f.partial.safetensors")
    _, _, err = run(capsys, *words)
    assert "with --resume 'f f.partial.safetensors' the same command goes on" in err


def test_where_nothing_can_be_kept_this_is_said(capsys, monkeypatch):
    def full(what, path):
        raise FileError("the disk is full.")

    monkeypatch.setattr("fxkfac.cli.factors.save", full)
    status, _, err = run(capsys, "factors", f"{TARGETS}:failing_loader", "-o", "f")
    lost, wrong = err.splitlines()
    assert (status, lost) == (2, "fxkfac: nothing is kept: the disk is full.")
    assert "the disk is gone" in wrong


def interrupted(done, times):
    with uninterrupted():
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        done.append(times)


def test_ctrl_c_waits_for_what_is_half_done():
    done, before = [], signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        interrupted(done, times=1)
    assert done == [1]
    with pytest.raises(KeyboardInterrupt):  # whoever means it need not wait
        interrupted(done, times=2)
    assert done == [1]
    assert signal.getsignal(signal.SIGINT) is before


def test_threads_have_no_ctrl_c():
    done = []

    def work():
        with uninterrupted():
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1]


def environment(**more):
    """Of a process with as many threads, which decide in which order is summed."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    threads = str(torch.get_num_threads())
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": threads} | more


def _listen() -> None:
    """As in a terminal: what a shell runs in the background ignores Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_keeps_the_factors_and_resuming_gives_the_same_bits(capsys, tmp_path):
    words = ["factors", f"{TARGETS}:blocking", "--fisher", "mc"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fxkfac", *words, "-o", "f.safetensors"],
        env=environment(BLOCK="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_listen,
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    kept, stopped = err.splitlines()
    assert "18 data in 3 batches are kept in f.partial.safetensors" in kept
    assert stopped == "fxkfac: stopped by Ctrl-C."
    assert not Path("f.safetensors").exists()

    resumed = ["--resume", "f.partial.safetensors", "-o", "f.safetensors"]
    found(capsys, *words[:2], *resumed)
    found(capsys, *words, "-o", "whole.safetensors")
    assert Path("f.safetensors").read_bytes() == Path("whole.safetensors").read_bytes()

    line = refusal(capsys, *words[:2], *resumed, "--seed", "1")  # a model of other numbers
    assert "expected the same" in line


# --- as a process ---


def test_help_is_quick_as_it_needs_no_torch():
    script = (
        "import sys\n"
        "from fxkfac.cli import main\n"
        "assert main(['--help']) == 0\n"
        "assert main(['trace']) == 2\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "exit status: 0 good, 1 the check failed" in done.stdout


def test_the_entry_point_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["scripts"]["fxkfac"].partition(":")
    assert getattr(importlib.import_module(module), name) is main


COMMANDS = {"trace", "draw", "check", "factors", "report", "bench"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("fxkfac ", COMMANDS | {"-h", "--help"}),
        ("fxkfac bench x.py --re", {"--repeats"}),
        pytest.param("fxkfac bench x.py --fisher e", {"empirical"}, marks=pytest.mark.slow),
    ],
)
def test_a_shell_can_complete_words(tmp_path, line, expected):
    answer = tmp_path / "answer"
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "COMP_LINE": line}
    asked |= {"COMP_POINT": str(len(line)), "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
    subprocess.run([sys.executable, "-m", "fxkfac"], env=environment(**asked), check=True)
    assert {word.strip() for word in answer.read_text().splitlines()} == expected


def test_what_a_terminal_cannot_show_is_a_question_mark(monkeypatch):
    """As × and the rule under a header, in Latin-1."""
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    assert main(["trace", f"{TARGETS}:inputs_only"]) == 0
    shown.seek(0)
    assert "N?" in shown.read()


def test_whoever_reads_may_have_enough(monkeypatch):
    """As `head` has."""
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["trace", f"{TARGETS}:inputs_only"]) == 0


# --- as documented ---


def commands_of(text):
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


@pytest.mark.slow
def test_the_page_is_true(capsys, monkeypatch):
    """Every command on it is run; the interrupted one is interrupted here after two batches."""
    Path("examples").symlink_to(ROOT / "examples")
    monkeypatch.setattr("fxkfac.measure.memory.CALLS", 1)
    commands = commands_of((ROOT / "docs" / "command_line.md").read_text())
    assert {words[1] for words in commands} == set(COMMANDS)
    for words in commands:
        assert words[0] == "fxkfac"
        if "--resume" in words:
            interrupt(words)
        assert main(words[1:]) == 0, capsys.readouterr().err
    assert Path("resumed.safetensors").read_bytes() == Path("factors.safetensors").read_bytes()
    assert Path("model.svg").exists() or Path("model.svg.gv").exists()


def interrupt(words):
    """Leave what Ctrl-C leaves after two batches."""
    asked = make_parser().parse_args(["factors", words[2], "--fisher", "mc", "-o", "unused"])
    with torch.random.fork_rng():
        torch.manual_seed(asked.seed)
        target = read_target(asked.target)
        program = program_of(asked, target)
        accumulation = new_accumulation(asked, program, target)
        for inputs, targets in islice(target.data, 2):
            accumulation.add(inputs, targets)
    fxkfac.save(accumulation, words[words.index("--resume") + 1])


def test_examples_in_the_help_are_right():
    lines = [line.strip() for text in EXAMPLES.values() for line in text.splitlines()]
    examples = [re.split(r"  +| && ", line)[0] for line in lines if line.startswith("fxkfac ")]
    assert len(examples) > len(COMMANDS)
    for example in examples:
        assert make_parser().parse_args(shlex.split(example)[1:])


def test_defaults_in_the_help_are_those_of_the_functions(capsys):
    assert main(["factors", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.replace("-\n", "-").split())
    of = {
        **inspect.signature(fxkfac.trace).parameters,
        **inspect.signature(fxkfac.kfac).parameters,
    }
    for option in ("unsupported", "batch-axis", "fisher", "sharing", "mc-samples"):
        (found,) = re.findall(rf"--{option} [A-Z]+ [^;]*; default: (\S+)", said)
        assert found == str(of[option.replace("-", "_")].default), option
