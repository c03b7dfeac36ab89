"""The command `lmcache-native`: what a user sees, and docs/configuration.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import lmcache_native
from lmcache_native.cli import main
from lmcache_native.config.reference import reference
from lmcache_native.config.sources import TABLE
from lmcache_native.config.table import ALIASES

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command in this process, with an environment that has only the LMCACHE_* variables given."""
    for name in [name for name in os.environ if name.startswith("LMCACHE_")]:
        monkeypatch.delenv(name)

    def call(*arguments: str, **environ: str) -> Ran:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        try:
            code = main(arguments)
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        found = capsys.readouterr()
        return Ran(code, found.out, found.err)

    return call


def lines_of(ran: Ran) -> dict[str, str]:
    assert ran.code == 0, ran.err
    return {line.split()[0]: " ".join(line.split()[1:]) for line in ran.out.splitlines()[1:] if not line.startswith(" ")}


def test_help_and_version(run: Run) -> None:
    assert run("--version") == (0, f"lmcache-native {lmcache_native.__version__}\n", "")
    assert "config" in run("--help").out
    assert "--kv-transfer-config" in run("config", "--help").out
    without = run()
    assert (without.code, without.out) == (2, "")
    assert "usage: lmcache-native" in without.err
    assert run("configure").code == 2


def test_defaults_of_both_connectors(run: Run) -> None:
    lmcache = lines_of(run("config"))
    assert lmcache["max_local_cpu_size"] == "5 default"
    assert lmcache["chunk_size"] == "256 default"
    offloading = lines_of(run("config", "--kv-offloading-size", "20"))
    assert offloading["max_local_cpu_size"] == "20 --kv-offloading-size"
    assert "use_layerwise" not in offloading


def test_values_with_their_sources(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.json").write_text('{"chunk_size": 64, "enable_blending": false}')
    transfer = {
        "kv_connector": "LMCacheConnectorV1",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"lmcache.min_retrieve_tokens": 7},
    }
    ran = run(
        "config",
        "--kv-transfer-config",
        json.dumps(transfer),
        LMCACHE_CONFIG_FILE="a.json",
        LMCACHE_PRIORITY_LIMIT="3",
        LMCACHE_USE_GPU_CONNECTOR_V3="true",
    )
    found = lines_of(ran)
    assert found["chunk_size"] == "64 a.json"
    assert found["priority_limit"] == "3 environment"
    assert found["min_retrieve_tokens"] == "7 kv_connector_extra_config"
    assert found["use_gpu_connector_v3"] == "true environment [no effect here]"
    assert ran.err == ""


def test_the_connector_that_is_named_decides(run: Run) -> None:
    def first_line(*arguments: str) -> str:
        return run("config", "--kv-offloading-size", "1", *arguments).out.split(";")[0]

    assert first_line() == "NativeOffloadingConnector"
    assert first_line("--kv-transfer-config", '{"kv_connector": "LMCacheConnectorV1"}') == "LMCacheNativeConnector"
    assert first_line("--kv-transfer-config", '{"kv_connector": "OffloadingConnector"}') == "NativeOffloadingConnector"
    assert first_line("--connector", "lmcache") == "LMCacheNativeConnector"
    other = run("config", "--kv-transfer-config", '{"kv_connector": "NixlConnector"}')
    assert other.code == 2
    assert "kv_connector='NixlConnector'" in other.err


def test_wrong_is_exit_code_2_with_the_error(run: Run) -> None:
    ran = run("config", LMCACHE_CHUNK_SIZE="0", LMCACHE_REMOTE_URL="redis://h")
    assert (ran.code, ran.out) == (2, "")
    assert "LMCACHE_CHUNK_SIZE='0' (environment): must be a whole number" in ran.err
    assert "LMCACHE_REMOTE_URL='redis://h'" in ran.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--kv-transfer-config", "{"), "must be JSON"),
        (("--kv-transfer-config", "[]"), "must be a JSON object"),
        (("--kv-transfer-config", '{"kv_connector_extra_config": 3}'), "must be a JSON object"),
        (("--kv-offloading-size", "big"), "--kv-offloading-size='big'"),
        (("--kv-offloading-size", "0"), "--kv-offloading-size"),
        (("--kv-offloading-size", "nan"), "--kv-offloading-size"),
    ],
)
def test_wrong_options(run: Run, arguments: tuple[str, str], message: str) -> None:
    ran = run("config", *arguments)
    assert ran.code == 2
    assert message in ran.err


def test_json(run: Run) -> None:
    good = run("config", "--json", LMCACHE_MAX_LOCAL_CPU_SIZE="2.5", LMCACHE_CHUNK_SIZ="1")
    content = json.loads(good.out)
    assert content["connector"] == "lmcache"
    size = {"key": "max_local_cpu_size", "value": "2.5", "source": "environment", "kind": "done"}
    assert size in content["keys"]
    assert "did you mean LMCACHE_CHUNK_SIZE?" in content["warnings"][0]
    bad = run("config", "--json", LMCACHE_MAX_LOCAL_CPU_SIZE="x")
    assert bad.code == 2
    assert "LMCACHE_MAX_LOCAL_CPU_SIZE='x'" in json.loads(bad.out)["error"]
    assert bad.err == ""


def test_warnings_go_to_the_error_stream(run: Run) -> None:
    ran = run("config", LMCACHE_CHUNK_SIZ="1", LMCACHE_GDS_PATH="/gds", LMCACHE_NATIVE_IGNORE_UNSUPPORTED="1")
    assert lines_of(ran)["gds_path"] == "/gds environment [unsupported, ignored]"
    assert "warning: environment variable LMCACHE_CHUNK_SIZ is not known" in ran.err
    assert "warning: unsupported and ignored: LMCACHE_GDS_PATH='/gds'" in ran.err


def test_output_fits_100_columns(run: Run, tmp_path: Path) -> None:
    deep = ",".join(f"{tmp_path}/{letter * 60}" for letter in "abc")
    ran = run("config", LMCACHE_LOCAL_DISK=deep, LMCACHE_MAX_LOCAL_DISK_SIZE="1", LMCACHE_NUMA_MODE="auto")
    assert ran.code == 0
    assert max(map(len, ran.out.splitlines())) <= 100
    assert deep in "".join(line.strip() for line in ran.out.splitlines())


def test_the_committed_reference_is_the_tables() -> None:
    assert (ROOT / "docs/configuration.md").read_text(encoding="utf-8") == reference(), (
        "write it anew: lmcache-native config --reference > docs/configuration.md"
    )


def test_reference_has_every_key_once(run: Run) -> None:
    text = run("config", "--reference").out
    assert text == reference()
    names = [line.split("`")[1].lower() for line in text.splitlines() if line.startswith("| `")]
    assert len(names) == len(TABLE.rows) + len(ALIASES)
    known = {key.name for key in TABLE} | set(ALIASES)
    # Variables are shown as such.
    assert {name if name in known else name.removeprefix("lmcache_") for name in names} == known


def test_as_a_program() -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LMCACHE_")}
    ran = subprocess.run(
        [sys.executable, "-m", "lmcache_native.cli", "config", "--connector", "offloading"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environ,
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "lmcache-native: host memory size missing" in ran.stderr


def test_the_package_declares_the_script() -> None:
    assert 'lmcache-native = "lmcache_native.cli:main"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
