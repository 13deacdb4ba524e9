"""Tests of the page with the runs, from a real server."""

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import psutil
import pytest
from helpers.servers import free_port
from helpers.tracking import write_run
from helpers.workspace import ROOT, python

from minigpt.tracking import uploader


def test_taken_port_is_one_line_with_the_way_to_change_it(repository):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        ran = python("-m", "minigpt", "ui", "--port", str(port), cwd=repository, PYTHONPATH=str(ROOT))
    assert ran.returncode == 1
    assert re.fullmatch(
        rf"minigpt: port {port} of 127.0.0.1 cannot be used \(.*\); .*--port {port + 1}.*\n", ran.stderr
    )


@pytest.mark.slow
def test_one_line_names_the_run_table_and_nothing_else_is_printed(repository):
    write_run(steps=2)
    uploader.sync()
    port = free_port()
    page = subprocess.Popen(
        [sys.executable, "-m", "minigpt", "ui", "--port", str(port)], cwd=repository, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    line = page.stdout.readline()
    address = rf"http://127\.0\.0\.1:{port}/#/experiments/1/runs\?workflowType=machine_learning"
    assert re.match(rf"minigpt: the runs are in {address} ", line), line + page.communicate()[0]
    assert urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=30).status == 200
    started = psutil.Process(page.pid).children(recursive=True)
    os.killpg(page.pid, signal.SIGINT)
    assert page.communicate(timeout=60) == ("", None)
    assert page.returncode == 0
    psutil.wait_procs(started, timeout=60)
    assert not [process for process in started if process.is_running()]


@pytest.mark.slow
def test_runs_on_a_server_are_not_served_again(repository, current_server, logged_in):
    ran = python(
        "-m", "minigpt", "ui", cwd=repository, PYTHONPATH=str(ROOT), MLFLOW_TRACKING_URI=current_server,
        MLFLOW_TRACKING_USERNAME=os.environ["MLFLOW_TRACKING_USERNAME"],
        MLFLOW_TRACKING_PASSWORD=os.environ["MLFLOW_TRACKING_PASSWORD"],
    )  # fmt: skip
    assert re.match(rf"minigpt: the runs are in {current_server}/#/experiments/\d+/runs", ran.stdout), ran.stderr
