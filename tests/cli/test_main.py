"""What holds for every command: exit codes, errors, where output goes, and what is imported."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from kvist import __version__, errors
from kvist.cli.lazy import Lazy, LazyGroup
from kvist.cli.main import SECTIONS, main
from kvist.cli.sim import sim
from kvist.errors import KvistError

from .conftest import Graph, Kvist, run

CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, KvistError)]
EVERYWHERE = [["log"], ["show", "main"], ["diff", "a", "b"], ["fork", "main", "-n", "1"], ["branch"], ["tag"]]
EVERYWHERE += [["stats"], ["fsck"], ["gc", "--yes"]]


def process(*words: str, store: str | None = None, **extra: Any) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("KVIST")}
    environment |= {} if store is None else {"KVIST_STORE": store}
    return subprocess.run(
        [sys.executable, "-c", "from kvist.cli.main import main; main()", *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        **extra,
    )


# -- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", CLASSES, ids=lambda error: error.kind)
def test_every_error_has_its_exit_code(error: type[KvistError], kvist: Kvist, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error("it \x1b[1mbroke", hint="kvist fsck")

    monkeypatch.setattr("kvist.repo.stats.count", fail)
    ran = kvist("stats")
    assert (ran.code, ran.out) == (error.exit_code, "")
    assert ran.err == "error: it \\x1b[1mbroke\nhint: kvist fsck\n"
    ran = kvist("stats", "--json")
    assert (ran.code, ran.out) == (error.exit_code, "")
    assert ran.error == {
        "kind": error.kind,
        "message": "it \x1b[1mbroke",
        "hint": "kvist fsck",
        "exit_code": error.exit_code,
    }
    assert kvist("stats", "-q").code == error.exit_code


@pytest.mark.parametrize("words", EVERYWHERE, ids=lambda words: words[0])
def test_no_repository(tmp_path: Path, words: list[str]) -> None:
    url = (tmp_path / "none").as_uri()
    ran = run([*words, "--json"], {"KVIST_STORE": url})
    assert (ran.code, ran.out, ran.error["kind"]) == (10, "", "repository_not_found")
    assert ran.error["hint"] == f"kvist init --store {url}"
    assert run(shlex.split(ran.error["hint"])[1:], {}).code == 0  # the hint works
    assert run([words[0], "--help"], {}).code == 0


def test_a_store_that_cannot_be(tmp_path: Path, kvist: Kvist) -> None:
    ran = kvist("stats", "--store", "s3://key:secret@bucket", "--json")
    assert (ran.code, ran.error["kind"]) == (2, "invalid_input")
    (tmp_path / "file").write_text("")
    ran = kvist("init", "--store", str(tmp_path / "file" / "below"), "--json")
    assert (ran.code, ran.error["kind"]) == (30, "store")
    (kvist.root / "kvist.json").write_text("{}")
    ran = kvist("stats", "--json")
    assert (ran.code, ran.error["kind"]) == (20, "invalid_manifest")


def test_hints_name_a_store_that_was_typed(kvist: Kvist, graph: Graph) -> None:
    graph.add("A", branch="main")
    kvist.ok("branch", "x", "main")
    url = kvist.url
    ran = run(["branch", "x", "main", "--store", url], {})
    assert ran.code == 5
    hint = ran.err.split("hint: ")[1].strip()
    assert hint == f"kvist --store '{url}' branch --move x main"
    assert run(shlex.split(hint)[1:], {}).code == 0
    assert kvist("branch", "x", "main").err.endswith("hint: kvist branch --move x main\n")


def test_words_that_make_no_sense(kvist: Kvist) -> None:
    for words in (["nothing"], ["log", "--bogus"], ["log", "-n", "-1"], ["show"], ["completion", "tcsh"]):
        ran = kvist(*words)
        assert ran.code == 2 and ran.out == "" and ran.err.startswith("Usage: kvist"), words
        ran = kvist(*words, "--json")
        assert ran.code == 2 and ran.out == "" and ran.error["kind"] == "usage", words
    assert kvist("--json", "log", "-q").error["message"] == "choose one of --json and --quiet"


def test_ctrl_c(kvist: Kvist, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvist.repo.stats.count", interrupt)
    ran = kvist("stats")
    assert (ran.code, ran.out, ran.err.strip()) == (130, "", "error: interrupted")
    ran = kvist("stats", "--json")
    assert (ran.code, ran.error["kind"]) == (130, "interrupted")


def test_ctrl_c_in_a_process(kvist: Kvist) -> None:
    code = (
        "import os, signal, kvist.repo.stats as c\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it\n"
        "from kvist.cli.main import main\n"
        "c.count = lambda repo: os.kill(os.getpid(), signal.SIGINT)\n"
        "main(['stats'])"
    )
    environment = os.environ | {"KVIST_STORE": kvist.url}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr.strip()) == (130, "", "error: interrupted")
    assert signal.SIGINT + 128 == 130


def test_a_reader_that_goes_away(kvist: Kvist, graph: Graph) -> None:
    graph.add("A", branch="main")
    read, write = os.pipe()
    os.close(read)
    environment = os.environ | {"KVIST_STORE": kvist.url}
    for words in (["log"], ["log", "--json"], ["stats"], ["--help"], ["completion", "zsh"]):
        ran = subprocess.run(
            [sys.executable, "-c", "from kvist.cli.main import main; main()", *words],
            env=environment,
            stdout=write,
            stderr=subprocess.PIPE,
            check=False,
        )
        assert (ran.returncode, ran.stderr) == (1, b""), words
    os.close(write)


# -- options -----------------------------------------------------------------------------------------------------


def test_common_options_before_and_after_the_command(kvist: Kvist, graph: Graph) -> None:
    cid = graph.add("A", branch="main")
    elsewhere = {"KVIST_STORE": "file:///nowhere"}
    for words in (
        ["--store", kvist.url, "--quiet", "--no-progress", "log"],
        ["log", "--store", kvist.url, "-q", "--no-progress"],
        ["--store", "/nowhere", "-q", "log", "--quiet", "--store", kvist.url],
    ):
        assert run(words, elsewhere).out == f"{cid}\n"
    assert kvist("--json", "log", "--json").json["snapshots"]
    assert run(["--store", kvist.url, "log", "--json"], {}).json["snapshots"]


def test_version_and_help() -> None:
    assert run(["--version"], {}).out == f"kvist, version {__version__}\n"
    for words in (["--help"], ["-h"], ["log", "-h"]):
        ran = run(words, {})
        assert (ran.code, ran.err) == (0, "") and ran.out.startswith("Usage: kvist")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(kvist: Kvist, shell: str) -> None:
    human = kvist.ok("completion", shell).out
    assert "_KVIST_COMPLETE" in human
    script = kvist.ok("completion", shell, "--json").json["script"]
    assert script.splitlines() == human.splitlines() == kvist.ok("completion", shell, "-q").lines


def test_completion_completes() -> None:
    environment = os.environ | {"_KVIST_COMPLETE": "bash_complete", "COMP_WORDS": "kvist sh", "COMP_CWORD": "1"}
    code = "from kvist.cli.main import main; main()"
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert ran.stdout == "plain,show\n"


# -- imports -----------------------------------------------------------------------------------------------------

HEAVY = {"torch", "transformers", "numpy", "starlette", "uvicorn", "rich", "blake3", "platformdirs", "kvist.repo"}


@pytest.mark.parametrize(
    "code",
    [
        "import kvist",
        "import kvist.cli.main",
        "from kvist.cli.main import main; main(['--help'])",
        "from kvist.cli.main import main; main(['sim', '--help'])",
    ],
)
def test_what_help_does_not_import(code: str) -> None:
    tail = "import atexit, sys; atexit.register(lambda: print('\\n' + ' '.join(sys.modules)))\n"
    ran = subprocess.run([sys.executable, "-c", tail + code], capture_output=True, text=True, check=True)
    modules = set(ran.stdout.splitlines()[-1].split())
    assert "kvist" in modules
    assert not modules & HEAVY


def test_commands_need_no_engine(kvist: Kvist) -> None:
    code = (
        "import sys\n"
        "from kvist.cli.main import main\n"
        "try: main(['stats', '--json'])\n"
        "finally: print(*sys.modules, file=sys.stderr)"
    )
    environment = os.environ | {"KVIST_STORE": kvist.url}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout)["snapshots"] == 0
    assert not set(ran.stderr.split()) & {"torch", "transformers", "numpy", "starlette", "uvicorn", "rich"}


def test_a_command_whose_module_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SECTIONS["Shell"], "later", Lazy("kvist.cli.nowhere:later", "Not written yet."))
    assert "later" not in run(["--help"], {}).out
    ran = run(["later"], {})
    assert ran.code == 2 and "No such command 'later'" in ran.err


def test_a_command_whose_package_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "kvist_bare.py").write_text("import not_installed.at_all")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(SECTIONS["Shell"], "bare", Lazy("kvist_bare:bare", "Wants more than the core."))
    ran = run(["bare"], {})
    assert ran.code == 1 and "needs the Python package not_installed" in ran.err
    assert ran.err.endswith("hint: pip install 'kvist[all]'\n")


def test_a_page_without_the_package_that_makes_it(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"timestamp": 0, "input_length": 8, "output_length": 2, "hash_ids": [1]}\n')
    code = "import sys; sys.modules['jinja2'] = None; from kvist.cli.main import main; main()"
    command = [sys.executable, "-c", code, "sim", "run", "t.jsonl", "--html", "page.html"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "needs the Python package jinja2" in ran.stderr
    assert ran.stderr.endswith("hint: pip install 'kvist[sim]'\n")


def test_the_simulator_without_its_extra() -> None:
    code = "import sys; sys.modules['numpy'] = None; from kvist.cli.main import main; main()"
    for words in (["sim", "describe", "t.jsonl"], ["sim", "generate", "agents", "--out", "t.jsonl"]):
        ran = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
        assert (ran.returncode, ran.stdout) == (1, "")
        assert ran.stderr == (
            "error: this command needs the Python package numpy, which is not installed\n"
            "hint: pip install 'kvist[sim]'\n"
        )


def test_warnings_of_the_library_are_notes(kvist: Kvist) -> None:
    (kvist.root / "segments").mkdir()
    (kvist.root / "segments" / ("0" * 32)).write_bytes(b"short")
    human = process("stats", store=kvist.url)
    assert human.returncode == 0 and human.stderr.startswith("warning: segments/000")
    for option in ("--json", "-q"):
        assert process("stats", option, store=kvist.url).stderr == ""


def test_a_command_is_imported_only_when_called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "kvist_later.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(SECTIONS["Shell"], "later", Lazy("kvist_later:later", "Fails when imported."))
    assert "Fails when imported." in run(["--help"], {}).out
    with pytest.raises(RuntimeError, match="imported"):
        run(["later"], {})


@pytest.mark.parametrize("group", [main, sim], ids=["kvist", "sim"])
def test_the_table_of_commands_says_what_they_say(group: LazyGroup) -> None:
    context = click.Context(group)
    for section in group.sections.values():
        for name, lazy in section.items():
            command = group.get_command(context, name)
            if command is not None:
                assert command.name == name
                assert command.get_short_help_str(200).startswith(lazy.help.removesuffix(".")), name


def test_the_installed_script(kvist: Kvist) -> None:
    ran = process("stats", "--json", store=kvist.url)
    assert ran.returncode == 0 and json.loads(ran.stdout)["branches"] == 0
    ran = process("show", "nothing", store=kvist.url)
    assert (ran.returncode, ran.stdout) == (4, "")
    assert ran.stderr.startswith("error: no snapshot, branch or tag is called 'nothing'")
