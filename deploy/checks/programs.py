"""Runs other programs and reads YAML, for the checks beside it."""

import pathlib
import shutil
import subprocess

import yaml

DEPLOY = pathlib.Path(__file__).resolve().parent.parent


def run(*command: str, text: str | None = None) -> subprocess.CompletedProcess:
    """Runs a program in deploy/. A program that is not installed is a problem like any other."""
    if shutil.which(command[0]) is None:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]} is not installed")
    return subprocess.run(command, cwd=DEPLOY, input=text, capture_output=True, text=True, check=False)


def problems(*command: str, text: str | None = None):
    """Yields what a program had to say, if it failed."""
    done = run(*command, text=text)
    if done.returncode != 0:
        yield f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def output(*command: str) -> str:
    """What a program printed; it must succeed."""
    done = run(*command)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def documents(text: str) -> list[dict]:
    """The objects of a stream of YAML documents."""
    return [document for document in yaml.safe_load_all(text) if document]


def load(path: str):
    """One YAML or JSON file of deploy/."""
    return yaml.safe_load((DEPLOY / path).read_text())
