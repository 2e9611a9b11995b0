"""What `compile` says to do next fits the launcher of the cluster and the name of the folder."""

from __future__ import annotations

import shlex
from types import SimpleNamespace

import pytest

from cli.conftest import Run


@pytest.mark.parametrize("folder_name", ["run", "a run's folder"])
def test_torchrun_starts_with_the_launcher(run: Run, backend: SimpleNamespace, folder_name: str) -> None:
    result = run("compile", "job.yaml", "-o", folder_name)
    assert f"next: bash {shlex.quote(folder_name + '/launch.sh')}\n" in result.stderr


@pytest.mark.parametrize("folder_name", ["run", "a run's folder"])
def test_slurm_starts_with_sbatch_in_the_folder(run: Run, backend: SimpleNamespace, folder_name: str) -> None:
    result = run("compile", "job.yaml", "-o", folder_name, "--set", "cluster.launcher=slurm")
    assert result.exit_code == 0, result.stderr
    assert f"next: cd {shlex.quote(folder_name)} && sbatch train.slurm\n" in result.stderr
